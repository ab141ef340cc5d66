"""Learning rate, weights, temperatures over a training: a table, a figure, a design.

Works from a config, in fractions of training, or from a run's plan.  What a person designs is written as
YAML, and drawn from that YAML as a config reads it back (`pasted`): what is shown is what a run would do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.config.reading import read_yaml
from kdlib.config.run import Config, parse
from kdlib.config.sections import flow
from kdlib.plots.axes import SOFT, colours_of, legend, panels
from kdlib.schedulers import Spec, breakpoints, from_spec

LEARNING_RATE = 5e-5  # TrainingArguments' own, where a config is silent
DECAYS = ("cosine", "linear", "constant")
NAMED = (*DECAYS, "constant_with_warmup")  # the Trainer's that kdlib.schedulers has words for
SHAPES = ("constant", "linear", "cosine", "exponential")


def warmed(warm_up: float, decay: str, last: float = 0.0) -> Spec:
    """A straight line from 0 over the warm-up, a fraction of training; then `decay` from 1 to `last`."""
    main = 1.0 if decay == "constant" else {decay: [1.0, last]}
    if warm_up:
        return {"joined": [[warm_up, {"linear": [0.0, 1.0]}], [1.0, main]]}
    return {"linear": [1.0, 1.0]} if main == 1.0 else main


def rate_schedule(config: Config, steps: int | None = None) -> Spec | None:
    """The multiple of `learning_rate` over a training of `steps`, of which a warm-up takes whole ones.

    None for one that kdlib.schedulers has no words for.
    """
    named = config.training.get("lr_scheduler_type", "linear")
    if isinstance(named, Mapping):
        return named
    if config.training.get("lr_scheduler_kwargs") or named not in NAMED:
        return None
    given = config.training.get("warmup_steps") or 0 if named != "constant" else 0
    if given >= 1 and not steps:
        return None
    warm_up = float(given)  # a fraction; below, in whole steps as the Trainer's
    if steps:
        warm_up = (math.ceil(steps * given) if given < 1 else int(given)) / steps
    if warm_up >= 1:
        return {"linear": [0.0, 1.0]} if warm_up == 1 else None
    return warmed(warm_up, named.removesuffix("_with_warmup"))


def curves(config: Config, steps: int | None = None, plan: pd.DataFrame | None = None) -> pd.DataFrame:
    """Learning rate, weights and temperatures over training: a plan's columns, `fraction` in place of step.

    Args:
        plan: of a run, whose learning rate stands in where kdlib.schedulers has no words for the config's.
    """
    weights = config.loss.schedules
    temperatures = {n: spec for n, spec in config.loss.temperatures(weights).items() if n != "contrastive"}
    specs = {f"{name}_weight": spec for name, spec in weights.items()}
    one_for_all = len({str(spec) for spec in temperatures.values()}) == 1
    for name, spec in temperatures.items():
        specs["temperature" if one_for_all else f"{name}_temperature"] = spec
    if (rate := rate_schedule(config, steps)) is not None:
        specs["learning_rate"] = rate
    when = breakpoints(*specs.values())
    table = pd.DataFrame({"fraction": when} | {n: [*map(from_spec(s), when)] for n, s in specs.items()})
    if rate is not None:
        table["learning_rate"] *= config.training.get("learning_rate", LEARNING_RATE)
    elif plan is not None and "learning_rate" in plan:
        planned = (plan["step"] - 1) / plan["step"].max()
        table["learning_rate"] = np.interp(when, planned, plan["learning_rate"])
    return table


def schedules_of(config: Config, steps: int | None = None, plan: pd.DataFrame | None = None) -> Figure:
    """What a config's schedules do, with the phases of its curriculum shaded."""
    ends = [phase.until for phase in config.loss.curriculum or []]
    return schedules_figure(curves(config, steps, plan), ends, steps)


def schedules_figure(table: pd.DataFrame, ends: Sequence[float] = (), steps: int | None = None) -> Figure:
    """Learning rate, weights and temperature of a table by `curves` or a run's plan, one below the other.

    `ends` are those of the curriculum's phases, as fractions.
    """
    if "step" in table:
        steps = int(table["step"].max())
        table = table.assign(fraction=(table["step"] - 1) / steps)
    ratios = {"sharex": True, "height_ratios": (1, 1.3, 1)}
    figure, (upper, middle, lower) = panels(9, 5.4, rows=3, layout=None, **ratios)
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.12, top=0.95, hspace=0.36)
    when = 100 * table["fraction"]
    said = "The learning rate follows a schedule of the Trainer's own, known once the dry run has planned it"
    if "learning_rate" in table:
        rate = table["learning_rate"]
        upper.plot(when, rate, color="black")
        upper.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}")
        said = f"The learning rate peaks at {rate.max():.1e} and ends at {rate.iloc[-1]:.1e}"
    terms = [name.removesuffix("_weight") for name in table if name.endswith("_weight")]
    colours = colours_of(terms)
    for term in terms:
        middle.plot(when, table[f"{term}_weight"], color=colours[term], label=term)
    _shade(middle, ends)
    own = [name for name in table if name.endswith("_temperature")]
    temperatures = own or [name for name in table if name == "temperature"]
    for name, style in zip(temperatures, cycle(("-", "--", ":", "-.")), strict=False):
        label = name.removesuffix("_temperature") if own else "all terms"
        lower.plot(when, table[name], color="#cc79a7", linestyle=style, label=label)
    turns = ", ".join(f"{term} {_turns(table[f'{term}_weight'])}" for term in terms)
    first = f"Temperature: {_turns(table[temperatures[0]])}" if temperatures else "No term has a temperature"
    _dress(upper, "learning rate", said)
    _dress(middle, "weight", f"Weights: {turns}")
    _dress(lower, "temperature", first)
    lower.set(xlim=(0, 100), xlabel="training done" + ", and optimizer steps" * bool(steps))
    shares = range(0, 101, 10)
    lower.set_xticks(shares, [f"{x} %" + (f"\n{x * steps / 100:.0f}" if steps else "") for x in shares])
    return figure


def _shade(axes: Axes, ends: Sequence[float]) -> None:
    for number, (start, end) in enumerate(zip([0.0, *ends], ends, strict=False), start=1):
        axes.axvspan(100 * start, 100 * end, color=SOFT, alpha=0.04 if number % 2 else 0.12, linewidth=0)
        look = {"ha": "center", "va": "top", "fontsize": 8, "color": SOFT}
        axes.text(50 * (start + end), 0.97, f"phase {number}", transform=axes.get_xaxis_transform(), **look)


def _dress(axes: Axes, ylabel: str, title: str) -> None:
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, loc="left", fontsize=9.5, y=1.03)
    axes.set_ylim(0, 1.15 * max([1e-12, *(max(line.get_ydata()) for line in axes.lines)]))
    if axes.get_legend_handles_labels()[1]:
        legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _turns(values: pd.Series) -> str:
    """`1 → 0.2`, by way of the highest or lowest where that is not an end; one number where nothing moves."""
    start, end = values.iloc[0], values.iloc[-1]
    extremes = [x for x in (values.max(), values.min()) if not min(start, end) <= x <= max(start, end)]
    return " → ".join(words for words, _ in groupby(f"{x:.3g}" for x in (start, *extremes[:1], end)))


@dataclass(frozen=True)
class Phase:
    """Until which fraction of training, with which weights, reached over which fraction."""

    until: float
    weights: Mapping[str, float]
    ramp: float = 0.0


@dataclass(frozen=True)
class Design:
    """The settings that the designer moves."""

    learning_rate: float  # at its peak
    warm_up: float  # fraction of training
    decay: str  # after the warm-up: one of DECAYS
    last: float  # multiple of the peak at the end
    temperature: tuple[float, float]  # at start and end
    shape: str  # of the temperature: one of SHAPES
    phases: tuple[Phase, ...]  # one: no curriculum

    def yaml(self) -> str:
        """What to paste into a config."""
        levels = {name: [phase.weights[name] for phase in self.phases] for name in self.phases[0].weights}
        levels = {name: values for name, values in levels.items() if any(values)}
        moving = [name for name, values in levels.items() if len(set(values)) > 1]
        curriculum = [
            {"until": phase.until, "weights": {name: phase.weights[name] for name in moving}}
            | ({"ramp": phase.ramp} if phase.ramp else {})
            for phase in self.phases
        ]
        constant, rate = self.shape == "constant", warmed(self.warm_up, self.decay, self.last)
        loss = {
            "weights": {name: values[0] for name, values in levels.items()},
            "curriculum": curriculum if len(curriculum) > 1 else None,
            "temperature": self.temperature[0] if constant else {self.shape: [*self.temperature]},
        }
        beside = {"warmup_steps": 0, "lr_scheduler_kwargs": None}  # what must not stand beside a schedule
        training = {"learning_rate": self.learning_rate, "lr_scheduler_type": rate, **beside}
        return as_yaml({"loss": loss, "training": training})


def as_yaml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of a config as one would write them: a line a setting, a line a phase."""
    text = ""
    for section, settings in sections.items():
        text += f"{section}:\n"
        for name, value in settings.items():
            by_line = name == "curriculum" and value
            shown = "".join(f"\n    - {flow(phase)}" for phase in value) if by_line else f" {flow(value)}"
            text += f"  {name}:{shown}\n"
    return text


def pasted(config: Config, text: str) -> Config:
    """The config with these lines in place of its own.

    Raises:
        ConfigError: they are no sound config; every fault is in the message.
    """
    plain = config.as_dict()
    for section, settings in read_yaml(text, "this design").items():
        plain[section] |= settings
    return parse(plain, name="this design")


def design_of(config: Config, steps: int | None = None) -> tuple[Design, list[str]]:
    """Where the designer starts: the config's own schedules, and a line for each part that it cannot hold."""
    notes, loss = [], config.loss

    def levels(specs: Mapping[str, Spec], where: str) -> dict[str, float]:
        said = "the designer moves numbers, and starts from its first value"
        moving = {name: spec for name, spec in specs.items() if isinstance(spec, Mapping)}
        notes.extend(f"{where}.{name} is {flow(spec)}; {said}" for name, spec in moving.items())
        return {name: float(from_spec(spec)(0.0)) for name, spec in specs.items()}

    usual, phases = levels(loss.weights, "loss.weights"), []
    for number, phase in enumerate(loss.curriculum or []):
        specs = {name: phase.weights.get(name, usual.get(name, 0.0)) for name in {**usual, **loss.schedules}}
        weights = levels(specs, f"loss.curriculum.{number}.weights")
        phases.append(Phase(phase.until, weights, phase.ramp or 0.0))
    shape, temperature = _temperature(loss.temperature, notes)
    warm_up, decay, last = _rate(config, steps, notes)
    rate, phases = config.training.get("learning_rate", LEARNING_RATE), phases or [Phase(1.0, usual)]
    return Design(rate, warm_up, decay, last, temperature, shape, tuple(phases)), notes


def _temperature(spec: Any, notes: list[str]) -> tuple[str, tuple[float, float]]:
    """Its shape and its two ends."""
    if isinstance(spec, Mapping) and next(iter(spec)) not in (*SHAPES, "steps", "piecewise", "joined"):
        notes.append(f"loss.temperature is {flow(spec)}; the designer has one for all terms")
        spec = spec.get("kd", next(iter(spec.values())))
    ((shape, ends),) = spec.items() if isinstance(spec, Mapping) else [("constant", [spec, spec])]
    if shape in SHAPES:
        return shape, (float(ends[0]), float(ends[1]))
    words = "the designer has shapes with two ends, and starts from a line between its own"
    notes.append(f"loss.temperature is {flow(spec)}; {words}")
    return "linear", (from_spec(spec)(0.0), from_spec(spec)(1.0))


def _rate(config: Config, steps: int | None, notes: list[str]) -> tuple[float, str, float]:
    """Warm-up, decay, and its end; what fits no such form is noted, and a usual one taken."""
    warm_up, main = 0.0, (schedule := rate_schedule(config, steps))
    match schedule:
        case {"joined": [[until, {"linear": [0.0, 1.0]}], [_, after]]}:
            warm_up, main = float(until), after
    match main:
        case 1.0 | {"linear": [1.0, 1.0]}:
            return warm_up, "constant", 1.0
        case {"cosine": [1, last]} | {"linear": [1, last]}:
            return warm_up, next(iter(main)), float(last)
    shown = flow(config.training["lr_scheduler_type"] if schedule is None else schedule)
    notes.append(f"training.lr_scheduler_type is {shown}; the designer starts from a warm-up and a cosine")
    return 0.1, "cosine", 0.0
