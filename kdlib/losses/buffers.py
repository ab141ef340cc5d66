"""What the chunked losses keep between steps: two buffers of logits, and the compiled arithmetic on rows.

A chunk is what memory holds at a time, a piece what a core's caches hold.  Signals and forms, of
`losses.signals`, are Any here for a shorter chain of imports; equal forms share compiled code.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.hardware import device_memory

COMPILED_SCRATCH = 2  # [rows, V] in float32 that the compiled row arithmetic needs beside its arguments
PIECE, LEAST = 64, 8  # rows worked on at a time on a CPU, at most and at least; what is compiled
CACHED = 8 * 2**20  # bytes of both models' logits in a piece
LINE, PAGE = 64, 4096  # bytes of a CPU's cache line, and of a page of its memory
CPU_BUDGET, BUDGET = 256 * 2**20, 2**30  # bytes of logits, student's and teacher's, at most
Arithmetic = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor], Tensor]
"""(products [n, V], the teacher's or None, targets [n], temperatures [terms], weights [terms], or [terms, n])
-> sums [terms] of a chunk; values [terms, n] of a piece."""
log = logging.getLogger(__name__)


class Workspace:
    """Buffers for the logits of one chunk, and the arithmetic on its rows.  One serves one training.

    Keeping the buffers spares the page faults of fresh memory at each step.
    """

    def __init__(self, chunk: int | None = None, *, compiled: bool = False, vocabulary: int = 0) -> None:
        """
        Args:
            chunk: tokens whose logits exist at a time; by vocabulary, dtype and free memory where None.
            compiled: compile the row arithmetic (seconds to half a minute, once); a CPU needs a C++ compiler.
            vocabulary: the teacher's, where it is larger than the student's.
        """
        self.chunk, self.compiled, self.vocabulary = chunk, compiled, vocabulary
        self._buffers: dict[str, Tensor] = {}

    def __str__(self) -> str:
        size = f"{self.chunk} tokens" if self.chunk else "as many tokens as memory suggests"
        return f"in chunks of {size}, the row arithmetic {'compiled' if self.compiled else 'not compiled'}"

    def chunk_for(self, student: Any) -> int:
        """Tokens whose logits exist at a time."""
        if self.chunk is None:
            largest = max(student.vocabulary, self.vocabulary)
            self.chunk = chunk_tokens(largest, student.dtype.itemsize, student.device)
        return self.chunk

    def products(self, name: str, signal: Any, rows: slice) -> Tensor:
        """[n or more, V] raw products of a model with its head, in the kept buffer of this name.

        More where the arithmetic is compiled, to whole pieces, so that it sees one shape.
        """
        tokens = rows.stop - rows.start
        buffer = self._buffer(name, max(-(-tokens // PIECE), 1) * PIECE if self.compiled else tokens, signal)
        signal.write(buffer[:tokens], rows)
        return buffer

    def sums(self, functions: Sequence[Callable], form: Any, teacher_form: Any) -> Arithmetic:
        """The arithmetic on a chunk, piece by piece: [terms] sums; the gradient overwrites the student's."""
        arithmetic = self.arithmetic(functions, form, teacher_form)

        def sums(
            products: Tensor, others: Tensor | None, targets: Tensor, temperatures: Tensor, weights: Tensor
        ) -> Tensor:
            size, more, values = self.piece(products), (0, len(products) - len(targets)), []
            padded, by_token = F.pad(targets, more), F.pad(weights, more) if weights.ndim == 2 else None
            for start in range(0, max(len(products), 1), size):
                rows = slice(start, start + size)
                theirs = None if others is None else others[rows]
                each = weights[:, None] if by_token is None else by_token[:, rows]
                values.append(arithmetic(products[rows], theirs, padded[rows], temperatures, each))
            return torch.cat(values, -1)[:, : len(targets)].sum(-1)

        return sums

    def arithmetic(self, functions: Sequence[Callable], form: Any, teacher_form: Any) -> Arithmetic:
        """The same on one piece of a chunk: [terms, n] values; weights [terms, 1], or [terms, n]."""
        return (_compiled if self.compiled else _row_arithmetic)(tuple(functions), form, teacher_form)

    def piece(self, products: Tensor) -> int:
        """Rows worked on at a time: a power of two, as many as a CPU's caches hold; elsewhere all."""
        if products.device.type != "cpu":
            return max(len(products), 1)
        fit = CACHED // (2 * products.shape[1] * products.element_size())
        return min(max(1 << max(fit.bit_length() - 1, 0), LEAST), PIECE)

    def _buffer(self, name: str, tokens: int, signal: Any) -> Tensor:
        """[tokens, V] of the kept memory, which grows where it must."""
        kept, dtype, device = self._buffers.get(name), signal.dtype, signal.device
        width = row_width(signal.vocabulary, dtype.itemsize, device)
        if kept is None or kept.numel() < tokens * width or (kept.dtype, kept.device) != (dtype, device):
            # zeros: padding must not be nan
            self._buffers[name] = kept = torch.zeros(tokens * width, dtype=dtype, device=device)
        return kept[: tokens * width].view(tokens, width)[:, : signal.vocabulary]


class FakeWorkspace(Workspace):
    """One whose compiled arithmetic is counted and not run, and which takes pieces as the device would."""

    def __init__(self, chunk: int, *, compiled: bool, kind: str) -> None:
        super().__init__(chunk, compiled=compiled)
        self.kind = kind

    @property
    def buffers(self) -> Iterable[Tensor]:
        return self._buffers.values()

    def piece(self, products: Tensor) -> int:
        return super().piece(products) if self.kind == "cpu" else max(len(products), 1)

    def arithmetic(self, functions, student, teacher):
        plain, run = super().arithmetic(functions, student, teacher), 0

        def counted(products, others, targets, temperatures, weights):
            nonlocal run
            run += 1
            if not self.compiled and run <= 2:  # further pieces hold no more
                return plain(products, others, targets, temperatures, weights)
            scratch = [torch.empty(products.shape, device=products.device) for _ in range(COMPILED_SCRATCH)]
            return weights.new_zeros(len(functions), len(scratch[0]))

        return counted


def row_width(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Elements from one row of logits to the next: V, on a CPU a cache line more where V fills whole pages.

    Rows whole pages apart share a few sets of the caches: a product that writes many rows evicts itself.
    """
    fills_pages = device.type == "cpu" and vocabulary * itemsize % PAGE == 0
    return vocabulary + (LINE // itemsize if fills_pages else 0)


def chunk_tokens(vocabulary: int, itemsize: int, device: torch.device, *, free: int | None = None) -> int:
    """Tokens whose logits to make at a time: as many as an eighth of the free memory holds, in bounds.

    A multiple of 64.  More make the products a little faster, up to a few hundred.

    Args:
        free: bytes of the device; those that are free now where None.
    """
    if free is None:
        _, free = device_memory(device)
    budget = min(free // 8, BUDGET if device.type == "cuda" else CPU_BUDGET)
    return max(budget // (2 * vocabulary * itemsize) // PIECE, 1) * PIECE


def _row_arithmetic(functions: Sequence[Callable], form: Any, teacher_form: Any) -> Arithmetic:
    """[terms, n] values of n rows; the gradient of sum(weights * values) takes the place of the products."""

    def arithmetic(
        products: Tensor, others: Tensor | None, targets: Tensor, temperatures: Tensor, weights: Tensor
    ) -> Tensor:
        teacher_logits = None if others is None else teacher_form.logits(others)

        def values_of(products: Tensor) -> Tensor:
            logits = form.logits(products)
            return torch.stack(
                [f(logits, teacher_logits, targets, temperatures[i]) for i, f in enumerate(functions)]
            )

        values, gradient_of, *_ = torch.func.vjp(values_of, products)
        (gradient,) = gradient_of(weights.expand_as(values).contiguous())
        products.copy_(gradient)
        return values

    return arithmetic


@cache
def _compiled(functions: tuple[Callable, ...], form: Any, teacher_form: Any) -> Arithmetic:
    """The arithmetic compiled, or as it is where the compiler cannot; the log says so."""
    eager = _row_arithmetic(functions, form, teacher_form)
    # a limit over all objectives of this process, as they share one code
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    chosen = torch.compile(eager, fullgraph=True)

    def arithmetic(*arguments: Any) -> Tensor:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # before it touched anything
            why = " ".join(str(error).splitlines()[:2])
            log.warning("the losses' row arithmetic is not compiled, and some three times slower: %s", why)
            chosen = eager
            return eager(*arguments)

    return arithmetic
