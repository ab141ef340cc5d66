"""Schedules: a number (the fraction of training done, 0 to 1) to a number.

One maths for temperature, loss weights and whatever else changes while a student learns.  In a config a schedule is a
number, or a mapping with one key that names the shape:

    2.0                                       the same value throughout
    {linear: [4, 1]}                          a straight line from 4 to 1
    {cosine: [4, 1]}                          half a cosine from 4 to 1
    {steps: {0: 1.0, 0.5: 0.2}}               1.0, and 0.2 from half of training on
    {joined: [[0.3, {linear: [0, 1]}], [1.0, 1.0]]}   each shape runs until the fraction before it
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

Schedule = Callable[[float], float]
SHAPES = ("linear", "cosine", "steps", "joined")


def constant(value: float) -> Schedule:
    """The same value from start to end."""
    return lambda fraction: value


def linear(start: float, end: float) -> Schedule:
    """A straight line: `start` at fraction 0, `end` at fraction 1."""
    return lambda fraction: start + (end - start) * _clipped(fraction)


def cosine(start: float, end: float) -> Schedule:
    """Half a cosine wave: flat at both ends, steepest in the middle (Loshchilov & Hutter 2017, without restarts)."""
    return lambda fraction: end + (start - end) * 0.5 * (1 + math.cos(math.pi * _clipped(fraction)))


def steps(values: Mapping[float, float]) -> Schedule:
    """A staircase: each value holds from its fraction on.

    Raises:
        ValueError: no value is given for fraction 0.
    """
    starts = sorted(values)
    if not starts or starts[0] != 0:
        raise ValueError(f"steps need a value at fraction 0, found {starts}; add `0: <first value>`")
    return lambda fraction: values[max(start for start in starts if start <= max(fraction, 0))]


def joined(phases: Sequence[tuple[float, Schedule]]) -> Schedule:
    """Schedules one after another, each stretched over its own phase.

    Args:
        phases: (until, schedule) with `until` rising to 1; a schedule sees its own phase as 0 to 1.

    Raises:
        ValueError: the ends do not rise, or the last is not 1.
    """
    ends = [until for until, _ in phases]
    if not ends or ends[-1] != 1 or sorted(set(ends)) != ends or ends[0] <= 0:
        raise ValueError(f"phases must end at rising fractions, the last at 1; found {ends}")

    def at(fraction: float) -> float:
        index = next((i for i, end in enumerate(ends) if fraction < end), len(ends) - 1)
        start = ends[index - 1] if index else 0.0
        return phases[index][1]((fraction - start) / (ends[index] - start))

    return at


def from_spec(spec: float | Mapping) -> Schedule:
    """The schedule that a config's number or one-key mapping describes (see the module's docstring).

    Raises:
        ValueError: the shape is unknown or its arguments do not fit; the message shows the forms allowed.
    """
    if isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in SHAPES:
        (shape, arguments), = spec.items()
        return _shaped(shape, arguments)
    if not isinstance(spec, (Mapping, bool)):
        with contextlib.suppress(OverflowError, TypeError, ValueError):  # YAML reads 1e-4 as a string
            if math.isfinite(value := float(spec)):
                return constant(value)
    raise ValueError(f"found {spec!r}; a schedule is a number or one of {', '.join(SHAPES)}, e.g. {{linear: [4, 1]}}")


def _shaped(shape: str, arguments) -> Schedule:
    try:
        if shape == "steps":
            return steps({float(start): float(value) for start, value in arguments.items()})
        if shape == "joined":
            return joined([(float(until), from_spec(part)) for until, part in arguments])
        start, end = map(float, arguments)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{shape}: {arguments!r} does not fit: {error}") from error
    return {"linear": linear, "cosine": cosine}[shape](start, end)


def _clipped(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
