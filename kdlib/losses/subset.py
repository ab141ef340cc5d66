"""Part of the vocabulary in its place: the teacher's k likeliest tokens and one for all the rest, or
tokens drawn from it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.losses.divergences import Divergence, adaptive_kl


def top_k_pair(
    student_log_probs: Tensor, teacher_log_probs: Tensor, k: int, *, renormalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Student and teacher on the teacher's top k tokens and a bucket for the tail; both are distributions
    again.

    The log-probabilities are those over the full vocabulary at the temperature used, so a student that puts
    its mass outside the top k pays for it in the bucket.  A divergence of the pair is 0 where the two agree,
    never above that of the whole vocabulary (for every f-divergence: merging outcomes loses information), and
    equal to it when k = V.

    Args:
        student_log_probs, teacher_log_probs: [N, V].
        k: at least 1; V or more takes the whole vocabulary.
        renormalise: divide by the mass of the k instead of keeping a bucket, as most tools do.  Then a
            student with 99 % of its mass elsewhere pays nothing, as long as its ratios within the k are
            right.

    Returns:
        [N, k + 1] each; [N, k] renormalised; [N, V] where k covers the vocabulary.

    Reference: Anshumann et al. 2025, section on top-k and ghost token, https://arxiv.org/abs/2503.16870
    """
    if k < 1:
        raise ValueError(f"top_k is {k}, needs 1 or more")
    if k >= teacher_log_probs.shape[-1]:
        return student_log_probs, teacher_log_probs
    ids = teacher_log_probs.topk(k, dim=-1).indices
    pair = [log_probs.gather(-1, ids) for log_probs in (student_log_probs, teacher_log_probs)]
    if renormalise:
        return tuple(part.log_softmax(-1) for part in pair)
    tails = [_log_mass_outside(log_probs, ids) for log_probs in (student_log_probs, teacher_log_probs)]
    return tuple(torch.cat([part, tail], dim=-1) for part, tail in zip(pair, tails, strict=True))


@dataclass(frozen=True)
class OnTopK:
    """The same divergence, of the top k and the tail."""

    divergence: Divergence
    k: int
    renormalise: bool = False

    def __call__(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return self.divergence(
            *top_k_pair(student_log_probs, teacher_log_probs, self.k, renormalise=self.renormalise)
        )


@dataclass(frozen=True)
class OnSamples:
    """An unbiased estimate of the same divergence from `count` tokens drawn from the teacher, with
    replacement.

    An f-divergence is a sum over tokens; each drawn token's summand is divided by the probability with which
    it was drawn, the teacher's own.  Value and gradient are then right on average over draws, as the
    student's normaliser is that of the whole vocabulary; a single value may be negative.  0 where the two
    agree, for any draw.  adaptive_kl is no such sum: not for it.

    Reference: Anshumann et al. 2025 ("random sampling KD"), https://arxiv.org/abs/2503.16870
    """

    divergence: Divergence
    count: int

    def __call__(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        if self.divergence is adaptive_kl or getattr(self.divergence, "divergence", None) is adaptive_kl:
            raise ValueError(
                "adaptive_kl is not a sum over tokens, so it has no unbiased estimate from samples; use "
                "another divergence"
            )
        ids = teacher_log_probs.exp().multinomial(self.count, replacement=True)
        student, teacher = (
            log_probs.gather(-1, ids)[..., None] for log_probs in (student_log_probs, teacher_log_probs)
        )
        # one summand at a time: V = 1
        return (self.divergence(student, teacher) / teacher[..., 0].exp()).mean(-1)


def _log_mass_outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[N, 1] log of the mass of all tokens but these; -inf where there is none.  Not log(1 - mass
    inside), which cancels.
    """
    rest = log_probs.scatter(-1, ids, -math.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)  # logsumexp's gradient is nan there
    return rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
