"""Where a value first stopped being finite: teacher, student, a term or a gradient; which module and weight,
row and position.

Nothing here runs while all is well.  A batch is asked once more, with a look at what every module gives:
without it the place is lost, as attention spreads one bad token over its whole row, masked tokens included (0
x nan is nan).
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdlib.losses.chunked import Weighted, token_values
from kdlib.losses.objective import ObjectiveAt
from kdlib.losses.signals import Kept, Signal

# a batch to its kept tokens, student, teacher
Ask = Callable[[Mapping[str, Tensor]], tuple[Kept, Signal, Signal | None]]


@dataclass(frozen=True)
class Broken:
    """What is not finite in a weight or a gradient."""

    values: int
    first: Sequence[int]  # index of the first


@dataclass(frozen=True)
class Culprit:
    """What was found first."""

    who: str  # one of WHO
    # not finite: its first such value, at how many tokens
    terms: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    tokens: int = 0  # kept in that micro-batch
    module: str | None = None  # of who, the first whose output is not finite
    depth: int = 0  # its place among the modules; a head's is behind all that have none
    # its weights (or the gradients) that are not finite
    tensors: Mapping[str, "Broken"] = field(default_factory=dict)
    micro_batch: int | None = None
    row: int | None = None  # in the micro-batch
    # of the token read, where a module gave it; of the token predicted, where a head or a term did;
    position: int | None = None
    # None where rows are classified: they are learned as a whole, and the two models may read them in other
    # tokens


WHO = ("teacher", "student", "loss", "gradient", "nobody")  # nobody: asked once more, all is finite


@torch.no_grad()
def examined(
    batch: Mapping[str, Tensor],
    ask: Ask,
    *,
    models: Mapping[str, nn.Module],
    at: ObjectiveAt,
    measures: Mapping[str, Weighted],
    chunk: int,
) -> Culprit | None:
    """The culprit of a micro-batch, which is asked once more; None where every term of every kept token is
    finite.

    Args:
        models: teacher and student by these names, the teacher only where it is asked.
        measures: what is made of the logits beside the moment's terms: in evaluation.
    """
    shapes = {
        "student": batch["input_ids"].shape,
        "teacher": batch.get("teacher_input_ids", batch["input_ids"]).shape,
    }
    length = shapes["student"][1] if batch["labels"].ndim == 2 else None
    with ExitStack() as stack:
        broken = {
            who: stack.enter_context(_first_broken(model, shapes[who])) for who, model in models.items()
        }
        tokens, student, teacher = ask(batch)
    logit_terms = {**at.logit_terms, **measures}
    values = (
        dict(
            zip(
                logit_terms,
                token_values(student, teacher, tokens.targets, terms=list(logit_terms.values()), chunk=chunk),
                strict=True,
            )
        )
        if logit_terms
        else {}
    )
    values |= at.feature_values(student, teacher)
    bad = {name: ~value.isfinite() for name, value in values.items()}
    terms = {
        name: (float(values[name][where][0]), int(where.sum())) for name, where in bad.items() if where.any()
    }
    if not terms:
        return None
    known = {"terms": terms, "tokens": len(tokens.targets)}
    for who, signal in (("teacher", teacher), ("student", student)):
        if signal is not None and (lost := _lost(signal, chunk)).any():
            module, row, position = broken[who][0] if broken[who] else (None, None, None)
            row, position = (
                (row, position if length else None)
                if position is not None
                else _predicted(tokens, lost, length)
            )
            tensors = dict(
                sorted(
                    broken_weights(models[who]).items(), key=lambda item: not item[0].startswith(f"{module}.")
                )
            )
            depth = [name for name, _ in models[who].named_modules()].index(module) if module else sys.maxsize
            return Culprit(
                who, module=module, depth=depth, tensors=tensors, row=row, position=position, **known
            )
    row, position = _predicted(tokens, torch.stack(list(bad.values())).any(0), length)
    return Culprit("loss", row=row, position=position, **known)


@torch.no_grad()
def is_finite(model: nn.Module) -> Tensor:
    """Whether every parameter is; of a sharded model, this rank's part.  No wait for the device.

    By the extremes, which nan and infinity pass through: one pass without a temporary tensor, some twenty
    times faster than `isfinite`.
    """
    # a rank may hold nothing of a small one
    parts = [part for weight in model.parameters() if (part := _local(weight)).numel()]
    return torch.stack([extreme for part in parts for extreme in torch.aminmax(part)]).isfinite().all()


def broken_weights(model: nn.Module) -> dict[str, Broken]:
    """Every parameter that is not finite."""
    return _broken({name: weight.detach() for name, weight in model.named_parameters()})


def broken_gradients(model: nn.Module) -> dict[str, Broken]:
    """Every parameter whose gradient is not finite, the last of the model first, as the backward pass meets
    it first.

    Where all are finite and only their norm is not, the one with the largest value, with 0 values.
    """
    gradients = {
        name: weight.grad
        for name, weight in reversed(list(model.named_parameters()))
        if weight.grad is not None
    }
    return _broken(gradients) or {
        max(gradients, key=lambda name: float(_local(gradients[name]).abs().max())): Broken(0, [])
    }


def _broken(tensors: Mapping[str, Tensor]) -> dict[str, Broken]:
    places = {name: (~_local(tensor).isfinite()).nonzero() for name, tensor in tensors.items()}
    return {name: Broken(len(found), found[0].tolist()) for name, found in places.items() if len(found)}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _first_broken(
    model: nn.Module, shape: Sequence[int]
) -> Iterator[list[tuple[str, int | None, int | None]]]:
    """Collects (name, row, position) of the first module whose output is not finite, in one forward pass
    made inside.
    """
    found: list[tuple[str, int | None, int | None]] = []

    def look(name: str):
        def hook(module, args, output):
            for tensor in _floats(output) if not found else ():
                if not tensor.isfinite().all():
                    found.append((name, *_place(tensor, shape)))
                    return

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _floats(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _floats(part)
    elif isinstance(output, Mapping):
        yield from _floats(list(output.values()))


def _place(tensor: Tensor, shape: Sequence[int]) -> tuple[int | None, int | None]:
    """Row and position of the first value that is not finite in [B, T, …], or [B * T, …] as experts see
    it; None in other shapes.
    """
    rows, length = shape
    if tensor.shape[0] == rows * length and rows > 1:
        tensor = tensor.unflatten(0, (rows, length))
    if tuple(tensor.shape[:2]) != (rows, length):
        return None, None
    return divmod(int((~tensor.isfinite()).reshape(rows * length, -1).any(-1).nonzero()[0, 0]), length)


def _lost(signal: Signal, chunk: int) -> Tensor:
    """[N] True where what a model said or felt is not finite; a logit of -inf is a token ruled out, and
    sound.
    """
    size = max(len(signal), 1)
    parts = [signal.logits(slice(start, min(start + chunk, size))) for start in range(0, size, chunk)]
    lost = torch.cat([(part.isnan() | part.isposinf()).any(-1) for part in parts])
    for state in (
        (*signal.features.hidden, *signal.features.attention, *signal.features.projected)
        if signal.features
        else ()
    ):
        lost |= ~state.isfinite().flatten(1).all(-1)
    return lost


def _predicted(tokens: Kept, bad: Tensor, length: int | None) -> tuple[int, int | None]:
    """Row and position of the first of these kept tokens, where it stands and not where it is predicted
    from; None is a whole row.
    """
    first = bad.nonzero()[0, 0]
    return int(tokens.rows[first]), None if length is None else int(tokens.positions[first]) % length + 1
