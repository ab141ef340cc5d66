"""One tiny training, here or in a process of its own: for tests that kill it, or run it on two ranks.

python tiny_training.py FOLDER CONFIG   (CONFIG: a run's YAML)
"""

import sys
from functools import partial
from pathlib import Path

import torch
from made_log import read_metrics

from kdlib.config import run as config
from kdlib.losses.buffers import Workspace
from kdlib.runs.files import StudentFolder
from kdlib.students.student import tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.training import run as training
from kdlib.training.plan import objective_of, training_arguments
from kdlib.training.trainer import DistillationTrainer


def pieces(settings, *, dtype=torch.float32, layers=(0, 3)):
    """Everything that `train` needs, freshly made and the same each time."""
    tokenizer = tokenizer_of(settings)
    prepared = tasks.prepare(settings, tokenizer)
    keep = None if settings.student.is_own else layers
    student = tasks.untrained_student(settings, prepared, keep).to(dtype)
    load = partial(tasks.load_teacher, settings, prepared, dtype)
    pair = tasks.student_and_teacher(settings, student, prepared, load)
    return {**pair, "tokenizer": tokenizer, "prepared": prepared}


def trainer_of(
    settings, folder: Path, made, *, layer_pairs=(), collated=None, dense=False, chunk=7
) -> DistillationTrainer:
    """The trainer of `pieces`, without what a whole training does around it."""
    prepared = made["prepared"]
    return DistillationTrainer(
        model=made["student"],
        args=training_arguments(settings, folder / "checkpoints"),
        train_dataset=prepared.train,
        tokenizer=made["tokenizer"],
        data_collator=partial(collated, prepared.collate) if collated else prepared.collate,
        objective=objective_of(settings),
        teacher=made["teacher"],
        vocabulary=prepared.vocabulary,
        layer_pairs=layer_pairs,
        workspace=Workspace(chunk),
        folder=StudentFolder(folder),
        dense=dense,
    )


def train_file(folder: Path, file: Path) -> None:
    settings = config.load(file)
    training.train(settings, StudentFolder(folder), label="tiny", **pieces(settings))


def comparable(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    clock = ("time", "tokens_per_s", "rows_per_s", "memory_gib", "runtime", "per_second")
    return [
        {k: v for k, v in line.items() if not k.endswith(clock)}
        for line in read_metrics(StudentFolder(folder))
    ]


if __name__ == "__main__":
    train_file(Path(sys.argv[1]), Path(sys.argv[2]))
