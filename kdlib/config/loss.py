"""The loss of a config: which terms, with which weights and temperatures over training, measured how.

All faults come at once: a field that depends on others stands after them and sees those that are
sound in `info.data`: `weights` after `curriculum`, `samples` after `divergence` and `top_k`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, WrapValidator

from kdlib.config.sections import Number, Positive, Section, fraction, number, refuse, whole
from kdlib.config.terms import (
    DIVERGENCES,
    FEATURE_TERMS,
    FOR_ITSELF,
    ROUTE_WEIGHTS,
    TEMPERATURES,
    TERM_NAMES,
    check_temperature,
    compiled,
    layers_or,
    map_of_layers,
)
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


def _top_k(value: Any) -> Any:
    if isinstance(value, Mapping):
        if min(sampled(value)) < 1:
            raise ValueError(f"found {value}; every value must be 1 or more")
        return normal(value)
    if value is not None and whole(value) is None:
        raise ValueError(f"found {value!r}; it is a whole number of 1 or more, a schedule of such, or null")
    return whole(value)


def _noise(value: Any) -> Any:
    if min(sampled(value)) < 0:
        raise ValueError(f"found {value}; every value must be 0 or more")
    return normal(value)


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


def _features(value: "FeatureConfig", info: ValidationInfo) -> "FeatureConfig":
    """A gate goes with the hidden term, and its own terms with a gate."""
    if not {"weights", "curriculum"} <= set(info.data):
        return value
    named = with_curriculum(info.data["weights"], _plain(info.data["curriculum"]))
    faults = []
    if value.route and not max(sampled(named.get("hidden", 0.0))):
        faults.append(
            "layers.route is for the hidden term, which has no weight; give loss.weights.hidden one"
        )
    for name in [] if value.route else [name for name in ROUTE_WEIGHTS if name in named]:
        faults.append(
            f"{name} has a weight, but there is no gate; set layers: {{route: {{…}}}}, or leave it out"
        )
    refuse(faults)
    return value


def _chunk(value: Any) -> Any:
    if (found := value if value == "auto" else whole(value)) is None:
        raise ValueError(f"found {value!r}; it is auto, or a whole number of 1 or more")
    return found


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


class RouteConfig(Section):
    """How a gate chooses, for each token and student's layer, which of the teacher's states to match."""

    top_k: Annotated[Any, BeforeValidator(lambda value: _top_k(value or 0))] = 2  # sources of each token
    temperature: Annotated[Any, AfterValidator(_in_range)] = 1.0  # of the gate's softmax
    noise: Annotated[Any, AfterValidator(_noise)] = 0.0  # standard deviation, on its logits
    student_layers: Annotated[Any, AfterValidator(layers_or("all", "last"))] = "all"
    sources: Annotated[Any, AfterValidator(layers_or("all"))] = "all"  # the teacher's layers
    experts: bool = False  # each expert of its last layer that has some is a source too


class Routed(Section):
    route: RouteConfig = RouteConfig()  # in place of a fixed map of layers


def _layers(value: Any, handler: Any) -> Any:
    """A map of layers, or {route: …} in its place."""
    is_routed = isinstance(value, Routed) or (isinstance(value, dict) and "route" in value)
    return Routed.model_validate(value) if is_routed else map_of_layers(value)


class FeatureConfig(Section):
    """How feature terms pair the layers, and whether hidden states are compared by direction alone."""

    layers: Annotated[Routed | Any, WrapValidator(_layers)] = "even"
    normalise: bool = True

    @property
    def route(self) -> RouteConfig | None:
        """How `hidden` is routed, where it is."""
        return self.layers.route if isinstance(self.layers, Routed) else None

    @property
    def fixed(self) -> Any:
        """The map of layers of terms that are not routed."""
        return "even" if self.route else self.layers


class LossConfig(Section):
    """Weights and temperatures of the terms, numbers or schedules; and what kd measures."""

    curriculum: Annotated[list[PhaseConfig], WrapValidator(_phases)] | None = None
    weights: Annotated[dict[str, Any], AfterValidator(_weights)]
    temperature: Annotated[Any, AfterValidator(_temperature)] = 2.0
    divergence: Annotated[Any, BeforeValidator(_divergence)] = "forward_kl"
    top_k: Annotated[Any, BeforeValidator(_top_k)] = None
    top_k_tail: Literal["bucket", "renormalise"] = "bucket"
    samples: Annotated[Positive | None, AfterValidator(_samples)] = None
    features: Annotated[FeatureConfig, AfterValidator(_features)] = Field(
        default=FeatureConfig(), validate_default=True
    )
    chunk: Annotated[Any, BeforeValidator(_chunk)] = "auto"
    compile: Annotated[Any, BeforeValidator(compiled)] = "auto"

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
