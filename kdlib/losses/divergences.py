"""Divergences: how far the student's next-token distribution is from the teacher's, token by token.

Pure functions of log-probabilities; they know no mask, weight, temperature, log or step.  Each takes

    student: [N, V] log-probabilities (natural log); each row a distribution; -inf means "never".
    teacher: [N, V] likewise, same vocabulary order; no gradient flows into it.

and returns [N] nats (total variation: [N] from 0 to 1), >= 0 up to rounding and 0 where the two agree.  All
raise ValueError where the two differ in shape, or where the first row of one is no distribution: raw logits,
say.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor

LogProbs = Tensor  # [N, V]
Divergence = Callable[[LogProbs, LogProbs], Tensor]
Named = TypeVar("Named", bound=Divergence)


@dataclass(frozen=True)
class Known:
    """A divergence as the objective takes it."""

    function: Divergence  # which looks at nothing but numbers: no check, no wait for a device
    formula: str  # `{at}` takes options and temperature
    power: int = 2  # of the temperature: T^power keeps the size of the gradient when T moves

    @property
    def factor(self) -> str:
        """As the formula writes it: `T²·`."""
        return "T²·" if self.power == 2 else "T·"


KNOWN: dict[str, Known] = {}
"""Every divergence by the name that a config may give.

A new one is a function here, with `@divergence`: kdlib.config.loss reads names and options off this file.
"""


def divergence(formula: str, *, power: int = 2) -> Callable[[Named], Named]:
    """Makes a function one of the KNOWN; its keyword-only arguments are options, numbers from 0 to 1.

    What stands in this module under its name checks that it was given log-probabilities.

    Args:
        power: 2 where it is quadratic in small differences, as f-divergences with a smooth f are; 1 where
            linear.  With both sides divided by T its gradient shrinks as 1 / T^power.
    """

    def known(function: Named) -> Named:
        KNOWN[function.__name__] = Known(function, formula, power)

        @wraps(function)
        def checked(student: LogProbs, teacher: LogProbs, **options: float) -> Tensor:
            _check_rows(student=student, teacher=teacher)
            return function(student, teacher, **options)

        return cast(Named, checked)

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


@divergence("TV(teacher, student; {at})", power=1)
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


def chosen(spec: str | Mapping[str, Mapping[str, float]]) -> Known:
    """The divergence of a config: `reverse_kl`, or `{generalized_jsd: {beta: 0.3}}`."""
    ((name, options),) = spec.items() if isinstance(spec, Mapping) else [(spec, {})]
    known = KNOWN[name]
    if not options:
        return known
    settings = "".join(f"{option}={value:g}, " for option, value in options.items())
    formula = known.formula.replace("{at}", settings + "{at}")
    return replace(known, function=WithOptions(known.function, tuple(options.items())), formula=formula)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row; gradient flows into both.

    With sum(q - p), which is 0 but for rounding: so an error of the logarithms that is common to a row drops
    out.  Without it a KL of 1e-5, as at T = 100, was wrong by per cents.
    """
    difference = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)  # 0 * (-inf - x) is 0 here, not nan
    p = log_p.exp()
    value = (p * difference).sum(-1)
    if log_p.shape[-1] == 1:  # a summand (OnSamples), not a distribution
        return value
    return value + (log_q.detach().exp() - p.detach()).sum(-1)


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


def _check_rows(**sides: LogProbs) -> None:
    """That the first row of each is a distribution; a look at all of them would cost as much as the loss."""
    for side, log_probs in sides.items():
        if torch.compiler.is_compiling() or log_probs.numel() == 0 or log_probs.shape[-1] == 1:
            continue
        with torch.no_grad():
            total = log_probs.detach()[(0,) * (log_probs.ndim - 1)].double().exp().sum().item()
        if abs(total - 1) > (1e-3 if torch.finfo(log_probs.dtype).eps < 1e-4 else 0.1):
            raise ValueError(
                f"{side}: the first row's exponentials sum to {total:.4g}; a divergence needs "
                "log-probabilities, whose exponentials sum to 1: pass (logits / temperature).log_softmax(-1)"
            )


def _check_shapes(student: LogProbs, teacher: LogProbs) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has log-probs {tuple(student.shape)}, teacher {tuple(teacher.shape)}; a divergence "
            "needs one vocabulary and the same tokens: slice both heads to the tokenizer's size, or use a "
            "tokenizer-free term"
        )
