"""Where a value first stopped being finite: which model, term or gradient; module and weight; row.

A batch is asked once more, with a look at what every module gives: attention spreads one bad token over its
whole row, masked tokens included (0 x nan is nan).
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from kdlib.losses.signals import Kept, Signal

Batch = Mapping[str, Tensor]
Facts = Mapping[str, Any]  # as they stand in the report
WHO = ("teacher", "student", "loss", "gradient", "nobody")  # nobody: asked once more, all is finite


@dataclass(frozen=True)
class Origin:
    """What is not finite first."""

    who: str  # one of WHO
    terms: Mapping[str, Facts] = field(default_factory=dict)  # {"value": the first, "tokens": at how many}
    tokens: int = 0  # kept in that micro-batch
    module: str | None = None  # of who, the first whose output is not finite
    depth: int = 0  # its place among the modules; a head's is behind all that have none
    tensors: Mapping[str, Facts] = field(default_factory=dict)  # its weights, or the gradients: see broken
    micro_batch: int | None = None
    row: int | None = None  # in the micro-batch
    position: int | None = None  # of the token read by a module, or predicted; None of classes


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, and the random numbers that it met."""

    inputs: Batch
    random: Sequence[Tensor]  # states of the CPU's and, where there is one, the GPU's generator

    @classmethod
    def of(cls, inputs: Batch) -> "MicroBatch":
        cuda = [torch.cuda.get_rng_state()] if inputs["input_ids"].is_cuda else []
        return cls(inputs, [torch.get_rng_state(), *cuda])

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The random numbers as they were; afterwards as if nothing had been drawn."""
        cpu, *cuda = self.random
        with torch.random.fork_rng(devices=[torch.cuda.current_device() for _ in cuda]):
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state)
            yield


@dataclass(frozen=True)
class Replay:
    """How a batch is asked once more."""

    models: Mapping[str, nn.Module]  # student, and teacher where it is asked
    signals: Callable[[Batch], tuple[Kept, Signal, Any]]  # the kept tokens, student, teacher
    values: Callable[[Signal, Any, Tensor], Mapping[str, Tensor]]  # of [N] targets: {term: [N]}
    chunk: int  # tokens whose logits are made at a time


def origin_of(replay: Replay, micro_batches: Sequence[MicroBatch], *, with_gradients: bool) -> Origin:
    """What is not finite in these micro-batches: whatever a model computed first, in the first of them.

    So a row of an embedding is found at its own token even where it is a row of the head too.  The gradients,
    not clipped yet, are looked at where every term is finite.
    """
    found = []
    for number, micro_batch in enumerate(micro_batches):  # all of them: sharded models wait for each other
        with micro_batch.replayed():
            if origin := _origin_in(micro_batch.inputs, replay):
                found.append(replace(origin, micro_batch=number))
    if found:
        return min(found, key=lambda origin: (WHO.index(origin.who), origin.depth))
    student = replay.models["student"]
    if weights := broken_weights(student):
        return Origin("student", tensors=weights)
    return Origin("gradient", tensors=broken_gradients(student)) if with_gradients else Origin("nobody")


@torch.no_grad()
def _origin_in(batch: Batch, replay: Replay) -> Origin | None:
    """Of one micro-batch, asked once more; None where every term of every kept token is finite."""
    ids = batch["input_ids"]
    shapes = {"student": ids.shape, "teacher": batch.get("teacher_input_ids", ids).shape}
    length = ids.shape[1] if batch["labels"].ndim == 2 else None
    with _first_broken(replay.models, shapes) as found:
        tokens, student, teacher = replay.signals(batch)
    values = replay.values(student, teacher, tokens.targets)
    bad = {name: at for name, value in values.items() if (at := ~value.isfinite()).any()}
    if not bad:
        return None
    terms = {n: {"value": str(float(values[n][at][0])), "tokens": int(at.sum())} for n, at in bad.items()}
    count = len(tokens.targets)
    for who, said in (("teacher", teacher), ("student", student)):
        signal, own = getattr(said, "said", said), getattr(said, "kept", tokens)  # of a SpanSignal its own
        if signal is None or not (lost := _lost(signal, replay.chunk)).any():
            continue
        module, row, position = found.get(who, (None, None, None))
        if position is None:
            row, position = _predicted(own, lost, length and shapes[who][1])
        model, position = replay.models[who], position if length else None
        depth = sys.maxsize if module is None else list(dict(model.named_modules())).index(module)
        weights = sorted(broken_weights(model).items(), key=lambda item: not item[0].startswith(f"{module}."))
        return Origin(who, terms, count, module, depth, dict(weights), row=row, position=position)
    row, position = _predicted(tokens, torch.stack([*bad.values()]).any(0), length)
    beside = broken_weights(replay.models["student"])  # of a gate
    return Origin("student" if beside else "loss", terms, count, tensors=beside, row=row, position=position)


@torch.no_grad()
def is_finite(model: nn.Module) -> Tensor:
    """Whether every parameter is; of a sharded model, this rank's part.  No wait for the device.

    By the extremes, which nan and infinity pass through: twenty times faster than `isfinite`.
    """
    parts = [part for part in map(_local, model.parameters()) if part.numel()]  # a rank's may be empty
    return torch.stack([extreme for part in parts for extreme in torch.aminmax(part)]).isfinite().all()


def broken(tensors: Mapping[str, Tensor]) -> dict[str, Facts]:
    """Those that are not finite: {"values": how many, "first": index of the first}."""
    places = {name: (~_local(tensor).isfinite()).nonzero() for name, tensor in tensors.items()}
    return {name: {"values": len(at), "first": at[0].tolist()} for name, at in places.items() if len(at)}


def broken_weights(model: nn.Module) -> dict[str, Facts]:
    """Every parameter that is not finite."""
    return broken(dict(model.named_parameters()))


def broken_gradients(model: nn.Module) -> dict[str, Facts]:
    """Every parameter whose gradient is not, the last first; else the one with the largest value."""
    weights = reversed(list(model.named_parameters()))
    gradients = {name: weight.grad for name, weight in weights if weight.grad is not None}
    if found := broken(gradients):
        return found
    largest = max(gradients, key=lambda name: float(_local(gradients[name]).abs().max()))
    return {largest: {"values": 0, "first": []}}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _first_broken(
    models: Mapping[str, nn.Module], shapes: Mapping[str, Sequence[int]]
) -> Iterator[dict[str, tuple[str, int | None, int | None]]]:
    """By model, (module, row, position) of its first output that is not finite, in passes made inside."""
    found: dict[str, tuple[str, int | None, int | None]] = {}
    names = {module: (who, name) for who, model in models.items() for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        who, name = names.get(module, ("", ""))
        if who and who not in found:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and not leaf.isfinite().all():
                    found[who] = (name, *_place(leaf, shapes[who]))
                    return

    with register_module_forward_hook(look):
        yield found


def _place(tensor: Tensor, shape: Sequence[int]) -> tuple[int | None, int | None]:
    """Row and position of the first such value in [B, T, …], or in [B * T, …] as experts see it."""
    rows, length = shape
    if tensor.shape[:1] == (rows * length,) and rows > 1:
        tensor = tensor.unflatten(0, (rows, length))
    if tuple(tensor.shape[:2]) != (rows, length):
        return None, None
    return divmod(int((~tensor.isfinite()).reshape(rows * length, -1).any(-1).nonzero()[0, 0]), length)


def _lost(signal: Signal, chunk: int) -> Tensor:
    """[N] True where what a model gave is not finite; a logit of -inf is a token ruled out, and sound."""
    size, inside = max(len(signal), 1), signal.features
    parts = (signal.logits(slice(start, min(start + chunk, size))) for start in range(0, size, chunk))
    lost = torch.cat([(logits.isnan() | logits.isposinf()).any(-1) for logits in parts])
    for state in (*inside.hidden, *inside.attention, *inside.projected) if inside else ():
        lost |= ~state.isfinite().flatten(1).all(-1)
    return lost


def _predicted(tokens: Kept, bad: Tensor, length: int | None) -> tuple[int, int | None]:
    """Row and position of the first bad token: where it stands, not where it is predicted from."""
    first = bad.nonzero()[0, 0]
    return int(tokens.rows[first]), None if length is None else int(tokens.positions[first]) % length + 1
