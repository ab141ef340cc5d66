"""The metric over two parameters or all of them: heat map, scatter, parallel coordinates.  Imports no torch.

The darker the better; the best is blue.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from kdlib.plots.axes import COLOURS
from kdlib.sweeps.axes import LITERAL, Places, heights, short, titled, upright
from kdlib.sweeps.config import METRICS
from kdlib.sweeps.results import MANY, UNITS, WORDS, levels, upper, weights_of
from kdlib.sweeps.trials import plain

BEST = COLOURS["distilled"]


def heat_map(trials: pd.DataFrame, across: str, along: str, metric: str) -> Figure:
    """The metric over two parameters, a cell the mean of its runs; cells without a finished run are
    hatched.
    """
    columns, rows = levels(list(trials[across])), levels(list(trials[along]))
    grid, counts = cells(trials, across, along)
    widest = max(len(plain(value)) for value in columns)
    figure = Figure(
        figsize=(2.6 + max(max(1.0, 0.08 * widest) * len(columns), 5.4), 1.6 + 0.62 * max(len(rows), 2)),
        layout="constrained",
    )
    axes, colours = figure.subplots(), _darker_is_better(metric)
    norm = _norm(grid)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap=colours, norm=norm, edgecolors="white", linewidth=2
    )
    several = counts.max() > 1
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            axes.fill_between(
                [column, column + 1],
                row,
                row + 1,
                facecolor="#f1f1f1",
                edgecolor="#c8c8c8",
                hatch="///",
                linewidth=0,
            )
            axes.text(
                column + 0.5,
                row + 0.5,
                "no result",
                ha="center",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
            continue
        count = f"\nn = {counts[row, column]}" if several else ""
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{value:.4g}{count}",
            ha="center",
            va="center",
            fontsize=9,
            color=_ink(colours(norm(value))),
        )
    axes.set_xticks(np.arange(len(columns)) + 0.5, [plain(value) for value in columns], fontsize=8, **LITERAL)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(value) for value in rows], fontsize=8, **LITERAL)
    axes.set_xlabel(across, **LITERAL)
    axes.set_ylabel(along, **LITERAL)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes, label=f"{WORDS[metric]}\n{UNITS[metric]}").outline.set_visible(False)
    row, column = np.unravel_index((np.nanargmax if METRICS[metric] else np.nanargmin)(grid), grid.shape)
    where = f"{short(across)} {plain(columns[column])}, {short(along)} {plain(rows[row])}"
    mean = "a cell is the mean of its runs" if several else "one run a cell"
    return titled(figure, f"{upper(WORDS[metric])} is best at {where}:\n{grid[row, column]:.4g} ({mean})")


def cells(trials: pd.DataFrame, across: str, along: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the finished runs for each pair of values, nan where there is none; and how many they
    are: [along, across].
    """
    columns, rows = ([plain(value) for value in levels(list(trials[name]))] for name in (across, along))
    done = trials[trials["value"].notna()]
    groups = done.groupby([done[along].map(plain), done[across].map(plain)])["value"]
    mean = groups.mean().unstack().reindex(index=rows, columns=columns)
    count = groups.count().unstack().reindex(index=rows, columns=columns).fillna(0)
    return mean.to_numpy(dtype=float), count.to_numpy(dtype=int)


def scatter(trials: pd.DataFrame, across: str, along: str, metric: str) -> Figure:
    """The metric over two parameters of which no value comes twice: a point a run, crosses where there is
    no result.
    """
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes, done = figure.subplots(), trials[trials["value"].notna()]
    without = trials[trials["value"].isna()]
    places = {name: Places(axes, side, name, trials) for name, side in ((across, "x"), (along, "y"))}
    points = axes.scatter(
        *(places[name].of(done) for name in places),
        c=done["value"],
        cmap=_darker_is_better(metric),
        norm=_norm(done["value"]),
        s=90,
        edgecolors="#444444",
        linewidth=0.6,
        zorder=3,
    )
    if len(without):
        axes.scatter(
            *(places[name].of(without) for name in places),
            marker="x",
            color="#c0392b",
            label="no result",
            zorder=3,
        )
        axes.legend(frameon=False, fontsize=8)
    best = done.loc[done["value"].idxmax() if METRICS[metric] else done["value"].idxmin()]
    axes.scatter(
        *([places[name].of(done.loc[[best.name]])[0]] for name in places),
        s=260,
        facecolors="none",
        edgecolors=BEST,
        linewidth=2,
    )
    figure.colorbar(points, ax=axes, label=f"{WORDS[metric]}\n{UNITS[metric]}").outline.set_visible(False)
    where = ", ".join(f"{short(name)} {plain(best[name])}" for name in places)
    return titled(figure, f"{upper(WORDS[metric])} is best at {where}: {best['value']:.4g} (ringed)")


def parallel(trials: pd.DataFrame, names: Sequence[str], metric: str) -> Figure:
    """A line a finished run through its values of all parameters, to its metric: the darker the better,
    the best in front.
    """
    done = trials[trials["value"].notna()].sort_values("value", ascending=METRICS[metric])
    figure = Figure(figsize=(max(1.9 * (len(names) + 1), 8), 4), layout="constrained")
    axes, colours, norm = figure.subplots(), _darker_is_better(metric), _norm(done["value"])
    # [axes, runs]
    columns = np.array(
        [heights(done[name], done[name]) for name in names] + [heights(done["value"], done["value"])]
    )
    curves = np.linspace(0, len(names), 60 * len(names) + 1)
    for number, (_, row) in enumerate(done.iterrows()):
        last = number == len(done) - 1
        axes.plot(
            curves,
            _eased(curves, columns[:, number]),
            color=BEST if last else colours(norm(row["value"])),
            zorder=3 if last else 2,
            linewidth=3 if last else 1.4,
            alpha=1 if last else 0.75,
        )
    for place, name in enumerate(names):
        upright(axes, place, [(height, plain(value)) for value, height in _ticks(done[name])], short(name))
    ends = [
        (heights([end], done["value"])[0], f"{end:.4g}")
        for end in sorted({done["value"].min(), done["value"].max()})
    ]
    upright(axes, len(names), ends, WORDS[metric].replace(" the ", "\nthe ", 1).replace(" with", "\nwith"))
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.35, len(names) + 0.5))
    axes.axis("off")
    figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, label=UNITS[metric], fraction=0.04
    ).outline.set_visible(False)
    weights = weights_of(done, names)
    lead = next(iter(weights))
    missing = f"; {len(trials) - len(done)} without a result are left out" if len(done) < len(trials) else ""
    return titled(
        figure,
        (
            f"{upper(short(lead))} alone explains {weights[lead]:.0%} of the variance between {len(done)} "
            f"runs{missing}"
        ),
    )


def _eased(at: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """A smooth line through the heights at 0, 1, 2 …, level at each, so that lines that meet can be told
    apart.
    """
    left = np.minimum(at.astype(int), len(heights) - 2)
    part = at - left
    return heights[left] + (heights[left + 1] - heights[left]) * (3 - 2 * part) * part**2


def _ticks(values: Sequence[Any]) -> list[tuple[Any, float]]:
    known = levels(list(values))
    if len(known) > MANY:  # numbers drawn from a range: its ends
        known = [known[0], known[-1]]
    return list(zip(known, heights(known, values), strict=True))


def _norm(values: Any) -> Normalize:
    return Normalize(np.nanmin(values), np.nanmax(values))


def _darker_is_better(metric: str) -> Colormap:
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.22, 1, 256))  # the palest cannot be seen on white
    return ListedColormap(shades if METRICS[metric] else shades[::-1])


def _ink(colour: Sequence[float]) -> str:
    red, green, blue = colour[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"
