"""One run as typed, frozen, strictly checked objects; YAML in, all errors at once.

A `ConfigError` lists every fault with its path, what was found, what is allowed, and the nearest valid name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ValidationError, ValidationInfo, model_validator

from kdlib.config.loss import BaselineConfig, LossConfig
from kdlib.config.models import StudentConfig, TeacherConfig, with_base
from kdlib.config.sections import (
    CodeConfig,
    CompareConfig,
    DataConfig,
    DiagnosticsConfig,
    EarlyStopping,
    LaunchConfig,
    Section,
    Seed,
    TrackersConfig,
    read_beside,
    refuse,
)
from kdlib.config.task_rules import RULES, misfits, rules_named
from kdlib.config.training_arguments import TRAINING_DEFAULTS, clashes, problem_with, typed
from kdlib.errors import ConfigError, nearest, printable, refuse_keys
from kdlib.metrics.names import TO_TEACHER

Overrides = Sequence[str] | Mapping[str, Any]
SMOKE: dict[str, dict[str, int]] = read_beside(__file__)
"""What `smoke` changes, so that the same config runs through in under two minutes."""


def _steps(training: Any) -> Mapping[str, Any]:
    """SMOKE's, without warm-up steps where the learning rate is a schedule, which has its own."""
    warms_up = not (isinstance(training, Mapping) and isinstance(training.get("lr_scheduler_type"), Mapping))
    return {name: x for name, x in SMOKE["training"].items() if warms_up or name != "warmup_steps"}


def _training(training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """TrainingArguments by their own names, with kdlib's defaults."""
    task = info.data.get("task", (info.context or {}).get("task"))  # of a stage's own training the config's
    metrics: Sequence[str] = RULES.get(str(task), RULES["causal-lm"]).best_by
    if "task" not in info.data or info.data.get("teacher", "") is None:  # none to be compared with
        metrics = [name for name in metrics if name not in TO_TEACHER]
    problems = {name: problem_with(name, value, metrics) for name, value in training.items()}
    sound = {name: typed(name, value) for name, value in training.items() if problems[name] is None}
    clashing = clashes({**sound, "lr_scheduler_type": training.get("lr_scheduler_type")})
    refuse([*filter(None, problems.values()), *clashing])
    made = {**TRAINING_DEFAULTS, "metric_for_best_model": f"eval_{metrics[0]}", **sound}
    if made.get("fsdp"):  # no rank gathers a checkpoint
        made["fsdp_config"] = {"state_dict_type": "SHARDED_STATE_DICT", **(made.get("fsdp_config") or {})}
    return made


# by a section that it alone has: what a file describes, and the command for it
MARKS = {
    "student": ("a training", "kd run"),
    "prompts": ("rows to be made by a teacher", "kd generate"),
    "base": ("a sweep", "kd sweep"),
}
# sections that do not tell runs apart: where one trains, who hears of it, on what its end is tried
BESIDE = ("launch", "trackers", "code")


class TeacherStage(Section):
    """The teacher learns the task first, with ce (and its routers' own loss); its run is used again."""

    seed: Seed = 0
    training: Annotated[dict[str, Any], AfterValidator(_training)]
    early_stopping: EarlyStopping | None = None


class Config(Section):
    """One complete run."""

    task: Annotated[str, AfterValidator(lambda name: rules_named(name).name)] = "causal-lm"
    seed: Seed = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    teacher: TeacherConfig | None  # null: nobody is asked; the student learns from text alone
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    baseline: BaselineConfig | None = None
    training: Annotated[dict[str, Any], AfterValidator(_training)]
    teacher_stage: TeacherStage | None = None
    early_stopping: EarlyStopping | None = None
    compare: CompareConfig = CompareConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    trackers: TrackersConfig = TrackersConfig()
    launch: LaunchConfig = LaunchConfig()
    code: CodeConfig | None = None

    _base = model_validator(mode="before")(with_base)

    @model_validator(mode="after")
    def _fits_the_task(self):
        refuse(misfits(self))
        return self

    @property
    def wanted_device(self) -> str:
        """`device`, or cpu where `training.use_cpu` says so."""
        return "cpu" if self.training.get("use_cpu") else self.device

    @property
    def terms(self) -> set[str]:
        """All that has a weight, in the student or the baseline."""
        return {*self.loss.schedules, *(self.baseline.weights if self.baseline else ())}

    def without(self, *sections: str) -> dict[str, Any]:
        """Plain data but for these sections."""
        return {name: value for name, value in self.as_dict().items() if name not in sections}

    @classmethod
    def smoke_changes(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """SMOKE for this config and its task."""
        changes = {**SMOKE, "training": _steps(raw.get("training"))}
        if (rules := RULES.get(str(raw.get("task")))) and rules.smoke:
            data = {**SMOKE["data"], **rules.smoke}
            changes["data"] = {name: value for name, value in data.items() if value is not None}
        if isinstance(stage := raw.get("teacher_stage"), Mapping):
            changes["teacher_stage"] = {"training": _steps(stage.get("training"))}
        if isinstance(raw.get("code"), Mapping):
            changes["code"] = {"limit": 2, "max_new_tokens": 8}
        return changes


def load(
    path: str | Path, overrides: Overrides = (), *, smoke: bool = False, kind: type[Section] = Config
) -> Any:
    """Read a YAML file, apply overrides, check all of it.

    Args:
        overrides: `["loss.temperature=3"]` as on the command line, or `{"loss.temperature": 3}`; they win
            over `smoke`.
        smoke: shrink the run to seconds (see `smoke_changes` of the kind).
        kind: what the file describes: a run, or something of its own (a sweep, a benchmark).

    Raises:
        ConfigError: unreadable, not YAML, or any key or value at fault: all faults in one message.
    """
    raw = read_yaml(read_text(Path(path)), str(path))
    return parse(raw, overrides, smoke=smoke, name=str(path), kind=kind)


def parse(
    raw: Any,
    overrides: Overrides = (),
    *,
    smoke: bool = False,
    name: str = "config",
    kind: type[Section] = Config,
) -> Any:
    """`load` for what has been read already."""
    if not isinstance(raw, dict):
        sections = ", ".join(f"{key}:" for key, field in kind.model_fields.items() if field.is_required())
        raise ConfigError(f"{name}: a mapping of sections is needed ({sections}), found {type(raw).__name__}")
    refuse_keys(raw, name)
    _refuse_other_kind(raw, name, kind)
    changed = overridden(raw, overrides, name)
    if smoke:
        changed = overridden(merged(raw, kind.smoke_changes(changed)), overrides, name)
    try:
        return kind.model_validate(changed, context={"task": changed.get("task", "causal-lm")})
    except ValidationError as error:
        lines = [line for fault in error.errors() for line in _describe(fault, kind)]
        head = f"{name}: {len(lines)} fault{'s' * (len(lines) > 1)}"
        raise ConfigError("\n  ".join([head, *lines])) from None
    except RecursionError:
        raise ConfigError(f"{name}: a value is nested too deeply, or within itself") from None


def _refuse_other_kind(raw: Mapping, name: str, kind: type[Section]) -> None:
    """Raise a ConfigError where the file is meant for another command, as its sections show."""
    own = {field.alias or key for key, field in kind.model_fields.items()}
    for section, (what, command) in MARKS.items():
        if section in raw and section not in own and not {*MARKS} & own & {*raw}:
            raise ConfigError(f"{name}: this describes {what} (`{section}:`); give it to {command} {name}")


def read_text(path: Path) -> str:
    """What a text file says; a ConfigError where there is none, or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(path.name, others)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None


def overridden(raw: dict, overrides: Overrides, name: str) -> dict:
    """`raw` with every override put in, the last one winning."""
    for key, value in pairs(overrides):
        raw = with_override(raw, key, value, name)
    return raw


def pairs(overrides: Overrides) -> list[tuple[str, Any]]:
    """`["loss.temperature=3"]` or `{"loss.temperature": 3}` as [("loss.temperature", 3)]."""
    refuse_keys(overrides, "an override")
    if isinstance(overrides, Mapping):
        return [(str(key), value) for key, value in overrides.items()]
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        form = 'a list like ["loss.temperature=3"] or a mapping'
        raise ConfigError(f"overrides are {form}; found {overrides!r}")
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: write it as key=value, e.g. loss.temperature=3")
        pairs.append((key.strip(), read_yaml(value, f"override {text!r}")))
    return pairs


def read_yaml(text: str, name: str) -> Any:
    """Plain data from YAML; a ConfigError, in which `name` says where the text stood, where it is none.

    Also where the text holds a key, were it in a comment: it is copied, and shown where it is at fault.
    """
    refuse_keys(text, name)
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # all but the first from PyYAML's own conversions: 2026-13-45, !!bool x
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
    """`raw` with the leaves of `change` put in; a section that is no mapping is left for the checks."""
    result = dict(raw)
    for key, value in change.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif isinstance(raw.get(key, {}), dict):
            result[key] = merged(raw.get(key, {}), value)
    return result


def differences(one: Mapping, other: Mapping, prefix: str = "") -> list[str]:
    """`loss.temperature: 2.0 -> 3.0`, a line per value that differs between two nested mappings."""
    lines = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def _describe(fault: Mapping, kind: type[Section]) -> list[str]:
    path = [str(part) for part in fault["loc"]]
    where, found = ".".join(map(printable, path)) or "config", fault["input"]
    if fault["type"] == "extra_forbidden":
        keys = _keys(path[:-1], kind)
        return [f"{where}: unknown key{nearest(path[-1], keys)}; allowed here: {', '.join(keys)}"]
    if fault["type"] == "missing":
        return [f"{where}: missing; it must be given"]
    if fault["type"] == "value_error":
        before = "" if not path else f"{where}." if path[-1] == "training" else f"{where}: "
        return [f"{before}{line}" for line in str(fault["ctx"]["error"]).splitlines()]
    said = fault["msg"]
    return [f"{where}: found {found!r} ({type(found).__name__}); {said[0].lower()}{said[1:]}"]


def _keys(path: Sequence[str], section: type[Section]) -> list[str]:
    """The keys allowed at this path below a section, which may lead through lists: loss.curriculum.0."""
    for part in path:
        if not part.isdigit():
            (section,) = _sections_in(section.model_fields[part].annotation)
    return [field.alias or name for name, field in section.model_fields.items()]


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The section that a field holds, be it one, a list of them, or none at all."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections_in(inner)]
