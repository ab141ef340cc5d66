"""Divergences: how far the student's next-token distribution is from the teacher's, token by token.

Pure functions of log-probabilities; they know no mask, weight, temperature, log or step.  Each takes

    student: [N, V] log-probabilities (natural log); each row a distribution; -inf means "never".
    teacher: [N, V] likewise, same vocabulary order; no gradient flows into it.

and returns [N] nats (total variation: [N] from 0 to 1), >= 0 up to rounding and 0 where the two agree.  All
raise ValueError where the two differ in shape.  Below them: the same of the teacher's k likeliest tokens and
one bucket for all the rest, or of tokens that it draws.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

LogProbs = Tensor  # [N, V]
Divergence = Callable[[LogProbs, LogProbs], Tensor]
Named = TypeVar("Named", bound=Divergence)
KNOWN: dict[str, tuple[Divergence, str]] = {}
"""Every divergence and its formula, by the name that a config may give; `{at}` takes the temperature.

A new one is a function here, with `@divergence`: kdlib.config.loss reads names and options off this file.
"""


def divergence(formula: str) -> Callable[[Named], Named]:
    """Makes a function one of the KNOWN; its keyword-only arguments are options, numbers from 0 to 1."""

    def known(function: Named) -> Named:
        KNOWN[function.__name__] = function, formula
        return function

    return known


@divergence("KL(teacher ‖ student; {at})")
def forward_kl(student: LogProbs, teacher: LogProbs) -> Tensor:
    """KL(teacher || student): the student must cover everything that the teacher might say.

    +inf where the student excludes what the teacher says.

    Reference: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531
    """
    _check_shapes(student, teacher)
    return _kl(teacher, student)


@divergence("KL(student ‖ teacher; {at})")
def reverse_kl(student: LogProbs, teacher: LogProbs) -> Tensor:
    """KL(student || teacher): the student must not say what the teacher would not; it may settle on one mode.

    +inf where the student says what the teacher excludes.

    Reference: Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543
    """
    _check_shapes(student, teacher)
    return _kl(student, teacher)


@divergence("JSD(teacher, student; {at})")
def generalized_jsd(student: LogProbs, teacher: LogProbs, *, beta: float = 0.5) -> Tensor:
    """From forward KL (beta 0) over four times the Jensen-Shannon divergence (0.5) to reverse KL (1).

    [beta KL(teacher || m) + (1 - beta) KL(student || m)] / (beta (1 - beta)), where
    m = beta teacher + (1 - beta) student.

    Agarwal et al. and TRL leave out the division: theirs tends to 0 at both ends, and TRL jumps to a KL
    exactly there.  Ours is continuous, so that beta can be swept without changing the weight's meaning.

    Reference: Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649
    """
    _check_shapes(student, teacher)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = _mixture(teacher, student, beta)
    return _kl(teacher, mixture) / (1 - beta) + _kl(student, mixture) / beta


@divergence("KL(teacher ‖ skewed student; {at})")
def skewed_forward_kl(student: LogProbs, teacher: LogProbs, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student): forward KL with a bounded gradient.

    At most -log(alpha), also where the student excludes what the teacher says.

    Reference: Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898
    """
    _check_shapes(student, teacher)
    return _kl(teacher, _mixture(teacher, student, alpha))


@divergence("KL(student ‖ skewed teacher; {at})")
def skewed_reverse_kl(student: LogProbs, teacher: LogProbs, *, alpha: float = 0.1) -> Tensor:
    """KL(student || (1 - alpha) teacher + alpha student): reverse KL with a bounded gradient.

    At most -log(alpha), also where the student says what the teacher excludes.

    Reference: Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898
    """
    _check_shapes(student, teacher)
    return _kl(student, _mixture(student, teacher, alpha))


@divergence("AKL(teacher, student; {at})")
def adaptive_kl(student: LogProbs, teacher: LogProbs, *, head: float = 0.5) -> Tensor:
    """Forward and reverse KL, mixed by where the student is wrong: at the teacher's likely tokens or others.

    The head is the fewest of the teacher's likeliest tokens that hold a mass of `head` (and those as likely
    as its last).  Forward KL weighs by the share of |teacher - student| that lies in the head, reverse KL by
    the rest; no gradient flows into that share.

    Reference: Wu et al. 2024, https://arxiv.org/abs/2404.02657
    """
    _check_shapes(student, teacher)
    gap = (teacher.exp() - student.detach().exp()).abs()
    head_gap = (gap * _likeliest(teacher, head)).sum(-1)
    share = head_gap / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return share * _kl(teacher, student) + (1 - share) * _kl(student, teacher)


@divergence("TV(teacher, student; {at})")
def total_variation(student: LogProbs, teacher: LogProbs) -> Tensor:
    """Half the summed difference of probabilities: the most by which the chance of any event differs.

    From 0 to 1.

    Reference: Wen et al. 2023 (f-DISTILL), https://arxiv.org/abs/2307.15190
    """
    _check_shapes(student, teacher)
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


@dataclass(frozen=True)
class WithOptions:
    """A divergence with its options; two alike are equal, so what was compiled for one serves the other."""

    divergence: Divergence
    options: tuple[tuple[str, float], ...]

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.divergence(student, teacher, **dict(self.options))


def chosen(spec: str | Mapping[str, Mapping[str, float]]) -> tuple[Divergence, str]:
    """The divergence of a config, `reverse_kl` or `{generalized_jsd: {beta: 0.3}}`, and its formula."""
    ((name, options),) = spec.items() if isinstance(spec, Mapping) else [(spec, {})]
    function, formula = KNOWN[name]
    settings = "".join(f"{option}={value:g}, " for option, value in options.items())
    found = WithOptions(function, tuple(options.items())) if options else function
    return found, formula.replace("{at}", settings + "{at}")


def top_k_pair(
    student: Tensor, teacher: Tensor, k: int, *, renormalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Student and teacher on the teacher's top k tokens and a bucket for the tail: distributions again.

    Of log-probabilities over the full vocabulary at the temperature used, so a student that puts its mass
    outside the top k pays for it in the bucket.  An f-divergence (all here but adaptive_kl) of the pair is
    never above that of the whole vocabulary, as merging outcomes loses information; equal when k = V.

    Args:
        k: at least 1; V or more takes the whole vocabulary.
        renormalise: divide by the mass of the k instead of keeping a bucket, as most tools do.  A student
            with 99 % of its mass elsewhere then pays nothing, as long as its ratios within the k are right.

    Returns:
        [N, k + 1] each; [N, k] renormalised; [N, V] where k covers the vocabulary.

    Reference: Anshumann et al. 2025, section on top-k and ghost token, https://arxiv.org/abs/2503.16870
    """
    if k < 1:
        raise ValueError(f"top_k is {k}, needs 1 or more")
    if k >= teacher.shape[-1]:
        return student, teacher
    ids = teacher.topk(k, dim=-1).indices

    def part(log_probs: Tensor) -> Tensor:
        likeliest = log_probs.gather(-1, ids)
        if renormalise:
            return likeliest.log_softmax(-1)
        return torch.cat([likeliest, _log_mass_outside(log_probs, ids)], -1)

    return part(student), part(teacher)


@dataclass(frozen=True)
class OnTopK:
    """The same divergence, of the top k and the tail."""

    divergence: Divergence
    k: int
    renormalise: bool = False

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.divergence(*top_k_pair(student, teacher, self.k, renormalise=self.renormalise))


@dataclass(frozen=True)
class OnSamples:
    """An unbiased estimate of the divergence from `count` tokens that the teacher draws, with replacement.

    An f-divergence is a sum over tokens; each drawn token's summand is divided by the probability with which
    it was drawn, the teacher's own.  Value and gradient are then right on average over draws, as the
    log-probabilities are of the whole vocabulary; a single value may be negative.

    Reference: Anshumann et al. 2025 ("random sampling KD"), https://arxiv.org/abs/2503.16870
    """

    divergence: Divergence
    count: int

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        if adaptive_kl in (self.divergence, getattr(self.divergence, "divergence", None)):
            raise ValueError("adaptive_kl is not a sum over tokens: no sample estimates it; use another")
        ids = teacher.exp().multinomial(self.count, replacement=True)
        drawn, theirs = student.gather(-1, ids), teacher.gather(-1, ids)
        # [N, count, 1]: one summand at a time
        return (self.divergence(drawn[..., None], theirs[..., None]) / theirs.exp()).mean(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row; gradient flows into both."""
    difference = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)  # 0 * (-inf - x) is 0 here, not nan
    return (log_p.exp() * difference).sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if not 0 < share < 1:
        return log_p if share == 1 else log_q
    never = log_p.isneginf() & log_q.isneginf()  # logaddexp's gradient is nan there
    ours = (log_p + math.log(share)).masked_fill(never, 0.0)
    theirs = (log_q + math.log1p(-share)).masked_fill(never, 0.0)
    return torch.logaddexp(ours, theirs).masked_fill(never, -math.inf)


def _likeliest(log_probs: Tensor, mass: float) -> Tensor:
    """[N, V] True for the fewest likeliest tokens that hold this mass.

    By bisection of the threshold, as a sort of V costs more.  Tokens whose log-probabilities differ by less
    than 3e-4 may count as equally likely.
    """
    probs = log_probs.exp()
    # all tokens below it hold less than 1 - mass
    lowest = math.log((1 - mass) / log_probs.shape[-1]) - 1 if mass < 1 else -math.inf
    low, high = (torch.full_like(log_probs[..., :1], bound) for bound in (lowest, 0.0))
    for _ in range(16):  # > low holds the mass, > high does not
        middle = (low + high) / 2
        enough = (probs * (log_probs > middle)).sum(-1, keepdim=True) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return log_probs > low


def _log_mass_outside(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[N, 1] log of the mass of all tokens but these; -inf where none.  Not log(1 - mass), which cancels."""
    rest = log_probs.scatter(-1, ids, -math.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)  # logsumexp's gradient is nan there
    return rest.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)


def _check_shapes(student: LogProbs, teacher: LogProbs) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has log-probs {tuple(student.shape)}, teacher {tuple(teacher.shape)}; a divergence "
            "needs one vocabulary and the same tokens: slice both heads to the tokenizer's size, or use a "
            "tokenizer-free term"
        )
