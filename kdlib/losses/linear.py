"""Loss terms evaluated chunk by chunk, so that no [N, V] tensor of logits ever exists.

The gradient with respect to hidden states and head is made in the forward pass, while a chunk's logits are at hand:
backward then only scales it.  Any number of terms shares one product with each head.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdlib.signals import LinearSignal, Signal

CHUNK = 128  # tokens whose logits exist at a time: 25 MB per float32 copy at V = 49,152

TokenFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(student logits [n, V], teacher logits [n, V] or None, targets [n]) -> [n] per-token values."""


def token_values(
    student: Signal, teacher: Signal | None, targets: Tensor, *, functions: Sequence[TokenFunction], chunk: int = CHUNK
) -> Tensor:
    """Every function's value for every kept token, as plain differentiable code: the reference, and the way to evaluate.

    Args:
        student: N kept tokens.
        teacher: the same N tokens, or None where no function asks for it.
        targets: [N] token ids.
        chunk: tokens whose logits are made at a time.  Under autograd all of them are kept for the backward pass.

    Returns:
        [functions, N] in float32, or float64 for float64 logits.
    """
    parts = [_values(functions, student, teacher, targets, rows) for rows in _chunks(len(student), chunk)]
    return torch.cat(parts, dim=-1)


def term_sums(
    student: Signal,
    teacher: Signal | None,
    targets: Tensor,
    *,
    functions: Sequence[TokenFunction],
    weights: Sequence[float],
    chunk: int = CHUNK,
) -> Tensor:
    """Every term's sum over the kept tokens: chunked where the student is a LinearSignal, dense where it is not.

    Args:
        student: N kept tokens; gradient flows into a LinearSignal's hidden, weight and bias, or a DenseSignal's logits.
        teacher: the same N tokens, or None; no gradient flows into it.
        functions, weights: one per term, weights not 0.  A chunked gradient is that of `sum(weights * sums)`:
            back-propagate a multiple of that (what `Ledger.total` is) and nothing else; anything else is refused.

    Returns:
        [terms] sums; 0 where nothing is kept.

    Raises:
        RuntimeError: on backward, when the sums were combined with other weights.
    """
    if not (isinstance(student, LinearSignal) and torch.is_grad_enabled()):
        return token_values(student, teacher, targets, functions=functions, chunk=max(len(student), 1)).sum(-1)
    return _ChunkedSums.apply(
        student.hidden, student.weight, student.bias, teacher, targets, tuple(functions), tuple(weights), chunk
    )


class _ChunkedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, targets, functions, weights, chunk):
        student = LinearSignal(hidden, weight, bias)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        combine = torch.tensor(weights, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        sums = 0.0
        for rows in _chunks(len(student), chunk):
            logits = student.logits(rows)
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                values = _stack(functions, leaf, _teacher_logits(teacher, rows), targets[rows]).sum(-1)
                (grad_logits,) = torch.autograd.grad(values @ combine.to(values.dtype), leaf)
            sums = sums + values.detach()
            if needs_hidden:
                grad_hidden[rows] = grad_logits @ weight.to(student.dtype)
            if needs_weight:
                product = grad_logits.T, hidden[rows].to(student.dtype)
                if product[0].dtype == grad_weight.dtype:
                    grad_weight.addmm_(*product)  # in place: no second [V, H]
                else:
                    grad_weight += product[0] @ product[1]
            if needs_bias:
                grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weights = combine
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sums):
        weights = ctx.weights.to(grad_sums.dtype)
        scale = (grad_sums @ weights) / (weights @ weights)
        torch._assert_async(  # no wait for the device, unlike `if`
            (grad_sums - scale * weights).abs().amax() <= 1e-4 * grad_sums.abs().amax(),
            "term_sums: its gradient was made for sum(weights * sums) with the weights given to it, and the sums were "
            "combined with others; back-propagate Ledger.total, or call it again with the weights you want",
        )
        grads = [None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _values(functions, student, teacher, targets, rows) -> Tensor:
    return _stack(functions, student.logits(rows), _teacher_logits(teacher, rows), targets[rows])


def _stack(functions, student_logits, teacher_logits, targets) -> Tensor:
    return torch.stack([function(student_logits, teacher_logits, targets) for function in functions])


def _teacher_logits(teacher: Signal | None, rows: slice) -> Tensor | None:
    if teacher is None:
        return None
    with torch.no_grad():
        return teacher.logits(rows)


def _chunks(tokens: int, size: int) -> list[slice]:
    """Slices that cover `tokens`; one empty slice where there are none, so that every result keeps its shape and type."""
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]
