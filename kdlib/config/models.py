"""The two models of a config: where teacher and student come from, and how they are asked or made."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kdlib.config.sections import Number, Positive, Section, number, refuse, whole
from kdlib.errors import nearest

AWARE = {"learning_rate": 1e-3, "balance": 0.01, "anchor": 0.1}
"""Of a student-aware router: Adam's step, and the weights of its balance and of its anchor."""
MODES = "topk, all, {augment: 2} or {student_aware: {learning_rate: 1e-3, balance: 0.01, anchor: 0.1}}"


def _experts(value: Any) -> Any:
    """`topk`, `all`, `{augment: draws}`, or `{student_aware: {…}}` with all its settings."""
    if value in ("topk", "all"):
        return value
    name, given = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (value, {})
    if name == "augment" and (draws := whole(given)) and draws > 1:
        return {"augment": draws}
    if name == "augment":
        raise ValueError(f"found {value!r}; augment is a number of draws, 2 or more, for each token")
    if name != "student_aware" or not isinstance(given, Mapping | None):
        hint = nearest(str(name), ["topk", "all", "augment", "student_aware"])
        raise ValueError(f"found {value!r}{hint}; it is {MODES}")
    return {"student_aware": _aware(given or {})}


def _aware(given: Mapping[Any, Any]) -> dict[str, float]:
    faults = []
    for key, found in given.items():
        worth = None if isinstance(found, bool) else number(found)
        if key not in AWARE:
            hint = nearest(str(key), AWARE)
            faults.append(f"student_aware has no {key!r}{hint}; it has {', '.join(AWARE)}")
        elif not isinstance(worth, int | float) or not 0 <= worth < float("inf"):
            faults.append(f"student_aware.{key}: found {found!r}; it is a number of 0 or more")
    refuse(faults)
    return {key: float(number(given.get(key, usual))) for key, usual in AWARE.items()}


def with_base(raw: Any) -> Any:
    """A config, its teacher `from: student` with the model that this is: what the student is made from."""
    teacher, student = (
        dict(raw).get(n) if isinstance(raw, Mapping) else None for n in ("teacher", "student")
    )
    if (
        not (isinstance(teacher, Mapping) and isinstance(student, Mapping))
        or teacher.get("from") != "student"
    ):
        return raw
    if "model" in teacher:
        raise ValueError(
            "teacher: found `model` beside `from: student`, whose model is student.from; give one"
        )
    return {**raw, "teacher": {**teacher, "model": student.get("from", "teacher")}}


class CacheConfig(Section):
    """The teacher is asked once about each row, and a disk answers for it afterwards."""

    form: Literal["auto", "hidden", "top_k", "samples"] = "auto"  # what is kept of each token: kdlib.cache
    temperatures: list[Annotated[Number, Field(ge=0.01, le=100)]] | None = None  # of more than this schedule
    folder: str | None = None  # of all caches; below the runs where None
    max_gib: Annotated[Number, Field(gt=0)] | None = None

    def form_for(self, loss: Any) -> str:
        """What is kept: what this `loss:` looks at, unless it is said."""
        if self.form != "auto":
            return self.form
        return "samples" if loss.samples else "top_k" if loss.top_k else "hidden"


def _cache(value: Any) -> Any:
    """`true`, or a form by itself, as a section."""
    if value is False:
        return None
    return {} if value is True else {"form": value} if isinstance(value, str) else value


Quantiser = Literal["torchao_int8", "bitsandbytes_int8", "bitsandbytes_nf4"]


class TeacherConfig(Section):
    """Where the teacher comes from: a hub id, a local folder, a .gguf file, or a built-in name.

    Or from the student (`from: student`): its own model, asked with its adapter switched off.
    """

    source: Literal["student"] | None = Field(None, alias="from")
    model: str
    device: str | None = None  # of its own, as cuda:1; else it lies where the student does
    quantization: Quantiser | None = None  # how its matrices are held, but for the head
    offload: bool = False  # with training.fsdp: in the CPU's memory, gathered layer by layer
    experts: Annotated[Any, BeforeValidator(_experts)] = "topk"  # while it teaches: kdlib.routing
    cache: Annotated[CacheConfig | None, BeforeValidator(_cache)] = None  # true: asked once, then from disk

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is off, so that older runs and trained teachers are known again."""
        found = {name: value for name, value in dump(self).items() if value and value != "topk"}
        return {name: value for name, value in found.items() if not (self.source and name == "model")}


def _layers_kept(value: Any) -> Any:
    is_list = isinstance(value, list) and all(type(item) is int for item in value)
    if value in ("influence", "even", "first") or is_list:
        return value
    raise ValueError(f"found {value!r}; it is influence, even, first, or a list of layer numbers")


def _shape(value: Any) -> Any:
    """A count of parameters, as 100m or 1.3b, or a model's own settings."""
    is_count = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?[mb]", value.lower())
    is_model = isinstance(value, Mapping) and isinstance(value.get("model_type"), str)
    if is_count or is_model:
        return value.lower() if is_count else dict(value)
    form = "a count of parameters, as 100m, 350m or 1b, or {model_type: llama, hidden_size: 512, …}"
    raise ValueError(f"found {value!r}; it is {form}")


class WidthConfig(Section):
    """How wide a student is that is made of another model's layers; what is left out stays as it is."""

    hidden: Positive | None = None  # channels of the residual stream
    intermediate: Positive | None = None  # neurons of each MLP
    heads: Positive | None = None  # that ask, in each layer

    @property
    def sizes(self) -> dict[str, int]:
        """What is set, as transformers' configs call it."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads")
        sizes = zip(names, (self.hidden, self.intermediate, self.heads), strict=True)
        return {name: size for name, size in sizes if size is not None}

    @model_validator(mode="after")
    def _says_something(self) -> "WidthConfig":
        if not self.sizes:
            raise ValueError("found no size; set hidden, intermediate or heads, or leave `width` out")
        return self


class AdapterConfig(Section):
    """Low-rank matrices that alone are trained, beside frozen ones; named as in peft's LoraConfig."""

    r: Positive = 16  # rank of each change
    lora_alpha: Positive = 32  # each change is multiplied by lora_alpha / r
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"  # every matrix of the layers; or names, or a pattern
    modules_to_save: list[str] = []  # trained whole; a classifier's head is so anyway
    merge: bool = False  # the saved models are whole; else the adapter alone, for its base


class StudentConfig(Section):
    """Made of the teacher's layers (`from: teacher`), a model of its own or its layers, or new (`config`)."""

    source: str = Field("teacher", alias="from")
    layers: Positive | None = None
    keep: Annotated[Any, BeforeValidator(_layers_kept)] = "influence"
    width: WidthConfig | None = None  # of a Llama, Mistral, Qwen2 or Qwen3
    shape: Annotated[Any, BeforeValidator(_shape)] = None  # 100m, or {model_type: llama, hidden_size: 512, …}
    tokenizer: str | None = None  # of one that is no model by name; the teacher's where None
    adapter: AdapterConfig | None = None  # which alone is trained; all of it where None

    @property
    def is_own(self) -> bool:
        """Whether it is a model that is loaded by its name."""
        return self.source not in ("teacher", "config")

    @property
    def is_cut(self) -> bool:
        """Whether it is made of a model's layers: some of them, or narrower."""
        asked = self.layers is not None or isinstance(self.keep, list) or self.width is not None
        return self.source != "config" and asked

    @property
    def own_tokens(self) -> str | None:
        """Where its tokenizer comes from, if not from the teacher."""
        return self.source if self.is_own else self.tokenizer

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what few have, so that older runs and sweeps are known again."""
        absent = {name for name in ("shape", "tokenizer", "width", "adapter") if getattr(self, name) is None}
        return {name: value for name, value in dump(self).items() if name not in absent}

    @model_validator(mode="after")
    def _is_whole(self) -> "StudentConfig":
        if self.source == "config" and self.shape is None:
            raise ValueError("a student `from: config` needs `shape: 100m`, or {model_type: llama, …}")
        if self.source != "config" and self.shape is not None:
            raise ValueError("`shape` goes with `from: config` only")
        if self.source == "config" and self.adapter is not None:
            raise ValueError(
                "`adapter` goes beside trained weights, and `from: config` has none; leave it out"
            )
        if self.is_own and self.tokenizer is not None:
            raise ValueError("`tokenizer` goes with `from: teacher` or `from: config`: a model has its own")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> "StudentConfig":
        listed = isinstance(self.keep, list)
        if self.source == "teacher" and not self.is_cut:
            raise ValueError("a student made from the teacher needs `layers: <how many>`, or `width`")
        if self.source == "config" and (self.layers or listed or self.width):
            raise ValueError("`layers`, `keep` and `width` are a model's; `from: config` has them in `shape`")
        if listed and self.layers not in (None, len(self.keep)):
            found = f"`layers` is {self.layers}, but `keep` lists {len(self.keep)}"
            raise ValueError(f"{found}; leave `layers` out")
        return self
