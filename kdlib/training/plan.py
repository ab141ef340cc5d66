"""What a config's training will be, known before it runs."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import ParallelMode

from kdlib.config.loss import ROUTER
from kdlib.config.run import Config
from kdlib.config.task_rules import rules_of
from kdlib.data.batches import Prepared, calibration_rows
from kdlib.errors import ConfigError
from kdlib.hardware import precision_of
from kdlib.losses.buffers import Workspace
from kdlib.losses.features import LayerPairs, feature_terms, layer_pairs, projections
from kdlib.losses.objective import Objective
from kdlib.metrics.names import MEASURES
from kdlib.models.causality import check_causal, rounding
from kdlib.models.loading import device_of
from kdlib.models.teacher import PROJECTIONS, router_weight
from kdlib.models.toy import FAULTS, make_all
from kdlib.schedulers import from_spec
from kdlib.training.trackers import check_installed

RENAMED = {f"gradient_checkpointing{end}": f"activation_checkpointing{end}" for end in ("", "_kwargs")}
UNKNOWN_STEPS = 1000  # of a training whose rows are not known yet
DRY_RUN = {"save_strategy": "no", "logging_steps": 1, "eval_on_start": False, "report_to": "none"}
WORTH_COMPILING = 4e9  # logits of a training; below it the compiler takes longer than it spares


@dataclass(frozen=True)
class Extent:
    """How long a training is, as the Trainer counts; None where it depends on rows that are not known."""

    rows: int | None  # of the training text
    batches: int | None  # of one pass over the text, on one device
    passes: float | None  # over the text
    steps: int | None  # optimizer steps of the whole training
    evaluations: int | None


def extent(args: TrainingArguments, rows: int | None) -> Extent:
    """How long a training on so many rows is, shared by the ranks of this process group.

    Raises:
        ConfigError: the rows make no batch.
    """
    batches = per_pass = None
    if rows is not None:
        share = rows / (args.train_batch_size * args.world_size)
        batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
        if batches == 0:
            found = f"{rows} rows make no whole batch of {args.train_batch_size} on each of {args.world_size}"
            do = "set it to false, lower per_device_train_batch_size, or give more rows"
            raise ConfigError(f"training.dataloader_drop_last: {found} device(s); {do}")
        per_pass = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps
    if steps < 0:
        if per_pass is None:
            return Extent(rows, batches, None, None, None)
        steps = math.ceil(args.num_train_epochs * per_pass)
    passes = steps / per_pass if per_pass else None
    return Extent(rows, batches, passes, steps, _evaluations(args, steps, passes))


def _evaluations(args: TrainingArguments, steps: int, passes: float | None) -> int | None:
    """By the epoch, a training that ends within a pass evaluates at that end too."""
    if args.eval_strategy == "epoch":
        return None if passes is None else math.ceil(passes) + bool(args.eval_on_start)
    if args.eval_strategy == "no":
        return int(args.eval_on_start)
    every = args.eval_steps or args.logging_steps
    return steps // max(math.ceil(steps * every) if every < 1 else int(every), 1) + bool(args.eval_on_start)


def training_arguments(config: Config, output: Path, **changes: Any) -> TrainingArguments:
    """The config's `training:` as TrainingArguments; a ConfigError where transformers refuses them.

    See `try_out` for what they configure.
    """
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    metric = MEASURES[config.training["metric_for_best_model"].removeprefix("eval_")]
    fixed = {
        "output_dir": str(output),
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "greater_is_better": metric.higher_is_better,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": config.training.get("dataloader_pin_memory", device.type == "cuda"),
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if isinstance(config.training.get("lr_scheduler_type"), Mapping):
        fixed["lr_scheduler_type"] = "constant"  # the trainer follows the schedule itself
    given = {RENAMED.get(name, name): value for name, value in config.training.items()}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        given.pop("ddp_backend", None)  # ranks that are not there cannot be reached by it
    try:
        args = TrainingArguments(**{**given, **fixed, **changes})
    except FAULTS as error:
        raise ConfigError(f"training: transformers refuses these arguments: {error}") from error
    check_installed(args.report_to or ())
    if args.torch_compile and (terms := config.loss.feature_terms):
        why = f"{', '.join(terms)} look inside layers, which compiled ones do not show; leave one of them out"
        raise ConfigError(f"training.torch_compile: {why}")
    return args


def try_out(args: TrainingArguments, rows: int | None = None) -> None:
    """Make on a toy what the arguments configure; `rows`: of the training text, where they are known.

    Raises:
        ConfigError: one of them cannot be made here (see kdlib.models.toy).
    """
    make_all(args, extent(args, rows).steps or UNKNOWN_STEPS)


def check_processes(args: TrainingArguments) -> None:
    """Raises a ConfigError where one process is to share a model with others."""
    if args.fsdp and args.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise ConfigError(
            f"training.fsdp: found {args.fsdp!r} with one process; needed are several, as by "
            "`torchrun --nproc_per_node N -m kdlib train RUN`, or leave fsdp out"
        )


def check_causality(
    config: Config, prepared: Prepared, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> dict[str, tuple[float, float]]:
    """See that no model looks ahead, where tokens are predicted: {who: (how much, what rounding may do)}.

    Raises:
        ModelError: one does.
    """
    if prepared.labels:
        return {}
    source, name = config.student.source, config.teacher.model
    ours = f"the student, made from {name}," if source == "teacher" else f"the student {source}"
    names = {"teacher": f"the teacher {name}", "student": ours}
    ids, models = calibration_rows(prepared.train, 1), {"teacher": teacher, "student": student}
    return {
        who: (check_causal(names[who], model, ids), rounding(model)) for who, model in models.items() if model
    }


def objective_of(
    config: Config, weights: Mapping[str, Any] | None = None, student: PreTrainedModel | None = None
) -> Objective:
    """The config's objective, or the same with other weights: the baseline.

    With the auxiliary loss of the student's router, where its config asks for it and the weights say nothing.
    """
    loss, specs = config.loss, config.loss.schedules if weights is None else weights
    if student is not None and (aux := router_weight(student)):
        specs = {**specs, **({} if ROUTER in specs else {ROUTER: aux})}
    each = {name: from_spec(spec) for name, spec in loss.temperatures(specs).items()}
    return Objective(
        weights={name: from_spec(spec) for name, spec in specs.items()},
        temperature=from_spec(loss.temperature) if loss.has_one_temperature else each,
        divergence=loss.divergence,
        top_k=None if loss.top_k is None else from_spec(loss.top_k),
        renormalise=loss.top_k_tail == "renormalise",
        samples=loss.samples,
        normalise=loss.features.normalise,
        layers=f"layers {loss.features.layers}",
    )


def workspace_of(config: Config, args: TrainingArguments, rows: int, vocabulary: int) -> Workspace:
    """The losses' workspace; `compile: auto` compiles the row arithmetic of a training that repays it."""
    predicted = 1 if rules_of(config).unit == "row" else config.data.max_length  # in a row
    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * predicted
    repays = (extent(args, rows).steps or 0) * tokens * vocabulary > WORTH_COMPILING
    chunk, compiled = config.loss.chunk, config.loss.compile
    return Workspace(None if chunk == "auto" else chunk, compiled=repays if compiled == "auto" else compiled)


def compared_layers(
    config: Config, student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective
) -> LayerPairs:
    """The layers that feature terms compare; the student gets the projections they need, never saved in it.

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
    if made and any(term.projected for term in terms):  # float32: without data (meta) no conversion is made
        student.add_module(PROJECTIONS, made if student.dtype is torch.float32 else made.to(student.dtype))
    return pairs
