"""The metric over two parameters, as a map, and over each by itself: what matters here.

Numbers stand on an axis by size, other values side by side.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.metrics.names import MEASURES
from kdlib.plots.axes import COLOURS, intervals
from kdlib.sweeps.config import UNITS, WORDS, upper
from kdlib.sweeps.trials import plain

BEST, OTHER = COLOURS["distilled"], "#8a939b"
CHARACTERS = 11  # of a title to the inch
SMALL = {"fontsize": 8, "parse_math": False}  # a `$` in somebody's text is a dollar
MANY = 12  # values, above which a parameter is a range rather than a grid
WIDE = 30  # the highest over the lowest value, above which an axis is logarithmic
EMPTY = {"facecolor": "#f1f1f1", "edgecolor": "#c8c8c8", "hatch": "///", "linewidth": 0}
PAPER = {"facecolor": "white", "edgecolor": "none"}


def heat_map(trials: pd.DataFrame, across: str, along: str, metric: str) -> Figure:
    """The metric over two parameters, a cell the mean of its runs, the darker the better; hatched without."""
    columns, rows = ([plain(value) for value in levels(trials[name])] for name in (across, along))
    grid, counts = cells(trials, across, along)
    width = max(max(1.0, 0.08 * max(map(len, columns))) * len(columns), 5.4)
    figure = Figure(figsize=(2.6 + width, 1.6 + 0.62 * max(len(rows), 2)), layout="constrained")
    axes, norm = figure.subplots(), Normalize(np.nanmin(grid), np.nanmax(grid))
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.22, 1, 256))  # the palest cannot be seen on white
    colours = ListedColormap(shades if MEASURES[metric].higher_is_better else shades[::-1])
    shown = np.ma.masked_invalid(grid)
    mesh = axes.pcolormesh(shown, cmap=colours, norm=norm, edgecolors="white", linewidth=2)
    several = counts.max() > 1
    for (row, column), value in np.ndenumerate(grid):
        text, style = f"{value:.4g}", {"fontsize": 9, "color": _ink(colours(norm(value)))}
        if np.isnan(value):
            axes.fill_between([column, column + 1], row, row + 1, **EMPTY)
            text, style = "no result", {"fontsize": 8, "bbox": {**PAPER, "pad": 1.5}}
        elif several:
            text += f"\nn = {counts[row, column]}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", **style)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **SMALL)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, **SMALL)
    axes.set_xlabel(across, parse_math=False)
    axes.set_ylabel(along, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, label=f"{WORDS[metric]}\n{UNITS[metric]}")
    bar.outline.set_visible(False)
    best = (np.nanargmax if MEASURES[metric].higher_is_better else np.nanargmin)(grid)
    row, column = np.unravel_index(best, grid.shape)
    where = f"{short(across)} {columns[column]}, {short(along)} {rows[row]}"
    mean = "a cell is the mean of its runs" if several else "one run a cell"
    return titled(figure, f"{upper(WORDS[metric])} is best at {where}:\n{grid[row, column]:.4g} ({mean})")


def cells(trials: pd.DataFrame, across: str, along: str) -> tuple[np.ndarray, np.ndarray]:
    """[along, across] the mean of the finished runs for each pair of values, else nan; and their number."""
    columns, rows = ([plain(value) for value in levels(trials[name])] for name in (across, along))
    done = trials[trials["value"].notna()]
    groups = done.groupby([done[along].map(plain), done[across].map(plain)])["value"]
    found = [each.unstack().reindex(rows, columns=columns) for each in (groups.mean(), groups.count())]
    return found[0].to_numpy(dtype=float), found[1].fillna(0).to_numpy(dtype=int)


def parameters(settings: pd.DataFrame, names: Sequence[str], metric: str) -> Figure:
    """The metric over each parameter by itself, settings as dots; over a single one with their intervals."""
    figure, alone = Figure(figsize=(max(8, 2.6 * len(names)), 3.4), layout="constrained"), len(names) == 1
    every = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    best, value = settings.iloc[0], settings["value"]
    for axes, name in zip(every, names, strict=True):
        at = _places(axes, name, settings[name])
        if alone:
            intervals(axes, at, settings, color=OTHER)
        axes.plot(at, value, "o", color=OTHER)
        mean = value.groupby(at).mean()
        if len(mean) <= MANY and are_numbers(settings[name]):
            axes.plot(mean.index, mean, color=OTHER, linewidth=1)
        axes.plot(at[0], best["value"], "o", color=BEST, markersize=8, zorder=4)
        axes.margins(x=0.12)
    every[0].set_ylabel(f"{WORDS[metric]}\n{UNITS[metric]}")
    if alone:
        where = f"{short(names[0])} {plain(best[names[0]])}: {best['value']:.4g}"
        return titled(figure, f"{upper(WORDS[metric])} is best at {where}")
    lead, share = next(iter(variance_shares(settings, names).items()))
    words = f"explains {share:.0%} of the variance between {len(settings)} settings; the best is blue"
    return titled(figure, f"{upper(short(lead))} alone {words}")


def _places(axes: Axes, name: str, values: pd.Series) -> list[float]:
    """Where a parameter's values stand on the x axis, which is labelled with them."""
    known = levels(values)
    axes.set_xlabel(name, parse_math=False, fontsize=9)
    labels = [plain(value) for value in known]
    numbers = are_numbers(known)
    if numbers and min(known) > 0 and max(known) / min(known) >= WIDE:
        axes.set_xscale("log")
    elif numbers:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if not numbers or len(known) <= MANY:
        axes.set_xticks(known if numbers else range(len(known)), labels, **SMALL)
        axes.minorticks_off()
    return list(values) if numbers else [labels.index(plain(value)) for value in values]


def variance_shares(settings: pd.DataFrame, names: Sequence[str]) -> dict[str, float]:
    """How much of the metric's variance each parameter explains by itself, the most first: what matters here.

    By the means of its values, adjusted for their number (as R² is); numbers drawn from a range count by
    their quarters.
    """
    total, count, shares = settings["value"].var(ddof=0), len(settings), {}
    for name in names:
        known = levels(settings[name])
        drawn = len(known) > MANY and are_numbers(known)
        groups = pd.qcut(settings[name].astype(float), 4) if drawn else settings[name].map(plain)
        means = settings["value"].groupby(groups, observed=True).transform("mean")
        left = 1 - means.var(ddof=0) / total if total else 1.0
        free = count - groups.nunique()
        shares[name] = max(1 - left * (count - 1) / free, 0.0) if free else 0.0
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def levels(values: Iterable[Any]) -> list[Any]:
    """The values that occur, each once: numbers by size, others in the order of the trials."""
    once = list({plain(value): value for value in values}.values())
    return sorted(once) if are_numbers(once) else once


def are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def short(name: str) -> str:
    """A setting by its last name."""
    return name.rsplit(".", 1)[-1]


def titled(figure: Figure, title: str) -> Figure:
    """The figure with its message above it, as wide as it is."""
    width = int(figure.get_figwidth() * CHARACTERS)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left", parse_math=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ink(colour: Sequence[float]) -> str:
    red, green, blue = colour[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"
