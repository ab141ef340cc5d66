"""A forecast as one reads it: the parts at each moment, what would make it fit, which card would do, and
what a few real steps take.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from kdlib.config.run import Config
from kdlib.diagnostics.charges import GIB
from kdlib.diagnostics.measurement import measured, measured_peak
from kdlib.diagnostics.memory import forecast
from kdlib.diagnostics.remedies import Remedy, cards, remedies

ORDER = (
    "framework",
    "teacher's weights",
    "teacher's activations",
    "student's parameters",
    "cast weights",
    "gathered weights",
    "gradients",
    "gradient buckets",
    "optimizer state",
    "activations",
    "logits",
    "head's gradient",
    "temporaries",
)

# GiB of the card for which `loss.chunk: auto` is resolved in the table of cards: larger ones take no larger
# chunks
SMALLEST = 8
BUSY = 0.2  # cores kept busy by others, above which times are doubtful


def outlook(
    config: Config,
    *,
    memory: float | None = None,
    devices: int | None = None,
    rows: int | None = None,
    classes: int | None = None,
    measure: bool = False,
    every_card: bool = False,
) -> dict[str, Any]:
    """Everything that `kd forecast` says, as plain data.

    Args:
        memory: GiB of the device, in place of what is here.
        classes: of the data, where rows are classified.
        measure: also train a few steps in processes of their own, for the time and to check the memory.
        every_card: also for each usual size of a card, whether the config fits or with which change.

    Returns:
        `Forecast.as_dict()` with "remedies" and, where asked for, "time", "measured", "cards",
        "card_precision" and "card_peak".
    """
    found = forecast(config, memory=memory, devices=devices, rows=rows, classes=classes)
    again = partial(forecast, memory=memory, devices=devices, rows=rows, classes=classes)
    data = found.as_dict() | {
        "remedies": [_plain(remedy) for remedy in remedies(config, found, found.free, again)]
    }
    if every_card:
        on_cuda = partial(
            forecast, memory=SMALLEST, device="cuda", devices=devices, rows=rows, classes=classes
        )
        there = on_cuda(config)
        lines = [{**line, "remedy": _plain(line["remedy"])} for line in cards(config, there, on_cuda)]
        data |= {"cards": lines, "card_precision": there.precision, "card_peak": there.peak}
    if not measure:
        return data
    took = measured(config)
    return data | {
        "time": asdict(took) | {"seconds": took.seconds},
        "measured": {"peak_bytes": measured_peak(config)},
    }


def described(data: Mapping[str, Any]) -> str:
    """The same for people."""
    sections = (
        _heading(data) + _parts(data),
        _fit(data),
        _time(data),
        _measured(data),
        _cards(data),
        _notes(data),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _heading(data: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M parameters" for name, count in data["parameters"].items())
    chunk = (
        f"logits of {data['chunk']} tokens at a time"
        if data["chunk"]
        else "all logits at once (no plain head)"
    )
    many = f"on each of {data['devices']} devices" if data["devices"] > 1 else "on one device"
    return [
        f"{sizes}; {data['precision']} on {data['device']}; {chunk}",
        f"memory, GiB, {many}, at the highest point of each moment of a step:",
        "",
    ]


def _parts(data: Mapping[str, Any]) -> list[str]:
    moments = data["moments"]
    names = [name for name in ORDER if any(name in parts for parts in moments.values())]
    width = max(map(len, moments)) + 2
    rows = [f"{'':24}" + "".join(f"{moment:>{width}}" for moment in moments)]
    for name in names:
        rows.append(
            f"{name:24}" + "".join(f"{_gib(parts.get(name, 0)):>{width}}" for parts in moments.values())
        )
    return [
        *rows,
        f"{'total':24}" + "".join(f"{_gib(sum(parts.values())):>{width}}" for parts in moments.values()),
    ]


def _fit(data: Mapping[str, Any]) -> list[str]:
    here = (
        f"{_gib(data['free'])} GiB free of {_gib(data['total'])}"
        if data["free"] != data["total"]
        else f"{_gib(data['total'])} GiB"
    )
    lines = [f"peak {_gib(data['peak'])} GiB, {data['moment']}; {here}: {data['verdict']}"]
    if data["verdict"] == "tight":
        lines.append("  the forecast may be wrong by 15 %, and so much is not free")
    fitting = [remedy for remedy in data["remedies"] if remedy["peak"] <= data["free"]]
    lines += [
        f"  {_gib(remedy['peak'])} GiB with {remedy['overrides']}   ({remedy['what']})" for remedy in fitting
    ]
    if data["verdict"] == "does not fit" and not fitting:
        least = (
            f": with all of them it still takes {_gib(data['remedies'][0]['peak'])} GiB"
            if data["remedies"]
            else ""
        )
        lines.append(
            f"  no change of batch, length, logits or precision makes it fit{least}; take smaller models, or "
            "more memory"
        )
    return lines


def _time(data: Mapping[str, Any]) -> list[str]:
    if not (time := data.get("time")):
        return ["time: measure it with --measure, or with the dry run"]
    lines = [f"time: {_seconds(time['step_s'])} per optimizer step, measured on a few real ones"]
    if time["cores_of_others"] > BUSY:
        lines.append(
            f"  other processes kept {time['cores_of_others']:.1f} cores busy meanwhile: the times are those "
            "of a busy machine"
        )
    evaluations = f", with {time['evaluations']} evaluations of {_seconds(time['evaluation_s'])}"
    run = f"{_seconds(time['seconds'])} for {time['steps']} steps{evaluations * bool(time['evaluations'])}"
    return [*lines, f"  the whole run: {run}; without checkpoints, baseline and comparison"]


def _measured(data: Mapping[str, Any]) -> list[str]:
    if not (found := data.get("measured")):
        return []
    ahead = data["peak_in_training"]
    return [
        "against a few measured steps, in a process of their own:",
        f"  memory above the process's own: forecast {_gib(ahead)} GiB, measured "
        f"{_gib(found['peak_bytes'])}, ratio {ahead / found['peak_bytes']:.2f}",
    ]


def _cards(data: Mapping[str, Any]) -> list[str]:
    if "cards" not in data:
        return []
    lines = [f"which card would do (CUDA, {data['card_precision']}, {_gib(data['card_peak'])} GiB as it is):"]
    for line in data["cards"]:
        remedy = line["remedy"]
        with_it = f"; {_gib(remedy['peak'])} GiB with {remedy['overrides']}" if remedy else ""
        if remedy and remedy["peak"] > line["gib"] * GIB:
            with_it = f"; {_gib(remedy['peak'])} GiB at least"
        lines.append(f"  {line['gib']:4} GiB  {line['verdict']}{with_it}")
    return lines


def _notes(data: Mapping[str, Any]) -> list[str]:
    return [f"note: {note}" for note in data["notes"]]


def _plain(remedy: Remedy | None) -> dict[str, Any] | None:
    return None if remedy is None else {**asdict(remedy), "overrides": remedy.overrides}


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(seconds: float) -> str:
    """0.42 s, 12 s, 3.5 min, 12.1 h"""
    if seconds < 90:
        return f"{seconds:.{max(1 - math.floor(math.log10(max(seconds, 0.01))), 0)}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
