"""What a computation holds in memory, tensor by tensor, from the first to the last: on real tensors, or
rehearsed without data.

Under a FakeTensorMode tensors have shapes and no data, so that a training step of any size runs through its
real code in a second, and every tensor that it would make is seen here.  What a kernel needs inside itself is
not seen.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NEVER = 2**62
ATEN = torch.ops.aten
PRODUCTS = {  # what torch's own register of products lacks: operation -> multiplications and additions
    ATEN.addmm_: flop_registry[ATEN.addmm],
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
    ATEN._grouped_mm: lambda rows, weights, *_, out_val, **__: 2 * rows.shape[-1] * out_val.numel(),
}


@dataclass
class Block:
    """The storage of a tensor, and of all its views."""

    bytes: int
    born: int  # both in births and deaths of blocks, counted from the start
    died: int
    phase: str  # in which it was born
    shape: tuple[int, ...]  # of the first tensor seen in it


def _grouped_shape(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    """What a product of groups of rows, as experts make them, gives: without values."""
    groups = () if left.ndim != right.ndim else (left.shape[0] if left.ndim == 3 else len(ends),)
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])


class Allocations(TorchDispatchMode):
    """Notes when each storage is made and freed while it is active.

    Operations on whole numbers that have data are run with them even under a FakeTensorMode, so that token
    ids, masks and positions keep their values, and code that asks for these takes its usual turns.
    """

    def __init__(self, answer: float = 1.0) -> None:
        """
        Args:
            answer: what a number without data is taken to be where code asks for it.
        """
        super().__init__()
        self.answer = answer
        self.blocks: list[Block] = []
        self.spans: dict[str, tuple[int, int]] = {}  # phase -> when it began and ended, the last time
        self.flops: dict[str, float] = {}  # phase -> multiplications and additions of its matrix products
        self.now, self.current = 0, ""
        self._known: dict[int, tuple[Block, weakref.ref]] = {}  # by the storage's address, while it lives

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Blocks born inside bear this name."""
        before, began, self.current = self.current, self.now, name
        try:
            yield
        finally:
            self.current = before
            self.spans[name] = (began, self.now)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Take these for known, without counting them: parameters, counted by themselves."""
        for tensor in tensors:
            self._note(tensor).bytes = 0

    def blocks_of(self, tensors: Iterable[Tensor]) -> list[Block]:
        """The blocks in which these tensors lie."""
        return [self._note(tensor) for tensor in tensors]

    def peak(self, begin: int, end: int) -> int:
        """The moment in a span at which most is held."""
        changes = [0] * (self.now + 1)
        for block in self.blocks:
            changes[block.born] += block.bytes
            if block.died < NEVER:
                changes[block.died] -= block.bytes
        held = list(accumulate(changes))
        return max(range(begin, end + 1), key=held.__getitem__)

    def held(self, moment: int) -> list[Block]:
        """What exists at this moment."""
        return [block for block in self.blocks if block.born <= moment < block.died and block.bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        without_data = any(isinstance(tensor, FakeTensor) for tensor in given)
        if function is ATEN._local_scalar_dense.default and without_data:
            kind = given[0].dtype
            return True if kind is torch.bool else self.answer if kind.is_floating_point else int(self.answer)
        # whose rule for shapes knows bfloat16 alone
        if function is ATEN._grouped_mm.default and without_data:
            made = _grouped_shape(*args[:3])
        elif given and not any(without_data or tensor.is_floating_point() for tensor in given):
            with unset_fake_temporarily():
                made = function(*args, **(kwargs or {}))
        else:
            made = function(*args, **(kwargs or {}))
        if formula := PRODUCTS.get(function.overloadpacket) or flop_registry.get(function.overloadpacket):
            self.flops[self.current] = self.flops.get(self.current, 0.0) + formula(
                *args, **(kwargs or {}), out_val=made
            )
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return made

    def _note(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._known:
            self.now += 1
            block = Block(storage.nbytes(), self.now, NEVER, self.current, tuple(tensor.shape))
            self.blocks.append(block)
            self._known[address] = (
                block,
                weakref.ref(storage, lambda _, address=address: self._free(address)),
            )
        return self._known[address][0]

    def _free(self, address: int) -> None:
        self.now += 1
        self._known.pop(address)[0].died = self.now
