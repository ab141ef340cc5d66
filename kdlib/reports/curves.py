"""Curves of many runs: one small line each, or all in one drawing of which a page shows those that are
chosen.  Imports no torch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from kdlib.reports.html import drawing
from kdlib.runs.log import thinned

POINTS = 120  # of a curve, about
WIDTH, HEIGHT, EDGE = 120, 28, 3  # of a small curve, px
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#6e6e6e", "#a6761d")
DASHES = ("solid", "dashed", "dotted", "dashdot")


def small_curve(curves: Mapping[str, pd.Series], words: str) -> Markup:
    """Curves against the step as a line without axes, the last one on top.

    Args:
        curves: student, whose colour style.css has → values, indexed by step.
        words: what is shown; said by the picture when it is pointed at.
    """
    kept = {name: _thin(values) for name, values in curves.items()}
    finite = {name: values[np.isfinite(values)] for name, values in kept.items()}
    every = pd.concat(list(finite.values())) if finite else pd.Series(dtype=float)
    if len(every) < 2:
        return Markup("")
    x, y = _scale(every.index.to_numpy(), WIDTH), _scale(-every.to_numpy(), HEIGHT)
    lines = [
        Markup('<polyline class="{}" points="{}"/>').format(
            name, " ".join(f"{x(step):.1f},{y(-value):.1f}" for step, value in values.items())
        )
        for name, values in finite.items()
    ]
    broken = [step for values in kept.values() for step, value in values.items() if not np.isfinite(value)]
    lines += [
        Markup('<path class="broken" d="M{0:.1f} {1}v{2}"/>').format(x(step), EDGE, HEIGHT - 2 * EDGE)
        for step in broken[:1]
    ]
    return Markup(
        '<svg class="curve" viewBox="0 0 {} {}" width="{}" height="{}" role="img"><title>{}</title>{}</svg>'
    ).format(WIDTH, HEIGHT, WIDTH, HEIGHT, words, Markup("").join(lines))


def overlay(curves: Sequence[tuple[int, pd.Series]], prefix: str, ylabel: str) -> Markup:
    """All curves in one drawing with one pair of axes: the n-th line has the id `<prefix>n` and the look
    of `look(n)`.
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, values in curves:
        colour, dash = look(number)
        shown = _thin(values)
        axes.plot(
            shown.index,
            shown,
            color=colour,
            linestyle=dash,
            linewidth=1.6,
            marker="." if len(shown) < 10 else None,
            gid=f"{prefix}{number}",
        )
    finite = np.concatenate([values[np.isfinite(values)] for _, values in curves] or [np.array([])])
    if len(finite) and finite.min() > 0:
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter())
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return drawing(figure)


def look(number: int) -> tuple[str, str]:
    """Colour and dash of the n-th run: 32 that can be told apart."""
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]


def _thin(values: pd.Series) -> pd.Series:
    return values.iloc[thinned(values.to_numpy(), points=POINTS)]


def _scale(values: np.ndarray, length: int):
    low, high = values.min(), values.max()
    return lambda value: EDGE + (length - 2 * EDGE) * ((value - low) / (high - low) if high > low else 0.5)
