"""Figures of a sweep: one message each, stated in the title from the figures themselves.  Imports no torch.

The best is blue, the others grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.config.task_rules import rules_in
from kdlib.metrics.names import DRAWN, MEASURES
from kdlib.plots.axes import COLOURS, called, intervals, on_axis
from kdlib.sweeps import maps
from kdlib.sweeps.axes import LITERAL, scaled, short, titled
from kdlib.sweeps.config import METRICS
from kdlib.sweeps.gains import clear_words, common, results_of
from kdlib.sweeps.results import (
    ALIKE,
    COSTS,
    MANY,
    UNITS,
    WORDS,
    Sweep,
    averaged,
    compared_costs,
    is_number,
    levels,
    overlapping,
    pareto,
    upper,
    varied,
    weights_of,
)
from kdlib.sweeps.trials import plain

BEST, OTHER = COLOURS["distilled"], "#8a939b"
MOST = 30  # settings that a ranking shows


def run_figures(
    sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame, gains: Mapping[str, pd.DataFrame]
) -> dict[str, Figure]:
    """Every figure that the finished trials allow, by name."""
    if not len(settings):
        return {}
    names, metric = (
        [name for name in varied(sweep) if len(levels(list(trials[name]))) > 1],
        sweep.facts["metric"],
    )
    figures = {"ranking": ranking(settings, names, metric)} if len(settings) > 1 else {}
    if gains:
        figures["gains"] = gains_by_setting(gains, names)
    if (results := results_of(sweep, settings.iloc[0]["runs"])) and len(common(results)[0]) > 1:
        figures["models"] = models(results, label(settings.iloc[0], names))
    if len(names) == 1:
        figures["course"] = course(settings, names[0], metric)
    if len(names) > 1:
        across, along = list(weights_of(settings, names))[:2]
        scattered = max(len(levels(list(trials[name]))) for name in (across, along)) > MANY
        figures["map"] = (maps.scatter if scattered else maps.heat_map)(trials, across, along, metric)
        figures["parallel_coordinates"] = maps.parallel(trials, names, metric)
    if len(settings) > 1 and (costs := compared_costs(settings)):
        figures["pareto"] = price(settings, costs, metric)
    return figures


def ranking(settings: pd.DataFrame, names: Sequence[str], metric: str) -> Figure:
    """Every setting with its interval, the best first; the best one's interval is a band, small dots are
    single seeds.
    """
    shown = settings.head(MOST)
    figure = Figure(figsize=(8, 1.3 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for position, (_, row) in enumerate(shown.iterrows()):
        colour = OTHER if position else BEST
        _point(axes, row, position, colour)
        axes.text(
            1.01,
            position,
            f"{row['value']:.4g}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    axes.axvspan(shown.iloc[0]["low"], shown.iloc[0]["high"], color=BEST, alpha=0.1, linewidth=0)
    axes.set_yticks(
        range(len(shown)), [label(row, names) for _, row in shown.iterrows()], fontsize=8, **LITERAL
    )
    axes.set_ylim(len(shown) - 0.4, -0.6)
    most = f"the best {MOST} of {len(settings)}; " if len(settings) > MOST else ""
    how = "mean of the seeds, 95 % over seeds" if settings["n"].max() > 1 else "95 % over held-out rows"
    axes.set_xlabel(f"{WORDS[metric]}, {UNITS[metric]} ({most}{how})", fontsize=9)
    return titled(figure, _ranking_title(settings, names, metric))


def _ranking_title(settings: pd.DataFrame, names: Sequence[str], metric: str) -> str:
    best = (
        f"{upper(WORDS[metric])} is {'highest' if METRICS[metric] else 'lowest'} with "
        f"{label(settings.iloc[0], names)}"
    )
    if len(settings) == 1:
        return best
    count = overlapping(settings)
    others = (
        f"with {count} of {len(settings) - 1} others within the intervals"
        if count
        else "beyond the intervals of all others"
    )
    return f"{best},\n{others}"


def gains_by_setting(gains: Mapping[str, pd.DataFrame], names: Sequence[str]) -> Figure:
    """What the teacher adds in each setting, metric by metric, with its interval; small dots are single
    seeds.
    """
    metric, table = next(iter(gains.items()))
    shown = {name: each.head(MOST) for name, each in gains.items()}
    labels = [label(row, names) for _, row in shown[metric].iterrows()]
    figure = Figure(figsize=(10, 1.7 + 0.32 * len(labels)), layout="constrained")
    for axes, (name, each) in zip(
        figure.subplots(1, len(gains), sharey=True, squeeze=False)[0], shown.items(), strict=True
    ):
        better = 1 if METRICS[name] else -1
        axes.axvline(0, color=COLOURS["baseline"], linewidth=1.5)
        for position, (_, row) in enumerate(each.iterrows()):
            _point(axes, row, position, BEST if better * row["low"] > 0 < better * row["high"] else OTHER)
            axes.annotate(
                f"{row['value']:+.3g}",
                (row["value"], position),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axes.set_title(
            f"{MEASURES[name].brief}\n{'more' if METRICS[name] else 'less'} is better", fontsize=9, loc="left"
        )
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
    figure.axes[0].set_yticks(range(len(labels)), labels, fontsize=8, **LITERAL)
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.7)
    over = "95 % over seeds" if table["n"].max() > 1 else "95 % over held-out rows"
    figure.supxlabel(f"distilled minus trained alone; {over}; blue: better beyond the interval", fontsize=9)
    better = 1 if METRICS[metric] else -1
    helped = int((better * table["value"] > 0).sum())
    clear = int(((better * table["low"] > 0) & (better * table["high"] > 0)).sum())
    if len(table) > 1:
        return titled(
            figure,
            (
                f"In {WORDS[metric]} the teacher helps in {helped} of {len(table)} settings, beyond the "
                "interval "
                f"in {clear}"
            ),
        )
    return titled(
        figure, f"{'A gain' if clear else 'No gain'} in {WORDS[metric]} by the teacher beyond the interval"
    )


def _point(axes: Axes, row: pd.Series, position: int, colour: str) -> None:
    """A setting's mean with its interval, and its seeds."""
    intervals(axes, position, row, lying=True, color=colour, markersize=6)
    if row["n"] > 1:
        axes.plot(row["values"], [position] * row["n"], ".", color=colour, markersize=4, alpha=0.6)


def models(results: Sequence[Mapping[str, Any]], setting: str) -> Figure:
    """Every model of one setting: its mean over the seeds with the interval; what one seed gave is joined
    by a thin line.
    """
    names, shown = common(results)
    drawn = shown[:DRAWN]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for each in results if len(results) > 1 else ():
            axes.plot(
                range(len(names)),
                [each["models"][name][metric]["value"] for name in names],
                ".-",
                color=OTHER,
                linewidth=0.6,
                markersize=3,
            )
        for position, name in enumerate(names):
            found = averaged([each["models"][name][metric] for each in results])
            intervals(axes, position, found, color=COLOURS[name], markersize=6)
            axes.annotate(
                f"{found['value']:.3g}",
                (position, found["value"]),
                (5, 5),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xticks(range(len(names)), [on_axis(name) for name in names], fontsize=8)
        axes.set_title(MEASURES[metric].label(rules_in(results[0]).unit).strip(), fontsize=9, loc="left")
        axes.margins(x=0.15, y=0.1)
    words = f": against {called('baseline')}, {clear_words(results)}" if "baseline" in names else ""
    return titled(
        figure, f"{upper(setting)}, {f'{len(results)} seeds' if len(results) > 1 else 'one training'}{words}"
    )


def course(settings: pd.DataFrame, name: str, metric: str) -> Figure:
    """The metric over the one parameter that differs."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes, values = figure.subplots(), levels(list(settings[name]))
    numbers = all(map(is_number, values))
    ordered = settings.set_index(settings[name].map(plain)).loc[[plain(value) for value in values]]
    at = values if numbers else range(len(values))
    intervals(axes, at, ordered, fmt="o-" if numbers else "o", color=BEST)
    if numbers:
        scaled(axes, "x", values)
    if not numbers or len(values) <= MANY:
        axes.set_xticks(at, [plain(value) for value in values], fontsize=8, **LITERAL)
    axes.set_xlabel(name, **LITERAL)
    axes.set_ylabel(f"{WORDS[metric]}\n{UNITS[metric]}")
    best = settings.iloc[0]
    return titled(
        figure, f"{upper(WORDS[metric])} is best at {short(name)} {plain(best[name])}: {best['value']:.4g}"
    )


def price(settings: pd.DataFrame, costs: Sequence[str], metric: str) -> Figure:
    """The metric against each cost; the line joins what nothing else beats in both."""
    figure = Figure(figsize=(max(3.6 * len(costs), 8), 3.6), layout="constrained")
    for axes, cost in zip(np.atleast_1d(figure.subplots(1, len(costs), sharey=True)), costs, strict=True):
        front = pareto(settings, cost, higher_is_better=METRICS[metric])
        look = {"color": OTHER, "markersize": 5, "elinewidth": 0.8, "alpha": 0.8, "capsize": 0}
        intervals(axes, settings[cost], settings, **look)
        axes.plot(
            front[cost], front["value"], "o-", color=BEST, markersize=7, label="not beaten in both", zorder=4
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{COSTS[cost][0]} ({'more' if COSTS[cost][1] else 'less'} is better)", fontsize=9)
        axes.margins(0.12)
    figure.axes[0].set_ylabel(f"{WORDS[metric]}\n{UNITS[metric]}")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return titled(figure, _price_title(settings, costs, metric))


def _price_title(settings: pd.DataFrame, costs: Sequence[str], metric: str) -> str:
    cost = costs[0]
    known, name = settings[cost].dropna(), COSTS[cost][0]
    if known.max() <= (1 + ALIKE) * known.min():
        return f"All cost about the same ({name}: {known.min():.4g} to {known.max():.4g}): quality decides"
    front = pareto(settings, cost, higher_is_better=METRICS[metric])
    if len(front) == 1:
        return f"The best setting is also the best in cost ({COSTS[cost][0]}: {front.iloc[0][cost]:.4g})"
    first, last = front.iloc[0], front.iloc[-1]
    return (
        f"{upper(COSTS[cost][0])}: from {first[cost]:.4g} to {last[cost]:.4g}, {WORDS[metric]} goes from "
        f"{first['value']:.4g} to {last['value']:.4g}"
    )


def label(row: pd.Series, names: Sequence[str]) -> str:
    """`temperature 2, kd:ce 0.7`"""
    return ", ".join(f"{short(name)} {plain(row[name])}" for name in names) or "the base config"
