"""Teacher, untrained student, baseline and distilled student as classifiers of the same held-out rows,
with intervals.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from time import perf_counter
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.errors import ModelError
from kdlib.hardware import peak_memory, precision_of
from kdlib.losses.signals import kept
from kdlib.metrics.classification import Answers
from kdlib.metrics.paired import results_of, worst_rows
from kdlib.models.efficiency import Batch, latency_ms, seconds_of, stored_bytes, wait_for
from kdlib.models.loading import device_of, parameters
from kdlib.models.teacher import LiveTeacher
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.tasks import base as tasks

BATCH = 32  # rows per forward pass
SINGLE = 30  # rows that are answered one by one, for the latency


def measured_on(prepared: Prepared) -> str:
    """The split on which models are compared: test where there is one."""
    return "test" if prepared.test is not None and len(prepared.test) else "validation"


def rule_of(config: Config, prepared: Prepared) -> str:
    """Which students of a run are compared, on which rows, and who has an advantage there."""
    if measured_on(prepared) == "test":
        return (
            "best_model/ of each student, chosen on the validation rows; measured on the test rows, on "
            "which nothing was chosen"
        )
    ended = (
        "when early stopping by these very rows ended it"
        if config.early_stopping
        else "after equally many steps"
    )
    teacher = (
        "; the teacher is the best by these rows, so its figures are rather too good"
        if config.teacher_stage
        else ""
    )
    return (
        f"final_model/ of each student, {ended}; measured on the validation rows, as there are no test rows: "
        "best_model/ was chosen on "
        f"these very rows{teacher}"
    )


def student_in(folder: StudentFolder, prepared: Prepared) -> str:
    """The student that is compared: one chosen on other rows than those it is measured on, else the last."""
    return str(folder.best_model if measured_on(prepared) == "test" else folder.final_model)


class ClassComparison:
    """Measures classifiers one after another on the same rows, the teacher first: the others are held
    against it.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        """
        Args:
            prepared: its test rows, or where there are none its validation rows, are what the models are
                measured on.
            tokenizer: by which rows are made readable that do not carry their text.
            device: where the models are measured.
            resamples: of the bootstrap over rows, or over their groups, the same for every model.
        """
        self.prepared, self.device, self.resamples, self.seed = (
            prepared,
            torch.device(device),
            resamples,
            seed,
        )
        rows = self._rows(prepared)
        self.texts = (
            rows["text"][:]
            if "text" in rows.column_names
            else tokenizer.batch_decode(rows["input_ids"], skip_special_tokens=True)
        )
        self.answers: dict[str, Answers] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        load: Callable[[], PreTrainedModel],
        *,
        source: str | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        """Load one model and measure it: its answers to all rows, time, memory, size.

        Args:
            source: where its weights are stored; None for a model that is not stored.
            prepared: the same rows for a student with a tokenizer of its own.

        Raises:
            ModelError: it answers with values that are not finite.
        """
        prepared = prepared or self.prepared
        with peak_memory(self.device) as peak:
            started = perf_counter()
            model = load().to(self.device)
            wait_for(self.device)
            loaded = perf_counter() - started
            voice = (tasks.voice_of if self.answers else tasks.teacher_of)(model, prepared)
            self.answers[name], speed = self._ask(name, voice, prepared)
            latency = latency_ms(
                lambda batch: _logits(voice, batch), list(self._batches(prepared, 1, SINGLE)), self.device
            )
        stored = stored_bytes(source) if source else None
        size = stored or sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.facts[name] = {
            "parameters": parameters(model),
            "size_on_disk_gib": size / 2**30,
            "latency_ms": latency,
            "throughput_rows_per_s": speed,
            **({"load_seconds": loaded} if source else {}),
            "peak_memory_gib": peak.bytes / 2**30,
        }

    def _ask(self, name: str, voice: LiveTeacher, prepared: Prepared) -> tuple[Answers, float]:
        """What it answers, and how many rows it answers in a second."""
        logits, seconds = [], 0.0
        _logits(voice, next(self._batches(prepared, BATCH)))  # the first pass is not timed
        for batch in self._batches(prepared, BATCH):
            seconds += seconds_of(lambda batch=batch: logits.append(_logits(voice, batch)), self.device)
        values = torch.cat(logits).cpu().double()
        if len(broken := (~values.isfinite()).any(dim=1).nonzero()):
            raise ModelError(
                f"{name}: its logits are not finite in {len(broken)} of {len(values)} rows, first in row "
                f"{broken[0].item()}; "
                "such a model cannot be compared: see whether its weights are sound, or set precision: "
                "float32"
            )
        labels = np.array(self._rows(prepared)["label"])
        return Answers(values.softmax(dim=-1).numpy(), labels), len(values) / seconds

    def _batches(self, prepared: Prepared, size: int, count: int | None = None) -> Iterator[Batch]:
        rows = self._rows(prepared)
        for start in range(0, min(len(rows), count or len(rows)), size):
            batch = prepared.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {name: value.to(self.device) for name, value in batch.items()}

    @staticmethod
    def _rows(prepared: Prepared) -> Dataset:
        return getattr(prepared, measured_on(prepared))

    def results(self, student: str) -> dict[str, Any]:
        """Everything as plain data, as comparison_results.json has it; `student` is whom the comparison
        is about.
        """
        rows = self._rows(self.prepared)
        groups = rows["group"][:] if "group" in rows.column_names else None
        found = results_of(
            self.answers, self.prepared.labels, groups=groups, resamples=self.resamples, seed=self.seed
        )
        models = {name: {**measures, **self.facts[name]} for name, measures in found["models"].items()}
        shown = {name: answers for name, answers in self.answers.items() if name != "untrained"}
        return {
            **found,
            "task": "sequence-classification",
            "models": models,
            "student": student,
            "split": measured_on(self.prepared),
            "worst": worst_rows(shown, student, self.texts, [self.prepared.labels] * len(self.texts)),
            "batch_rows": BATCH,
        }


def compare(
    run: Run, config: Config, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> dict[str, Any]:
    """Compare the classifiers of a finished run: the data of its comparison_results.json.

    Args:
        config: the run's, with the teacher that taught in it.
    """
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    comparison = ClassComparison(
        prepared, tokenizer, device=device, resamples=config.compare.resamples, seed=config.seed
    )

    def measure(name: str, source: str | None, load: Callable[[], PreTrainedModel] | None = None) -> None:
        print(f"measuring the {name} model …", flush=True)
        comparison.add(name, load or (lambda: tasks.load(source, prepared, dtype)), source=source)

    measure("teacher", config.teacher.model)
    untrained = tasks.untrained_student(config, prepared, run.manifest["student_layers"]).to(dtype)
    # so that its memory is its own, not the teacher's that it is cut from
    measure("untrained", None, lambda: deepcopy(untrained))
    if config.baseline:
        measure("baseline", student_in(run.baseline, prepared))
    measure("distilled", student_in(run, prepared))
    return {
        **comparison.results("distilled"),
        "rule": rule_of(run.config, prepared),
        "precision": str(dtype).removeprefix("torch."),
    }


def _logits(voice: LiveTeacher, batch: Batch) -> torch.Tensor:
    """[B, C]"""
    return voice(batch, kept(batch["labels"])).logits()
