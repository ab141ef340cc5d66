"""Schedules: a number (the fraction of training done, 0 to 1) to a number.

One maths for temperature, loss weights, learning rate, top k and whatever else changes while a student
learns.  In a config a schedule is a number, or a mapping with one key that names the shape:

    2.0                                       the same value throughout
    {linear: [4, 1]}                          a straight line from 4 to 1
    {cosine: [4, 1]}                          half a cosine from 4 to 1
    {exponential: [4, 1]}                     from 4 to 1 by equal factors: 2 at the half
    {steps: {0: 1.0, 0.5: 0.2}}               1.0, and 0.2 from half of training on
    {piecewise: {0: 1.0, 0.3: 0.5, 1: 0.1}}   straight lines from point to point
    {joined: [[0.3, {linear: [0, 1]}], [1.0, 1.0]]}   each shape runs until the fraction before it

A curriculum says the same of many weights at once, phase by phase, and is resolved into such schedules:

    weights: {kd: 0.7, ce: 0.3}
    curriculum:
      - {until: 0.3, weights: {hidden: 0}}               # the first 30 % of training
      - {until: 1.0, weights: {hidden: 0.5}, ramp: 0.1}  # the rest; in its first 10 % from 0 to 0.5

`until` and `ramp` are fractions of the whole training.  A phase's weights stand in for the usual ones
(`loss.weights`, 0 where that is silent) of the terms that it names.  Without a ramp they hold from the
phase's start: a jump, and a weight may be a schedule, stretched over the phase.  With one, every weight that
changes goes in a straight line from where the phase before it ended (in the first, what it names from 0).
"""

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

Schedule = Callable[[float], float]
Spec = float | Mapping  # as it stands in a config
TINY = 1e-9  # fractions of training that differ by less are the same


def constant(value: float) -> Schedule:
    """The same value from start to end."""
    return lambda fraction: value


def linear(start: float, end: float) -> Schedule:
    """A straight line: `start` at fraction 0, `end` at fraction 1."""
    return lambda fraction: start + (end - start) * _clipped(fraction)


def cosine(start: float, end: float) -> Schedule:
    """Half a cosine wave: flat at both ends, steepest in the middle (Loshchilov & Hutter 2017)."""
    return lambda fraction: end + (start - end) * 0.5 * (1 + math.cos(math.pi * _clipped(fraction)))


def exponential(start: float, end: float) -> Schedule:
    """From `start` to `end`, both above 0, by equal factors in equal times: a line of the logarithm."""
    if not (start > 0 and end > 0):
        advice = "take a small positive number, or linear"
        raise ValueError(f"both ends must be above 0, found {start:g} and {end:g}; {advice}")
    return lambda fraction: start ** (1 - _clipped(fraction)) * end ** _clipped(fraction)


def steps(values: Mapping[float, float]) -> Schedule:
    """A staircase: each value holds from its fraction on.  Fractions lie from 0 to 1, and 0 is among them."""
    starts = _starts(values)
    return lambda fraction: values[starts[bisect_right(starts, _clipped(fraction)) - 1]]


def piecewise(points: Mapping[float, float]) -> Schedule:
    """Straight lines from point to point, flat after the last.  Fractions as of `steps`."""
    starts = _starts(points)

    def at(fraction: float) -> float:
        index = bisect_right(starts, _clipped(fraction)) - 1
        start, end = starts[index], starts[min(index + 1, len(starts) - 1)]
        done = (_clipped(fraction) - start) / (end - start) if end > start else 0.0
        return points[start] + (points[end] - points[start]) * done

    return at


def joined(phases: Sequence[tuple[float, Schedule]]) -> Schedule:
    """Schedules one after another, (until, schedule), `until` rising to 1; each sees its phase as 0 to 1."""
    ends = [until for until, _ in phases]
    if not ends or ends[-1] != 1 or not all(start < end for start, end in pairwise([0.0, *ends])):
        raise ValueError(f"phases must end at rising fractions, the last at 1; found {ends}")

    def at(fraction: float) -> float:
        index = next((i for i, end in enumerate(ends) if fraction < end), len(ends) - 1)
        start = ends[index - 1] if index else 0.0
        return phases[index][1]((fraction - start) / (ends[index] - start))

    return at


TABLES = {"steps": steps, "piecewise": piecewise}  # of {fraction: value}
LINES = {"linear": linear, "cosine": cosine, "exponential": exponential}  # of [start, end]
SHAPES = (*LINES, *TABLES, "joined")


def from_spec(spec: Spec) -> Schedule:
    """The schedule that a config's number or one-key mapping describes.

    Raises:
        ValueError: the shape is unknown or its arguments do not fit; the message shows the forms allowed.
    """
    if isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in SHAPES:
        ((shape, arguments),) = spec.items()
        try:
            return _shaped(shape, arguments)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{shape}: {arguments!r} does not fit: {error}") from error
    if not isinstance(spec, Mapping):
        with contextlib.suppress(OverflowError, TypeError, ValueError):
            if math.isfinite(value := _number(spec)):
                return constant(value)
    form = f"one of {', '.join(SHAPES)}, e.g. {{linear: [4, 1]}}"
    raise ValueError(f"found {spec!r}; a schedule is a number or {form}")


def normal(spec: Spec) -> Spec:
    """The same spec with all its numbers floats: equal however YAML or JSON wrote them."""
    if not isinstance(spec, Mapping):
        return float(spec)
    ((shape, arguments),) = spec.items()
    if shape == "joined":
        return {shape: [[float(until), normal(part)] for until, part in arguments]}
    return {shape: _table(arguments) if shape in TABLES else list(map(float, arguments))}


def at_most(spec: Spec, limit: float) -> Spec:
    """The same spec with every number in it that is larger lowered to the limit."""
    if not isinstance(spec, Mapping):
        return min(float(spec), limit)
    ((shape, arguments),) = spec.items()
    if shape == "joined":
        return {shape: [[until, at_most(part, limit)] for until, part in arguments]}
    if shape in TABLES:
        return {shape: {start: min(value, limit) for start, value in _table(arguments).items()}}
    return {shape: [min(float(value), limit) for value in arguments]}


def breakpoints(*specs: Spec) -> list[float]:
    """The fractions at which specs are judged: each per cent of training, and both sides of every corner."""
    corners = {corner for spec in specs for corner in _corners(spec)}
    beside = {_clipped(corner + step) for corner in corners for step in (-TINY, 0.0, TINY)}
    return sorted({i / 100 for i in range(101)} | beside)


def sampled(spec: Spec) -> list[float]:
    """The values at its `breakpoints`: what its range is judged by.

    Raises:
        ValueError: it is no schedule, or a value is not finite.
    """
    values = list(map(from_spec(spec), breakpoints(spec)))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"found {spec}; every value must be finite")
    return values


def with_curriculum(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> dict[str, Spec]:
    """Every term's weight over the whole training, as a config could hold it, from the usual weights.

    The phases are free of the faults below; where there are none, the weights stay as they are.
    """
    named = {term: weights.get(term, 0.0) for term in _terms(curriculum)}
    return {**weights, **{term: _over_phases(term, usual, curriculum) for term, usual in named.items()}}


def curriculum_disorder(curriculum: Sequence[Mapping]) -> list[str]:
    """What is wrong between phases, a line each: ends that do not rise to 1, a ramp longer than its phase."""
    faults, start = [], 0.0
    for number, phase in enumerate(curriculum, start=1):
        until, ramp = phase["until"], phase.get("ramp") or 0.0
        if until <= start:
            faults.append(f"phase {number} ends at {until:g}, needs an end after {start:g}, where it begins")
        elif ramp > until - start + TINY:
            longest = f"no longer than itself, {until - start:g} of training"
            faults.append(f"phase {number} has a ramp of {ramp:g}, needs one {longest}")
        start = until
    if not curriculum:
        faults.append("there is no phase; write one, as {until: 1.0, weights: {ce: 1.0}}, or null")
    elif start != 1:
        faults.append(f"the last phase ends at {start:g}, needs to end at 1, the end of training")
    return faults


def curriculum_conflicts(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> list[str]:
    """The terms whose usual weight is a schedule although phases set it: two for one weight; a line each."""
    faults = []
    for term in _terms(curriculum):
        phases = [str(i) for i, phase in enumerate(curriculum, start=1) if term in phase.get("weights", {})]
        if isinstance(spec := weights.get(term), Mapping):
            faults.append(
                f"{term}: found {spec}, but the curriculum sets it too (phase {', '.join(phases)}); "
                "write a number here, and the schedule as the weight in a phase"
            )
    return faults


def idle(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> list[str]:
    """One line, with time, phase and terms, where at some time of training every weight is 0."""
    specs = with_curriculum(weights, curriculum)
    schedules, when = [from_spec(spec) for spec in specs.values()], breakpoints(*specs.values())
    still = [fraction for fraction in when if not any(schedule(fraction) for schedule in schedules)]
    if not still:
        return []
    at = "" if len(still) == len(when) else f" at {100 * still[0]:.4g} % of training"
    if at and curriculum:
        ended = sum(phase["until"] <= still[0] for phase in curriculum)
        at += f", in phase {min(1 + ended, len(curriculum))}"
    terms = ", ".join(specs) or "no term is given"
    return [f"all weights are 0{at} ({terms}), so nothing would be learned; give one term a positive weight"]


def _shaped(shape: str, arguments: Any) -> Schedule:
    if shape in TABLES:
        if isinstance(arguments, Mapping):
            return TABLES[shape](_table(arguments))
        example = f"{{{shape}: {{0: 1.0, 0.5: 0.2}}}}"
        raise TypeError(f"a mapping from fractions to values is needed, as {example}")
    if isinstance(arguments, (str, Mapping)) or not isinstance(arguments, Sequence):
        raise TypeError("a list is needed")
    if shape == "joined":
        return joined([(_number(until), from_spec(part)) for until, part in arguments])
    if len(arguments) != 2:
        raise ValueError(f"two numbers are needed, as {{{shape}: [4, 1]}}")
    return LINES[shape](*map(_number, arguments))


def _table(arguments: Mapping) -> dict[float, float]:
    return {_number(start): _number(value) for start, value in arguments.items()}


def _number(value: Any) -> float:
    """YAML reads 1e-4 as a string; Python reads true as 1."""
    if isinstance(value, bool):
        raise TypeError("a number is needed, not true or false")
    return float(value)


def _starts(values: Mapping[float, float]) -> list[float]:
    starts = sorted(values)
    if not all(0 <= start <= 1 for start in starts):
        raise ValueError(f"fractions of training lie from 0 to 1, found {starts}")
    if not starts or starts[0] != 0:
        raise ValueError(f"fraction 0 needs a value, found {starts}; add `0: <first value>`")
    return starts


def _corners(spec: Spec) -> list[float]:
    """The fractions at which a spec's line may jump or turn."""
    if not isinstance(spec, Mapping):
        return []
    ((shape, arguments),) = spec.items()
    if shape in TABLES:
        return list(_table(arguments))
    corners, start = [], 0.0
    for until, part in arguments if shape == "joined" else ():
        end = float(until)
        corners += [end, *(start + (end - start) * corner for corner in _corners(part))]
        start = end
    return corners


def _terms(curriculum: Sequence[Mapping]) -> dict[str, None]:
    return dict.fromkeys(term for phase in curriculum for term in phase.get("weights", {}))


def _over_phases(term: str, usual: Spec, curriculum: Sequence[Mapping]) -> Spec:
    """One term's weight, phase after phase, as one spec."""
    pieces: list[list] = []
    start = 0.0
    before = 0.0 if term in curriculum[0].get("weights", {}) else from_spec(usual)(0.0)
    for phase in curriculum:
        weight, until = normal(phase.get("weights", {}).get(term, usual)), phase["until"]
        if (ramp := phase.get("ramp")) and weight != before:
            full = start + ramp
            pieces.append([full if full < until - TINY else until, {"linear": [before, weight]}])
        if not pieces or pieces[-1][0] < until:
            pieces.append([until, weight])
        start, before = until, from_spec(weight)(1.0)
    return pieces[0][1] if len(pieces) == 1 else {"joined": pieces}


def _clipped(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0)
