"""Where the values of a setting stand on an axis: numbers by size, others side by side.  Imports no torch."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.sweeps.results import is_number, levels
from kdlib.sweeps.trials import plain

CHARACTERS = 11  # of a title to the inch
LITERAL = {"parse_math": False}  # a `$` in somebody's text is a dollar
WIDE = 100  # the highest over the lowest value, above which an axis is logarithmic


class Places:
    """Where a parameter's values stand on an axis: numbers by size, others side by side."""

    def __init__(self, axes: Axes, side: str, name: str, trials: pd.DataFrame) -> None:
        self.name, self.levels = name, levels(list(trials[name]))
        self.numbers = all(map(is_number, self.levels))
        getattr(axes, f"set_{side}label")(name, **LITERAL)
        if self.numbers:
            scaled(axes, side, self.levels)
        else:
            getattr(axes, f"set_{side}ticks")(
                range(len(self.levels)), [plain(value) for value in self.levels], fontsize=8, **LITERAL
            )

    def of(self, trials: pd.DataFrame) -> list[float]:
        if self.numbers:
            return list(trials[self.name])
        order = [plain(value) for value in self.levels]
        return [order.index(plain(value)) for value in trials[self.name]]


def heights(values: Sequence[Any], every: Sequence[Any]) -> list[float]:
    """Where values stand on an upright axis that reaches from 0 to 1 over every value."""
    known = levels(list(every))
    if all(map(is_number, known)):
        scale = np.log if is_wide(known) else np.asarray
        low, high = float(scale(min(known))), float(scale(max(known)))
        return [(float(scale(value)) - low) / (high - low) if high > low else 0.5 for value in values]
    order = [plain(value) for value in known]
    return [order.index(plain(value)) / max(len(order) - 1, 1) for value in values]


def short(name: str) -> str:
    """A setting by its last name."""
    return name.rsplit(".", 1)[-1]


def upright(axes: Axes, place: int, ticks: Sequence[tuple[float, str]], name: str) -> None:
    """An axis among others side by side, with its name above it."""
    axes.plot([place, place], [0, 1], color="black", linewidth=1, zorder=4)
    for height, text in ticks:
        axes.text(
            place + 0.04,
            height,
            text,
            fontsize=8,
            va="center",
            zorder=5,
            **LITERAL,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        )
    axes.text(place, 1.06, name, ha="center", va="bottom", fontsize=9, fontweight="bold", **LITERAL)


def is_wide(values: Sequence[float]) -> bool:
    """Whether numbers are better told apart by their logarithms."""
    return min(values) > 0 and max(values) / min(values) >= WIDE


def scaled(axes: Axes, side: str, values: Sequence[float]) -> None:
    """Make an axis (x or y) logarithmic where its values ask for it."""
    if is_wide(values):
        getattr(axes, f"set_{side}scale")("log")


def titled(figure: Figure, title: str) -> Figure:
    """The figure with its message above it, as wide as it is."""
    width = int(figure.get_figwidth() * CHARACTERS)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left", **LITERAL)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure
