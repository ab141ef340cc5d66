"""The loss alone: from hidden states and output heads to the gradients of the student's, one way after
another.

Axes: N tokens, V vocabulary, H hidden, n tokens of a chunk.  What other packages offer is in
    kdlib.benchmarks.peers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.config.terms import SPAN_TERMS
from kdlib.losses.alignment import Alignment, SpanSignal, TeacherSignal
from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import Objective, ObjectiveAt, ledger
from kdlib.losses.signals import IGNORED, DenseSignal, Kept, LinearSignal, Signal
from kdlib.losses.terms import log_probs
from kdlib.schedulers import constant
from kdlib.tokens.vocabulary import Vocabularies

KD, CE = 0.7, 0.3  # weights
TEMPERATURE = 2.0
SPREAD = 3.0  # standard deviation of the logits: peaked, as a language model's are


@dataclass
class Problem:
    """The inputs of a loss; the gradients end in `hidden.grad` and `head.grad`."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H]
    teacher_head: Tensor  # [V, H]
    targets: Tensor  # [N]
    labels: Tensor  # [N]; the targets, IGNORED where a token is masked
    kept: Tensor = field(init=False)  # [kept] positions of the tokens that are not
    renamed: Tensor = field(init=False)  # [V] the teacher's id of each token, where it has other ids
    vocabularies: Vocabularies = field(init=False)  # these, but for a tenth that only one side has

    def __post_init__(self) -> None:
        self.kept = (self.labels != IGNORED).nonzero().squeeze(-1)
        size = len(self.head)
        self.renamed = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(self.head.device)
        shared = self.renamed.index_fill(0, torch.arange(0, size, 10, device=self.head.device), -1)
        self.vocabularies = Vocabularies(size, size, shared, self.renamed.argsort())

    def backward(self, loss: Tensor) -> Tensor:
        """Fresh gradients, as after `optimizer.zero_grad()`."""
        self.hidden.grad = self.head.grad = None
        loss.backward()
        return loss.detach()

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem in another dtype."""
        floats = (self.hidden, self.head, self.teacher_hidden, self.teacher_head)
        hidden, head, *teacher = [tensor.detach().to(dtype, copy=True) for tensor in floats]
        return Problem(hidden.requires_grad_(), head.requires_grad_(), *teacher, self.targets, self.labels)


def problem(
    *, tokens: int, hidden: int, vocabulary: int, masked: float, dtype: str, seed: int, device: str
) -> Problem:
    """Random inputs; the same for the same arguments."""
    torch.manual_seed(seed)
    like = {"device": device, "dtype": getattr(torch, dtype)}
    states = [torch.randn(tokens, hidden, **like) for _ in range(2)]
    heads = [torch.randn(vocabulary, hidden, **like).mul_(SPREAD / hidden**0.5) for _ in range(2)]
    targets = torch.randint(vocabulary, (tokens,), device=device)
    passed = (torch.arange(tokens + 1, device=device) * masked).floor()
    labels = targets.masked_fill(passed.diff() > 0, IGNORED)  # spread evenly
    return Problem(
        states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], targets, labels
    )


@dataclass(frozen=True)
class Setting:
    """How the chunked ways are set."""

    chunk: int
    top_k: int


Step = Callable[[], Tensor]
"""Makes the gradients once and returns the loss; whatever it keeps between calls, it keeps."""


@dataclass(frozen=True)
class Case:
    """One way, and what it computes: that is what it is checked against."""

    prepare: Callable[["Case", Problem, Setting], Step]
    divergence: str = "forward_kl"
    ce: bool = True
    masked: bool = False  # only the tokens of `kept` count
    top_k: bool = False
    term: str = "kd"  # or one of a teacher with other tokens
    # its forward KL is the cross-entropy with the teacher: the teacher's entropy more
    adds_entropy: bool = False

    def objective_at(self, setting: Setting) -> ObjectiveAt:
        """The objective that it computes."""
        weights = {self.term: constant(KD), **({"ce": constant(CE)} if self.ce else {})}
        top_k = setting.top_k if self.top_k else None
        return Objective(weights, constant(TEMPERATURE), self.divergence, top_k).at(0)

    def beside(self, teacher: Signal, problem: Problem) -> TeacherSignal:
        """What the teacher says; with other tokens, of spans of one token each."""
        if self.term == "kd":
            return teacher
        numbers, none = torch.arange(len(teacher), device=teacher.device), problem.targets[:0]
        lines = Alignment(numbers, numbers, numbers, numbers, numbers, none, none, [])
        said = Kept(numbers, problem.renamed[problem.targets], numbers)
        return SpanSignal(teacher, said, lines, problem.vocabularies)


def kept_ledger(chunk: int, *, compiled: bool) -> Callable:
    """`ledger` with what it keeps between calls.  The only place that knows how a chunk is asked for."""
    return partial(ledger, workspace=Workspace(chunk, compiled=compiled))


def ours(case: Case, problem: Problem, setting: Setting, *, compiled: bool = True) -> Step:
    """kdlib's own evaluation; of a masked batch it sees the kept tokens only."""
    evaluate, at = kept_ledger(setting.chunk, compiled=compiled), case.objective_at(setting)

    def step() -> Tensor:
        rows = [problem.hidden, problem.teacher_hidden, problem.targets]
        if case.masked:
            rows = [tensor.index_select(0, problem.kept) for tensor in rows]
        student, teacher = LinearSignal(rows[0], problem.head), LinearSignal(rows[1], problem.teacher_head)
        said = case.beside(teacher, problem)
        return problem.backward(evaluate(student, said, rows[2], at=at, count=len(rows[2])).total)

    return step


def floor(case: Case, problem: Problem, setting: Setting) -> Step:
    """The four matrix products that nobody can avoid, into kept buffers, and nothing else: what a loss
    would cost for free.
    """
    hidden, head, others, other_head = (
        tensor.detach()
        for tensor in (problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head)
    )
    buffers = [hidden.new_empty(min(setting.chunk, len(hidden)), len(head)) for _ in range(2)]
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)

    def step() -> Tensor:
        grad_head.zero_()
        for start in range(0, len(hidden), setting.chunk):
            rows = slice(start, start + setting.chunk)
            student, teacher = (buffer[: len(hidden[rows])] for buffer in buffers)
            torch.mm(hidden[rows], head.T, out=student)
            torch.mm(others[rows], other_head.T, out=teacher)
            torch.mm(student, head, out=grad_hidden[rows])  # the logits stand for their gradient
            grad_head.addmm_(student.T, hidden[rows])
        return grad_hidden[0, 0]

    return step


def naive(case: Case, problem: Problem, setting: Setting) -> Step:
    """All logits at once, log-softmax in float32, autograd: what everybody writes first."""

    def step() -> Tensor:
        logits = problem.hidden @ problem.head.T
        with torch.no_grad():
            teacher = F.log_softmax(
                (problem.teacher_hidden @ problem.teacher_head.T).float() / TEMPERATURE, dim=-1
            )
        student = F.log_softmax(logits.float() / TEMPERATURE, dim=-1)
        kd = TEMPERATURE**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / len(student)
        return problem.backward(KD * kd + CE * F.cross_entropy(logits.float(), problem.targets))

    return step


OURS = {
    "floor": Case(floor),
    "naive": Case(naive),
    "ours": Case(ours),
    "ours_eager": Case(partial(ours, compiled=False)),
    "ours_top_k": Case(ours, top_k=True),
    "ours_half_masked": Case(ours, masked=True),
    **{f"ours_{name}": Case(ours, term=name) for name in SPAN_TERMS},
    **{
        f"ours_{name}": Case(ours, divergence=name)
        for name in (
            "reverse_kl",
            "generalized_jsd",
            "skewed_forward_kl",
            "skewed_reverse_kl",
            "adaptive_kl",
            "total_variation",
        )
    },
}


def agreement(case: Case, problem: Problem, setting: Setting) -> dict[str, float]:
    """How far a case's loss and gradients are from float64's: the largest difference over the largest value.

    The reference is kdlib's dense path under autograd on the same inputs; it is checked by the tests, and by
    `naive` here.
    """
    loss = case.prepare(case, problem, setting)()
    exact, signals = problem.to(torch.float64), []
    rows = exact.kept if case.masked else slice(None)
    for hidden, head in ((exact.hidden, exact.head), (exact.teacher_hidden, exact.teacher_head)):
        signals.append(DenseSignal(hidden[rows] @ head.T))
    student, teacher = signals
    asked = {"at": case.objective_at(setting), "count": len(student)}
    expected = ledger(student, case.beside(teacher, exact), exact.targets[rows], **asked).total
    exact.backward(expected)
    if case.adds_entropy:
        logs = log_probs(teacher.logits(), TEMPERATURE)
        expected = expected - KD * TEMPERATURE**2 * (logs.exp() * logs).sum(-1).mean()
    pairs = {
        "loss": (loss, expected),
        "grad_hidden": (problem.hidden.grad, exact.hidden.grad),
        "grad_head": (problem.head.grad, exact.head.grad),
    }
    return {
        name: ((found - wanted).abs().max() / wanted.abs().max()).item()
        for name, (found, wanted) in pairs.items()
    }
