"""What a config is made of: the strict base class, numbers as YAML writes them, and the simple sections."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


class Section(BaseModel):
    """A part of a config, or all of one: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    smoke: ClassVar[Mapping[str, Any]] = {}  # what `smoke` changes

    @classmethod
    def smoke_changes(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return cls.smoke

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it would stand in the YAML."""
        return self.model_dump(by_alias=True)

    def as_yaml(self) -> str:
        return as_yaml(self.as_dict())

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, raw: Any) -> Any:
        """A section whose name alone is written says nothing."""
        if not isinstance(raw, dict):
            return raw
        fields = {field.alias or name: field.annotation for name, field in cls.model_fields.items()}
        empty = [key for key, each in fields.items() if key in raw and raw[key] is None and _is_section(each)]
        return {**raw, **{key: {} for key in empty}}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""


_OF_1_2 = re.compile(r"^[-+]?[.\d]+[eE][-+]?\d+$|^0o[0-7]+$")  # numbers there, and texts to PyYAML
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _OF_1_2, [*"-+.0123456789"])


def as_yaml(value: Any, **style: Any) -> str:
    """Plain data as YAML."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **{"allow_unicode": True, **style})


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    style: dict[str, Any] = {"default_flow_style": True, "width": float("inf")}
    text = as_yaml([value], **style).strip()
    return (
        text
        if text.isprintable()
        else as_yaml([value], default_style='"', allow_unicode=False, **style).strip()
    )[1:-1]


def _is_section(annotation: Any) -> bool:
    is_mapping = getattr(annotation, "__origin__", None) is dict
    return is_mapping or (isinstance(annotation, type) and issubclass(annotation, Section))


def number(value: Any) -> Any:
    """Takes 1e-4 and 1e3, which YAML reads as strings, and refuses true, which pydantic reads as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def whole(value: Any) -> int | None:
    """The value as a whole number of 1 or more, or None where it is none."""
    found = None if isinstance(value, bool) else number(value)
    return int(found) if isinstance(found, (int, float)) and found >= 1 and found % 1 == 0 else None


def fraction(value: Any) -> float | None:
    """The value as a number from 0 to 1, or None where it is none."""
    found = None if isinstance(value, bool) else number(value)
    return float(found) if isinstance(found, (int, float)) and 0 <= found <= 1 else None


def read_beside(module: str) -> Any:
    """The table that stands as YAML beside a module, given by its `__file__`."""
    return yaml.safe_load(Path(module).with_suffix(".yaml").read_text(encoding="utf-8"))


def refuse(faults: Sequence[str]) -> None:
    """Raises all faults as one ValueError, a line each; nothing where there are none."""
    if faults:
        raise ValueError("\n".join(faults))


Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(number)]
Positive = Annotated[Count, Field(ge=1)]
Seed = Annotated[Count, Field(ge=0, lt=2**32)]


def _processes(value: Any) -> Any:
    if found := value if value == "auto" else whole(value):
        return found
    raise ValueError(f"found {value!r}; it is a number of 1 or more, or auto: one for each GPU")


class CompareConfig(Section):
    """How teacher and students are compared on the validation text."""

    resamples: Annotated[Count, Field(ge=100)] = 2000
    continuations: Annotated[Count, Field(ge=0)] = 3
    prompt_tokens: Positive = 32
    new_tokens: Positive = 32


class CodeConfig(Section):
    """Programming problems: what models write for them is run, and scored by pass@k.

    Beside a run's experiment: it may be added, or changed, when the students are trained.
    """

    benchmarks: Annotated[list[str], Field(min_length=1)]  # humaneval, mbpp, or a JSONL file
    allow_execution: bool = False
    allow_network: bool = False
    samples: Positive = 1  # programs that each model writes for each problem
    k: Annotated[list[Positive], Field(min_length=1)] = [1]
    temperature: Annotated[Number, Field(ge=0)] = 0.0  # 0: always the likeliest token
    limit: Positive | None = None  # problems of each benchmark, its first
    max_new_tokens: Positive = 384
    batch_size: Positive = 8
    chat: bool = False  # ask as a chat template has it, and take the block of code from the answer

    @model_validator(mode="after")
    def _can_be_told(self) -> "CodeConfig":
        if not self.allow_execution:
            what = "the models' programs, which nobody has read, are run to be scored"
            do = "read notebooks/guides/code_execution.md, then set it to true"
            raise ValueError(f"allow_execution: {what}; {do} (--allow-code-execution)")
        names = [Path(benchmark).stem for benchmark in self.benchmarks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"benchmarks: two are called {twice[0]}, as their figures would be; rename one")
        if max(self.k) > self.samples:
            raise ValueError(f"k: found {max(self.k)}, but samples is {self.samples}; write as many samples")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} at temperature 0 are all the same; set a temperature")
        return self


def _metric(name: str) -> str:
    if re.fullmatch(r"(train|eval)/\w+", name):
        return name
    raise ValueError(f"found {name!r}; a metric is named like train/kd_loss or eval/perplexity")


Metric = Annotated[str, AfterValidator(_metric)]


class TrackersConfig(Section):
    """What trackers are told beside `training.report_to`, `project` and `run_name`."""

    entity: str | None = None  # of wandb: the user or team that the run belongs to; WANDB_ENTITY where None
    alias: dict[Metric, Metric] = {}  # {another name: ours}, as {train/kl_loss: train/kd_loss}; both are sent


class EarlyStopping(Section):
    """Training ends when `metric_for_best_model` has not improved for so many evaluations."""

    patience: Positive
    min_delta: Annotated[Number, Field(ge=0)] = 0.0  # what counts as an improvement


class DiagnosticsConfig(Section):
    """What is measured beside the losses while a student trains."""

    grad_norms_every: Positive | None = None  # optimizer steps


class LaunchConfig(Section):
    """How many processes share the students' training, `per_device_train_batch_size` rows each."""

    processes: Annotated[Any, BeforeValidator(_processes)] = 1
