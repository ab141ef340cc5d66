"""The loss of a config: which terms, with which weights and temperatures over training, measured how.
Imports no torch.

Checks are written so that all faults come at once: a field that depends on others stands after them and sees
those that are sound; so `curriculum` stands before `weights`, and `samples` after `divergence` and `top_k`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, WrapValidator

from kdlib.config.sections import Count, Number, Section, fraction, number, refuse, whole
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
    "forward_kl": (),
    "reverse_kl": (),
    "generalized_jsd": ("beta",),
    "skewed_forward_kl": ("alpha",),
    # with their options
    "skewed_reverse_kl": ("alpha",),
    "adaptive_kl": ("head",),
    "total_variation": (),
}
TERM_NAMES = ("kd", "ce", *DIVERGENCES, "hidden", "attention", "relational", "contrastive")
"""What may be weighted: what kdlib.losses.objective knows; a test keeps the two alike, and the
divergences.
"""
TEMPERATURES = {**dict.fromkeys(("kd", *DIVERGENCES), 2.0), "contrastive": 0.1}
"""The terms that have a temperature, with the one they take unless told otherwise."""


def _divergence(value: Any) -> Any:
    """`reverse_kl`, or `{generalized_jsd: {beta: 0.3}}`."""
    name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or name not in DIVERGENCES:
        raise ValueError(
            f"found {value!r}{nearest(str(name), DIVERGENCES)}; it is one of {', '.join(DIVERGENCES)}"
        )
    known = DIVERGENCES[name]
    if not isinstance(options, dict) or not all(option in known for option in options):
        raise ValueError(
            f"found {value!r}; {name} takes {', '.join(known) or 'no options'}: {{{name}: {{option: "
            f"number}}}}"
        )
    numbers = {option: number(found) for option, found in options.items()}
    if not all(isinstance(found, (int, float)) and 0 <= found <= 1 for found in numbers.values()):
        raise ValueError(f"found {value!r}; {', '.join(known)} of {name} lies from 0 to 1")
    return {name: numbers} if numbers else name


def _unfit(weights: Mapping[str, Any]) -> list[str]:
    """What is wrong with each weight by itself, a line each."""
    faults = []
    for name, spec in weights.items():
        if name not in TERM_NAMES:
            faults.append(
                f"there is no term {name!r}{nearest(name, TERM_NAMES)}; the terms are {', '.join(TERM_NAMES)}"
            )
        try:
            if min(sampled(spec)) < 0:
                faults.append(f"{printable(name)}: found {spec}; weights are 0 or more")
        except ValueError as error:
            faults.append(f"{printable(name)}: {error}")
    return faults


def _weights(weights: dict, info: ValidationInfo) -> dict:
    """Sound one by one, and together with the curriculum where that is sound in itself."""
    phases = _plain(info.data.get("curriculum"))
    faults = _unfit(weights) + curriculum_conflicts(weights, phases)
    refuse(faults or (idle(weights, phases) if "curriculum" in info.data else []))
    return {name: normal(spec) for name, spec in weights.items()}


def _baseline_weights(weights: dict) -> dict:
    refuse(_unfit(weights) or idle(weights, []))
    return {name: normal(spec) for name, spec in weights.items()}


def _phase_weights(weights: dict, info: ValidationInfo) -> dict:
    moving = [name for name, spec in weights.items() if isinstance(spec, Mapping) and info.data.get("ramp")]
    refuse(
        _unfit(weights)
        + [
            f"{name}: found the schedule {weights[name]} beside `ramp`, needs a number; or leave `ramp` out"
            for name in moving
        ]
    )
    return {name: normal(spec) for name, spec in weights.items()}


def _temperature(value: Any) -> Any:
    """One for all terms, or one by term: no shape has a term's name."""
    if not isinstance(value, Mapping) or any(key in SHAPES for key in value):
        return _above_zero(value)
    faults, found, known = [], {}, f"the terms with a temperature are {', '.join(TEMPERATURES)}"
    for name, spec in value.items():
        if name not in TEMPERATURES:
            hint = "" if name in TERM_NAMES else nearest(str(name), [*TEMPERATURES, *SHAPES])
            faults.append(f"{name!r} has no temperature{hint}; {known}; schedules are {', '.join(SHAPES)}")
        try:
            found[name] = _above_zero(spec)
        except ValueError as error:
            faults.append(f"{printable(str(name))}: {error}")
    refuse(
        faults
        if value
        else [f"found {value!r}; it is a number, a schedule, or a mapping from terms to these; {known}"]
    )
    return found


def _above_zero(spec: Any) -> Spec:
    if min(sampled(spec)) <= 0:
        raise ValueError(f"the temperature must stay above 0, found {spec}; usual values are 1 to 4")
    return normal(spec)


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
    if value is not None and (top_k := info.data.get("top_k")) is not None:
        faults.append(
            f"found {value} beside `top_k: {top_k}`; kd takes either random tokens or the likeliest: set one "
            "of the two to null"
        )
    if value is not None and "adaptive_kl" in (info.data.get("divergence") or ()):
        faults.append(
            f"found {value} with the divergence adaptive_kl, which is no sum over tokens that a sample could "
            "estimate; "
            "take another divergence, or top_k"
        )
    refuse(faults)
    return value


def _chunk(value: Any) -> Any:
    if value != "auto" and whole(value) is None:
        raise ValueError(f"found {value!r}; it is auto, or a whole number of 1 or more")
    return value if value == "auto" else whole(value)


def _compile(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"found {value!r}; it is auto, true or false")
    return value


def _layers(value: Any) -> Any:
    """`even`, `{last: 3}`, or pairs [student's layer, teacher's layer]."""
    if value == "even" or (
        isinstance(value, dict)
        and list(value) == ["last"]
        and type(value["last"]) is int
        and value["last"] >= 1
    ):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        and all(type(layer) is int and layer >= 0 for pair in value for layer in pair)
    ):
        return value
    raise ValueError(
        f"found {value!r}; it is even, {{last: how many}}, or pairs of layer numbers, [[student's, "
        "teacher's], …]"
    )


def _phases(value: Any, handler: Callable[[Any], list["PhaseConfig"]]) -> list["PhaseConfig"]:
    """Each phase by itself and their order, so that faults of both kinds come together."""
    order, faults, phases = _disorder(value), [], []
    if order:
        faults = [
            {"type": "value_error", "loc": (), "input": value, "ctx": {"error": ValueError("\n".join(order))}}
        ]
    try:
        phases = handler(value)
    except ValidationError as error:
        faults += [
            {key: fault[key] for key in ("type", "loc", "input", "ctx") if key in fault}
            for fault in error.errors()
        ]
    if faults:
        raise ValidationError.from_exception_data("curriculum", faults)
    return phases


def _disorder(value: Any) -> list[str]:
    """What is wrong between phases; nothing where one has no numbers to judge that by, which is a fault
    of its own.
    """
    if not isinstance(value, list) or not all(isinstance(phase, Mapping) for phase in value):
        return []
    plain = [
        {"until": fraction(phase.get("until")), "ramp": fraction(phase.get("ramp", 0.0) or 0.0)}
        for phase in value
    ]
    return (
        []
        if any(found is None for phase in plain for found in phase.values())
        else curriculum_disorder(plain)
    )


def _plain(curriculum: "list[PhaseConfig] | None") -> list[dict]:
    return [phase.model_dump() for phase in curriculum or []]


class PhaseConfig(Section):
    """One phase of a curriculum (kdlib.schedulers): until which fraction of training, with which weights."""

    until: Annotated[Number, Field(gt=0, le=1)]
    ramp: Annotated[Number, Field(gt=0, le=1)] | None = None
    weights: Annotated[dict[str, Any], AfterValidator(_phase_weights)] = {}


class FeatureConfig(Section):
    """How the terms that compare hidden states and attention pair the layers, and whether they compare
    directions alone.
    """

    layers: Annotated[Any, BeforeValidator(_layers)] = "even"
    normalise: bool = True


class LossConfig(Section):
    """The terms' weights and temperatures, numbers or schedules over training (kdlib.schedulers); and
    what kd measures.
    """

    curriculum: Annotated[list[PhaseConfig], WrapValidator(_phases)] | None = None
    weights: Annotated[dict[str, Any], AfterValidator(_weights)]
    temperature: Annotated[Any, AfterValidator(_temperature)] = 2.0
    divergence: Annotated[Any, BeforeValidator(_divergence)] = "forward_kl"
    top_k: Annotated[Any, BeforeValidator(_top_k)] = None
    top_k_tail: Literal["bucket", "renormalise"] = "bucket"
    samples: Annotated[Annotated[Count, Field(ge=1)] | None, AfterValidator(_samples)] = None
    features: FeatureConfig = FeatureConfig()
    chunk: Annotated[Any, BeforeValidator(_chunk)] = "auto"
    compile: Annotated[Any, BeforeValidator(_compile)] = "auto"

    @property
    def schedules(self) -> dict[str, Spec]:
        """The weights over the whole training, the curriculum resolved into them."""
        return with_curriculum(self.weights, _plain(self.curriculum))

    def temperatures(self, terms: Iterable[str]) -> dict[str, Spec]:
        """The temperature over training of each of these terms that has one.

        Args:
            terms: the weighted ones, which may be the baseline's.

        A temperature given for all terms is not meant for `contrastive`, whose similarities lie within -1 and
        1.
        """
        by_term = isinstance(self.temperature, Mapping) and not any(key in SHAPES for key in self.temperature)
        given = (
            self.temperature
            if by_term
            else dict.fromkeys(set(TEMPERATURES) - {"contrastive"}, self.temperature)
        )
        return {term: given.get(term, TEMPERATURES[term]) for term in terms if term in TEMPERATURES}


class BaselineConfig(Section):
    """A second student that differs in its loss weights alone: same start, data, order, steps, learning
    rate.
    """

    weights: Annotated[dict[str, Any], AfterValidator(_baseline_weights)] = {"ce": 1.0}
