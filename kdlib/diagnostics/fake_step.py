"""One micro-batch of a config, on models made from their configs alone: without data for memory, with random
weights for time.

What runs is the training's own code, phase by phase: the student's forward pass, the teacher's, the loss, the
backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from kdlib.config.run import Config
from kdlib.data.batches import collate, collate_classes
from kdlib.errors import ModelError
from kdlib.losses.buffers import Workspace
from kdlib.losses.features import LayerPairs
from kdlib.losses.objective import EVAL_TERMS, Objective, ObjectiveAt, ledger, row_sums
from kdlib.losses.signals import Form, Kept, Signal, kept
from kdlib.models.classifier import blank_classifier
from kdlib.models.loading import load_config, load_tokenizer, stated_form
from kdlib.models.student import blank_model, check_layers, even_layers, with_layers
from kdlib.models.teacher import Inside, insides, signal_of
from kdlib.training.plan import compared_layers, objective_of

PHASES = ("student's forward", "teacher's forward", "loss", "backward")
MOMENTS = 20  # points of the training at which the objective is looked at

Phase = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Outline:
    """The two models of a config, known by their configs alone, and the size of the vocabulary, or number
    of classes, that they share.
    """

    config: Config
    student: PreTrainedConfig
    teacher: PreTrainedConfig
    vocabulary: int
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, int]:
        """The student's and the teacher's."""
        return self.student.num_hidden_layers, self.teacher.num_hidden_layers

    @property
    def is_of_rows(self) -> bool:
        """Whether rows are classified."""
        return self.config.task == "sequence-classification"

    def blank_student(self) -> PreTrainedModel:
        """With random weights."""
        return self._blank(self.config.student.source, self.student, torch.float32)

    def blank_teacher(self, dtype: torch.dtype) -> PreTrainedModel:
        """Likewise."""
        return self._blank(self.config.teacher.model, self.teacher, dtype)

    def _blank(self, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        return (blank_classifier if self.is_of_rows else blank_model)(name, config, dtype)

    def with_layers(self, student: int, teacher: int) -> "Outline":
        """The same with few layers of each model, evenly taken."""
        few = [
            with_layers(each, even_layers(count, each.num_hidden_layers))
            for each, count in ((self.student, student), (self.teacher, teacher))
        ]
        return replace(self, student=few[0], teacher=few[1])


def outline(config: Config, classes: int | None = None) -> Outline:
    """What is known of a config's models without their weights.

    Args:
        classes: how many the data has, where rows are classified; what the config or the teacher says of it
            where None.

    Raises:
        ModelError: there is no such model; or the teacher lacks the student's layers.
    """
    is_of_rows = config.task == "sequence-classification"
    known, kind = (
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "classifier of texts")
        if is_of_rows
        else (MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model")
    )
    teacher, notes = load_config(config.teacher.model), []
    student = load_config(config.student.source) if config.student.source != "teacher" else teacher
    for name, each in ((config.teacher.model, teacher), (config.student.source, student)):
        if type(each) not in known:
            raise ModelError(
                f"{name}: its config is of a {each.model_type} model, which is no {kind}; choose one that is"
            )
    if config.student.source == "teacher":
        check_layers(config, teacher.num_hidden_layers)
        student = with_layers(teacher, kept_layers(config, teacher.num_hidden_layers))
        if config.student.keep == "influence":
            notes.append(
                "which layers the student keeps is seen on text; taken evenly here, which matters where "
                "layers differ in size"
            )
    if getattr(teacher, "quantization_config", None):
        notes.append("the teacher's quantised weights are counted in the precision of the training")
    if is_of_rows:
        return _of_rows(config, student, teacher, notes, classes)
    try:
        vocabulary = len(load_tokenizer(config.teacher.model))
    except ModelError:
        vocabulary = teacher.get_text_config().vocab_size
        notes.append(
            f"no tokenizer is to be had for {config.teacher.model}: its head's {vocabulary:,} rows are taken "
            "for the vocabulary"
        )
    return Outline(config, student, teacher, vocabulary, tuple(notes))


def _of_rows(
    config: Config,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    notes: list[str],
    classes: int | None,
) -> Outline:
    """The outline of a classification: the two configs with as many classes as the data has."""
    if classes is None and config.data.labels:
        classes = len(config.data.labels)
    if classes is None:
        classes = teacher.num_labels
        notes.append(
            f"the data was not read, so the teacher's {classes} classes are taken for the data's: they weigh "
            "little"
        )
    notes.append(
        f"each row is taken to have data.max_length ({config.data.max_length}) tokens; shorter texts take "
        "less"
    )
    if config.teacher_stage:
        notes.append(
            "this is the student's training; the teacher's own stage before it is not forecast: put it into "
            "a config of its own"
        )
    made = []
    for each in (student, teacher):
        made.append(changed := deepcopy(each))
        changed.num_labels = classes
        if changed.get_text_config().pad_token_id is None:
            changed.get_text_config().pad_token_id = 0
    return Outline(config, *made, classes, tuple(notes))


def kept_layers(config: Config, total: int) -> list[int] | None:
    """Which of the teacher's layers the student has, evenly taken where the config leaves that to their
    influence.
    """
    if config.student.source != "teacher":
        return None
    return (
        config.student.keep
        if isinstance(config.student.keep, list)
        else even_layers(config.student.layers, total)
    )


class Rehearsal:
    """Student and teacher of an outline, made on entry to whatever mode is active, and one micro-batch
    after another.
    """

    def __init__(
        self,
        plan: Outline,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        dense: bool = False,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            dtype: of matrix products, and of the teacher's weights.
            dense: all logits at once, whatever the models' heads.
            device: where the tensors are.
        """
        config = plan.config
        self.plan, self.dtype, self.workspace, self.device = plan, dtype, workspace, torch.device(device)
        self.objective: Objective = objective_of(config)
        with self.device:
            self.student = plan.blank_student()
            self.teacher = plan.blank_teacher(dtype).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # `compared_layers` seeds it
            self.pairs: LayerPairs = compared_layers(config, self.student, self.teacher, self.objective)
        self.form: Form | None = None if dense else stated_form(self.student)
        self.teacher_form = stated_form(self.teacher)
        if self.form is None and dtype is not torch.float32:
            self.student.forward = convert_outputs_to_fp32(self.student.forward)  # accelerate does so
        if config.training.get("activation_checkpointing") or config.training.get("gradient_checkpointing"):
            self._checkpoint(config.training)

    def _checkpoint(self, training: Mapping[str, Any]) -> None:
        options = dict(
            training.get("activation_checkpointing_kwargs")
            or training.get("gradient_checkpointing_kwargs")
            or {}
        )
        every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        # there is no dropout to repeat
        options = {"use_reentrant": False, **options, "preserve_rng_state": False}
        self.student.activation_checkpointing_enable(options, every_n_layers=every, offload=offload)

    @cached_property
    def objectives(self) -> list[ObjectiveAt]:
        """The objective at the moments of training that ask the models for different things."""
        found: dict[tuple, ObjectiveAt] = {}
        for number in range(MOMENTS + 1):
            at = self.objective.at(number / MOMENTS)
            asks = (at.needs_teacher, at.needs_hidden, at.needs_attention)
            if at.weights and len(at.weights) > len(getattr(found.get(asks), "weights", ())):
                found[asks] = at
        return list(found.values())

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Rows of random tokens as long as the config allows; unpacked, one is shorter, so that a mask is
        needed.
        """
        # token ids keep their values in a rehearsal without data
        with unset_fake_temporarily(), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            if self.plan.is_of_rows:
                made = self._rows_with_classes(rows, generator)
            else:
                made = collate(
                    [{"input_ids": ids} for ids in self._ids(rows, self.plan.vocabulary, generator)], pad_id=0
                )
            return {name: tensor.to(self.device) for name, tensor in made.items()}

    def _ids(self, rows: int, tokens: int, generator: torch.Generator) -> list[list[int]]:
        data = self.plan.config.data
        ids = torch.randint(tokens, (rows, data.max_length), generator=generator).tolist()
        if (self.plan.is_of_rows or not data.packing) and rows > 1 and data.max_length > 2:
            ids[-1].pop()
        return ids

    def _rows_with_classes(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """With tokens of the teacher's own, where the student does not come from it."""
        ours, theirs = (
            self._ids(rows, each.get_text_config().vocab_size, generator)
            for each in (self.plan.student, self.plan.teacher)
        )
        labels = torch.randint(self.plan.vocabulary, (rows,), generator=generator).tolist()
        made = [{"input_ids": ids, "label": label} for ids, label in zip(ours, labels, strict=True)]
        if self.plan.config.student.source != "teacher":
            made = [{**row, "teacher_input_ids": ids} for row, ids in zip(made, theirs, strict=True)]
        return collate_classes(made, pad_id=0, teacher_pad_id=0)

    def train(
        self,
        batch: Mapping[str, Tensor],
        at: ObjectiveAt,
        *,
        count: int,
        phase: Phase = lambda name: nullcontext(),
    ) -> None:
        """One micro-batch, forward and backward; the gradients stay in the student.

        Args:
            count: kept tokens of the optimizer step.
            phase: entered for each of PHASES.
        """
        self.student.train()
        total = self._loss(batch, at, count, phase)
        with phase("backward"):
            total.backward()

    def _loss(self, batch: Mapping[str, Tensor], at: ObjectiveAt, count: int, phase: Phase) -> Tensor:
        with self._autocast():
            tokens, student, teacher = self._signals(batch, at, at.needs_teacher, phase)
            with phase("loss"):
                return ledger(
                    student, teacher, tokens.targets, at=at, count=count, workspace=self.workspace
                ).total

    @torch.no_grad()
    def evaluate(
        self, batch: Mapping[str, Tensor], at: ObjectiveAt, phase: Phase = lambda name: nullcontext()
    ) -> None:
        """One batch of the evaluation."""
        self.student.eval()
        with phase("evaluation"), self._autocast():
            tokens, student, teacher = self._signals(batch, at, True, phase)
            row_sums(
                student,
                teacher,
                tokens.targets,
                tokens.rows,
                row_count=len(batch["labels"]),
                terms=EVAL_TERMS,
                at=at,
                chunk=self.workspace.chunk_for(student),
            )

    def _signals(
        self, batch: Mapping[str, Tensor], at: ObjectiveAt, with_teacher: bool, phase: Phase
    ) -> tuple[Kept, Signal, Signal | None]:
        tokens, (ours, theirs) = kept(batch["labels"]), insides(at, self.pairs, self.student)
        reads = "teacher_" if "teacher_input_ids" in batch else ""
        with phase("student's forward"):
            student = self._heard(self.student, batch, tokens, self.form, ours)
        if not with_teacher:
            return tokens, student, None
        with phase("teacher's forward"), torch.no_grad():
            return tokens, student, self._heard(self.teacher, batch, tokens, self.teacher_form, theirs, reads)

    def _heard(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Tensor],
        tokens: Kept,
        form: Form | None,
        inside: Inside,
        reads: str = "",
    ) -> Signal:
        return signal_of(
            model, batch, tokens, vocabulary=self.plan.vocabulary, form=form, inside=inside, reads=reads
        )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            yield


def at_layers(
    full: tuple[int, int], name: str, low: float, high: float, small: tuple[int, int], large: tuple[int, int]
) -> float:
    """A quantity at all layers, on the line through two numbers of layers: the teacher's if its name says
    so, else the student's.
    """
    model = 1 if "teacher" in name else 0
    if large[model] == small[model]:
        return high
    return max(low + (high - low) / (large[model] - small[model]) * (full[model] - small[model]), 0.0)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Memory of distinct tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
