"""Figures of classifiers: what is taken for what, how sure against how right, F1 of each class.  Imports no
torch.

One message each, stated in the title from the figures themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kdlib.metrics.names import student_of, with_interval
from kdlib.plots.axes import INK, called, colours_of_models, label_of

ANSWER_FIGURES = ("confusion", "reliability", "f1_per_class")
COUNTED = 30  # classes, above which a matrix has no counts, as they could not be read
NAMED = 60  # classes, above which its axes have no names
SHORT = 20  # characters of a class's name on an axis
EVEN = 0.01  # between confidence and accuracy: less is called even
FULL_BIN = 10  # rows, below which a bin of the reliability plot is drawn pale


def answer_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of these that the results allow, by name; none where tokens were predicted."""
    models = results["models"]
    figures = {}
    if all("confusion" in facts for facts in models.values()):
        figures["confusion"] = confusion(results)
    if all("reliability" in facts for facts in models.values()):
        figures["reliability"] = reliability(results)
    if all("per_class" in facts for facts in models.values()):
        figures["f1_per_class"] = f1_per_class(results)
    return figures


def confusion(results: Mapping[str, Any]) -> Figure:
    """For each true class, what it is taken for: shares of its row as colour, counts as numbers; a matrix
    for each trained model.
    """
    labels, models = results["labels"], _trained(results)
    columns = len(models) if len(labels) <= 6 else 2 if len(labels) <= COUNTED else 1
    rows, size = math.ceil(len(models) / columns), min(max(1.2 + 0.42 * len(labels), 3.2), 11)
    figure = Figure(figsize=(size * columns + 0.6, size * rows + 0.9), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every[len(models) :]:
        axes.set_axis_off()
    for axes, name in zip(every, models, strict=False):
        counts = np.array(results["models"][name]["confusion"])
        _matrix(axes, counts, labels)
        right = counts.trace() / counts.sum()
        axes.set_title(f"{label_of(name)}: {right:.1%} right", fontsize=9, loc="left", parse_math=False)
    return _titled(
        figure,
        f"{_most_confused(results)}\nColour: share of the true class; numbers: rows; n = {results['rows']:,}",
    )


def _matrix(axes: Axes, counts: np.ndarray, labels: Sequence[str]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    if len(labels) <= COUNTED:
        size = 8 if len(labels) <= 16 else 6
        for (true, said), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[true, said] > 0.55 else INK
                axes.text(said, true, f"{count:,}", ha="center", va="center", fontsize=size, color=colour)
    names = [_short(label) for label in labels] if len(labels) <= NAMED else []
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("said", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    axes.tick_params(length=0)


def _most_confused(results: Mapping[str, Any]) -> str:
    student, labels = student_of(results), results["labels"]
    counts = np.array(results["models"][student]["confusion"])
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"{called(student, 'The')} takes no row for another class"
    true, said = np.unravel_index(wrong.argmax(), wrong.shape)
    return (
        f"{called(student, 'The')} most often takes {_short(labels[true], 40)} for "
        f"{_short(labels[said], 40)}: "
        f"{wrong[true, said]:,} of {counts[true].sum():,} rows"
    )


def reliability(results: Mapping[str, Any]) -> Figure:
    """How often each model is right where it is so sure; on the diagonal it is as right as it is sure.
    Below: how often it is so sure.
    """
    models = _trained(results)
    colours = colours_of_models(results["models"])
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name in models:
        _reliability_lines(upper, lower, results, name, colours[name])
    upper.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    lower.set(ylabel="share of rows", xlabel="confidence: the probability of the class said")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend = upper.legend(frameon=False, fontsize=8, loc="best")
    for text in legend.get_texts():
        text.set_parse_math(False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    note = f"n = {results['rows']:,}; a bin of less than {FULL_BIN} rows is pale; {results['interval']}"
    return _titled(figure, f"{_sureness(results)}\n{note}")


def _reliability_lines(upper: Axes, lower: Axes, results: Mapping[str, Any], name: str, colour: str) -> None:
    facts = results["models"][name]
    look = {
        "color": colour,
        "linestyle": "--" if name == "teacher" else "-",
        "linewidth": 1 if name == "baseline" else 2,
    }
    filled = [each for each in facts["reliability"] if each["count"]]
    sure, right = ([each[key] for each in filled] for key in ("confidence", "accuracy"))
    upper.plot(sure, right, label=f"{label_of(name)}: error {with_interval(facts['ece'])}", **look)
    for each in filled:
        pale = 1 if each["count"] >= FULL_BIN else 0.3
        upper.plot(each["confidence"], each["accuracy"], "o", color=colour, markersize=5, alpha=pale)
    edges = [each["low"] for each in facts["reliability"]] + [1.0]
    lower.stairs([each["count"] / results["rows"] for each in facts["reliability"]], edges, **look)


def _sureness(results: Mapping[str, Any]) -> str:
    name = student_of(results)
    facts = results["models"][name]
    sure, right = facts["confidence"], facts["accuracy"]["value"]
    side = "surer than it is right" if sure > right else "less sure than it is right"
    verdict = "about as sure as it is right" if abs(sure - right) < EVEN else side
    return f"{called(name, 'The')} is {verdict}: {sure:.1%} sure on average, {right:.1%} right"


def f1_per_class(results: Mapping[str, Any]) -> Figure:
    """F1 of each class that has rows, for the trained models, with intervals; the student's worst class
    at the top.
    """
    models, student = _trained(results), student_of(results)
    colours = colours_of_models(results["models"])
    of_student = results["models"][student]["per_class"]
    order = sorted(
        (number for number, each in enumerate(of_student) if each["support"]),
        key=lambda number: of_student[number]["f1"]["value"],
    )
    figure = Figure(figsize=(8, 1.5 + (0.12 + 0.13 * len(models)) * len(order)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(models):
        entries = [results["models"][name]["per_class"][number]["f1"] for number in order]
        height = [position + 0.7 * ((place + 0.5) / len(models) - 0.5) for position in range(len(order))]
        value, low, high = (np.array([each[key] for each in entries]) for key in ("value", "low", "high"))
        axes.errorbar(
            value,
            height,
            xerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)],
            color=colours[name],
            capsize=2,
            fmt="D" if name == "teacher" else "o",
            markersize=4,
            elinewidth=1,
            linestyle="none",
            label=label_of(name),
        )
    support = [of_student[number]["support"] for number in order]
    names = [
        f"{_short(results['labels'][number])} ({count:,})"
        for number, count in zip(order, support, strict=True)
    ]
    axes.set_yticks(range(len(order)), names, fontsize=8, parse_math=False)
    axes.set(xlabel="F1 (in brackets: rows of the class)", ylim=(len(order) - 0.4, -0.6), xlim=(None, 1.02))
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=len(models),
    )
    return _titled(figure, f"{_hardest(results, order)}\nn = {results['rows']:,}; {results['interval']}")


def _hardest(results: Mapping[str, Any], order: Sequence[int]) -> str:
    student = student_of(results)
    ours, theirs = (results["models"][name]["per_class"] for name in (student, "teacher"))
    gap, furthest = max(
        (theirs[number]["f1"]["value"] - ours[number]["f1"]["value"], -number) for number in order
    )
    opening = (
        f"{_short(results['labels'][order[0]], 40)} is {called(student)}'s worst class: F1 "
        f"{ours[order[0]]['f1']['value']:.2f}"
    )
    if gap <= 0:
        return f"{opening}; in none is it behind the teacher"
    return (
        f"{opening};\nfurthest behind the teacher: {_short(results['labels'][-furthest], 40)}, by {gap:.2f}"
    )


def _trained(results: Mapping[str, Any]) -> list[str]:
    return [name for name in results["models"] if name != "untrained"]


def _short(label: str, length: int = SHORT) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}…"


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure
