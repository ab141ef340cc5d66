"""Training: transformers' Trainer with kdlib's objective in it, writing a student's folder."""

import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from kdlib.errors import RunError
from kdlib.hardware import memory_gib
from kdlib.losses.buffers import PIECE, Workspace
from kdlib.losses.chunked import Weighted
from kdlib.losses.features import LayerPairs
from kdlib.losses.ledger import LedgerWindow, breach
from kdlib.losses.objective import EVAL_TERMS, Objective, ObjectiveAt, ledger, row_sums
from kdlib.losses.signals import Kept, Signal, kept
from kdlib.metrics.multiple_choice import accuracy as choice_accuracy
from kdlib.models.loading import head_form
from kdlib.models.teacher import PROJECTIONS, LiveTeacher, insides, signal_of
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import Schedule
from kdlib.training.callbacks import (
    LogBeforeSave,
    PrintedLines,
    Throughput,
    best_metric,
)
from kdlib.training.gradients import gradient_figures, term_gradients
from kdlib.training.guarded_trainer import UNSHARDED, GuardedTrainer
from kdlib.training.nan_guard import Scene
from kdlib.training.trackers import MetricsFile

SCORE = {"ce": EVAL_TERMS["ce"]}  # of a choice


class DistillationTrainer(GuardedTrainer):
    """A Trainer whose loss is an Objective's ledger, in training and in evaluation.

    Every term is divided by the kept tokens of the whole optimizer step, all micro-batches and ranks, which
    is what makes batch 8 x accumulation 1 equal 1 x 8, and one rank equal two.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        objective: Objective,
        teacher: LiveTeacher | None,
        vocabulary: int,
        folder: StudentFolder,
        workspace: Workspace | None = None,
        layer_pairs: LayerPairs = (),
        learning_rate_schedule: Schedule | None = None,
        label: str = "",
        dense: bool = False,
        last_step: int | None = None,
        grad_norms_every: int | None = None,
        choices: Dataset | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            teacher: None where no term needs it.
            workspace: what the losses keep between steps.
            layer_pairs: the layers that feature terms compare, (student's, teacher's).
            learning_rate_schedule: multiplier of the learning rate over training, in place of
                `lr_scheduler_type`.
            dense: compute all logits at once: the slow reference.
            last_step: shown as the end where training will be stopped before the schedule's.
            grad_norms_every: so many optimizer steps apart, measure each term's gradient on its own, on the
                first micro-batch (of the first rank): one more forward pass, a backward pass per term, and
                memory for terms x parameters.
            choices: of the held-out questions, scored at every evaluation
                (kdlib.data.qa).
        """
        super().__init__(folder=folder, **options)
        if self.args.n_gpu > 1:
            raise RunError(
                f"{self.args.n_gpu} GPUs in one process would train by DataParallel, which divides the loss "
                "by the wrong "
                "count; use `torchrun --nproc_per_node N -m kdlib train RUN`, or show one GPU by "
                "CUDA_VISIBLE_DEVICES=0"
            )
        if grad_norms_every and self.accelerator.distributed_type not in UNSHARDED:
            raise RunError(
                f"diagnostics.grad_norms_every is {grad_norms_every}, but no rank has the whole student "
                f"({self.accelerator.distributed_type}); set it to null"
            )
        self.remove_callback(PrinterCallback)
        self.objective, self.teacher, self.vocabulary = objective, teacher, vocabulary
        self.workspace, self.layer_pairs, self.learning_rate_schedule = (
            workspace or Workspace(),
            layer_pairs,
            learning_rate_schedule,
        )
        # FSDP1: no weight of its own shape is left
        flattened = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        self.form = None if dense or flattened else head_form(self.model)
        self.window, self.throughput, self.tokens, self.counted = LedgerWindow(), Throughput(), 0, "tokens"
        self.grad_norms_every, self.gradients, self.choices = grad_norms_every, {}, choices
        how = "all at once" if self.form is None else str(self.workspace)
        lines = PrintedLines(label, f"the student's logits {how}", last_step=last_step)
        for callback in (MetricsFile(folder), lines, LogBeforeSave(), self.throughput):
            self.add_callback(callback)
        if self.teacher is not None:
            self.teacher.model.to(self.args.device)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The learning rate's course: one of kdlib.schedulers where given, else the Trainer's own."""
        if self.learning_rate_schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        course, steps = self.learning_rate_schedule, max(num_training_steps, 1)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: course(step / steps))
        return self.lr_scheduler

    def _done(self, step: int) -> float:
        """The fraction of training done before this optimizer step, counted from 0."""
        return step / max(self.state.max_steps, 1)

    def signals(
        self, model, batch: Mapping[str, Tensor], at: ObjectiveAt, *, with_teacher: bool
    ) -> tuple[Kept, Signal, Signal | None]:
        """The kept tokens of a batch and what student and teacher said about them, and felt where a term
        of the moment asks.
        """
        tokens, unwrapped = kept(batch["labels"]), self.accelerator.unwrap_model(model)
        ours, theirs = insides(at, self.layer_pairs, unwrapped)
        student = signal_of(
            model, batch, tokens, vocabulary=self.vocabulary, form=self.form, unwrapped=unwrapped, inside=ours
        )
        return tokens, student, self.teacher(batch, tokens, theirs) if with_teacher else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The ledger's total for one micro-batch; `num_items_in_batch` is the whole optimizer step's
        token count.
        """
        if num_items_in_batch is None:
            raise RunError(
                "the Trainer gave no num_items_in_batch, so the loss cannot be divided by the step's tokens. "
                "It does so for "
                "models whose forward takes **kwargs, and "
                f"{type(self.accelerator.unwrap_model(model)).__name__}'s does not: "
                "use a model that does"
            )
        at = self.objective.at(self._done(self.state.global_step))
        is_first, every = self.guard.begin(inputs, self.state.global_step), self.grad_norms_every
        if is_first and every and (self.state.global_step + 1) % every == 0 and self.is_world_process_zero():
            self.gradients = self._gradient_figures(at)
        # accelerate wraps the model's forward only; the heads' products happen here
        with self.accelerator.autocast():
            tokens, student, teacher = self.signals(model, inputs, at, with_teacher=at.needs_teacher)
            book = ledger(
                student,
                teacher,
                tokens.targets,
                at=at,
                count=num_items_in_batch,
                workspace=self.workspace,
            )
        total = book.total
        self.window.add(book, self.state.global_step)
        self.guard.end(total, num_items_in_batch)
        self.tokens += len(tokens.targets)
        self.counted = "tokens" if inputs["labels"].ndim == 2 else "rows"
        idle = [] if at.needs_projection else getattr(self.accelerator.unwrap_model(model), PROJECTIONS, [])
        # DDP waits for a gradient of every parameter
        unused = sum(0 * matrix.weight.sum() for matrix in idle)
        # DDP averages the ranks' gradients; their sum is meant
        return total * self.accelerator.num_processes + unused

    def _gradient_figures(self, at: ObjectiveAt) -> dict[str, float]:
        """Each term's gradient norm and their cosines, on the micro-batch that has just begun; nothing of
        the step is changed.
        """
        # unwrapped: DDP is not to know
        model, micro_batch = self.accelerator.unwrap_model(self.model), self.guard.micro_batches[-1]
        parameters = [
            p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(PROJECTIONS)
        ]
        with micro_batch.replayed(), self.accelerator.autocast():
            tokens, student, teacher = self.signals(
                model, micro_batch.inputs, at, with_teacher=at.needs_teacher
            )
            return gradient_figures(
                term_gradients(
                    student, teacher, tokens, at=at, parameters=parameters, chunk=self.workspace.chunk
                )
            )

    def scene(self, at: ObjectiveAt | None = None, measures: Mapping[str, Weighted] | None = None) -> Scene:
        at, model = (
            at or self.objective.at(self._done(self.state.global_step)),
            self.accelerator.unwrap_model(self.model),
        )
        with_teacher = self.teacher is not None and (measures is not None or at.needs_teacher)
        models = {"student": model} | ({"teacher": self.teacher.model} if with_teacher else {})
        ask = partial(self.signals, model, at=at, with_teacher=with_teacher)
        return Scene(models, ask, at, self.workspace.chunk or PIECE, measures or {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms to the Trainer's own training line, after checking that they sum to its loss."""
        if "loss" in logs:
            logs |= self.term_figures(logs["loss"]) | self.gradients
            self.gradients = {}
        super().log(logs, start_time)

    def term_figures(self, loss: float) -> dict[str, float]:
        """What is logged of the steps since the last call, whose mean loss this is."""
        figures = self.window.figures(partial(self.accelerator.reduce, reduction="sum"))
        tokens = float(self.accelerator.reduce(torch.tensor(float(self.tokens), device=self.args.device)))
        done = self._done(self.state.global_step - 1)
        if wrong := breach(figures, loss):
            raise RunError(f"step {self.state.global_step}: {wrong}")
        self.window, self.tokens = LedgerWindow(), 0
        return {
            **{f"{name}_loss": value for name, (value, _) in figures.items()},
            **{f"{name}_weight": weight for name, (_, weight) in figures.items()},
            **{name: course(done) for name, course in self.objective.temperature_schedules.items()},
            f"{self.counted}_per_s": tokens / max(self.throughput.drain(), 1e-9),
            "memory_gib": memory_gib(self.args.device),
        }

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The same objective with the weights of this step, and the measures that do not depend on them."""
        model, rows = self.accelerator.unwrap_model(self.model), []
        at = self.objective.at(self._done(self.state.global_step), sampled=False)
        measures = {
            name: f
            for name, f in EVAL_TERMS.items()
            if self.teacher is not None or name in ("ce", "accuracy")
        }
        said = []  # of rows with a class: (answer, right answer)
        model.eval()
        for batch in dataloader:
            with torch.no_grad(), self.accelerator.autocast():
                tokens, student, teacher = self.signals(
                    model, self._prepare_inputs(batch), at, with_teacher=self.teacher is not None
                )
                sums = row_sums(
                    student,
                    teacher,
                    tokens.targets,
                    tokens.rows,
                    row_count=len(batch["labels"]),
                    terms=measures,
                    at=at,
                    chunk=self.workspace.chunk_for(student),
                )
            # drops repeated rows
            rows.append(self.accelerator.gather_for_metrics(torch.stack(list(sums.values()), dim=1)))
            if batch["labels"].ndim == 1:
                said.append(
                    self.accelerator.gather_for_metrics(
                        torch.stack([student.logits().argmax(-1), tokens.targets], dim=1)
                    )
                )
        rows = torch.cat(rows).cpu()
        *totals, count = rows.double().sum(0).tolist()
        means = {name: total / max(count, 1) for name, total in zip(sums, totals, strict=False)}
        if not all(map(math.isfinite, means.values())):
            row = int((~rows.isfinite()).any(1).nonzero()[0, 0])
            self.stop(
                self.scene(at, measures),
                [self.asked(dataloader.dataset[row])],
                step=self.state.global_step,
                stage="evaluation",
                rows=dataloader.dataset,
            )
        figures = {"loss": sum(weight * means[name] for name, weight in at.weights.items())}
        figures |= {f"{name}_loss": means[name] for name in at.weights}
        figures |= {f"{name}_weight": weight for name, weight in at.weights.items()}
        figures |= {name: means[name] for name in measures if name != "ce"}
        if said:
            from sklearn.metrics import f1_score  # takes a second, and rows with a class alone need it

            answers, right = torch.cat(said).T.cpu().numpy()
            figures |= {
                "log_loss": means["ce"],
                "macro_f1": float(f1_score(right, answers, average="macro", zero_division=0.0)),
            }
        else:
            figures["perplexity"] = math.exp(min(means["ce"], 700.0))
        figures |= (
            {} if self.choices is None else {"choice_accuracy": self._choice_accuracy(model, self.choices)}
        )
        past = [line["eval_loss"] for line in self.state.log_history if "eval_loss" in line]
        figures["min_loss"] = min([*past, figures["loss"]])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _choice_accuracy(self, model, rows: Dataset) -> float:
        """The share of questions whose right choice scores highest by the length-normalised likelihood."""
        parts, plain = [], ObjectiveAt({}, {})
        for batch in self.get_test_dataloader(rows):  # in the order of the rows; repeated ones are dropped
            with torch.no_grad(), self.accelerator.autocast():
                tokens, student, _ = self.signals(
                    model, self._prepare_inputs(batch), plain, with_teacher=False
                )
                sums = row_sums(
                    student,
                    None,
                    tokens.targets,
                    tokens.rows,
                    row_count=len(batch["labels"]),
                    terms=SCORE,
                    chunk=self.workspace.chunk_for(student),
                )
            parts.append(self.accelerator.gather_for_metrics(-sums["ce"]))
        scores = torch.cat(parts).double().cpu()
        if not scores.isfinite().all():
            row = rows[int((~scores.isfinite()).nonzero()[0, 0])]
            self.stop(
                self.scene(plain, SCORE),
                [self.asked(row)],
                step=self.state.global_step,
                stage="evaluation",
                rows=rows,
            )
        return choice_accuracy(rows, scores.numpy())

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluates, and keeps the student in best_model/ when its metric beats all earlier ones of this
        training.
        """
        metrics = super().evaluate(*args, **options)
        key, sign = best_metric(self.args), 1 if self.args.greater_is_better else -1
        if self.is_in_train:
            *earlier, latest = [sign * line[key] for line in self.state.log_history if key in line]
            if all(latest > value for value in earlier):
                self.save_student(self.folder.best_model)
        return metrics

    def save_student(self, folder: Path) -> None:
        """The student and its tokenizer as safetensors, all or nothing, loadable by `from_pretrained`."""
        self.check_weights()
        model = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        state = {name: value for name, value in state.items() if not name.startswith(PROJECTIONS)}
        if not self.is_world_process_zero():
            return
        half_made = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(half_made, ignore_errors=True)
        model.save_pretrained(half_made, state_dict=state)
        self.processing_class.save_pretrained(half_made)
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)
