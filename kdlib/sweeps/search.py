"""A search: optuna proposes each trial from how the earlier ones did (pip install "kdlib[sweep]").  Imports
no torch.

The runs' files are what it remembers: a search started again is told all finished trials, and goes on from
there.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from kdlib.errors import ConfigError
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.trials import Base, Trial, described, short


class Search:
    """The trials to come, one at a time."""

    def __init__(
        self, settings: SweepConfig, base: Base, earlier: Sequence[tuple[Mapping[str, Any], float | None]]
    ) -> None:
        """
        Args:
            earlier: parameters and metric of the trials of an earlier start; without a metric where they are
                to be run again.

        Raises:
            ConfigError: optuna is not installed.
        """
        self.optuna = _optuna()
        self.base, self.left = base, settings.search.trials - len(earlier)
        self.draws = {name: self._distribution(draw) for name, draw in settings.search.space.items()}
        self.space = settings.search.space
        self.study = self.optuna.create_study(
            direction="maximize" if settings.higher_is_better else "minimize",
            sampler=self.optuna.samplers.TPESampler(
                seed=settings.search.seed + len(earlier), constant_liar=True
            ),
        )
        self.again = deque(base.trial(parameters) for parameters, value in earlier if value is None)
        self.asked: dict[str, Any] = {}
        self.values: dict[str, float | None] = {}
        self.repeated: list[str] = []
        for parameters, value in earlier:
            if value is not None:
                self._remember(base.trial(parameters), value)

    def next(self) -> Trial | None:
        """The next trial; None where there are as many as were asked for."""
        if self.again:
            return self.again.popleft()
        while self.left > 0:
            self.left -= 1
            asked = self.study.ask(self.draws)
            trial = self.base.trial(
                {name: _value(draw, asked.params[name]) for name, draw in self.space.items()}
            )
            if trial.run not in self.asked and trial.run not in self.values:
                self.asked[trial.run] = asked
                return trial
            self.repeated.append(f"{described(trial.parameters)}: proposed again; run once")
            self._answer(asked, self.values.get(trial.run))
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
            name: json.dumps(trial.parameters[name]) if "choice" in draw else trial.parameters[name]
            for name, draw in self.space.items()
        }
        self.study.add_trial(
            self.optuna.trial.create_trial(params=params, distributions=self.draws, value=value)
        )

    def _distribution(self, draw: Mapping[str, Sequence]) -> Any:
        ((kind, values),) = draw.items()
        of = self.optuna.distributions
        if kind == "choice":
            return of.CategoricalDistribution([json.dumps(value) for value in values])
        if kind == "integer":
            return of.IntDistribution(*values)
        return of.FloatDistribution(*values, log=kind == "log_uniform")


def _value(draw: Mapping[str, Sequence], proposed: Any) -> Any:
    """What optuna proposed, as a setting: short numbers within the range, choices out of their JSON."""
    ((kind, values),) = draw.items()
    if kind == "choice":
        return json.loads(proposed)
    return proposed if kind == "integer" else min(max(short(proposed), values[0]), values[1])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            'a sweep with `search` needs optuna; run: pip install "kdlib[sweep]", or take `random`'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
