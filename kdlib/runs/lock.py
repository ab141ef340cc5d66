"""One lock per run, beside its folder: whoever trains holds it, and a second is told who that is.

The operating system frees the lock of a process that died.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from kdlib.errors import RunError
from kdlib.runs.files import now, read_json, write_json, writing

LOOK_S = 0.5
LINGERS_S = 20.0  # what a killed process started, as workers that load its data, ends so much later at most
OURS: dict[Path, FileLock] = {}  # held by this process


def run_of(folder: Path) -> Path:
    """The folder of the run that a student's folder is, or lies in."""
    folder = folder.absolute()
    return folder.parent if (folder.parent / "config.yaml").exists() else folder


def this_process() -> dict[str, Any]:
    """What tells this process from all others: host, number, and when it began, as numbers come again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": _began(os.getpid())}


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether a process, as `this_process` described itself, belongs to this machine."""
    return process.get("host", socket.gethostname()) == socket.gethostname()


def lives(process: Mapping[str, Any]) -> bool:
    """Whether that process still lives; one of another machine, of which nothing is known here, does."""
    if not is_here(process):
        return True
    began = _began(process["pid"]) if isinstance(process.get("pid"), int) else None
    return began is not None and began == process.get("pid_started")


def started_this(process: Mapping[str, Any]) -> bool:
    """Whether that process started this one, or what started this one."""
    parents = [parent.pid for parent in psutil.Process().parents()]
    return process.get("pid") in parents and is_here(process) and lives(process)


def _began(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # a number that no process has
        return None


@contextmanager
def held(folder: Path, *, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Inside, no other process trains this run.  What the holder itself started does so on its behalf.

    Args:
        folder: a run's, or of a student in it.
        wait: called again and again, with who holds it, while another process does.

    Raises:
        RunError: one does, and there is no `wait`; the message says which.
    """
    run = run_of(folder)
    if run in OURS or started_this(_holder(run)):
        yield
        return
    lock, note = FileLock(_beside(run), thread_local=False), _beside(run, ".json")
    with writing(_beside(run)):
        run.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, run, wait)
    try:
        OURS[run] = lock
        write_json(note, {**this_process(), "since": now()})
        yield
    finally:
        note.unlink(missing_ok=True)
        del OURS[run]
        lock.release()


def is_free(folder: Path) -> bool:
    """Whether no process holds the run's lock at this moment."""
    run = run_of(folder)
    if run in OURS:
        return False
    if not _beside(run).exists():
        return True
    try:
        with FileLock(_beside(run)).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _acquire(lock: FileLock, run: Path, wait: Callable[[str], object] | None) -> None:
    patience = time.monotonic() + LINGERS_S
    while True:
        try:
            lock.acquire(timeout=LOOK_S)
            return
        except Timeout:
            holder = _holder(run)
        who = "{host}, process {pid}, since {since}".format(**holder) if holder else "another process"
        if wait is not None:
            wait(who)
        elif lives(holder) or time.monotonic() > patience:
            raise RunError(f"run {run.name} is running already, on {who}; wait for it, or stop it first")


def _holder(run: Path) -> dict[str, Any]:
    """Who holds the lock, as noted by itself; {} where none does, or has not noted it yet."""
    return read_json(_beside(run, ".json"), {})


def _beside(run: Path, ending: str = "") -> Path:
    return run.with_name(f".{run.name}.lock{ending}")
