"""Figures of a sweep: one message each, stated in the title from the figures themselves.

The best is blue, the others grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.config.task_rules import rules_in
from kdlib.metrics.names import DRAWN, MEASURES
from kdlib.plots.axes import COLOURS, called, intervals, on_axis
from kdlib.sweeps.config import UNITS, WORDS, upper
from kdlib.sweeps.maps import (
    BEST,
    MANY,
    OTHER,
    SMALL,
    heat_map,
    levels,
    parameters,
    short,
    titled,
    variance_shares,
)
from kdlib.sweeps.results import (
    ALONE,
    COSTS,
    Sweep,
    averaged,
    clear_words,
    common,
    compared_costs,
    overlapping,
    pareto,
    results_of,
)
from kdlib.sweeps.trials import plain

MOST = 30  # settings that a ranking shows
ALIKE = 0.1  # costs that differ by less than this share of the lowest are called alike


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
    if (results := results_of(sweep, settings.iloc[0]["runs"])) and len(common(results)[0]) > 1:
        figures["models"] = models(results, label(settings.iloc[0], names))
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
        shown, higher = gain.head(MOST), MEASURES[name].higher_is_better
        axes.axvline(0, color=COLOURS[ALONE], linewidth=1.5)
        for position, (_, row) in enumerate(shown.iterrows()):
            _point(axes, row, position, BEST if _is_better(row, higher) else OTHER)
            _note(axes, f"{row['value']:+.3g}", (row["value"], position), (0, 6), fontsize=7, ha="center")
        better = f"{'more' if higher else 'less'} is better"
        axes.set_title(f"{MEASURES[name].brief}\n{better}", fontsize=9, loc="left")
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
    _list_settings(every[0], table.head(MOST), names)
    over = "95 % over seeds" if table["n"].max() > 1 else "95 % over held-out rows"
    figure.supxlabel(f"distilled minus trained alone; {over}; blue: better beyond the interval", fontsize=9)
    higher = MEASURES[metric].higher_is_better
    helped = int(((table["value"] > 0) if higher else (table["value"] < 0)).sum())
    clear = sum(_is_better(row, higher) for _, row in table.iterrows())
    if len(table) == 1:
        gained = "A gain" if clear else "No gain"
        return titled(figure, f"{gained} in {WORDS[metric]} by the teacher beyond the interval")
    counts = f"in {helped} of {len(table)} settings, beyond the interval in {clear}"
    return titled(figure, f"In {WORDS[metric]} the teacher helps {counts}")


def _is_better(gain: pd.Series, higher_is_better: bool) -> bool:
    """Whether a difference is a gain beyond its interval."""
    return bool(gain["low"] > 0 if higher_is_better else gain["high"] < 0)


def models(results: Sequence[Mapping[str, Any]], setting: str) -> Figure:
    """Every model of one setting: its mean over the seeds with the interval; a thin line joins one seed's."""
    names, shown = common(results)
    figure, drawn = Figure(figsize=(10, 3.8), layout="constrained"), shown[:DRAWN]
    for axes, metric in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        every = [[each["models"][name][metric] for name in names] for each in results]
        for each in every if len(results) > 1 else ():
            axes.plot([one["value"] for one in each], ".-", color=OTHER, linewidth=0.6, markersize=3)
        for position, (name, seeds) in enumerate(zip(names, zip(*every, strict=True), strict=True)):
            found = averaged(seeds)
            intervals(axes, position, found, color=COLOURS[name], markersize=6)
            _note(axes, f"{found['value']:.3g}", (position, found["value"]), (5, 5), fontsize=8)
        axes.set_xticks(range(len(names)), [on_axis(name) for name in names], fontsize=8)
        axes.set_title(MEASURES[metric].label(rules_in(results[0]).unit).strip(), fontsize=9, loc="left")
        axes.margins(x=0.15, y=0.1)
    words = f": against {called(ALONE)}, {clear_words(results)}" if ALONE in names else ""
    seeds = f"{len(results)} seeds" if len(results) > 1 else "one training"
    return titled(figure, f"{upper(setting)}, {seeds}{words}")


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
    known, name = settings[cost].dropna(), COSTS[cost][0]
    if known.max() <= (1 + ALIKE) * known.min():
        return f"All cost about the same ({name}: {known.min():.4g} to {known.max():.4g}): quality decides"
    front = pareto(settings, cost, higher_is_better=MEASURES[metric].higher_is_better)
    first, last = front.iloc[0], front.iloc[-1]
    if len(front) == 1:
        return f"The best setting is also the best in cost ({name}: {first[cost]:.4g})"
    value = f"{WORDS[metric]} goes from {first['value']:.4g} to {last['value']:.4g}"
    return f"{upper(name)}: from {first[cost]:.4g} to {last[cost]:.4g}, {value}"


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
    axes.set_yticks(range(len(shown)), [label(row, names) for _, row in shown.iterrows()], **SMALL)
    axes.set_ylim(len(shown) - 0.4, -0.65)


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **style: Any) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", **style)
