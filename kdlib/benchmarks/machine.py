"""The machine that a benchmark runs on: what it is, how fast it multiplies, and how time and memory are
read on it.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from kdlib.errors import RunError
from kdlib.hardware import bf16_instructions

PACKAGES = ("kdlib", "torch", "transformers", "accelerate", "trl", "liger-kernel", "torchtune")
PROCESS = Path("/proc/self")  # Linux only
MATRICES = ((2048, 2048, 2048), (512, 576, 8192))  # rows x columns x columns of the products that are timed
SAMPLE_S = 0.002


def description(device: torch.device) -> dict[str, object]:
    """What others need to know to compare: processor, cores, threads, device, versions; no names or paths
    of the host.
    """
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "logical cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory, GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "bfloat16 instructions": _instructions(),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def device_named(name: str) -> torch.device:
    """`auto` is cuda where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def seconds(work: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """How long one call takes: wall time, and this process's CPU time over all its threads; on CUDA by
    events, without the latter.
    """
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return {"wall_s": begin.elapsed_time(end) / 1000, "cpu_s": None}
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def rotated(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): each name once a round, the order rotated, so that none always follows the same."""
    for number in range(rounds):
        first = number * len(names) // rounds
        for name in (*names[first:], *names[:first]):
            yield number, name


def matmul_speed(dtype: torch.dtype, device: torch.device, *, tries: int = 5) -> float:
    """FLOP/s of the fastest of a few matrix products: what this machine can do at best, now."""
    best = 0.0
    for rows, inner, columns in MATRICES:
        left, right = (
            torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns))
        )
        times = [seconds(lambda left=left, right=right: left @ right, device)["wall_s"] for _ in range(tries)]
        best = max(best, 2 * rows * inner * columns / min(times))
    return best


def in_fresh_process(
    module: str, asked: Mapping[str, Any], *, what: str, memory: bool = True
) -> dict[str, Any]:
    """What `python -m module` prints as its last line, given `asked`, both in JSON.

    Args:
        what: is done there, for the message of an error.
        memory: is measured there, and not time, which giving blocks back takes.

    Raises:
        RunError: that process failed; its last words are in the message.
    """
    # glibc gives large blocks back when they are freed: what is
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if memory else {}
    done = subprocess.run(  # measured is what is held, not how its heap happened to be cut up
        [sys.executable, "-m", module, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **returned},
    )
    if done.returncode != 0:
        raise RunError(f"{what} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _processor() -> str:
    """`AMD EPYC 7R13`, and where the maker gives family and model only, those."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    family = (
        f", family {facts['cpu family']} model {facts['model']}"
        if {"cpu family", "model"} <= facts.keys()
        else ""
    )
    return facts.get("model name", platform.processor() or platform.machine()) + family


def _instructions() -> str:
    found = bf16_instructions()
    return "unknown" if found is None else ", ".join(found) or "none"


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
