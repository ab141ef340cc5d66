"""transformers' Trainer with kdlib's objective in it, writing a student's folder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from kdlib.cache.teacher import CachedTeacher, CacheTrainer
from kdlib.data.batches import Figures, perplexity, units_of_rows
from kdlib.errors import RunError
from kdlib.hardware import memory_gib
from kdlib.losses.alignment import SPANS, UNITS, Counts, TeacherSignal, counted, unit_of, with_kept
from kdlib.losses.buffers import PIECE, Workspace
from kdlib.losses.chunked import Weighted
from kdlib.losses.features import LayerPairs
from kdlib.losses.ledger import LedgerWindow, breach
from kdlib.losses.objective import EVAL_TERMS, Objective, ObjectiveAt, eval_terms, ledger, row_sums, values_of
from kdlib.losses.signals import FOUND, Form, Kept, Signal, kept
from kdlib.metrics.multiple_choice import answered_rightly
from kdlib.models.heads import head_form
from kdlib.models.saved import mean_of_first
from kdlib.models.teacher import LET_GO, LiveTeacher, form_error, idle, insides, signal_of
from kdlib.routing.learning import RoutingTrainer
from kdlib.runs.files import StudentFolder
from kdlib.runs.verdict import keep_units
from kdlib.schedulers import Schedule
from kdlib.training.callbacks import PrintedLines, Throughput, WholeLog, loss_at_best, scores
from kdlib.training.gradients import gradient_figures, shares, term_gradients, weights_of
from kdlib.training.nan_guard import GuardedTrainer
from kdlib.training.nan_search import Batch, Replay
from kdlib.training.trackers import MetricsFile


class DistillationTrainer(CacheTrainer, RoutingTrainer, GuardedTrainer):
    """A Trainer whose loss is an Objective's ledger, in training and in evaluation.

    Every term is divided by the kept tokens of the whole optimizer step, all micro-batches and ranks: batch
    8 x accumulation 1 equals 1 x 8, and one rank equals two.
    """

    loss_is_scaled_for_ga = True  # gradient accumulation: the Trainer divides no more
    objective: Objective
    teacher: LiveTeacher | CachedTeacher | None
    choices: Dataset | None

    def __init__(
        self,
        *,
        objective: Objective,
        teacher: LiveTeacher | CachedTeacher | None,
        vocabulary: int,
        folder: StudentFolder,
        workspace: Workspace | None = None,
        layer_pairs: LayerPairs = (),
        learning_rate_schedule: Schedule | None = None,
        label: str = "",
        dense: bool = False,
        last_step: int | None = None,
        grad_norms_every: int | None = None,
        figures: Figures = perplexity,
        choices: Dataset | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            learning_rate_schedule: multiplies the learning rate, in place of `lr_scheduler_type`.
            dense: compute all logits at once: the slow reference.
            last_step: shown as the end where training will be stopped before the schedule's.
            grad_norms_every: so many steps apart, measure each term's gradient by itself, on the first
                micro-batch (of the first rank): one more forward pass, a backward pass per term.
            figures, choices: see kdlib.data.batches.Prepared; choices are scored at every evaluation.
        """
        super().__init__(folder=folder, **options)
        self.data_collator = partial(with_kept, self.data_collator)
        if self.args.n_gpu > 1:
            raise RunError(
                f"{self.args.n_gpu} GPUs in one process divide the loss by a wrong count (DataParallel); use "
                "`torchrun --nproc_per_node N -m kdlib train RUN`, or show one GPU by CUDA_VISIBLE_DEVICES=0"
            )
        if self.args.fsdp and not self.accelerator.is_fsdp2:
            found = self.accelerator.distributed_type
            raise RunError(f"training.fsdp: accelerate shards nothing here ({found})")
        self.objective, self.teacher, self.vocabulary = objective, teacher, vocabulary
        self.workspace, self.layer_pairs = workspace or Workspace(), layer_pairs
        self.learning_rate_schedule, self.figures, self.choices = learning_rate_schedule, figures, choices
        self.form = None if dense else head_form(self.model)
        self.window, self.throughput, self.tokens, self.counted = LedgerWindow(), Throughput(), 0, "tokens"
        self.grad_norms_every, self.gradients = grad_norms_every, dict[str, float]()
        self.span_counts: tuple[Tensor, ...] = ()  # of the step: spans, and those of one token of both
        self.count: Tensor | int | Counts = 0  # what the step's terms are divided by
        how = str(self.workspace) if self.form else "all at once"
        if not (self.form or dense or self.model.get_output_embeddings() is None):
            how += ": its head makes them by more than a matrix, a scale and a soft cap"
        lines = PrintedLines(label, f"the student's logits {how}", last_step=last_step)
        self.remove_callback(PrinterCallback)
        for callback in (MetricsFile(folder), lines, WholeLog(), self.throughput):
            self.add_callback(callback)
        if teacher is not None:
            teacher.to(self.args.device)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """One of kdlib.schedulers where given, else the Trainer's own."""
        if self.learning_rate_schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule, steps = self.learning_rate_schedule, max(num_training_steps, 1)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: schedule(step / steps))
        return self.lr_scheduler

    def done(self, step: int) -> float:
        """The fraction of training done before this optimizer step, counted from 0."""
        return step / max(self.state.max_steps, 1)

    def now(self) -> ObjectiveAt:
        """The objective of the optimizer step that is next."""
        return self.objective.at(self.done(self.state.global_step))

    def signals(
        self, model, batch: Batch, at: ObjectiveAt, *, with_teacher: bool | None = None
    ) -> tuple[Kept, Signal, TeacherSignal | None]:
        """The kept tokens of a batch, and what student and teacher say of them.

        Args:
            with_teacher: asked as it was made; None: as it teaches, where the objective needs one.
        """
        tokens, student = kept(batch["labels"], batch.get(FOUND)), self.accelerator.unwrap_model(model)
        ours, theirs = insides(at, self.layer_pairs, student)
        signal = signal_of(
            model, batch, tokens, vocabulary=self.vocabulary, form=self.form, unwrapped=student, inside=ours
        )
        if not (self.teacher and (at.needs_teacher if with_teacher is None else with_teacher)):
            return tokens, signal, None
        return tokens, signal, self.teacher(batch, tokens, theirs, teaches=with_teacher is None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The ledger's total for one micro-batch; `num_items_in_batch`: kept tokens of the whole step."""
        if num_items_in_batch is None:
            raise RunError(
                "the Trainer gave no num_items_in_batch, so the loss cannot be divided by the step's tokens: "
                f"use a model whose forward takes **kwargs, and {type(self.student).__name__}'s does not"
            )
        step, every = self.state.global_step, self.grad_norms_every
        at, is_first = self.now(), self.guard.begin(inputs, step)
        if is_first and every and (step + 1) % every == 0 and self.is_world_process_zero():
            self.gradients = self._gradient_figures(at)
        # accelerate wraps the model's forward only; the heads' products happen here
        with self.accelerator.autocast():
            tokens, student, teacher = self.signals(model, inputs, at)
            self.count = self.step_count(num_items_in_batch)
            book = ledger(student, teacher, tokens.targets, at=at, count=self.count, workspace=self.workspace)
        self.window.add(book, step)
        self.guard.end(book.total, num_items_in_batch)
        self.tokens += len(tokens.targets)
        self.counted = "tokens" if inputs["labels"].ndim == 2 else "rows"
        return book.total * self.accelerator.num_processes + idle(at, self.student)  # DDP takes the mean

    def step_count(self, tokens: Tensor | int) -> Tensor | int | Counts:
        """What the step's terms are divided by."""
        return Counts(tokens, *self.span_counts) if self.span_counts else tokens

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """The Trainer's count of the step's kept tokens, and of its spans."""
        if counts := [counted(batch[SPANS]) for batch in batch_samples if SPANS in batch]:
            self.span_counts = tuple(self.accelerator.reduce(torch.stack(counts).sum(0).to(device), "sum"))
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """The Trainer's, of one micro-batch; what it back-propagated is noted."""
        loss = super().training_step(*arguments, **options)
        self.window.went_back(loss / self.accelerator.num_processes)
        return loss

    def _gradient_figures(self, at: ObjectiveAt) -> dict[str, float]:
        """Of the micro-batch that has just begun; the step is not changed, and DDP not told."""
        micro_batch, scaler = self.guard.micro_batches[-1], self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0  # in float16 small gradients would be 0
        with micro_batch.replayed(), self.accelerator.autocast():
            tokens, ours, theirs = self.signals(self.student, micro_batch.inputs, at)
            terms = shares(ours, theirs, tokens.targets, at=at, chunk=self.workspace.chunk, scale=scale)
            return gradient_figures(term_gradients(terms, weights_of(self.student)), scale)

    def replay(
        self, at: ObjectiveAt | None = None, terms: Mapping[str, Weighted] | None = None, *, with_teacher=None
    ) -> Replay:
        """How a batch is asked once more: as in this step of training, or with an evaluation's terms."""
        at = at or self.now()
        asks = self.teacher and (at.needs_teacher if with_teacher is None else with_teacher)
        models = {"teacher": self.teacher.model} if self.teacher and self.teacher.model and asks else {}
        models["student"] = self.student  # last: a teacher that is its base has the same modules
        signals = partial(self.signals, self.student, at=at, with_teacher=with_teacher)
        chunk = self.workspace.chunk or PIECE
        return Replay(models, signals, partial(values_of, at=at, terms=terms or {}, chunk=chunk), chunk)

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """What this takes, a best model saved among it, is no time of the next step."""
        super()._maybe_log_save_evaluate(*args, **options)
        self.throughput.begin()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's training line with the terms, checked to sum to its loss."""
        if "loss" in logs:
            logs |= self.term_figures() | self.gradients
            self.gradients = {}
        super().log(logs, start_time)

    def term_figures(self) -> dict[str, float]:
        """What is logged of the steps since the last call: their mean loss and its terms."""
        over_ranks = partial(self.accelerator.reduce, reduction="sum")
        figures, loss = self.window.figures(over_ranks), self.window.loss(over_ranks)
        tokens = float(self.accelerator.reduce(torch.tensor(float(self.tokens), device=self.args.device)))
        if wrong := breach(figures, loss, self.window.tolerance):
            raise RunError(f"step {self.state.global_step}: {wrong}")
        self.window, self.tokens, done = LedgerWindow(), 0, self.done(self.state.global_step - 1)
        return {
            "loss": loss,
            **{f"{name}_loss": value for name, (value, _) in figures.items()},
            **{f"{name}_weight": weight for name, (_, weight) in figures.items()},
            **{name: schedule(done) for name, schedule in self.objective.logged_schedules.items()},
            f"{self.counted}_per_s": tokens / max(self.throughput.drain(), 1e-9),
            **(self.count.figures if isinstance(self.count, Counts) else {}),
            **(self.routing.figures(over_ranks) if self.routing else {}),
            "memory_gib": memory_gib(self.args.device),
        }

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The objective with the weights of this step, and the terms that do not depend on them."""
        with_teacher = self.teacher is not None
        at = self.objective.at(self.done(self.state.global_step), sampled=False)
        terms = eval_terms(self.teacher)
        sums, answers = self._row_sums(dataloader, at, terms, with_teacher=with_teacher)
        keep = partial(keep_units, self.folder, self.state.global_step, writes=self.is_world_process_zero())
        keep({n: sums[n] for n in (*terms, *UNITS) if n in sums}, units_of_rows(dataloader.dataset))
        self.first_rows_ce = mean_of_first(sums)
        counts = {unit: max(float(sums.pop(unit).sum()), 1.0) for unit in UNITS if unit in sums}
        means = {n: float(v.sum()) / counts[unit_of(n, spans="spans" in counts)] for n, v in sums.items()}
        figures = {"loss": sum(weight * means[name] for name, weight in at.weights.items())}
        figures |= {f"{name}_loss": means[name] for name in at.weights}
        figures |= {f"{name}_weight": weight for name, weight in at.weights.items()}
        figures |= {name: means[name] for name in terms if name != "ce"}
        figures |= self.figures(means, None if answers is None else answers.numpy())
        if self.choices is not None:  # in the order of the rows; repeated ones are dropped
            loader, ce = self.get_test_dataloader(self.choices), {"ce": EVAL_TERMS["ce"]}
            nats, _ = self._row_sums(loader, ObjectiveAt({}, {}), ce, with_teacher=False)
            keep(said := answered_rightly(self.choices, -nats["ce"].numpy()))
            figures["choice_accuracy"] = float(said["choice_accuracy"].mean())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics["eval_min_loss"] = loss_at_best(self.args, [*self.state.log_history, metrics])
        return EvalLoopOutput(np.empty(0), None, metrics=metrics, num_samples=len(sums["ce"]))

    def _row_sums(
        self, loader: DataLoader, at: ObjectiveAt, terms: Mapping[str, Weighted], *, with_teacher: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every term's sum over each row of the data, all ranks'; of classes also [rows, 2] (said, right)."""
        self.student.eval()
        parts, answers, summed = [], [], partial(row_sums, at=at, terms=terms)
        gather = self.accelerator.gather_for_metrics  # without rows that were repeated to fill a batch
        for number, batch in enumerate(loader):
            with torch.no_grad(), self.accelerator.autocast():
                batch = self._prepare_inputs(batch)
                if number == 0 and self.form:
                    self._check_form(batch, self.form)
                tokens, student, teacher = self.signals(self.student, batch, at, with_teacher=with_teacher)
                count, chunk = len(batch["labels"]), self.workspace.chunk_for(student)
                sums = summed(student, teacher, tokens.targets, tokens.rows, row_count=count, chunk=chunk)
            parts.append(gather(torch.stack([*sums.values()], dim=1)))
            if batch["labels"].ndim == 1:
                answers.append(gather(torch.stack([student.logits().argmax(-1), tokens.targets], dim=1)))
        rows = torch.cat(parts).cpu()
        if not rows.isfinite().all():
            row = int((~rows.isfinite()).any(1).nonzero()[0, 0])
            asked = [self.micro_batch_of(loader.dataset[row])]
            replay = self.replay(at, terms, with_teacher=with_teacher)
            self.stop(replay, asked, step=self.state.global_step, stage="evaluation", rows=loader.dataset)
        return dict(zip(sums, rows.double().T, strict=True)), torch.cat(answers).cpu() if answers else None

    def _check_form(self, batch: Batch, form: Form) -> None:
        if form_error(self.student, batch, vocabulary=self.vocabulary, form=form) > 1:
            print(f"step {self.state.global_step}: {type(self.student).__name__}: {LET_GO}", flush=True)
            self.form = None

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluates, and keeps in best_model/ the student whose metric beats all earlier of this training."""
        metrics = super().evaluate(*args, **options)
        if self.is_in_train:
            # by this the saved student is known again; no figure of the run, so not logged
            self.state.log_history[-1]["first_rows_ce"] = self.first_rows_ce
            *earlier, latest = scores(self.args, self.state.log_history)
            if all(latest > value for value in earlier):
                self.save_student(self.folder.best_model)
        return metrics
