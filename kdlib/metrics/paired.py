"""Several models' answers to the same questions as plain data: intervals, differences, tests, worst rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from kdlib.metrics.bootstrap import Bootstrap, interval, mcnemar
from kdlib.metrics.classification import Answers, details, item_figures, measures

CENTRED = ("ece",)  # chance parts accuracy from confidence in every bin, and resampling adds more of it
ON_MISTAKES = ("repeated", "mended")  # of the teacher's: shares that are repeated, and answered rightly
FEW_GROUPS = 10  # of which a bootstrap's intervals are far too narrow
LONGEST = 300  # characters of a text that is shown
TOP = 3  # classes shown of a distribution


def results_of(
    models: Mapping[str, Answers],
    labels: Sequence[str] = (),
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Models, the teacher first, with 95 % intervals; the paired differences and McNemar's test of each two.

    Args:
        labels: the classes' names; none where the choices of each item are its own, so that F1 means nothing.
        groups: what each item belongs to, where items resemble each other; then these are resampled.

    Returns:
        {"models": {name: {measure: {value, low, high}, …}}, "differences": […], "mcnemar": […], "labels",
        "rows", "resamples", "interval"}, as comparison_results.json has it.
    """
    teacher = next(iter(models.values()))
    for name, answers in models.items():
        if not np.array_equal(answers.labels, teacher.labels):
            raise ValueError(f"{name} was asked other questions than the teacher, or in another order")
    independent = len(teacher) if groups is None else len(set(groups))
    over = "rows"
    if groups is not None:
        over = f"{independent} groups of rows" + ", too few to trust" * (independent < FEW_GROUPS)
    bootstrap = Bootstrap(len(teacher), resamples, seed, groups)
    figures, entries = _figures(models, bootstrap, classes=bool(labels)), {}
    for name, answers in models.items():
        behind = {m: figures[name].pop(m) for m in ("f1", *ON_MISTAKES) if m in figures[name]}
        # the teacher agrees with itself for certain
        shares = {"accuracy": independent, "agreement": None if answers is teacher else independent}
        entry: dict[str, Any] = {
            m: interval(value, drawn, centred=m in CENTRED, share_of=shares.get(m))
            for m, (value, drawn) in figures[name].items()
        }
        entry["ece"]["low"] = max(entry["ece"]["low"], 0.0)
        if missed := int((~teacher.right).sum()):
            share_of = min(missed, independent) if answers is not teacher else None
            shown = {m: interval(*behind[m], share_of=share_of) for m in ON_MISTAKES}
            entry["on_teachers_mistakes"] = {"rows": missed, **shown}
        entry |= details(answers, labels)
        for number, of_class in enumerate(entry.get("per_class", [])):
            value, drawn = of_class["f1"], behind["f1"][1][:, number]
            # no draw may have the class
            certain = {"value": value, "low": value, "high": value}
            of_class["f1"] = certain if np.isnan(drawn).all() else interval(value, drawn)
        entries[name] = entry
    return {
        "models": entries,
        "differences": differences(figures, CENTRED),
        "mcnemar": [_discordant(models, a, b) for b, a in combinations(models, 2)],
        "labels": list(labels),
        "rows": len(teacher),
        "resamples": resamples,
        "interval": f"95 %, paired bootstrap over {over}",
    }


def differences(
    figures: Mapping[str, Mapping[str, tuple[float, np.ndarray]]], centred: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Each model's figures minus those of each before it, the teacher first, with intervals.

    Args:
        figures: model → measure → its value, and its values on the same resampled items.
        centred: measures that resampling by itself makes larger.
    """
    return [
        {
            "model": a,
            "against": b,
            "metric": m,
            **interval(value - figures[b][m][0], drawn - figures[b][m][1], centred=m in centred),
        }
        for b, a in combinations(figures, 2)
        for m, (value, drawn) in figures[a].items()
    ]


def worst_rows(
    models: Mapping[str, Answers],
    student: str,
    texts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    wrong: int = 6,
    far: int = 4,
) -> list[dict[str, Any]]:
    """The rows on which the student is most wrong, and of the others those furthest from the teacher.

    Args:
        models: the teacher first.
        texts: [N], shown up to 300 characters.
        choices: [N] what could be said of each: the classes, or the choices of a question.

    Returns:
        Each {"row", "why", "text", "label", "nats", "kl_to_teacher", "said": {model: [[class, share], …]}}.
    """
    teacher, answers = next(iter(models.values())), models[student]
    kl = answers.kl_from(teacher)
    worst = [row for row in np.argsort(-answers.nats, kind="stable").tolist() if not answers.right[row]]
    chosen = dict.fromkeys(worst[:wrong], "most wrong")
    others = [row for row in np.argsort(-kl, kind="stable").tolist() if row not in chosen and kl[row] > 0]
    chosen |= dict.fromkeys(others[:far], "furthest from the teacher")
    return [
        {
            "row": row,
            "why": why,
            "text": texts[row][:LONGEST] + " …" * (len(texts[row]) > LONGEST),
            "label": choices[row][answers.labels[row]],
            "nats": float(answers.nats[row]),
            "kl_to_teacher": float(kl[row]),
            "said": {name: _top(each.probabilities[row], choices[row]) for name, each in models.items()},
        }
        for row, why in chosen.items()
    ]


def _figures(
    models: Mapping[str, Answers], bootstrap: Bootstrap, *, classes: bool
) -> dict[str, dict[str, tuple[Any, np.ndarray]]]:
    """model → measure → its value, and its values on resampled items, which are the same for all models."""
    teacher = next(iter(models.values()))
    columns = {
        (name, column): values
        for name, answers in models.items()
        for column, values in item_figures(answers, teacher, classes=classes).items()
    }
    table = np.concatenate(list(columns.values()), axis=1)
    ends = np.cumsum([values.shape[1] for values in columns.values()])[:-1]
    both = [
        dict(zip(columns, np.split(sums, ends, axis=1), strict=True))
        for sums in (table.sum(axis=0, keepdims=True), bootstrap.sums(table))
    ]
    found = {}
    for name in models:
        whole, drawn = (measures({c: each[n, c] for n, c in columns if n == name}) for each in both)
        found[name] = {m: (v[0], drawn[m]) for m, v in whole.items() if not np.isnan(v).all()}
    return found


def _discordant(models: Mapping[str, Answers], a: str, b: str) -> dict[str, Any]:
    """On how many items only one of two is right, and McNemar's test of that."""
    one, other = models[a].right, models[b].right
    first, second = int((one & ~other).sum()), int((~one & other).sum())
    counts = {"only_model_right": first, "only_other_right": second}
    return {"model": a, "against": b, **counts, **mcnemar(first, second)}


def _top(probabilities: np.ndarray, choices: Sequence[str]) -> list[list[Any]]:
    likeliest = np.argsort(-probabilities[: len(choices)], kind="stable")[:TOP]
    return [[choices[number], float(probabilities[number])] for number in likeliest]
