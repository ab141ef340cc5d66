"""At the first value that is not finite training stops, before the optimizer takes it in, and says why.

While all is well it costs one look per optimizer step, at its loss and the gradient norm that the Trainer
makes anyway, and keeps the micro-batches with their random numbers, to ask once more, dropout and all.
"""

import shutil
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    gather_object,
    load_fsdp_model,
    load_fsdp_optimizer,
)
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer

from kdlib.errors import NonFiniteLoss, RunError
from kdlib.hardware import memory_kept
from kdlib.models import adapters
from kdlib.models.sharing import is_converted, write_in_parts
from kdlib.models.teacher import BESIDE
from kdlib.runs import checkpoints
from kdlib.runs.files import StudentFolder, synced
from kdlib.training import nan_report
from kdlib.training.nan_search import WHO, Batch, MicroBatch, Replay, is_finite, origin_of

REMEMBERED = 10  # gradient norms


class NanGuard:
    """What a search will need, kept as long as the optimizer step lasts."""

    def __init__(self) -> None:
        self.step, self.loss, self.count = -1, torch.zeros(()), torch.zeros(())
        self.micro_batches: list[MicroBatch] = []
        self.norms: deque[Tensor] = deque(maxlen=REMEMBERED)

    def begin(self, inputs: Batch, step: int) -> bool:
        """A micro-batch of this optimizer step comes; True for its first."""
        if step != self.step:
            self.step, self.micro_batches = step, []
            self.loss = torch.zeros((), device=inputs["labels"].device)
        self.micro_batches.append(MicroBatch.of(inputs))
        return len(self.micro_batches) == 1

    def end(self, loss: Tensor, count: Tensor | int) -> None:
        """What the micro-batch cost; `count`: kept tokens of the whole step.  No wait for the device."""
        self.loss, self.count = self.loss + loss.detach(), torch.as_tensor(count, device=loss.device)

    def faults(self, norm: Tensor) -> Tensor:
        """[3] 1 where so: loss not finite, gradient norm not finite, no kept token."""
        norm = torch.as_tensor(norm, device=self.loss.device)
        return torch.stack([~self.loss.isfinite(), ~norm.isfinite(), self.count == 0]).float()

    def passed(self, norm: Tensor) -> None:
        """The step is sound; its gradient norm is kept for a later report."""
        self.norms.append(norm)
        self.step = -1


class GuardedTrainer(Trainer):
    """Looks at each optimizer step before it is made; a subclass tells `guard` of every micro-batch.

    Several ranks stop together: each looks at its own micro-batches, and the lowest that has the origin
    writes the report.  Not tried: float16's loss scaler.
    """

    model: PreTrainedModel  # these three are narrower than the Trainer's own
    optimizer: Optimizer
    train_dataset: Dataset

    def __init__(self, *, folder: StudentFolder, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(**options)
        # not the Trainer's processing_class: it would write its special tokens into the model's config, and
        # where a model makes something of its pad token, what is saved would not be what was trained
        self.tokenizer = tokenizer
        self.folder, self.guard = folder, NanGuard()
        self.kept_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def student(self) -> PreTrainedModel:
        """The model without what spreads it over processes."""
        return self.accelerator.unwrap_model(self.model)

    @abstractmethod
    def replay(self) -> Replay:
        """How a batch of this optimizer step is asked once more."""

    def train(self, *arguments, **options):
        """On a CPU a step finds the memory that the step before has freed."""
        with memory_kept() if self.args.device.type == "cpu" else nullcontext():
            return super().train(*arguments, **options)

    def _run_epoch(self, *arguments, **options):
        """Not where the last step was made before a kill, or it is to stop before the first."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **options)

    def _get_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        """`dataloader_drop_last` is of training: every held-out row is measured."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and options.get("is_training", False)
        try:
            return super()._get_dataloader(*arguments, **options)
        finally:
            self.args.dataloader_drop_last = drops

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Rows in their own order whatever `train_sampling_strategy` says: their sums are told by place."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _clip_grad_norm(self, model):
        """Looks before it clips: a norm that is nan would make every gradient nan, and hide whose was."""
        limit = self.args.max_grad_norm
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of what ranks share, the whole's
        self.check_step(norm)
        if limit > 0:
            clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        """Called at each step, with the norm where it was clipped."""
        return self._clip_grad_norm(model) if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def check_step(self, norm: Tensor) -> None:
        """Raises where the optimizer step about to be made is not sound on every rank.

        Gradients beyond float16's range are the loss scaler's, which skips the step and halves its scale,
        until that is 1: then it is not the scale that is too large.
        """
        loss, gradient, empty = self.accelerator.reduce(self.guard.faults(norm), reduction="sum").tolist()
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        if empty:
            batches = [each.inputs for each in self.guard.micro_batches]
            raise RunError(nan_report.nothing_kept(step, batches, self.train_dataset))
        if loss or (gradient and (scaler is None or scaler.get_scale() <= 1)):
            self.stop(self.replay(), self.guard.micro_batches, step=step, with_gradients=bool(gradient))
        self.guard.passed(norm)

    def check_weights(self) -> None:
        """Raises rather than let weights that are not finite reach a checkpoint or a model."""
        broken = ~is_finite(self.accelerator.unwrap_model(self.model))
        if self.accelerator.reduce(broken.float(), reduction="sum") > 0:
            asked = self.guard.micro_batches or [self.micro_batch_of(self.train_dataset[0])]
            self.stop(self.replay(), asked, step=self.state.global_step)

    def _save_checkpoint(self, model, trial):
        """One that is whole by its manifest; only then older ones go, which the Trainer does before."""
        self.check_weights()
        is_first, wait = self.is_world_process_zero(), self.accelerator.wait_for_everyone
        checkpoint = self.folder.checkpoints / f"checkpoint-{self.state.global_step}"
        if is_first:
            checkpoints.begin(checkpoint)
        wait()
        super()._save_checkpoint(model, trial)
        wait()
        if is_first:
            checkpoints.seal(self.folder, checkpoint)
            checkpoints.thin_out(self.folder, checkpoint, self.kept_checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Into a checkpoint; with an adapter what is trained alone."""
        if output_dir and adapters.is_adapted(self.student):
            adapters.save_trained(self.student, Path(output_dir))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Also what ranks wrote in parts, where each process holds the student whole; or its adapter."""
        if adapters.is_adapted(self.student):
            adapters.load_trained(self.student, Path(resume_from_checkpoint))
        elif self.is_fsdp_enabled or not checkpoints.is_in_parts(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with _reading_parts() as how:
                load_fsdp_model(how, self.accelerator, model or self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or checkpoint is None or not checkpoints.is_in_parts(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with _reading_parts() as how:
            load_fsdp_optimizer(how, self.accelerator, self.optimizer, self.model, checkpoint)
        if self.lr_scheduler:
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))

    def save_student(self, folder: Path) -> None:
        """The student and its tokenizer as safetensors, all or nothing, loadable by `from_pretrained`.

        Ranks that share it write their parts, which the first joins on the disk: none holds it whole.
        """
        self.check_weights()
        half_made, is_first = folder.with_name(folder.name + ".tmp"), self.is_world_process_zero()
        if is_first:
            shutil.rmtree(half_made, ignore_errors=True)
        in_parts = self.is_fsdp_enabled and not is_converted(self.student)
        state = {} if in_parts else self.accelerator.get_state_dict(self.model_wrapped)
        state = {name: value for name, value in state.items() if not name.startswith(BESIDE)}
        if is_first:
            adapters.save(self.student, half_made, state)
        if in_parts:
            self.accelerator.wait_for_everyone()
            write_in_parts(self.student, half_made / "model.safetensors", BESIDE)
        if not is_first:
            return
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(half_made)
        synced(half_made)
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)
        synced(folder.parent, within=False)

    def micro_batch_of(self, row: dict[str, Any]) -> MicroBatch:
        """One row of the data."""
        return MicroBatch.of(self._prepare_inputs(self.data_collator([row])))

    def stop(
        self,
        replay: Replay,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        stage: str = "training",
        rows: Any = None,
        with_gradients: bool = False,
    ) -> NoReturn:
        """Finds what is not finite, writes the report and raises; every rank must call it.

        The row is looked up in `rows`, the training rows where None.
        """
        with self.accelerator.autocast():
            origin = origin_of(replay, micro_batches, with_gradients=with_gradients)
        batches, state = [each.inputs for each in micro_batches], self._state_at(replay, step, stage)
        rows = self.train_dataset if rows is None else rows
        report = nan_report.report_of(origin, state, batches, self.tokenizer, rows)
        found = gather_object([{**report, "rank": self.args.process_index}])
        first = min(found, key=lambda each: (WHO.index(each["who"]), each["rank"]))
        if first["rank"] == self.args.process_index:
            nan_report.write(self.folder, first, batches)
        self.accelerator.wait_for_everyone()  # one that ends sooner has the others killed while they write
        raise NonFiniteLoss(nan_report.message(first, self.folder))

    def _state_at(self, replay: Replay, step: int, stage: str) -> dict[str, Any]:
        """How training stands at this step, by the names of the report; stage: training or evaluation."""
        args, (checkpoint, _) = self.args, checkpoints.last_whole(self.folder)
        precision = {who: str(model.dtype).removeprefix("torch.") for who, model in replay.models.items()}
        precision["autocast"] = "float16" if args.fp16 else "bfloat16" if args.bf16 else "off"
        norms = [float(norm) for norm in self.guard.norms]  # of the optimizer steps before, the last one last
        in_step = stage == "training" and step > self.state.global_step
        return {
            "stage": stage,
            "step": step,
            "precision": precision,
            "loss": float(self.guard.loss) if in_step else None,  # this rank's part of it
            "learning_rate": self._get_learning_rate() if self.lr_scheduler else args.learning_rate,
            "max_grad_norm": args.max_grad_norm or 0.0,
            "grad_norm_before": norms[-1] if norms else None,
            "grad_norms_before": norms,
            "last_log": next((line for line in reversed(self.state.log_history) if "loss" in line), {}),
            "last_checkpoint": checkpoint and str(checkpoint.relative_to(self.folder.path)),
        }


@contextmanager
def _reading_parts() -> Iterator[FullyShardedDataParallelPlugin]:
    """What tells accelerate how a checkpoint in parts is read; that one process reads it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
