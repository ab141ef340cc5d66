"""The panels of a training's picture: what each draws, and says in its title."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kdlib.plots.axes import BROKEN, INK, colours_of, thinned
from kdlib.runs.log import Tail
from kdlib.runs.progress import Progress
from kdlib.runs.verdict import trend

TRAIN, HELD_OUT, BUSIEST = "#0072b2", INK, "#d55e00"
DASHES = ((0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 3)))  # of other runs, in turn


@dataclass(frozen=True)
class View:
    """What one wants to see of a training."""

    terms: tuple[str, ...] | None = None  # of the loss; None: all
    smoothing: float = 0.02  # share of the training that a running mean over the values spans; 0: no mean
    log: bool = True  # raw values and gradient norms on a log scale
    steps: tuple[float, float] | None = None  # first and last; None: the training so far, and room ahead


@dataclass(frozen=True)
class Scene:
    """What the panels draw from: a training, what one wants to see of it, and other trainings behind it."""

    training: Progress
    view: View
    others: Sequence[Progress]

    @cached_property
    def terms(self) -> list[str]:
        return [term for term in self.training.terms if self.view.terms is None or term in self.view.terms]

    @cached_property
    def colours(self) -> dict[str, str]:
        return colours_of(self.training.terms)

    @cached_property
    def span(self) -> tuple[float, float]:
        """The first and last step shown: as the view says, else with some room ahead of the last one logged.

        That ends with the whole training, or half, a quarter … of it, not yet passed: so it seldom moves; or
        with the next round number, where the whole is not planned.
        """
        step, ahead = max(self.training.step, 1), self.training.steps
        if len(self.training.plan):
            ahead /= 2 ** max(math.floor(math.log2(ahead / step)), 0)
        else:
            unit = 10 ** max(math.floor(math.log10(step)) - 1, 0)
            ahead = math.ceil(step / unit) * unit
        return self.view.steps or (0, ahead)

    @cached_property
    def train(self) -> pd.DataFrame:
        """What was logged, by step."""
        return by_step(self.training.tail.train)

    @cached_property
    def dashed(self) -> list[tuple[str, Tail, dict[str, Any]]]:
        """The others, each with how its lines look."""
        looks = ({"linestyle": dash, "linewidth": 1} for dash in DASHES)
        return [(other.name, other.tail, look) for other, look in zip(self.others, looks, strict=False)]

    def figure(self, axes: Axes, name: str, colour: str, *, is_noisy: bool = False) -> None:
        """What was logged under a name, over the same of the others, crosses where it was nan or infinite."""
        for other, tail, look in self.dashed:
            if name in tail.train:
                values = by_step(tail.train)[name]
                values = self.smoothed(values) if is_noisy else values
                self.curve(axes, values, f"{other} {name}", color=colour, **look)
        if name not in self.train:
            return
        values = self.train[name]
        mean = self.smoothed(values) if is_noisy else values
        is_smoothed = mean is not values
        look = {"linewidth": 0.7, "alpha": 0.3} if is_smoothed else {"linewidth": 1.4}
        self.curve(axes, values, name, color=colour, **look)
        if is_smoothed:
            self.curve(axes, mean, f"{name} smoothed", color=colour, linewidth=1.6)
        self.crosses(axes, name)

    def curve(self, axes: Axes, values: pd.Series, label: str, **look) -> None:
        """A line through what is seen of these; nan leaves a gap."""
        seen = self.seen(values)
        seen = seen.iloc[thinned(seen.to_numpy())]
        axes.plot(seen.index, seen, label=label, **look)

    def planned(self, axes: Axes, name: str) -> None:
        """The plan of a schedule, thin, beneath what was logged."""
        if name in self.training.plan:
            plan, (first, last) = by_step(self.training.plan)[name], self.span
            steps = np.clip([first, *self.seen(plan).index, last], plan.index[0], plan.index[-1])
            colour = self.colours.get(name.rsplit("_", 1)[0], INK)
            look = {"color": colour, "linewidth": 0.8, "alpha": 0.6, "zorder": 1}
            axes.plot(steps, np.interp(steps, plan.index, plan), label=f"{name} planned", **look)

    def crosses(self, axes: Axes, name: str, *, evaluation: bool = False) -> None:
        """At the upper edge, where a figure was nan or infinite."""
        broken = by_step(self.training.tail.broken)
        steps = self.seen(broken[(broken["name"] == name) & (broken["evaluation"] == evaluation)]).index
        if len(steps):
            steps = steps[thinned(steps.to_numpy())]
            look = {"color": BROKEN, "markersize": 6, "markeredgewidth": 1.6, "clip_on": False, "zorder": 9}
            look |= {"transform": axes.get_xaxis_transform(), "label": f"{name} broken"}
            axes.plot(steps, np.full(len(steps), 0.97), "x", **look)

    def seen(self, values: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
        """Those of the steps that are shown."""
        first, last = self.span
        return values[(values.index >= first) & (values.index <= last)]

    def smoothed(self, values: pd.Series) -> pd.Series:
        """The running mean of the finite values, with the gaps where nothing was logged."""
        if (width := self.view.smoothing * len(values)) < 2:
            return values
        finite = values.where(np.isfinite(values))
        return finite.ewm(span=width, ignore_na=True).mean().where(values.notna())


def by_step(table: pd.DataFrame) -> pd.DataFrame:
    """Nothing is logged where there is no step."""
    return table.set_index("step") if "step" in table else table


def values(scene: Scene, axes: Axes) -> str:
    for term in scene.terms:
        scene.figure(axes, f"{term}_loss", scene.colours[term], is_noisy=True)
    known = [term for term in ("kd", *scene.terms) if term in scene.terms and f"{term}_loss" in scene.train]
    if not known:
        return "None of the terms shown is logged yet"
    found = trend(scene.train[f"{known[0]}_loss"], known[0], scene.training.moving)
    return f"The {known[0]} loss was never finite" if found is None else found.words(scene.training.of)


def shares(scene: Scene, axes: Axes) -> str:
    train, shown = scene.train, [term for term in scene.terms if f"{term}_loss" in scene.train]
    by_term = {term: (train[f"{term}_weight"] * train[f"{term}_loss"]).fillna(0.0) for term in shown}
    every = by_term | {"whole loss": train["loss"]}
    curves = pd.DataFrame({name: scene.seen(scene.smoothed(share)) for name, share in every.items()})
    curves, floor = curves.iloc[thinned(curves.to_numpy().T)], 0.0
    for term in shown:
        lower, floor = floor + 0 * curves[term], floor + curves[term]
        look = {"color": scene.colours[term], "alpha": 0.75, "linewidth": 0}
        axes.fill_between(curves.index, lower, floor, label=term, **look)
    axes.plot(curves.index, curves["whole loss"], color=INK, linewidth=1, label="loss")
    sums = {term: share[np.isfinite(share)].sum() for term, share in by_term.items()}
    whole, lead = train["loss"][np.isfinite(train["loss"])].sum(), max(sums, key=sums.get, default=None)
    if not lead or not whole > 0:
        return "What the optimizer sees: weight × value, stacked"
    part = f"{lead} makes up {sums[lead] / whole:.0%} of what the optimizer sees"
    return f"{part}; the line is the loss as back-propagated"


def total(scene: Scene, axes: Axes) -> str:
    """How the last held-out loss compares with the training loss before it: the objective is the same."""
    scene.figure(axes, "loss", TRAIN, is_noisy=True)
    for other, tail, look in scene.dashed:
        if "loss" in tail.evaluation:
            scene.curve(axes, by_step(tail.evaluation)["loss"], f"{other} held-out", color=HELD_OUT, **look)
    loss = scene.train["loss"]
    if not len(evaluation := scene.training.tail.evaluation):
        return f"The training loss is {loss.iloc[-1]:.3f}"
    held_out = by_step(evaluation)["loss"]
    look = {"color": HELD_OUT, "linewidth": 1.3, "marker": "o", "markersize": 3.5 * (len(held_out) < 60)}
    scene.curve(axes, held_out, "held-out", **look)
    scene.crosses(axes, "loss", evaluation=True)
    at, last = held_out.index[-1], held_out.iloc[-1]
    near = loss[(loss.index >= 0.8 * at) & (loss.index <= at)].mean()
    found = f"{last / near:.2f} × the training loss before it" if near > 0 else f"{last:.3f}"
    return f"At step {at:,} the held-out loss is {found}"


def weights(scene: Scene, axes: Axes) -> str:
    train, training, now = scene.train, scene.training, {}
    for term in scene.terms:
        name = f"{term}_weight"
        values = train[name].fillna(0.0) if name in train else 0.0 * train["epoch"]  # weight 0: not logged
        now[term] = values.iloc[-1]
        scene.planned(axes, name)
        scene.curve(axes, values, name, color=scene.colours[term], linewidth=1.6)
    title = "eights now: " + ", ".join(f"{term} {value:.2g}" for term, value in now.items())
    if not training.phases:
        return f"W{title}"
    if math.isfinite(axes.dataLim.y1):  # the phases' names stand above the lines
        axes.update_datalim([(scene.span[0], 1.35 * axes.dataLim.y1)])
    phase = sum(until <= training.step / training.steps for until, _ in training.phases[:-1])
    return f"Phase {phase + 1} of {len(training.phases)} ({training.phases[phase][1]}); w{title}"


def temperature(scene: Scene, axes: Axes) -> str:
    for name in [name for name in scene.train if name.endswith("temperature")]:
        scene.planned(axes, name)
        colour = scene.colours.get(name.removesuffix("_temperature"), INK)
        scene.curve(axes, scene.train[name], name, color=colour, linewidth=1.4)
    first, last = scene.train["temperature"].iloc[[0, -1]]
    return f"The temperature is {last:.3g}" + (f", from {first:.3g}" if first != last else " throughout")


def learning_rate(scene: Scene, axes: Axes) -> str:
    scene.planned(axes, "learning_rate")
    scene.figure(axes, "learning_rate", INK)
    rate = scene.train["learning_rate"]
    return f"The learning rate was {rate.max():.1e} at most and is {rate.iloc[-1]:.1e}"


def grad_norm(scene: Scene, axes: Axes) -> str:
    scene.figure(axes, "grad_norm", INK, is_noisy=True)
    by_term = [term for term in scene.terms if f"{term}_grad_norm" in scene.train]
    for term in by_term:
        logged = scene.smoothed(scene.train[f"{term}_grad_norm"].dropna())  # every so many steps
        scene.curve(axes, logged, term, color=scene.colours[term], linewidth=1.2)
    norm = scene.train["grad_norm"]
    norm = norm[np.isfinite(norm)]
    if not len(norm):
        return "The gradient norm was never finite"
    most = f"{norm.max():.3g} at most (step {norm.idxmax():,})"
    coloured = "; coloured: of each term" if by_term else ""
    return f"The gradient norm has a median of {norm.median():.2g} and is {most}{coloured}"


def experts(scene: Scene, axes: Axes) -> str:
    """Both are 1 at least: how many experts speak to a token, and the busiest one's multiple of its share."""
    speaking, busiest = np.exp(scene.train["expert_entropy"]), scene.train["expert_max_load"]
    for values, label, colour in ((speaking, "speaking", TRAIN), (busiest, "busiest", BUSIEST)):
        mean = scene.smoothed(values)
        scene.curve(axes, mean, label, color=colour, linewidth=1.4)
        if len(last := scene.seen(mean.dropna())):
            look = {"color": colour, "fontsize": 7.5, "ha": "right", "textcoords": "offset points"}
            axes.annotate(label, (last.index[-1], last.iloc[-1]), (0, 3), **look)
    taught = scene.train["expert_coverage"].iloc[-1]
    words = f"{speaking.iloc[-1]:.2g} experts speak to a token (exp of the entropy)"
    return f"{words}, the busiest {busiest.iloc[-1]:.2f} × its share; {taught:.0%} taught"


def one(says: str, *, is_noisy: bool = True) -> Callable[[Scene, Axes], str]:
    """A panel of nothing but the figure it is named after; `says` is its title, of `median` or `most`."""

    def draw(scene: Scene, axes: Axes) -> str:
        scene.figure(axes, axes.get_label(), INK, is_noisy=is_noisy)
        found = scene.train[axes.get_label()]
        return says.format(median=found.median(), most=found.max())

    return draw


@dataclass(frozen=True)
class Panel:
    """One of the pictures above each other, shown where a figure of its name was logged, or what it needs."""

    name: str  # of its axes
    draw: Callable[[Scene, Axes], str]  # draws into axes and returns the title
    height: float  # inches
    unit: str  # of the y axis
    needs: str = ""
    form: str = "{:,.6g}"  # of its ticks
    log: bool = False  # scale, where the view wants one
    from_zero: bool = True  # with 0 in sight


PANELS = (
    Panel("values", values, 1.7, "nats per token", needs="loss", log=True, from_zero=False),
    Panel("shares", shares, 1.5, "weight × value,\nnats per token", needs="loss"),
    Panel("total", total, 1.15, "nats per token", needs="loss", from_zero=False),
    Panel("weights", weights, 0.8, "weight", needs="loss"),
    Panel("temperature", temperature, 0.5, "T", from_zero=False),
    Panel("learning_rate", learning_rate, 0.65, "learning\nrate", form="{:.1e}"),
    Panel("grad_norm", grad_norm, 0.95, "L2 norm", log=True, from_zero=False),
    Panel("experts", experts, 0.8, "experts;\n× its share", needs="expert_entropy", from_zero=False),
    Panel("tokens_per_s", one("{median:,.0f} tokens per second (median)"), 0.5, "tokens/s"),
    Panel("rows_per_s", one("{median:,.0f} rows per second (median)"), 0.5, "rows/s"),
    Panel("memory_gib", one("Memory in use: {most:.2f} GiB at most", is_noisy=False), 0.5, "GiB"),
)
