"""Programs that nobody has read, run fenced: each in processes of its own that it cannot leave.

What it protects from and what not: notebooks/guides/code_execution.md.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.errors import RunError

FENCE = Path(__file__).with_name("fence.py")
KINDS = ("passed", "syntax error", "exception", "assertion", "time-out", "memory", "refused")
MIB = 2**20
TOLD = 16 * 1024  # bytes of a report that are read


@dataclass(frozen=True)
class Limits:
    """What one program may take; together at most `processes` times `memory`."""

    cpu_s: int = 5  # of each process
    wall_s: float = 30.0  # of all, from the start to the end
    memory: int = 512 * MIB  # addresses of each process
    processes: int = 8  # threads count too
    files: int = 64  # open in a process; held in the folder: 16 times as many
    file_size: int = 16 * MIB
    disk: int = 64 * MIB  # of the only folder that it may write to, which is held in memory
    output: int = 64 * 1024  # bytes kept of what it prints; the rest is dropped
    network: bool = False

    def order(self, code: str) -> dict[str, Any]:
        """What the inside of the fence is told."""
        limits = {
            "CPU": self.cpu_s,
            "AS": self.memory,
            "NPROC": self.processes,
            "FSIZE": self.file_size,
            "NOFILE": self.files,
            **dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE"), 0),
        }
        about = {"disk": self.disk, "files": 16 * self.files, "network": self.network}
        return {"code": code, "limits": limits, **about}


USUAL = Limits()


@dataclass(frozen=True)
class Verdict:
    """What became of a program: one of KINDS, the error in its own words, what it printed, how long."""

    kind: str
    message: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    @property
    def name(self) -> str:
        """The kind, and of an exception which: `exception: TypeError`."""
        return f"exception: {self.message.partition(':')[0]}" if self.kind == "exception" else self.kind


def run(code: str, limits: Limits = USUAL) -> Verdict:
    """Run a program to its end, or to a limit.

    Raises:
        RunError: this system gives no fence; nothing was run.
    """
    began = time.monotonic()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as order:
        order.write(json.dumps(limits.order(code)).encode())
        order.seek(0)
        process = subprocess.Popen(
            [str(Path(sys.executable).resolve()), "-I", "-S", "-B", str(FENCE), str(writing)],
            stdin=order,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env={},
            cwd="/",
            start_new_session=True,
        )
    os.close(writing)
    assert process.stdout is not None
    try:
        held = _heard({reading: TOLD, process.stdout.fileno(): limits.output}, began + limits.wall_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the first of the namespace goes all of it
        process.wait()
        os.close(reading)
        process.stdout.close()
    told, output, in_time = held
    seconds = time.monotonic() - began
    kind, message = _judged(told, output, in_time=in_time, late=seconds > limits.cpu_s)
    return Verdict(kind, printed(message), printed(output), seconds)


def printed(text: str | bytes) -> str:
    """Text from a program, with escapes for all that could steer a terminal; lines and tabs stay."""
    text = text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def _heard(most: dict[int, int], deadline: float) -> tuple[bytes, bytes, bool]:
    """What comes from each file descriptor, up to so many bytes, and whether all ended in time."""
    held = {number: bytearray() for number in most}
    with selectors.DefaultSelector() as selector:
        for number in most:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if piece := os.read(key.fd, 64 * 1024):
                    held[key.fd] += piece[: most[key.fd] - len(held[key.fd])]
                else:
                    selector.unregister(key.fd)
        in_time = not selector.get_map()
    told, output = map(bytes, held.values())
    return told, output, in_time


def _judged(told: bytes, output: bytes, *, in_time: bool, late: bool) -> tuple[str, str]:
    """Kind and message, from what the fence reported; it may be the program that wrote there."""
    lines = []
    for line in told.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    said = [line for line in lines if isinstance(line, dict)]
    if not (said and said[0].get("started")):
        if not in_time:
            raise _no_fence("it took longer to make than a program may run; wait until less is running here")
        raise _no_fence(str(said[0].get("fence")) if said else printed(output)[-500:] or "it said nothing")
    status = next((line["status"] for line in reversed(said) if isinstance(line.get("status"), int)), None)
    if not in_time or status == -signal.SIGXCPU or (status == -signal.SIGKILL and late):
        return "time-out", ""
    verdict = next((line for line in said if line.get("kind") in KINDS), None)
    if verdict and status == 0:
        return verdict["kind"], str(verdict.get("message", ""))
    if status is not None and status < 0:
        why = ", by itself or for want of memory" if status == -signal.SIGKILL else ""
        return "exception", f"{signal.Signals(-status).name}: ended by this signal{why}"
    return "exception", f"SystemExit: it left with status {status} before its end"


def _no_fence(found: str) -> RunError:
    return RunError(
        f"no program was run, as this system gives no fence for it: {found}. Needed are namespaces of users, "
        "processes, files and network (Linux 5.12 or later, x86_64 or aarch64): as root outside a container, "
        "or as a user where unprivileged user namespaces are allowed (kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0); in Docker --privileged. Without them use another "
        "machine for this"
    )
