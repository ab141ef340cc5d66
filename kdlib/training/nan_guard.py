"""The guard: at the first value that is not finite training stops, before the optimizer takes it in, and says
whose it is.

While all is well it costs one look per optimizer step, at the sum of the step's loss and the gradient norm
that the Trainer makes anyway: a few scalar operations and one wait for the device.  It keeps references to
the step's micro-batches, and the state of the random numbers before each, so that what went wrong can be
asked once more, dropout and all.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kdlib.losses.chunked import Weighted
from kdlib.losses.objective import ObjectiveAt
from kdlib.training.culprits import WHO, Ask, Culprit, broken_gradients, broken_weights, examined

REMEMBERED = 10  # gradient norms


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, and the random numbers that it met."""

    inputs: Mapping[str, Tensor]
    random: Sequence[Tensor]  # states of the CPU's and, where there is one, the GPU's generator

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> "MicroBatch":
        """With the random numbers that it is about to meet."""
        return cls(
            inputs,
            [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if inputs["input_ids"].is_cuda else [])],
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The random numbers as they were; afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if len(self.random) > 1 else []):
            torch.set_rng_state(self.random[0])
            if len(self.random) > 1:
                torch.cuda.set_rng_state(self.random[1])
            yield


class NanGuard:
    """What a diagnosis will need, kept as long as the optimizer step lasts."""

    def __init__(self) -> None:
        self.step, self.micro_batches, self.norms = -1, [], deque(maxlen=REMEMBERED)

    def begin(self, inputs: Mapping[str, Tensor], step: int) -> bool:
        """A micro-batch of this optimizer step comes; True for its first."""
        if step != self.step:
            self.step, self.micro_batches, self.loss = step, [], 0.0
        self.micro_batches.append(MicroBatch.of(inputs))
        return len(self.micro_batches) == 1

    def end(self, loss: Tensor, count: Tensor | int) -> None:
        """What the micro-batch cost; `count` is the kept tokens of the whole step.  No wait for the
        device.
        """
        self.loss, self.count = self.loss + loss.detach(), count

    def faults(self, norm: Tensor | float) -> Tensor:
        """[3] on the device, 1 where so: the loss is not finite; the gradient norm is not; the step has
        no kept token.
        """
        norm, count = (torch.as_tensor(number, device=self.loss.device) for number in (norm, self.count))
        return torch.stack([~self.loss.isfinite(), ~norm.isfinite(), count == 0]).float()

    def passed(self, norm: Tensor | float) -> None:
        """The step is sound; its gradient norm is kept for the report of a later one that is not."""
        self.norms.append(norm)
        self.step = -1


@dataclass(frozen=True)
class Scene:
    """How a batch is asked once more."""

    models: Mapping[str, nn.Module]  # student, and teacher where it is asked
    ask: Ask
    at: ObjectiveAt
    chunk: int
    measures: Mapping[str, Weighted] = field(default_factory=dict)


def culprit_of(scene: Scene, micro_batches: Sequence[MicroBatch], *, with_gradients: bool) -> Culprit:
    """The culprit of these micro-batches: whatever a model computed first, in the first of them.

    So a row of an embedding is found at its own token even where it is a row of the head too, which spoils
    all tokens alike.

    Args:
        with_gradients: look at the gradients that are there, not clipped yet, where every term is finite.
    """
    found = []
    for number, micro_batch in enumerate(micro_batches):  # all of them: sharded models wait for each other
        with micro_batch.replayed():
            culprit = examined(
                micro_batch.inputs,
                scene.ask,
                models=scene.models,
                at=scene.at,
                measures=scene.measures,
                chunk=scene.chunk,
            )
        found += [replace(culprit, micro_batch=number)] if culprit else []
    if found:
        return min(found, key=lambda culprit: (WHO.index(culprit.who), culprit.depth))
    student = scene.models["student"]
    if weights := broken_weights(student):
        return Culprit("student", tensors=weights)
    if with_gradients:
        return Culprit("gradient", tensors=broken_gradients(student))
    return Culprit("nobody")
