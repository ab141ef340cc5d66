"""The teacher's k likeliest tokens in place of the whole vocabulary: k log-probabilities and one for all the rest."""

import math

import torch
from torch import Tensor

from kdlib.losses.divergences import Divergence


def top_k_pair(
    student_log_probs: Tensor, teacher_log_probs: Tensor, k: int, *, renormalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Student and teacher on the teacher's top k tokens and a bucket for the tail; both are distributions again.

    The log-probabilities are those over the full vocabulary at the temperature used, so a student that puts its mass outside
    the top k pays for it in the bucket.  A divergence of the pair is 0 where the two agree, never above that of the whole
    vocabulary (for every f-divergence: merging outcomes loses information), and equal to it when k = V.

    Args:
        student_log_probs, teacher_log_probs: [N, V].
        k: at least 1; V or more takes the whole vocabulary.
        renormalise: divide by the mass of the k instead of keeping a bucket, as most tools do.  Then a student with 99 % of
            its mass elsewhere pays nothing, as long as its ratios within the k are right.

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


def on_top_k(divergence: Divergence, k: int, *, renormalise: bool = False) -> Divergence:
    """The same divergence, of the top k and the tail."""
    return lambda student, teacher: divergence(*top_k_pair(student, teacher, k, renormalise=renormalise))


def _log_mass_outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[N, 1] log of the mass of all tokens but these; -inf where there is none.  Not log(1 - mass inside), which cancels."""
    rest = log_probs.scatter(-1, ids, -math.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)  # logsumexp's gradient is nan there
    return rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)
