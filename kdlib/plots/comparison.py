"""Figures and tables of models on the same rows or problems: one message each, in the title.

Teacher hatched grey, distilled student blue, baseline thin orange, untrained student light grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.config.task_rules import differing, primary_in, rules_in, shown_in
from kdlib.metrics.names import (
    DRAWN,
    MEASURES,
    difference,
    is_better,
    rivals_of,
    student_of,
    three_digits,
    with_interval,
)
from kdlib.plots.axes import (
    COLOURS,
    LABELS,
    SPARE,
    called,
    colours_of_models,
    intervals,
    label_of,
    legend,
    on_axis,
    panels,
    titled,
    upper,
)
from kdlib.plots.classification import answer_figures

COSTS = {  # what a comparison measures of it: how a column is headed, and its figures written
    "parameters": ("parameters", lambda count: f"{count / 1e6:.1f} M"),
    "size_on_disk_gib": ("as safetensors, GiB", lambda size: f"{size:.{'2f' if size >= 0.1 else '2g'}}"),
    "forward_tokens_per_s": ("forward, tokens/s (median, middle half)", with_interval),
    "latency_ms": ("one row, ms (median, middle half)", with_interval),
    "throughput_rows_per_s": ("rows/s, in batches (median, middle half)", with_interval),
    "peak_memory_gib": ("peak memory, GiB", "{:.2f}".format),
}

PRIMARY = " (primary)"
NAMED = 4  # models in a title
FOUND = {True: "better", False: "worse", None: "no clear difference in"}
WAYS = {True: "better", False: "worse", None: "open"}
BARS = "teacher_student_comparison"  # the figure over all models
LEARNED = ("choice_accuracy", "accuracy", "macro_f1", "log_loss", "kl_to_teacher", "perplexity")
VERDICTS = {  # of verdicts on programs: colours
    "passed": "#0072b2",
    "assertion": "#e69f00",
    "exception": "#d55e00",
    "syntax error": "#cc79a7",
    "time-out": "#6e6e6e",
    "memory": SPARE[0],
    "refused": "#1f2328",
}


def learning_curves(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """What was measured on held-out rows while training; none depends on the weights."""
    tables = {name: table for name, table in tables.items() if len(table)}
    shown = [name for name in LEARNED if tables and all(name in table for table in tables.values())]
    if not shown:
        figure = Figure(figsize=(10, 0.5))
        figure.text(
            0.01, 0.4, "Nothing was measured on held-out rows while training (training.eval_strategy)"
        )
        return figure
    figure, every = panels(10, 3.2, len(shown))
    for axes, metric in zip(every, shown, strict=True):
        for name, table in tables.items():
            look = {"color": COLOURS[name], "linewidth": 1 if name == "baseline" else 2, "marker": "o"}
            axes.plot(table["step"], table[metric], markersize=4, label=LABELS[name], **look)
        last = [three_digits(table[metric].iloc[-1]) for table in tables.values()]
        axes.set_title(f"{MEASURES[metric].brief}\n{' / '.join(last)}", loc="left", fontsize=10)
        if metric == "kl_to_teacher":
            axes.set_ylim(bottom=0)
        elif metric == "perplexity":
            axes.set_yscale("log")
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
            value = three_digits(found["value"])
            axes.text(place, found["high"], value, ha="center", va="bottom", fontsize=8)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.set_xticks(range(len(models)), [on_axis(m) for m in models], fontsize=8, parse_math=False)
        title = MEASURES[metric].label(rules_in(results).unit).strip()
        if metric == primary_in(results):
            title = title.replace(MEASURES[metric].name, MEASURES[metric].name + PRIMARY, 1)
        axes.set_title(title, fontsize=9, loc="left")
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
    """What the comparison found, in a sentence: the primary measure first, the others named as beside it."""
    student, rival, parts = student_of(results), rivals_of(results)[0], []
    for metric in dict.fromkeys([primary_in(results), *differing(results, rival, first=True)]):
        d = difference(results, student, rival, metric)
        parts.append(f"{FOUND[is_better(d, metric)]} {MEASURES[metric].brief} ({with_interval(d, '+')})")
    parts[0] += ", the primary measure"
    if len(parts) > 1:
        parts[1] = f"beside it, uncorrected: {parts[1]}"
    if "retention" in shown_in(results):
        parts.append(f"{with_interval(results['models'][student]['retention'])} % of the teacher's accuracy")
    return f"Against {called(rival)}, {called(student)} shows: {'; '.join(parts)}"


def decided_by(results: Mapping[str, Any]) -> str:
    """Which difference decides, and what the others are worth, which are many."""
    rivals, name = rivals_of(results), MEASURES[primary_in(results)].words
    others = sum(len(differing(results, rival)) for rival in rivals) - 1
    found = f"{upper(name)} is the primary measure: its difference to {called(rivals[0])} decides."
    if others:
        found += (
            f" The other {others} differences are each taken by itself, at 95 %, and not corrected for their "
            "number: where nothing differs, about one in twenty still excludes zero."
        )
    return found


def quality_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: each metric with its 95 % interval."""
    models, shown = results["models"].items(), shown_in(results)
    heads = {m: MEASURES[m].name + PRIMARY * (m == primary_in(results)) for m in shown}
    rows = {label_of(n): {heads[m]: with_interval(facts[m]) for m in shown} for n, facts in models}
    return pd.DataFrame(rows).T


def cost_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: size, speed and memory, as measured in this comparison."""
    return pd.DataFrame({label_of(n): costs_of(each) for n, each in results["models"].items()}).T.fillna("")


def costs_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """One model's row of that table; no speed timed only once."""
    known = {cost: facts[cost] for cost in COSTS if cost in facts}
    told = {c: v for c, v in known.items() if COSTS[c][1] is not with_interval or isinstance(v, Mapping)}
    return {COSTS[cost][0]: COSTS[cost][1](value) for cost, value in told.items()}


def difference_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The student's paired differences, the primary first, and which way each goes beyond its interval."""
    student, rows, decides = student_of(results), [], primary_in(results)
    for rival in rivals_of(results):
        metrics = differing(results, rival)
        for metric in sorted(metrics, key=lambda m: m != decides) if not rows else metrics:
            d, name = difference(results, student, rival, metric), MEASURES[metric].name
            primary = PRIMARY * (not rows)
            rows.append((label_of(rival), name + primary, with_interval(d, "+"), WAYS[is_better(d, metric)]))
    columns = [f"{label_of(student)} against", "metric", "difference and 95 % interval", "found"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[0])


def comparison_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All, by name."""
    return {BARS: comparison_bars(results), **answer_figures(results)}


def code_figure(results: Mapping[str, Any]) -> Figure:
    """pass@k of each model with its interval, and what became of all their programs."""
    models = results["models"]
    colours, names = colours_of_models(models), [label_of(name) for name in models]
    metrics = _scores_in(results)
    figure, (left, right) = panels(10, 1.6 + 0.5 * len(models) * max(len(metrics), 1), 2)
    ticks, labels = [], []
    for row, (name, entry) in enumerate(models.items()):
        for number, metric in enumerate(metrics):
            place = row + (number + 0.5) * 0.8 / len(metrics) - 0.4
            ticks, labels = [*ticks, place], [*labels, f"{label_of(name)}, {metric}"]
            intervals(left, place, entry[metric], lying=True, color=colours[name])
    left.set_yticks(ticks, labels, fontsize=8, parse_math=False)
    left.set_xlabel("share of problems, 95 % interval over problems", fontsize=8)
    left.set_xlim(-0.02, 1.02)
    before = np.zeros(len(models))
    for kind, colour in VERDICTS.items():
        counts = np.array([_of_kind(entry, kind) for entry in models.values()])
        if counts.any():
            right.barh(range(len(models)), counts, left=before, color=colour, label=kind, height=0.6)
            before += counts
    right.set_yticks(range(len(models)), names, fontsize=8, parse_math=False)
    right.set_xlabel("programs", fontsize=8)
    legend(right, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
    for axes in (left, right):
        axes.set_ylim(len(models) - 0.4, -0.6)
    return titled(figure, code_message(results))


def code_message(results: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    name, models, metric = results["benchmark"], results["models"], _scores_in(results)[0]
    shares = [f"{called(each, '')} {entry[metric]['value']:.1%}".strip() for each, entry in models.items()]
    if len(shares) > NAMED:  # the others stand in the picture
        best = max([*models][1:], key=lambda each: models[each][metric]["value"])
        shares = [shares[0], f"best of {len(shares) - 1} others {shares[[*models].index(best)]}"]
    asked = (
        f"{results['problems']} of {results['of']}" if results["problems"] < results["of"] else results["of"]
    )
    return f"{name}, {asked} problems, {metric}: {', '.join(shares)}"


def _tables_of(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Scores, differences (where there are several models) and verdicts of a benchmark, by name."""
    models, metrics = results["models"], _scores_in(results)
    scores = {label_of(n): {m: with_interval(entry[m]) for m in metrics} for n, entry in models.items()}
    kinds = list(dict.fromkeys(kind for entry in models.values() for kind in entry["verdicts"]))
    counts = {label_of(n): {k: entry["verdicts"].get(k, 0) for k in kinds} for n, entry in models.items()}
    differences = [
        {"model": label_of(d["model"]), "against": label_of(d["against"]), "metric": d["metric"],
         "difference and 95 % interval": with_interval(d, "+"),
         "found": "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "open"}
        for d in results["differences"]
    ]  # fmt: skip
    found = {"scores": pd.DataFrame(scores).T, "verdicts": pd.DataFrame(counts)}
    return found | ({"differences": pd.DataFrame(differences).set_index("model")} if differences else {})


def _scores_in(results: Mapping[str, Any]) -> list[str]:
    """pass@1, pass@10, …"""
    return [metric for metric in next(iter(results["models"].values())) if metric.startswith("pass@")]


def _of_kind(entry: Mapping[str, Any], kind: str) -> int:
    return sum(n for verdict, n in entry["verdicts"].items() if verdict.partition(":")[0] == kind)


def code_figures(every: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A figure for each benchmark, by name."""
    return {f"code_{results['benchmark']}": code_figure(results) for results in every}


def code_tables(every: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """The tables of each benchmark, by name: code_humaneval_scores."""
    return {
        f"code_{results['benchmark']}_{name}": table
        for results in every
        for name, table in _tables_of(results).items()
    }
