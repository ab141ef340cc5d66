"""All trials of a sweep, some side by side: what is done is not repeated, what failed stops nothing, what
stopped goes on.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from kdlib.errors import RunError
from kdlib.metrics.names import with_interval
from kdlib.reports import index as overview, run as reports
from kdlib.reports.summary import report_link
from kdlib.runs import folder as runs
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run
from kdlib.sweeps import report as page
from kdlib.sweeps.clock import Clock, duration
from kdlib.sweeps.processes import Crew, Outcome
from kdlib.sweeps.results import FILE, WORDS, Sweep
from kdlib.sweeps.trials import Base, Trial, described


class Supply(Protocol):
    """Where trials come from."""

    def next(self) -> Trial | None:
        """The next to run; None where there are no more."""

    def told(self, trial: Trial, value: float | None) -> None:
        """What came of one: the metric; None where it failed."""

    def ahead(self) -> list[str]:
        """The runs still to come."""


class Listed:
    """Trials that are known before."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = deque(trials)

    def next(self) -> Trial | None:
        return self.trials.popleft() if self.trials else None

    def told(self, trial: Trial, value: float | None) -> None:
        """Nothing follows from it."""

    def ahead(self) -> list[str]:
        return [trial.run for trial in self.trials]


class Pool:
    """One start of a sweep."""

    def __init__(
        self, sweep: Sweep, base: Base, crew: Crew, clock: Clock, *, keep_checkpoints: bool = False
    ) -> None:
        self.sweep, self.base, self.crew, self.clock, self.keep_checkpoints = (
            sweep,
            base,
            crew,
            clock,
            keep_checkpoints,
        )
        self.outcomes: list[Outcome] = []

    def run(self, supply: Supply) -> Path:
        """Run what the supply gives, `crew.jobs` at a time, a line for every event; returns the report, which
        follows each.

        Raises:
            RunError: runs failed, or the sweep was stopped; the others' results are there.
        """
        at_work: dict[Future, Trial] = {}
        bar = tqdm(total=len(supply.ahead()), unit="run", disable=None, smoothing=0)
        with _stoppable(self.crew), bar, ThreadPoolExecutor(self.crew.jobs) as threads:
            while True:
                while len(at_work) < self.crew.jobs and (trial := self._next(supply)):
                    at_work[threads.submit(self.crew.work, self._opened(trial))] = trial
                if not at_work:
                    break
                for ended in wait(at_work, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    trial = at_work.pop(ended)
                    value = self._settled(
                        trial, ended.result(), [*supply.ahead(), *(other.run for other in at_work.values())]
                    )
                    supply.told(trial, value)
                    bar.update()
        return self._closed()

    def _next(self, supply: Supply) -> Trial | None:
        return None if self.crew.stopping.is_set() else supply.next()

    def _opened(self, trial: Trial) -> Run:
        """The trial's run, made where it is new; and a line that says that it begins."""
        root, facts = self.sweep.path.parent, self.sweep.facts
        if trial.run not in [each["run"] for each in facts["trials"]]:  # of a search
            facts["trials"].append({"run": trial.run, "parameters": dict(trial.parameters)})
            runs.write_json(self.sweep.path / FILE, facts)
        # killed before it was whole
        if (root / trial.run).exists() and not (root / trial.run / "config.yaml").exists():
            shutil.rmtree(root / trial.run)
        if (root / trial.run).exists():
            run = runs.open_run(root, trial.run, trial.config)
        else:
            run = runs.create(
                root,
                trial.run,
                trial.config,
                config_file=facts["file"],
                smoke=self.base.smoke,
                sweep=self.sweep.name,
                parameters=dict(trial.parameters),
                command=self.base.command(trial.parameters),
            )
        state = run.status["state"]
        verb = {"created": "started", "running": "waits for the process that runs it"}.get(
            state, f"goes on ({state})"
        )
        say(f"{verb:8} {run.name}  {described(trial.parameters)}")
        return run

    def _settled(self, trial: Trial, outcome: Outcome, ahead: Sequence[str]) -> float | None:
        """Tidy up after a trial, say what came of it, and renew the sweep's report; returns its metric."""
        self.outcomes.append(outcome)
        run, value, more = outcome.run, None, ""
        if outcome.state == "done":
            metric = self.sweep.facts["metric"]
            found = read_json(run.path / "comparison_results.json")["models"]["distilled"][metric]
            what, value = f"{WORDS[metric]} {with_interval(found)}", found["value"]
            self._tidy(run)
        else:
            what, more = outcome.message, f"\n         all it said: {os.path.relpath(run.path / 'log.txt')}"
        if outcome.whole:
            self.clock.learn(run.name, outcome.seconds)
        say(
            f"{outcome.state:8} {run.name}  {described(trial.parameters)}: "
            f"{what}{self._left(outcome, ahead)}{more}"
        )
        if outcome.unreported:
            reports.render(run, self.crew.reports)
        page.render(self.sweep, self.crew.reports)
        return value

    def _tidy(self, run: Run) -> None:
        """What remains to do for a run that is done: also where an earlier start of the sweep was killed
        before it could.
        """
        if not self.keep_checkpoints:
            for student in (run, run.baseline):
                shutil.rmtree(student.checkpoints, ignore_errors=True)
        if report_link(run.name, self.crew.reports) is None:
            reports.render(run, self.crew.reports)

    def _left(self, outcome: Outcome, ahead: Sequence[str]) -> str:
        seconds = self.clock.left(ahead, self.crew.jobs)
        took = f"; took {duration(outcome.seconds)}" if outcome.seconds else ""
        return took + (
            f"; {len(ahead)} to go" + (f", about {duration(seconds)}" if seconds else "") if ahead else ""
        )

    def _closed(self) -> Path:
        """The last report, and how the sweep ended."""
        failed = [outcome for outcome in self.outcomes if outcome.state not in ("done", "stopped")]
        names = "".join(
            f"\n  {outcome.run.name}: {(outcome.message or outcome.state).splitlines()[0]}"
            for outcome in failed
        )
        message = f"{len(failed)} of the runs failed:{names}" if failed else ""
        if self.crew.stopping.is_set() or any(outcome.state == "stopped" for outcome in self.outcomes):
            message = f"stopped; the same command goes on where it stopped{f'; {message}' if message else ''}"
        self.sweep.folder.set_status("failed" if message else "done", message)
        for run in (Run(self.sweep.path.parent / trial["run"]) for trial in self.sweep.facts["trials"]):
            if run.status["state"] == "done":
                self._tidy(run)
        made = page.render(self.sweep, self.crew.reports)
        overview.render_index(self.sweep.path.parent, self.crew.reports)
        print(
            f"report: {os.path.relpath(made)}    index: {os.path.relpath(self.crew.reports / 'index.html')}",
            flush=True,
        )
        if message:
            raise RunError(f"sweep {self.sweep.name}: {message}")
        return made


def say(line: str) -> None:
    """A line that no progress bar runs into."""
    tqdm.write(line)
    sys.stdout.flush()


@contextlib.contextmanager
def _stoppable(crew: Crew) -> Iterator[None]:
    """Ctrl-C, or a polite kill, asks all runs for a checkpoint; a second one ends them at once."""

    def ask(number, frame):
        if crew.stopping.is_set():
            crew.end()
        else:
            crew.ask()
            say("stopping: the runs make a checkpoint and end; Ctrl-C again to end them at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
