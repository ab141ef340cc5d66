"""The objective: terms x schedules -> Ledger.  A plain function, the same for training and evaluation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config.loss import TEMPERATURES
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import TokenFunction, Weighted, term_sums, token_values
from kdlib.losses.divergences import FORMULAS, Divergence, OnSamples, OnTopK, chosen, forward_kl
from kdlib.losses.features import attention_divergence, contrastive_loss, hidden_distance, relational_distance
from kdlib.losses.ledger import Entry, Ledger
from kdlib.losses.signals import Features, Signal
from kdlib.schedulers import Schedule, constant


@dataclass(frozen=True)
class SoftTargets:
    """T^2 x divergence with both sides divided by T; the T^2 keeps the weight's meaning when T moves."""

    divergence: Divergence = forward_kl

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: Tensor | float
    ) -> Tensor:
        student_log_probs = log_probs(student_logits, temperature)
        return temperature**2 * self.divergence(student_log_probs, log_probs(teacher_logits, temperature))


def cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """-log p(the token that came), always at T = 1; [n] nats."""
    logs = log_probs(student_logits)
    if not torch.compiler.is_compiling():
        return -logs.gather(-1, targets[:, None])[:, 0]
    # fuses; gather's gradient is an [n, V] of its own
    came = torch.arange(logs.shape[-1], device=logs.device) == targets[:, None]
    return -logs.masked_fill(~came, 0.0).sum(-1)


def accuracy(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """1 where the student's first choice is the token that came."""
    return (student_logits.argmax(-1) == targets).to(log_probs_dtype(student_logits))


def agreement(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """1 where student and teacher have the same first choice."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(log_probs_dtype(student_logits))


def log_probs(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(logits / T), in float32 at least, whatever the model's dtype."""
    logits = logits.to(log_probs_dtype(logits))
    if not torch.compiler.is_compiling():
        return F.log_softmax(logits * (1 / temperature), dim=-1)
    # written out it fuses with its surroundings, and terms share it whatever their T
    top = logits.detach().amax(-1, keepdim=True)
    scaled = (logits - top) * (1 / temperature)
    return scaled - scaled.exp().sum(-1, keepdim=True).log()


def log_probs_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits (tests), float32 for all others."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(frozen=True)
class FeatureTerm:
    """A term on what goes on inside: the mean over the pairs of layers of one of kdlib.losses.features."""

    per_pair: Callable[..., Tensor]  # (student's, teacher's, rows, temperature, normalise) -> [N]
    attention: bool = False  # of the maps, not of the hidden states
    projected: bool = False  # needs the student's states in the teacher's size

    def values(self, student: Features, teacher: Features, *, temperature: float, normalise: bool) -> Tensor:
        """[N] per-token values."""
        ours = (
            student.attention if self.attention else student.projected if self.projected else student.hidden
        )
        theirs = teacher.attention if self.attention else teacher.hidden
        pairs = [
            self.per_pair(a, b, student.rows, temperature, normalise)
            for a, b in zip(ours, theirs, strict=True)
        ]
        return torch.stack(pairs).mean(0)


FEATURE_TERMS = {
    "hidden": FeatureTerm(
        lambda s, t, rows, temperature, normalise: hidden_distance(s, t, normalise=normalise), projected=True
    ),
    "attention": FeatureTerm(
        lambda s, t, rows, temperature, normalise: attention_divergence(s, t), attention=True
    ),
    "relational": FeatureTerm(lambda s, t, rows, temperature, normalise: relational_distance(s, t, rows)),
    "contrastive": FeatureTerm(
        lambda s, t, rows, temperature, normalise: contrastive_loss(s, t, rows, temperature=temperature),
        projected=True,
    ),
}


def feature_terms(names: Iterable[str]) -> list[FeatureTerm]:
    """Those of these terms that look inside the models."""
    return [FEATURE_TERMS[name] for name in names if name in FEATURE_TERMS]


TERMS = ("kd", "ce", *(divergence.__name__ for divergence in FORMULAS), *FEATURE_TERMS)
"""The terms that a config may weight: kd is the divergence that it names, the others are what their names
say.
"""

EVAL_TERMS = {
    "ce": Weighted(cross_entropy),
    "kl_to_teacher": Weighted(SoftTargets()),
    "agreement": Weighted(agreement),
    "accuracy": Weighted(accuracy),
}
"""What evaluation measures beside the objective: independent of weights and temperature."""


@dataclass(frozen=True)
class Objective:
    """Which terms, with which weight and temperature, at which moment of training."""

    weights: Mapping[str, Schedule]
    # one for all soft targets, or term by term
    temperature: Schedule | Mapping[str, Schedule] = constant(2.0)
    divergence: str | Mapping[str, Mapping[str, float]] = "forward_kl"  # of the kd term
    top_k: Schedule | int | None = None  # of the teacher's tokens, in kd; the whole vocabulary where None
    renormalise: bool = False  # the top k, rather than keep a bucket for the tail
    samples: int | None = None  # tokens drawn from the teacher, in kd: an unbiased estimate
    normalise: bool = True  # hidden states, in the hidden term
    layers: str = "even"  # which are compared, in words: for the formula

    def at(self, fraction: float, *, sampled: bool = True) -> "ObjectiveAt":
        """The objective at this fraction of training, 0 to 1.  Terms of weight 0 are gone, not computed.

        Args:
            sampled: False gives the expectation in place of an estimate from samples: for evaluation, which
                then neither adds noise nor moves the random numbers of the training.
        """
        weights = {name: schedule(fraction) for name, schedule in self.weights.items()}
        active = {name: weight for name, weight in weights.items() if weight != 0}
        divergence, formula = chosen(self.divergence)
        if self.top_k:
            k = round(self.top_k(fraction)) if callable(self.top_k) else self.top_k
            divergence = OnTopK(divergence, k, self.renormalise)
            formula = formula.replace(
                "{at}", f"{{at}}, top-{k} {'renormalised' if self.renormalise else '+ tail'}"
            )
        if self.samples:
            divergence = OnSamples(divergence, self.samples) if sampled else divergence
            formula = formula.replace("{at}", f"{{at}}, from {self.samples} samples" if sampled else "{at}")
        temperatures = {name: self.temperature_of(name)(fraction) for name in active if name in TEMPERATURES}
        return ObjectiveAt(active, temperatures, divergence, formula, self.normalise, self.layers)

    def planned(self, fraction: float) -> dict[str, float]:
        """Weights and temperatures at this fraction of training, by the names under which they are logged."""
        weights = {f"{name}_weight": schedule(fraction) for name, schedule in self.weights.items()}
        return weights | {name: course(fraction) for name, course in self.temperature_courses.items()}

    @property
    def temperature_courses(self) -> dict[str, Schedule]:
        """The temperature as it is logged: kd's, and where terms have their own, each term's."""
        if not isinstance(self.temperature, Mapping):
            return {"temperature": self.temperature}
        main = self.temperature.get("kd", next(iter(self.temperature.values()), constant(1.0)))
        return {
            "temperature": main,
            **{f"{name}_temperature": course for name, course in self.temperature.items()},
        }

    def temperature_of(self, name: str) -> Schedule:
        """The course of a term's temperature; the one given for all is not meant for a contrastive term's
        similarities.
        """
        if isinstance(self.temperature, Mapping):
            return self.temperature[name]
        return constant(TEMPERATURES[name]) if name == "contrastive" else self.temperature


@dataclass(frozen=True)
class ObjectiveAt:
    """The objective at one moment: plain numbers."""

    weights: Mapping[str, float]
    temperatures: Mapping[str, float]
    divergence: Divergence = forward_kl
    divergence_formula: str = FORMULAS[forward_kl]
    normalise: bool = True
    layers: str = "even"

    def alone(self, name: str) -> "ObjectiveAt":
        """The same with this term only."""
        return replace(self, weights={name: self.weights[name]})

    @property
    def needs_teacher(self) -> bool:
        return any(name != "ce" for name in self.weights)

    @property
    def needs_hidden(self) -> bool:
        return any(not term.attention for term in feature_terms(self.weights))

    @property
    def needs_projection(self) -> bool:
        return any(term.projected for term in feature_terms(self.weights))

    @property
    def needs_attention(self) -> bool:
        return any(term.attention for term in feature_terms(self.weights))

    @property
    def logit_terms(self) -> dict[str, Weighted]:
        """The terms that are made from logits."""
        return {
            name: Weighted(self._function(name), weight, self.temperatures.get(name, 1.0))
            for name, weight in self.weights.items()
            if name not in FEATURE_TERMS
        }

    def feature_values(self, student: Signal, teacher: Signal | None) -> dict[str, Tensor]:
        """{term: [N] unweighted values} of the terms on features; none are asked of the models where
        there is no such term.
        """
        return {
            name: FEATURE_TERMS[name].values(
                student.features,
                teacher.features,
                temperature=self.temperatures.get(name, 1.0),
                normalise=self.normalise,
            )
            for name in self.weights
            if name in FEATURE_TERMS
        }

    @property
    def formula(self) -> str:
        """`loss = 0.7·T²·KL(teacher ‖ student; T=2) + 0.3·CE`"""
        return "loss = " + (
            " + ".join(f"{weight:g}·{self._written(name)}" for name, weight in self.weights.items()) or "0"
        )

    def _function(self, name: str) -> TokenFunction:
        if name == "ce":
            return cross_entropy
        return SoftTargets(self.divergence if name == "kd" else chosen(name)[0])

    def _written(self, name: str) -> str:
        if name == "ce":
            return "CE"
        if name == "contrastive":
            return f"contrastive({self.layers}; T={self.temperatures[name]:g})"
        if name in FEATURE_TERMS:
            return f"{name}({self.layers}{', normalised' if name == 'hidden' and self.normalise else ''})"
        formula = self.divergence_formula if name == "kd" else chosen(name)[1]
        return "T²·" + formula.format(at=f"T={self.temperatures[name]:g}")


def ledger(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    *,
    at: ObjectiveAt,
    count: Tensor | int,
    workspace: Workspace | None = None,
) -> Ledger:
    """What these kept tokens cost: the ledger whose `total` is back-propagated.

    Args:
        student, teacher: signals of the same N kept tokens; the teacher may be None if `at.needs_teacher`
            is False.
        targets: [N] token ids.
        count: kept tokens of the whole optimizer step: all micro-batches, all ranks.
        workspace: what is kept between steps.
    """
    if not at.weights:
        raise ValueError(
            "every weight is 0 at this moment, so there is nothing to learn from; give one term a weight"
        )
    sums = {name: values.sum() for name, values in at.feature_values(student, teacher).items()}
    if terms := at.logit_terms:
        made = term_sums(
            student, teacher, targets, terms=list(terms.values()), count=count, workspace=workspace
        )
        sums |= dict(zip(terms, made, strict=True))
    return Ledger({name: Entry(sums[name], count, weight) for name, weight in at.weights.items()})


@torch.no_grad()
def row_sums(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    rows: Tensor,
    *,
    row_count: int,
    terms: Mapping[str, Weighted] = EVAL_TERMS,
    at: ObjectiveAt | None = None,
    chunk: int | None = 128,
) -> dict[str, Tensor]:
    """{term: [row_count] unweighted sums of the tokens of each row; tokens: their
    number}.

    Row by row, so that ranks can drop the rows that a sampler repeated, and comparisons can resample rows.  A
    term of the objective that is evaluated anyway is made once.
    """
    terms = {**(at.logit_terms if at else {}), **terms}
    values = dict(
        zip(
            terms,
            token_values(student, teacher, targets, terms=list(terms.values()), chunk=chunk),
            strict=True,
        )
    )
    values |= at.feature_values(student, teacher) if at else {}
    values["tokens"] = next(iter(values.values())).new_ones(len(targets))
    return {name: value.new_zeros(row_count).index_add_(0, rows, value) for name, value in values.items()}
