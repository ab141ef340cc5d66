"""The metric over two parameters or all of them: heat map, scatter, parallel coordinates.

The darker the better; the best is blue.  Numbers stand on an axis by size, other values side by side.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from kdlib.metrics.names import MEASURES
from kdlib.plots.axes import COLOURS
from kdlib.sweeps.results import UNITS, WORDS, upper
from kdlib.sweeps.trials import plain

BEST = COLOURS["distilled"]
CHARACTERS = 11  # of a title to the inch
SMALL = {"fontsize": 8, "parse_math": False}  # a `$` in somebody's text is a dollar
MANY = 12  # values, above which a parameter is a range rather than a grid
WIDE = 100  # the highest over the lowest value, above which an axis is logarithmic
EMPTY = {"facecolor": "#f1f1f1", "edgecolor": "#c8c8c8", "hatch": "///", "linewidth": 0}
PAPER = {"facecolor": "white", "edgecolor": "none"}


def heat_map(trials: pd.DataFrame, across: str, along: str, metric: str) -> Figure:
    """The metric over two parameters, a cell the mean of its runs; hatched where none is finished."""
    columns, rows = ([plain(value) for value in levels(trials[name])] for name in (across, along))
    grid, counts = cells(trials, across, along)
    width = max(max(1.0, 0.08 * max(map(len, columns))) * len(columns), 5.4)
    figure = Figure(figsize=(2.6 + width, 1.6 + 0.62 * max(len(rows), 2)), layout="constrained")
    axes, colours, norm = figure.subplots(), _darker_is_better(metric), _norm(grid)
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
    _colour_bar(axes, mesh, f"{WORDS[metric]}\n{UNITS[metric]}")
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
    mean, count = (
        each.unstack().reindex(index=rows, columns=columns) for each in (groups.mean(), groups.count())
    )
    return mean.to_numpy(dtype=float), count.fillna(0).to_numpy(dtype=int)


def scatter(trials: pd.DataFrame, across: str, along: str, metric: str) -> Figure:
    """The metric over two parameters of which no value comes twice: a point a run, a cross without result."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes, is_done = figure.subplots(), trials["value"].notna()
    done, names = trials[is_done], (across, along)
    places = [_places(axes, side, name, trials[name]) for side, name in zip("xy", names, strict=True)]
    x, y = (np.asarray(place, dtype=float) for place in places)
    look = {"cmap": _darker_is_better(metric), "norm": _norm(done["value"]), "edgecolors": "#444444"}
    points = axes.scatter(x[is_done], y[is_done], c=done["value"], s=90, linewidth=0.6, zorder=3, **look)
    if not is_done.all():
        cross = {"marker": "x", "color": "#c0392b", "label": "no result"}
        axes.scatter(x[~is_done], y[~is_done], zorder=3, **cross)
        axes.legend(frameon=False, fontsize=8)
    value = trials["value"].astype(float)
    best = int((value.argmax if MEASURES[metric].higher_is_better else value.argmin)())
    axes.scatter(x[best], y[best], s=260, facecolors="none", edgecolors=BEST, linewidth=2)
    _colour_bar(axes, points, f"{WORDS[metric]}\n{UNITS[metric]}")
    where = ", ".join(f"{short(name)} {plain(trials.iloc[best][name])}" for name in names)
    return titled(figure, f"{upper(WORDS[metric])} is best at {where}: {value.iloc[best]:.4g} (ringed)")


def _places(axes: Axes, side: str, name: str, values: pd.Series) -> list[float]:
    """Where a parameter's values stand on an axis, which is labelled with them."""
    known = levels(values)
    getattr(axes, f"set_{side}label")(name, parse_math=False)
    if are_numbers(known):
        rescaled(axes, side, known)
        return list(values)
    labels = [plain(value) for value in known]
    getattr(axes, f"set_{side}ticks")(range(len(labels)), labels, **SMALL)
    return [labels.index(plain(value)) for value in values]


def parallel(trials: pd.DataFrame, names: Sequence[str], metric: str) -> Figure:
    """A line a finished run through its values of all parameters, to its metric; the best in front."""
    upwards = MEASURES[metric].higher_is_better
    done = trials[trials["value"].notna()].sort_values("value", ascending=upwards)
    figure = Figure(figsize=(max(1.9 * (len(names) + 1), 8), 4), layout="constrained")
    axes, colours, norm = figure.subplots(), _darker_is_better(metric), _norm(done["value"])
    columns = np.array([heights(done[name], done[name]) for name in (*names, "value")])  # [axes, runs]
    curves = np.linspace(0, len(names), 60 * len(names) + 1)
    for number, value in enumerate(done["value"]):
        style = {"color": colours(norm(value)), "zorder": 2, "linewidth": 1.4, "alpha": 0.75}
        if number == len(done) - 1:
            style = {"color": BEST, "zorder": 3, "linewidth": 3}
        axes.plot(curves, _eased(curves, columns[:, number]), **style)
    for place, name in enumerate(names):
        known = levels(done[name])
        known = [known[0], known[-1]] if len(known) > MANY else known  # of a range its ends
        ticks = zip(heights(known, done[name]), map(plain, known), strict=True)
        _upright(axes, place, ticks, short(name))
    ends = sorted({done["value"].min(), done["value"].max()})
    ticks = zip(heights(ends, done["value"]), [f"{end:.4g}" for end in ends], strict=True)
    words = WORDS[metric].replace(" the ", "\nthe ", 1).replace(" with", "\nwith")
    _upright(axes, len(names), ticks, words)
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.35, len(names) + 0.5))
    axes.axis("off")
    _colour_bar(axes, ScalarMappable(norm, colours), UNITS[metric], fraction=0.04)
    shares = variance_shares(done, names)
    lead, missing = next(iter(shares)), len(trials) - len(done)
    title = f"{upper(short(lead))} alone explains {shares[lead]:.0%} of the variance between {len(done)} runs"
    return titled(figure, title + (f"; {missing} without a result are left out" if missing else ""))


def _eased(at: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """A smooth line through the heights at 0, 1, 2 …, level at each: lines that meet can be told apart."""
    left = np.minimum(at.astype(int), len(heights) - 2)
    part = at - left
    return heights[left] + (heights[left + 1] - heights[left]) * (3 - 2 * part) * part**2


def _upright(axes: Axes, place: int, ticks: Iterable[tuple[float, str]], name: str) -> None:
    """An axis among others side by side, with its name above it."""
    axes.plot([place, place], [0, 1], color="black", linewidth=1, zorder=4)
    for height, text in ticks:
        paper = {**PAPER, "alpha": 0.75, "pad": 1}
        axes.text(place + 0.04, height, text, va="center", zorder=5, bbox=paper, **SMALL)
    bold = {"fontsize": 9, "fontweight": "bold", "parse_math": False}
    axes.text(place, 1.06, name, ha="center", va="bottom", **bold)


def heights(values: Iterable[Any], every: Iterable[Any]) -> list[float]:
    """Where values stand on an upright axis that reaches from 0 to 1 over every value."""
    known = levels(every)
    if are_numbers(known):
        scale = np.log if _is_wide(known) else np.asarray
        low, high = float(scale(min(known))), float(scale(max(known)))
        return [(float(scale(value)) - low) / (high - low) if high > low else 0.5 for value in values]
    order = [plain(value) for value in known]
    return [order.index(plain(value)) / max(len(order) - 1, 1) for value in values]


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


def _is_wide(values: Sequence[float]) -> bool:
    """Whether numbers are better told apart by their logarithms."""
    return min(values) > 0 and max(values) / min(values) >= WIDE


def rescaled(axes: Axes, side: str, values: Sequence[float]) -> None:
    """Make an axis (x or y) logarithmic where its values ask for it."""
    if _is_wide(values):
        getattr(axes, f"set_{side}scale")("log")


def titled(figure: Figure, title: str) -> Figure:
    """The figure with its message above it, as wide as it is."""
    width = int(figure.get_figwidth() * CHARACTERS)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left", parse_math=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colour_bar(axes: Axes, mappable: ScalarMappable, label: str, **options: Any) -> None:
    bar = axes.figure.colorbar(mappable, ax=axes, label=label, **options)
    bar.outline.set_visible(False)


def _norm(values: Any) -> Normalize:
    return Normalize(np.nanmin(values), np.nanmax(values))


def _darker_is_better(metric: str) -> Colormap:
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.22, 1, 256))  # the palest cannot be seen on white
    return ListedColormap(shades if MEASURES[metric].higher_is_better else shades[::-1])


def _ink(colour: Sequence[float]) -> str:
    red, green, blue = colour[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"
