"""One run as typed, frozen, strictly checked objects; YAML in, all errors at once.

A `ConfigError` lists every fault with its path, what was found, what is allowed, and the nearest valid name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError, ValidationInfo, model_validator

from kdlib.config.data import DataConfig
from kdlib.config.loss import BaselineConfig, LossConfig
from kdlib.config.models import StudentConfig, TeacherConfig, with_base
from kdlib.config.reading import Overrides, merged, overridden, read_text, read_yaml, sections_in
from kdlib.config.sections import (
    CodeConfig,
    CompareConfig,
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
from kdlib.config.training_arguments import TRAINING_DEFAULTS, clashes, problem_with, training_fields, typed
from kdlib.errors import ConfigError, nearest, printable, refuse_keys, shown
from kdlib.metrics.names import TO_TEACHER

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
    changed = overridden(raw, overrides, name, kind)
    if smoke:
        changed = overridden(merged(raw, kind.smoke_changes(changed)), overrides, name, kind)
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


def _describe(fault: Mapping, kind: type[Section]) -> list[str]:
    path = [str(part) for part in fault["loc"]]
    where, found = ".".join(map(printable, path)) or "config", fault["input"]
    if fault["type"] == "extra_forbidden":
        keys = _keys(path[:-1], kind)
        hint = _elsewhere(path[-1], kind) or nearest(path[-1], keys)
        return [f"{where}: unknown key{hint}; allowed here: {', '.join(keys)}"]
    if fault["type"] == "missing":
        return [f"{where}: missing; it must be given"]
    if fault["type"] == "value_error":
        before = "" if not path else f"{where}." if path[-1] == "training" else f"{where}: "
        return [f"{before}{line}" for line in str(fault["ctx"]["error"]).splitlines()]
    said, quoted = fault["msg"], fault["type"] == "string_type" and isinstance(found, int | float)
    do = f'; a text of these signs stands in quotes: "{found}"' if quoted else ""
    return [f"{where}: found {shown(found)} ({type(found).__name__}); {said[0].lower()}{said[1:]}{do}"]


def _keys(path: Sequence[str], kind: Any) -> list[str]:
    """The keys allowed at this path below a section, which may lead through lists: loss.curriculum.0."""
    for part in path:
        if not part.isdigit():
            (kind,) = sections_in(kind.model_fields[part].annotation)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _elsewhere(name: str, kind: Any) -> str:
    """`; did you mean 'loss.temperature'?`, where a setting of this name stands in another section."""
    paths: dict[str, str] = {}
    for section, field in kind.model_fields.items():
        for inner in sections_in(field.annotation):
            paths |= {key: f"{section}.{key}" for key in _keys([], inner) if key not in paths}
    if "training" in kind.model_fields:
        paths |= {key: f"training.{key}" for key in training_fields() if key not in paths}
    return f"; did you mean {paths[name]!r}?" if name in paths else ""
