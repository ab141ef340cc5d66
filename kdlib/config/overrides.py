"""What is changed in a config after it is read: dotted overrides, and `smoke`."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kdlib.errors import ConfigError

SMOKE = {
    "training": {
        "max_steps": 4,
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
    },
    "data": {"max_length": 32, "max_train_rows": 64, "max_eval_rows": 4},
    "compare": {"resamples": 200, "continuations": 1, "prompt_tokens": 8, "new_tokens": 4},
}
"""What `smoke` changes, so that the same config runs through in under two minutes: few steps, short rows."""


def smoke_for(raw: Mapping) -> Mapping:
    """SMOKE for this config: less the warm-up steps where the learning rate is a schedule, which has its
    own; for its task.
    """
    changes = {**SMOKE, "training": _steps(raw.get("training"))}
    if raw.get("task") == "sequence-classification":  # some rows of each class
        changes["data"] = {**SMOKE["data"], "max_train_rows": 256, "max_eval_rows": 64}
    if raw.get("task") == "question-answering":  # a shorter row would lose its answer
        changes["data"] = {name: value for name, value in SMOKE["data"].items() if name != "max_length"}
    if isinstance(stage := raw.get("teacher_stage"), Mapping):
        changes["teacher_stage"] = {"training": _steps(stage.get("training"))}
    return changes


def _steps(training: Any) -> Mapping[str, Any]:
    is_course = isinstance(training, Mapping) and isinstance(training.get("lr_scheduler_type"), Mapping)
    return {
        name: value for name, value in SMOKE["training"].items() if not (is_course and name == "warmup_steps")
    }


def overridden(raw: dict, overrides: Sequence[str] | Mapping[str, Any], name: str) -> dict:
    """`raw`, the config of this name, with every override put in, the last one winning."""
    for key, value in pairs(overrides):
        raw = with_override(raw, key, value, name)
    return raw


def pairs(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`["loss.temperature=3"]` or `{"loss.temperature": 3}` as [("loss.temperature", 3)]."""
    if isinstance(overrides, Mapping):
        return [(str(key), value) for key, value in overrides.items()]
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise ConfigError(
            f'overrides are a list like ["loss.temperature=3"] or a mapping; found {overrides!r}'
        )
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: write it as key=value, e.g. loss.temperature=3")
        pairs.append((key.strip(), read_yaml(value, f"override {text!r}")))
    return pairs


def read_yaml(text: str, name: str) -> Any:
    """Plain data from YAML.

    Raises:
        ConfigError: it is none; `name` says in the message where the text stood.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's own conversions: 2026-13-45, !!bool x
        raise ConfigError(f"{name}: not valid YAML: {error}") from None


def with_override(raw: dict, key: str, value: Any, name: str) -> dict:
    """`raw` with the value at this dotted path; sections on the way are made where they are missing."""
    head, dot, rest = key.partition(".")
    if not dot:
        return {**raw, head: value}
    inner = raw.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{name}: override {key}: `{head}` is {inner!r}, it has no `{rest}`")
    return {**raw, head: with_override(inner or {}, rest, value, name)}


def merged(raw: dict, change: Mapping) -> dict:
    """`raw` with the leaves of `change` put in; a section that is no mapping is left for the checks to
    refuse.
    """
    result = dict(raw)
    for key, value in change.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif isinstance(raw.get(key, {}), dict):
            result[key] = merged(raw.get(key, {}), value)
    return result
