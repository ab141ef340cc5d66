"""Chosen runs beside each other: figures, the settings in which they differ, scorecards, costs, curves.
Imports no torch.

The page holds every run; those whose box is ticked are shown.  To mark, without scripts, the settings that
differ between the runs shown, the values of a setting are numbered over all runs, and every box carries the
bits of its run's numbers as classes: a setting differs as soon as one ticked box has a bit that another
ticked box lacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from kdlib.metrics.names import with_interval
from kdlib.reports.curves import look, overlay
from kdlib.reports.html import page
from kdlib.reports.summary import Summary, keys_of, report_link
from kdlib.runs.folder import write_text

SHOWN = 3  # at first: the newest that are done
CURVES = {
    "kl": (
        "held-out KL to the teacher",
        "evaluation",
        "kl_to_teacher",
        "KL(teacher ‖ student),\nnats per token or row",
    ),
    "loss": (
        "training loss (comparable where the weights are the same)",
        "train",
        "loss",
        "loss, nats per token or row",
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a value for each run; `marks` are the bits that tell the values apart, one
    list per run.
    """

    label: str
    values: Sequence[str]
    marks: Sequence[Sequence[int]] = ()
    kind: str = ""

    @property
    def bits(self) -> list[int]:
        """Every bit that some run has."""
        return sorted({bit for each in self.marks for bit in each})


def render(found: Sequence[Summary], reports: Path) -> Path:
    """Write side_by_side.html of these runs, and return its path."""
    done = [number for number, each in enumerate(found) if each.keys]
    content = {
        "runs": [
            {
                "run": each,
                "link": report_link(each.name, reports),
                "look": look(number),
                "shown": number in done[:SHOWN],
            }
            for number, each in enumerate(found)
        ],
        "parts": {
            "Key figures": _keys(found),
            "Settings that differ": differing(found),
            "Scorecard": _cards(found),
            "Cost": _costs(found),
        },
        "drawings": {
            title: drawn for name in CURVES if (drawn := _drawing(found, name)) for title in [CURVES[name][0]]
        },
        "prefixes": list(CURVES),
    }
    write_text(reports / "side_by_side.html", page("side_by_side.html.j2", **content))
    return reports / "side_by_side.html"


def differing(found: Sequence[Summary]) -> list[Row]:
    """A row for each setting that not all runs share; — where a run has no such setting."""
    names = dict.fromkeys(name for each in found for name in each.settings)
    rows = []
    for name in names:
        values = [each.settings.get(name, "—") for each in found]
        if len(set(values)) > 1:
            rows.append(Row(name, values, _bits(values), kind="setting"))
    return rows


def _bits(values: Sequence[str]) -> list[list[int]]:
    """The bits that are set in the number of each value."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [
        [bit for bit in range(len(numbers).bit_length()) if numbers[value] >> bit & 1] for value in values
    ]


def _keys(found: Sequence[Summary]) -> list[Row]:
    against = Row(
        "KL, difference to the baseline",
        [with_interval(each.against, "+") if each.against else "" for each in found],
    )
    return [
        Row("state", [each.state for each in found], kind="state"),
        *(Row(label, [each.key(metric) for each in found]) for metric, label in keys_of(found).items()),
        against,
    ]


def _cards(found: Sequence[Summary]) -> list[Row]:
    checks = dict.fromkeys(line.check for each in found for line in each.card)
    lines = [{line.check: line for line in each.card} for each in found]
    return [Row(check, [card.get(check, "") for card in lines], kind="check") for check in checks]


def _costs(found: Sequence[Summary]) -> list[Row]:
    names = dict.fromkeys(name for each in found for name in each.costs)
    return [Row(name, [each.costs.get(name, "") for each in found]) for name in names]


def _drawing(found: Sequence[Summary], name: str) -> Markup | None:
    _, kind, column, ylabel = CURVES[name]
    tables: list[tuple[int, pd.DataFrame]] = [
        (number, getattr(each, kind)) for number, each in enumerate(found)
    ]
    curves: list[tuple[int, Any]] = [
        (number, table.set_index("step")[column]) for number, table in tables if column in table
    ]
    return overlay(curves, name, ylabel) if curves else None
