"""One sweep, checked; notebooks/guides/sweeps.md shows its four forms.

A space says for each setting {uniform: [1, 6]}, {log_uniform: [1e-5, 1e-3]}, {integer: [2, 8]} or
{choice: [a, b]}.  `loss.weights.kd:ce` is a setting of two weights: 0.7 makes the first 0.7, the second 0.3.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from kdlib.config.sections import Number, Positive, Section, Seed, number, refuse
from kdlib.config.terms import TERM_NAMES
from kdlib.errors import nearest, printable
from kdlib.metrics.names import MEASURES

DRAWS = {
    "uniform": "[low, high]",
    "log_uniform": "[low, high], both above 0",
    "integer": "[low, high], whole numbers",
    "choice": "a list of values",
}
WEIGHTS = "loss.weights."


def _faults(names: Sequence[Any]) -> list[str]:
    """What is wrong with these dotted names, a line each."""
    faults = []
    for name in names:
        terms = str(name).removeprefix(WEIGHTS).split(":")
        pair = str(name).startswith(WEIGHTS) and len(set(terms) & set(TERM_NAMES)) == len(terms) == 2
        if not isinstance(name, str) or not all(name.split(".")):
            faults.append(f"found {name!r} as a setting; write its dotted name, as loss.temperature")
        elif ":" in name and not pair:
            faults.append(f"{printable(name)}: with a colon only two weights can be named, as {WEIGHTS}kd:ce")
    return faults


def _grid(grid: Mapping[str, list]) -> Mapping[str, list]:
    faults = _faults(list(grid)) if grid else ["found {}; it needs a setting with its values"]
    for name, values in grid.items():
        if not values:
            faults.append(f"{printable(name)}: the list is empty; it needs a value at least")
    refuse(faults)
    return {name: [_value(value) for value in values] for name, values in grid.items()}


def _value(value: Any) -> Any:
    """1e-4, which YAML reads as a string, is a number."""
    return number(value) if isinstance(value, str) else value


def _list(trials: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    faults = [fault for trial in trials for fault in _faults(list(trial))]
    refuse(faults if trials else ["the list is empty; it needs a trial at least"])
    return [{name: _value(value) for name, value in trial.items()} for trial in trials]


def _overrides(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    refuse(_faults(list(overrides)))
    return overrides


def _space(space: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    faults, found = _faults(list(space)), {}
    for name, draw in space.items():
        try:
            found[name] = _draw(draw)
        except ValueError as error:
            faults.append(f"{printable(str(name))}: {error}")
    refuse(faults if space else ["found {}; it needs a setting to draw"])
    return found


def _draw(draw: Any) -> dict[str, list]:
    kind, values = next(iter(draw.items())) if isinstance(draw, Mapping) and len(draw) == 1 else ("", None)
    if kind not in DRAWS or not isinstance(values, list):
        known = ", ".join(f"{{{name}: {what}}}" for name, what in DRAWS.items())
        raise ValueError(f"found {draw!r}{nearest(str(kind), DRAWS) if kind else ''}; it is one of {known}")
    if kind == "choice":
        if not values:
            raise ValueError("choice is empty; it needs a value at least")
        return {kind: [_value(value) for value in values]}
    ends = [number(value) for value in values]
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not ends[0] < ends[1]:
        raise ValueError(f"found {kind}: {values!r}; it needs two numbers, the lower first")
    if kind == "log_uniform" and ends[0] <= 0:
        raise ValueError(f"found {kind}: {values!r}; both must be above 0")
    if kind == "integer" and any(end % 1 for end in ends):
        raise ValueError(f"found {kind}: {values!r}; both must be whole numbers")
    return {kind: [(int if kind == "integer" else float)(end) for end in ends]}


def _metric(value: Any) -> str:
    name = str(value).removeprefix("eval_")
    if name not in MEASURES:
        raise ValueError(f"found {value!r}{nearest(name, MEASURES)}; it is one of {', '.join(MEASURES)}")
    return name


class Drawn(Section):
    """So many trials from a space."""

    trials: Positive
    seed: Seed = 0
    space: Annotated[dict[str, Any], AfterValidator(_space)] = Field(alias="from")

    @property
    def draws(self) -> dict[str, tuple[str, list]]:
        """Setting → (kind, values)."""
        return {name: next(iter(draw.items())) for name, draw in self.space.items()}

    @property
    def first(self) -> dict[str, Any]:
        """One point of the space."""
        return {name: values[0] for name, (_, values) in self.draws.items()}


class SweepConfig(Section):
    """One complete sweep."""

    base: str
    small: bool = Field(False, alias="smoke")
    overrides: Annotated[dict[str, Any], AfterValidator(_overrides)] = {}
    grid: Annotated[dict[str, list], AfterValidator(_grid)] | None = None
    listed: Annotated[list[dict[str, Any]], AfterValidator(_list)] | None = Field(None, alias="list")
    random: Drawn | None = None
    search: Drawn | None = None
    metric: Annotated[str, BeforeValidator(_metric)] = "kl_to_teacher"
    jobs: Positive = 1
    timeout_minutes: Annotated[Number, Field(gt=0)] | None = None
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _one_form(self):
        forms = {"grid", "listed", "random", "search"}
        given = self.model_dump(by_alias=True, include=forms, exclude_none=True)
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"found {found} of grid, list, random, search; a sweep has exactly one of them")
        if clash := sorted(set(self.overrides) & set(self.parameters)):
            shared = "both in `overrides`, which all trials share, and among what differs; leave one out"
            raise ValueError(f"{', '.join(clash)}: {shared}")
        return self

    @property
    def parameters(self) -> list[str]:
        """The settings that the trials differ in, in the order of the file."""
        drawn = self.random or self.search
        trials = [self.grid] if self.grid else self.listed or [drawn.space]
        return list(dict.fromkeys(name for trial in trials for name in trial))

    @property
    def higher_is_better(self) -> bool:
        return MEASURES[self.metric].higher_is_better
