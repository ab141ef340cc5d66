"""Classification: a class for each row; what classifiers are compared by, row by row."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel as Model,
    PreTrainedTokenizerBase as Tokenizer,
)

from kdlib.config.run import Config
from kdlib.config.task_rules import RULES
from kdlib.data import classification
from kdlib.data.batches import Batch, Prepared, collate_classes, random_ids
from kdlib.errors import ModelError
from kdlib.hardware import TIMES, latency_ms, middle_half, repeated, seconds_of
from kdlib.losses.signals import kept
from kdlib.metrics.classification import Answers
from kdlib.metrics.paired import results_of, worst_rows
from kdlib.models.classifier import load_classifier, named_classes
from kdlib.models.loading import load_config, load_tokenizer
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.tokens import RowView
from kdlib.students.student import Outline
from kdlib.tasks.base import STAGE, Comparison, Sample, Task, register
from kdlib.tasks.rows import rows_of, spread

BATCH = 32  # rows per forward pass
SINGLE = 30  # rows that are answered one by one, for the latency
LOOKED_AT = 32  # rows, spread over the held-out ones
BEGINNING = 72  # letters of a row's text


class Classification(Task):
    """Models with a head of classes, each of which may read by a tokenizer of its own."""

    rules = RULES["sequence-classification"]
    kind = "classifier of texts"
    auto = AutoModelForSequenceClassification
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    checks = (
        "documents_are_not_cut",
        "documents_came_once",
        "teacher_has_a_head",
        "enough_rows_are_held_out",
        "texts_have_one_class",
        "held_out_groups_are_new",
        "classes_are_large_enough",
    )
    checks_on_batches = ("teacher_knows_the_classes",)

    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        is_new = new_head or config.teacher_stage
        known = None if is_new else named_classes(load_config(config.teacher.model))
        teacher = _teachers_own(config, tokenizer)
        options = {"teacher": teacher, "seed": config.seed, "known": known}
        prepared = classification.prepare(config.data, tokenizer, **options)
        parts = [each for each in (prepared.train, prepared.validation, prepared.test) if each is not None]
        own = config.student.source != "teacher"
        rows_of(config.student.source if own else config.teacher.model, tokenizer, parts)
        if own:
            column = "teacher_input_ids" if teacher else "input_ids"
            rows_of(config.teacher.model, teacher or tokenizer, parts, column)
        return prepared

    def load(
        self, source: str, prepared: Prepared, dtype: torch.dtype = torch.float32, *, untrained: bool = False
    ) -> Model:
        return load_classifier(source, prepared.labels, dtype, untrained=untrained)

    def outlined(
        self, config: Config, student: PreTrainedConfig, teacher: PreTrainedConfig, vocabulary: int | None
    ) -> Outline:
        length, classes = config.data.max_length, vocabulary or len(config.data.labels or ())
        notes = [f"each row is taken to have data.max_length ({length}) tokens; shorter texts take less"]
        if not classes:
            classes = teacher.num_labels
            of_data = f"the data was not read, so the teacher's {classes} classes are taken for the data's"
            notes.insert(0, f"{of_data}: they weigh little")
        if config.teacher_stage:
            notes.append(STAGE)
        made = [deepcopy(each) for each in (student, teacher)]
        for each in made:
            each.num_labels = classes
            if each.get_text_config().pad_token_id is None:
                each.get_text_config().pad_token_id = 0
        return Outline(config, *made, classes, self, notes)

    def random_batch(self, plan: Outline, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """With tokens of the teacher's own, where the student does not come from it."""
        length = plan.config.data.max_length
        ours, theirs = (
            random_ids(each.get_text_config().vocab_size, rows, length, generator, is_full=False)
            for each in (plan.student, plan.teacher)
        )
        labels = torch.randint(plan.vocabulary, (rows,), generator=generator).tolist()
        columns = {"input_ids": ours, "label": labels}
        if plan.config.student.source != "teacher":
            columns["teacher_input_ids"] = theirs
        made = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return collate_classes(made, pad_id=0, teacher_pad_id=0)

    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher) -> dict[str, str]:
        table = classification.class_table(prepared)
        own = "; the teacher reads with a tokenizer of its own" * bool(teacher.reads)
        rows = ", ".join(f"{label} {' / '.join(map(str, counts))}" for label, *counts in table.itertuples())
        return {"classes": f"{len(table)}, with their rows ({' / '.join(table)}): {rows}{own}"}

    def example(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher
    ) -> RowView:
        """The row's class, and what the teacher says of it."""
        row, labels = prepared.train[0], prepared.labels
        said = _logits(teacher, prepared.first_rows()).float().softmax(-1)[0].tolist()
        return RowView(text_of(row, tokenizer), labels[row["label"]], list(zip(labels, said, strict=True)))

    def sample(self, prepared: Prepared, tokenizer: Tokenizer) -> Sample:
        """Some of the held-out rows, from the first to the last."""
        some, labels = spread(prepared.validation, LOOKED_AT), prepared.labels
        lines = [" ".join(text_of(row, tokenizer).split()) for row in some]
        texts = [line if len(line) <= BEGINNING else f"{line[:BEGINNING]}…" for line in lines]
        classes = [f"{labels[row['label']]}: " for row in some]
        return Sample(prepared.collate(some), texts, classes, labels.__getitem__)

    def comparison(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, **options: Any
    ) -> Comparison:
        return ClassComparison(prepared, tokenizer, **options)


class ClassComparison(Comparison):
    """Classifiers by their probabilities for every row, and by how fast they answer."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__(prepared, tokenizer, **options)
        self.answers: dict[str, Answers] = {}

    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        """Its answers to all rows; a ModelError where they are not finite."""
        logits, rates = [], []
        _logits(model, next(self._batches(prepared, BATCH)))  # the first pass is not timed
        for batch in self._batches(prepared, BATCH):
            seconds = seconds_of(lambda batch=batch: logits.append(_logits(model, batch)), self.device)
            rates.append(len(batch["labels"]) / seconds)
        values = torch.cat(logits).cpu().double()
        if len(broken := (~values.isfinite()).any(dim=1).nonzero()):
            where = f"{len(broken)} of {len(values)} rows, first in row {broken[0].item()}"
            raise ModelError(
                f"{name}: its logits are not finite in {where}; such a model cannot be compared: see whether "
                "its weights are sound, or set precision: float32"
            )
        self.answers[name] = Answers(values.softmax(dim=-1).numpy(), np.array(prepared.measured["label"]))
        single = list(self._batches(prepared, 1, SINGLE))
        return {
            "latency_ms": latency_ms(lambda batch: _logits(model, batch), single, self.device),
            "throughput_rows_per_s": middle_half(self._more(rates, model, prepared)),
        }

    def _more(self, rates: list[float], model: LiveTeacher, prepared: Prepared) -> list[float]:
        """Rows per second of the full batches; where these are few, of the first repeated."""
        if len(rates) > TIMES:
            return rates[:-1]  # the last may be small
        first = next(self._batches(prepared, BATCH))
        rows = len(first["labels"])
        return [rows / seconds for seconds in repeated(lambda: _logits(model, first), self.device)]

    def _batches(self, prepared: Prepared, size: int, count: int | None = None) -> Iterator[Batch]:
        rows = prepared.measured
        for start in range(0, min(len(rows), count or len(rows)), size):
            batch = prepared.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {name: value.to(self.device) for name, value in batch.items()}

    def results(self, student: str) -> dict[str, Any]:
        rows, labels = self.prepared.measured, self.prepared.labels
        groups = rows["group"][:] if "group" in rows.column_names else None
        found = results_of(self.answers, labels, groups=groups, resamples=self.resamples, seed=self.seed)
        shown = {name: answers for name, answers in self.answers.items() if name != "untrained"}
        texts = [text_of(row, self.tokenizer) for row in rows]
        worst = worst_rows(shown, student, texts, [labels] * len(rows))
        return {**found, "worst": worst, "batch_rows": BATCH}


def text_of(row: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """The text of a row; where it is not kept, as it can be read from the tokens."""
    return row.get("text") or tokenizer.decode(row["input_ids"], skip_special_tokens=True)


def _logits(model: LiveTeacher, batch: Batch) -> Tensor:
    """[B, C]"""
    return model(batch, kept(batch["labels"])).logits()


def _teachers_own(config: Config, tokenizer: Tokenizer) -> Tokenizer | None:
    """The teacher's tokenizer, where it reads otherwise than the student's."""
    if config.student.source == "teacher":
        return None
    other, sample = load_tokenizer(config.teacher.model), "Déjà vu:  two\nlines."
    is_alike = (
        other.get_vocab() == tokenizer.get_vocab()
        and other(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    )
    return None if is_alike else other


register(Classification())
