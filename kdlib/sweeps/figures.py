"""Figures of a sweep: one message each, stated in the title from the figures themselves.

The best is blue, the others grey; of gains blue helps, red harms, grey is open.  Numbers stand on an
axis by size, other values side by side.
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
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from kdlib.metrics.names import MEASURES, Measure
from kdlib.plots import axes as plots
from kdlib.plots.axes import COLOURS, INK, intervals, legend, panels, upper
from kdlib.sweeps.results import COSTS, Sweep, compared_costs, counts, overlapping, pareto
from kdlib.sweeps.trials import are_numbers, levels, plain

MOST = 30  # settings that a ranking shows
BEST, OTHER = COLOURS["distilled"], "#8a939b"
FOUND = {"helps": (BEST, "o"), "harms": ("#d55e00", "X"), "open": (OTHER, "o")}  # told by colour and form
CHARACTERS = 11  # of a title to the inch
MANY = 12  # values, above which a parameter is a range rather than a grid
LONGEST = 24  # characters of a value in a figure
WIDE = 30  # the highest over the lowest value, above which an axis is logarithmic
EMPTY = {"facecolor": "#f1f1f1", "edgecolor": "#c8c8c8", "hatch": "///", "linewidth": 0}


def run_figures(
    sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame, gains: Mapping[str, pd.DataFrame]
) -> dict[str, Figure]:
    """Every figure that the finished trials allow, by name."""
    if not len(settings):
        return {}
    measure, names = sweep.measure, [name for name in sweep.varied if len(levels(trials[name])) > 1]
    figures = {"ranking": ranking(settings, names, measure)} if len(settings) > 1 else {}
    if gains:
        figures["gains"] = gains_by_setting(gains, names)
    if names:
        figures["course" if len(names) == 1 else "parameters"] = parameters(settings, names, measure)
    if len(names) > 1:
        across, along = list(variance_shares(settings, names))[:2]
        if max(len(levels(trials[name])) for name in (across, along)) <= MANY:
            figures["map"] = heat_map(trials, across, along, measure)
    if len(settings) > 1 and (costs := compared_costs(settings)):
        figures["pareto"] = price(settings, costs, measure)
    return figures


def ranking(settings: pd.DataFrame, names: Sequence[str], measure: Measure) -> Figure:
    """Every setting with its interval, the best first; small dots are single seeds."""
    shown, best, total = settings.head(MOST), settings.iloc[0], len(settings)
    figure, (axes,) = panels(8, 1.3 + 0.28 * len(shown))
    _list_settings(axes, shown, names, [(BEST, "o"), *[(OTHER, "o")] * (len(shown) - 1)])
    for position, value in enumerate(shown["value"]):
        axes.text(1.01, position, f"{value:.4g}", transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.axvspan(best["low"], best["high"], color=BEST, alpha=0.1, linewidth=0)
    most = f"the best {MOST} of {total}; " if total > MOST else ""
    how = "mean of the seeds, 95 % over seeds" if settings["n"].max() > 1 else "95 % over held-out rows"
    axes.set_xlabel(f"{_on_axis(measure, ', ')} ({most}{how})", fontsize=9)
    count = overlapping(settings)
    within = f"with {count} of {total - 1} others within" if count else "beyond"
    others = "the intervals" if count else "the intervals of all others"
    opening = f"{upper(measure.words)} is {measure.best} with {label(best, names)}"
    return titled(figure, f"{opening},\n{within} {others}")


def gains_by_setting(gains: Mapping[str, pd.DataFrame], names: Sequence[str]) -> Figure:
    """What the teacher adds in each setting, metric by metric, with its interval."""
    metric, table = next(iter(gains.items()))
    height = 1.9 + 0.32 * min(len(table), MOST)
    figure, every = panels(max(10, 3 * len(gains)), height, len(gains), sharey=True)
    for axes, (name, gain) in zip(every, gains.items(), strict=True):
        axes.axvline(0, color=INK, linewidth=0.8)  # the same student trained alone
        shown, above = gain.head(MOST), {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        _list_settings(axes, shown, names, [FOUND[found] for found in shown["found"]])
        for position, value in enumerate(shown["value"]):
            axes.annotate(f"{value:+.3g}", (value, position), fontsize=7, **above)
        better = "more" if MEASURES[name].higher_is_better else "less"
        title = f"{MEASURES[name].brief}\n{better} is better\n{counts(gain, short=True)}"
        axes.set_title(title, fontsize=8.5, loc="left")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.tick_params(labelsize=8)
    over = "95 % over seeds" if table["n"].max() > 1 else "95 % over held-out rows"
    key = "blue ● helps, red ✕ harms, beyond the interval; grey ● open"
    figure.supxlabel(f"distilled minus trained alone; {over}, each by itself; {key}", fontsize=9)
    words, found = MEASURES[metric].words, table["found"].iloc[0]
    if len(table) == 1:
        told = f"What the teacher does to {words} is open"
        return titled(figure, told if found == "open" else f"The teacher {found} in {words}")
    return titled(figure, f"In {words} the teacher {counts(table)}")


def price(settings: pd.DataFrame, costs: Sequence[str], measure: Measure) -> Figure:
    """The metric against each cost; the line joins what nothing else beats in both."""
    figure, every = panels(max(3.6 * len(costs), 8), 3.6, len(costs), sharey=True)
    dots = {"color": OTHER, "markersize": 5, "elinewidth": 0.8, "alpha": 0.8, "capsize": 0}
    line = {"color": BEST, "markersize": 7, "label": "not beaten in both", "zorder": 4}
    fronts = [pareto(settings, cost, measure) for cost in costs]
    for axes, cost, front in zip(every, costs, fronts, strict=True):
        words, more_is_better = COSTS[cost]
        intervals(axes, settings[cost], settings, **dots)
        is_timed = f"{cost}_low" in settings
        if is_timed:
            ends = {"value": settings[cost], "low": settings[f"{cost}_low"], "high": settings[f"{cost}_high"]}
            intervals(axes, settings["value"], ends, lying=True, **dots)
        axes.plot(front[cost], front["value"], "o-", **line)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        whisker = "; whisker: its spread" * is_timed
        axes.set_xlabel(f"{words}\n{'more' if more_is_better else 'less'} is better{whisker}", fontsize=9)
        axes.margins(0.12)
    every[0].set_ylabel(_on_axis(measure))
    legend(every[0])
    name, front = COSTS[costs[0]][0], fronts[0]
    price, value = (front[column].iloc[[0, -1]].map("{:.4g}".format) for column in (costs[0], "value"))
    if len(front) == 1:
        return titled(figure, f"The best setting is also the best in cost ({name}: {price.iloc[0]})")
    moves = f"from {' to '.join(price)}, {measure.words} goes from {' to '.join(value)}"
    return titled(figure, f"{upper(name)}: {moves}")


def heat_map(trials: pd.DataFrame, across: str, along: str, measure: Measure) -> Figure:
    """The metric over two parameters, a cell the mean of its runs, the darker the better; hatched without."""
    columns, rows = ([plain(value) for value in levels(trials[name])] for name in (across, along))
    grid, counts = cells(trials, across, along)
    width = max(max(1.0, 0.08 * max(map(len, columns))) * len(columns), 5.4)
    figure, (axes,) = panels(2.6 + width, 1.6 + 0.62 * max(len(rows), 2))
    norm, higher = Normalize(np.nanmin(grid), np.nanmax(grid)), measure.higher_is_better
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.22, 1, 256))  # the palest cannot be seen on white
    colours = ListedColormap(shades if higher else shades[::-1])
    shown = np.ma.masked_invalid(grid)
    mesh = axes.pcolormesh(shown, cmap=colours, norm=norm, edgecolors="white", linewidth=2)
    several = counts.max() > 1
    for (row, column), value in np.ndenumerate(grid):
        dark = norm(value) > 0.4 if higher else norm(value) < 0.6
        text, style = f"{value:.4g}", {"fontsize": 9, "color": "white" if dark else "black"}
        if np.isnan(value):
            axes.fill_between([column, column + 1], row, row + 1, **EMPTY)
            text, style = "no result", {"fontsize": 8, "backgroundcolor": "white"}
        elif several:
            text += f"\nn = {counts[row, column]}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", **style)
    for put, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        put(np.arange(len(names)) + 0.5, [in_short(name) for name in names], fontsize=8)
    axes.set(xlabel=across, ylabel=along)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label=_on_axis(measure)).outline.set_visible(False)
    best = (np.nanargmax if higher else np.nanargmin)(grid)
    row, column = np.unravel_index(best, grid.shape)
    where = f"{short(across)} {columns[column]}, {short(along)} {rows[row]}"
    mean = "a cell is the mean of its runs" if several else "one run a cell"
    return titled(figure, f"{upper(measure.words)} is best at {where}:\n{grid[row, column]:.4g} ({mean})")


def cells(trials: pd.DataFrame, across: str, along: str) -> tuple[np.ndarray, np.ndarray]:
    """[along, across] the mean of the finished runs for each pair of values, else nan; and their number."""
    columns, rows = ([plain(value) for value in levels(trials[name])] for name in (across, along))
    shown = trials.assign(**{name: trials[name].map(plain) for name in (across, along)})
    found = shown.pivot_table("value", along, across, ["mean", "count"]).reindex(rows)
    mean, count = (found[kind].reindex(columns=columns).to_numpy(float) for kind in ("mean", "count"))
    return mean, np.nan_to_num(count).astype(int)


def parameters(settings: pd.DataFrame, names: Sequence[str], measure: Measure) -> Figure:
    """The metric over each parameter by itself, a dot a setting; over a single one with intervals."""
    figure, every = panels(max(8, 2.6 * len(names)), 3.4, len(names), sharey=True)
    best, value, alone = settings.iloc[0], settings["value"], len(names) == 1
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
    every[0].set_ylabel(_on_axis(measure))
    if alone:
        where = f"{label(best, names)}: {best['value']:.4g}"
        return titled(figure, f"{upper(measure.words)} is best at {where}")
    lead, share = next(iter(variance_shares(settings, names).items()))
    words = f"explains {share:.0%} of the variance between {len(settings)} settings; the best is blue"
    return titled(figure, f"{upper(short(lead))} alone {words}")


def _places(axes: Axes, name: str, values: pd.Series) -> list[float]:
    """Where a parameter's values stand on the x axis, which is labelled with them."""
    known, numbers = levels(values), are_numbers(values)
    axes.set_xlabel(name, fontsize=9)
    labels = [plain(value) for value in known]
    if numbers and min(known) > 0 and max(known) / min(known) >= WIDE:
        axes.set_xscale("log")
    elif numbers:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if not numbers or len(known) <= MANY:
        ticks = [in_short(text) for text in labels]
        axes.set_xticks(known if numbers else range(len(known)), ticks, fontsize=8)
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


def short(name: str) -> str:
    """A setting by its last name."""
    return name.rsplit(".", 1)[-1]


def label(row: pd.Series, names: Sequence[str]) -> str:
    """`temperature 2, kd:ce 0.7`"""
    return ", ".join(f"{short(name)} {in_short(row[name])}" for name in names) or "the base config"


def in_short(value: Any) -> str:
    """A value as a figure has room for it: of a long text its beginning."""
    return plots.shortened(plain(value), LONGEST)


def titled(figure: Figure, title: str) -> Figure:
    """The figure with its message above it, as wide as it is."""
    width = int(figure.get_figwidth() * CHARACTERS)
    return plots.titled(figure, "\n".join(textwrap.fill(line, width) for line in title.split("\n")))


def _on_axis(measure: Measure, between: str = "\n") -> str:
    return f"{measure.words}{between}{measure.unit.format(item='prediction')}"


def _list_settings(
    axes: Axes, shown: pd.DataFrame, names: Sequence[str], looks: Iterable[tuple[str, str]]
) -> None:
    """A line a setting, the first on top: its name, its mean with the interval, and its seeds."""
    labels = []
    for (_, row), (colour, marker) in zip(shown.iterrows(), looks, strict=True):
        at = len(labels)
        intervals(axes, at, row, lying=True, color=colour, fmt=marker, markersize=7)
        if row["n"] > 1:
            axes.plot(row["values"], [at] * row["n"], ".", color=colour, markersize=4, alpha=0.6)
        labels.append(label(row, names))
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.65)
