"""All runs on one page, sorted and filtered by what a browser can do without scripts.  Imports no torch.

Every sortable column gives every row its place, upwards and downwards; a ticked heading makes that place the
row's `order`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdlib.plots.axes import LABELS
from kdlib.reports import side_by_side
from kdlib.reports.curves import small_curve
from kdlib.reports.html import page
from kdlib.reports.summary import Summary, keys_of, number, report_link, summaries
from kdlib.runs.folder import write_error, write_text

STATES = ("running", "created", "done", "stopped", "failed", "died", "unreadable")
COLUMNS: dict[str, Callable[[Summary], Any]] = {
    "run": lambda s: s.name,
    "made": lambda s: s.created or None,
    "state": lambda s: STATES.index(s.state) if s.state in STATES else None,
    "progress": lambda s: s.progress,
}
"""Heading → what the rows are sorted by, the key figures of the runs besides; None comes last, upwards
and downwards.
"""


def render_index(runs: Path, reports: Path) -> Path:
    """Write index.html and side_by_side.html over all runs of a folder, and return the index's path."""
    found = summaries(runs)
    try:
        reports.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(reports, error) from error
    side_by_side.render([each for each in found if not each.is_benchmark], reports)
    write_text(reports / "index.html", page("index.html.j2", **_content(found, reports)))
    return reports / "index.html"


def _content(found: Sequence[Summary], reports: Path) -> dict[str, Any]:
    states = sorted(
        {each.state for each in found},
        key=lambda state: (STATES.index(state) if state in STATES else len(STATES), state),
    )
    configs, sweeps = (
        sorted({name for each in found if (name := of(each))}) for of in (_config, lambda each: each.sweep)
    )
    keys = keys_of(found)
    columns = {
        **COLUMNS,
        **{heading: lambda s, m=metric: s.keys.get(m, {}).get("value") for metric, heading in keys.items()},
    }
    places = [_places([of(each) for each in found]) for of in columns.values()]
    rows = [
        {
            "run": each,
            "link": report_link(each.name, reports),
            "curve": _curve(each),
            "keys": [_parts(each.key(metric)) for metric in keys],
            "places": [place[i] for place in places],
            "reached": _reached(each),
            "groups": [
                f"state{states.index(each.state)}",
                *([f"config{configs.index(_config(each))}"] if _config(each) else []),
                *([f"sweep{sweeps.index(each.sweep)}"] if each.sweep else []),
            ],
        }
        for i, each in enumerate(found)
    ]
    groups = {"state": states, "config": configs, "sweep": sweeps}
    return {
        "rows": rows,
        "columns": list(columns),
        "groups": {kind: names for kind, names in groups.items() if names},
        "links": {name: report_link(name, reports) for name in sweeps},
        "count": len([s for s in found if not s.is_benchmark]),
    }


def _places(values: Sequence[Any]) -> list[tuple[int, int]]:
    """Each value's place in rising and in falling order; what has none is last in both."""
    known = sorted({value for value in values if value is not None})
    rank = {value: place for place, value in enumerate(known)}
    return [
        (len(known), len(known)) if value is None else (rank[value], len(known) - 1 - rank[value])
        for value in values
    ]


def _config(each: Summary) -> str:
    return each.config or ("benchmark" if each.is_benchmark else "")


def _reached(each: Summary) -> str:
    if each.step is None:
        return each.stage or ("benchmark" if each.is_benchmark else "")
    made = f"step {each.step:,}" + (f" of {each.steps:,}" if each.steps else "")
    stage = f"teacher, {each.stage}" if each.is_teacher else each.stage
    return f"{stage}, {made}" if each.stage == "training" else f"{stage} ({made})"


def _parts(text: str) -> tuple[str, str]:
    """`0.958 [0.904, 1.01]` as value and interval."""
    value, _, interval = text.partition(" ")
    return value, interval


def _curve(each: Summary):
    """The distance to the teacher on held-out text, with the baseline's; before there are two, the
    training loss.
    """
    if "kl_to_teacher" in each.evaluation and len(each.evaluation) > 1:
        table, column, words = each.evaluation, "kl_to_teacher", "held-out KL to the teacher"
    elif len(each.train) > 1:
        table, column, words = each.train, "loss", "training loss"
    else:
        return ""
    curves = {"distilled": table.set_index("step")[column]}
    if column in each.baseline:
        curves = {"baseline": each.baseline.set_index("step")[column], **curves}
    course = "; ".join(
        f"{LABELS[name]} {number(values.iloc[0])} → {number(values.iloc[-1])}"
        for name, values in curves.items()
    )
    return small_curve(
        curves, f"{words}, steps {table['step'].iloc[0]} to {table['step'].iloc[-1]}: {course}"
    )
