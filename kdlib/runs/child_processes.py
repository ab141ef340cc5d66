"""Processes that one of ours starts: a fresh one that measures, or several that share a training."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from kdlib import errors
from kdlib.errors import Died, KdlibError, RunError
from kdlib.runs.files import go_on, read_json, without_keys_in
from kdlib.runs.folder import Run, working
from kdlib.runs.processes import LAUNCHED, heard, held, interrupted, is_stoppable

LOGS = "ranks"  # in a run's folder: <launch>/attempt_0/<rank>/ with stdout.log, stderr.log, error.json
FIRST = "[default0]:"  # what torchrun puts before a line of rank 0
END = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+)")  # the same, of each that failed
FOLLOWS = (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)  # how a rank ends because of another
LAST = 8  # lines of a rank that an error repeats


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
    # measured is what is held, not how a heap happened to be cut up: glibc gives blocks back when asked so
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if memory else {}
    command = [sys.executable, "-m", module, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned)
    if done.returncode != 0:
        raise RunError(f"{what} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def on_ranks(run: Run, count: int, *words: str) -> None:
    """`kd train RUN words…` in so many processes under torchrun; what rank 0 says is printed as it comes.

    The run's status says so where it is all of the training, without further words.

    An interrupt or a polite kill becomes the file STOP, so that the ranks finish their step and save, however
    long that takes; after a second Ctrl-C, or where this process dies, they end at once.

    Raises:
        Died: one was killed; the others are stopped, in half a minute where they hang.
        KdlibError: as the first rank that failed raised it; a RunError with its last lines for other errors.
    """
    logs, stop, own = run.path / LOGS, run.path / "STOP", list[str]()
    asked = threading.Event()

    def ask() -> None:
        if not is_stoppable(run.path):
            interrupted()
        asked.set()
        stop.touch()
        print("stopping after this step, with a checkpoint; interrupt again to stop at once", flush=True)

    ranks = ["--standalone", "--nproc-per-node", str(count), "--tee", "3", "--local-ranks-filter", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, "--log-dir", str(logs)]
    command += ["-m", "kdlib", "train", str(run.path), *words]
    environment = {**threads_of(count), **os.environ, "PYTHONUNBUFFERED": "1", LAUNCHED: "1"}
    with held(run.path) if words else working(run), heard(ask, interrupted):
        shutil.rmtree(logs, ignore_errors=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, **pipes, text=True, errors="replace", env=environment, start_new_session=True
        )
        try:
            for line in process.stdout:
                if line.startswith(FIRST):
                    print(line.removeprefix(FIRST), end="", flush=True)
                else:
                    own.append(line)
        finally:
            process.stdin.close()  # see `as_rank`
            own.extend(process.stdout)
            process.stdout.close()
            process.wait()
            if asked.is_set():
                stop.unlink(missing_ok=True)
            for file in filter(Path.is_file, logs.rglob("*")):
                without_keys_in(file)
        if process.returncode:
            raise _failure(logs, "".join(own), count)


@contextmanager
def as_rank() -> Iterator[None]:
    """Inside, one of several processes trains: rank 0 alone prints, unless each has a file for its words.

    One that `on_ranks` started ends when that does, and leaves word of an error.
    """
    if LAUNCHED not in os.environ:
        is_first = os.environ.get("RANK", "0") == "0"
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first else nowhere):
            yield
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    threading.Thread(target=_end_with_launcher, daemon=True).start()
    try:
        yield
    except Exception as error:
        get_error_handler().record_exception(error)
        raise


def _end_with_launcher() -> None:
    """Wait for the end of standard input, whose other end the launcher holds as long as it lives."""
    os.read(0, 1)
    os._exit(1)


def _failure(logs: Path, own: str, count: int) -> KdlibError:
    """What went wrong first, by torchrun's own words and what the ranks left."""
    ends = {int(rank): int(code) for rank, code in END.findall(own)}  # the first that it saw comes last
    for rank, code in ends.items():
        if code < 0 and -code not in FOLLOWS:
            how = f"was killed ({signal.Signals(-code).name}{', as for want of memory' * (code == -9)})"
            return Died(f"rank {rank} of {count} {how}; {go_on()}{_last_lines(logs, rank)}")
    left = sorted(logs.glob("*/*/*/error.json"), key=lambda path: path.stat().st_mtime_ns)
    said = {int(path.parent.name): read_json(path)["message"]["message"] for path in left}
    if said:
        rank, message = next(iter(said.items()))
        name, _, words = message.partition(": ")
        kind, which = getattr(errors, name, None), f"rank {rank} of {count}"
        if kind is None:
            return RunError(f"{which} failed: {message}{_last_lines(logs, rank)}")
        return kind(words if said.get(0) == message else f"{which}: {words}")
    if ends:
        rank, code = [*ends.items()][-1]
        return RunError(f"rank {rank} of {count} ended with status {code}{_last_lines(logs, rank)}")
    return RunError(f"torchrun ended, and none of its processes did before; it said last:\n{own[-2000:]}")


def _last_lines(logs: Path, rank: int) -> str:
    files = [path for name in ("stdout", "stderr") for path in logs.glob(f"*/*/{rank}/{name}.log")]
    texts = [path.read_text(encoding="utf-8", errors="replace").strip().splitlines() for path in files]
    lines = [line for text in texts for line in text[-LAST:]]
    where = f"; all of it: {os.path.relpath(logs)}" if lines else ""
    return "".join(f"\n  {line}" for line in ["it said last:" + where, *lines]) if lines else ""


def threads_of(count: int) -> dict[str, str]:
    """The environment that divides this process's cores among so many; nothing for one."""
    return {"OMP_NUM_THREADS": str(max(cores() // count, 1))} if count > 1 else {}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
