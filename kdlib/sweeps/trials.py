"""A sweep's trials: each some settings, the whole config that they resolve to, and a run's name made from
it.  Imports no torch.
"""

import hashlib
import itertools
import json
import math
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.config import run as configs
from kdlib.config.run import Config, read_yaml
from kdlib.config.task_rules import rules_of
from kdlib.errors import ConfigError
from kdlib.sweeps.config import WEIGHTS, SweepConfig

DIGITS = 4  # of a drawn number: what stands in tables is what was run


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    run: str  # the run's name: the sweep's, and a hash of the resolved config
    parameters: Mapping[str, Any]  # the settings that differ, as the sweep's file names them
    config: Config


@dataclass(frozen=True)
class Base:
    """What all trials start from: the base config as it stands in its file, and what the sweep changes in
    all of them.
    """

    sweep: str
    file: str
    raw: Any
    smoke: bool
    overrides: Mapping[str, Any]
    parameters: Sequence[str]  # all that the trials differ in

    def trial(self, parameters: Mapping[str, Any]) -> Trial:
        """The trial with these settings.

        Raises:
            ConfigError: they make no sound config.
        """
        resolved = configs.parse(
            self.raw, spelt_out({**self.overrides, **parameters}), smoke=self.smoke, name=self.file
        )
        every = {
            name: parameters.get(name, found(resolved, name))
            for name in dict.fromkeys([*self.parameters, *parameters])
        }
        return Trial(f"{self.sweep}_{digest(resolved)}", every, resolved)

    def command(self, parameters: Mapping[str, Any]) -> str:
        """The `kd run` that makes the same run by itself."""
        changes = spelt_out({**self.overrides, **parameters})
        words = [
            word
            for name, value in changes.items()
            for word in ("-o", f"{name}={json.dumps(value, ensure_ascii=False)}")
        ]
        return shlex.join(["kd", "run", self.file, *["--smoke"] * self.smoke, *words])


def base_of(
    settings: SweepConfig,
    sweep: str,
    root: Path,
    *,
    smoke: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Base:
    """Read the base config; a relative path means the same as in every config: seen from the project's
    folder, `root`.
    """
    file = root / settings.base
    raw = read_yaml(configs.read_text(file), settings.base)
    return Base(
        sweep,
        settings.base,
        raw,
        settings.small or smoke,
        {**settings.overrides, **(overrides or {})},
        settings.parameters,
    )


def found(config: Config, name: str) -> Any:
    """What a config has at this dotted name; None where it says nothing."""
    value: Any = config.as_dict()
    for part in name.split(":")[0].split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def digest(config: Config) -> str:
    """8 hex digits that tell one resolved config from another."""
    return hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode()).hexdigest()[:8]


def spelt_out(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as overrides: `loss.weights.kd:ce: 0.7` is a weight of 0.7 for kd and of 0.3 for ce.

    Raises:
        ConfigError: such a value is not a number from 0 to 1.
    """
    overrides = {}
    for name, value in parameters.items():
        if ":" not in name:
            overrides[name] = value
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(
                f"{name}: found {value!r}; it is the first weight, a number from 0 to 1, and the second is "
                "what remains"
            )
        first, second = name.removeprefix(WEIGHTS).split(":")
        overrides |= {WEIGHTS + first: value, WEIGHTS + second: round(1 - value, 10)}
    return overrides


def combinations(settings: SweepConfig) -> list[dict[str, Any]]:
    """The settings of every trial, but of a search: there the first is known only when the sweep begins."""
    if settings.grid:
        return [
            dict(zip(settings.grid, values, strict=True))
            for values in itertools.product(*settings.grid.values())
        ]
    if settings.listed:
        return [dict(parameters) for parameters in settings.listed]
    if settings.random:
        generator = random.Random(settings.random.seed)
        return [
            {name: drawn(generator, draw) for name, draw in settings.random.space.items()}
            for _ in range(settings.random.trials)
        ]
    return []


def drawn(generator: random.Random, draw: Mapping[str, Sequence]) -> Any:
    """One value of a setting of the space."""
    ((kind, values),) = draw.items()
    if kind == "choice":
        return generator.choice(values)
    if kind == "integer":
        return generator.randint(*values)
    if kind == "uniform":
        return short(generator.uniform(*values))
    return short(math.exp(generator.uniform(*map(math.log, values))))


def short(value: float) -> float:
    """With so many digits as one reads."""
    return float(f"{value:.{DIGITS}g}")


def expanded(settings: SweepConfig, base: Base) -> tuple[list[Trial], list[str]]:
    """All trials, each config once, and a line for each that would have been a second.

    Raises:
        ConfigError: trials that make no sound config: all of them in one message.
    """
    trials, repeated, faults = {}, [], []
    for parameters in combinations(settings):
        try:
            trial = base.trial(parameters)
        except ConfigError as error:
            faults.append(f"{described(parameters)}: {error}")
            continue
        if trial.run in trials:
            repeated.append(
                f"{described(parameters)}: the same config as {described(trials[trial.run].parameters)}; run "
                "once"
            )
        trials.setdefault(trial.run, trial)
        if settings.metric not in rules_of(trial.config).held:
            faults.append(
                f"{described(parameters)}: metric: found {settings.metric}, which a comparison of "
                f"{rules_of(trial.config).name} has not; "
                f"it is one of {', '.join(rules_of(trial.config).held)}"
            )
    faults += [f"{described(corner)}: {error}" for corner, error in _unsound_corners(settings, base)]
    if faults:
        raise ConfigError(f"{len(faults)} of the trials cannot be run:\n" + "\n".join(faults))
    return list(trials.values()), repeated


def _unsound_corners(settings: SweepConfig, base: Base) -> Iterator[tuple[dict[str, Any], ConfigError]]:
    """A search's trials are not known before: the ends of each of its ranges stand for them."""
    space = settings.search.space if settings.search else {}
    first = {name: next(iter(draw.values()))[0] for name, draw in space.items()}
    corners = [{**first, name: value} for name, draw in space.items() for value in next(iter(draw.values()))]
    for corner in corners:
        try:
            base.trial(corner)
        except ConfigError as error:
            yield corner, error


def described(parameters: Mapping[str, Any]) -> str:
    """`loss.temperature=2, loss.weights.kd:ce=0.7`"""
    return ", ".join(f"{name}={plain(value)}" for name, value in parameters.items()) or "as the base config"


def plain(value: Any) -> str:
    """A setting's value as one writes it: 0.001, kd: 0.7, ce: 0.3."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {plain(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
