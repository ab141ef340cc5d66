"""The objective: terms x schedules -> Ledger.  A plain function, the same for training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.config.terms import FOR_ITSELF, GATED, ROUTE_WEIGHTS, ROUTER, SPAN_TERMS, TEMPERATURES
from kdlib.losses.alignment import Counts, SpanSignal, TeacherSignal, alm, arranged, features_beside, unit_of
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import TokenFunction, Weighted, differentiable_values, term_sums, token_values
from kdlib.losses.divergences import KNOWN, Known, chosen
from kdlib.losses.features import FEATURE_TERMS, FeatureTerm, Route, RouteAt, feature_terms, feature_values
from kdlib.losses.ledger import Entry, Ledger
from kdlib.losses.signals import PartSignal, Signal
from kdlib.losses.terms import (
    FORMULAS,
    ON_LOGITS,
    OnSamples,
    OnTopK,
    SoftTargets,
    accuracy,
    across,
    agreement,
    cross_entropy,
)
from kdlib.schedulers import Schedule, constant

EVAL_TERMS = {
    "ce": Weighted(cross_entropy),
    "kl_to_teacher": Weighted(SoftTargets()),
    "agreement": Weighted(agreement),
    "accuracy": Weighted(accuracy),
}
"""What evaluation looks at beside the objective: independent of weights and temperature."""


@dataclass(frozen=True)
class Objective:
    """Which terms, with which weight and temperature, at which fraction of training."""

    weights: Mapping[str, Schedule]  # of kd, ce, divergences and feature terms, by their names
    temperature: Schedule | Mapping[str, Schedule] = constant(2.0)  # one for all soft targets, or by term
    divergence: str | Mapping[str, Mapping[str, float]] = "forward_kl"  # of the kd term
    top_k: Schedule | int | None = None  # of the teacher's tokens, in kd; the whole vocabulary where None
    renormalise: bool = False  # the top k, rather than keep a bucket for the tail
    samples: int | None = None  # tokens drawn from the teacher, in kd: an unbiased estimate
    normalise: bool = True  # hidden states, in the hidden term
    layers: str = "even"  # which are compared, in words: for the formula
    route: Route | None = None  # how a gate chooses what `hidden` compares

    def at(self, fraction: float, *, sampled: bool = True) -> "ObjectiveAt":
        """The objective at this fraction of training, 0 to 1.  Terms of weight 0 are gone, not computed.

        Not `sampled`, kd is taken of the whole vocabulary, and no gate explores: evaluation is without noise,
        and leaves training's random numbers as they are.
        """
        active = {name: weight for name, each in self.weights.items() if (weight := each(fraction))}
        kd, k = chosen(self.divergence), None
        if self.top_k:
            k = round(self.top_k(fraction)) if callable(self.top_k) else self.top_k
            tail = "renormalised" if self.renormalise else "+ tail"
            formula = kd.formula.replace("{at}", f"{{at}}, top-{k} {tail}")
            kd = replace(kd, function=OnTopK(kd.function, k, self.renormalise), formula=formula)
        if self.samples and sampled:
            formula = kd.formula.replace("{at}", f"{{at}}, from {self.samples} samples")
            kd = replace(kd, function=OnSamples(kd.function, self.samples), formula=formula)
        temperatures = {name: self.temperature_of(name)(fraction) for name in active if name in TEMPERATURES}
        route = self.route.at(fraction, noisy=sampled) if self.route else None
        return ObjectiveAt(active, temperatures, kd, self.normalise, self.layers, k, route)

    @property
    def without_chance(self) -> "Objective":
        """The same, of the whole vocabulary and without a gate's noise."""
        still = replace(self.route, noise=constant(0.0)) if self.route else None
        return replace(self, samples=None, route=still)

    @property
    def in_full(self) -> "ObjectiveAt":
        """One in which each term has a weight: for what they ask of the models."""
        return replace(self.at(0.0, sampled=False), weights=dict.fromkeys(self.weights, 1.0))

    def planned(self, fraction: float) -> dict[str, float]:
        """Weights, temperatures and a gate's k at this fraction, by the names under which they are logged."""
        weights = {f"{name}_weight": schedule(fraction) for name, schedule in self.weights.items()}
        return weights | {name: schedule(fraction) for name, schedule in self.logged_schedules.items()}

    @property
    def logged_schedules(self) -> dict[str, Schedule]:
        """Besides weights: kd's temperature, each term's where it has its own; a gate's, and its k."""
        route, each = self.route, {}
        gate = {"gate_top_k": route.k, "gate_temperature": route.temperature} if route else {}
        if isinstance(main := self.temperature, Mapping):
            each = {f"{name}_temperature": schedule for name, schedule in main.items()}
            main = main.get("kd", next(iter(main.values()), constant(1.0)))
        return {"temperature": main, **each, **gate}

    def temperature_of(self, name: str) -> Schedule:
        """A term's temperature; the one given for all is that of soft targets, which not all terms are."""
        if isinstance(self.temperature, Mapping):
            return self.temperature[name]
        return constant(TEMPERATURES[name]) if name in FOR_ITSELF else self.temperature


@dataclass(frozen=True)
class ObjectiveAt:
    """The objective at one fraction of training: numbers."""

    weights: Mapping[str, float]
    temperatures: Mapping[str, float]
    kd: Known = KNOWN["forward_kl"]  # what the kd term measures
    normalise: bool = True
    layers: str = "even"
    top_k: int | None = None
    route: RouteAt | None = None

    @property
    def needs_teacher(self) -> bool:
        return any(name not in ("ce", ROUTER) for name in self.weights)

    @property
    def compared(self) -> list[FeatureTerm]:
        """The feature terms that compare layers in pairs."""
        return feature_terms(name for name in self.weights if not (self.route and name in GATED))

    @property
    def needs_hidden(self) -> bool:
        return any(not term.attention for term in self.compared)

    @property
    def needs_projection(self) -> bool:
        return any(term.projected for term in self.compared)

    @property
    def needs_attention(self) -> bool:
        return any(term.attention for term in self.compared)

    @property
    def needs_gate(self) -> bool:
        return self.route is not None and any(name in self.weights for name in GATED)

    @property
    def needs_router(self) -> bool:
        return ROUTER in self.weights

    @property
    def logit_terms(self) -> dict[str, Weighted]:
        return {
            name: Weighted(self._function(name), weight, self.temperatures.get(name, 1.0))
            for name, weight in self.weights.items()
            if name not in FEATURE_TERMS and name not in ("alm", ROUTER, *ROUTE_WEIGHTS)
        }

    def terms_beside(self, teacher: TeacherSignal | None, **more: Weighted) -> dict[str, Weighted]:
        """`logit_terms` and more, as this teacher's signal is read: of two vocabularies, or of a part."""
        terms = {**self.logit_terms, **more}
        if not isinstance(teacher, SpanSignal):
            read_by = teacher.read_by if isinstance(teacher, PartSignal) else lambda name, term: term
            return {name: read_by(name, term) for name, term in terms.items()}
        known = {name: across(name, teacher.vocabularies, self.top_k) for name in terms if name in ON_LOGITS}
        return {name: replace(term, function=known.get(name, term.function)) for name, term in terms.items()}

    @property
    def formula(self) -> str:
        """`loss = 0.7·T²·KL(teacher ‖ student; T=2) + 0.3·CE`"""
        parts = [f"{weight:g}·{self._written(name)}" for name, weight in self.weights.items()]
        return "loss = " + (" + ".join(parts) or "0")

    def _function(self, name: str) -> TokenFunction:
        if name == "ce":
            return cross_entropy
        if name in SPAN_TERMS:
            return across(name, top_k=self.top_k)
        known = self.kd if name == "kd" else chosen(name)
        return SoftTargets(known.function, known.power)

    def _written(self, name: str) -> str:
        if name in ("ce", ROUTER, *ROUTE_WEIGHTS):
            return "CE" if name == "ce" else name
        at = f"T={self.temperatures[name]:g}" if name in self.temperatures else ""
        if name in SPAN_TERMS:
            return FORMULAS[name].format(at=at)
        if name in FEATURE_TERMS:
            normalised = ", normalised" if name == "hidden" and self.normalise else ""
            layers = str(self.route) if self.route and name == "hidden" else self.layers
            return f"{name}({layers}{normalised}{at and f'; {at}'})"
        known = self.kd if name == "kd" else chosen(name)
        return known.factor + known.formula.format(at=at)


def ledger(
    student: Signal,
    teacher: TeacherSignal | None,
    targets: Tensor,
    *,
    at: ObjectiveAt,
    count: Tensor | int | Counts,
    workspace: Workspace | None = None,
) -> Ledger:
    """What these kept tokens cost: the ledger whose `total` is back-propagated.

    Args:
        student, teacher: of the same N kept tokens; no teacher where not `at.needs_teacher`.
        count: kept tokens of the whole optimizer step: all micro-batches, all ranks.  Counts where the
            teacher has a tokenizer of its own.
    """
    if not at.weights:
        raise ValueError("every weight is 0 at this moment: nothing to learn from; give one term a weight")
    terms, space, spans = at.terms_beside(teacher), workspace or Workspace(), isinstance(teacher, SpanSignal)
    units = {name: unit_of(name, spans=spans) for name in at.weights}
    counts = {name: getattr(count, units[name]) if isinstance(count, Counts) else count for name in units}
    sums = {n: v.sum() for n, v in feature_values(*features_beside(student, teacher), at).items()}
    if "alm" in at.weights and teacher is not None:  # ce is made of the same
        logs = -differentiable_values(student, targets, cross_entropy, space)
        sums["alm"] = alm(*_of_spans(logs, teacher, targets, space.chunk), at.temperatures["alm"]).sum()
        sums |= {"ce": -logs.sum()} if terms.pop("ce", None) else {}
    if terms:
        look = arranged(student, teacher, targets, [units[name] for name in terms])
        by = torch.stack([torch.as_tensor(counts[name], device=targets.device) for name in terms])
        pair, wanted = (look.student, look.teacher, look.targets), [*terms.values()]
        made = term_sums(*pair, terms=wanted, count=by, workspace=space, segments=look.segments)
        sums |= dict(zip(terms, made, strict=True))
    return Ledger({name: Entry(sums[name], counts[name], weight) for name, weight in at.weights.items()})


def _of_spans(
    ours: Tensor, teacher: TeacherSignal, targets: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """[S] log-probabilities of each span, student's and teacher's; of one vocabulary each token is a span."""
    said = teacher.said if isinstance(teacher, SpanSignal) else teacher
    came = teacher.targets if isinstance(teacher, SpanSignal) else targets
    with torch.no_grad():
        theirs = -token_values(said, None, came, terms=[Weighted(cross_entropy)], chunk=chunk)[0]
    return teacher.alignment.sums(ours, theirs) if isinstance(teacher, SpanSignal) else (ours, theirs)


def values_of(
    student: Signal,
    teacher: TeacherSignal | None,
    targets: Tensor,
    *,
    terms: Mapping[str, Weighted],
    at: ObjectiveAt | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """{term: [N] unweighted values} of these terms and of the objective's, those in both made once.

    A span's value stands at its first token; at tokens that a term has no value for it is 0.
    """
    at, lines = at or ObjectiveAt({}, {}), teacher.alignment if isinstance(teacher, SpanSignal) else None
    wanted, values = at.terms_beside(teacher, **terms), feature_values(*features_beside(student, teacher), at)
    if "alm" in at.weights and teacher is not None:
        logs = -differentiable_values(student, targets, cross_entropy, Workspace(chunk))
        values["alm"] = alm(*_of_spans(logs, teacher, targets, chunk), at.temperatures["alm"])
    if lines is not None:
        values = {n: v if n == ROUTER else lines.at_first(v) for n, v in values.items()}
    if not wanted:
        return values
    look = arranged(student, teacher, targets, [unit_of(n, spans=lines is not None) for n in wanted])
    pair, asked = (look.student, look.teacher, look.targets), [*wanted.values()]
    made = token_values(*pair, terms=asked, chunk=chunk, segments=look.segments)
    if (order := look.order) is not None:
        made = made.new_zeros(len(made), len(targets)).index_copy(1, order, made)
    return dict(zip(wanted, made, strict=True)) | values


def eval_terms(teacher: object) -> dict[str, Weighted]:
    """EVAL_TERMS; where there is no teacher, those that a student has alone."""
    return {name: term for name, term in EVAL_TERMS.items() if teacher or name in ("ce", "accuracy")}


@torch.no_grad()
def row_sums(
    student: Signal,
    teacher: TeacherSignal | None,
    targets: Tensor,
    rows: Tensor,
    *,
    row_count: int,
    terms: Mapping[str, Weighted] = EVAL_TERMS,
    at: ObjectiveAt | None = None,
    chunk: int | None = 128,
) -> dict[str, Tensor]:
    """{term: [row_count] unweighted sums over the tokens of each row}, and under `tokens` their number.

    And of spans, under `spans` and `single`, where the teacher has a tokenizer of its own.  Row by row, so
    that ranks can drop the rows that a sampler repeated, and comparisons can resample rows.

    Args:
        rows: [N] the row of each kept token.  The others as of `token_values`.
    """
    values = values_of(student, teacher, targets, terms=terms, at=at, chunk=chunk)
    ones = next(iter(values.values())).new_ones(len(targets))
    values["tokens"] = ones
    if isinstance(teacher, SpanSignal):
        lines = teacher.alignment
        values["spans"] = lines.at_first(ones[: lines.spans])
        values["single"] = torch.zeros_like(ones).index_fill(0, lines.first[lines.single], 1.0)
    return {name: value.new_zeros(row_count).index_add_(0, rows, value) for name, value in values.items()}
