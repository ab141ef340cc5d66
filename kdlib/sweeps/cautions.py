"""What a sweep found, and what its figures do not show: few seeds, a best at the edge of what was tried."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from kdlib.config.run import parse
from kdlib.errors import ConfigError
from kdlib.sweeps.results import Sweep, verdict
from kdlib.sweeps.trials import are_numbers, levels, plain, spelt_out

FEW_SEEDS = 3  # below which Student's interval rests on a single difference
NEAR = 0.1  # of a range: as near to one of its ends, the best may lie beyond
STEPS = (1.0, 0.5, 0.25)  # of the last step, or of a whole range, to be tried beyond an edge: the first that
STEPS_OF_RANGE = (0.25, 0.1)  # the config takes


def findings(sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame) -> list[str]:
    """What the sweep found, a sentence each, the verdict first."""
    found = [verdict(sweep, settings)]
    return [*found, *few_seeds(settings), *at_the_edge(sweep, trials, settings)] if len(settings) else found


def few_seeds(settings: pd.DataFrame) -> Iterator[str]:
    """Where an interval over seeds says little, or is held against one that speaks of something else."""
    counts, total = settings["n"], len(settings)
    if few := int(counts.between(2, FEW_SEEDS - 1).sum()):
        yield (
            f"Caution: {_some(few, total)} two seeds only: an interval that rests on a single difference is "
            "mostly far too wide, and sometimes by luck too narrow; train three or more"
        )
    if counts.min() == 1 < counts.max():
        yield (
            f"Caution: {_some(int(counts.eq(1).sum()), total)} one seed, its interval over held-out rows, as "
            "if no seed changed anything; the others' are over seeds"
        )


def _some(count: int, total: int) -> str:
    return "there are" if total == 1 else f"{count} of {total} settings {'has' if count == 1 else 'have'}"


def at_the_edge(sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame) -> Iterator[str]:
    """For each number that differs: where the best has the highest or the lowest that was tried, what to try.

    Nothing is said where the config takes nothing beyond: a weight of 1, a temperature of 100.
    """
    best, ranges = settings.iloc[0], _ranges(sweep)
    for name in sweep.varied:
        tried, value = levels(trials[name]), best[name]
        if len(tried) < 2 or not are_numbers(tried):
            continue
        tried, drawn = ranges.get(name, tried), name in ranges
        for ends, word in ((tried[::-1], "highest"), (tried, "lowest")):
            at_end = _is_near(value, ends[0], tried) if drawn else value == ends[0]
            if at_end and (further := _beyond(sweep, best["runs"][0], name, ends, drawn=drawn)) is not None:
                where = f"near the {word} of its range" if drawn else f"the {word} of {len(tried)} tried"
                yield (
                    f"The best lies at the edge: {name} {plain(value)} is {where}, so a better one may lie "
                    f"beyond; try {plain(further)} as well"
                )


def _ranges(sweep: Sweep) -> Mapping[str, Sequence[float]]:
    """The ends of what numbers are drawn from."""
    settings = sweep.facts["settings"]
    drawn = (settings.get("random") or settings.get("search") or {}).get("from", {})
    every = {name: next(iter(draw.items())) for name, draw in drawn.items()}
    return {name: ends for name, (kind, ends) in every.items() if kind != "choice"}


def _is_near(value: float, end: float, ends: Sequence[float]) -> bool:
    place, last, first, final = map(_scale(ends), (value, end, *ends))
    return abs(place - last) <= NEAR * (final - first)


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """Logarithmic where the values are rather multiples of each other than equally far apart."""
    tried = sorted(values)
    if tried[0] <= 0:
        return float
    if len(tried) == 2:
        return math.log if tried[1] >= 2 * tried[0] else float
    uneven = []
    for scale in (math.log, float):
        gaps = [scale(b) - scale(a) for a, b in zip(tried, tried[1:], strict=False)]
        uneven.append(max(gaps) / min(gaps))
    return math.log if uneven[0] < uneven[1] else float


def _beyond(sweep: Sweep, run: str, name: str, ends: Sequence[float], *, drawn: bool) -> float | None:
    """The next value beyond the first of these that this run's config takes; None where it takes none."""
    config, scale, (last, before) = sweep.run(run).config.as_dict(), _scale(ends), ends[:2]
    for part in STEPS_OF_RANGE if drawn else STEPS:
        place = scale(last) + part * (scale(last) - scale(before))
        further = float(f"{math.exp(place) if scale is math.log else place:.3g}")
        for value in dict.fromkeys((int(further) if further.is_integer() else further, round(further))):
            if (value > last) == (last > before) and value != last and _is_taken(config, name, value):
                return value
    return None


def _is_taken(config: Mapping[str, Any], name: str, value: float) -> bool:
    try:
        parse(dict(config), spelt_out({name: value}))
    except ConfigError:
        return False
    return True
