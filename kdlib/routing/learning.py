"""What a Trainer does so that a teacher's router, or a gate over its layers, learns beside its student."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from kdlib.losses.objective import ObjectiveAt
from kdlib.models.hooks import as_evaluated
from kdlib.models.teacher import GATE
from kdlib.routing.experts import Routing
from kdlib.routing.student_aware import StudentAware


class RoutingTrainer(Trainer):
    """A student-aware router is moved before each optimizer step, by all its micro-batches, on all ranks.

    Its state is in every checkpoint.  Whatever way else experts are asked, this adds nothing.  A gate of the
    student's goes by what was chosen in the optimizer step before, on all ranks.
    """

    teacher: Any  # LiveTeacher, or one of which there is no model; or None

    @property
    def routing(self) -> Routing | None:
        """How the teacher's experts are asked, where it has some."""
        return self.teacher.routing if self.teacher else None

    @property
    def gate(self) -> Any:
        """The student's, where hidden states are routed."""
        return getattr(self.accelerator.unwrap_model(self.model), GATE, None)

    def train(self, *arguments: Any, **options: Any) -> Any:
        if self.routing is not None:
            self.routing.reset()
        return super().train(*arguments, **options)

    def get_batch_samples(self, *arguments: Any) -> tuple[list, Tensor | int | None]:
        batches, count = super().get_batch_samples(*arguments)
        at, over_ranks = self.now(), partial(self.accelerator.reduce, reduction="sum")
        if batches and at.needs_teacher and isinstance(self.routing, StudentAware):
            with as_evaluated(self.student), self.accelerator.autocast():
                for batch in map(self._prepare_inputs, batches):
                    self._feed(self.routing, batch, at, count)
            self.routing.step(over_ranks)
        return batches, count

    def _feed(self, routing: StudentAware, batch: dict[str, Any], at: ObjectiveAt, count: Any) -> None:
        with torch.no_grad():
            tokens, student, _ = self.signals(self.student, batch, ObjectiveAt({}, {}), with_teacher=False)
        ask = partial(self.teacher.ask, batch, tokens, teaches=True)
        made = {"count": self.step_count(count), "workspace": self.workspace}
        routing.feed(ask, student, tokens.targets, temperatures=at.temperatures, **made)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        if self.gate is not None:
            self.gate.count()
        return loss

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        if self.gate is not None:  # before it is saved
            self.gate.settle(partial(self.accelerator.reduce, reduction="sum"))
        super()._maybe_log_save_evaluate(*arguments, **options)

    def save_student(self, folder: Path) -> None:
        """And, in the folder around it, the router that taught it."""
        super().save_student(folder)
        routing = self.routing
        if isinstance(routing, StudentAware) and routing.has_learned and self.is_world_process_zero():
            routing.save(folder.parent, whole=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.routing, StudentAware) and self.is_world_process_zero():
            self.routing.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.routing, StudentAware) and checkpoint is not None:
            self.routing.load(Path(checkpoint))
