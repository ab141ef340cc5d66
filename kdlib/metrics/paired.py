"""The answers of several models to the same questions as plain data: measures with intervals,
differences, tests, worst rows.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from kdlib.metrics.bootstrap import Bootstrap, interval, mcnemar
from kdlib.metrics.classification import Answers, ItemFigures, details, values

SHARES = ("accuracy", "agreement")
CENTRED = ("ece",)  # chance parts accuracy from confidence in every bin, and resampling adds more of it
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
    """Models, the teacher first, with 95 % intervals; the paired differences of all of them; McNemar's test
    of each two.

    Args:
        labels: the classes' names; none where the choices of each item are its own, so that F1 means nothing.
        groups: what each item belongs to, where items that resemble each other come together; then these are
            resampled.
        resamples: of the bootstrap, the same for every model.

    Returns:
        {"models": {name: {measure: {value, low, high}, …}}, "differences": […], "mcnemar": […], "labels",
        "rows", "resamples", "interval"}, as comparison_results.json has it.
    """
    teacher = next(iter(models.values()))
    for name, answers in models.items():
        if not np.array_equal(answers.labels, teacher.labels):
            raise ValueError(
                f"{name} was asked other questions than the teacher; needed the same items in the same order"
            )
    bootstrap = Bootstrap(len(teacher), resamples, seed, groups)
    found = {name: values(answers, teacher, classes=bool(labels)) for name, answers in models.items()}
    drawn = _drawn(models, bootstrap, classes=bool(labels))
    independent = len(teacher) if groups is None else len(set(groups))
    over = (
        "rows"
        if groups is None
        else f"{independent} groups of rows" + ", too few to trust" * (independent < FEW_GROUPS)
    )
    entries = {}
    for name, answers in models.items():
        # it agrees with itself for certain
        shares = dict.fromkeys(SHARES if answers is not teacher else SHARES[:1], independent)
        measures = {
            m: interval(value, drawn[name][m], centred=m in CENTRED, share_of=shares.get(m))
            for m, value in found[name].items()
        }
        measures["ece"]["low"] = max(measures["ece"]["low"], 0.0)
        behind = _with_f1(details(answers, labels), drawn[name])
        entries[name] = {**measures, **_on_mistakes(answers, teacher, drawn[name], independent), **behind}
    figures = {
        name: {m: (value, drawn[name][m]) for m, value in each.items()} for name, each in found.items()
    }
    tests = [
        {"model": a, "against": b, **_discordant(models[a], models[b])} for b, a in combinations(models, 2)
    ]
    return {
        "models": entries,
        "differences": differences(figures, CENTRED),
        "mcnemar": tests,
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
    """The rows on which the student is most wrong, and then those of the others on which it is furthest from
    the teacher.

    Args:
        models: the teacher first.
        student: which of them is looked at.
        texts: [N], shown up to 300 characters.
        choices: [N] what could be said of each: the classes, or the choices of a question.

    Returns:
        Each {"row", "why", "text", "label", "nats", "kl_to_teacher", "said": {model: [[class, probability],
        …]}}.
    """
    teacher, answers = next(iter(models.values())), models[student]
    kl, chosen = answers.kl_from(teacher), {}
    for row in [row for row in np.argsort(-answers.nats, kind="stable") if not answers.right[row]][:wrong]:
        chosen[int(row)] = "most wrong"
    for row in [row for row in np.argsort(-kl, kind="stable") if row not in chosen and kl[row] > 0][:far]:
        chosen[int(row)] = "furthest from the teacher"
    return [
        {
            "row": row,
            "why": why,
            "text": _cut(texts[row]),
            "label": choices[row][answers.labels[row]],
            "nats": float(answers.nats[row]),
            "kl_to_teacher": float(kl[row]),
            "said": {name: _top(each.probabilities[row], choices[row]) for name, each in models.items()},
        }
        for row, why in chosen.items()
    ]


def _drawn(
    models: Mapping[str, Answers], bootstrap: Bootstrap, *, classes: bool
) -> dict[str, dict[str, np.ndarray]]:
    """Every measure of every model on the same resampled items: model → measure → [resamples]."""
    teacher = next(iter(models.values()))
    figures = [ItemFigures.of(answers, teacher, classes=classes) for answers in models.values()]
    tables = [each.table for each in figures]
    parts = np.split(
        bootstrap.sums(np.concatenate(tables, axis=1)),
        np.cumsum([table.shape[1] for table in tables])[:-1],
        axis=1,
    )
    return {name: each.measures(part) for name, each, part in zip(models, figures, parts, strict=True)}


def _on_mistakes(
    answers: Answers, teacher: Answers, drawn: Mapping[str, np.ndarray], independent: int
) -> dict[str, Any]:
    """What becomes of the teacher's mistakes: shares that are repeated as they are, and that are answered
    rightly.
    """
    missed = ~teacher.right
    if not missed.any():
        return {}
    shares = {
        "repeated": (answers.said == teacher.said)[missed].mean(),
        "mended": answers.right[missed].mean(),
    }
    count = int(missed.sum())
    share_of = min(count, independent) if answers is not teacher else None
    return {
        "on_teachers_mistakes": {
            "rows": count,
            **{m: interval(value, drawn[m], share_of=share_of) for m, value in shares.items()},
        }
    }


def _with_f1(found: dict[str, Any], drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """F1 of each class with its interval; without one where no draw has the class."""
    for number, entry in enumerate(found.get("per_class", [])):
        resampled = drawn["f1"][:, number]
        known = not np.isnan(resampled).all()
        entry["f1"] = (
            interval(entry["f1"], resampled)
            if known
            else {"value": entry["f1"], "low": entry["f1"], "high": entry["f1"]}
        )
    return found


def _discordant(one: Answers, other: Answers) -> dict[str, Any]:
    only_one, only_other = int((one.right & ~other.right).sum()), int((~one.right & other.right).sum())
    return {"only_model_right": only_one, "only_other_right": only_other, **mcnemar(only_one, only_other)}


def _top(probabilities: np.ndarray, choices: Sequence[str]) -> list[list[Any]]:
    likeliest = np.argsort(-probabilities[: len(choices)], kind="stable")[:TOP]
    return [[choices[number], float(probabilities[number])] for number in likeliest]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
