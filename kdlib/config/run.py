"""One run as typed, frozen, strictly checked objects; YAML in, all errors at once.  Imports no torch.

`load` reads a file, applies overrides, and returns a `Config` or raises a `ConfigError` that lists every
fault with its path in the file, what was found, what is allowed, and the nearest valid name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from kdlib.config.base import Count, Number, Section, fraction, refuse
from kdlib.config.loss import BaselineConfig, LossConfig
from kdlib.config.overrides import merged, overridden, read_yaml, smoke_for
from kdlib.config.task_rules import METRICS, TASKS, misfits
from kdlib.config.training_arguments import TRAINING_DEFAULTS, clashes, problem_with, typed
from kdlib.errors import ConfigError, nearest, printable


def _layers_kept(value: Any) -> Any:
    if value in ("influence", "even", "first") or (
        isinstance(value, list) and all(type(item) is int for item in value)
    ):
        return value
    raise ValueError(f"found {value!r}; it is influence, even, first, or a list of layer numbers")


def _share_or_split(value: Any) -> float | str:
    """A share of the rows, or the name of one of the source's own splits."""
    if isinstance(value, str) and fraction(value) is None:
        return value
    share = fraction(value)
    if share is None or not 0 < share < 1:
        raise ValueError(
            f"found {value!r}; it is a share of the rows between 0 and 1, or the name of a split that the "
            "source has"
        )
    return share


class TeacherConfig(Section):
    """Where the teacher comes from: a hub id, a local folder, a .gguf file, or a built-in name."""

    model: str


class StudentConfig(Section):
    """A student made from the teacher's layers (`from: teacher`), or a model of its own (`from:` as for
    the teacher).
    """

    source: str = Field("teacher", alias="from")
    layers: Annotated[Count, Field(ge=1)] | None = None
    keep: Annotated[Any, BeforeValidator(_layers_kept)] = "influence"

    @model_validator(mode="after")
    def _layers_fit(self):
        if self.source == "teacher" and self.layers is None and not isinstance(self.keep, list):
            raise ValueError("a student made from the teacher needs `layers: <how many>`")
        if self.source != "teacher" and (self.layers is not None or isinstance(self.keep, list)):
            raise ValueError(
                "`layers` and `keep` choose among the teacher's layers; they go with `from: teacher` only"
            )
        if isinstance(self.keep, list) and self.layers not in (None, len(self.keep)):
            raise ValueError(
                f"`layers` is {self.layers}, but `keep` lists {len(self.keep)}; leave `layers` out"
            )
        return self


class DataConfig(Section):
    """The text: where it is, how it is split and cut."""

    source: str
    subset: str | None = None
    text: str | list[str] = "text"  # of a classification, several columns make one text, a line each
    label: str = "label"
    labels: list[str] | None = None  # the classes' names, where the source gives numbers alone
    # of a classification, the column of what must not be divided: an author, a patient, a page
    group: str | None = None
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    validation: Annotated[Any, AfterValidator(_share_or_split)] = 0.1
    test: Annotated[Any, AfterValidator(_share_or_split)] | None = None
    split_seed: Annotated[Count, Field(ge=0, lt=2**32)] | None = None
    packing: bool = True
    max_length: Annotated[Count, Field(ge=2)] = 1024
    max_train_rows: Annotated[Count, Field(ge=1)] | None = None
    max_eval_rows: Annotated[Count, Field(ge=1)] | None = None


def _training(training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """TrainingArguments by their own names, with kdlib's defaults; a stage of the teacher's is of a
    classification.
    """
    metrics = METRICS[info.data.get("task", "sequence-classification")]
    problems = {
        name: problem for name, value in training.items() if (problem := problem_with(name, value, metrics))
    }
    sound = {name: typed(name, value) for name, value in training.items() if name not in problems}
    refuse([*problems.values(), *clashes({**sound, "lr_scheduler_type": training.get("lr_scheduler_type")})])
    return {**TRAINING_DEFAULTS, "metric_for_best_model": f"eval_{metrics[0]}", **sound}


class CompareConfig(Section):
    """How teacher and students are compared on the validation text."""

    resamples: Annotated[Count, Field(ge=100)] = 2000
    continuations: Annotated[Count, Field(ge=0)] = 3
    prompt_tokens: Annotated[Count, Field(ge=1)] = 32
    new_tokens: Annotated[Count, Field(ge=1)] = 32


class EarlyStopping(Section):
    """Training ends when `metric_for_best_model` has not improved for so many evaluations."""

    patience: Annotated[Count, Field(ge=1)]
    min_delta: Annotated[Number, Field(ge=0)] = 0.0  # what counts as an improvement


class TeacherStage(Section):
    """The teacher learns the task first, with ce alone; its run folder is used again while nothing of
    this changes.
    """

    seed: Annotated[Count, Field(ge=0, lt=2**32)] = 0
    training: Annotated[dict[str, Any], AfterValidator(_training)]
    early_stopping: EarlyStopping | None = None


class DiagnosticsConfig(Section):
    """What is measured beside the losses while a student trains."""

    grad_norms_every: Annotated[Count, Field(ge=1)] | None = None  # optimizer steps


class Config(Section):
    """One complete run."""

    task: Literal[TASKS] = "causal-lm"
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    baseline: BaselineConfig | None = None
    training: Annotated[dict[str, Any], AfterValidator(_training)]
    teacher_stage: TeacherStage | None = None
    early_stopping: EarlyStopping | None = None
    compare: CompareConfig = CompareConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()

    @model_validator(mode="after")
    def _fits_the_task(self):
        refuse(misfits(self))
        return self

    @property
    def wanted_device(self) -> str:
        """`device`, or cpu where `training.use_cpu` says so."""
        return "cpu" if self.training.get("use_cpu") else self.device

    @classmethod
    def smoke_changes(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """See kdlib.config.overrides.SMOKE."""
        return smoke_for(raw)


def load(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    smoke: bool = False,
    kind: type[Section] = Config,
) -> Any:
    """Read a config file, apply overrides, check all of it.

    Args:
        path: the YAML file.
        overrides: `["loss.temperature=3"]` as on the command line, or `{"loss.temperature": 3}`; they win
            over `smoke`.
        smoke: shrink the run to seconds (see `smoke_changes` of the kind).
        kind: what the file describes: a run, or something of its own (kdlib.benchmarks.settings).

    Returns:
        A `kind`.

    Raises:
        ConfigError: unreadable, not YAML, or any key or value at fault: all faults in one message.
    """
    return parse(
        read_yaml(read_text(Path(path)), str(path)), overrides, smoke=smoke, name=str(path), kind=kind
    )


def parse(
    raw: Any,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    smoke: bool = False,
    name: str = "config",
    kind: type[Section] = Config,
) -> Any:
    """`load` for what has been read already."""
    if not isinstance(raw, dict):
        sections = ", ".join(f"{key}:" for key, field in kind.model_fields.items() if field.is_required())
        raise ConfigError(f"{name}: a mapping of sections is needed ({sections}), found {type(raw).__name__}")
    changed = overridden(raw, overrides, name)
    if smoke:
        changed = overridden(merged(raw, kind.smoke_changes(changed)), overrides, name)
    try:
        return kind.model_validate(changed)
    except ValidationError as error:
        lines = [line for fault in error.errors() for line in _describe(fault, kind)]
        raise ConfigError(
            f"{name}: {len(lines)} fault{'s' * (len(lines) > 1)}\n" + "\n".join(f"  {x}" for x in lines)
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{name}: a value is nested too deeply, or within itself; a schedule needs a few levels at most"
        ) from None


def read_text(path: Path) -> str:
    """What a text file says.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(path.name, others)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None


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
    return [f"{where}: found {found!r} ({type(found).__name__}); {fault['msg'][0].lower()}{fault['msg'][1:]}"]


def _keys(path: Sequence[str], section: type[Section]) -> list[str]:
    """The keys allowed at this path below a section, which may lead through lists: loss.curriculum.0."""
    for part in path:
        if not part.isdigit():
            section = _section_in(section.model_fields[part].annotation)
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, be it one, a list of them, or none at all."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(
        (found for inner in getattr(annotation, "__args__", ()) if (found := _section_in(inner))), None
    )
