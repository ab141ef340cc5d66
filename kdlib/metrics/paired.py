"""Several models' answers to the same questions as plain data: intervals, differences, tests, worst rows."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from kdlib.metrics.bootstrap import Bootstrap, interval, mcnemar, over, permutation
from kdlib.metrics.classification import Answers, details, item_figures, measures
from kdlib.metrics.names import MEASURES, SHARE, TO_TEACHER, UNBOUNDED, Range

ON_MISTAKES = ("repeated", "mended")  # of the teacher's: shares that are repeated, and answered rightly
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
    """Models, the teacher first, with 95 % intervals; the paired differences and a test of each two.

    Args:
        labels: the classes' names; none where the choices of each item are its own, so that F1 means nothing.
        groups: what each item belongs to, where items resemble each other; then these are resampled.

    Returns:
        {"models": {name: {measure: {value, low, high}, …}}, "differences": […], "mcnemar": […], "labels",
        "rows", "units", "resamples", "interval"}, as comparison_results.json has it.
    """
    teacher = next(iter(models.values()))
    for name, answers in models.items():
        if not np.array_equal(answers.labels, teacher.labels):
            raise ValueError(f"{name} was asked other questions than the teacher, or in another order")
    bootstrap = Bootstrap(len(teacher), resamples, seed, groups)
    figures, entries = _figures(models, bootstrap, classes=bool(labels)), {}
    for name, answers in models.items():
        behind = {m: figures[name].pop(m) for m in ("f1", *ON_MISTAKES) if m in figures[name]}
        itself = answers is teacher
        entry: dict[str, Any] = intervals(figures[name], bootstrap.units, itself=itself)
        if missed := int((~teacher.right).sum()):
            asked = units_in(~teacher.right, groups)
            shown = {m: interval(*behind[m], None if itself else asked, SHARE) for m in ON_MISTAKES}
            entry["on_teachers_mistakes"] = {"rows": missed, **shown}
        entry |= details(answers, labels)
        for number, of_class in enumerate(entry.get("per_class", [])):
            has_part = (answers.labels == number) | (answers.said == number)
            drawn = behind["f1"][1][:, number]
            of_class["f1"] = interval(of_class["f1"], drawn, units_in(has_part, groups) or None, SHARE)
        entries[name] = entry
    return {
        "models": entries,
        "differences": differences(figures, bootstrap.units),
        "mcnemar": [_discordant(models, a, b, groups) for b, a in combinations(models, 2)],
        "labels": list(labels),
        "rows": len(teacher),
        "units": bootstrap.units,
        "resamples": resamples,
        "interval": over(bootstrap.units, "rows" if groups is None else "groups of rows"),
    }


def units_in(chosen: np.ndarray, groups: Sequence[str] | None) -> int:
    """How many independent units these rows, [N] true or false, are: themselves, or their groups."""
    return int(chosen.sum()) if groups is None else len(set(np.asarray(groups)[chosen]))


def intervals(
    figures: Mapping[str, tuple[float, np.ndarray]], units: int, *, itself: bool = False
) -> dict[str, dict[str, float]]:
    """A model's measures with their intervals; the teacher `itself` is for certain as near to it as it is."""
    return {
        m: interval(*pair, None if itself and m in TO_TEACHER else units, _range(m))
        for m, pair in figures.items()
    }


def differences(
    figures: Mapping[str, Mapping[str, tuple[float, np.ndarray]]], units: int
) -> list[dict[str, Any]]:
    """Each model's figures minus those of each before it, the teacher first, with intervals.

    Of the measures that both have.  Two that have the same figures on every draw are one model twice, and
    differ by nothing for certain.

    Args:
        figures: model → measure → its value, and its values on the same resampled items.
        units: how many were resampled.
    """
    found = []
    for b, a in combinations(figures, 2):
        theirs = figures[b]
        ours = {measure: pair for measure, pair in figures[a].items() if measure in theirs}
        is_same = all(np.allclose(ours[m][1], theirs[m][1], 1e-5, 1e-6, equal_nan=True) for m in ours)
        for m, (value, drawn) in ours.items():
            pair, within = (value - theirs[m][0], drawn - theirs[m][1]), _range(m).of_differences
            entry = interval(*pair, None if is_same else units, within)
            found.append({"model": a, "against": b, "metric": m, **entry})
    return found


def _range(measure: str) -> Range:
    """What a measure can be; of one that a task brings along, whatever there is."""
    return MEASURES[measure].within if measure in MEASURES else UNBOUNDED


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


def _discordant(
    models: Mapping[str, Answers], a: str, b: str, groups: Sequence[str] | None
) -> dict[str, Any]:
    """On how many items only one of two is right, and a test of that: McNemar's, or by groups."""
    one, other = models[a].right, models[b].right
    first, second = int((one & ~other).sum()), int((~one & other).sum())
    counts = {"only_model_right": first, "only_other_right": second}
    test = mcnemar(first, second) if groups is None else permutation(one.astype(int) - other, groups)
    return {"model": a, "against": b, **counts, **test}


def _top(probabilities: np.ndarray, choices: Sequence[str]) -> list[list[Any]]:
    likeliest = np.argsort(-probabilities[: len(choices)], kind="stable")[:TOP]
    return [[choices[number], float(probabilities[number])] for number in likeliest]
