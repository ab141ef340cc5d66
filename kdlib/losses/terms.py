"""What the terms on logits are made of: TokenFunctions, of logits, with one value per token.

And divergences of a part of the vocabulary: the top k tokens and one bucket for the rest, or tokens drawn.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config.loss import check_temperature
from kdlib.losses.divergences import KNOWN, Divergence
from kdlib.losses.signals import wide, widest


def log_probs(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """log softmax(logits / T), in float32 at least, whatever the model's dtype; T from 0.01 to 100."""
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
    logits = logits.to(wide(logits.dtype))
    if not torch.compiler.is_compiling():
        return F.log_softmax(logits * (1 / temperature), dim=-1)
    # written out it fuses with its surroundings, and terms share it whatever their T
    top = logits.detach().amax(-1, keepdim=True)
    scaled = (logits - top) * (1 / temperature)
    return scaled - scaled.exp().sum(-1, keepdim=True).log()


@dataclass(frozen=True)
class SoftTargets:
    """T^power x divergence, both sides divided by T: the weight keeps its meaning when T moves."""

    divergence: Divergence = KNOWN["forward_kl"].function
    power: int = 2

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float
    ) -> Tensor:
        assert teacher is not None
        pair = log_probs(student, temperature), log_probs(teacher, temperature)
        by_logits = {"by": teacher} if isinstance(self.divergence, OnTopK) else {}
        return temperature**self.power * self.divergence(*pair, **by_logits)


def cross_entropy(
    student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """-log p(the token that came), always at T = 1; nats."""
    logs = log_probs(student)
    if not torch.compiler.is_compiling():
        return -logs.gather(-1, targets[:, None])[:, 0]
    # fuses; gather's gradient is an [n, V] of its own
    came = torch.arange(logs.shape[-1], device=logs.device) == targets[:, None]
    return -logs.masked_fill(~came, 0.0).sum(-1)


def accuracy(
    student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """1 where the student's first choice is the token that came."""
    return (student.argmax(-1) == targets).to(wide(student.dtype))


def agreement(
    student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    """1 where student and teacher have the same first choice."""
    assert teacher is not None
    return (student.argmax(-1) == teacher.argmax(-1)).to(wide(student.dtype))


def top_k_pair(
    student: Tensor, teacher: Tensor, k: int, *, renormalise: bool = False, by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Student and teacher on the teacher's top k tokens and a bucket for the tail: distributions again.

    Of log-probabilities over the full vocabulary at the temperature used, so a student that puts its mass
    outside the top k pays for it in the bucket.  An f-divergence (all here but adaptive_kl) of the pair is
    never above that of the whole vocabulary, as merging outcomes loses information; equal when k = V.

    Args:
        k: at least 1; V or more takes the whole vocabulary.
        renormalise: divide by the mass of the k instead of keeping a bucket, as most tools do.  A student
            with 99 % of its mass elsewhere then pays nothing, as long as its ratios within the k are right.
        by: [N, V] what the k are the largest of; the teacher's log-probabilities where None.  Its logits tell
            apart what rounding makes equal at a high temperature.

    Returns:
        [N, k + 1] each; [N, k] renormalised; [N, V] where k covers the vocabulary.  In float64, where the
        device has it: the k are little of the vocabulary, and at a high temperature little of the mass.

    Reference: Anshumann et al. 2025, section on top-k and ghost token, https://arxiv.org/abs/2503.16870
    """
    if k < 1:
        raise ValueError(f"top_k is {k}, needs 1 or more")
    if k >= teacher.shape[-1]:
        return student, teacher
    ids = (teacher if by is None else by).topk(k, dim=-1).indices

    def part(log_probs: Tensor) -> Tensor:
        likeliest = widest(log_probs.gather(-1, ids))
        if renormalise:
            return likeliest.log_softmax(-1)
        return torch.cat([likeliest, _log_mass_outside(log_probs, ids, likeliest)], -1)

    return part(student), part(teacher)


@dataclass(frozen=True)
class OnTopK:
    """The same divergence, of the top k and the tail."""

    divergence: Divergence
    k: int
    renormalise: bool = False

    def __call__(self, student: Tensor, teacher: Tensor, by: Tensor | None = None) -> Tensor:
        """`by`: see `top_k_pair`."""
        pair = top_k_pair(student, teacher, self.k, renormalise=self.renormalise, by=by)
        return self.divergence(*pair).to(student.dtype)


@dataclass(frozen=True)
class OnSamples:
    """An unbiased estimate of the divergence from `count` tokens that the teacher draws, with replacement.

    An f-divergence is a sum over tokens; each drawn token's summand is divided by the probability with which
    it was drawn, the teacher's own.  Value and gradient are then right on average over draws, as the
    log-probabilities are of the whole vocabulary; a single value may be negative.  The noise of a KL's
    gradient falls as 1/T, its mean as 1/T^2: twice the temperature asks for four times the samples.

    Reference: Anshumann et al. 2025 ("random sampling KD"), https://arxiv.org/abs/2503.16870
    """

    divergence: Divergence
    count: int

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        named = getattr(self.divergence, "divergence", self.divergence)
        if getattr(named, "__name__", "") == "adaptive_kl":
            raise ValueError("adaptive_kl is not a sum over tokens: no sample estimates it; use another")
        ids = teacher.exp().multinomial(self.count, replacement=True)
        drawn, theirs = student.gather(-1, ids), teacher.gather(-1, ids)
        # [N, count, 1]: one summand at a time
        return (self.divergence(drawn[..., None], theirs[..., None]) / theirs.exp()).mean(-1)


def _log_mass_outside(log_probs: Tensor, ids: Tensor, likeliest: Tensor) -> Tensor:
    """[N, 1] log of the mass of all tokens but these; -inf where none.

    Of a small rest its own sum, as 1 - mass would cancel; of a large one 1 - mass, whose error is smaller.
    """
    rest = log_probs.scatter(-1, ids, -math.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)  # logsumexp's gradient is nan there
    summed = widest(rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True))
    mass = likeliest.exp().sum(-1, keepdim=True)
    outside = torch.where(mass < 0.5, torch.log1p(-mass.clamp(max=0.5)), summed)
    return outside.masked_fill(nothing, -math.inf)
