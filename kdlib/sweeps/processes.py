"""The processes of a sweep: each trial is a `kd run`, held to its time."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from kdlib.runs.files import without_keys_in
from kdlib.runs.folder import Run, project_root
from kdlib.runs.lock import is_free

LEFT_OUT = "01_dry_run"
GRACE = 90.0  # s to make a checkpoint in, after which a process is killed
TICK = 0.2  # s


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    run: Run
    state: str  # done, or what the run's status says, or stopped: by the one who stopped the sweep
    message: str = ""
    seconds: float = 0.0
    whole: bool = False  # these seconds are a whole run's
    unreported: bool = False  # its process ended without a word, so it left no report


class Processes:
    """Trials at work in processes of their own.

    A trial's log.txt is locked by its process and whatever that starts until the last of them is gone: nobody
    starts a second process on the run, even after the sweep itself was killed.
    """

    def __init__(self, reports: Path, *, jobs: int, timeout_s: float | None = None) -> None:
        self.reports, self.jobs, self.timeout_s = reports, jobs, timeout_s
        self.at_work: dict[str, subprocess.Popen] = {}
        self.guard, self.stopping = threading.Lock(), threading.Event()

    def work(self, run: Run) -> Outcome:
        """Run a trial to its end, from where it stands; waits for a process that is at work on it already."""
        with (run.path / "log.txt").open("a", encoding="utf-8") as log:
            if not self._wait_for(run, log):
                return Outcome(run, "stopped")
            if run.status["state"] == "done":
                return Outcome(run, "done")
            whole, began = not run.manifest.get("stages"), time.monotonic()
            with self.guard:
                process = self.at_work[run.name] = subprocess.Popen(
                    self.command(run),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=project_root(),
                    env=self.environment(),
                    start_new_session=True,
                )
                if self.stopping.is_set():
                    process.send_signal(signal.SIGINT)
            in_time = self._ended(process)
            without_keys_in(run.path / "log.txt")
            with self.guard:
                del self.at_work[run.name]
            seconds = time.monotonic() - began
        run.add_to_manifest(minutes=round(run.manifest.get("minutes", 0.0) + seconds / 60, 2))
        done = run.status["state"] == "done"
        unreported = not done and self._explained(run, process.returncode, in_time=in_time)
        status = run.status
        state = "stopped" if self.stopping.is_set() and not done else status["state"]
        return Outcome(run, state, status.get("message", ""), seconds, whole and done, unreported)

    def ask(self) -> None:
        """Ask every process for a checkpoint and to end, and start no more."""
        with self.guard:
            self.stopping.set()
            for process in self.at_work.values():
                process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End every process at once."""
        with self.guard:
            self.stopping.set()
            for process in self.at_work.values():
                _kill(process)

    def _wait_for(self, run: Run, log: IO[str]) -> bool:
        """Until no process is at work on this run; False where the sweep is stopped before."""
        while not self.stopping.is_set():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_free(run.path) and run.status["state"] != "running":  # by hand
                    return True
                fcntl.flock(log, fcntl.LOCK_UN)
            self.stopping.wait(5 * TICK)
        return False

    def command(self, run: Run) -> list[str]:
        resume = [str(run.path / "config.yaml"), "--resume", run.name, "--without", LEFT_OUT]
        folders = ["--runs", str(run.path.parent), "--reports", str(self.reports)]
        return [sys.executable, "-m", "kdlib", "run", *resume, *folders]

    def environment(self) -> dict[str, str]:
        """Ours, with the cores divided among the jobs."""
        threads = {"OMP_NUM_THREADS": str(max(cores() // self.jobs, 1))} if self.jobs > 1 else {}
        return {"PYTHONUNBUFFERED": "1", **threads, **os.environ}

    def _ended(self, process: subprocess.Popen) -> bool:
        """Wait for the end; False where it had to be told, for lack of time."""
        try:
            process.wait(self.timeout_s)
            return True
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
        return False

    def _explained(self, run: Run, code: int, *, in_time: bool) -> bool:
        """Say in the status why a run is not done, where its own process did not; whether that was so."""
        if not in_time:
            limit = f"{self.timeout_s / 60:g}; the sweep, started again, goes on with it"
            run.set_status("failed", f"not done within timeout_minutes: {limit}")
        elif code < 0 or run.status["state"] in ("created", "running"):
            text = (run.path / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
            last = text.splitlines()[-1].strip() if text else "it said nothing"
            run.set_status("died", f"its process ended with status {code}: {last}")
        else:
            return False
        return True


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill(process: subprocess.Popen) -> None:
    """The process and whatever it started: its kernel has a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
