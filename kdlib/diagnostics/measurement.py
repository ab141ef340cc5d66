"""What a config's training really takes: a few steps in a process of its own, to hold a forecast against."""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kdlib.benchmarks import machine
from kdlib.benchmarks.steps import StepClock
from kdlib.config import run as configs
from kdlib.config.run import Config
from kdlib.data.batches import Prepared, collate
from kdlib.diagnostics.fake_step import kept_layers
from kdlib.hardware import peak_memory, precision_of
from kdlib.models.loading import device_of, load_tokenizer
from kdlib.models.student import tokenizer_of
from kdlib.runs.folder import StudentFolder
from kdlib.tasks import base as tasks
from kdlib.training import run as training

STEPS = {"memory": 2, "time": 5}  # of which the first is not timed


def measured(
    config: Config, *, dense: bool = False, what: Sequence[str] = ("memory", "time")
) -> dict[str, Any]:
    """Peak memory above the process's own, and the median optimizer step, of a few steps on random tokens.

    A process for each, as the memory is measured with large blocks given back when they are freed, which
    takes time.

    Returns:
        {"peak_bytes": …, "wall_s": …, "cpu_s": …}, or the part of it that is asked for.

    Raises:
        RunError: a process failed, as for want of memory; its last words are in the message.
    """
    found: dict[str, Any] = {}
    for name in what:
        asked = {"config": config.as_dict(), "steps": STEPS[name], "dense": dense}
        made = machine.in_fresh_process(
            __name__, asked, what=f"training {STEPS[name]} steps of this config", memory=name == "memory"
        )
        found |= {key: value for key, value in made.items() if (key == "peak_bytes") == (name == "memory")}
    return found


def measured_here(config: Config, *, steps: int, dense: bool) -> dict[str, Any]:
    """What the fresh process does: teacher, student and trainer as in a run; random rows as long as the
    config allows.
    """
    tokenizer = tokenizer_of(config)
    rows = (
        config.training.get("per_device_train_batch_size", 8)
        * config.training.get("gradient_accumulation_steps", 1)
        * steps
    )
    prepared = (_classified if config.task == "sequence-classification" else _drawn)(config, tokenizer, rows)
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, peak_memory(device) as peak:
        teacher = tasks.load_teacher(config, prepared, dtype)
        student = tasks.untrained_student(
            config, prepared, kept_layers(config, teacher.model.config.num_hidden_layers)
        )
        training.train(
            config,
            StudentFolder(Path(folder)),
            student=student,
            teacher=teacher,
            tokenizer=tokenizer,
            prepared=prepared,
            stop_after=steps,
            dense=dense,
            callbacks=[clock],
        )
    return {"peak_bytes": peak.bytes, **clock.figures(1)}


def _drawn(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> Prepared:
    """So many rows of random tokens."""
    drawn = Dataset.from_dict({"input_ids": _ids(config, tokenizer, count)})
    return Prepared(drawn, drawn, {}, partial(collate, pad_id=tokenizer.pad_token_id), len(tokenizer))


def _classified(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> Prepared:
    """Likewise, with the data's classes: by these the models' heads are made."""
    real = tasks.prepare(config, tokenizer)
    drawn = {
        "input_ids": _ids(config, tokenizer, count),
        "label": torch.randint(len(real.labels), (count,)).tolist(),
    }
    if "teacher_input_ids" in real.train.column_names:
        drawn["teacher_input_ids"] = _ids(config, load_tokenizer(config.teacher.model), count)
    rows = Dataset.from_dict(drawn)
    return replace(real, train=rows, validation=rows)


def _ids(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    return torch.randint(len(tokenizer), (count, config.data.max_length)).tolist()


def main() -> None:
    asked = json.loads(sys.argv[1])
    with redirect_stdout(sys.stderr):
        found = measured_here(configs.parse(asked["config"]), steps=asked["steps"], dense=asked["dense"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
