"""A forecast of memory as one reads it: does it fit, and what would make it?  Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from kdlib.config import run as configs
from kdlib.config.run import Config
from kdlib.runs.log import duration

GIB = 2**30
MARGIN = 0.15  # of the forecast: what it may be wrong by
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB that cards are sold with
SHORTEST = 64  # tokens of a row, below which nothing is proposed
BUSY = 0.2  # cores kept busy by others, above which times are doubtful


@dataclass(frozen=True)
class Forecast:
    """Bytes on one device at each moment of an optimizer step, and of an evaluation."""

    device: str
    precision: str
    moments: Mapping[str, Mapping[str, int]]  # moment -> part -> bytes
    total: int  # bytes of the device
    free: int  # of these, now
    devices: int
    chunk: int | None  # tokens whose logits exist at a time; None: all
    compiled: bool  # the row arithmetic between the products with the heads
    parameters: Mapping[str, int]  # of student and teacher
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, int] = field(default_factory=dict)  # each of LAYOUTS, where ranks share it -> peak

    @property
    def moment(self) -> str:
        """At which most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes held then."""
        return sum(self.moments[self.moment].values())

    @property
    def peak_in_training(self) -> int:
        """Bytes at the highest point of an optimizer step above what the process takes: as measured."""
        steps = (parts for name, parts in self.moments.items() if name != "evaluation")
        return max(sum(parts.values()) - parts["framework"] for parts in steps)

    @property
    def verdict(self) -> str:
        return verdict(self.peak, self.free)

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("moment", "peak", "peak_in_training", "verdict")}
        return {**asdict(self), **derived}


LAYOUTS = {  # how ranks hold the two models between them
    "DDP": "a whole student and teacher on each (training.fsdp=null)",
    "FSDP": "student and teacher sharded (training.fsdp=true)",
    "FSDP, offloaded": "likewise, the teacher's shard in CPU memory (and teacher.offload=true)",
}
Moments = dict[str, dict[str, int]]  # moment -> part -> bytes


def copied(moments: Moments) -> Moments:
    """On each of several ranks by DDP: all that one holds, and a second copy of the gradients."""
    return {
        name: {**parts, "gradient buckets": moments["optimizer step"]["gradients"]}
        for name, parts in moments.items()
    }


def offloaded(moments: Moments) -> Moments:
    """By FSDP with the teacher's shard in the CPU's memory."""
    return {name: {**parts, "teacher's weights": 0} for name, parts in moments.items()}


def at_layers(
    full: tuple[int, int], name: str, low: float, high: float, small: tuple[int, int], large: tuple[int, int]
) -> float:
    """A quantity at all layers, on the line through two numbers of them; of the teacher's if it is named."""
    side = 1 if "teacher" in name else 0
    if large[side] == small[side]:
        return high
    return max(low + (high - low) * (full[side] - small[side]) / (large[side] - small[side]), 0.0)


Forecaster = Callable[[Config], Forecast]


def verdict(peak: float, memory: float) -> str:
    """`fits`, `tight` (within what the forecast may be wrong by) or `does not fit`."""
    return "fits" if peak * (1 + MARGIN) <= memory else "tight" if peak <= memory else "does not fit"


@dataclass(frozen=True)
class Remedy:
    """A change of the config that needs less memory."""

    what: str
    changes: Mapping[str, Any]  # overrides, by dotted names
    peak: int  # bytes that are forecast with it
    overrides: str  # the changes as they are written on the command line


def single_changes(config: Config, forecast: Forecast) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be changed by itself, the cheapest in time and meaning first; the effective batch stays."""
    training = config.training
    batch = training.get("per_device_train_batch_size", 8)
    accumulation = training.get("gradient_accumulation_steps", 1)
    if forecast.moment == "evaluation" and training.get("per_device_eval_batch_size", 8) > 1:
        yield "evaluate one row at a time", {"training.per_device_eval_batch_size": 1}
    if not (training.get("activation_checkpointing") or training.get("gradient_checkpointing")):
        what = "activation checkpointing: a third more time for the student"
        yield what, {"training.activation_checkpointing": True}
    for rows in sorted({batch // 2, batch // 4, 1}, reverse=True):
        if 0 < rows < batch and batch % rows == 0:
            times = batch // rows
            what = f"{rows} rows at a time, {times} times as many per step: the same effective batch"
            more = {"training.gradient_accumulation_steps": accumulation * times}
            yield what, {"training.per_device_train_batch_size": rows, **more}
    if forecast.chunk and forecast.chunk > 64:
        yield "logits of fewer tokens at a time", {"loss.chunk": 64}
    if forecast.precision == "float32":
        what = "bfloat16 for the teacher and for the products: slower on a CPU without it"
        yield what, {"precision": "bfloat16"}
    if (length := config.data.max_length // 2) >= SHORTEST:
        yield "half as long rows: the student sees less context", {"data.max_length": length}


def remedies(
    config: Config, found: Forecast, memory: int, forecaster: Forecaster, *, count: int = 3
) -> list[Remedy]:
    """The cheapest changes with which the training fits into `memory` bytes: single ones, else several.

    Returns:
        Up to `count`; the last resort alone, if even that does not fit, so that one sees what is missing.
        Empty where the config fits as it is.
    """
    if verdict(found.peak, memory) != "does not fit":
        return []

    def remedy(changes: Sequence[tuple[str, Mapping[str, Any]]]) -> Remedy:
        """These together; of two that set the same, the later one counts."""
        what = changes[0][0] if len(changes) == 1 else "; ".join(what.split(":")[0] for what, _ in changes)
        merged = {name: value for _, each in changes for name, value in each.items()}
        written = " ".join(f"-o {name}={str(value).lower()}" for name, value in merged.items())
        return Remedy(what, merged, forecaster(configs.parse(config.as_dict(), merged)).peak, written)

    singles = list(single_changes(config, found))
    if not singles or (least := remedy(singles)).peak > memory:
        return [least] if singles else []

    def fitting(combinations: Iterable[Sequence], most: int) -> list[Remedy]:
        tried = map(remedy, combinations)
        return list(islice((each for each in tried if each.peak <= memory), most))

    together = (singles[:number] for number in range(2, len(singles)))
    return fitting(([each] for each in singles), count) or fitting(together, 1) or [least]


def cards(config: Config, found: Forecast, forecaster: Forecaster) -> list[dict[str, Any]]:
    """[{"gib", "verdict", "remedy": a Remedy or None}, …]: does it fit the card, else with what change?"""
    known: dict[str, Forecast] = {}

    def remembered(changed: Config) -> Forecast:
        key = changed.as_yaml()
        known[key] = known.get(key) or forecaster(changed)
        return known[key]

    lines = []
    for gib in CARDS:
        cheapest = next(iter(remedies(config, found, gib * GIB, remembered, count=1)), None)
        lines.append({"gib": gib, "verdict": verdict(found.peak, gib * GIB), "remedy": cheapest})
    return lines


def advised(
    config: Config, forecaster: Callable[..., Forecast], *, every_card: bool = False, **options: Any
) -> dict[str, Any]:
    """`Forecast.as_dict()` with "remedies" and, for `every_card`, "cards", "card_precision" and "card_peak".

    The forecaster is kdlib.diagnostics.memory.forecast, with `options` memory, devices, rows, vocabulary.
    """
    found = forecaster(config, **options)
    changes = remedies(config, found, found.free, partial(forecaster, **options))
    data = found.as_dict() | {"remedies": [asdict(remedy) for remedy in changes]}
    if every_card:
        # of the smallest: on larger ones `loss.chunk: auto` takes no larger chunks
        on_cuda = partial(forecaster, **options | {"memory": min(CARDS), "device": "cuda"})
        there = on_cuda(config)
        lines = cards(config, there, on_cuda)
        for line in lines:
            line["remedy"] = line["remedy"] and asdict(line["remedy"])
        data |= {"cards": lines, "card_precision": there.precision, "card_peak": there.peak}
    return data


def as_text(data: Mapping[str, Any]) -> str:
    """What `advised` gave, for people; also "time" and "measured", where a few real steps were made."""
    notes = [f"note: {note}" for note in data["notes"]]
    sections = (_parts(data), _fit(data), _layouts(data), _time(data), _caches(data), _cards(data), notes)
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _parts(data: Mapping[str, Any]) -> list[str]:
    """A table: a line for each part, a column for each moment."""
    moments, many = data["moments"], data["devices"] > 1
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M parameters" for name, count in data["parameters"].items())
    at_once = f"logits of {data['chunk']} tokens at a time"
    chunk = at_once if data["chunk"] else "all logits at once (no plain head)"
    where = f"on each of {data['devices']} ranks" if many else "on one device"
    width = max(map(len, moments)) + 2
    names = dict.fromkeys(name for parts in moments.values() for name in parts)
    rows = {name: [parts.get(name, 0) for parts in moments.values()] for name in names}
    rows = {name: row for name, row in rows.items() if any(row)}
    rows["total"] = [sum(parts.values()) for parts in moments.values()]
    return [
        f"{sizes}; {data['precision']} on {data['device']}; {chunk}",
        f"memory, GiB, {where}, at the highest point of each moment of a step:",
        "",
        f"{'':24}" + "".join(f"{moment:>{width}}" for moment in moments),
        *(f"{name:24}" + "".join(f"{_gib(size):>{width}}" for size in row) for name, row in rows.items()),
    ]


def _fit(data: Mapping[str, Any]) -> list[str]:
    free, total, changes = _gib(data["free"]), _gib(data["total"]), data["remedies"]
    here = f"{total} GiB" if data["free"] == data["total"] else f"{free} GiB free of {total}"
    lines = [f"peak {_gib(data['peak'])} GiB, {data['moment']}; {here}: {data['verdict']}"]
    if data["verdict"] == "tight":
        lines.append(f"  the forecast may be wrong by {100 * MARGIN:.0f} %, and so much is not free")
    fitting = [remedy for remedy in changes if remedy["peak"] <= data["free"]]
    lines += [f"  {_gib(each['peak'])} GiB with {each['overrides']}   ({each['what']})" for each in fitting]
    if data["verdict"] == "does not fit" and not fitting:
        least = f": with all of them it still takes {_gib(changes[0]['peak'])} GiB" if changes else ""
        lines.append(f"  no change makes it fit{least}; take smaller models, or more memory")
    return lines


def _layouts(data: Mapping[str, Any]) -> list[str]:
    """What each rank would hold, by how they share the models."""
    lines = [f"  {_gib(peak):>7} GiB  {name}: {LAYOUTS[name]}" for name, peak in data["layouts"].items()]
    return [f"peak on each rank, by how {data['devices']} share the models:", *lines] if lines else []


def _time(data: Mapping[str, Any]) -> list[str]:
    if not (time := data.get("time")):
        return ["time: measure it with --measure, or with the dry run"]
    spread = f"from {time['fastest_s']:.2g} to {time['slowest_s']:.2g}"
    lines = [f"time: {time['step_s']:.2g} s per optimizer step, the median of a few real ones, {spread}"]
    if (others := time["cores_of_others"]) > BUSY:
        lines.append(f"  other processes kept {others:.1f} cores busy meanwhile, so it may be less")
    evaluations = f", with {time['evaluations']} evaluations of {duration(time['evaluation_s'])}"
    run = f"{duration(time['seconds'])} for {time['steps']} steps{evaluations * bool(time['evaluations'])}"
    lines.append(f"  the whole run: {run}; without checkpoints, baseline and comparison")
    ahead, found = data["peak_in_training"], data["measured"]["peak_bytes"]
    sizes = f"forecast {_gib(ahead)} GiB, measured {_gib(found)}, ratio {ahead / found:.2f}"
    return [*lines, "", f"memory above the process's own, on a few real steps: {sizes}"]


def _caches(data: Mapping[str, Any]) -> list[str]:
    sizes = data.get("caches", {}).items()
    what = "on the disk before it is compressed, without the teacher's head"
    return [f"what the teacher says: {_gib(size)} GiB {what}, in {folder}" for folder, size in sizes]


def _cards(data: Mapping[str, Any]) -> list[str]:
    if "cards" not in data:
        return []
    lines = [f"which card would do (CUDA, {data['card_precision']}, {_gib(data['card_peak'])} GiB as it is):"]
    for line in data["cards"]:
        with_it = ""
        if remedy := line["remedy"]:
            how = f"with {remedy['overrides']}" if remedy["peak"] <= line["gib"] * GIB else "at least"
            with_it = f"; {_gib(remedy['peak'])} GiB {how}"
        lines.append(f"  {line['gib']:4} GiB  {line['verdict']}{with_it}")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
