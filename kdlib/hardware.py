"""What there is to run on: device, dtype, memory, time; what a CPU and its C library do."""

import ctypes
import gc
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1  # bytes that an int can say
SHARE = 64  # of the machine's memory, kept at most of one block
USUAL = {M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}  # where glibc's own rule ends, in time
SWITCHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")  # glibc's environment
PROCESS = Path("/proc/self")  # Linux only
SAMPLE_S = 0.002
WARM_UP = 3  # answers that are not timed
TIMES, ENOUGH_S = 5, 10.0  # timings at least, unless three took so long

_native: ContextVar[bool] = ContextVar("native", default=False)  # products in the dtype that is asked for


def precision_of(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products on a device, and why; `wanted` as in a config, or `auto`."""
    if wanted != "auto":
        return getattr(torch, wanted), f"precision: {wanted}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capable, name = major >= 8, torch.cuda.get_device_name()
        reason = f"{name} has compute capability {major}.{minor}; bf16 gains from 8.0 on"
    elif device.type == "cpu":
        capable = bool(bf16_instructions())
        reason = f"this CPU has {'' if capable else 'no '}avx512_bf16 or amx_bf16"
    else:
        capable, reason = False, f"{device.type}: bf16 is not tried here"
    return torch.bfloat16 if capable else torch.float32, reason


def world_size() -> int | None:
    """How many processes share this training, as its launcher says; None where none launched this one."""
    return int(found) if (found := os.environ.get("WORLD_SIZE")) else None


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes in all, and free now; of the machine where the device has no memory of its own."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def machine(device: torch.device) -> dict[str, Any]:
    """What a run was made on: system, processor, threads, and the memory of its device in GiB."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(device_memory(device)[0] / GIB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def memory_gib(device: torch.device) -> float:
    """Peak so far on CUDA, elsewhere the process's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return psutil.Process().memory_info().rss / GIB


@dataclass
class Peak:
    """Known at the end."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The most memory taken inside above that at entry.  One at a time: it sets the high-water mark back.

    CUDA: what the allocator handed out.  Linux: the resident set's high-water mark.  Elsewhere the resident
    set is looked at every 2 ms, and a shorter peak can be missed.
    """
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif _mark_set_back():
        before = _high_water()
        yield peak
        peak.bytes = _high_water() - before
    else:
        with _sampled(peak):
            yield peak


@contextmanager
def memory_kept() -> Iterator[bool]:
    """Inside, memory that is freed stays with the process; afterwards all that is free is given back.

    Left alone, glibc gives each freed block of over 32 MiB back to the system.  The next step asks for it
    anew, and each of its pages is a page fault: on a virtual machine a fifth of the step and more.  The peak
    grows by a few such blocks (glibc before 2.38 may miss a free one that would do), so those of more than a
    64th of the machine's memory are given back as ever.

    Yields:
        Whether that is so: not with another C library, nor where SWITCHES or GLIBC_TUNABLES decide it.
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
    """Return what is free to the system now, where the C library can."""
    if glibc := _glibc():
        glibc.malloc_trim(0)


@cache
def bf16_instructions() -> tuple[str, ...] | None:
    """Those that this CPU has for bfloat16 products; None where the system does not say."""
    facts = Path("/proc/cpuinfo")
    words = facts.read_text().split() if facts.exists() else []
    found = tuple(name for name in ("avx512_bf16", "amx_bf16") if name in words)
    return found if "flags" in words else None  # x86 alone has "flags"


def emulates_bf16() -> bool:
    """Whether this CPU surely has none: bfloat16 products are then 4 to 100 x slower."""
    return bf16_instructions() == ()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to make a product: float32, faster and more exact, where a CPU emulates bfloat16."""
    emulated = dtype is torch.bfloat16 and device.type == "cpu" and emulates_bf16() and not _native.get()
    return torch.float32 if emulated else dtype


@contextmanager
def as_asked() -> Iterator[None]:
    """Inside, `product_dtype` gives what it is given: for a fake step of another device."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)


def wait_for(device: torch.device) -> None:
    """Until what was asked of an accelerator is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """How long it takes, to its end."""
    wait_for(device)
    started = perf_counter()
    action()
    wait_for(device)
    return perf_counter() - started


def latency_ms(
    ask: Callable[[Mapping[str, Tensor]], object],
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
) -> dict[str, float]:
    """Milliseconds for one row by itself, its inputs at hand: median of these rows, and the middle half."""
    for batch in batches[:WARM_UP]:
        ask(batch)
    return middle_half([1e3 * seconds_of(lambda batch=batch: ask(batch), device) for batch in batches])


def middle_half(timings: Sequence[float]) -> dict[str, float]:
    """{value, low, high}: the median of several timings, and the quartiles, which a busy machine moves."""
    low, median, high = statistics.quantiles(timings, n=4) if len(timings) > 1 else [*timings] * 3
    return {"value": median, "low": low, "high": high}


def repeated(action: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds that it takes, five times, or three where it is slow; a first time is not counted."""
    action()
    found: list[float] = []
    while len(found) < TIMES and not (len(found) >= 3 and sum(found) > ENOUGH_S):
        found.append(seconds_of(action, device))
    return found


def _glibc() -> ctypes.CDLL | None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    return None


def _mark_set_back() -> bool:
    """Sets the resident set's high-water mark back to what is resident now, where the system can."""
    give_memory_back()  # otherwise it would be used again unseen
    with suppress(OSError), (PROCESS / "clear_refs").open("r+") as switch:  # there on Linux alone
        switch.write("5")
        return True
    return False


def _high_water() -> int:
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@contextmanager
def _sampled(peak: Peak) -> Iterator[None]:
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def cache_folder() -> Path:
    """Where what is made once is kept: KDLIB_CACHE, else in the home folder, else below the runs here."""
    if own := os.environ.get("KDLIB_CACHE"):
        return Path(own)
    home = Path.home() / ".cache" / "kdlib"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path("runs", ".cache").absolute()
    return home if os.access(home, os.W_OK) else Path("runs", ".cache").absolute()
