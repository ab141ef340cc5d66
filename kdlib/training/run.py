"""One training from a config: its arguments and objective, resumed where it stopped, its files left
behind.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, KdlibError, Stopped
from kdlib.hardware import precision_of
from kdlib.losses.buffers import Workspace
from kdlib.losses.features import LayerPairs, feature_terms, layer_pairs, projections
from kdlib.losses.objective import Objective
from kdlib.metrics.names import MEASURES
from kdlib.models.loading import device_of, parameters
from kdlib.models.teacher import PROJECTIONS, LiveTeacher
from kdlib.runs.files import StudentFolder, is_refusal, read_json, write_error, write_json
from kdlib.runs.log import cut_metrics, history
from kdlib.schedulers import SHAPES, from_spec
from kdlib.training import nan_report, trackers
from kdlib.training.callbacks import EarlyStop, PlanFile, StopAfter, StopRequest
from kdlib.training.checkpoints import check_disk, disk_is_full, last_checkpoint, step_of
from kdlib.training.trainer import DistillationTrainer

DRY_RUN = {"save_strategy": "no", "logging_steps": 1, "eval_on_start": False, "report_to": "none"}
WORTH_COMPILING = 4e9  # logits of a training; below it the compiler takes longer than it spares


@dataclass(frozen=True)
class Extent:
    """How long a training is, counted as the Trainer counts; None where it depends on the rows and they
    are not known.
    """

    rows: int | None  # of the training text
    batches: int | None  # of one pass over the text, on one device
    passes: float | None  # over the text
    steps: int | None  # optimizer steps of the whole training
    evaluations: int | None


def extent(args: TrainingArguments, rows: int | None, *, devices: int | None = None) -> Extent:
    """How long a training on so many rows is; `devices` share it, those of this process group where None."""
    batches = per_pass = passes = None
    if rows is not None:
        share = rows / (args.train_batch_size * (devices or args.world_size))
        batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
        per_pass = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = (
        args.max_steps if args.max_steps >= 0 or not per_pass else math.ceil(args.num_train_epochs * per_pass)
    )
    if steps < 0:
        return Extent(rows, batches, None, None, None)
    if per_pass:
        passes = steps / per_pass
    return Extent(rows, batches, passes, steps, _evaluations(args, steps, passes))


def _evaluations(args: TrainingArguments, steps: int, passes: float | None) -> int | None:
    """How often a training evaluates; one that ends within a pass evaluates at that end too, if it does
    so by the epoch.
    """
    if args.eval_strategy.value == "epoch":
        return None if passes is None else math.ceil(passes) + bool(args.eval_on_start)
    if args.eval_strategy.value == "no":
        return int(args.eval_on_start)
    every = args.eval_steps or args.logging_steps
    return steps // max(math.ceil(steps * every) if every < 1 else int(every), 1) + bool(args.eval_on_start)


def training_arguments(config: Config, output: Path, **changes: Any) -> TrainingArguments:
    """The config's `training:` section as TrainingArguments.

    Raises:
        ConfigError: transformers refuses the combination; its own words are in the message.
    """
    dtype, _ = precision_of(config.precision, device_of(config.wanted_device))
    metric = config.training["metric_for_best_model"].removeprefix("eval_")
    fixed = {
        "output_dir": str(output),
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "greater_is_better": MEASURES[metric].higher_is_better,
        "use_cpu": device_of(config.wanted_device).type == "cpu",
        "dataloader_pin_memory": config.training.get(
            "dataloader_pin_memory", device_of(config.wanted_device).type == "cuda"
        ),
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if isinstance(config.training.get("lr_scheduler_type"), Mapping):
        fixed["lr_scheduler_type"] = "constant"  # the trainer follows the schedule itself
    try:
        args = TrainingArguments(**{**config.training, **fixed, **changes})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"training: transformers refuses these arguments: {error}") from error
    trackers.check_installed(args.report_to)
    return args


def objective_of(config: Config, weights: Mapping[str, Any] | None = None) -> Objective:
    """The config's objective, or the same with other weights: the baseline."""
    loss = config.loss
    specs = loss.schedules if weights is None else weights
    one = isinstance(loss.temperature, float) or next(iter(loss.temperature)) in SHAPES
    return Objective(
        weights={name: from_spec(spec) for name, spec in specs.items()},
        temperature=from_spec(loss.temperature)
        if one
        else {n: from_spec(spec) for n, spec in loss.temperatures(specs).items()},
        divergence=loss.divergence,
        top_k=None if loss.top_k is None else from_spec(loss.top_k),
        renormalise=loss.top_k_tail == "renormalise",
        samples=loss.samples,
        normalise=loss.features.normalise,
        layers=f"layers {loss.features.layers}",
    )


def workspace_of(config: Config, args: TrainingArguments, rows: int, vocabulary: int) -> Workspace:
    """The losses' workspace; `compile: auto` compiles the row arithmetic where the training is long
    enough to repay it.
    """
    predicted = 1 if config.task == "sequence-classification" else config.data.max_length  # in a row
    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * predicted
    repays = extent(args, rows).steps * tokens * vocabulary > WORTH_COMPILING
    chunk, compiled = config.loss.chunk, config.loss.compile
    return Workspace(None if chunk == "auto" else chunk, compiled=repays if compiled == "auto" else compiled)


def listen(
    config: Config, student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective
) -> LayerPairs:
    """The layers that feature terms compare; the student gets the projections that they need, trained with
    it, never saved in it.

    Raises:
        ConfigError: a model has no such layer.
    """
    terms = feature_terms(objective.weights)
    if not terms:
        return ()
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    try:
        pairs = layer_pairs(config.loss.features.layers, ours.num_hidden_layers, theirs.num_hidden_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    torch.manual_seed(config.seed)
    with student.device:
        made = projections(pairs, ours.hidden_size, theirs.hidden_size)
    if made and any(term.projected for term in terms):
        # no data, no conversion
        student.add_module(PROJECTIONS, made if student.dtype is torch.float32 else made.to(student.dtype))
    return pairs


def train(
    config: Config,
    folder: StudentFolder,
    *,
    student: PreTrainedModel,
    teacher: LiveTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    weights: Mapping[str, Any] | None = None,
    label: str = "",
    stop_after: int | None = None,
    dense: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    asked_by: StudentFolder | None = None,
) -> DistillationTrainer:
    """Train one student into its folder, from its last checkpoint where there is one.

    Args:
        teacher: None where no term needs one: a teacher's own stage.
        weights: in place of the config's: the baseline's.
        stop_after: a dry run of so many steps: no checkpoints, no models.
        dense: compute all logits at once: the slow reference.
        callbacks: told of the training beside its own.
        asked_by: the run that needs this one first: a STOP file there counts as well.

    Raises:
        ConfigError: a tracker cannot be told.
        Stopped: by an interrupt or a STOP file; a checkpoint is there.
        RunError: the disk is full.
        NonFiniteLoss: a value became nan or infinite; nan_report/ says which.
    """
    resume = last_checkpoint(folder)
    # that evaluation is in metrics.jsonl already
    changes = DRY_RUN if stop_after else {"eval_on_start": False} if resume else {}
    args = training_arguments(config, folder.checkpoints, **changes)
    told = [name for name in args.report_to if name in trackers.TRACKERS]
    # transformers' own callbacks serve the others
    args.report_to = [name for name in args.report_to if name not in told]
    trackers.check_key(told)
    if not stop_after:
        check_disk(folder, weights=4 * parameters(student), args=args)
    try:
        if args.process_index == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            cut_metrics(folder, step_of(resume))
            nan_report.put_aside(folder)
        objective = objective_of(config, weights)
        pairs = listen(config, student, teacher.model, objective) if teacher else ()
        if hasattr(student, PROJECTIONS) and args.ddp_find_unused_parameters is None:
            # DDP sees only its forward, and would take the projections for unused
            args.ddp_find_unused_parameters = False
        course = config.training.get("lr_scheduler_type")
        trainer = DistillationTrainer(
            model=student,
            args=args,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            processing_class=tokenizer,
            data_collator=prepared.collate,
            objective=objective,
            teacher=teacher,
            vocabulary=prepared.vocabulary,
            layer_pairs=pairs,
            workspace=workspace_of(config, args, len(prepared.train), prepared.vocabulary),
            learning_rate_schedule=from_spec(course) if isinstance(course, Mapping) else None,
            folder=folder,
            label=label,
            last_step=stop_after,
            grad_norms_every=config.diagnostics.grad_norms_every,
            dense=dense,
            choices=prepared.choices.get("validation"),
            callbacks=[*callbacks],
        )
        if (stops := config.early_stopping) and not stop_after:
            trainer.add_callback(EarlyStop(stops.patience, stops.min_delta))
        trainer.add_callback(PlanFile(folder, objective))
        stop = StopRequest(folder.path, folder.path.parent, *([asked_by.path] if asked_by else []))
        trainer.add_callback(StopAfter(stop_after) if stop_after else stop)
        tracking = trackers.Tracking(told, trackers.Subject(folder, label, _facts(config, objective)))
        trainer.add_callback(tracking)
        with nullcontext() if stop_after else stop, tracking:
            _run(trainer, resume)
        if stop_after:
            return trainer
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise Stopped(
                f"stopped at step {trainer.state.global_step} with a checkpoint; go on with --resume, or run "
                "this cell again"
            )
        _finish(trainer, folder)
    except Exception as error:
        # a full disk: torch, safetensors and tokenizers (a bare Exception) each have errors of their own
        if not isinstance(error, KdlibError) and (is_refusal(error) or disk_is_full(folder)):
            raise write_error(folder.path, error) from error
        raise
    return trainer


def _facts(config: Config, objective: Objective) -> dict[str, Any]:
    """What a tracker shows beside the figures."""
    formulas = dict.fromkeys(objective.at(fraction).formula for fraction in (0.0, 1.0))
    return {"formula": "  …  ".join(formulas), **config.as_dict()}


def _finish(trainer: DistillationTrainer, folder: StudentFolder) -> None:
    trainer.save_student(folder.final_model)
    if not folder.best_model.exists():  # no evaluation during training: the last is the best known
        trainer.save_student(folder.best_model)
    if trainer.is_world_process_zero():
        write_json(folder.history, history(folder))  # the last file: it says that training reached its end


def _run(trainer: DistillationTrainer, resume: str | None) -> None:
    state = read_json(Path(resume) / "trainer_state.json") if resume else None
    # killed after the last step: the Trainer would make one more
    if state and state["global_step"] >= state["max_steps"]:
        trainer._load_from_checkpoint(resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
