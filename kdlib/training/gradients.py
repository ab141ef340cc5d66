"""Which term drives the student, and which fight each other: each term's gradient on its own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib.losses.alignment import SpanSignal, TeacherSignal
from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import ObjectiveAt, ledger
from kdlib.losses.signals import Signal
from kdlib.models.teacher import BESIDE


def term_gradients(
    losses: Iterable[tuple[str, Tensor]], parameters: Sequence[nn.Parameter]
) -> dict[str, list[Tensor]]:
    """Each term's gradient on these parameters; their sum is the gradient of the loss.

    One more backward pass per term; memory for terms x parameters.  No `.grad` is touched, no hook called.

    Args:
        losses: (term, weight x mean over some tokens), made as they are asked for; their graph is kept.
    """
    gradient = partial(torch.autograd.grad, inputs=[*parameters], retain_graph=True, materialize_grads=True)
    return {name: list(gradient(loss)) for name, loss in losses}


@torch.no_grad()
def gradient_figures(gradients: Mapping[str, Sequence[Tensor]], scale: float = 1.0) -> dict[str, float]:
    """`<term>_grad_norm` of each term, `<a>_<b>_grad_cosine` of each pair: 1 alike, -1 against each other.

    A pair of which one norm is 0 has no cosine, and is left out.

    Args:
        scale: by which the losses were multiplied, as float16 asks for; norms are divided by it.
    """
    pairs = combinations_with_replacement(gradients, 2)
    products = {(a, b): _dot(gradients[a], gradients[b]) for a, b in pairs}
    values = dict(zip(products, torch.stack(list(products.values())).tolist(), strict=True))
    norms = {name: values[name, name] ** 0.5 for name in gradients}
    figures = {f"{name}_grad_norm": norm / scale for name, norm in norms.items()}
    for a, b in combinations(gradients, 2):
        if scale := norms[a] * norms[b]:
            figures[f"{a}_{b}_grad_cosine"] = values[a, b] / scale
    return figures


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The product of two gradients as vectors, in float32 at least."""
    wide = torch.promote_types(one[0].dtype, torch.float32)
    pairs = zip(one, other, strict=True)
    return torch.stack([torch.dot(a.flatten().to(wide), b.flatten().to(wide)) for a, b in pairs]).sum()


def shares(
    student: Signal,
    teacher: TeacherSignal | None,
    targets: Tensor,
    *,
    at: ObjectiveAt,
    chunk: int | None = None,
    scale: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """Each term by itself: scale x weight x mean over these tokens, made as it is asked for."""
    for name, weight in at.weights.items():
        alone, space = replace(at, weights={name: weight}), Workspace(chunk)  # nothing compiled for this
        count = teacher.counts if isinstance(teacher, SpanSignal) else len(targets)
        yield name, scale * ledger(student, teacher, targets, at=alone, count=count, workspace=space).total


def weights_of(student: PreTrainedModel) -> list[nn.Parameter]:
    """What of a student is trained, without what is trained beside it and never saved in it."""
    named = student.named_parameters()
    return [each for name, each in named if each.requires_grad and not name.startswith(BESIDE)]
