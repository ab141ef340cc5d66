"""What a config's `training:` may hold: transformers' TrainingArguments, by their own names and types."""

import ast
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kdlib.config.sections import read_beside, statements
from kdlib.errors import nearest, printable
from kdlib.schedulers import normal, sampled

TRAINING_DEFAULTS = {"report_to": "none", "save_total_limit": 3, "logging_steps": 10}  # not transformers' own
RESERVED: dict[str, str] = read_beside(__file__)
"""{a name that is not set here: why}"""
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


@cache
def scheduler_names() -> tuple[str, ...]:
    """The Trainer's own names of learning-rate schedules."""
    body = _body("trainer_utils.py", "SchedulerType")
    return tuple(ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))


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
    try:
        value = typed(name, value)
    except (OverflowError, TypeError, ValueError):
        return f"{name}: found {value!r}, needs {training_fields()[name]}"
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
    if not isinstance(training.get("lr_scheduler_type"), Mapping):
        return []
    advice = {
        "warmup_steps": WARM_UP,
        "warmup_ratio": WARM_UP,
        "lr_scheduler_kwargs": "a schedule does not read it",
    }
    return [
        f"{name}: found {training[name]!r} beside a schedule as lr_scheduler_type; {why}; leave {name} out"
        for name, why in advice.items()
        if training.get(name)
    ]


def typed(name: str, value: Any) -> Any:
    """The value in its field's type; TrainingArguments itself would take `learning_rate="abc"`."""
    if name == "lr_scheduler_type" and isinstance(value, Mapping):
        return normal(value)
    kinds = set(training_fields()[name].split(" | "))
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
