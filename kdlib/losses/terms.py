"""What the terms on logits are made of: TokenFunctions, of logits, with one value per token.

And divergences of a part of the vocabulary: the top k tokens and one bucket for the rest, or tokens drawn;
and of two vocabularies, where both models have read the same bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config.terms import check_temperature
from kdlib.losses.divergences import KNOWN, Divergence
from kdlib.losses.signals import wide, widest
from kdlib.tokens.vocabulary import Vocabularies

LIKELIEST = 256  # of each side's tokens that `uld` sorts


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


@dataclass(frozen=True)
class Agreement:
    """1 where student and teacher have the same first choice: a token, or of two vocabularies its bytes."""

    vocabularies: Vocabularies | None = None

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0
    ) -> Tensor:
        assert teacher is not None
        ours = student.argmax(-1)
        same = ours if self.vocabularies is None else self.vocabularies.shared.index_select(0, ours)
        return (same == teacher.argmax(-1)).to(wide(student.dtype))


agreement = Agreement()


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
    ours, theirs = (of_tokens(each, ids, renormalise=renormalise) for each in (student, teacher))
    return ours, theirs


def of_tokens(log_probs: Tensor, ids: Tensor, *, renormalise: bool = False) -> Tensor:
    """[N, k + 1] log-probabilities of these tokens, [N, k] ids, and of all others together.

    Renormalise: [N, k], of these tokens given that one of them comes.
    """
    likeliest = widest(log_probs.gather(-1, ids))
    if renormalise:
        return likeliest.log_softmax(-1)
    return torch.cat([likeliest, log_mass_outside(log_probs, ids, likeliest)], -1)


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


def log_mass_outside(log_probs: Tensor, ids: Tensor, likeliest: Tensor) -> Tensor:
    """[N, 1] log of the mass of all tokens but these; -inf where none.

    Of a small rest its own sum, as 1 - mass would cancel; of a large one 1 - mass, whose error is smaller.
    """
    rest = log_probs.scatter(-1, ids, -math.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)  # logsumexp's gradient is nan there
    summed = widest(rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True))
    mass = likeliest.exp().sum(-1, keepdim=True)
    outside = torch.where(mass < 0.5, torch.log1p(-mass.clamp(max=0.5)), summed)
    return outside.masked_fill(nothing, -math.inf)


def span_kl(student: Tensor, teacher: Tensor, vocabularies: Vocabularies | None) -> Tensor:
    """KL(teacher || student) over the tokens that both have and one bucket for all others: [n] nats.

    Exact on what is shared; a side that puts its mass on tokens of its own pays for it in the bucket.  Where
    every token of the student's is shared it has no bucket, and the teacher's distribution is taken given
    that a shared token comes.  One more pass over the teacher's logits than a plain KL.

    Args:
        student: [n, student's V] log-probabilities.
        teacher: [n, teacher's V] likewise.
        vocabularies: None where they are one.
    """
    forward_kl = KNOWN["forward_kl"].function
    if vocabularies is None:
        return forward_kl(student, teacher)
    theirs = vocabularies.in_students(teacher)
    if not len(vocabularies.others):
        return forward_kl(student, theirs)
    if not len(vocabularies.own):
        return forward_kl(student, theirs.log_softmax(-1))
    rest = teacher.index_select(-1, vocabularies.others).logsumexp(-1)
    ours = student.index_select(-1, vocabularies.own).logsumexp(-1)
    # forward_kl adds the student's mass less the teacher's, 0 over all outcomes: here less the bucket's
    return forward_kl(student, theirs) + rest.exp() * (rest - ours - 1)


def projected_kl(
    student: Tensor, teacher: Tensor, vocabularies: Vocabularies | None, top_k: int | None = None
) -> Tensor:
    """KL(teacher || student) over the smaller vocabulary, into which the larger's tokens are cut: [n] nats.

    A token of the larger counts as the first of the pieces that make it (itself, where both have it): what
    the smaller tokenizer would have to say next.  So no token is left out but those that cannot be cut, and a
    number that one side says at once teaches its first digit.  An approximation where the text to come would
    be cut otherwise than the token by itself.  One more pass over the larger vocabulary's logits.

    Args:
        student, teacher, vocabularies: as of `span_kl`.
        top_k: of the teacher's likeliest tokens, with a bucket for the tail; the whole where None.

    Reference: X-Token (P-KL) 2026, https://arxiv.org/abs/2605.21699, which always cuts the student's, and
        spreads a token over all of its pieces; but the first alone can stand at this position
    """
    if vocabularies is not None:
        if vocabularies.onto_student:
            teacher = vocabularies.cut(teacher)
        else:
            student = vocabularies.cut(student)
        if len(vocabularies.never):
            student, teacher = (
                each.index_fill(-1, vocabularies.never, -math.inf) for each in (student, teacher)
            )
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    divergence = KNOWN["forward_kl"].function
    return (OnTopK(divergence, top_k) if top_k else divergence)(student, teacher)


def uld(student: Tensor, teacher: Tensor, vocabularies: Vocabularies | None) -> Tensor:
    """How differently sure two models are, whatever they are sure of: [n], from 0 to 2.

    The sum of the differences between their sorted probabilities: of the 256 likeliest tokens each, and of
    the mass of all others, where Boizard et al. sort the whole vocabularies, which costs ten times as much.
    It knows no token by its name: 0 also where two models are equally sure of opposite things.

    Reference: Boizard et al. 2024 (ULD), https://arxiv.org/abs/2402.12030
    """
    k = min(LIKELIEST, student.shape[-1], teacher.shape[-1])
    ours, theirs = (each.topk(k, dim=-1).values.exp() for each in (student, teacher))
    return (ours - theirs).abs().sum(-1) + (ours.sum(-1) - theirs.sum(-1)).abs()


@dataclass(frozen=True)
class Across:
    """A measure of two vocabularies' log-probabilities as a TokenFunction, at the size of its gradient."""

    measure: Callable[..., Tensor]
    vocabularies: Vocabularies | None = None
    power: int = 2  # of the temperature; 1 where linear in small differences
    top_k: int | None = None

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, temperature: Tensor | float
    ) -> Tensor:
        assert teacher is not None
        pair = log_probs(student, temperature), log_probs(teacher, temperature)
        likeliest = {"top_k": self.top_k} if self.top_k else {}
        return temperature**self.power * self.measure(*pair, self.vocabularies, **likeliest)


FORMULAS = {
    "span_kl": "T²·KL(teacher ‖ student on shared tokens; {at})",
    "projected_kl": "T²·KL(teacher ‖ student on first pieces; {at})",
    "uld": "T·ULD(teacher, student; {at})",
    "alm": "ALM(teacher, student; {at})",
}
"""As a formula writes them; `{at}` takes the temperature."""
ON_LOGITS: dict[str, Across | Agreement] = {
    "span_kl": Across(span_kl),
    "projected_kl": Across(projected_kl),
    "uld": Across(uld, power=1),
    "kl_to_teacher": Across(span_kl),
    "agreement": agreement,
}
"""By the names of terms; the last two are evaluation's."""


def across(
    name: str, vocabularies: Vocabularies | None = None, top_k: int | None = None
) -> Across | Agreement:
    """A term on the logits of two vocabularies, or of one where None; `top_k` is for projected_kl."""
    if name == "projected_kl":
        return Across(projected_kl, vocabularies, top_k=top_k)
    return replace(ON_LOGITS[name], vocabularies=vocabularies)
