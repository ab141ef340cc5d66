"""Changes of a config that need less memory, the cheapest first, each judged by a forecast of the changed
config.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.config import run as configs
from kdlib.config.run import Config
from kdlib.diagnostics.charges import GIB
from kdlib.diagnostics.memory import Forecast, verdict

CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB that cards are sold with
SHORTEST = 64  # tokens of a row, below which nothing is proposed

Forecaster = Callable[[Config], Forecast]


@dataclass(frozen=True)
class Remedy:
    """A change and what it leads to."""

    what: str
    changes: Mapping[str, Any]  # overrides, by dotted names
    peak: int  # bytes

    @property
    def overrides(self) -> str:
        """As they are written on the command line."""
        return " ".join(
            f"-o {name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.changes.items()
        )


def single_changes(config: Config, forecast: Forecast) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be changed by itself, the cheapest in time and in what the training means first; the
    effective batch stays.
    """
    training = config.training
    batch, accumulation = (
        training.get("per_device_train_batch_size", 8),
        training.get("gradient_accumulation_steps", 1),
    )
    if forecast.moment == "evaluation" and training.get("per_device_eval_batch_size", 8) > 1:
        yield "evaluate one row at a time", {"training.per_device_eval_batch_size": 1}
    if not (training.get("activation_checkpointing") or training.get("gradient_checkpointing")):
        yield (
            "activation checkpointing: a third more time for the student",
            {"training.activation_checkpointing": True},
        )
    for rows in sorted(
        {rows for rows in (batch // 2, batch // 4, 1) if 0 < rows < batch and batch % rows == 0}, reverse=True
    ):
        yield (
            f"{rows} rows at a time, {batch // rows} times as many per step: the same effective batch",
            {
                "training.per_device_train_batch_size": rows,
                "training.gradient_accumulation_steps": accumulation * (batch // rows),
            },
        )
    if forecast.chunk and forecast.chunk > 64:
        yield "logits of fewer tokens at a time", {"loss.chunk": 64}
    if forecast.precision == "float32":
        yield (
            "bfloat16 for the teacher and for the products: slower on a CPU without it",
            {"precision": "bfloat16"},
        )
    if (length := config.data.max_length // 2) >= SHORTEST:
        yield "half as long rows: the student sees less context", {"data.max_length": length}


def remedies(
    config: Config, found: Forecast, memory: int, forecaster: Forecaster, *, count: int = 3
) -> list[Remedy]:
    """The cheapest changes with which the training fits into `memory` bytes: single ones, else more and more
    together.

    Returns:
        Up to `count`; the last resort alone, if even that does not fit, so that one sees what is missing.
        Empty where the config fits as it is.
    """
    if verdict(found.peak, memory) != "does not fit":
        return []
    singles, fitting = list(single_changes(config, found)), []
    everything = _together(singles)
    least = Remedy(*everything, forecaster(_changed(config, everything[1])).peak) if singles else None
    if least is None or least.peak > memory:
        return [least] if least else []
    for what, changes in singles:
        peak = forecaster(_changed(config, changes)).peak
        if peak <= memory:
            fitting.append(Remedy(what, changes, peak))
        if len(fitting) == count:
            return fitting
    for number in range(2, len(singles)) if not fitting else ():
        what, changes = _together(singles[:number])
        peak = forecaster(_changed(config, changes)).peak
        if peak <= memory:
            return [Remedy(what, changes, peak)]
    return fitting or [least]


def _together(singles: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """Several changes as one; of two that set the same, the later one counts."""
    return "; ".join(what.split(":")[0] for what, _ in singles), {
        name: value for _, changes in singles for name, value in changes.items()
    }


def cards(
    config: Config, found: Forecast, forecaster: Forecaster, sizes: tuple[int, ...] = CARDS
) -> list[dict[str, Any]]:
    """For each usual memory size: whether the config fits as it is, and else with which change.

    Returns:
        [{"gib": …, "verdict": …, "remedy": a Remedy or None}, …]
    """
    lines, known = [], {}

    def remembered(changed: Config) -> Forecast:
        key = changed.as_yaml()
        known[key] = known.get(key) or forecaster(changed)
        return known[key]

    for gib in sizes:
        cheapest = next(iter(remedies(config, found, gib * GIB, remembered, count=1)), None)
        lines.append({"gib": gib, "verdict": verdict(found.peak, gib * GIB), "remedy": cheapest})
    return lines


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    return configs.parse(config.as_dict(), changes)
