"""Asking a teacher once: which rows, what of them is kept, and where."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from kdlib.cache.parts import Head, Recipe
from kdlib.cache.rows import Arrays, as_arrays, asked_in, keys_of
from kdlib.cache.shards import Shards, differing
from kdlib.cache.stock import ABOUT, HEAD, keep
from kdlib.cache.teacher import SignalCache
from kdlib.config.run import Config
from kdlib.data.batches import Collate, Prepared
from kdlib.errors import ConfigError, RunError
from kdlib.hardware import GIB, precision_of
from kdlib.losses.alignment import said_of
from kdlib.losses.objective import Objective
from kdlib.losses.signals import Form, LinearSignal, kept, moved
from kdlib.models.loading import device_of, folder_of, load_config
from kdlib.models.teacher import Inside, LiveTeacher
from kdlib.runs.checkpoints import digest
from kdlib.runs.files import synced, write_json, writing
from kdlib.runs.processes import held
from kdlib.sources.files import stamp
from kdlib.sources.progress import Told

SHARD = 256 * 2**20  # bytes of a shard before it is compressed, about
MOST_TEMPERATURES = 8
WEIGHTS = (
    "*.safetensors",
    "*.gguf",
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
)


@dataclass(frozen=True)
class Wanted:
    """What a config wants to be kept of its teacher: `taught` of the training rows, and for evaluation
    `exact` of the validation rows.
    """

    name: str  # of the teacher
    teacher: Mapping[str, Any]  # what its answers depend on, but for the rows
    taught: Recipe
    exact: Recipe
    root: Path  # of all caches

    def folder(self, recipe: Recipe) -> Path:
        """Where a recipe's rows are: of another teacher, form or setting they are elsewhere."""
        text = json.dumps(self.about(recipe), sort_keys=True)
        name = Path(self.name).name.removesuffix(".gguf").lower()
        return self.root / f"{name}_{recipe.form}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def about(self, recipe: Recipe) -> dict[str, Any]:
        """All that the rows of a recipe depend on beside their own content."""
        kept = json.loads(json.dumps(asdict(recipe)))  # as it comes back from the disk
        return {**self.teacher, **kept}

    @property
    def recipes(self) -> dict[str, Recipe]:
        return {"taught": self.taught, "exact": self.exact}


def wanted(
    config: Config, prepared: Prepared, objective: Objective, *, root: Path, steps: int, layers: Sequence[int]
) -> Wanted:
    """What a config's `teacher.cache` wants.

    Args:
        objective: of the training; steps: optimizer steps of it, at each of which it is looked at.
        layers: the teacher's, whose outputs are compared.

    Raises:
        ConfigError: the objective needs what no cache holds, or its temperature takes too many values.
    """
    cache, teacher = config.teacher.cache, config.teacher
    device = device_of(config.wanted_device)
    form = cache.form_for(config.loss)
    asked = [objective.at(step / max(steps, 1)) for step in range(steps)]
    vocabulary = prepared.teacher_vocabulary
    size = load_config(teacher.model).get_text_config().hidden_size
    taught = exact = Recipe("hidden", vocabulary, size, layers=tuple(layers))
    if form in ("top_k", "samples"):
        found = sorted({at.temperatures[name] for at in asked for name in at.temperatures})
        temperatures = tuple(sorted(cache.temperatures or found))
        if len(temperatures) > MOST_TEMPERATURES:
            raise ConfigError(
                f"teacher.cache: the temperature takes {len(temperatures)} values in {steps} steps, and "
                f"{form} are kept at {MOST_TEMPERATURES} at most; take a schedule in steps, or cache: hidden"
            )
        if absent := [t for t in found if t not in temperatures]:
            raise ConfigError(
                f"teacher.cache.temperatures: the schedule takes {absent[0]:g} too; list it, or leave it out"
            )
        count = config.loss.samples or max(at.top_k or 1 for at in asked)
        taught = Recipe(form, vocabulary, size, count, temperatures, tuple(layers))
    about = {
        "files": weights_of(teacher.model),
        "dtype": str(precision_of(config.precision, device)[0]).removeprefix("torch."),
        "quantization": teacher.quantization,
    }
    taught = replace(taught, experts=teacher.experts)
    place = Path(cache.folder).expanduser() if cache.folder else root
    return Wanted(teacher.model, about, taught, exact, place)


def weights_of(model: str) -> str:
    """What tells a model's weights from others: a hub's revision; of a folder a digest of its files."""
    folder = Path(folder_of(model))
    if not folder.is_dir():  # snapshots/REVISION/config.json
        return Path(str(cached_file(model, "config.json"))).parent.name
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    whole = "".join(f"{file.name} {_digest(file, stamp(str(file)))}\n" for file in files)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


@lru_cache
def _digest(file: Path, stamped: str) -> str:
    """Of a file as it stands: each of a teacher's many GB is read once by a process."""
    return digest(file)


def opened(wanted: Wanted, recipe: Recipe) -> SignalCache:
    """A recipe's rows as they are on the disk.

    Raises:
        RunError: there are none, or another teacher's, or they are damaged.
    """
    shards = Shards(wanted.folder(recipe))
    keep(shards)
    if not (found := shards.about):
        raise RunError(f"{shards.folder}: no cache of the teacher's signals; run `kd cache` first")
    asked = wanted.about(recipe)
    if wrong := differing({name: found.get(name) for name in asked}, asked):
        raise RunError(
            f"{shards.folder}: made otherwise: {'; '.join(wrong)}; delete it, or take another folder"
        )
    return SignalCache(shards, recipe, _head_in(shards.folder))


def fill(
    wanted: Wanted,
    recipe: Recipe,
    rows: Dataset,
    collate: Collate,
    load: Callable[[], LiveTeacher],
    *,
    batch: int,
    most: float | None = None,
    reads: str = "",
) -> int:
    """Ask the teacher about those of the rows that are missing; returns how many they were.

    Several processes may share it (torchrun): each asks about its part.

    Args:
        load: gives the teacher, and is called where anything is missing.
        batch: rows that it is asked about at a time.
        most: GiB that a cache may have.
        reads: see kdlib.models.teacher.signal_of.

    Raises:
        RunError: the disk refuses, or `most` would be passed; what is there stays.
    """
    folder = wanted.folder(recipe)
    rank, world = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))
    with held(folder.with_name(f"{folder.name}.{rank}"), wait=partial(_say_waiting, folder)):
        shards = Shards(folder)
        keep(shards)
        every = planned(rows, collate, recipe, batch=batch, reads=reads)
        groups = missing(shards, islice(every, rank, None, world))
        if not groups:
            return 0
        maker = _Maker(load(), recipe, rows, collate, batch)
        if not shards.about:
            maker.begin(folder, {**wanted.about(recipe), "model": wanted.name}, groups[0][0][0])
        told, asked = Told("asking the teacher", sum(map(len, groups)), "rows"), 0
        for group in groups:
            shards.add(maker.answers(group, lambda rows, before=asked: told(before + rows)))
            asked += len(group)
            if most and shards.bytes > most * GIB:
                found = f"{shards.bytes / GIB:.1f} GiB so far, more than max_gib: {most:g}"
                raise RunError(f"{folder}: {found}; raise it in teacher.cache, or take another form")
    return asked


Group = Sequence[tuple[int, bytes]]
"""The rows of a shard: their numbers in the data set, and their keys."""


def planned(rows: Dataset, collate: Collate, recipe: Recipe, *, batch: int, reads: str) -> Iterator[Group]:
    """The shards of these rows, the same whatever is there already; each row is in one."""
    seen, group, size = set[bytes](), list[tuple[int, bytes]](), 0
    for first in range(0, len(rows), batch):
        numbers = range(first, min(first + batch, len(rows)))
        made = collate([rows[number] for number in numbers])
        for number, key, count in keys_of(made, asked_in(made), reads):
            if key not in seen:
                seen.add(key)
                group.append((first + number, key))
                size += count * recipe.bytes_per_token
        if size >= SHARD or (group and numbers.stop == len(rows)):
            yield group
            group, size = [], 0


def missing(shards: Shards, groups: Iterable[Group]) -> list[Group]:
    """Of each shard what is not there."""
    left = [[(number, key) for number, key in group if not shards.has(key)] for group in groups]
    return [group for group in left if group]


class _Maker:
    """Asks a teacher about rows."""

    def __init__(
        self, teacher: LiveTeacher, recipe: Recipe, rows: Dataset, collate: Collate, batch: int
    ) -> None:
        self.teacher, self.recipe, self.rows, self.collate, self.batch = teacher, recipe, rows, collate, batch
        self.inside = Inside(recipe.layers, hidden=True) if recipe.layers else None

    def begin(self, folder: Path, about: Mapping[str, Any], number: int) -> None:
        """Write down what all rows have in common, as this one of them has it."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        ((_, arrays),) = self._ask([number])
        stored = {name: (each.dtype.str, list(each.shape[1:])) for name, each in arrays.items()}
        if "hidden" in arrays:
            _save_head(folder, self._signal([number])[1])
        write_json(folder / ABOUT, {**about, "arrays": stored})

    def answers(self, group: Group, told: Callable[[int], object]) -> list[tuple[bytes, Arrays]]:
        """What is kept of each row of a shard; `told` hears how many rows are done."""
        numbers, made = [number for number, _ in group], dict[bytes, Arrays]()
        for first in range(0, len(numbers), self.batch):
            made |= self._ask(numbers[first : first + self.batch])
            told(len(made))
        return [(key, made[key]) for _, key in group]

    def _ask(self, numbers: Sequence[int]) -> Iterator[tuple[bytes, Arrays]]:
        found, signal, counts = *self._signal(numbers), 0
        for _, key, count in found:
            rows = torch.arange(counts, counts + count, device=signal.device)
            inside = signal.features and signal.features.select(rows, [count])
            own = replace(signal.select(rows), features=inside)
            seed = int.from_bytes(key[:7])
            yield key, as_arrays(self.recipe.taken(own, seed), self.recipe.vocabulary)
            counts += count

    @torch.no_grad()
    def _signal(self, numbers: Sequence[int]) -> Any:
        batch = self.collate([self.rows[number] for number in numbers])
        tokens = asked_in(batch)
        found = keys_of(batch, tokens, self.teacher.reads)
        batch = moved(batch, self.teacher.model.device)
        teaches = self.recipe.experts != "topk"
        return found, said_of(self.teacher(batch, kept(batch["labels"]), self.inside, teaches=teaches))


def _say_waiting(folder: Path, who: str) -> None:
    print(f"{folder.name} is being made by {who}; waiting for it …", flush=True)


def _save_head(folder: Path, signal: LinearSignal) -> None:
    """The teacher's head, with how its products become logits."""
    parts = {"weight": signal.weight, "bias": signal.bias}
    tensors = {name: each.detach().cpu().contiguous() for name, each in parts.items() if each is not None}
    form = {name: str(each) for name, each in asdict(signal.form).items() if each is not None}
    with writing(folder / HEAD):
        save_file(tensors, folder / f"{HEAD}.tmp", metadata=form)
        synced(folder / f"{HEAD}.tmp")
        (folder / f"{HEAD}.tmp").replace(folder / HEAD)


def _head_in(folder: Path) -> Head | None:
    if not (folder / HEAD).exists():
        return None
    with safe_open(folder / HEAD, "pt") as file:
        form = Form(**{name: float(each) for name, each in (file.metadata() or {}).items()})
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Head(parts["weight"], parts.get("bias"), form)
