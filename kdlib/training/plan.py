"""What a config's training will be, known before it runs."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from kdlib.config.run import Config
from kdlib.config.task_rules import rules_of
from kdlib.config.terms import ROUTE_WEIGHTS, ROUTER
from kdlib.data.batches import Prepared, calibration_rows, reads_of
from kdlib.errors import ConfigError
from kdlib.hardware import precision_of, world_size
from kdlib.losses.buffers import Workspace
from kdlib.losses.features import Route
from kdlib.losses.objective import Objective
from kdlib.metrics.names import MEASURES
from kdlib.models.heads import ahead_by_rounding, check_causal
from kdlib.models.hooks import layers_of
from kdlib.models.loading import device_of
from kdlib.models.sharing import check_shards
from kdlib.models.teacher import router_weight
from kdlib.schedulers import Schedule, from_spec
from kdlib.training.trackers import check_installed

# what transformers, accelerate and torch raise for settings that they cannot follow
FAULTS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, ImportError)
FAULTS += (LookupError, OSError, RuntimeError, TypeError, ValueError)
RENAMED = {f"gradient_checkpointing{end}": f"activation_checkpointing{end}" for end in ("", "_kwargs")}
UNKNOWN_STEPS = 1000  # of a training whose rows are not known yet
DRY_RUN = {"save_strategy": "no", "logging_steps": 1, "eval_on_start": False, "report_to": "none"}
DRY_RUN |= {"fsdp": None}  # it is made by one process, which holds the models whole
WORTH_COMPILING = 4e9  # logits of a training; below it the compiler takes longer than it spares


@dataclass(frozen=True)
class Extent:
    """How long a training is, as the Trainer counts; None where it depends on rows that are not known."""

    rows: int | None  # of the training text
    batches: int | None  # of one pass over the text, on one device
    passes: float | None  # over the text
    steps: int | None  # optimizer steps of the whole training
    evaluations: int | None


def extent(args: TrainingArguments, rows: int | None, ranks: int | None = None) -> Extent:
    """How long a training on so many rows is, shared by so many ranks, or those of this process group.

    Raises:
        ConfigError: the rows make no batch, or there is none for some rank.
    """
    batches, per_pass, ranks = None, None, ranks or args.world_size
    if rows is not None:
        if rows < ranks:
            found = f"{rows} rows, needs one for each of {ranks} processes"
            raise ConfigError(f"training: found {found}; lower launch.processes, or give more rows")
        share = rows / (args.train_batch_size * ranks)
        batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
        if args.dataloader_drop_last and batches == 0:
            found = f"{rows} rows make no whole batch of {args.train_batch_size} on each of {ranks}"
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
    given = {RENAMED.get(name, name): value for name, value in deepcopy(config.training).items()}
    if (world_size() or 1) == 1:
        given.pop("ddp_backend", None)  # ranks that are not there cannot be reached by it
    try:
        args = TrainingArguments(**{**given, **fixed, **changes})
    except FAULTS as error:
        raise ConfigError(f"training: transformers refuses these arguments: {error}") from error
    if config.teacher and config.teacher.device:  # a second GPU, the teacher's: no reason for DataParallel
        args._n_gpu = min(args.n_gpu, 1)
    check_installed(args.report_to or ())
    if args.torch_compile and (terms := config.loss.feature_terms):
        why = f"{', '.join(terms)} look inside layers, which compiled ones do not show; leave one of them out"
        raise ConfigError(f"training.torch_compile: {why}")
    return args


def try_out(args: TrainingArguments, rows: int | None = None) -> None:
    """Make on a toy model what the arguments configure, so that what cannot be made fails before a load.

    Optimizer, schedule, loader, checkpointing and compiler, each with one step; it takes a moment.

    Args:
        rows: of the training text, where they are known.

    Raises:
        ConfigError: one of them cannot be made here; the message names the settings.
    """
    steps = extent(args, rows).steps or UNKNOWN_STEPS
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        toy_args, batch = copy(args), {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
        toy, toy_args.output_dir, toy_args.report_to = _toy(), folder, []
        toy_args.full_determinism, toy_args.torch_compile, toy_args.torch_compile_backend = False, False, None
        toy_args.fsdp, toy_args.fsdp_plugin_args = None, None  # which several processes share
        with _named("training"):
            row = {name: values[0] for name, values in batch.items()}
            made = [row] * args.train_batch_size
            trainer = Trainer(model=toy, args=toy_args, train_dataset=made, eval_dataset=made)
        with _named(f"training.dataloader_* ({args.dataloader_num_workers} workers)"):
            trainer.get_train_dataloader()
        kind, optim = SchedulerType(args.lr_scheduler_type).value, OptimizerNames(args.optim).value
        with _named(f"training.optim: {optim}"):
            optimizer = trainer.create_optimizer()
        with _named(f"training.lr_scheduler_type: {kind}, lr_scheduler_kwargs: {args.lr_scheduler_kwargs}"):
            schedule = trainer.create_scheduler(steps)
            if isinstance(schedule, LambdaLR):
                _ = [schedule.lr_lambdas[0](step) for step in (0, steps // 2, steps - 1)]
        with _named("training.activation_checkpointing_kwargs"):
            if args.activation_checkpointing:
                rest: Any = copy(args.activation_checkpointing_kwargs) or {}
                layers = {
                    "every_n_layers": rest.pop("every_n_layers", 1),
                    "offload": rest.pop("offload", False),
                }
                toy.activation_checkpointing_enable(rest or None, **layers)  # as the Trainer does
            batch = {name: values.to(args.device) for name, values in batch.items()}
            toy(**batch).loss.backward()
        with _named(f"training.optim: {optim}"):
            optimizer.step()
        if args.torch_compile:
            with _named("training.torch_compile"):
                compile_layers(_toy().to(args.device), args)(**batch).loss.backward()
        AcceleratorState._reset_state()  # it would keep what the toy had asked for: no FSDP


def compile_layers(model: Any, args: TrainingArguments) -> Any:
    """The model with each of its layers compiled in place, as `torch_compile` asks.

    The layers alone: what reads a head's input is hooked in for one forward pass, which a compiled whole
    would not see.
    """
    for layer in layers_of(model):
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return model


def _toy() -> Any:
    """A language model of some hundred parameters, with the names of a real one's parts."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    sizes: dict[str, Any] = dict.fromkeys(names, 8)
    heads: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0))


@contextmanager
def _named(settings: str) -> Iterator[None]:
    """What cannot be made inside is a ConfigError that names these settings."""
    try:
        yield
    except FAULTS as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{settings}: cannot be made here: {said}; mend it, or leave it out") from error


def check_processes(args: TrainingArguments, ranks: int | None = None) -> None:
    """Raises a ConfigError where one process is to share a model with others; `ranks` as in `extent`."""
    if args.fsdp and (ranks or args.world_size) == 1:
        needed = "needed are several, by --processes N or `torchrun --nproc_per_node N -m kdlib train RUN`"
        raise ConfigError(f"training.fsdp: found {args.fsdp!r} with one process; {needed}; or leave fsdp out")
    if args.fsdp:
        check_shards(args.device)


def check_causality(
    config: Config, prepared: Prepared, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> dict[str, tuple[float, float]]:
    """See that no model looks ahead, where tokens are predicted: {who: (how much, what rounding may do)}.

    Raises:
        ModelError: one does.
    """
    if prepared.first_rows(1)["labels"].ndim == 1:  # rows are classified: nothing lies ahead
        return {}
    source, name = config.student.source, config.teacher and config.teacher.model
    ours = f"the student, made from {name}," if source == "teacher" else f"the student {source}"
    names = {"teacher": f"the teacher {name}", "student": ours}
    models = {"teacher": teacher, "student": student}
    rows = {who: calibration_rows(prepared.train, 1, reads=reads_of(who)) for who in models}
    return {
        who: (check_causal(names[who], model, rows[who]), ahead_by_rounding(model))
        for who, model in models.items()
        if model
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
    course, route = {name: from_spec(spec) for name, spec in specs.items()}, loss.features.route
    if route and "hidden" in course:
        more = {name: from_spec(specs.get(name, weight)) for name, weight in ROUTE_WEIGHTS.items()}
        course |= {name: _beside(course["hidden"], weight) for name, weight in more.items()}
    return Objective(
        weights=course,
        temperature=from_spec(loss.temperature) if loss.has_one_temperature else each,
        divergence=loss.divergence,
        top_k=None if loss.top_k is None else from_spec(loss.top_k),
        renormalise=loss.top_k_tail == "renormalise",
        samples=loss.samples,
        normalise=loss.features.normalise,
        layers=f"layers {loss.features.fixed}",
        route=Route(*map(from_spec, (route.top_k, route.temperature, route.noise))) if route else None,
    )


def _beside(hidden: Schedule, weight: Schedule) -> Schedule:
    """A gate's own term counts while there is a gate: while hidden states are compared."""
    return lambda fraction: weight(fraction) if hidden(fraction) else 0.0


def workspace_of(config: Config, args: TrainingArguments, rows: int | None, vocabulary: int) -> Workspace:
    """The losses' workspace; `compile: auto` compiles the row arithmetic of a training that repays it."""
    tokens = 1 if rules_of(config).unit == "row" else config.data.max_length  # predicted, of a row
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * tokens
    repays = (extent(args, rows).steps or 0) * step * vocabulary > WORTH_COMPILING
    chunk = None if config.loss.chunk == "auto" else config.loss.chunk
    compiled = repays if config.loss.compile == "auto" else config.loss.compile
    return Workspace(chunk, compiled=compiled, vocabulary=vocabulary)
