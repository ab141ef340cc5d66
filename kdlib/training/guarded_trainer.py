"""transformers' Trainer that stops before an optimizer step which is not finite, and says whose fault it
is.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer

from kdlib import hardware as cpu
from kdlib.errors import NonFiniteLoss, RunError
from kdlib.runs.files import StudentFolder
from kdlib.training import nan_report
from kdlib.training.callbacks import last_checkpoint
from kdlib.training.culprits import WHO, is_finite
from kdlib.training.nan_guard import MicroBatch, NanGuard, Scene, culprit_of

# every rank has the whole student
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class GuardedTrainer(Trainer):
    """Looks at each optimizer step before it is made; its subclass calls `guard.begin` and `guard.end` in
    `compute_loss`.

    Several ranks stop together, at the same step: each looks at its own micro-batches, and the lowest that
    has the culprit writes the report.  Weights that are not finite reach no checkpoint and no model.  Not
    tried: sharded students, float16's loss scaler.
    """

    def __init__(self, *, folder: StudentFolder, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.guard = folder, NanGuard()

    @abstractmethod
    def scene(self) -> Scene:
        """How a batch of this optimizer step is asked once more."""

    def train(self, *arguments, **options):
        """As the Trainer's; on a CPU a step finds the memory that the step before has freed."""
        with cpu.memory_kept() if self.args.device.type == "cpu" else nullcontext():
            return super().train(*arguments, **options)

    def _clip_grad_norm(self, model):
        """Looks before it clips: a norm that is nan would make every gradient nan, and hide whose was."""
        if self.accelerator.distributed_type not in UNSHARDED or self._has_mixed_mesh_grads(model):
            clip = super()._clip_grad_norm if self.args.max_grad_norm > 0 else super()._get_grad_norm
            norm = clip(model)
            self.check_step(norm)
            return norm
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        self.check_step(norm)
        if self.args.max_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer calls it at each optimizer step, with the norm where `_clip_grad_norm` was called
        before.
        """
        return self._clip_grad_norm(model) if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def check_step(self, norm: Tensor) -> None:
        """Raises where the optimizer step that is about to be made is not sound on every rank.

        With float16, gradients that leave its range are left to the loss scaler, which skips the step and
        halves its scale; they stop training once the scale is 1, as then it is not the scale that is too
        large.
        """
        loss, gradient, empty = self.accelerator.reduce(self.guard.faults(norm), reduction="sum").tolist()
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        if empty:
            raise RunError(
                nan_report.nothing_kept(
                    step, [each.inputs for each in self.guard.micro_batches], self.train_dataset
                )
            )
        if loss or (gradient and (scaler is None or scaler.get_scale() <= 1)):
            self.stop(self.scene(), self.guard.micro_batches, step=step, with_gradients=bool(gradient))
        self.guard.passed(norm)

    def check_weights(self) -> None:
        """Raises rather than let weights that are not finite reach a checkpoint or a model."""
        if (
            self.accelerator.reduce(
                (~is_finite(self.accelerator.unwrap_model(self.model))).float(), reduction="sum"
            )
            > 0
        ):
            self.stop(
                self.scene(),
                self.guard.micro_batches or [self.asked(self.train_dataset[0])],
                step=self.state.global_step,
            )

    def _save_checkpoint(self, model, trial):
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def asked(self, row: Mapping[str, Any]) -> MicroBatch:
        """A batch of one row of the data."""
        return MicroBatch.of(self._prepare_inputs(self.data_collator([row])))

    def stop(
        self,
        scene: Scene,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        stage: str = "training",
        rows: Any = None,
        with_gradients: bool = False,
    ) -> NoReturn:
        """Finds what is not finite, writes the report and raises; every rank must call it.

        Args:
            rows: the data set in which the row is looked up; the training rows where None.
            with_gradients: see culprit_of.
        """
        with self.accelerator.autocast():
            culprit = culprit_of(scene, micro_batches, with_gradients=with_gradients)
        batches = [each.inputs for each in micro_batches]
        report = nan_report.report_of(
            culprit,
            self._standing(scene, step, stage),
            batches,
            tokenizer=self.processing_class,
            rows=self.train_dataset if rows is None else rows,
        )
        found = gather_object([{**report, "rank": self.args.process_index}])
        first = min(found, key=lambda each: (WHO.index(each["who"]), each["rank"]))
        if first["rank"] == self.args.process_index:
            nan_report.write(self.folder, first, batches)
        # a rank that ends sooner would have the others killed, the report half written
        self.accelerator.wait_for_everyone()
        raise NonFiniteLoss(nan_report.message(first, self.folder))

    def _standing(self, scene: Scene, step: int, stage: str) -> nan_report.Standing:
        checkpoint, lines = (
            last_checkpoint(self.folder),
            [line for line in self.state.log_history if "loss" in line],
        )
        precision = {who: str(model.dtype).removeprefix("torch.") for who, model in scene.models.items()}
        return nan_report.Standing(
            stage=stage,
            step=step,
            max_grad_norm=self.args.max_grad_norm or 0.0,
            precision={
                **precision,
                "autocast": "float16" if self.args.fp16 else "bfloat16" if self.args.bf16 else "off",
            },
            loss=float(self.guard.loss) if stage == "training" and step > self.state.global_step else None,
            learning_rate=self._get_learning_rate() if self.lr_scheduler else self.args.learning_rate,
            grad_norms=[float(norm) for norm in self.guard.norms],
            last_log=lines[-1] if lines else {},
            checkpoint=checkpoint and str(Path(checkpoint).relative_to(self.folder.path)),
        )
