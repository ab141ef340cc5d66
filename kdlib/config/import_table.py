"""How other projects write their settings: their files and flags, their names for what kdlib names
otherwise.  Imports no torch.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlib.config.run import read_text, read_yaml
from kdlib.config.training_arguments import RESERVED
from kdlib.errors import ConfigError

NAMES = {
    "teacher.model": "teacher teacher_model teacher_model_name teacher_name teacher_path teacher_model_path "
    "teacher_name_or_path "
    "teacher_model_name_or_path",
    "student.from": "student student_model student_model_name student_name student_path student_model_path "
    "student_name_or_path "
    "student_model_name_or_path",
    "data.source": (
        "data dataset dataset_name train_data train_file train_path data_path data_file dataset_path"
    ),
    "data.subset": "subset dataset_config dataset_config_name",
    "data.text": "text_column text_columns text_field",
    "data.label": "label_column label_field",
    "data.labels": "label_names class_names",
    "data.max_length": "max_length max_seq_length max_seq_len seq_length block_size",
    "data.max_train_rows": "dataset_subset_size max_train_samples",
    "data.max_eval_rows": "max_eval_samples",
    "data.validation": "validation_split val_split",
    "seed": "seed random_seed",
    "loss.temperature": "temperature distillation_temperature kd_temperature",
    "loss.top_k": "kd_top_k",
    "loss.chunk": "loss_chunk_size",
    "training.per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.learning_rate": "lr",
    "training.gradient_accumulation_steps": "accumulation_steps grad_accum_steps grad_accum",
    "training.num_train_epochs": "epochs num_epochs",
    "training.max_steps": "max_train_steps",
    "training.warmup_steps": "num_warmup_steps warmup_ratio",
    "training.lr_scheduler_type": "scheduler_type lr_scheduler scheduler",
    "training.max_grad_norm": "grad_clip gradient_clip clip_grad_norm",
    "training.dataloader_num_workers": "num_workers",
    "training.activation_checkpointing": "use_gradient_checkpointing gradient_checkpointing",
}
"""Our settings, each with the names that others give it; besides, a name of TrainingArguments is one of
`training:`.
"""
OURS = {theirs: ours for ours, names in NAMES.items() for theirs in names.split()}
HALVES = {
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "no": "float32",
    "fp32": "float32",
    "float32": "float32",
}
COUNTS = ("num_labels", "num_classes")  # of classes: where one stands, rows are classified
STOPS = {
    "early_stopping_patience": "patience",
    "patience": "patience",
    "early_stopping_min_delta": "min_delta",
    "early_stopping_threshold": "min_delta",
}
STOP_SWITCHES = ("early_stopping", "use_early_stopping")
ROUTER = "of the student-aware router, which kdlib does not have"
PLACES = "a run's folder is kdlib's own (runs/<run>/, reports/<run>/); downloads lie where HF_HOME says"
REASONS = {
    **dict.fromkeys(
        ("num_experts", "router_lr", "initial_top_k", "final_top_k", "load_balance_weight", "noise_std"),
        ROUTER,
    ),
    "top_k": "the router's, in the student-aware project; the teacher's likeliest tokens are loss.top_k here",
    **dict.fromkeys(("output_dir", "checkpoint_dir", "log_dir", "cache_dir", "save_dir"), PLACES),
    **dict.fromkeys(("use_ema", "ema_decay"), "kdlib keeps no average of the weights"),
    **dict.fromkeys(
        ("eval_data", "val_data", "validation_file", "eval_file", "datasets"),
        (
            "data.source is one source; where it has no validation split, data.validation says how much is "
            "held "
            "out"
        ),
    ),
    "label_smoothing": RESERVED["label_smoothing_factor"],
    "save_epochs": "say training.save_strategy: epoch, or save_steps",
    "use_adaptive_loss_balancing": "weights are never rescaled behind your back",
    "project_name": "a run is named by --name",
    "use_dynamic_batching": "batches have the size given",
    "memory_threshold": "loss.chunk: auto goes by the free memory",
}
"""Why a setting of theirs has no counterpart."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """{name: value} of a file of settings: names without dashes before them and with _ in them; of nested
    ones the innermost.

    Raises:
        ConfigError: the file is none of JSON, YAML with names, or flags.
    """
    text, name = read_text(Path(path)), str(path)
    try:
        if text.lstrip().startswith("{") or name.endswith(".json"):
            found = json.loads(text, object_pairs_hook=_once)
        elif re.search(r"^(?!\s*#)(.*\s)?--\w", text, re.MULTILINE):
            found = _flags(text, name)
        else:
            found = read_yaml(text, name)
        if not isinstance(found, dict):
            raise ConfigError(
                f"{name}: settings are needed, as {{name: value}} or --name value; found "
                f"{type(found).__name__}"
            )
        pairs = [([_plain_name(part) for part in keys], value) for keys, value in _leaves(found, [])]
        times = Counter(keys[-1] for keys, _ in pairs)
        return _once([(keys[-1] if times[keys[-1]] == 1 else ".".join(keys), value) for keys, value in pairs])
    except RecursionError:
        raise ConfigError(
            f"{name}: nested too deeply, or within itself; settings are needed, as {{name: value}}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{name}: cannot be read as settings: {error}") from None


def _flags(text: str, name: str) -> dict[str, Any]:
    """`--alpha 0.5 --bf16 --lr=2e-5` as {alpha: 0.5, bf16: True, lr: 2e-5}; what stands before the first
    flag is the command.
    """
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        if flag := re.fullmatch(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            if flag[1] in given:
                raise ValueError(f"--{flag[1]} stands twice")
            values = given[flag[1]] = [] if flag[2] is None else [flag[2]]
        else:
            values.append(word)
    read = {flag: [read_yaml(word, f"{name}: --{flag}") for word in words] for flag, words in given.items()}
    return {
        flag: True if not words else words[0] if len(words) == 1 else words for flag, words in read.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{key!r} stands {times} times in one place")
    return dict(pairs)


def _leaves(found: Mapping, above: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Every value with the keys that lead to it."""
    for key, value in found.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, [*above, key])
        else:
            yield [*above, key], value


def _plain_name(key: Any) -> str:
    return str(key).strip().lstrip("-").replace("-", "_")
