"""The objective: terms x schedules -> Ledger.  A plain function, the same for training and evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.diagnostics.ledger import Entry, Ledger
from kdlib.losses.divergences import Divergence, chosen, forward_kl
from kdlib.losses.linear import CHUNK, TokenFunction, term_sums, token_values
from kdlib.losses.subset import on_top_k
from kdlib.schedulers import Schedule
from kdlib.signals import Signal


def soft_target_loss(temperature: float, divergence: Divergence = forward_kl) -> TokenFunction:
    """T^2 x divergence with both sides divided by T; the T^2 keeps the weight's meaning when T moves."""

    def per_token(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        student_log_probs = log_probs(student_logits, temperature)
        return temperature**2 * divergence(student_log_probs, log_probs(teacher_logits, temperature))

    return per_token


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """-log p(the token that came), always at T = 1; [n] nats."""
    return F.nll_loss(log_probs(student_logits), targets, reduction="none")


def accuracy(student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
    """1 where the student's first choice is the token that came."""
    return (student_logits.argmax(-1) == targets).to(log_probs_dtype(student_logits))


def agreement(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """1 where student and teacher have the same first choice."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(log_probs_dtype(student_logits))


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T), in float32 at least, whatever the model's dtype."""
    return F.log_softmax(logits.to(log_probs_dtype(logits)) / temperature, dim=-1)


def log_probs_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits (tests), float32 for all others."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: how it is computed at a temperature, whether it needs the teacher, how it is written."""

    at: Callable[[float, Divergence], TokenFunction]
    needs_teacher: bool
    formula: str  # {divergence} is the divergence's own


TERMS = {
    "kd": Term(soft_target_loss, needs_teacher=True, formula="T²·{divergence}"),
    "ce": Term(lambda temperature, divergence: cross_entropy, needs_teacher=False, formula="CE"),
}
"""The terms that a config may weight."""

MEASURES = {"ce": cross_entropy, "kl_to_teacher": soft_target_loss(1.0), "agreement": agreement, "accuracy": accuracy}
"""What evaluation measures beside the objective: independent of weights and temperature."""


@dataclass(frozen=True)
class Objective:
    """Which terms, with which weight and temperature at which moment of training."""

    weights: Mapping[str, Schedule]
    temperature: Schedule
    divergence: str | Mapping[str, Mapping[str, float]] = "forward_kl"
    top_k: int | None = None  # of the teacher's tokens; the whole vocabulary where None
    renormalise: bool = False  # the top k, rather than keep a bucket for the tail

    def at(self, fraction: float) -> "Moment":
        """The objective at this fraction of training, 0 to 1.  Terms of weight 0 are gone, not computed."""
        weights = {name: schedule(fraction) for name, schedule in self.weights.items()}
        active = {name: weight for name, weight in weights.items() if weight != 0}
        divergence, formula = chosen(self.divergence)
        if self.top_k:
            divergence = on_top_k(divergence, self.top_k, renormalise=self.renormalise)
            formula = formula.replace("{at}", f"{{at}}, top-{self.top_k} {'renormalised' if self.renormalise else '+ tail'}")
        return Moment(active, self.temperature(fraction), divergence, formula)


@dataclass(frozen=True)
class Moment:
    """The objective at one moment: plain numbers."""

    weights: Mapping[str, float]
    temperature: float
    divergence: Divergence
    divergence_formula: str

    @property
    def needs_teacher(self) -> bool:
        return any(TERMS[name].needs_teacher for name in self.weights)

    @property
    def functions(self) -> list[TokenFunction]:
        return [TERMS[name].at(self.temperature, self.divergence) for name in self.weights]

    @property
    def formula(self) -> str:
        """`loss = 0.7·T²·KL(teacher ‖ student; T=2) + 0.3·CE`"""
        divergence = self.divergence_formula.format(at=f"T={self.temperature:g}")
        terms = [f"{weight:g}·{TERMS[name].formula.format(divergence=divergence)}" for name, weight in self.weights.items()]
        return "loss = " + (" + ".join(terms) or "0")


def ledger(
    student: Signal, teacher: Signal | None, targets: Tensor, *, moment: Moment, count: Tensor | int, chunk: int = CHUNK
) -> Ledger:
    """What these kept tokens cost: the ledger whose `total` is back-propagated.

    Args:
        student, teacher: signals of the same N kept tokens; the teacher may be None if `moment.needs_teacher` is False.
        targets: [N] token ids.
        count: kept tokens of the whole optimizer step: all micro-batches, all ranks.
    """
    if not moment.weights:
        raise ValueError("every weight is 0 at this moment, so there is nothing to learn from; give one term a weight")
    sums = term_sums(
        student, teacher, targets, functions=moment.functions, weights=list(moment.weights.values()), chunk=chunk
    )
    return Ledger({name: Entry(sums[i], count, weight) for i, (name, weight) in enumerate(moment.weights.items())})


@torch.no_grad()
def row_sums(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    rows: Tensor,
    *,
    row_count: int,
    functions: Sequence[TokenFunction],
    chunk: int = CHUNK,
) -> Tensor:
    """[row_count, functions + 1] sums of the tokens of each row, the token count last: what evaluation adds up.

    Row by row, so that ranks can drop the rows that a sampler repeated, and comparisons can resample rows.
    """
    values = token_values(student, teacher, targets, functions=functions, chunk=chunk)
    values = torch.cat([values, values.new_ones(1, values.shape[1])])
    return values.new_zeros(row_count, len(values)).index_add_(0, rows, values.T)
