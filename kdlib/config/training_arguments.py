"""What a config's `training:` may hold: transformers' TrainingArguments, by their own names and types."""

import ast
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kdlib.config.sections import number, read_beside
from kdlib.config.terms import statements
from kdlib.errors import nearest, printable
from kdlib.schedulers import normal, sampled

TRAINING_DEFAULTS = {"report_to": "none", "save_total_limit": 3, "logging_steps": 10}  # not transformers' own
RESERVED: dict[str, str] = read_beside(__file__)
"""{a name that is not set here: why}"""
INTERVALS = ("trainer_utils.py", "IntervalStrategy")
ENUMERATIONS = {
    "eval_strategy": INTERVALS,
    "logging_strategy": INTERVALS,
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
    "optim": ("training_args.py", "OptimizerNames"),
}
WORDS = {"yes": True, "on": True, "no": False, "off": False}  # texts in YAML 1.2, switches to most people
LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
CHOICES = {
    "log_level": LEVELS,
    "log_level_replica": LEVELS,
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
LEAST: dict[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "torch_empty_cache_steps"), 1),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), 1),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon"), 0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "eval_delay", "save_total_limit", "eval_steps"), 0),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), 0),
}
MAPPINGS = {
    "lr_scheduler_kwargs": "{num_cycles: 2}",
    "fsdp_config": "{reshard_after_forward: true}",
} | dict.fromkeys(
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), "{use_reentrant: false}"
)
READ_BY: dict[str, tuple[str, ...]] = {  # optim_args by optimizer, as in transformers' trainer_optimizer.py
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor"), ()),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
OF_WORKERS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
ABOVE_0 = ("num_train_epochs", "logging_steps", "save_steps")
REFUSED_OPTIMIZERS = {  # what a name contains: why
    "lomo": "it changes weights in the backward pass, before a step can be looked at",
    "layerwise": "it changes weights in the backward pass, before a step can be looked at",
    "schedule_free": "the weights that it evaluates are others than those that it trains",
}
OF_FSDP = {  # what is not to be set in fsdp_config: why
    "version": "FSDP2 alone is here",
    "xla": "XLA is not tried here",
    "cpu_ram_efficient_loading": "each rank reads its part of the teacher alone, and makes the student whole",
}
WARM_UP = (
    "the schedule is all of it; write the warm-up as its first part, as "
    "{joined: [[0.1, {linear: [0, 1]}], [1.0, {cosine: [1, 0]}]]}"
)


@cache
def training_fields() -> dict[str, str]:
    """TrainingArguments' own field names with their annotations."""
    return {
        name: ast.unparse(node.annotation)
        for node in _body("training_args.py", "TrainingArguments")
        if isinstance(node, ast.AnnAssign) and not (name := ast.unparse(node.target)).startswith("_")
    }


def scheduler_names() -> tuple[str, ...]:
    """The Trainer's own names of learning-rate schedules."""
    return _members("trainer_utils.py", "SchedulerType")


@cache
def _members(file: str, name: str) -> tuple[str, ...]:
    """The values of an enumeration of transformers'."""
    values = [node.value for node in _body(file, name) if isinstance(node, ast.Assign)]
    return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


def _choices(name: str) -> tuple[str, ...]:
    """What a field may say, where it is one of a few words."""
    return CHOICES[name] if name in CHOICES else _members(*ENUMERATIONS[name]) if name in ENUMERATIONS else ()


def _body(file: str, name: str) -> list[ast.stmt]:
    """What a class of transformers' is made of, read from its source."""
    classes = [node for node in statements("transformers", file) if isinstance(node, ast.ClassDef)]
    return next(found.body for found in classes if found.name == name)


def problem_with(name: str, value: Any, metrics: Sequence[str] = ()) -> str | None:
    """What is wrong with this name or value, in one line, or None; `metrics` may choose the best model."""
    if name in RESERVED:
        return f"{name}: not set here: {RESERVED[name]}"
    if name not in training_fields():
        return f"{printable(name)}: TrainingArguments has no such name{nearest(name, training_fields())}"
    if name == "lr_scheduler_type":
        return _problem_with_rate(name, value)
    if name in MAPPINGS and isinstance(value, str):
        return f"{name}: found the text {value!r}; needs a mapping, as {MAPPINGS[name]}"
    try:
        value = typed(name, value)
    except (OverflowError, TypeError, ValueError):
        return f"{name}: found {value!r}, needs {training_fields()[name]}"
    return _problem_with_value(name, value, metrics)


def _problem_with_value(name: str, value: Any, metrics: Sequence[str]) -> str | None:
    """Likewise, of a value that has its field's type."""
    if (known := _choices(name)) and value is not None and value not in known:
        return f"{name}: found {value!r}{nearest(str(value), known)}; it is one of {', '.join(known)}"
    if name == "optim":
        for part, why in REFUSED_OPTIMIZERS.items():
            if part in value:
                return f"{name}: {value} is not supported: {why}; take another, as adamw_torch_fused"
    if name == "max_steps" and value < 1 and value != -1:
        return f"{name}: found {value}, needs 1 or more, or -1 to go by num_train_epochs"
    if value is not None and name in ABOVE_0 and value <= 0:
        return f"{name}: found {value:g}, needs more than 0"
    if value is not None and name in LEAST and value < LEAST[name]:
        return f"{name}: found {value:g}, needs {LEAST[name]:g} or more"
    if name == "metric_for_best_model" and str(value).removeprefix("eval_") not in metrics:
        return f"{name}: found {value!r}{nearest(str(value), metrics)}; it is one of {', '.join(metrics)}"
    if name == "save_total_limit" and value == 1:
        why = "with 1 the Trainer deletes the newest checkpoint when an older one is better"
        return f"{name}: found 1, needs 2 or more: {why}"
    if name == "save_strategy" and value == "best":
        why = "checkpoints are for going on, and best_model/ is kept anyway"
        return f"{name}: found 'best', needs steps, epoch or no: {why}"
    return None


def _problem_with_rate(name: str, value: Any) -> str | None:
    """The learning rate follows one of the Trainer's names, or a schedule that multiplies `learning_rate`."""
    if not isinstance(value, Mapping):
        known = scheduler_names()
        if value in known:
            return None
        form = f"{', '.join(known)}, or a schedule that multiplies learning_rate, as {{cosine: [1, 0.1]}}"
        return f"{name}: found {value!r}{nearest(str(value), known)}; it is one of {form}"
    try:
        values = sampled(value)
    except ValueError as error:
        return f"{name}: {error}"
    if min(values) < 0 or not any(values):
        needed = "values of 0 or more, and not 0 throughout"
        return f"{name}: found {value}, which multiplies learning_rate; needs {needed}"
    return None


def clashes(training: Mapping[str, Any]) -> list[str]:
    """What does not go together, a line each: a schedule says all of the learning rate, warm-up and all."""
    faults = [
        f"{name}: found {training[name]!r} without a process that loads rows; set dataloader_num_workers to "
        f"1 or more, or leave {name} out"
        for name in OF_WORKERS
        if training.get(name) and not training.get("dataloader_num_workers")
    ]
    faults += [
        f"fsdp_config.{name}: found {value!r}, but {why}; leave it out"
        for name, value in (training.get("fsdp_config") or {}).items()
        if (why := OF_FSDP.get(name.removeprefix("fsdp_"))) and value not in (False, 2)
    ]
    optimizer = str(training.get("optim", "adamw_torch_fused"))
    for name in (each.partition("=")[0].strip() for each in (training.get("optim_args") or "").split(",")):
        if name and name not in (known := READ_BY.get(optimizer, (name,))):
            reads = f"{optimizer} reads {', '.join(known) or 'none'}"
            faults.append(f"optim_args: found {name!r}{nearest(name, known)}; {reads}; leave it out")
    if training.get("optim_target_modules") and not optimizer.startswith(("galore", "apollo")):
        needed = f"needs optim galore_… or apollo_…, found {optimizer}; leave it out"
        faults.append(f"optim_target_modules: {needed}")
    if not isinstance(training.get("lr_scheduler_type"), Mapping):
        return faults
    advice = {
        "warmup_steps": WARM_UP,
        "warmup_ratio": WARM_UP,
        "lr_scheduler_kwargs": "a schedule does not read it",
    }
    return faults + [
        f"{name}: found {training[name]!r} beside a schedule as lr_scheduler_type; {why}; leave {name} out"
        for name, why in advice.items()
        if training.get(name)
    ]


def switched(value: Any) -> Any:
    """True or false where the value is a word for it; else the value."""
    return WORDS.get(value, value) if isinstance(value, str) else value


def typed(name: str, value: Any) -> Any:
    """The value in its field's type; TrainingArguments itself would take `learning_rate="abc"`."""
    if name == "lr_scheduler_type" and isinstance(value, Mapping):
        return normal(value)
    if value is False and "no" in _choices(name):
        return "no"
    if name == "fsdp" and isinstance(value, bool):  # the words that it took once are not needed
        return value
    if isinstance(value, Mapping) and name == "lr_scheduler_kwargs":
        return {key: number(each) if isinstance(each, str) else each for key, each in value.items()}
    kinds = set(training_fields()[name].split(" | "))
    if kinds <= {"bool", "None"}:
        value = switched(value)
    if value is None:
        fits = "None" in kinds
    elif not kinds <= {"int", "float", "bool", "None"}:
        fits = isinstance(value, str) or not kinds <= {"str", "None"}
    elif "bool" in kinds or isinstance(value, bool):
        fits = isinstance(value, bool) and "bool" in kinds
    else:
        value = float(value)
        fits = math.isfinite(value) and (value.is_integer() or "float" in kinds)
        value = value if "float" in kinds or not fits else int(value)
    if not fits:
        raise ValueError(f"{value!r} is none of {', '.join(sorted(kinds))}")
    return value
