"""What the config's `training:` section may hold: transformers' TrainingArguments, by their own names and types."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from kdlib.errors import nearest

# Where kdlib's default is not transformers' own.
TRAINING_DEFAULTS = {
    "report_to": "none", "save_total_limit": 3, "logging_steps": 10, "metric_for_best_model": "eval_perplexity",
}
HIGHER_IS_BETTER = {"perplexity": False, "kl_to_teacher": False, "agreement": True, "accuracy": True}
"""The metrics that may choose the best model: none depends on the loss's weights, which a curriculum moves."""
RESERVED = {
    "output_dir": "it is the run's folder",
    "seed": "write `seed:` at the top level",
    "data_seed": "write `seed:` at the top level",
    "bf16": "write `precision: bfloat16` at the top level",
    "fp16": "write `precision: float16` at the top level",
    "logging_nan_inf_filter": "it hides what should stop a run, and is always off here",
    "label_smoothing_factor": "the objective is kdlib's own; no term smooths labels",
    "label_names": "labels are kdlib's own",
    "remove_unused_columns": "columns are kdlib's own",
    "prediction_loss_only": "evaluation is kdlib's own",
    "resume_from_checkpoint": "resume with `kd run CONFIG --resume RUN`",
    "greater_is_better": "it follows from metric_for_best_model",
    "average_tokens_across_devices": "every term is divided by the tokens of all devices",
    "auto_find_batch_size": "it starts a training again in the middle of its ledger; set the batch size",
    "bf16_full_eval": "evaluation has the precision of training",
    "fp16_full_eval": "evaluation has the precision of training",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed; best_model/ and final_model/ are models alone",
    "load_best_model_at_end": "best_model/ and final_model/ are both kept",
}


@cache
def training_fields() -> dict[str, str]:
    """TrainingArguments' own field names with their annotations, read from its source so that torch stays unloaded."""
    source = Path(importlib.util.find_spec("transformers").submodule_search_locations[0]) / "training_args.py"
    body = next(node.body for node in ast.parse(source.read_text(encoding="utf-8")).body
                if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {n.target.id: ast.unparse(n.annotation) for n in body
            if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")}


def problem_with(name: str, value: Any) -> str | None:
    """What is wrong with this name or value, in one line, or None."""
    if name in RESERVED:
        return f"{name}: not set here: {RESERVED[name]}"
    if name not in training_fields():
        return f"{name}: TrainingArguments has no such name{nearest(name, training_fields())}"
    try:
        value = typed(name, value)
    except (OverflowError, TypeError, ValueError):
        return f"{name}: found {value!r}, needs {training_fields()[name]}"
    if name == "metric_for_best_model" and str(value).removeprefix("eval_") not in HIGHER_IS_BETTER:
        return f"{name}: found {value!r}{nearest(str(value), HIGHER_IS_BETTER)}; it is one of {', '.join(HIGHER_IS_BETTER)}"
    if name == "save_total_limit" and value == 1:
        return f"{name}: found 1, needs 2 or more: with 1 the Trainer deletes the newest checkpoint when an older one is better"
    if name == "save_strategy" and value == "best":
        return f"{name}: found 'best', needs steps, epoch or no: checkpoints are for going on, and best_model/ is kept anyway"
    return None


def typed(name: str, value: Any) -> Any:
    """The value in its field's type; TrainingArguments itself would take `learning_rate="abc"`."""
    kinds = [kind.strip() for kind in training_fields()[name].split("|")]
    if value is None:
        if "None" in kinds:
            return None
        raise ValueError
    if set(kinds) <= {"int", "float", "bool", "None"}:
        if "bool" in kinds or isinstance(value, bool):
            if not (isinstance(value, bool) and "bool" in kinds):
                raise ValueError
            return value
        number = float(value)
        if number != number or abs(number) == float("inf") or (number != int(number) and "float" not in kinds):
            raise ValueError
        return number if "float" in kinds else int(number)
    if set(kinds) <= {"str", "None"} and not isinstance(value, str):
        raise ValueError
    return value
