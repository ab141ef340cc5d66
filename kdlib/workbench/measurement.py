"""What a training really takes: a few steps and one evaluation, with its own models and rows.

The dry run looks at its own steps; `kd forecast --measure` and `kd sweep` have some made in a fresh process.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset

from kdlib.config import run as configs
from kdlib.config.run import Config
from kdlib.diagnostics import memory as memories
from kdlib.diagnostics.forecast import MARGIN
from kdlib.evaluation import caching
from kdlib.hardware import peak_memory, precision_of
from kdlib.models.loading import device_of
from kdlib.runs.child_processes import in_fresh_process
from kdlib.runs.files import StudentFolder
from kdlib.students.student import kept_layers, tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.training import run as training
from kdlib.training.plan import extent, training_arguments
from kdlib.training.trainer import DistillationTrainer

STEPS, MEMORY_STEPS = 5, 2  # of the five the first is not timed
BYTES = 4  # of a weight on disk


@dataclass(frozen=True)
class Measured:
    """What one optimizer step and one evaluation took, and how many of them the whole training has."""

    step_s: float  # the median
    evaluation_s: float
    steps: int
    evaluations: int
    fastest_s: float = 0.0  # of the steps that were timed
    slowest_s: float = 0.0
    cores_of_others: float = 0.0  # kept busy by other processes meanwhile, on which the times depend

    @property
    def seconds(self) -> float:
        """Of the whole training, without set-up, checkpoints, baseline and comparison."""
        return self.steps * self.step_s + self.evaluations * self.evaluation_s

    def __str__(self) -> str:
        each = f"{self.step_s:.1f} s ({self.fastest_s:.1f} to {self.slowest_s:.1f})"
        minutes = f"{self.seconds / 60:.1f} minutes"
        return f"{self.steps} steps of {each} and {self.evaluations} evaluations, so {minutes}"

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "seconds": self.seconds}


def by_steps(
    config: Config, trainer: DistillationTrainer, evaluation_s: float, others: float = 0.0
) -> Measured:
    """From a trainer of this config that was stopped after a few steps, and an evaluation of it."""
    args, seconds = training_arguments(config, Path("unused")), trainer.throughput.durations
    seconds = seconds[1:] or seconds
    return Measured(
        step_s=statistics.median(seconds),
        evaluation_s=evaluation_s,
        steps=trainer.state.max_steps,
        evaluations=extent(args, len(trainer.train_dataset)).evaluations,
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        cores_of_others=others,
    )


def measured(config: Config) -> Measured:
    """By a few real steps in a process of their own.

    Raises:
        RunError: the process failed, as for want of memory; its last words are in the message.
    """
    asked = {"config": config.as_dict(), "memory": False}
    what = f"timing {STEPS} steps of this config"
    return Measured(**in_fresh_process(__name__, asked, what=what, memory=False))


def measured_peak(config: Config, *, dense: bool = False) -> int:
    """Bytes that a training takes above what its process held before, on rows as long as the config allows.

    `dense`: all logits at once, whatever the models' heads.
    """
    asked = {"config": config.as_dict(), "memory": True, "dense": dense}
    return in_fresh_process(__name__, asked, what=f"training {MEMORY_STEPS} steps of this config")["bytes"]


def measured_here(config: Config, *, memory: bool, dense: bool = False) -> dict[str, Any]:
    """What the fresh process does: teacher, student and trainer as in a run."""
    tokenizer = tokenizer_of(config)
    prepared = tasks.prepare(config, tokenizer)
    if memory:
        prepared = replace(prepared, train=filled(prepared.train, config.data.max_length))
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    began, busy = time.perf_counter(), _seconds_of_others()
    with tempfile.TemporaryDirectory() as folder, peak_memory(device) as peak:
        student = tasks.untrained_student(config, prepared, kept_layers(config))
        load = partial(tasks.load_teacher, config, prepared, dtype)
        trainer = training.train(
            config,
            StudentFolder(Path(folder)),
            **tasks.student_and_teacher(config, student, prepared, load),
            tokenizer=tokenizer,
            prepared=prepared,
            stop_after=MEMORY_STEPS if memory else STEPS,
            dense=dense,
        )
        seconds = 0.0 if memory else trainer.evaluate()["eval_runtime"]
    if memory:
        return {"bytes": peak.bytes}
    others = max(_seconds_of_others() - busy, 0.0) / (time.perf_counter() - began)
    return asdict(by_steps(config, trainer, seconds, others))


def caches(config: Config, root: Path) -> dict[str, dict[str, int]]:
    """{"caches": {folder: bytes, about}} of a teacher that is asked once; {} of any other."""
    if not (config.teacher and config.teacher.cache):
        return {}
    sizes = caching.expected(config, tasks.prepare(config, tokenizer_of(config)), root)
    return {"caches": {os.path.relpath(folder): size for folder, size in sizes.items()}}


def cost(config: Config) -> dict[str, float]:
    """A run's kdlib.sweeps.pool.Cost: memory by tensors without data, time by a few real steps."""
    found = memories.forecast(config)
    return {
        "seconds": measured(config).seconds,
        "peak": found.peak,
        "at_most": found.peak * (1 + MARGIN),
        "free": found.free,
        "weights": BYTES * found.parameters["student"],
    }


def filled(rows: Dataset, length: int) -> Dataset:
    """The rows, each repeated to `length` tokens, all of which are learned: what a forecast reckons with."""

    def fill(batch: Mapping[str, list]) -> dict[str, list]:
        columns = {name: ids for name, ids in batch.items() if "input_ids" in name}
        found = {name: [(row * length)[:length] for row in ids] for name, ids in columns.items()}
        return found | ({"label": batch["label"]} if "label" in batch else {})

    return rows.with_transform(fill)


def _seconds_of_others() -> float:
    """CPU seconds that this machine has spent on other processes than this one."""
    spent = psutil.cpu_times()
    return spent.user + spent.system - time.process_time()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with redirect_stdout(sys.stderr):
        found = measured_here(configs.parse(asked.pop("config")), **asked)
    print(json.dumps(found))
