"""Training: transformers' Trainer with kdlib's objective in it, writing a student's folder."""

import math
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kdlib.arguments import HIGHER_IS_BETTER
from kdlib.callbacks import LogBeforeSave, MetricsFile, PrintedLines, StopAfter, StopRequest, Throughput, is_better, memory_gib
from kdlib.checkpoints import check_disk, disk_is_full, last_checkpoint, step_of
from kdlib.config import Config
from kdlib.data import TokenBlocks, collate
from kdlib.diagnostics.ledger import LedgerWindow
from kdlib.errors import ConfigError, KdlibError, NonFiniteLoss, RunError
from kdlib.models import device_of, has_plain_head, parameters, precision_of
from kdlib.objective import MEASURES, Moment, Objective, ledger, row_sums
from kdlib.runs import StudentFolder, cut_metrics, history, is_refusal, read_json, write_error, write_json
from kdlib.schedulers import from_spec
from kdlib.signals import Kept, Signal, kept
from kdlib.teachers import LiveTeacher, signal_of

DRY_RUN = {"save_strategy": "no", "logging_steps": 1, "eval_on_start": False, "report_to": "none"}
TRACKERS = {"wandb", "tensorboard", "trackio"}
SUM_TOLERANCE = 1e-5  # relative; between the loss that was back-propagated and the sum of its logged terms


class DistillationTrainer(Trainer):
    """A Trainer whose loss is an Objective's ledger, in training and in evaluation.

    Every term is divided by the kept tokens of the whole optimizer step, all micro-batches and ranks, which is what makes
    batch 8 x accumulation 1 equal 1 x 8, and one rank equal two.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *, objective: Objective, teacher: LiveTeacher | None, vocabulary: int, chunk: int, folder: StudentFolder,
        label: str = "", dense: bool = False, last_step: int | None = None, **options: Any,
    ) -> None:
        """The teacher may be None where no term needs it; `dense` computes all logits at once: the slow reference;
        `last_step` is shown as the end where training will be stopped before the schedule's.
        """
        super().__init__(**options)
        if self.args.n_gpu > 1:
            raise RunError(
                f"{self.args.n_gpu} GPUs in one process would train by DataParallel, which divides the loss by the wrong "
                "count; use `torchrun --nproc_per_node N -m kdlib.cli train RUN`, or show one GPU by CUDA_VISIBLE_DEVICES=0"
            )
        self.remove_callback(PrinterCallback)
        self.objective, self.teacher, self.vocabulary, self.chunk, self.folder = objective, teacher, vocabulary, chunk, folder
        self.linear = not dense and has_plain_head(self.model) and not self.is_fsdp_enabled
        self.window, self.throughput, self.tokens = LedgerWindow(), Throughput(), 0
        for callback in (MetricsFile(folder), PrintedLines(label, last_step=last_step), LogBeforeSave(), self.throughput):
            self.add_callback(callback)
        if self.teacher is not None:
            self.teacher.model.to(self.args.device)

    @property
    def moment(self) -> Moment:
        """The objective at the optimizer step being made."""
        return self.objective.at(self.state.global_step / max(self.state.max_steps, 1))

    def signals(self, model, batch: Mapping[str, Tensor], *, with_teacher: bool) -> tuple[Kept, Signal, Signal | None]:
        """The kept tokens of a batch and what student and teacher said about them."""
        tokens = kept(batch["labels"])
        student = signal_of(
            model, batch, tokens, vocabulary=self.vocabulary, linear=self.linear, unwrapped=self.accelerator.unwrap_model(model)
        )
        return tokens, student, self.teacher(batch, tokens) if with_teacher else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The ledger's total for one micro-batch; `num_items_in_batch` is the whole optimizer step's token count."""
        if num_items_in_batch is None:
            raise RunError(
                "the Trainer gave no num_items_in_batch, so the loss cannot be divided by the step's tokens. It does so for "
                f"models whose forward takes **kwargs, and {type(self.accelerator.unwrap_model(model)).__name__}'s does not: "
                "use a model that does"
            )
        moment = self.moment
        with self.accelerator.autocast():  # accelerate wraps the model's forward only; the heads' products happen here
            tokens, student, teacher = self.signals(model, inputs, with_teacher=moment.needs_teacher)
            book = ledger(student, teacher, tokens.targets, moment=moment, count=num_items_in_batch, chunk=self.chunk)
        self.window.add(book, self.state.global_step)
        self.tokens += len(tokens.targets)
        return book.total * self.accelerator.num_processes  # DDP averages the ranks' gradients; their sum is what is meant

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms to the Trainer's own training line, after checking that they sum to its loss."""
        if "loss" in logs:
            logs |= self._term_figures(logs["loss"])
        super().log(logs, start_time)

    def _term_figures(self, loss: float) -> dict[str, float]:
        figures = self.window.figures(partial(self.accelerator.reduce, reduction="sum"))
        tokens = float(self.accelerator.reduce(torch.tensor(float(self.tokens), device=self.args.device)))
        moment = self.objective.at((self.state.global_step - 1) / max(self.state.max_steps, 1))
        total = sum(value * weight for value, weight in figures.values())
        if broken := [f"{name} = {value}" for name, (value, _) in figures.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(self._stopped(", ".join(broken)))
        if abs(total - loss) > SUM_TOLERANCE * max(abs(loss), abs(total)):
            terms = ", ".join(f"{name}: {value} x {weight}" for name, (value, weight) in figures.items())
            raise RunError(f"step {self.state.global_step}: the terms sum to {total}, but {loss} was back-propagated ({terms})")
        self.window, self.tokens = LedgerWindow(), 0
        return {
            **{f"{name}_loss": value for name, (value, _) in figures.items()},
            **{f"{name}_weight": weight for name, (_, weight) in figures.items()},
            "temperature": moment.temperature,
            "tokens_per_s": tokens / max(self.throughput.drain(), 1e-9),
            "memory_gib": memory_gib(self.args.device),
        }

    def _stopped(self, why: str) -> str:
        return (
            f"step {self.state.global_step}: {why}, so training has stopped; checkpoints are in {self.args.output_dir}. "
            "Usual causes: a learning rate too high, float16 overflow (precision: bfloat16)"
        )

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """The same objective with the weights of this step, and the measures that do not depend on them."""
        model, moment, rows = self.accelerator.unwrap_model(self.model), self.moment, []
        measures = {name: f for name, f in MEASURES.items() if self.teacher is not None or name in ("ce", "accuracy")}
        functions = {**dict(zip(moment.weights, moment.functions, strict=True)), **measures}  # ce is both, and made once
        model.eval()
        for batch in dataloader:
            with torch.no_grad(), self.accelerator.autocast():
                tokens, student, teacher = self.signals(model, self._prepare_inputs(batch), with_teacher=self.teacher is not None)
                sums = row_sums(student, teacher, tokens.targets, tokens.rows, row_count=len(batch["labels"]),
                                functions=list(functions.values()), chunk=self.chunk)
            rows.append(self.accelerator.gather_for_metrics(sums))  # drops the rows that a sampler repeated
        rows = torch.cat(rows).cpu()
        *sums, count = rows.double().sum(0).tolist()
        means = {name: value / max(count, 1) for name, value in zip(functions, sums, strict=True)}
        if broken := [f"{name} = {value}" for name, value in means.items() if not math.isfinite(value)]:
            raise NonFiniteLoss(self._stopped(f"on held-out text {', '.join(broken)}"))
        figures = {"loss": sum(weight * means[name] for name, weight in moment.weights.items())}
        figures |= {f"{name}_loss": means[name] for name in moment.weights}
        figures |= {f"{name}_weight": weight for name, weight in moment.weights.items()}
        figures |= {name: means[name] for name in measures if name != "ce"}
        figures["perplexity"] = math.exp(min(means["ce"], 700.0))
        past = [line["eval_loss"] for line in self.state.log_history if "eval_loss" in line]
        figures["min_loss"] = min([*past, figures["loss"]])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluates, and keeps the student in best_model/ when its metric beats all earlier ones of this training."""
        metrics = super().evaluate(*args, **options)
        key = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        if self.is_in_train:
            *earlier, latest = [line[key] for line in self.state.log_history if key in line]
            if is_better(latest, earlier, greater=bool(self.args.greater_is_better)):
                self.save_student(self.folder.best_model)
        return metrics

    def save_student(self, folder: Path) -> None:
        """The student and its tokenizer as safetensors, all or nothing, loadable by `from_pretrained`."""
        model = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_world_process_zero():
            return
        half_made = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(half_made, ignore_errors=True)
        model.save_pretrained(half_made, state_dict=state)
        self.processing_class.save_pretrained(half_made)
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)


def training_arguments(config: Config, output: Path, **changes: Any) -> TrainingArguments:
    """The config's `training:` section as TrainingArguments.

    Raises:
        ConfigError: transformers refuses the combination; its own words are in the message.
    """
    dtype, _ = precision_of(config)
    metric = config.training["metric_for_best_model"].removeprefix("eval_")
    fixed = {
        "output_dir": str(output), "seed": config.seed, "data_seed": config.seed, "logging_nan_inf_filter": False,
        "remove_unused_columns": False, "label_names": ["labels"], "disable_tqdm": True,
        "greater_is_better": HIGHER_IS_BETTER[metric], "use_cpu": device_of(config).type == "cpu",
        "dataloader_pin_memory": config.training.get("dataloader_pin_memory", device_of(config).type == "cuda"),
        "bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16,
    }
    try:
        args = TrainingArguments(**{**config.training, **fixed, **changes})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"training: transformers refuses these arguments: {error}") from error
    for tracker in TRACKERS.intersection(args.report_to):
        if find_spec(tracker) is None:
            raise ConfigError(f"training.report_to: {tracker} is not installed; run: pip install {tracker}")
    return args


def objective_of(config: Config, weights: Mapping[str, Any] | None = None) -> Objective:
    """The config's objective, or the same with other weights: the baseline."""
    specs = config.loss.weights if weights is None else weights
    weights = {name: from_spec(spec) for name, spec in specs.items()}
    loss = config.loss
    return Objective(weights, from_spec(loss.temperature), loss.divergence, loss.top_k, loss.top_k_tail == "renormalise")


def train(
    config: Config, folder: StudentFolder, *, student: PreTrainedModel, teacher: LiveTeacher, tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks, weights: Mapping[str, Any] | None = None, label: str = "", stop_after: int | None = None,
) -> DistillationTrainer:
    """Train one student into its folder, from its last checkpoint where there is one.

    Args:
        weights: in place of the config's: the baseline's.
        stop_after: a dry run of so many steps: no checkpoints, no models.

    Raises:
        RunError: stopped by an interrupt or a STOP file (a checkpoint is there), or the disk is full.
        NonFiniteLoss: a term became nan or infinite.
    """
    resume = last_checkpoint(folder)
    changes = DRY_RUN if stop_after else {"eval_on_start": False} if resume else {}  # that evaluation is in metrics.jsonl already
    args = training_arguments(config, folder.checkpoints, **changes)
    if not stop_after:
        check_disk(folder, weights=4 * parameters(student), args=args)
    try:
        if args.process_index == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            cut_metrics(folder, step_of(resume))
        trainer = DistillationTrainer(
            model=student, args=args, train_dataset=blocks.train, eval_dataset=blocks.validation, processing_class=tokenizer,
            data_collator=partial(collate, pad_id=tokenizer.pad_token_id), objective=objective_of(config, weights),
            teacher=teacher, vocabulary=len(tokenizer), chunk=config.loss.chunk, folder=folder, label=label,
            last_step=stop_after,
        )
        stop = StopRequest(folder)
        trainer.add_callback(StopAfter(stop_after) if stop_after else stop)
        with nullcontext() if stop_after else stop:
            _run(trainer, resume)
        if stop_after:
            return trainer
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise RunError(f"stopped at step {trainer.state.global_step} with a checkpoint; go on with --resume, or run this cell again")
        _finish(trainer, folder)
    except Exception as error:  # a full disk: torch, safetensors and tokenizers (a bare Exception) each have errors of their own
        if not isinstance(error, KdlibError) and (is_refusal(error) or disk_is_full(folder)):
            raise write_error(folder.path, error) from error
        raise
    return trainer


def _finish(trainer: DistillationTrainer, folder: StudentFolder) -> None:
    trainer.save_student(folder.final_model)
    if not folder.best_model.exists():  # no evaluation during training: the last is the best known
        trainer.save_student(folder.best_model)
    if trainer.is_world_process_zero():
        write_json(folder.history, history(folder))  # the last file: it says that training reached its end


def _run(trainer: DistillationTrainer, resume: str | None) -> None:
    state = read_json(Path(resume) / "trainer_state.json") if resume else None
    if state and state["global_step"] >= state["max_steps"]:  # killed after the last step: the Trainer would make one more
        trainer._load_from_checkpoint(resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
