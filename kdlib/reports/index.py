"""All runs on one page: sorted, filtered and put beside each other without scripts.

Every sortable column gives every row its place, upwards and downwards; a ticked heading makes that place the
row's `order`.  Settings, scorecards and costs are further columns, shown when asked for.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup

from kdlib.metrics.names import three_digits
from kdlib.plots.axes import LABELS
from kdlib.reports.html import page, report_link
from kdlib.reports.summary import Summary, keys_of, summaries
from kdlib.runs.files import write_error, write_text
from kdlib.runs.log import thinned

STATES = ("running", "created", "done", "stopped", "failed", "died", "unreadable")
COLUMNS: dict[str, Callable[[Summary], Any]] = {
    "run": lambda s: s.name,
    "made": lambda s: s.created or None,
    "state": lambda s: _rank(s.state)[0] if s.state in STATES else None,
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
    try:
        reports.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(reports, error) from error
    write_text(reports / "index.html", page("index.html.j2", **_content(summaries(runs), reports)))
    return reports / "index.html"


def _content(found: Sequence[Summary], reports: Path) -> dict[str, Any]:
    groups = {
        "state": sorted({each.state for each in found}, key=_rank),
        "config": sorted({_config(each) for each in found} - {""}),
        "sweep": sorted({each.sweep for each in found} - {""}),
    }
    keys = keys_of(found)
    figures = {name: lambda s, m=metric: s.keys.get(m, {}).get("value") for metric, name in keys.items()}
    columns = COLUMNS | figures
    places = [_places([of(each) for each in found]) for of in columns.values()]
    more = {
        "settings": settings_that_differ(found),
        "card": {"scorecard": [_scorecard(each) for each in found]},
        "cost": _costs(found),
    }
    rows = [
        {
            "run": each,
            "link": report_link(each.name, reports),
            "curve": _curve(each),
            "keys": [each.key(metric).partition(" ") for metric in keys],
            "places": [place[i] for place in places],
            "reached": _reached(each),
            "more": {kind: [cells[i] for cells in table.values()] for kind, table in more.items()},
            "groups": [
                f"{kind}{groups[kind].index(name)}"
                for kind, name in (("state", each.state), ("config", _config(each)), ("sweep", each.sweep))
                if name
            ],
        }
        for i, each in enumerate(found)
    ]
    return {
        "rows": rows,
        "columns": list(columns),
        "more": {kind: list(table) for kind, table in more.items() if table},
        "groups": {kind: names for kind, names in groups.items() if names},
        "links": {name: report_link(name, reports) for name in groups["sweep"]},
    }


def settings_that_differ(found: Sequence[Summary]) -> dict[str, list[Cell]]:
    """Each setting that not all runs share, with a cell for each run; — where a run has no such setting."""
    settings = [{} if each.is_benchmark else each.settings for each in found]
    columns = {}
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [own.get(name, "—") if own else "" for own in settings]
        counts = Counter(filter(None, values))
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            columns[name] = [Cell(value, is_marked=value not in ("", usual)) for value in values]
    return columns


def _scorecard(each: Summary) -> Cell:
    passed = f"{sum(line.passed is True for line in each.card)} of {len(each.card)} pass"
    failed = [f"fails: {line.check}: {line.found}" for line in each.card if line.passed is False]
    return Cell(passed if each.card else "", "; ".join(failed), bool(failed))


def _costs(found: Sequence[Summary]) -> dict[str, list[Cell]]:
    names = dict.fromkeys(name for each in found for name in each.costs)
    return {name: [Cell(each.costs.get(name, "")) for each in found] for name in names}


def _rank(state: str) -> tuple[int, str]:
    return (STATES.index(state) if state in STATES else len(STATES), state)


def _places(values: Sequence[Any]) -> list[tuple[int, int]]:
    """Each value's place in rising and in falling order; what has none is last in both."""
    known = sorted({value for value in values if value is not None})
    rank = {value: place for place, value in enumerate(known)}
    last = len(known)
    return [(last, last) if value is None else (rank[value], last - 1 - rank[value]) for value in values]


def _config(each: Summary) -> str:
    return each.config or "benchmark" * each.is_benchmark


def _reached(each: Summary) -> str:
    if each.step is None:
        return each.stage or "benchmark" * each.is_benchmark
    made = f"step {each.step:,}" + (f" of {each.steps:,}" if each.steps else "")
    stage = f"teacher, {each.stage}" if each.is_teacher else each.stage
    return f"{stage}, {made}" if each.stage == "training" else f"{stage} ({made})"


def _curve(each: Summary) -> Markup | str:
    """The distance to the teacher on held-out text, with the baseline's; before there are two, the loss."""
    if "kl_to_teacher" in each.evaluation and len(each.evaluation) > 1:
        table, column, words = each.evaluation, "kl_to_teacher", "held-out KL to the teacher"
    elif len(each.train) > 1:
        table, column, words = each.train, "loss", "training loss"
    else:
        return ""
    curves = {"distilled": table.set_index("step")[column]}
    if column in each.baseline:
        curves = {"baseline": each.baseline.set_index("step")[column], **curves}
    ends = "; ".join(
        f"{LABELS[name]} {three_digits(values.iloc[0])} → {three_digits(values.iloc[-1])}"
        for name, values in curves.items()
    )
    return small_curve(curves, f"{words}, steps {table['step'].iloc[0]} to {table['step'].iloc[-1]}: {ends}")


def small_curve(curves: Mapping[str, pd.Series], words: str) -> Markup:
    """Students' curves (values by step) without axes, the last on top; pointed at, they say `words`."""
    kept = {name: values.iloc[thinned(values.to_numpy(), points=POINTS)] for name, values in curves.items()}
    finite = {name: values[np.isfinite(values)] for name, values in kept.items()}
    every = pd.concat(list(finite.values()))
    if len(every) < 2:
        return Markup("")
    x, y = _scale(every.index.to_numpy(), WIDTH), _scale(-every.to_numpy(), HEIGHT)
    points = {
        name: " ".join(f"{x(step):.1f},{y(-value):.1f}" for step, value in values.items())
        for name, values in finite.items()
    }
    drawn = [Markup('<polyline class="{}" points="{}"/>').format(*each) for each in points.items()]
    broken = [step for values in kept.values() for step in values.index[~np.isfinite(values)]]
    if broken:
        place = f"M{x(broken[0]):.1f} {EDGE}v{HEIGHT - 2 * EDGE}"
        drawn.append(Markup('<path class="broken" d="{}"/>').format(place))
    return Markup(
        '<svg class="curve" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">'
        "<title>{2}</title>{3}</svg>"
    ).format(WIDTH, HEIGHT, words, Markup("").join(drawn))


def _scale(values: np.ndarray, length: int) -> Callable[[float], float]:
    low, high = values.min(), values.max()
    return lambda value: EDGE + (length - 2 * EDGE) * ((value - low) / (high - low) if high > low else 0.5)
