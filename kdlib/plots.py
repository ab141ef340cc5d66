"""Figures from a run's files: one message each, stated in the title from the figures themselves.

Figures are made from metrics.jsonl, plan.json and comparison_results.json; nothing here imports torch.
Teacher hatched grey, distilled student blue, baseline thin orange, untrained student light grey; safe for colour-blind eyes.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.core.pylabtools import select_figure_formats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.canvas import colours_of
from kdlib.errors import ConfigError
from kdlib.metrics import eval_table, terms_in, training_table
from kdlib.panels import dashboard
from kdlib.progress import progress
from kdlib.runs import Run

COLOURS = {"teacher": "#6e6e6e", "untrained": "#bdbdbd", "baseline": "#e69f00", "distilled": "#0072b2"}
LABELS = {"teacher": "teacher", "untrained": "untrained student", "baseline": "CE-only baseline", "distilled": "distilled student"}
METRIC_LABELS = {
    "kl_to_teacher": "KL to teacher\nnats per token, T = 1", "agreement": "top-1 agreement\nwith the teacher",
    "perplexity": "perplexity\nper token", "bits_per_byte": "bits per byte",
}
CHOICE_LABELS = {
    "choice_accuracy": "right choices\nlikeliest per character", "choice_accuracy_raw": "right choices, raw\nlikeliest as a whole",
    "choice_agreement": "the teacher's choices\nright or wrong", "choice_retention": "retention, %\nof the teacher's right choices",
}
"""Of questions with choices; a comparison without them is drawn from METRIC_LABELS alone."""
DRAWN = ("choice_accuracy", "choice_retention", "choice_agreement", "kl_to_teacher")  # of a comparison of choices, as bars

if (shell := get_ipython()) is not None:  # IPython knows what a Figure is only where pyplot is imported, which nothing here does
    select_figure_formats(shell, {"png"})


def schedules(table: pd.DataFrame) -> Figure:
    """Learning rate, weights and temperature against the optimizer step: the plan of a training."""
    colours = colours_of(terms_in(table))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(table["step"], table["learning_rate"], color="black")
    upper.set(ylabel="learning rate")
    upper.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    peak = table["learning_rate"].idxmax()
    upper.set_title(
        f"The learning rate peaks at {table['learning_rate'][peak]:.1e} and ends at {table['learning_rate'].iloc[-1]:.1e}", loc="left"
    )
    for term in terms_in(table):
        lower.plot(table["step"], table[f"{term}_weight"], color=colours[term], label=f"weight of {term}")
    lower.plot(table["step"], table["temperature"], color="#cc79a7", linestyle=":", label="temperature")
    lower.set_ylim(bottom=0)
    return _labelled(figure, lower, "weight, temperature")


def closeness(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """KL to the teacher on held-out text while training: independent of weights, so comparable between students."""
    figure, axes = _figure()
    for name, table in tables.items():
        axes.plot(table["step"], table["kl_to_teacher"], color=COLOURS[name], marker="o", label=LABELS[name],
                  linewidth=1 if name == "baseline" else 2)
    last = {name: table["kl_to_teacher"].iloc[-1] for name, table in tables.items()}
    axes.set_title("Held-out KL to the teacher: " + ", ".join(f"{LABELS[n]} {v:.2f}" for n, v in last.items()), loc="left")
    axes.set_ylim(bottom=0)
    return _labelled(figure, axes, "KL(teacher ‖ student), nats")


def comparison_bars(results: Mapping[str, Any]) -> Figure:
    """All models on the same tokens, or the same questions, with 95 % intervals."""
    figure, labels = Figure(figsize=(10, 4.4), layout="constrained"), labels_of(results)
    drawn = {m: labels[m] for m in DRAWN if m in labels} if "questions" in results else labels
    for axes, (metric, label) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        models = list(results["models"])
        for position, name in enumerate(models):
            figures = results["models"][name][metric]
            low, high = figures["value"] - figures["low"], figures["high"] - figures["value"]
            axes.bar(position, figures["value"], color=COLOURS[name], hatch="//" if name == "teacher" else None,
                     edgecolor="white", yerr=[[max(low, 0)], [max(high, 0)]], capsize=3)
            axes.text(position, figures["high"], f" {figures['value']:.3g}", ha="center", va="bottom", fontsize=8)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.set_xticks(range(len(models)), [LABELS[m].replace(" ", "\n") for m in models], fontsize=8)
        axes.set_title(label, fontsize=9, loc="left")
        axes.margins(y=0.15)
        _plain_spines(axes)
    message = comparison_message(results).replace(": ", ":\n", 1).replace("; ", ",\n")
    of = f"{results['questions']} questions" if "questions" in results else f"{results['rows']} blocks, {results['tokens']:,} tokens"
    sample = f"n = {of}; {results['interval']}"
    figure.suptitle(f"{message}\n{sample}", fontsize=10, x=0.01, ha="left")
    return figure


def comparison_message(results: Mapping[str, Any]) -> str:
    """What the comparison found, in a sentence; says so where an interval overlaps zero."""
    rival = "baseline" if "baseline" in results["models"] else "untrained"
    parts = []
    of_tokens = (("kl_to_teacher", "KL to the teacher", -1), ("agreement", "agreement", 1), ("perplexity", "perplexity", -1))
    of_choices = (("choice_accuracy", "accuracy of choices", 1), ("choice_agreement", "agreement on choices", 1), of_tokens[0])
    for metric, words, good in of_choices if "questions" in results else of_tokens:
        d = difference(results, "distilled", rival, metric)
        verdict = "no clear difference in" if d["low"] <= 0 <= d["high"] else "better" if d["value"] * good > 0 else "worse"
        parts.append(f"{verdict} {words} ({with_interval(d, '+')})")
    return f"Against the {LABELS[rival]}, the distilled student shows: {'; '.join(parts)}"


def difference(results: Mapping[str, Any], model: str, against: str, metric: str) -> dict[str, Any]:
    """The paired difference of two models in one metric, with its interval."""
    return next(d for d in results["differences"] if (d["model"], d["against"], d["metric"]) == (model, against, metric))


def labels_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that all models of a comparison have, with their labels; those of choices first."""
    return {metric: label for metric, label in {**CHOICE_LABELS, **METRIC_LABELS}.items()
            if all(metric in facts for facts in results["models"].values())}


def quality_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: each metric with its 95 % interval."""
    rows = {LABELS[name]: {label.split("\n")[0]: with_interval(facts[m]) for m, label in labels_of(results).items()}
            for name, facts in results["models"].items()}
    return pd.DataFrame(rows).T


def cost_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: size, speed and memory, as measured in this comparison."""
    rows = {
        LABELS[name]: {"parameters": f"{facts['parameters'] / 1e6:.1f} M", "as safetensors, GiB": f"{facts['size_on_disk_gib']:.2f}",
                       "forward, tokens/s": f"{facts['forward_tokens_per_s']:.0f}", "peak memory, GiB": f"{facts['peak_memory_gib']:.2f}"}
        for name, facts in results["models"].items()
    }
    return pd.DataFrame(rows).T


def difference_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The distilled student's paired differences, the hardest rival first, and whether the interval excludes zero."""
    rivals = [name for name in ("baseline", "untrained", "teacher") if name in results["models"]]
    rows = []
    for rival in rivals:
        for metric, label in labels_of(results).items():
            d = difference(results, "distilled", rival, metric)
            rows.append({
                "distilled student against": LABELS[rival], "metric": label.split("\n")[0],
                "difference and 95 % interval": with_interval(d, "+"), "excludes zero": "yes" if d["low"] > 0 or d["high"] < 0 else "no",
            })
    return pd.DataFrame(rows).set_index("distilled student against")


def with_interval(figures: Mapping[str, float], sign: str = "") -> str:
    """`1.22 [1.13, 1.33]`: three digits each, whole numbers from 1,000 on; `sign` is + for differences."""
    three = [f"{x:{sign},.0f}" if abs(x) >= 1000 else f"{x:{sign}#.3g}".rstrip(".") for x in map(figures.get, ("value", "low", "high"))]
    return "{} [{}, {}]".format(*three)


def run_figures(run: Run, results: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Every figure that the files of a run allow, by name: for notebook and report alike."""
    evaluation, baseline = eval_table(run), eval_table(run.baseline)
    figures = {"teacher_student_comparison": comparison_bars(results)} if results else {}
    if len(training_table(run)):
        with suppress(ConfigError):  # of another version: its report says so
            others = [progress(run, run.baseline)] if len(training_table(run.baseline)) else []
            figures["dashboard"] = dashboard(progress(run), others=others)
    if len(evaluation) and "kl_to_teacher" in evaluation:
        figures["closeness"] = closeness({"distilled": evaluation} | ({"baseline": baseline} if len(baseline) else {}))
    return figures


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    return figure, figure.subplots()


def _labelled(figure: Figure, axes: Axes, ylabel: str) -> Figure:
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    for each in figure.axes:
        each.title.set_fontsize(10)
        _plain_spines(each)
    return figure


def _plain_spines(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
