"""All runs on one page: sorted, filtered and put beside each other without scripts.

Every sortable column gives every row its place, upwards and downwards; a ticked heading makes that place the
row's `order`.  Settings, scorecards and costs are further columns, shown when asked for.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdlib.metrics.names import three_digits
from kdlib.plots.axes import LABELS, thinned
from kdlib.reports.html import page, report_link
from kdlib.reports.scorecard import counted
from kdlib.reports.summary import UNREADABLE, Summary, keys_of, summaries
from kdlib.runs.files import write_text, writing
from kdlib.runs.states import STATES

ORDER = {state: place for place, state in enumerate([*STATES, UNREADABLE])}
COLUMNS: dict[str, Callable[[Summary], Any]] = {
    "run": lambda s: s.name,
    "made": lambda s: s.created or None,
    "state": lambda s: ORDER[s.state],
    "progress": lambda s: s.progress,
}
"""Heading → what the rows are sorted by, the key figures of the runs besides; None comes last, both ways."""
POINTS = 120  # of a small curve, about
WIDTH, HEIGHT, EDGE = 120, 28, 3  # of it, px


class Cell(NamedTuple):
    """Of a further column: what it says, what more in small print, and whether it is unlike most runs'."""

    text: str
    note: str = ""
    is_marked: bool = False


def render_index(runs: Path, reports: Path) -> Path:
    """Write index.html over all runs of a folder, and return its path."""
    with writing(reports):
        reports.mkdir(parents=True, exist_ok=True)
    write_text(reports / "index.html", _page(summaries(runs), reports))
    return reports / "index.html"


def _page(found: Sequence[Summary], reports: Path) -> str:
    keys, costs = keys_of(found), dict.fromkeys(name for each in found for name in each.costs)
    figures = {name: lambda s, m=metric: s.keys.get(m, {}).get("value") for metric, name in keys.items()}
    columns = COLUMNS | figures
    more = {
        "settings": settings_that_differ(found),
        "card": {"scorecard": [_scorecard(each) for each in found]},
        "cost": {name: [Cell(each.costs.get(name, "")) for each in found] for name in costs},
    }
    groups = {
        "state": sorted({each.state for each in found}, key=lambda s: ORDER[s]),
        "config": sorted({each.config for each in found} - {""}),
        "sweep": sorted({each.sweep for each in found} - {""}),
    }
    return page(
        "index.html.j2",
        runs=found,
        metrics=list(keys),
        columns={name: _places([of(each) for each in found]) for name, of in columns.items()},
        more={kind: cells for kind, cells in more.items() if cells},
        groups={kind: names for kind, names in groups.items() if names},
        link_of=partial(report_link, reports=reports),
        curve_of=_curve,
    )


def settings_that_differ(found: Sequence[Summary]) -> dict[str, list[Cell]]:
    """Each setting that not all runs share, with a cell for each run; — where a run has no such setting."""
    settings = [{} if each.kind else each.settings for each in found]
    columns = {}
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [own.get(name, "—") if own else "" for own in settings]
        counts = Counter(filter(None, values))
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            columns[name] = [Cell(value, is_marked=value not in ("", usual)) for value in values]
    return columns


def _scorecard(each: Summary) -> Cell:
    failed = [f"fails: {line.check}: {line.found}" for line in each.card if line.passed is False]
    return Cell(counted(each.card) if each.card else "", "; ".join(failed), bool(failed))


def _places(values: Sequence[Any]) -> list[tuple[int, int]]:
    """Each value's place in rising and in falling order; what has none is last in both."""
    known = sorted({value for value in values if value is not None})
    rank = {value: place for place, value in enumerate(known)}
    last = len(known)
    return [(last, last) if value is None else (rank[value], last - 1 - rank[value]) for value in values]


def _curve(each: Summary) -> str:
    """The distance to the teacher on held-out text, with the baseline's; before there are two, the loss."""
    table, column, words = each.evaluation, "kl_to_teacher", "held-out KL to the teacher"
    if column not in table or len(table) < 2:
        table, column, words = each.train, "loss", "training loss"
    if len(table) < 2:
        return ""
    tables = {"baseline": each.baseline} if column in each.baseline else {}
    tables[each.student] = table
    curves = {name: own[["step", column]].to_numpy(dtype=float).T for name, own in tables.items()}
    ends = "; ".join(
        f"{LABELS[name]} {three_digits(values[0])} → {three_digits(values[-1])}"
        for name, (_, values) in curves.items()
    )
    return small_curve(curves, f"{words}, steps {table['step'].iloc[0]} to {table['step'].iloc[-1]}: {ends}")


def small_curve(curves: Mapping[str, np.ndarray], words: str) -> str:
    """Students' curves without axes, the last on top; pointed at, they say `words`.

    Args:
        curves: student → [2, N], steps and values.
    """
    kept = [curve[:, thinned(curve[1], points=POINTS)] for curve in curves.values()]
    steps, values = np.concatenate(kept, axis=1)
    is_finite = np.isfinite(values)
    if is_finite.sum() < 2:
        return ""
    x, y = _scaled(steps, WIDTH), _scaled(-np.where(is_finite, values, np.nan), HEIGHT)
    owner = np.repeat(np.arange(len(kept)), [curve.shape[1] for curve in kept])
    lines = {name: np.stack([x, y], 1)[is_finite & (owner == own)] for own, name in enumerate(curves)}
    sizes = {"width": WIDTH, "height": HEIGHT, "edge": EDGE}
    return page("curve.svg.j2", words=words, lines=lines, broken=x[~is_finite][:1], **sizes)


def _scaled(values: np.ndarray, length: int) -> np.ndarray:
    """Places within a picture of this length; its middle where all values are one."""
    low, high = np.nanmin(values), np.nanmax(values)
    shares = (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 0.5)
    return EDGE + (length - 2 * EDGE) * shares
