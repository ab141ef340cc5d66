"""A training's course as a person designs it: warm-up, phases, weights, temperature; and the YAML to paste.

What is designed is written as YAML, and its curves are drawn from that YAML as a config reads it back
(`pasted`, `kdlib.plots.schedules.curves`): what is shown is what a run would do.  Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kdlib.config.run import Config, parse
from kdlib.plots.schedules import LEARNING_RATE, rate_course, warmed
from kdlib.schedulers import Spec, from_spec

COURSES = ("cosine", "linear", "constant")
SHAPES = ("constant", "linear", "cosine", "exponential")
BESIDE = {"warmup_steps": 0, "lr_scheduler_kwargs": None}  # what must not stand beside a schedule


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
    course: str  # after the warm-up: one of COURSES
    last: float  # multiple of the peak at the end
    temperature: tuple[float, float]  # at start and end
    shape: str  # of the temperature: one of SHAPES
    phases: tuple[Phase, ...]  # one: no curriculum

    def loss(self) -> dict[str, Any]:
        """What to write into `loss:`."""
        start, end = self.temperature
        terms = {name for phase in self.phases for name, weight in phase.weights.items() if weight}
        first = {name: weight for name, weight in self.phases[0].weights.items() if name in terms}
        moving = [name for name in first if len({phase.weights[name] for phase in self.phases}) > 1]
        curriculum = None
        if len(self.phases) > 1:
            curriculum = [
                {"until": phase.until, "weights": {name: phase.weights[name] for name in moving}}
                | ({"ramp": phase.ramp} if phase.ramp else {})
                for phase in self.phases
            ]
        temperature = start if self.shape == "constant" else {self.shape: [start, end]}
        return {"weights": first, "curriculum": curriculum, "temperature": temperature}

    def training(self) -> dict[str, Any]:
        """What to write into `training:`."""
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": warmed(self.warm_up, self.course, self.last),
            **BESIDE,
        }


def as_yaml(loss: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """The two sections as one would write them: a line a setting, a line a phase."""
    lines = []
    for section, settings in (("loss", loss), ("training", training)):
        lines.append(f"{section}:")
        for name, value in settings.items():
            if name == "curriculum" and value:
                lines += [f"  {name}:", *(f"    - {_flow(phase)}" for phase in value)]
            else:
                lines.append(f"  {name}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def pasted(config: Config, text: str) -> Config:
    """The config with these lines in place of its own.

    Raises:
        ConfigError: they are no sound config; every fault is in the message.
    """
    plain, change = config.as_dict(), yaml.safe_load(text)
    return parse(
        {**plain, **{section: {**plain[section], **settings} for section, settings in change.items()}},
        name="this design",
    )


def design_of(config: Config, steps: int | None = None) -> tuple[Design, list[str]]:
    """Where the designer starts: the config's own course, and a line for each part of it that it cannot
    hold.
    """
    notes, plain = [], config.loss
    curriculum = plain.curriculum or []
    usual = {name: _level(spec, f"loss.weights.{name}", notes) for name, spec in plain.weights.items()}
    terms = [*plain.weights, *(name for name in plain.schedules if name not in plain.weights)]
    phases = [
        Phase(
            phase.until,
            {
                name: _level(
                    phase.weights.get(name, usual.get(name, 0.0)),
                    f"loss.curriculum.{number}.weights.{name}",
                    notes,
                )
                for name in terms
            },
            phase.ramp or 0.0,
        )
        for number, phase in enumerate(curriculum)
    ]
    shape, temperature = _two_ends(_one_temperature(config, notes), "loss.temperature", notes)
    warm_up, course, last = _rate(config, steps, notes)
    rate = config.training.get("learning_rate", LEARNING_RATE)
    return Design(
        rate, warm_up, course, last, temperature, shape, tuple(phases) or (Phase(1.0, usual),)
    ), notes


def _level(spec: Spec, where: str, notes: list[str]) -> float:
    if isinstance(spec, Mapping):
        notes.append(f"{where} is {_flow(spec)}; the designer moves numbers, and starts from its first value")
    return float(from_spec(spec)(0.0))


def _one_temperature(config: Config, notes: list[str]) -> Spec:
    found = config.loss.temperature
    if (
        not isinstance(found, Mapping)
        or next(iter(found)) in SHAPES
        or next(iter(found)) in ("steps", "piecewise", "joined")
    ):
        return found
    notes.append(f"loss.temperature is {_flow(found)}; the designer has one for all terms")
    return found.get("kd", next(iter(found.values())))


def _two_ends(spec: Spec, where: str, notes: list[str]) -> tuple[str, tuple[float, float]]:
    ((shape, ends),) = spec.items() if isinstance(spec, Mapping) else [("constant", [spec, spec])]
    if shape in SHAPES:
        return shape, (float(ends[0]), float(ends[1]))
    notes.append(
        f"{where} is {_flow(spec)}; the designer has shapes with two ends, and starts from a line between "
        "its own"
    )
    return "linear", (from_spec(spec)(0.0), from_spec(spec)(1.0))


def _rate(config: Config, steps: int | None, notes: list[str]) -> tuple[float, str, float]:
    """Warm-up, course after it, and its end; what fits no such form is noted, and a usual one taken."""
    course = rate_course(config, steps)
    warm_up, main = 0.0, course
    if isinstance(course, Mapping) and list(course) == ["joined"] and len(parts := course["joined"]) == 2:
        (until, first), (_, last_part) = parts
        if first == {"linear": [0.0, 1.0]}:
            warm_up, main = float(until), last_part
    if main == 1.0 or main == {"linear": [1.0, 1.0]}:
        return warm_up, "constant", 1.0
    if isinstance(main, Mapping) and next(iter(main)) in COURSES and next(iter(main.values()))[0] == 1:
        ((name, ends),) = main.items()
        return warm_up, name, float(ends[1])
    shown = course if course is not None else config.training["lr_scheduler_type"]
    notes.append(
        f"training.lr_scheduler_type is {_flow(shown)}; the designer starts from a warm-up and a cosine"
    )
    return 0.1, "cosine", 0.0


def _flow(value: Any) -> str:
    """One line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
