"""Figures of a sweep: one message each, stated in the title from the figures themselves.

The best is blue, the others grey.  Numbers stand on an axis by size, other values side by side.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.metrics.names import MEASURES
from kdlib.plots import axes as plots
from kdlib.plots.axes import COLOURS, intervals
from kdlib.sweeps.config import UNITS, WORDS, upper
from kdlib.sweeps.results import ALONE, COSTS, Sweep, compared_costs, helps, overlapping, pareto
from kdlib.sweeps.trials import plain

MOST = 30  # settings that a ranking shows
BEST, OTHER = COLOURS["distilled"], "#8a939b"
CHARACTERS = 11  # of a title to the inch
MANY = 12  # values, above which a parameter is a range rather than a grid
WIDE = 30  # the highest over the lowest value, above which an axis is logarithmic
EMPTY = {"facecolor": "#f1f1f1", "edgecolor": "#c8c8c8", "hatch": "///", "linewidth": 0}
PAPER = {"facecolor": "white", "edgecolor": "none"}


def run_figures(
    sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame, gains: Mapping[str, pd.DataFrame]
) -> dict[str, Figure]:
    """Every figure that the finished trials allow, by name."""
    if not len(settings):
        return {}
    metric, names = sweep.metric, [name for name in sweep.varied if len(levels(trials[name])) > 1]
    figures = {"ranking": ranking(settings, names, metric)} if len(settings) > 1 else {}
    if gains:
        figures["gains"] = gains_by_setting(gains, names)
    if names:
        figures["course" if len(names) == 1 else "parameters"] = parameters(settings, names, metric)
    if len(names) > 1:
        across, along = list(variance_shares(settings, names))[:2]
        if max(len(levels(trials[name])) for name in (across, along)) <= MANY:
            figures["map"] = heat_map(trials, across, along, metric)
    if len(settings) > 1 and (costs := compared_costs(settings)):
        figures["pareto"] = price(settings, costs, metric)
    return figures


def ranking(settings: pd.DataFrame, names: Sequence[str], metric: str) -> Figure:
    """Every setting with its interval, the best first; small dots are single seeds."""
    shown, best, total = settings.head(MOST), settings.iloc[0], len(settings)
    figure = Figure(figsize=(8, 1.3 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    right = axes.get_yaxis_transform()
    for position, (_, row) in enumerate(shown.iterrows()):
        _point(axes, row, position, OTHER if position else BEST)
        axes.text(1.01, position, f"{row['value']:.4g}", transform=right, va="center", fontsize=8)
    axes.axvspan(best["low"], best["high"], color=BEST, alpha=0.1, linewidth=0)
    _list_settings(axes, shown, names)
    most = f"the best {MOST} of {total}; " if total > MOST else ""
    how = "mean of the seeds, 95 % over seeds" if settings["n"].max() > 1 else "95 % over held-out rows"
    axes.set_xlabel(f"{WORDS[metric]}, {UNITS[metric]} ({most}{how})", fontsize=9)
    highest = "highest" if MEASURES[metric].higher_is_better else "lowest"
    title = f"{upper(WORDS[metric])} is {highest} with {label(best, names)}"
    if total > 1:
        count = overlapping(settings)
        within = f"with {count} of {total - 1} others within the intervals"
        title += f",\n{within if count else 'beyond the intervals of all others'}"
    return titled(figure, title)


def gains_by_setting(gains: Mapping[str, pd.DataFrame], names: Sequence[str]) -> Figure:
    """What the teacher adds in each setting, metric by metric, with its interval."""
    metric, table = next(iter(gains.items()))
    rows = min(len(table), MOST)
    figure = Figure(figsize=(10, 1.7 + 0.32 * rows), layout="constrained")
    every = figure.subplots(1, len(gains), sharey=True, squeeze=False)[0]
    for axes, (name, gain) in zip(every, gains.items(), strict=True):
        axes.axvline(0, color=COLOURS[ALONE], linewidth=1.5)
        for position, (_, row) in enumerate(gain.head(MOST).iterrows()):
            _point(axes, row, position, BEST if helps(row, name) else OTHER)
            above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{row['value']:+.3g}", (row["value"], position), fontsize=7, **above)
        better = f"{'more' if MEASURES[name].higher_is_better else 'less'} is better"
        axes.set_title(f"{MEASURES[name].brief}\n{better}", fontsize=9, loc="left")
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
    _list_settings(every[0], table.head(MOST), names)
    over = "95 % over seeds" if table["n"].max() > 1 else "95 % over held-out rows"
    figure.supxlabel(f"distilled minus trained alone; {over}; blue: better beyond the interval", fontsize=9)
    higher = MEASURES[metric].higher_is_better
    helped = int(((table["value"] > 0) if higher else (table["value"] < 0)).sum())
    clear = sum(helps(row, metric) is True for _, row in table.iterrows())
    if len(table) == 1:
        gained = "A gain" if clear else "No gain"
        return titled(figure, f"{gained} in {WORDS[metric]} by the teacher beyond the interval")
    counts = f"in {helped} of {len(table)} settings, beyond the interval in {clear}"
    return titled(figure, f"In {WORDS[metric]} the teacher helps {counts}")


def price(settings: pd.DataFrame, costs: Sequence[str], metric: str) -> Figure:
    """The metric against each cost; the line joins what nothing else beats in both."""
    figure = Figure(figsize=(max(3.6 * len(costs), 8), 3.6), layout="constrained")
    higher = MEASURES[metric].higher_is_better
    dots = {"color": OTHER, "markersize": 5, "elinewidth": 0.8, "alpha": 0.8, "capsize": 0}
    line = {"color": BEST, "markersize": 7, "label": "not beaten in both", "zorder": 4}
    every = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(every, costs, strict=True):
        words, more_is_better = COSTS[cost]
        front = pareto(settings, cost, higher_is_better=higher)
        intervals(axes, settings[cost], settings, **dots)
        axes.plot(front[cost], front["value"], "o-", **line)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{words} ({'more' if more_is_better else 'less'} is better)", fontsize=9)
        axes.margins(0.12)
    every[0].set_ylabel(f"{WORDS[metric]}\n{UNITS[metric]}")
    every[0].legend(frameon=False, fontsize=8)
    return titled(figure, _price_title(settings, costs[0], metric))


def _price_title(settings: pd.DataFrame, cost: str, metric: str) -> str:
    name = COSTS[cost][0]
    front = pareto(settings, cost, higher_is_better=MEASURES[metric].higher_is_better)
    first, last = front.iloc[0], front.iloc[-1]
    if len(front) == 1:
        return f"The best setting is also the best in cost ({name}: {first[cost]:.4g})"
    value = f"{WORDS[metric]} goes from {first['value']:.4g} to {last['value']:.4g}"
    return f"{upper(name)}: from {first[cost]:.4g} to {last[cost]:.4g}, {value}"


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
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.set_xlabel(across)
    axes.set_ylabel(along)
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
    """The metric over each parameter by itself, a dot a setting; over a single one with intervals."""
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
    axes.set_xlabel(name, fontsize=9)
    labels = [plain(value) for value in known]
    numbers = are_numbers(known)
    if numbers and min(known) > 0 and max(known) / min(known) >= WIDE:
        axes.set_xscale("log")
    elif numbers:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if not numbers or len(known) <= MANY:
        axes.set_xticks(known if numbers else range(len(known)), labels, fontsize=8)
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
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return plots.titled(figure, "\n".join(textwrap.fill(line, width) for line in title.split("\n")))


def _ink(colour: Sequence[float]) -> str:
    red, green, blue = colour[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def label(row: pd.Series, names: Sequence[str]) -> str:
    """`temperature 2, kd:ce 0.7`"""
    return ", ".join(f"{short(name)} {plain(row[name])}" for name in names) or "the base config"


def _point(axes: Axes, row: pd.Series, position: int, colour: str) -> None:
    """A setting's mean with its interval, and its seeds."""
    intervals(axes, position, row, lying=True, color=colour, markersize=6)
    if row["n"] > 1:
        axes.plot(row["values"], [position] * row["n"], ".", color=colour, markersize=4, alpha=0.6)


def _list_settings(axes: Axes, shown: pd.DataFrame, names: Sequence[str]) -> None:
    """The settings' names down the left, the first on top."""
    axes.set_yticks(range(len(shown)), [label(row, names) for _, row in shown.iterrows()], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.65)
