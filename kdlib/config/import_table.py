"""How other projects write their settings: their names for what kdlib names otherwise, their files and flags.

The tables read `what: their names for it`.  Besides, a name of TrainingArguments is one of `training:`.
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

AS_IT_IS = {  # our setting, whose value is theirs
    "teacher.model": "teacher teacher_model teacher_model_name teacher_name teacher_path teacher_model_path "
    "teacher_name_or_path teacher_model_name_or_path",
    "student.from": "student student_model student_model_name student_name student_path student_model_path "
    "student_name_or_path student_model_name_or_path",
    "data.source": "data dataset dataset_name train_data train_file train_path data_path data_file "
    "dataset_path",
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
BY_MEANING = {  # our setting, whose value kdlib.config.imports works out of theirs
    "task": "num_labels num_classes",
    "loss.weights": "alpha alpha_kd alpha_feature alpha_attention alpha_layerwise alpha_contrastive",
    "loss.curriculum": "use_curriculum",
    "loss.features": "attention_layers",
    "loss.temperature": "use_temperature_curriculum min_temperature contrastive_temp",
    "precision": "use_amp precision mixed_precision dtype amp_dtype fp16 bf16",
    "training.report_to": "use_wandb",
    "early_stopping.patience": "early_stopping_patience patience",
    "early_stopping.min_delta": "early_stopping_min_delta early_stopping_threshold",
    "early_stopping": "early_stopping use_early_stopping",
}
LEFT_OUT = {  # why there is nothing like it here
    "of the student-aware router, which kdlib does not have": "num_experts router_lr initial_top_k "
    "final_top_k load_balance_weight noise_std",
    "the router's, in the student-aware project; the teacher's likeliest tokens are loss.top_k here": "top_k",
    "a run's folder is kdlib's own (runs/<run>/, reports/<run>/); downloads lie where HF_HOME says": ""
    "output_dir checkpoint_dir log_dir cache_dir save_dir",
    "kdlib keeps no average of the weights": "use_ema ema_decay",
    "data.source is one source; where it has no validation split, data.validation says how much is held "
    "out": "eval_data val_data validation_file eval_file datasets",
    RESERVED["label_smoothing_factor"]: "label_smoothing",
    "say training.save_strategy: epoch, or save_steps": "save_epochs",
    "weights are never rescaled behind your back": "use_adaptive_loss_balancing",
    "a run is named by --name": "project_name",
    "batches have the size given": "use_dynamic_batching",
    "loss.chunk: auto goes by the free memory": "memory_threshold",
}
DTYPES = {"float16": "fp16 float16 half", "bfloat16": "bf16 bfloat16", "float32": "no fp32 float32"}


def by_name(table: Mapping[str, str]) -> dict[str, str]:
    """{a name of theirs: what it is} of one of these tables."""
    return {name: what for what, names in table.items() for name in names.split()}


def read_settings(path: str | Path) -> dict[str, Any]:
    """{name: value} of a file: names with _ and no leading dashes; of nested ones the innermost.

    Raises:
        ConfigError: it is none of JSON, YAML with names, or flags.
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
            kind = type(found).__name__
            raise ConfigError(
                f"{name}: settings are needed, as {{name: value}} or --name value; found {kind}"
            )
        pairs = list(_leaves(found))
        times = Counter(keys[-1] for keys, _ in pairs)
        return _once([(keys[-1] if times[keys[-1]] == 1 else ".".join(keys), value) for keys, value in pairs])
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply, or within itself") from None
    except ValueError as error:
        raise ConfigError(f"{name}: cannot be read as settings: {error}") from None


def _flags(text: str, name: str) -> dict[str, Any]:
    """`train.py --alpha 0.5 --bf16 --lr=2e-5` as {alpha: 0.5, bf16: True, lr: 2e-5}."""
    given: dict[str, list[str]] = {}
    values: list[str] = []  # of the flag before; what stands before the first is the command
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        if flag := re.fullmatch(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            if flag[1] in given:
                raise ValueError(f"--{flag[1]} stands twice")
            values = given[flag[1]] = [] if flag[2] is None else [flag[2]]
        else:
            values.append(word)
    read = {flag: [read_yaml(word, f"{name}: --{flag}") for word in words] for flag, words in given.items()}
    return {flag: words[0] if len(words) == 1 else words or True for flag, words in read.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{key!r} stands {times} times in one place")
    return dict(pairs)


def _leaves(found: Mapping, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with the keys that lead to it."""
    for key, value in found.items():
        keys = (*above, str(key).strip().lstrip("-").replace("-", "_"))
        if isinstance(value, dict) and value:
            yield from _leaves(value, keys)
        else:
            yield keys, value
