"""A config's teacher in its training: the model itself, or what it said, on a disk."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from kdlib.cache.making import Wanted, fill, opened, wanted
from kdlib.cache.rows import asked_in
from kdlib.cache.stock import FOLDER
from kdlib.cache.teacher import CachedTeacher
from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError
from kdlib.hardware import world_size
from kdlib.losses.features import layer_pairs
from kdlib.models.loading import device_of, load_config
from kdlib.models.teacher import LiveTeacher
from kdlib.students.student import outline
from kdlib.tasks.base import task_of
from kdlib.training.plan import extent, objective_of, training_arguments

COUNTED = 256  # rows whose tokens tell how many all have


def plan(config: Config, prepared: Prepared, root: Path) -> Wanted:
    """What a config's cache holds, and where; `root`: of its runs.

    Raises:
        ConfigError: the training asks for what no cache holds.
    """
    objective = objective_of(config)
    args = training_arguments(config, root / FOLDER)
    steps, layers = extent(args, len(prepared.train)).steps or 1, []
    if objective.in_full.needs_hidden:
        pairs = layer_pairs(config.loss.features.fixed, *outline(config, task_of(config)).layers)
        layers = sorted({theirs for _, theirs in pairs})
    if prepared.vocabularies and config.teacher.cache.form_for(config.loss) != "hidden":
        raise ConfigError("teacher.cache: a teacher with a tokenizer of its own needs `cache: hidden`")
    return wanted(config, prepared, objective, root=root / FOLDER, steps=steps, layers=layers)


def in_training(
    config: Config, prepared: Prepared, root: Path, load: Callable[[], LiveTeacher | None]
) -> LiveTeacher | CachedTeacher | None:
    """The teacher as it trains a student: `load`ed; or, where it is asked once, what it said.

    Raises:
        ConfigError, RunError: see `plan` and kdlib.cache.making.fill.
    """
    if not (config.teacher and config.teacher.cache):
        return load()
    found = plan(config, prepared, root)
    make(config, prepared, found, load)
    return CachedTeacher(
        *(opened(found, recipe) for recipe in found.recipes.values()),
        vocabulary=prepared.teacher_vocabulary,
        config=load_config(config.teacher.model),
        reads=_reads(prepared),
        vocabularies=prepared.vocabularies,
    )


def make(config: Config, prepared: Prepared, found: Wanted, load: Callable[[], Any]) -> None:
    """Ask the teacher about the rows of a config that are missing in its caches."""
    device, rows = device_of(config.wanted_device), {"taught": prepared.train, "exact": prepared.validation}

    def there() -> LiveTeacher:
        teacher = load()
        teacher.to(device)
        return teacher

    # as a training asks, so that rounding in bfloat16 is the same too
    args = training_arguments(config, found.root)
    batch, dtype = args.per_device_train_batch_size, torch.bfloat16 if args.bf16 else torch.float16
    how = {"batch": batch, "most": config.teacher.cache.max_gib, "reads": _reads(prepared)}
    for name, recipe in found.recipes.items():
        with torch.autocast(device.type, dtype, enabled=args.bf16 or args.fp16):
            fill(found, recipe, rows[name], prepared.collate, there, **how)
    if (world_size() or 1) > 1:
        PartialState().wait_for_everyone()


def expected(config: Config, prepared: Prepared, root: Path) -> dict[Path, int]:
    """{cache: bytes that all its rows will take, about}: uncompressed, without the teacher's head.

    By the tokens that some of the rows have.  Nothing, where the teacher is not asked once.
    """
    if not (config.teacher and config.teacher.cache):
        return {}
    found, sizes = plan(config, prepared, root), Counter[Path]()
    for name, recipe in found.recipes.items():
        rows = prepared.train if name == "taught" else prepared.validation
        some = range(0, len(rows), max(len(rows) // COUNTED, 1))
        tokens = sum(len(asked_in(prepared.collate([rows[number]])).rows) for number in some)
        sizes[found.folder(recipe)] += round(recipe.bytes_per_token * tokens * len(rows) / max(len(some), 1))
    return dict(sizes)


def _reads(prepared: Prepared) -> str:
    return "teacher_" if "teacher_input_ids" in prepared.train.column_names else ""
