"""How many programming problems models solve, and how their other programs fail."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kdlib.metrics.names import with_interval
from kdlib.plots.axes import SPARE, called, colours_of_models, intervals, label_of, legend, panels, titled

KINDS = {  # of verdicts: colours
    "passed": "#0072b2",
    "assertion": "#e69f00",
    "exception": "#d55e00",
    "syntax error": "#cc79a7",
    "time-out": "#6e6e6e",
    "memory": SPARE[0],
    "refused": "#1f2328",
}


def code_figure(results: Mapping[str, Any]) -> Figure:
    """pass@k of each model with its interval, and what became of all their programs."""
    models = results["models"]
    colours, names = colours_of_models(models), [label_of(name) for name in models]
    metrics = [metric for metric in next(iter(models.values())) if metric.startswith("pass@")]
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
    for kind, colour in KINDS.items():
        counts = [_of_kind(entry, kind) for entry in models.values()]
        before = [
            sum(_of_kind(e, k) for k in list(KINDS)[: list(KINDS).index(kind)]) for e in models.values()
        ]
        if any(counts):
            right.barh(range(len(models)), counts, left=before, color=colour, label=kind, height=0.6)
    right.set_yticks(range(len(models)), names, fontsize=8, parse_math=False)
    right.set_xlabel("programs", fontsize=8)
    legend(right, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
    for axes in (left, right):
        axes.set_ylim(len(models) - 0.4, -0.6)
    return titled(figure, code_message(results))


def code_message(results: Mapping[str, Any]) -> str:
    """What was found, in a sentence."""
    name, models = results["benchmark"], results["models"]
    metric = next(metric for metric in next(iter(models.values())) if metric.startswith("pass@"))
    shares = [f"{called(each, '')} {entry[metric]['value']:.1%}".strip() for each, entry in models.items()]
    asked = (
        f"{results['problems']} of {results['of']}" if results["problems"] < results["of"] else results["of"]
    )
    return f"{name}, {asked} problems, {metric}: {', '.join(shares)}"


def code_tables(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Scores, differences (where there are several models) and verdicts of a benchmark, by name."""
    models = results["models"]
    metrics = [metric for metric in next(iter(models.values())) if metric.startswith("pass@")]
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


def _of_kind(entry: Mapping[str, Any], kind: str) -> int:
    return sum(n for verdict, n in entry["verdicts"].items() if verdict.partition(":")[0] == kind)


def figures_of(every: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A figure for each benchmark, by name."""
    return {f"code_{results['benchmark']}": code_figure(results) for results in every}


def tables_of(every: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """The tables of each benchmark, by name: code_humaneval_scores."""
    return {
        f"code_{results['benchmark']}_{name}": table
        for results in every
        for name, table in code_tables(results).items()
    }
