"""Where trials of a sweep run, here or on a cluster: each a `kd run` in its own process, held to its time.

Any `concurrent.futures.Executor` will do: threads here, dask's client elsewhere.  What the sweep and its
workers say to each other are files, in runs/, which all machines see.
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from kdlib.errors import ConfigError, RunError
from kdlib.runs.child_processes import threads_of
from kdlib.runs.files import without_keys_in, write_text
from kdlib.runs.folder import Run, project_root
from kdlib.runs.processes import is_free

LEFT_OUT = ("01_dry_run", "04_student_aware")  # what is seen of one run, by `kd run … --resume`
GRACE = 90.0  # s to make a checkpoint in, after which a process is killed
TICK = 0.2  # s
CONNECT_S = 10.0  # in which a cluster must answer
STOP = "STOP"  # a file in the sweep's folder
AT_ONCE = "at once"  # what it says where nothing is waited for


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    run: Run
    state: str  # done, or what the run's status says, or stopped: by the one who stopped the sweep
    message: str = ""
    seconds: float = 0.0
    whole: bool = False  # these seconds are a whole run's


@dataclass(frozen=True)
class Work:
    """Runs a trial to its end, from where it stands, wherever it is called.

    A trial's log.txt is locked by its process and whatever that starts until the last of them is gone: nobody
    starts a second process on the run, even after the sweep, or the worker that started it, was killed.
    """

    sweep: Path  # its folder
    reports: Path
    jobs: int | None = 1  # that share this machine; None: as many as the dask worker here has threads
    timeout_s: float | None = None
    project: Path = field(default_factory=project_root)  # in which they work: that of the sweep

    def __call__(self, run: Run) -> Outcome:
        """Waits for a process that is at work on the run already."""
        with (run.path / "log.txt").open("a", encoding="utf-8") as log:
            if not self._wait_for(run, log):
                return Outcome(run, "stopped")
            if run.status["state"] == "done":
                without_keys_in(run.path / "log.txt")
                return Outcome(run, "done")
            whole, began = not run.manifest.get("stages"), time.monotonic()
            process = subprocess.Popen(
                self.command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.project,
                env=self.environment(),
                start_new_session=True,
            )
            in_time = self._ended(process)
            without_keys_in(run.path / "log.txt")
            seconds = time.monotonic() - began
        run.add_to_manifest(minutes=round(run.manifest.get("minutes", 0.0) + seconds / 60, 2))
        if run.status["state"] == "done":
            return Outcome(run, "done", "", seconds, whole)
        self._explain(run, process.returncode, in_time=in_time)
        status = run.status
        return Outcome(run, "stopped" if asked(self.sweep) else status["state"], status["message"], seconds)

    def _wait_for(self, run: Run, log: IO[str]) -> bool:
        """Until no process is at work on this run; False where the sweep is stopped before."""
        while not asked(self.sweep):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_free(run.path):  # of those who work by hand too
                    return True
                fcntl.flock(log, fcntl.LOCK_UN)
            time.sleep(5 * TICK)
        return False

    def command(self, run: Run) -> list[str]:
        resume = [str(run.path / "config.yaml"), "--resume", run.name]
        resume += [word for name in LEFT_OUT for word in ("--without", name)]
        folders = ["--runs", str(run.path.parent), "--reports", str(self.reports)]
        return [sys.executable, "-m", "kdlib", "run", *resume, *folders]

    def environment(self) -> dict[str, str]:
        """Ours, with the cores divided among the jobs; a dask worker's without what dask itself set in it."""
        jobs, ours = self.jobs, dict(os.environ)
        if jobs is None:
            import dask
            from distributed import get_worker

            preset = dask.config.get("distributed.nanny.pre-spawn-environ")  # a thread each, for numpy's sake
            jobs = get_worker().state.nthreads
            ours = {name: value for name, value in ours.items() if str(preset.get(name)) != value}
        return {"PYTHONUNBUFFERED": "1", **threads_of(jobs), **ours}

    def _ended(self, process: subprocess.Popen) -> bool:
        """Wait for the end, and pass on who asks for it; False where it had to be told, for lack of time."""
        limit, told, late = time.monotonic() + (self.timeout_s or float("inf")), False, False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
                return not late
            stop, now = asked(self.sweep), time.monotonic()
            if stop == AT_ONCE or (late and now > limit + GRACE):
                with contextlib.suppress(psutil.NoSuchProcess):  # its kernel has a session of its own
                    whole = psutil.Process(process.pid)
                    for each in [*whole.children(recursive=True), whole]:
                        each.kill()
            elif (stop or now > limit) and not told:
                process.send_signal(signal.SIGINT)
                told, late = True, not stop

    def _explain(self, run: Run, code: int, *, in_time: bool) -> None:
        """Say in the status why a run is not done, where its own process did not."""
        state = run.noted["state"]
        if not in_time and state in ("created", "stopped", "died"):
            limit = f"{self.timeout_s / 60:g}; the sweep, started again, goes on with it"
            run.set_status("failed", f"not done within timeout_minutes: {limit}")
        elif state in ("created", "died"):
            text = (run.path / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
            last = text.splitlines()[-1].strip() if text else "it said nothing"
            run.set_status("died", f"its process ended with status {code}: {last}")


def asked(sweep: Path) -> str:
    """What the file STOP in a sweep's folder asks for: nothing (""), a checkpoint and the end, or AT_ONCE."""
    try:
        return (sweep / STOP).read_text().strip() or "a checkpoint"
    except FileNotFoundError:
        return ""


def ask(sweep: Path, what: str = "a checkpoint") -> None:
    """Ask all trials of a sweep, on whatever machine, to end, and start no more."""
    write_text(sweep / STOP, what)


def outcome_of(ended: Future, run: Run) -> Outcome:
    """What a trial came to; that it died, where who was to run it failed.

    Raises:
        RunError: the cluster is gone.
    """
    if ended.cancelled():
        do = "what its workers had begun may go on; start it again, and the same command goes on"
        raise RunError(f"run {run.name}: the cluster is gone: {do}")
    if error := ended.exception():
        return Outcome(run, "died", f"{type(error).__name__}: {error}")
    return ended.result()


@contextlib.contextmanager
def executor(jobs: int, on: str | None, root: Path) -> Iterator[tuple[Executor, int]]:
    """What runs trials, and how many at a time: threads here, or the dask cluster at this address.

    Args:
        jobs: at a time; of a cluster 0: as many as its workers have threads.
        root: the folder of runs, which every worker must see.

    Raises:
        ConfigError: dask is not installed.
        RunError: the cluster is out of reach, or its workers cannot do this work.
    """
    if on is None:
        with ThreadPoolExecutor(jobs) as threads:
            yield threads, jobs
        return
    try:
        from distributed import Client
    except ImportError:
        do = 'run: pip install "kdlib[dask]"'
        raise ConfigError(f"--on: a sweep on a cluster needs dask.distributed; {do}") from None
    for name in ("distributed", "distributed.client"):  # their tracebacks; what is lost is said below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(on, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        first, do = str(error).partition("\n")[0], "start it with `dask scheduler`, or give another address"
        raise RunError(f"--on {on}: no dask scheduler answers ({first}); {do}") from None
    with client:
        threads = sum(client.nthreads().values())
        if not (threads or jobs):
            do = f"start some, as `dask worker {on} --nthreads 1`, or say --jobs where they come later"
            raise RunError(f"--on {on}: the cluster has no workers; {do}")
        _check_workers(client, on, root)
        with client.get_executor(pure=False) as cluster:
            yield cluster, jobs or threads


def _check_workers(client: Any, on: str, root: Path) -> None:
    """Raises a RunError where a worker does not see the runs or the project, or has no kdlib."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=root, prefix=".seen") as file:
        answers = client.run(_unseen, file.name, str(project_root()), on_error="return")
    for worker, answer in answers.items():
        if answer:
            seen = f"it does not see {answer[0]}" if isinstance(answer, list) else None
            found = seen or f"{type(answer).__name__}: {answer}"
            do = "workers need this version of kdlib, and the project and the runs at the same paths"
            raise RunError(f"--on {on}: worker {worker}: {found}; {do}")


def _unseen(*paths: str) -> list[str]:
    return [path for path in paths if not Path(path).exists()]
