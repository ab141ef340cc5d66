"""Figures and tables from a run's files: one message each, in the title.

Teacher hatched grey, distilled student blue, baseline thin orange, untrained student light grey.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kdlib.config.task_rules import differing, rules_in, shown_in
from kdlib.metrics.names import DRAWN, MEASURES, difference, rivals_of, student_of, with_interval
from kdlib.plots.axes import (
    COLOURS,
    LABELS,
    called,
    colours_of_models,
    intervals,
    label_of,
    legend,
    on_axis,
    panels,
    titled,
)
from kdlib.plots.classification import answer_figures

COSTS = {  # what a comparison measures of it: how a column is headed, and its figures written
    "parameters": ("parameters", lambda count: f"{count / 1e6:.1f} M"),
    "size_on_disk_gib": ("as safetensors, GiB", lambda size: f"{size:.{'2f' if size >= 0.1 else '2g'}}"),
    "forward_tokens_per_s": ("forward, tokens/s", "{:.0f}".format),
    "latency_ms": ("one row, ms (median, middle half)", with_interval),
    "throughput_rows_per_s": ("rows/s, in batches", "{:,.0f}".format),
    "load_seconds": ("to load, s", "{:.1f}".format),
    "peak_memory_gib": ("peak memory, GiB", "{:.2f}".format),
}

BARS = "teacher_student_comparison"  # the figure over all models
LEARNED = ("choice_accuracy", "accuracy", "macro_f1", "log_loss", "kl_to_teacher", "perplexity")


def learning_curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What was measured on held-out rows while training; none depends on the weights."""
    shown = [name for name in LEARNED if all(name in table for table in tables.values())]
    figure, every = panels(10, 3.2, len(shown))
    for axes, metric in zip(every, shown, strict=True):
        for name, table in tables.items():
            look = {"color": COLOURS[name], "linewidth": 1 if name == "baseline" else 2, "marker": "o"}
            axes.plot(table["step"], table[metric], markersize=4, label=LABELS[name], **look)
        last = [f"{table[metric].iloc[-1]:#.3g}".rstrip(".") for table in tables.values()]
        axes.set_title(f"{MEASURES[metric].brief}\n{' / '.join(last)}", loc="left", fontsize=10)
        if metric == "kl_to_teacher":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step")
        legend(axes)
    who = " / ".join(LABELS[name] for name in tables)
    return titled(figure, f"On held-out rows, at the end: {who}")


def comparison_bars(results: Mapping[str, Any]) -> Figure:
    """All models on the same held-out rows, with 95 % intervals."""
    drawn, colours = shown_in(results)[:DRAWN], colours_of_models(models := results["models"])
    figure, every = panels(10, 4.4, len(drawn))
    for axes, metric in zip(every, drawn, strict=True):
        for place, (name, facts) in enumerate(models.items()):
            found, hatch = facts[metric], "//" if name == "teacher" else None
            axes.bar(place, found["value"], color=colours[name], hatch=hatch, edgecolor="white")
            intervals(axes, place, found, fmt="none", ecolor="black")
            axes.text(place, found["high"], f" {found['value']:.3g}", ha="center", va="bottom", fontsize=8)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.set_xticks(range(len(models)), [on_axis(m) for m in models], fontsize=8, parse_math=False)
        axes.set_title(MEASURES[metric].label(rules_in(results).unit).strip(), fontsize=9, loc="left")
        axes.margins(y=0.15)
    message = comparison_message(results).replace(": ", ":\n", 1).replace("; ", ",\n")
    return titled(figure, f"{message}\n{sample_of(results)}")


def sample_of(results: Mapping[str, Any]) -> str:
    """What was measured on, in words."""
    if "questions" in results:
        sample = f"{results['questions']:,} questions"
    elif "tokens" in results:
        sample = f"{results['rows']} {rules_in(results).rows}, {results['tokens']:,} tokens"
    else:
        sample = f"{results['rows']:,} {results['split']} rows"
    return f"n = {sample}; {results['interval']}"


def comparison_message(results: Mapping[str, Any]) -> str:
    """What the comparison found, in a sentence; says so where an interval overlaps zero."""
    student, rival, parts = student_of(results), rivals_of(results)[0], []
    for metric in differing(results, rival, first=True):
        d, measure = difference(results, student, rival, metric), MEASURES[metric]
        better = d["value"] > 0 if measure.higher_is_better else d["value"] < 0
        verdict = "no clear difference in" if d["low"] <= 0 <= d["high"] else "better" if better else "worse"
        parts.append(f"{verdict} {measure.brief} ({with_interval(d, '+')})")
    if "retention" in shown_in(results):
        parts.append(f"{with_interval(results['models'][student]['retention'])} % of the teacher's accuracy")
    return f"Against {called(rival)}, {called(student)} shows: {'; '.join(parts)}"


def quality_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: each metric with its 95 % interval."""
    models, shown = results["models"].items(), shown_in(results)
    rows = {label_of(n): {MEASURES[m].name: with_interval(facts[m]) for m in shown} for n, facts in models}
    return pd.DataFrame(rows).T


def cost_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: size, speed and memory, as measured in this comparison."""
    rows = {
        label_of(name): {label: form(facts[cost]) for cost, (label, form) in COSTS.items() if cost in facts}
        for name, facts in results["models"].items()
    }
    return pd.DataFrame(rows).T.fillna("")


def difference_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The student's paired differences, the hardest rival first, and whether the interval excludes zero."""
    student, rows = student_of(results), []
    for rival in rivals_of(results):
        for metric in differing(results, rival):
            d = difference(results, student, rival, metric)
            clear = "yes" if d["low"] > 0 or d["high"] < 0 else "no"
            rows.append((label_of(rival), MEASURES[metric].name, with_interval(d, "+"), clear))
    columns = [f"{label_of(student)} against", "metric", "difference and 95 % interval", "excludes zero"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[0])


def comparison_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All, by name."""
    return {BARS: comparison_bars(results), **answer_figures(results)}
