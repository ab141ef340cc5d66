"""What a CPU and its C library do unasked, and how they are asked otherwise: with memory that is freed,
and with bfloat16.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1  # bytes that an int can say
SHARE = 64  # of the machine's memory, kept at most of one block
# where glibc's own rule ends, after some large blocks
USUAL = {M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}
# of glibc, in the environment
SWITCHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")

# whether products are to be made in the dtype asked for, come what may
_native: ContextVar[bool] = ContextVar("native", default=False)


@contextmanager
def memory_kept() -> Iterator[bool]:
    """Inside, memory that is freed stays with the process for whatever comes next; afterwards all that is
    free is given back.

    Left alone, glibc gives each block of over 32 MiB back to the system when it is freed, and the free end of
    its heap with it. The next step asks for them anew, and each of their pages is a page fault: on a virtual
    machine a fifth of the step and more. The peak grows by a few such blocks: glibc before 2.38 does not
    always find a free one that would do, and takes another.  So blocks of more than a 64th of the machine's
    memory are given back as ever.

    Yields:
        Whether that is so: not with another C library, nor where the environment decides it by SWITCHES or
        GLIBC_TUNABLES.
    """
    decided = any(name in os.environ for name in SWITCHES) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    glibc = None if decided else _glibc()
    if glibc is None:
        yield False
        return
    glibc.mallopt(M_MMAP_THRESHOLD, min(psutil.virtual_memory().total // SHARE, MOST))
    glibc.mallopt(M_TRIM_THRESHOLD, MOST)
    try:
        yield True
    finally:
        for switch, size in USUAL.items():
            glibc.mallopt(switch, size)
        glibc.malloc_trim(0)


def give_memory_back() -> None:
    """What is free goes back to the system now, where the C library can."""
    if glibc := _glibc():
        glibc.malloc_trim(0)


@cache
def bf16_instructions() -> tuple[str, ...] | None:
    """Those that this CPU has for bfloat16 products; None where the system does not say."""
    facts = Path("/proc/cpuinfo")
    words = set(facts.read_text().split()) if facts.exists() else set()
    # x86 alone has "flags"
    return tuple(name for name in ("avx512_bf16", "amx_bf16") if name in words) if "flags" in words else None


def emulates_bf16() -> bool:
    """Whether this CPU is known to have no instructions for bfloat16 products: in it one is 4 to 100
    times slower than in float32.
    """
    return bf16_instructions() == ()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to make a product for which this one was asked: float32, faster and more exact,
    where a CPU emulates bfloat16.
    """
    emulated = dtype is torch.bfloat16 and device.type == "cpu" and emulates_bf16() and not _native.get()
    return torch.float32 if emulated else dtype


@contextmanager
def as_asked() -> Iterator[None]:
    """Inside, `product_dtype` gives what it is given: for the rehearsal of another device."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)


def _glibc() -> ctypes.CDLL | None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    return None
