"""Which term drives the student, and which fight each other: each term's gradient on its own, off the
step's own gradients.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import ObjectiveAt, ledger
from kdlib.losses.signals import Kept, Signal


def term_gradients(
    student: Signal,
    teacher: Signal | None,
    tokens: Kept,
    *,
    at: ObjectiveAt,
    parameters: Sequence[nn.Parameter],
    chunk: int | None = None,
) -> dict[str, list[Tensor]]:
    """Each active term's gradient on these parameters: of weight x mean over these tokens, what the optimizer
    sees of it.

    One more backward pass per term; memory for terms x parameters.  No `.grad` is touched, and no hook of DDP
    is called. The sum over terms is the gradient of the loss of these tokens.

    Args:
        student, teacher: signals of the N kept tokens, the student's with its graph, which is kept.
        chunk: tokens whose logits exist at a time.
    """
    found = {}
    for name in at.weights:
        # a workspace of its own, as nothing is to be compiled for this
        alone, workspace = at.alone(name), Workspace(chunk)
        loss = ledger(
            student, teacher, tokens.targets, at=alone, count=len(tokens.targets), workspace=workspace
        ).total
        found[name] = [
            torch.zeros_like(weight) if grad is None else grad
            for weight, grad in zip(
                parameters,
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
    return found


@torch.no_grad()
def gradient_figures(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """`<term>_grad_norm` of each term, and `<a>_<b>_grad_cosine` of each pair: 1 they pull the same way, -1
    they undo each other.

    A pair of which one norm is 0 has no cosine, and is left out.
    """
    products = {pair: _dot(gradients[pair[0]], gradients[pair[1]]) for pair in combinations(gradients, 2)}
    products |= {(name, name): _dot(own, own) for name, own in gradients.items()}
    products = dict(zip(products, torch.stack(list(products.values())).tolist(), strict=True))
    norms = {name: products[name, name] ** 0.5 for name in gradients}
    figures = {f"{name}_grad_norm": norm for name, norm in norms.items()}
    for a, b in combinations(gradients, 2):
        if scale := norms[a] * norms[b]:
            figures[f"{a}_{b}_grad_cosine"] = products[a, b] / scale
    return figures


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The product of two gradients as vectors, in float32 at least."""
    wide = torch.promote_types(one[0].dtype, torch.float32)
    return torch.stack(
        [torch.dot(a.flatten().to(wide), b.flatten().to(wide)) for a, b in zip(one, other, strict=True)]
    ).sum()
