"""A sweep's trials: listed, drawn, or chosen one at a time."""

import hashlib
import itertools
import json
import math
import random
import shlex
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.config import run as configs
from kdlib.config.reading import read_text, read_yaml
from kdlib.config.run import BESIDE, Config
from kdlib.config.task_rules import rules_of
from kdlib.errors import ConfigError
from kdlib.sweeps.config import WEIGHTS, SweepConfig


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    run: str  # the run's name: the sweep's, and a hash of the resolved config
    parameters: Mapping[str, Any]  # the settings that differ, as the sweep's file names them
    config: Config


class Base:
    """What all trials start from: the base config as its file has it, and the sweep's own overrides."""

    def __init__(
        self, settings: SweepConfig, sweep: str, root: Path, *, smoke: bool = False, overrides: Mapping = {}
    ) -> None:
        self.sweep, self.file, self.smoke = sweep, settings.base, settings.small or smoke
        # its path, as all in a config, is seen from the project's folder, `root`
        self.raw = read_yaml(read_text(root / self.file), self.file)
        self.overrides, self.parameters = {**settings.overrides, **overrides}, settings.parameters

    def trial(self, parameters: Mapping[str, Any]) -> Trial:
        """The trial with these settings.

        Raises:
            ConfigError: they make no sound config.
        """
        changes = spelt_out({**self.overrides, **parameters})
        config = configs.parse(self.raw, changes, smoke=self.smoke, name=self.file)
        plain = config.as_dict()
        every = {name: _found(plain, name) for name in self.parameters} | parameters
        varied = {name.partition(".")[0] for name in self.parameters}
        told_apart = config.without(*(section for section in BESIDE if section not in varied))
        digest = hashlib.sha256(json.dumps(told_apart, sort_keys=True).encode()).hexdigest()
        return Trial(f"{self.sweep}_{digest[:8]}", every, config)

    def command(self, parameters: Mapping[str, Any]) -> str:
        """The `kd run` that makes the same run by itself."""
        words = ["kd", "run", self.file, *["--smoke"] * self.smoke]
        for name, value in spelt_out({**self.overrides, **parameters}).items():
            words += ["-o", f"{name}={json.dumps(value, ensure_ascii=False)}"]
        return shlex.join(words)


def _found(config: Any, name: str) -> Any:
    """What a config has at this dotted name; None where it says nothing."""
    for part in name.split(":")[0].split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


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
            raise ConfigError(f"{name}: found {value!r}; it is the first weight, a number from 0 to 1")
        first, second = name.removeprefix(WEIGHTS).split(":")
        overrides |= {WEIGHTS + first: value, WEIGHTS + second: round(1 - value, 10)}
    return overrides


def combinations(settings: SweepConfig) -> list[dict[str, Any]]:
    """The settings of every trial; of a search the ends of each range, to be tried before it begins."""
    if settings.grid:
        every = itertools.product(*settings.grid.values())
        return [dict(zip(settings.grid, values, strict=True)) for values in every]
    if settings.listed:
        return [dict(parameters) for parameters in settings.listed]
    if settings.random:
        generator, draws = random.Random(settings.random.seed), settings.random.draws.items()
        times = range(settings.random.trials)
        return [{name: _drawn(generator, *draw) for name, draw in draws} for _ in times]
    search = settings.search
    return [search.first | {name: end} for name, (_, values) in search.draws.items() for end in values]


def _drawn(generator: random.Random, kind: str, values: Sequence) -> Any:
    if kind == "choice":
        return generator.choice(values)
    if kind == "integer":
        return generator.randint(*values)
    if kind == "uniform":
        return _rounded(generator.uniform(*values))
    return _rounded(math.exp(generator.uniform(*map(math.log, values))))


def _rounded(value: float) -> float:
    """With as many digits as one reads: what stands in tables is what was run."""
    return float(f"{value:.4g}")


def expanded(settings: SweepConfig, base: Base) -> tuple[list[Trial], list[str]]:
    """All trials, each config once, and a line for each that would have been a second.

    A search has none yet: its points are only checked.

    Raises:
        ConfigError: trials that make no sound config: all of them in one message.
    """
    trials: dict[str, Trial] = {}
    repeated, faults = [], []
    for parameters in combinations(settings):
        try:
            trial = base.trial(parameters)
        except ConfigError as error:
            faults.append(f"{described(parameters)}: {error}")
            continue
        rules = rules_of(trial.config)
        if settings.metric not in rules.held:
            held = f"a comparison of {rules.name} has not; it is one of {', '.join(rules.held)}"
            faults.append(f"{described(parameters)}: metric: found {settings.metric}, which {held}")
        if trial.run in trials:
            same = described(trials[trial.run].parameters)
            repeated.append(f"{described(parameters)}: the same config as {same}; run once")
        trials.setdefault(trial.run, trial)
    if faults:
        raise ConfigError(f"{len(faults)} of the trials cannot be run:\n" + "\n".join(faults))
    return ([], []) if settings.search else (list(trials.values()), repeated)


def described(parameters: Mapping[str, Any]) -> str:
    """`loss.temperature=2, loss.weights.kd:ce=0.7`"""
    return ", ".join(f"{name}={plain(value)}" for name, value in parameters.items()) or "as the base config"


def plain(value: Any) -> str:
    """A setting's value as one writes it: 0.001, {kd: 0.7, ce: 0.3}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {plain(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(plain, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def levels(values: Iterable[Any]) -> list[Any]:
    """The values that occur, each once: numbers by size, others in the order of the trials."""
    once = list({plain(value): value for value in values}.values())
    return sorted(once) if are_numbers(once) else once


def are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


class Search:
    """The trials of a search, one at a time: optuna proposes each from how the earlier ones did."""

    def __init__(
        self, settings: SweepConfig, base: Base, earlier: Sequence[tuple[Mapping[str, Any], float | None]]
    ) -> None:
        """
        Args:
            earlier: parameters and metric of an earlier start's trials; those without one are run again.

        Raises:
            ConfigError: optuna is not installed.
        """
        self.optuna, search = _optuna(), settings.search
        self.base, self.left = base, search.trials - len(earlier)
        self.draws = search.draws
        self.distributions = {name: self._distribution(*draw) for name, draw in self.draws.items()}
        sampler = self.optuna.samplers.TPESampler(seed=search.seed + len(earlier), constant_liar=True)
        direction = "maximize" if settings.higher_is_better else "minimize"
        self.study = self.optuna.create_study(direction=direction, sampler=sampler)
        self.again = deque(base.trial(parameters) for parameters, value in earlier if value is None)
        self.asked: dict[str, Any] = {}  # optuna's own trials, by the run's name
        self.values: dict[str, float | None] = {}
        for parameters, value in earlier:
            if value is not None:
                self._remember(base.trial(parameters), value)

    def next(self) -> Trial | None:
        """The next trial; None where there are as many as were asked for."""
        if self.again:
            return self.again.popleft()
        while self.left > 0:
            self.left -= 1
            asked = self.study.ask(self.distributions)
            trial = self.base.trial({name: self._setting(name, asked.params[name]) for name in self.draws})
            if trial.run not in self.asked and trial.run not in self.values:
                self.asked[trial.run] = asked
                return trial
            self._answer(asked, self.values.get(trial.run))  # proposed again: it is run once
        return None

    def told(self, trial: Trial, value: float | None) -> None:
        """How a trial did; None where it failed."""
        if trial.run in self.asked:
            self.values[trial.run] = value
            self._answer(self.asked.pop(trial.run), value)
        elif value is not None:
            self._remember(trial, value)

    def ahead(self) -> list[str]:
        """The runs still to come, as far as they are known."""
        return [trial.run for trial in self.again] + ["not chosen yet"] * self.left

    def _answer(self, asked: Any, value: float | None) -> None:
        self.study.tell(asked, value, state=None if value is not None else self.optuna.trial.TrialState.FAIL)

    def _remember(self, trial: Trial, value: float) -> None:
        self.values[trial.run] = value
        params = {
            name: json.dumps(trial.parameters[name]) if kind == "choice" else trial.parameters[name]
            for name, (kind, _) in self.draws.items()
        }
        create = self.optuna.trial.create_trial
        self.study.add_trial(create(params=params, distributions=self.distributions, value=value))

    def _distribution(self, kind: str, values: Sequence) -> Any:
        of = self.optuna.distributions
        if kind == "choice":
            return of.CategoricalDistribution([json.dumps(value) for value in values])
        if kind == "integer":
            return of.IntDistribution(*values)
        return of.FloatDistribution(*values, log=kind == "log_uniform")

    def _setting(self, name: str, proposed: Any) -> Any:
        kind, values = self.draws[name]
        if kind == "choice":
            return json.loads(proposed)
        return proposed if kind == "integer" else min(max(_rounded(proposed), values[0]), values[1])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        do = 'run: pip install "kdlib[sweep]", or take `random`'
        raise ConfigError(f"a sweep with `search` needs optuna; {do}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
