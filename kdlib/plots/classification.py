"""Figures and tables of answers: what is taken for what, how sure and how right."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kdlib.config.task_rules import shown_in
from kdlib.metrics.names import MEASURES, rivals_of, student_of, with_interval
from kdlib.plots.axes import (
    INK,
    called,
    colours_of_models,
    intervals,
    label_of,
    legend,
    panels,
    shortened,
    titled,
)

TITLES = {
    "mcnemar": "Right alone: McNemar's test, or a permutation of groups; each p by itself",
    "on_teachers_mistakes": "On the teacher's mistakes",
    "f1_per_class": "F1 by class",
    "worst": "Worst examples",
    "mix": "By source",
}
ANSWER_FIGURES = ("confusion", "reliability", "f1_per_class")
COUNTED = 30  # classes, above which a matrix has no counts, as they could not be read
NAMED = 60  # classes, above which its axes have no names
SHORT, LONG = 20, 40  # characters of a class's name on an axis, and in a title
FULL_BIN = 10  # rows, below which a bin of the reliability plot is drawn pale


def answer_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of these that the results allow, by name; none where tokens were predicted."""
    models = results["models"].values()
    drawn = {"confusion": confusion, "reliability": reliability, "per_class": f1_per_class}
    found = [draw for needed, draw in drawn.items() if all(needed in facts for facts in models)]
    return {draw.__name__: draw(results) for draw in found}


def confusion(results: Mapping[str, Any]) -> Figure:
    """For each true class, what it is taken for: shares as colour, counts as numbers."""
    labels, models = results["labels"], _trained(results)
    columns = len(models) if len(labels) <= 6 else 2 if len(labels) <= COUNTED else 1
    rows, size = math.ceil(len(models) / columns), min(max(1.2 + 0.42 * len(labels), 3.2), 11)
    figure = Figure(figsize=(size * columns + 0.6, size * rows + 0.9), layout="constrained")
    for place, name in enumerate(models, start=1):
        axes, counts = (
            figure.add_subplot(rows, columns, place),
            np.array(results["models"][name]["confusion"]),
        )
        _matrix(axes, counts, labels)
        right = counts.trace() / counts.sum()
        axes.set_title(f"{label_of(name)}: {right:.1%} right", fontsize=9, loc="left", parse_math=False)
    note = f"Colour: share of the true class; numbers: rows; n = {results['rows']:,}"
    return titled(figure, f"{_most_confused(results)}\n{note}")


def _matrix(axes: Axes, counts: np.ndarray, labels: Sequence[str]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    look = {"fontsize": 8 if len(labels) <= 16 else 6, "ha": "center", "va": "center"}
    for true, said in np.argwhere(counts) if len(labels) <= COUNTED else ():
        colour = "white" if shares[true, said] > 0.55 else INK
        axes.text(said, true, f"{counts[true, said]:,}", color=colour, **look)
    names = [shortened(label, SHORT) for label in labels] if len(labels) <= NAMED else []
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("said", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    axes.tick_params(length=0)


def _most_confused(results: Mapping[str, Any]) -> str:
    student = student_of(results)
    who, counts = called(student, "The"), np.array(results["models"][student]["confusion"])
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"{who} takes no row for another class"
    true, said = np.unravel_index(wrong.argmax(), wrong.shape)
    one, other = (shortened(results["labels"][number], LONG) for number in (true, said))
    share = f"{wrong[true, said]:,} of {counts[true].sum():,} rows"
    return f"{who} most often takes {one} for {other}: {share}"


def reliability(results: Mapping[str, Any]) -> Figure:
    """How often each model is right where it is so sure: on the diagonal as often; below, how often it is."""
    colours = colours_of_models(results["models"])
    figure, (upper, lower) = panels(7, 5.6, rows=2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name in _trained(results):
        facts, style = results["models"][name], "--" if name == "teacher" else "-"
        look = {"color": colours[name], "linestyle": style, "linewidth": 1 if name == "baseline" else 2}
        bins = pd.DataFrame(facts["reliability"])
        filled, label = bins[bins["count"] > 0], f"{label_of(name)}: error {with_interval(facts['ece'])}"
        sure, right = filled["confidence"], filled["accuracy"]
        upper.plot(sure, right, label=label, **look)
        alphas = np.where(filled["count"] >= FULL_BIN, 1, 0.3)
        upper.scatter(sure, right, 25, colours[name], alpha=alphas, linewidth=1, zorder=2)
        lower.stairs(bins["count"] / results["rows"], [*bins["low"], 1.0], **look)
    upper.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    lower.set(ylabel="share of rows", xlabel="confidence: the probability of the class said")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(upper, loc="best")
    note = f"n = {results['rows']:,}; a bin of less than {FULL_BIN} rows is pale; {results['interval']}"
    return titled(figure, f"{_sureness(results)}\n{note}")


def _sureness(results: Mapping[str, Any]) -> str:
    name = student_of(results)
    sure, right = results["models"][name]["confidence"], results["models"][name]["accuracy"]["value"]
    verdict = "surer than" if sure > right else "less sure than"
    if abs(sure - right) < 0.01:
        verdict = "about as sure as"
    return f"{called(name, 'The')} is {verdict} it is right: {sure:.1%} sure on average, {right:.1%} right"


def f1_per_class(results: Mapping[str, Any]) -> Figure:
    """F1 of each class that has rows, for the trained models; the student's worst at the top."""
    models, colours = _trained(results), colours_of_models(results["models"])
    own = results["models"][student_of(results)]["per_class"]
    order = sorted((n for n, each in enumerate(own) if each["support"]), key=lambda n: own[n]["f1"]["value"])
    figure, (axes,) = panels(8, 1.5 + (0.12 + 0.13 * len(models)) * len(order))
    places = np.arange(len(order))
    for place, name in enumerate(models):
        found = pd.DataFrame([results["models"][name]["per_class"][number]["f1"] for number in order])
        look = {"fmt": "D" if name == "teacher" else "o", "markersize": 4, "elinewidth": 1, "capsize": 2}
        height = places + 0.7 * ((place + 0.5) / len(models) - 0.5)
        intervals(axes, height, found, lying=True, color=colours[name], label=label_of(name), **look)
    names = [f"{shortened(results['labels'][n], SHORT)} ({own[n]['support']:,})" for n in order]
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set(xlabel="F1 (in brackets: rows of the class)", ylim=(len(order) - 0.4, -0.6), xlim=(None, 1.02))
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    legend(figure, *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    return titled(figure, f"{_hardest(results, order)}\nn = {results['rows']:,}; {results['interval']}")


def _hardest(results: Mapping[str, Any], order: Sequence[int]) -> str:
    student, labels, models = student_of(results), results["labels"], results["models"]
    ours, theirs = ([e["f1"]["value"] for e in models[n]["per_class"]] for n in (student, "teacher"))
    behind = {number: theirs[number] - ours[number] for number in order}
    worst, furthest = order[0], max(sorted(order), key=behind.get)
    opening = f"{shortened(labels[worst], LONG)} is {called(student)}'s worst class: F1 {ours[worst]:.2f}"
    if behind[furthest] <= 0:
        return f"{opening}; in none is it behind the teacher"
    least = f"{shortened(labels[furthest], LONG)}, by {behind[furthest]:.2f}"
    return f"{opening};\nfurthest behind the teacher: {least}"


def answer_tables(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table of these that the results allow, by its file's name; none where tokens were predicted."""
    mistakes = any("on_teachers_mistakes" in facts for facts in results["models"].values())
    tables = {
        "mcnemar": (results.get("mcnemar"), mcnemar_table),
        "on_teachers_mistakes": (mistakes, mistakes_table),
        "f1_per_class": (results.get("labels"), class_table),
        "worst": (results.get("worst"), worst_table),
        "mix": (results.get("mix"), source_table),
    }
    return {name: table(results) for name, (there, table) in tables.items() if there}


def source_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Of each source of a mix its share of the training, and every model on what was held out of it."""
    measures = {MEASURES[name].name: name for name in shown_in(results)}
    found = {
        (_source(part), label_of(model)): {head: with_interval(facts[n]) for head, n in measures.items()}
        for part in results["mix"]
        for model, facts in part["models"].items()
    }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["source", "model"])


def _source(part: Mapping[str, Any]) -> str:
    name = " ".join(filter(None, (part["source"], part.get("subset"))))
    share = f"{part['share']:.1%} of the training rows (weight {part['weight']:g})"
    return f"{name}: {share}; {part['units']} units held out"


def mcnemar_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The student against each other model: rows that only one has right; how likely between equals."""
    student, rows = student_of(results), {}
    for rival in rivals_of(results):
        test = next(t for t in results["mcnemar"] if {t["model"], t["against"]} == {student, rival})
        alone = {test["model"]: test["only_model_right"], test["against"]: test["only_other_right"]}
        rows[label_of(rival)] = {
            f"only {called(student)} is right": alone[student],
            "only the other is right": alone[rival],
            "p": f"{test['p_value']:.2g}",
            "test": test["test"],
        }
    return _table(rows, "against")


def mistakes_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """What becomes of the rows that the teacher gets wrong: its mistake repeated, or the right answer."""
    rows = {
        label_of(name): {
            "the teacher's mistakes": found["rows"],
            "repeated": with_interval(found["repeated"]),
            "answered rightly": with_interval(found["mended"]),
        }
        for name, facts in results["models"].items()
        if name != "teacher" and (found := facts.get("on_teachers_mistakes"))
    }
    return _table(rows, "share, with 95 % interval")


def class_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """F1 of each class by model, and how many rows it has."""
    rows = {label: {} for label in results["labels"]}
    for name, facts in results["models"].items():
        for row, each in zip(rows.values(), facts["per_class"], strict=True):
            row["rows"] = each["support"]
            row[label_of(name)] = with_interval(each["f1"]) if each["support"] else "—"
    return _table(rows, "F1 of the class")


def worst_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The rows on which the student is most wrong or furthest from the teacher; likeliest classes of both."""
    shown, lines = ("teacher", student_of(results)), []
    for row in results["worst"]:
        said = {label_of(n): ", ".join(f"{label} {p:.0%}" for label, p in row["said"][n]) for n in shown}
        lines.append({"why": row["why"], "text": " ".join(row["text"].split()), "right": row["label"]} | said)
    return pd.DataFrame(lines).set_index("why")


def _trained(results: Mapping[str, Any]) -> list[str]:
    return [name for name in results["models"] if name != "untrained"]


def _table(rows: Mapping[str, Mapping[str, Any]], title: str) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(title)
