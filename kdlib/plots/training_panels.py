"""What each panel of the picture of a training shows, and says in its title.  Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.plots.axes import INK, Panel, colours_of
from kdlib.runs.log import thinned
from kdlib.runs.progress import Progress

TRAIN, HELD_OUT = "#0072b2", "#1f2328"
DASHES = ((0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 3)))  # of other runs, in turn
HEIGHTS = {  # inches, in their order
    "values": 1.7,
    "shares": 1.5,
    "total": 1.15,
    "weights": 0.8,
    "temperature": 0.5,
    "learning_rate": 0.65,
    "grad_norm": 0.95,
    "tokens_per_s": 0.5,
    "rows_per_s": 0.5,
    "memory_gib": 0.5,
}
UNITS = {
    "values": "nats per token",
    "shares": "weight × value,\nnats per token",
    "total": "nats per token",
    "weights": "weight",
    "temperature": "T",
    "learning_rate": "learning\nrate",
    "grad_norm": "L2 norm",
    "tokens_per_s": "tokens/s",
    "rows_per_s": "rows/s",
    "memory_gib": "GiB",
}


@dataclass(frozen=True)
class View:
    """What one wants to see of a training.

    Attributes:
        terms: the loss terms to show; all where None.
        smoothing: share of the training that the running mean over the raw values spans; 0 draws the values
            alone.
        log: raw values and gradient norms on a log scale.
        steps: the first and last optimizer step shown; where None, the training so far and some room ahead of
            it.
    """

    terms: tuple[str, ...] | None = None
    smoothing: float = 0.02
    log: bool = True
    steps: tuple[float, float] | None = None


def kinds(course: Progress) -> list[str]:
    """The panels for which there is something to show."""
    table = course.tail.train
    return (
        [kind for kind in HEIGHTS if kind in ("values", "shares", "total", "weights") or kind in table]
        if len(table)
        else []
    )


class Scene:
    """A training as one wants to see it, with others behind it; a method for each panel, by its name."""

    def __init__(self, course: Progress, view: View, others: Sequence[Progress] = ()) -> None:
        self.course, self.view, self.train, self.evaluation = (
            course,
            view,
            course.tail.train,
            course.tail.evaluation,
        )
        self.others = list(zip(others, DASHES, strict=False))
        self.colours = colours_of(course.terms)
        self.terms = [term for term in course.terms if view.terms is None or term in view.terms]
        self.span = view.steps or (0, _horizon(course))

    def values(self, panel: Panel) -> None:
        for term in self.terms:
            self._figure(panel, f"{term}_loss", self.colours[term], is_noisy=True)
        known = [term for term in ("kd", *self.terms) if term in self.terms and f"{term}_loss" in self.train]
        panel.end(
            _fall(known[0], self.train, self.course.of) if known else "None of the terms shown is logged yet",
            log=self.view.log,
        )

    def shares(self, panel: Panel) -> None:
        shares = {
            term: (self.train[f"{term}_weight"] * self.train[f"{term}_loss"]).fillna(0.0)
            for term in self.terms
            if f"{term}_loss" in self.train
        }
        sums = {term: share[np.isfinite(share)].sum() for term, share in shares.items()}
        curves = [
            self._seen(self.train["step"], self._smoothed(values))
            for values in (*shares.values(), self.train["loss"])
        ]
        at, floor = thinned(np.stack(curves)), 0.0
        steps = self._seen(self.train["step"], self.train["step"])[at]
        for term, curve in zip(shares, curves, strict=False):
            lower, floor = floor + 0 * curve[at], floor + curve[at]
            panel.area(term, steps, lower, floor, color=self.colours[term], alpha=0.75)
        panel.line("loss", steps, curves[-1][at], color=INK, linewidth=1)
        whole, lead = (
            self.train["loss"][np.isfinite(self.train["loss"])].sum(),
            max(sums, key=sums.get, default=None),
        )
        panel.end(
            (
                f"{lead} makes up {sums[lead] / whole:.0%} of what the optimizer sees; the line is the loss "
                "as "
                "back-propagated"
            )
            if lead and whole > 0
            else "What the optimizer sees: weight × value, stacked",
            floor=0.0,
        )

    def total(self, panel: Panel) -> None:
        self._figure(panel, "loss", TRAIN, is_noisy=True)
        for other, dash in self.others:
            if "loss" in (table := other.tail.evaluation):
                self._curve(
                    panel,
                    f"{other.name} held-out",
                    table["step"],
                    table["loss"],
                    color=HELD_OUT,
                    linestyle=dash,
                    linewidth=1,
                )
        if len(self.evaluation):
            self._curve(
                panel,
                "held-out",
                self.evaluation["step"],
                self.evaluation["loss"],
                color=HELD_OUT,
                linewidth=1.3,
                marker="o",
                markersize=3.5 if len(self.evaluation) < 60 else 0,
            )
            self._crosses(panel, "loss", evaluation=True)
        panel.end(_gap(self.train, self.evaluation))

    def weights(self, panel: Panel) -> None:
        course, now = self.course, {}
        for term in self.terms:
            name = f"{term}_weight"
            # weight 0: not logged
            values = self.train[name].fillna(0.0) if name in self.train else pd.Series(0.0, self.train.index)
            now[term] = values.iloc[-1]
            self._planned(panel, name)
            self._curve(panel, name, self.train["step"], values, color=self.colours[term], linewidth=1.6)
        phase = sum(until <= course.step / course.steps for until, _ in course.phases[:-1])
        where = (
            f"Phase {phase + 1} of {len(course.phases)} ({course.phases[phase][1]}); w"
            if course.phases
            else "W"
        )
        if course.phases:
            panel.reach(np.array([1.35 * panel.high]))  # their names stand above the lines
        panel.end(
            f"{where}eights now: " + ", ".join(f"{term} {value:.2g}" for term, value in now.items()),
            floor=0.0,
        )

    def temperature(self, panel: Panel) -> None:
        for name in [name for name in self.train if name.endswith("_temperature")] or ["temperature"]:
            self._planned(panel, name)
            colour = self.colours.get(name.removesuffix("_temperature"), INK)
            self._curve(panel, name, self.train["step"], self.train[name], color=colour, linewidth=1.4)
        first, last = self.train["temperature"].iloc[0], self.train["temperature"].iloc[-1]
        panel.end(
            f"The temperature is {last:.3g}" + (f", from {first:.3g}" if first != last else " throughout")
        )

    def learning_rate(self, panel: Panel) -> None:
        self._planned(panel, "learning_rate")
        self._figure(panel, "learning_rate", INK)
        rate = self.train["learning_rate"]
        panel.end(f"The learning rate was {rate.max():.1e} at most and is {rate.iloc[-1]:.1e}", floor=0.0)

    def grad_norm(self, panel: Panel) -> None:
        self._figure(panel, "grad_norm", INK, is_noisy=True)
        by_term = [term for term in self.terms if f"{term}_grad_norm" in self.train]
        for term in by_term:
            logged = self.train[["step", f"{term}_grad_norm"]].dropna()  # every so many steps
            self._curve(
                panel,
                term,
                logged["step"],
                self._smoothed(logged[f"{term}_grad_norm"]),
                color=self.colours[term],
                linewidth=1.2,
            )
        norm, title = (
            self.train["grad_norm"].where(np.isfinite(self.train["grad_norm"])),
            "The gradient norm was never finite",
        )
        if norm.notna().any():
            title = (
                f"The gradient norm has a median of {norm.median():.2g} and is {norm.max():.3g} at most "
                "(step "
                f"{self.train['step'][norm.idxmax()]:,}){'; coloured: of each term' if by_term else ''}"
            )
        panel.end(title, log=self.view.log)

    def tokens_per_s(self, panel: Panel) -> None:
        self._figure(panel, "tokens_per_s", INK, is_noisy=True)
        panel.end(f"{self.train['tokens_per_s'].median():,.0f} tokens per second (median)", floor=0.0)

    def rows_per_s(self, panel: Panel) -> None:
        self._figure(panel, "rows_per_s", INK, is_noisy=True)
        panel.end(f"{self.train['rows_per_s'].median():,.0f} rows per second (median)", floor=0.0)

    def memory_gib(self, panel: Panel) -> None:
        self._figure(panel, "memory_gib", INK)
        panel.end(f"Memory in use: {self.train['memory_gib'].max():.2f} GiB at most", floor=0.0)

    def _figure(self, panel: Panel, name: str, colour: str, *, is_noisy: bool = False) -> None:
        """What was logged under a name, over the same of the others, with crosses where it was nan or
        infinite.
        """
        for other, dash in self.others:
            if name in (table := other.tail.train):
                values = self._smoothed(table[name]) if is_noisy else table[name]
                self._curve(
                    panel,
                    f"{other.name} {name}",
                    table["step"],
                    values,
                    color=colour,
                    linestyle=dash,
                    linewidth=1,
                )
        if name not in self.train:
            return
        steps, values = self.train["step"], self.train[name]
        is_smoothed = is_noisy and self._width(values) >= 2
        self._curve(
            panel,
            name,
            steps,
            values,
            color=colour,
            linewidth=0.7 if is_smoothed else 1.4,
            alpha=0.3 if is_smoothed else 1.0,
        )
        if is_smoothed:
            self._curve(panel, f"{name} smoothed", steps, self._smoothed(values), color=colour, linewidth=1.6)
        self._crosses(panel, name)

    def _planned(self, panel: Panel, name: str) -> None:
        """The sheet has drawn it; here it gets its room."""
        if name in self.course.plan:
            panel.reach(self.course.plan[name][self.course.plan["step"].between(*self.span)].to_numpy())

    def _curve(self, panel: Panel, key: str, steps: pd.Series, values: pd.Series, **style) -> None:
        x, y = self._seen(steps, steps), self._seen(steps, values)
        at = thinned(y)
        panel.line(key, x[at], y[at], **style)

    def _crosses(self, panel: Panel, name: str, *, evaluation: bool = False) -> None:
        broken = self.course.tail.broken
        if not len(broken):
            return
        steps = broken["step"][(broken["name"] == name) & (broken["evaluation"] == evaluation)]
        steps = steps[steps.between(*self.span)].to_numpy()
        panel.marks(f"{name} {evaluation}", steps[thinned(steps)])

    def _seen(self, steps: pd.Series, values: pd.Series) -> np.ndarray:
        first, last = self.span
        return values.to_numpy()[
            np.searchsorted(steps, first, "left") : np.searchsorted(steps, last, "right")
        ]

    def _width(self, values: pd.Series) -> float:
        return self.view.smoothing * len(values)

    def _smoothed(self, values: pd.Series) -> pd.Series:
        """The running mean of the finite values, with the gaps where nothing was logged."""
        if self._width(values) < 2:
            return values
        is_finite = np.isfinite(values)
        if is_finite.all():
            return values.ewm(span=self._width(values)).mean()
        return (
            values.where(is_finite).ewm(span=self._width(values), ignore_na=True).mean().where(values.notna())
        )


def _horizon(course: Progress) -> float:
    """The right end of the x axis: of the whole training, or of half, a quarter … of it while it has not come
    further.

    So it seldom moves; where the whole is not planned, it is the next round number.
    """
    if not len(course.plan):
        unit = 10 ** max(math.floor(math.log10(max(course.step, 1))) - 1, 0)
        return math.ceil(max(course.step, 1) / unit) * unit
    return course.steps / 2 ** max(math.floor(math.log2(course.steps / max(course.step, 1))), 0)


def _fall(term: str, table: pd.DataFrame, of: str) -> str:
    known = table[["step", f"{term}_loss"]].dropna()
    first, last = known[f"{term}_loss"].iloc[0], known[f"{term}_loss"].iloc[-1]
    verb = "fell" if last < first else "rose" if last > first else "went"
    return (
        f"The {term} loss {verb} from {first:.2f} to {last:.2f} nats per {of} in "
        f"{known['step'].iloc[-1]:,} steps"
    )


def _gap(train: pd.DataFrame, evaluation: pd.DataFrame) -> str:
    """How the last held-out loss compares with the training loss before it: the same objective, the same
    weights.
    """
    if not len(evaluation):
        return f"The training loss is {train['loss'].iloc[-1]:.3f}"
    at, held_out = evaluation["step"].iloc[-1], evaluation["loss"].iloc[-1]
    near = train["loss"][train["step"].between(0.8 * at, at)].mean()
    if not near > 0:
        return f"At step {at:,} the held-out loss is {held_out:.3f}"
    return f"At step {at:,} the held-out loss is {held_out / near:.2f} × the training loss before it"
