"""The loss of a config: which terms, with which weights and temperatures over training, measured how.

All faults come at once: a field that depends on others stands after them and sees those that are
sound in `info.data`: `weights` after `curriculum`, `samples` after `divergence` and `top_k`.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, WrapValidator

from kdlib.config.sections import Number, Positive, Section, fraction, number, refuse, statements, whole
from kdlib.errors import nearest, printable
from kdlib.schedulers import (
    SHAPES,
    Spec,
    curriculum_conflicts,
    curriculum_disorder,
    idle,
    normal,
    sampled,
    with_curriculum,
)

DIVERGENCES = {
    node.name: tuple(option.arg for option in node.args.kwonlyargs)
    for node in statements("kdlib.losses", "divergences.py")
    if isinstance(node, ast.FunctionDef)
    and any(ast.unparse(mark).startswith("divergence(") for mark in node.decorator_list)
}
"""{name: options} of those that kdlib.losses.divergences marks as such; importing it would load torch."""
FEATURE_TERMS = ("hidden", "attention", "relational", "contrastive")
"""The terms on what goes on inside, token by token: those of kdlib.losses.features."""
SPAN_TERMS = ("span_kl", "projected_kl", "alm", "uld")
"""The terms of a teacher with another tokenizer: those of kdlib.losses.alignment."""
ROUTER = "router_aux"
"""The term of a student with experts: the auxiliary loss by which its router uses them evenly."""
TERM_NAMES = ("kd", "ce", *DIVERGENCES, *SPAN_TERMS, *FEATURE_TERMS, ROUTER)
FOR_ITSELF = {"contrastive": 0.1, "alm": 100.0}
"""Terms whose temperature is none of soft targets: what is given for all is not meant for them."""
TEMPERATURES = {**dict.fromkeys(("kd", *DIVERGENCES, *SPAN_TERMS), 2.0), **FOR_ITSELF}
"""The terms that have a temperature, with the one they take unless told otherwise."""

COOLEST, HOTTEST = 0.01, 100.0
"""The temperatures that float32 can carry: at 1000 a KL is smaller than the rounding of a probability."""


def _divergence(value: Any) -> Any:
    """`reverse_kl`, or `{generalized_jsd: {beta: 0.3}}`."""
    name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or name not in DIVERGENCES:
        hint = nearest(str(name), DIVERGENCES)
        raise ValueError(f"found {value!r}{hint}; it is one of {', '.join(DIVERGENCES)}")
    known = ", ".join(DIVERGENCES[name])
    if not isinstance(options, dict) or not set(options) <= set(DIVERGENCES[name]):
        form = f"{{{name}: {{option: number}}}}"
        raise ValueError(f"found {value!r}; {name} takes {known or 'no options'}: {form}")
    numbers = {option: number(found) for option, found in options.items()}
    if None in map(fraction, numbers.values()):
        raise ValueError(f"found {value!r}; {known} of {name} lies from 0 to 1")
    return {name: numbers} if numbers else name


def _unfit(weights: Mapping[str, Any]) -> list[str]:
    """What is wrong with each weight by itself, a line each."""
    faults = []
    for name, spec in weights.items():
        if name not in TERM_NAMES:
            hint = nearest(name, TERM_NAMES)
            faults.append(f"there is no term {name!r}{hint}; the terms are {', '.join(TERM_NAMES)}")
        try:
            if min(sampled(spec)) < 0:
                faults.append(f"{printable(name)}: found {spec}; weights are 0 or more")
        except ValueError as error:
            faults.append(f"{printable(name)}: {error}")
    return faults


def _sound(weights: Mapping[str, Any], faults: list[str]) -> dict[str, Spec]:
    """The weights with all their numbers floats, where there are no faults."""
    refuse(faults)
    return {name: normal(spec) for name, spec in weights.items()}


def _weights(weights: dict, info: ValidationInfo) -> dict:
    """Sound one by one, and together with the curriculum where that is sound in itself."""
    phases = _plain(info.data.get("curriculum"))
    faults = _unfit(weights) + curriculum_conflicts(weights, phases)
    return _sound(weights, faults or (idle(weights, phases) if "curriculum" in info.data else []))


def _phase_weights(weights: dict, info: ValidationInfo) -> dict:
    faults = _unfit(weights)
    if info.data.get("ramp"):
        faults += [
            f"{name}: found the schedule {spec} beside `ramp`, needs a number; or leave `ramp` out"
            for name, spec in weights.items()
            if isinstance(spec, Mapping)
        ]
    return _sound(weights, faults)


def _by_term(temperature: Any) -> bool:
    """A mapping from terms, and not one schedule for all: no shape has a term's name."""
    return isinstance(temperature, Mapping) and not any(key in SHAPES for key in temperature)


def _temperature(value: Any) -> Any:
    """One for all terms, or one by term."""
    if not _by_term(value):
        return _in_range(value)
    known = f"the terms with a temperature are {', '.join(TEMPERATURES)}"
    if not value:
        refuse([f"found {value!r}; it is a number, a schedule, or a mapping from terms to these; {known}"])
    faults, found = [], {}
    for name, spec in value.items():
        if name not in TEMPERATURES:
            hint = "" if name in TERM_NAMES else nearest(str(name), [*TEMPERATURES, *SHAPES])
            faults.append(f"{name!r} has no temperature{hint}; {known}; schedules are {', '.join(SHAPES)}")
        try:
            found[name] = _in_range(spec)
        except ValueError as error:
            faults.append(f"{printable(str(name))}: {error}")
    refuse(faults)
    return found


def _in_range(spec: Any) -> Spec:
    check_temperature(*sampled(spec))
    return normal(spec)


def check_temperature(*temperatures: float) -> None:
    """
    Raises:
        ValueError: one of them is none that float32 can carry.
    """
    for found in temperatures:
        if not COOLEST <= found <= HOTTEST:
            between = f"from {COOLEST:g} to {HOTTEST:g}"
            raise ValueError(f"the temperature must stay {between}, found {found:g}; usual values are 1 to 4")


def _top_k(value: Any) -> Any:
    if isinstance(value, Mapping):
        if min(sampled(value)) < 1:
            raise ValueError(f"found {value}; every value must be 1 or more")
        return normal(value)
    if value is not None and whole(value) is None:
        raise ValueError(f"found {value!r}; it is a whole number of 1 or more, a schedule of such, or null")
    return whole(value)


def _samples(value: int | None, info: ValidationInfo) -> int | None:
    faults = []
    if (top_k := info.data.get("top_k")) is not None:
        likeliest = f"`top_k: {top_k}`; kd takes either random tokens or the likeliest: set one to null"
        faults.append(f"found {value} beside {likeliest}")
    if "adaptive_kl" in (info.data.get("divergence") or ()):
        why = "which is no sum over tokens that a sample could estimate; take another divergence, or top_k"
        faults.append(f"found {value} with the divergence adaptive_kl, {why}")
    refuse(faults if value is not None else [])
    return value


def _chunk(value: Any) -> Any:
    if (found := value if value == "auto" else whole(value)) is None:
        raise ValueError(f"found {value!r}; it is auto, or a whole number of 1 or more")
    return found


def _compile(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"found {value!r}; it is auto, true or false")
    return value


def _layers(value: Any) -> Any:
    """`even`, `{last: 3}`, or pairs [student's layer, teacher's layer]."""
    if isinstance(value, dict):
        fits = list(value) == ["last"] and type(value["last"]) is int and value["last"] >= 1
    elif isinstance(value, list) and value:
        pairs = [pair if isinstance(pair, list) and len(pair) == 2 else [None] for pair in value]
        fits = all(type(layer) is int and layer >= 0 for pair in pairs for layer in pair)
    else:
        fits = value == "even"
    if not fits:
        form = "even, {last: how many}, or pairs of layer numbers, [[student's, teacher's], …]"
        raise ValueError(f"found {value!r}; it is {form}")
    return value


def _phases(value: Any, handler: Callable[[Any], list["PhaseConfig"]]) -> list["PhaseConfig"]:
    """Each phase by itself and their order: faults of both kinds come together."""
    phases: list[PhaseConfig] = []
    faults: list[Any] = []
    if order := _disorder(value):
        error = ValueError("\n".join(order))
        faults.append({"type": "value_error", "loc": (), "input": value, "ctx": {"error": error}})
    try:
        phases = handler(value)
    except ValidationError as found:
        faults += found.errors()
    if faults:
        raise ValidationError.from_exception_data("curriculum", faults)
    return phases


def _disorder(value: Any) -> list[str]:
    """What is wrong between phases; nothing where one lacks numbers, which is a fault of its own."""
    if not isinstance(value, list) or not all(isinstance(phase, Mapping) for phase in value):
        return []
    plain = [
        {"until": fraction(phase.get("until")), "ramp": fraction(phase.get("ramp") or 0.0)} for phase in value
    ]
    return [] if any(None in phase.values() for phase in plain) else curriculum_disorder(plain)


def _plain(curriculum: "list[PhaseConfig] | None") -> list[dict]:
    return [phase.model_dump() for phase in curriculum or []]


class PhaseConfig(Section):
    """One phase of a curriculum (kdlib.schedulers)."""

    until: Annotated[Number, Field(gt=0, le=1)]
    ramp: Annotated[Number, Field(gt=0, le=1)] | None = None
    weights: Annotated[dict[str, Any], AfterValidator(_phase_weights)] = {}


class FeatureConfig(Section):
    """How feature terms pair the layers, and whether hidden states are compared by direction alone."""

    layers: Annotated[Any, BeforeValidator(_layers)] = "even"
    normalise: bool = True


class LossConfig(Section):
    """Weights and temperatures of the terms, numbers or schedules; and what kd measures."""

    curriculum: Annotated[list[PhaseConfig], WrapValidator(_phases)] | None = None
    weights: Annotated[dict[str, Any], AfterValidator(_weights)]
    temperature: Annotated[Any, AfterValidator(_temperature)] = 2.0
    divergence: Annotated[Any, BeforeValidator(_divergence)] = "forward_kl"
    top_k: Annotated[Any, BeforeValidator(_top_k)] = None
    top_k_tail: Literal["bucket", "renormalise"] = "bucket"
    samples: Annotated[Positive | None, AfterValidator(_samples)] = None
    features: FeatureConfig = FeatureConfig()
    chunk: Annotated[Any, BeforeValidator(_chunk)] = "auto"
    compile: Annotated[Any, BeforeValidator(_compile)] = "auto"

    @property
    def schedules(self) -> dict[str, Spec]:
        """The weights over the whole training, the curriculum resolved into them."""
        return with_curriculum(self.weights, _plain(self.curriculum))

    @property
    def feature_terms(self) -> list[str]:
        return [name for name in self.schedules if name in FEATURE_TERMS]

    @property
    def has_one_temperature(self) -> bool:
        """For all terms, and not one by term."""
        return not _by_term(self.temperature)

    def temperatures(self, terms: Iterable[str]) -> dict[str, Spec]:
        """The temperature over training of each of these terms that has one.

        What is given for all is not meant for those that have one FOR_ITSELF.
        """
        for_all = dict.fromkeys(set(TEMPERATURES) - {*FOR_ITSELF}, self.temperature)
        given = {**TEMPERATURES, **(for_all if self.has_one_temperature else self.temperature)}
        return {term: given[term] for term in terms if term in TEMPERATURES}


class BaselineConfig(Section):
    """A second student that differs in its loss weights alone: same start, data, order, steps, rate."""

    weights: Annotated[
        dict[str, Any], AfterValidator(lambda weights: _sound(weights, _unfit(weights) or idle(weights, [])))
    ] = {"ce": 1.0}

    @property
    def feature_terms(self) -> list[str]:
        return [name for name in self.weights if name in FEATURE_TERMS]
