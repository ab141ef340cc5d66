"""Processes at work: one at a time on a run; what asks it to stop; how a command ends.

Whoever works on a run holds the lock beside its folder, and a second is told who that is.  The operating
system frees the lock of a process that died.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from kdlib.errors import KdlibError, RunError, Stopped, refuse_keys, without_keys
from kdlib.runs.files import go_on, now, read_json, write_json, writing

LAUNCHED = "KDLIB_LAUNCHED"  # set where a launch of ranks began this process, whose words go to files
# set by the command that runs the notebooks: it keeps status.json, and nobody watches the cells
PARENT = "KDLIB_RUN_BY"
RANK_OF = "TORCHELASTIC_RUN_ID"  # set by torchrun for each of several ranks
INTERRUPTED = 130  # exit status
OTHERS_S = 5.0  # that a rank waits for the first to say what is wrong
ENDS_S = 1.5  # that an interrupted command may take to tidy up
IS_COMMAND = "KDLIB_COMMAND"  # set to the number of the process that is one, and not a notebook's kernel
HEARS = "hears_stop.json"  # in a run's folder, of the process that looks for STOP
ENDING: list[str] = []  # the last words of this process, once it is interrupted; "" when they are said
HEARD: list[int] = []  # signals that asked this process to stop; its exit status says so: 130, 143
LOOK_S = 0.5
LINGERS_S = 20.0  # what a killed process started, as workers that load its data, ends so much later at most
OURS: dict[Path, dict[str, Any]] = {}  # runs that this process holds, and what it notes of itself


def headless() -> bool:
    """True where notebooks are run by `kd run` and nobody can press a button."""
    return PARENT in os.environ


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


def is_this(process: Mapping[str, Any]) -> bool:
    """Whether that process is this one."""
    return this_process().items() <= process.items()


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
    if run in OURS or started_this(holder_of(run)):
        yield
        return
    lock, note = FileLock(_beside(run), thread_local=False), _beside(run, ".json")
    with writing(_beside(run)):
        run.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, run, wait)
    try:
        if is_here(holder := holder_of(run)) and lives(holder):  # somebody deleted the file that it locks
            raise RunError(_is_held(run, holder))
        OURS[run] = {**this_process(), "since": now(), "folder": _number(run)}
        write_json(note, OURS[run])
        yield
    finally:
        if OURS.pop(run, None):
            note.unlink(missing_ok=True)
        lock.release()


def holder_of(folder: Path) -> dict[str, Any]:
    """Who works on a run, as noted by itself, alive or not; {} where none does, or its note is torn."""
    if (run := run_of(folder)) in OURS:
        return OURS[run]
    with suppress(RunError):
        return {"folder": None} | note if (note := read_json(_beside(run, ".json"), {})) else {}
    return {}


def hold_on(folder: Path, status: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Of a run and its status: whether a process works on it, whether that noted this, and whether one that
    began later is gone.
    """
    holder = holder_of(folder)
    if not holder or holder["folder"] not in (None, _number(folder)):  # of a folder that had this name before
        is_held = not is_free(folder)  # somebody deleted its note, or tore it
        return is_held, is_held and lives(status), False
    is_held, is_later = lives(holder), moment_of(status) >= moment_of(holder)
    is_own = is_later and all(status.get(name) == holder.get(name) for name in this_process())
    return is_held, is_held and is_own, not (is_held or is_later)


def _number(folder: Path) -> int | None:
    """What stays with a folder that is renamed, and no copy has."""
    return folder.stat().st_ino if folder.exists() else None


def moment_of(note: Mapping[str, Any]) -> float:
    """Since when it holds, in seconds; 0 where that is not told."""
    try:
        return datetime.fromisoformat(str(note.get("since"))).timestamp()
    except ValueError:
        return 0.0


def is_free(folder: Path) -> bool:
    """Whether no process holds the run's lock at this moment."""
    run = run_of(folder)
    if run in OURS or not _beside(run).exists():
        return run not in OURS
    try:
        with FileLock(_beside(run)).acquire(timeout=0):
            return True
    except Timeout:
        return False
    except PermissionError:  # somebody else's: who works on it is known by its note alone
        return True


def _acquire(lock: FileLock, run: Path, wait: Callable[[str], object] | None) -> None:
    patience = time.monotonic() + LINGERS_S
    while True:
        try:
            lock.acquire(timeout=LOOK_S)
            return
        except Timeout:
            holder = holder_of(run)
        if wait is not None:
            wait(_who(holder))
        elif lives(holder) or time.monotonic() > patience:
            raise RunError(_is_held(run, holder))


def _who(holder: Mapping[str, Any]) -> str:
    return "{host}, process {pid}, since {since}".format(**holder) if holder else "another process"


def _is_held(run: Path, holder: Mapping[str, Any]) -> str:
    return f"run {run.name} is running already, on {_who(holder)}; wait for it, or stop it first"


def _beside(run: Path, ending: str = "") -> Path:
    return run.with_name(f".{run.name}.lock{ending}")


@contextmanager
def heard(ask: Callable[[], object], again: Callable[[], object]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `ask`, once; a second Ctrl-C (SIGINT) calls `again`.

    A second SIGTERM is none: a scheduler sends one to a command and to all that it started, which pass it on.
    Under torchrun the same holds of SIGINT.  Python hears signals in its main thread alone; elsewhere this
    changes nothing.
    """
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        is_again = number == signal.SIGINT and number in asked and RANK_OF not in os.environ
        asked.append(number)
        HEARD.append(number)
        if is_again and not ENDING:
            again()
        elif len(asked) == 1 and not ENDING:  # else it ends as fast as it can
            ask()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if getattr(before[signal.SIGINT], "__name__", "") != hear.__name__:  # the outermost; a cell ends
            ENDING.clear()


@contextmanager
def heard_at_once(words: str = "") -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end what is done as `interrupted` does; but not in a rank of several: while
    it waits for others Python hears nothing, and the system ends it.
    """
    at_once = partial(interrupted, words)
    with nullcontext() if RANK_OF in os.environ else heard(at_once, at_once):
        yield


def interrupted(words: str = "") -> None:
    """Raise as Ctrl-C does where nothing hears it; what ends then hears nothing more, and ends in time."""
    ENDING.append(words or f"interrupted; {go_on()}")
    if os.environ.get(IS_COMMAND) == str(os.getpid()):
        timer = threading.Timer(ENDS_S, _end_in_time)
        timer.daemon = True
        timer.start()
    raise KeyboardInterrupt(ENDING[-1])


def _end_in_time() -> None:
    if ENDING and "" not in ENDING:
        print(f"kd: {ENDING[-1]}", file=sys.stderr, flush=True)
    os._exit(128 + HEARD[-1])


@contextmanager
def hears_stop(*runs: Path) -> Iterator[None]:
    """Inside, a file STOP in one of these folders of runs is seen by this process: see `is_stoppable`."""
    for run in runs:
        write_json(run / HEARS, this_process())
    try:
        yield
    finally:
        for run in runs:
            (run / HEARS).unlink(missing_ok=True)


def is_stoppable(run: Path) -> bool:
    """Whether a training goes on that keeps a checkpoint when it finds STOP there; else nothing is lost."""
    with suppress(RunError):
        return lives(read_json(run / HEARS, {}))
    return False


@contextmanager
def bare_errors() -> Iterator[None]:
    """What a user can act on is printed bare, with exit status 1; a key in the command comes to nothing.

    A command that was asked to stop ends with 128 and the signal's number, as shells have it: 130 of Ctrl-C.
    Of several ranks with the same fault the first says it, and torchrun ends the others while they wait.
    """
    HEARD.clear()
    with heard_at_once("interrupted"):
        try:
            refuse_keys(sys.argv[1:], "the command")
            yield
        except KdlibError as error:
            who = "kd"
            if (rank := os.environ.get("RANK", "0")) != "0":
                time.sleep(OTHERS_S)
                who += f", rank {rank}"
            if LAUNCHED not in os.environ:  # else who launched it says so
                print(without_keys(f"{who}: {error}"), file=sys.stderr)
            sys.exit(128 + HEARD[-1] if HEARD and isinstance(error, Stopped) else 1)
        except (KeyboardInterrupt, SystemExit) as error:  # of Ctrl-C typer makes the latter, without a word
            if isinstance(error, SystemExit) and error.code != INTERRUPTED:
                raise
            logging.getLogger("asyncio").disabled = True  # of kernels that nobody waits for any more
            print(f"kd: {ENDING[-1] if ENDING else 'interrupted'}", file=sys.stderr, flush=True)
            ENDING.append("")
            sys.exit(128 + HEARD[-1] if HEARD else INTERRUPTED)
