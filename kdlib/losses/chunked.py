"""Loss terms evaluated chunk by chunk, so that no [N, V] tensor of logits ever exists.

The gradient with respect to hidden states and head is made in the forward pass, while a chunk's logits are at
hand: backward only scales it.  All terms share one product with each head, whose cost is what remains: the
buffers are kept between steps, the gradient overwrites the student's logits, the arithmetic may be compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlib.config.terms import check_temperature
from kdlib.losses.buffers import Workspace
from kdlib.losses.signals import LinearSignal, Signal, wide

BLOCK = 4096  # rows of a product whose sum has a wider dtype, made at a time
Scalar = Tensor | float  # a temperature; a Tensor in compiled code, to serve every T
TokenFunction = Callable[[Tensor, Tensor | None, Tensor, Scalar], Tensor]
"""(student logits [n, V], teacher's [n, V] or None, targets [n], temperature) -> [n] per-token values."""
Segments = Sequence[tuple[int, Sequence[int]]]
"""How many tokens, one after the other, and the numbers of the terms that these have."""


@dataclass(frozen=True)
class Weighted:
    """A term made from logits, with its weight and temperature of now; from 0.01 to 100, else ValueError."""

    function: TokenFunction
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


def token_values(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    *,
    terms: Sequence[Weighted],
    chunk: int | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """[terms, N] unweighted values of the kept tokens, by plain differentiable code; evaluation uses it too.

    Args:
        student, teacher: of the same N tokens; no teacher where no term asks for it.
        chunk: tokens whose logits are made at a time; all at once where None.  Autograd keeps them
            all: only without it is memory saved.
        segments: where not all terms look at all tokens; their values are 0 elsewhere.
    """
    student, teacher, parts = student.cast(), None if teacher is None else teacher.cast(), []
    looks = segments or [(len(student), range(len(terms)))]
    for rows, having in _looks(looks, chunk or len(student)):
        with torch.no_grad():
            theirs = None if teacher is None or rows.stop > len(teacher) else teacher.logits(rows)
        ours, came = student.logits(rows), targets[rows]
        made = {n: terms[n].function(ours, theirs, came, terms[n].temperature) for n in having}
        none = ours.new_zeros(len(came), dtype=wide(ours.dtype))
        parts.append(torch.stack([made.get(n, none) for n in range(len(terms))]))
    return torch.cat(parts, dim=-1)


def term_sums(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    *,
    terms: Sequence[Weighted],
    count: Tensor | int = 1,
    workspace: Workspace | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """[terms] sums over the kept tokens: chunked where the student is a LinearSignal, dense elsewhere.

    Args:
        student: gradient flows into a LinearSignal's hidden, weight and bias, or into logits.
        teacher: the same N tokens, or None; no gradient flows into it.
        terms: weights not 0.
        count: one for all terms, or [terms].  A chunked gradient is that of `sum(weight * sum / count)`:
            back-propagate a multiple of that, as `Ledger.total` is; all else is refused.
        segments: as of `token_values`.

    Raises:
        RuntimeError: on backward, where the sums were combined with other weights, or the gradient is to be
            differentiated once more.
    """
    if not (isinstance(student, LinearSignal) and torch.is_grad_enabled()):
        return token_values(student, teacher, targets, terms=terms, segments=segments).sum(-1)
    leaves = student.hidden, student.weight, student.bias  # autograd sees arguments, not what is inside them
    how = targets, tuple(terms), count, workspace or Workspace(), segments
    return _ChunkedSums.apply(*leaves, student, teacher, *how)


class _ChunkedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, student, teacher, targets, terms, count, workspace, segments):
        student, teacher = student.cast(), None if teacher is None else teacher.cast()
        numbers = {"dtype": wide(student.dtype), "device": hidden.device}
        temperatures = torch.tensor([term.temperature for term in terms], **numbers)
        weights = torch.tensor([term.weight for term in terms], **numbers)
        counts = torch.as_tensor(count, device=hidden.device).clamp(min=1)
        if student.dtype is not torch.float16:  # where it could underflow: backward divides, by `scale`
            weights = weights / counts
        elif counts.ndim:
            weights = weights * (counts.max() / counts)
        gradients = _Gradients((hidden, weight, bias), ctx.needs_input_grad, student.dtype)
        sums, looks = weights.new_zeros(len(terms)), segments or [(len(student), range(len(terms)))]
        numbers_of = {tuple(having): torch.tensor([*having], device=hidden.device) for _, having in looks}
        with torch.autocast(hidden.device.type, enabled=False):  # the dtype of the products is settled
            for rows, having in _looks(looks, workspace.chunk_for(student)):
                functions, which = [terms[n].function for n in having], numbers_of[having]
                asked = None if teacher is None or rows.stop > len(teacher) else teacher
                arithmetic = workspace.sums(functions, student.form, None if asked is None else asked.form)
                products = workspace.products("student", student, rows)
                others = None if asked is None else workspace.products("teacher", asked, rows)
                made = arithmetic(products, others, targets[rows], temperatures[which], weights[which])
                sums.index_add_(0, which, made)
                gradients.add(rows, products[: rows.stop - rows.start], student)  # now the gradient
        ctx.save_for_backward(*gradients.finished())
        ctx.weights = weights
        return sums

    @staticmethod
    def backward(ctx, grad_sums):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "term_sums made its gradient in the forward pass, so there is no second derivative; call "
                "backward without create_graph, or use token_values, which is plain differentiable code"
            )
        weights = ctx.weights.to(grad_sums.dtype)
        # a ledger's total: grad_sums = scale * weights; `@` would be made in autocast's dtype
        scale = (grad_sums * weights).sum() / weights.square().sum()
        torch._assert_async(  # no wait for the device, unlike `if`
            (grad_sums - scale * weights).abs().amax() <= 1e-4 * grad_sums.abs().amax(),
            "term_sums: its gradient was made for sum(weight * sum) / count with the weights given to it, "
            "and the sums were combined with others; back-propagate Ledger.total, or call it again with the "
            "weights you want",
        )
        if scale.device.type == "cpu" and abs(scale.item() - 1) <= 8 * torch.finfo(scale.dtype).eps:
            return *ctx.saved_tensors, *[None] * 7  # as it is: no second [V, H]
        grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, *[None] * 7


def differentiable_values(
    student: Signal, targets: Tensor, function: TokenFunction, workspace: Workspace
) -> Tensor:
    """[N] values of a function of the student's logits alone, for any further arithmetic.

    Chunked like `term_sums`, but its gradient is made in the backward pass, whose products are made anew.
    """
    if not (isinstance(student, LinearSignal) and torch.is_grad_enabled()):
        chunk = workspace.chunk_for(student) if isinstance(student, LinearSignal) else None
        return token_values(student, None, targets, terms=[Weighted(function)], chunk=chunk)[0]
    leaves = student.hidden, student.weight, student.bias
    return _ChunkedValues.apply(*leaves, student, targets, function, workspace)


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, student, targets, function, workspace):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.how = student.form, function, workspace
        return differentiable_values(student, targets, function, workspace)  # without gradient here

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        form, function, workspace = ctx.how
        student = LinearSignal(hidden, weight, bias, form).cast()
        gradients = _Gradients((hidden, weight, bias), ctx.needs_input_grad, student.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            arithmetic = workspace.sums([function], student.form, None)
            once = grad.new_ones(1)
            for rows in _chunks(len(student), workspace.chunk_for(student)):
                products = workspace.products("student", student, rows)
                arithmetic(products, None, targets[rows], once, grad[None, rows])
                gradients.add(rows, products[: rows.stop - rows.start], student)
        return *gradients.finished(), *[None] * 4


class _Gradients:
    """Of hidden states, head and bias where needed, added up chunk by chunk in their own or a wider dtype."""

    def __init__(self, inputs: Sequence[Tensor | None], needed: Sequence[bool], products: torch.dtype):
        self.inputs = [x if need else None for x, need in zip(inputs, needed, strict=False)]
        self.tensors = [
            None if x is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, products))
            for x in self.inputs
        ]
        self.begun = False  # the first chunk writes, the others add: no pass of zeros

    def finished(self) -> list[Tensor | None]:
        """Each in its input's dtype."""
        return [
            None if made is None or x is None else made.to(x.dtype)
            for made, x in zip(self.tensors, self.inputs, strict=True)
        ]

    def add(self, rows: slice, logits: Tensor, student: LinearSignal) -> None:
        """Take in a chunk's gradient with respect to the products with the head: [n, V]."""
        to_hidden, to_weight, to_bias = self.tensors
        if to_hidden is not None:
            _put_product(to_hidden[rows], logits, student.weight, add=False)
        if to_weight is not None:
            _put_product(to_weight, logits.T, student.hidden[rows], add=self.begun)
        if to_bias is not None:
            to_bias.copy_(to_bias + logits.sum(0) if self.begun else logits.sum(0))
        self.begun = True


def _put_product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """out = left @ right, or += it; without another tensor of its size."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, beta=float(add))  # beta 0 does not read what was there
        return
    for rows, part in zip(out.split(BLOCK), left.split(BLOCK), strict=True):
        rows.add_(part @ right) if add else rows.copy_(part @ right)


def _looks(segments: Segments, size: int) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Chunks of tokens with the same terms, and the numbers of these; one chunk at least."""
    start, some = 0, [each for each in segments if each[0]] or segments[:1]
    for length, having in some:
        for rows in _chunks(length, size):
            yield slice(start + rows.start, start + rows.stop), tuple(having)
        start += length


def _chunks(tokens: int, size: int) -> list[slice]:
    """Slices that cover `tokens`; an empty one where there are none, so that results keep shape and type."""
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), max(size, 1))]
