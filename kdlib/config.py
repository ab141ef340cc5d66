"""One run as typed, frozen, strictly checked objects; YAML in, all errors at once.  Imports no torch.

`load` reads a file, applies overrides, and returns a `Config` or raises a `ConfigError` that lists every fault with its
path in the file, what was found, what is allowed, and the nearest valid name.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from kdlib.arguments import TRAINING_DEFAULTS, problem_with, typed
from kdlib.errors import ConfigError, nearest
from kdlib.overrides import SMOKE, merged, pairs, with_override
from kdlib.schedulers import from_spec

POINTS = 101  # at which a schedule is checked: each per cent of training
TERM_NAMES = ("kd", "ce")  # the terms that kdlib.objective knows; a test keeps the two alike
DIVERGENCES = {"forward_kl": (), "reverse_kl": (), "generalized_jsd": ("beta",), "skewed_forward_kl": ("alpha",),
               "skewed_reverse_kl": ("alpha",), "adaptive_kl": ("head",), "total_variation": ()}  # with their options; likewise


def _number(value: Any) -> Any:
    """Takes 1e-4 and 1e3, which YAML reads as strings, and refuses true, which pydantic reads as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _layers_kept(value: Any) -> Any:
    if value in ("influence", "even", "first") or (isinstance(value, list) and all(type(item) is int for item in value)):
        return value
    raise ValueError(f"found {value!r}; it is influence, even, first, or a list of layer numbers")


def _divergence(value: Any) -> Any:
    """`reverse_kl`, or `{generalized_jsd: {beta: 0.3}}`."""
    name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or name not in DIVERGENCES:
        raise ValueError(f"found {value!r}{nearest(str(name), DIVERGENCES)}; it is one of {', '.join(DIVERGENCES)}")
    known = DIVERGENCES[name]
    if not isinstance(options, dict) or not all(option in known for option in options):
        raise ValueError(f"found {value!r}; {name} takes {', '.join(known) or 'no options'}: {{{name}: {{option: number}}}}")
    numbers = {option: _number(number) for option, number in options.items()}
    if not all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in numbers.values()):
        raise ValueError(f"found {value!r}; {', '.join(known)} of {name} lies from 0 to 1")
    return {name: numbers} if numbers else name


def _checked_weights(weights: dict) -> dict:
    faults, courses = [], []
    for name, spec in weights.items():
        if name not in TERM_NAMES:
            faults.append(f"there is no term {name!r}{nearest(name, TERM_NAMES)}; the terms are {', '.join(TERM_NAMES)}")
        try:
            courses.append(_values(spec))
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        if min(courses[-1]) < 0:
            faults.append(f"{name}: found {spec}; weights are 0 or more")
    if not faults and (idle := [i for i, at in enumerate(zip(*courses, strict=True)) if not any(at)] if courses else [0]):
        when = "" if len(idle) == POINTS else f" at {idle[0]} % of training"
        faults.append(f"all weights are 0{when} ({weights}), so nothing would be learned; give one term a positive weight")
    if faults:
        raise ValueError("\n".join(faults))
    return {name: _plain(spec) for name, spec in weights.items()}


def _values(spec: float | Mapping) -> list[float]:
    """The schedule at each per cent of training: what its range is judged by."""
    schedule = from_spec(spec)
    values = [schedule(i / (POINTS - 1)) for i in range(POINTS)]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"found {spec}; every value must be finite")
    return values


def _plain(spec: Any) -> Any:
    return spec if isinstance(spec, Mapping) else float(spec)


def _checked_temperature(spec: Any) -> Any:
    if min(_values(spec)) <= 0:
        raise ValueError(f"the temperature must stay above 0, found {spec}; usual values are 1 to 4")
    return _plain(spec)


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_number)]
Weights = Annotated[dict[str, Any], AfterValidator(_checked_weights)]  # numbers or schedules (kdlib.schedulers), by term
Temperature = Annotated[Any, AfterValidator(_checked_temperature)]  # a number or a schedule


class Section(BaseModel):
    """A part of a config, or all of one: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    smoke: ClassVar[Mapping[str, Any]] = {}  # what `smoke` changes

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it would stand in the YAML."""
        return self.model_dump(mode="json", by_alias=True)

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


class TeacherConfig(Section):
    """Where the teacher comes from: a hub id, a local folder, a .gguf file, or a built-in name."""

    model: str


class StudentConfig(Section):
    """A student made from the teacher's layers (`from: teacher`), or a model of its own (`from:` as for the teacher)."""

    source: str = Field("teacher", alias="from")
    layers: Annotated[Count, Field(ge=1)] | None = None
    keep: Annotated[Any, BeforeValidator(_layers_kept)] = "influence"

    @model_validator(mode="after")
    def _layers_fit(self):
        if self.source == "teacher" and self.layers is None and not isinstance(self.keep, list):
            raise ValueError("a student made from the teacher needs `layers: <how many>`")
        if self.source != "teacher" and (self.layers is not None or isinstance(self.keep, list)):
            raise ValueError("`layers` and `keep` choose among the teacher's layers; they go with `from: teacher` only")
        if isinstance(self.keep, list) and self.layers not in (None, len(self.keep)):
            raise ValueError(f"`layers` is {self.layers}, but `keep` lists {len(self.keep)}; leave `layers` out")
        return self


class DataConfig(Section):
    """The text: where it is, how it is split and cut."""

    source: str
    subset: str | None = None
    text: str = "text"
    validation: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    packing: bool = True
    max_length: Annotated[Count, Field(ge=2)] = 1024
    max_train_rows: Annotated[Count, Field(ge=1)] | None = None
    max_eval_rows: Annotated[Count, Field(ge=1)] | None = None


class LossConfig(Section):
    """The terms' weights and the temperature: numbers, or schedules over training (kdlib.schedulers); and what kd measures."""

    weights: Weights
    temperature: Temperature = 2.0
    divergence: Annotated[Any, BeforeValidator(_divergence)] = "forward_kl"
    top_k: Annotated[Count, Field(ge=1)] | None = None
    top_k_tail: Literal["bucket", "renormalise"] = "bucket"
    chunk: Annotated[Count, Field(ge=1)] = 128


class BaselineConfig(Section):
    """A second student that differs in its loss weights alone: same start, data, order, steps, learning rate."""

    weights: Weights = {"ce": 1.0}


class CompareConfig(Section):
    """How teacher and students are compared on the validation text."""

    resamples: Annotated[Count, Field(ge=100)] = 2000
    continuations: Annotated[Count, Field(ge=0)] = 3
    prompt_tokens: Annotated[Count, Field(ge=1)] = 32
    new_tokens: Annotated[Count, Field(ge=1)] = 32


class Config(Section):
    """One complete run."""

    smoke: ClassVar[Mapping[str, Any]] = SMOKE
    task: Literal["causal-lm"] = "causal-lm"
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    loss: LossConfig
    baseline: BaselineConfig | None = None
    training: dict[str, Any]
    compare: CompareConfig = CompareConfig()

    @field_validator("training")
    @classmethod
    def _training_arguments(cls, training):
        problems = [problem for name, value in training.items() if (problem := problem_with(name, value))]
        if problems:
            raise ValueError("\n".join(problems))
        return {**TRAINING_DEFAULTS, **{name: typed(name, value) for name, value in training.items()}}


def load(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, smoke: bool = False, kind: type[Section] = Config
) -> Any:
    """Read a config file, apply overrides, check all of it.

    Args:
        path: the YAML file.
        overrides: `["loss.temperature=3"]` as on the command line, or `{"loss.temperature": 3}`; they win over `smoke`.
        smoke: shrink the run to seconds (see SMOKE).
        kind: what the file describes: a run, or something of its own (kdlib.benchmarks.settings).

    Returns:
        A `kind`.

    Raises:
        ConfigError: unreadable, not YAML, or any key or value at fault: all faults in one message.
    """
    return parse(_read(Path(path)), overrides, smoke=smoke, name=str(path), kind=kind)


def parse(
    raw: Any, overrides: Sequence[str] | Mapping[str, Any] = (), *, smoke: bool = False, name: str = "config",
    kind: type[Section] = Config,
) -> Any:
    """`load` for what has been read already."""
    if not isinstance(raw, dict):
        sections = ", ".join(f"{key}:" for key, field in kind.model_fields.items() if field.is_required())
        raise ConfigError(f"{name}: a mapping of sections is needed ({sections}), found {type(raw).__name__}")
    raw = merged(raw, kind.smoke) if smoke else raw
    for key, value in pairs(overrides):
        raw = with_override(raw, key, value, name)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [line for fault in error.errors() for line in _describe(fault, kind)]
        raise ConfigError(f"{name}: {len(lines)} fault{'s' * (len(lines) > 1)}\n" + "\n".join(f"  {x}" for x in lines)) from None


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


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file{nearest(path.name, others)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def _describe(fault: Mapping, kind: type[Section]) -> list[str]:
    path = [str(part) for part in fault["loc"]]
    where, found = ".".join(path) or "config", fault["input"]
    if fault["type"] == "extra_forbidden":
        keys = _keys(path[:-1], kind)
        return [f"{where}: unknown key{nearest(path[-1], keys)}; allowed here: {', '.join(keys)}"]
    if fault["type"] == "missing":
        return [f"{where}: missing; it must be given"]
    if fault["type"] == "value_error":
        return [f"{where}{'.' if where == 'training' else ': '}{line}" for line in str(fault["ctx"]["error"]).splitlines()]
    return [f"{where}: found {found!r} ({type(found).__name__}); {fault['msg'][0].lower()}{fault['msg'][1:]}"]


def _keys(path: Sequence[str], section: type[Section]) -> list[str]:
    """The keys allowed at this path below a section."""
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next(c for c in (annotation, *getattr(annotation, "__args__", ())) if isinstance(c, type) and issubclass(c, Section))
    return [field.alias or name for name, field in section.model_fields.items()]
