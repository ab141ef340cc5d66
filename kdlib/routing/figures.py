"""Figures of who speaks among a teacher's experts, and their tables, from experts.json: no torch.

The darker, the more of the load; experts are numbered from 0, as in the model's files, and one number means
another expert in each layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.metrics.names import with_interval
from kdlib.plots.axes import INK, OTHERS, SOFT, intervals, legend, panels, titled, upper
from kdlib.plots.tokens import visible
from kdlib.routing.tables import changes, expert_tables
from kdlib.runs.files import write_text, writing

FEW = 12  # experts or layers whose figures are written into the cells
MOST = 16  # experts of a layer that are drawn one by one
BAR = {"fraction": 0.04, "pad": 0.02}
ORIGINAL = "original"  # the teacher's own routers and top-k
FILE, FOLDER = "experts.json", "experts"  # in a run's folder


def expert_figures(found: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that there is something to draw of, by name; {} of a dense teacher's."""
    if not found:
        return {}
    figures = {"experts_by_token": by_token(found), "experts_by_layer": by_layer(found)}
    if found["kinds"]:
        figures["experts_by_kind"] = by_kind(found)
    if len(found["routings"]) > 1:
        figures["experts_moved"] = moved(found)
    return figures


def save(folder: Path, found: Mapping[str, Any]) -> None:
    """Write each figure as PNG and its table as CSV into a folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in expert_figures(found).items():
            figure.savefig(folder / f"{name}.png", dpi=130)
        for name, table in expert_tables(found).items():
            write_text(folder / f"{name}.csv", table.to_csv(index=False))


def by_token(found: Mapping[str, Any]) -> Figure:
    """One layer, one text: each token's weights, a row for each expert, in the first routing and the last."""
    text, tokens, colours = found["text"], found["text"]["tokens"], _colours_of_kinds(found)
    names = list(dict.fromkeys([next(iter(found["routings"])), list(found["routings"])[-1]]))
    every = {name: np.array(text["weights"][name]).T for name in names}
    experts = _shown(sum(weights.sum(1) for weights in every.values()))
    tall = (1.1 + 0.24 * len(experts)) * len(names) + 0.6
    figure, axes = panels(max(0.2 * len(tokens) + 1.8, 7), tall, 1, len(names), sharex=True)
    for each, (name, weights) in zip(axes, every.items(), strict=True):
        look = {"vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.4}
        mesh = each.pcolormesh(weights[experts], cmap=_shades(), **look)
        each.set_yticks(np.arange(len(experts)) + 0.5, experts, fontsize=8)
        each.set(ylim=(len(experts), 0))
        each.set_ylabel(f"expert\n({name})" if len(names) > 1 else "expert", fontsize=8)
        each.tick_params(length=0)
        each.spines[:].set_visible(False)
        _bar(figure, mesh, each, "share of a token's weight")
    under = {"rotation": 90, "fontsize": 7, "family": "monospace"}
    axes[-1].set_xticks(np.arange(len(tokens)) + 0.5, map(visible, tokens), **under)
    for label, kind in zip(axes[-1].get_xticklabels(), text["kinds"], strict=True):
        label.set_color(colours.get(kind, INK))
        label.set_parse_math(False)
    if len(colours) > 1:
        _key(axes[0], {kind: colours[kind] for kind in dict.fromkeys(text["kinds"])})
    load, firsts = every[names[0]].mean(1), every[names[0]].argmax(0)
    busiest = int(load.argmax())
    most = f"{load[busiest]:.0%} of the weight, where {1 / len(load):.0%} would be even"
    words = f"In layer {text['layer']} expert {busiest} speaks most on this text:"
    return titled(
        figure, f"{words}\n{most}; it is first for {(firsts == busiest).sum()} of {len(tokens)} tokens"
    )


def by_layer(found: Mapping[str, Any]) -> Figure:
    """Mean load of each expert in each layer as a multiple of an even one, and the entropy beside it."""
    name, routing = next(iter(found["routings"].items()))
    load = np.array(routing["load"]) * found["experts"]
    layers, experts = load.shape
    norm, label = TwoSlopeNorm(1, 0, max(2.0, load.max())), "load; 1 is even"
    figure, beside = _grid(load, norm, label, "{:.2g}")
    entropy, most = np.array(routing["entropy"]), np.log(found["asked"] if name == ORIGINAL else experts)
    beside.plot(entropy, np.arange(layers) + 0.5, "o-", color=OTHERS[0], markersize=3, linewidth=1)
    beside.axvline(most, color=SOFT, linewidth=0.8, linestyle="--")
    beside.set_xlim(0, max(most, entropy.max()) * 1.08)
    beside.set_xlabel(f"entropy of a token's weights, nats\n(dashed: the most, {most:.2f})", fontsize=7)
    busiest = load.max(1)
    times = f"{busiest.min():.2g} to {busiest.max():.2g} times an even load"
    spoke = f"{routing['coverage']:.0%} of all {layers} × {experts} experts speak"
    words = f"The busiest expert of a layer has {times}, most in layer {int(busiest.argmax())};"
    return titled(figure, f"{words}\n{spoke} on {found['tokens']:,} held-out tokens")


def by_kind(found: Mapping[str, Any]) -> Figure:
    """Loads of kinds of text in the layer in which they differ most, and by how much in each layer."""
    kinds, pair = found["kinds"], found["kinds"]["apart"][0]
    load = np.array(kinds["load"])[:, kinds["layer"]]
    experts, colours = _shown(np.ptp(load, axis=0)), _colours_of_kinds(found)
    figure, (axes, beside) = panels(10, 3.3, 2, width_ratios=[3, 2])
    for number, kind in enumerate(kinds["names"]):
        table = pd.DataFrame(kinds["intervals"][number]).iloc[experts]
        at = np.arange(len(experts)) + 0.16 * (number - (len(kinds["names"]) - 1) / 2)
        look = {"color": colours[kind], "fmt": "os^Dv<>P"[number % 8], "markersize": 5, "label": kind}
        intervals(axes, at, table, **look)
    axes.axhline(1 / found["experts"], color=SOFT, linewidth=0.8, linestyle="--", label="even")
    axes.set_xticks(range(len(experts)), experts)
    axes.set(
        xlabel=f"expert of layer {kinds['layer']}, in which they differ most", ylabel="share of the load"
    )
    axes.set_ylim(bottom=0)
    legend(axes)
    beside.plot(pair["by_layer"], "o-", color=INK, markersize=3, linewidth=1)
    look = {"color": SOFT, "linewidth": 0.8, "linestyle": "--"}
    beside.axhline(pair["chance"], label="by chance, mean of the layers", **look)
    legend(beside)
    beside.set(xlabel="layer with experts", ylabel="difference of the loads (total variation)")
    beside.set_ylim(bottom=0)
    beside.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for each in (axes, beside):
        each.tick_params(labelsize=8)
        for axis in (each.xaxis, each.yaxis):
            axis.label.set_size(8)
    return titled(figure, kinds_message(found))


def kinds_message(found: Mapping[str, Any]) -> str:
    """Whether kinds of text ask other experts, in a sentence."""
    pair = found["kinds"]["apart"][0]
    one, other = pair["kinds"]
    size = f"{with_interval(pair)} of the load lies elsewhere, mean of the layers"
    size += f"; by chance up to {pair['chance']:.2g}"
    if pair["low"] > pair["chance"]:
        return f"{upper(one)} and {other} ask other experts:\n{size}"
    return f"That {one} and {other} ask other experts is not beyond chance:\n{size}"


def moved(found: Mapping[str, Any]) -> Figure:
    """How the load moved between the last two routings: by expert, and in total by layer."""
    *_, first, last = found["routings"]
    change = changes(found, first, last) * 100
    most, total = max(np.abs(change).max(), 1e-9), np.abs(change).sum(1) / 2
    norm, label = TwoSlopeNorm(0, -most, most), "change of the load, points"
    figure, beside = _grid(change, norm, label, "{:+.1f}")
    beside.barh(np.arange(len(total)) + 0.5, total, height=0.7, color=OTHERS[0])
    beside.set_xlabel("load that moved, %", fontsize=7)
    before, after = (np.mean(found["routings"][name]["entropy"]) for name in (first, last))
    where = f"most in layer {int(total.argmax())} ({total.max():.3g} %)"
    words = f"From {first} to {last} {total.mean():.3g} % of the load moved, {where};"
    return titled(
        figure, f"{words}\nthe entropy of a token's weights went from {before:.2f} to {after:.2f} nats"
    )


def _grid(values: np.ndarray, norm: TwoSlopeNorm, label: str, form: str) -> tuple[Figure, Axes]:
    """[L, E] values as colours and, of few experts, figures; and axes for a value of each layer beside it."""
    layers, experts = values.shape
    wide = min(3.2 + 0.5 * experts, 11)
    shared = {"sharey": True, "width_ratios": [wide, 2.2]}
    figure, (axes, beside) = panels(wide + 2.2, 1.6 + 0.2 * layers, 2, **shared)
    mesh = axes.pcolormesh(values, cmap="PuOr_r", norm=norm, edgecolors="white", linewidth=0.4)
    for (row, column), value in np.ndenumerate(values) if experts <= FEW else ():
        ink = "white" if abs(norm(value) - 0.5) > 0.33 else INK
        look = {"ha": "center", "va": "center", "fontsize": 6.5, "color": ink}
        axes.text(column + 0.5, row + 0.5, form.format(value), **look)
    axes.set_xticks(*_ticks(experts))
    axes.set_yticks(*_ticks(layers))
    axes.set(ylim=(layers, 0))
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer with experts", fontsize=8)
    axes.tick_params(labelsize=7, length=0)
    beside.tick_params(labelsize=7)
    _bar(figure, mesh, axes, label)
    return figure, beside


def _shown(weights: np.ndarray) -> list[int]:
    """The experts that are drawn, in order: all, or those that have most."""
    return sorted(np.argsort(-weights, kind="stable")[:MOST].tolist())


def _shades() -> ListedColormap:
    """From white, for nothing, to dark blue."""
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0, 1, 256))
    shades[0] = (1, 1, 1, 1)
    return ListedColormap(shades)


def _ticks(count: int) -> tuple[list[float], list[int]]:
    """In the middle of cells, not more than there is room for."""
    every = list(range(0, count, -(-count // 32)))
    return [each + 0.5 for each in every], every


def _bar(figure: Figure, mesh: Any, axes: Axes, label: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, **BAR)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _colours_of_kinds(found: Mapping[str, Any]) -> dict[str, str]:
    names = found["kinds"]["names"] if found["kinds"] else []
    return {name: ("#0072b2", "#d55e00", *OTHERS[:1], *OTHERS[2:])[n % 7] for n, name in enumerate(names)}


def _key(axes: Axes, colours: Mapping[str, str]) -> None:
    """Which colour of a token's text means which kind."""
    handles = [
        axes.plot([], [], "s", color=colour, label=kind)[0] for kind, colour in colours.items() if kind
    ]
    legend(axes, handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), borderpad=0)
