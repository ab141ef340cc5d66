"""All trials of a sweep, some side by side; what failed stops nothing."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdlib.config.run import Config
from kdlib.errors import RunError, Stopped
from kdlib.metrics.names import with_interval
from kdlib.reports.html import report_link
from kdlib.runs import folder as runs
from kdlib.runs.files import write_json
from kdlib.runs.folder import Run
from kdlib.runs.log import duration, time_left
from kdlib.runs.processes import heard
from kdlib.sweeps.cautions import findings
from kdlib.sweeps.processes import AT_ONCE, Outcome, Work, ask, asked, outcome_of
from kdlib.sweeps.results import FILE, Sweep, figures_of_student, setting_table, trial_table
from kdlib.sweeps.trials import Base, Search, Trial, described


class Listed:
    """Trials that are known before, given as a Search gives its own."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = deque(trials)

    def next(self) -> Trial | None:
        return self.trials.popleft() if self.trials else None

    def told(self, trial: Trial, value: float | None) -> None:
        """Nothing follows."""

    def ahead(self) -> list[str]:
        return [trial.run for trial in self.trials]


@dataclass(frozen=True)
class Cost:
    """What a run takes, forecast."""

    seconds: float | None  # of a student's training, by a few real steps; None where it is not known
    peak: float  # bytes of memory
    at_most: float  # the same with what the forecast may be wrong by
    free: float  # bytes of memory that there are
    weights: float  # bytes of a student on disk


@dataclass(frozen=True)
class Order:
    """One start of a sweep, as it was asked for."""

    name: str
    file: str  # seen from the project's folder
    command: str
    root: Path  # of the runs
    reports: Path
    render_run: Callable[[Run, Path], object]  # the report of a run, into the folder of reports
    render_index: Callable[[Path, Path], object]  # the page over all runs
    jobs: int = 1  # at a time; on a cluster 0: as many as its workers have threads
    on: str | None = None  # a dask cluster's address; None: this machine
    smoke: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)  # in all trials
    forecast: Callable[[Config], Cost] | None = None  # raises a KdlibError for what cannot be run
    anyway: bool = False  # in spite of the doctor's critical findings


class Clock:
    """The time that is left: the runs' forecasts, times what the finished runs took over theirs."""

    def __init__(self, forecast: Mapping[str, float] | None = None) -> None:
        self.forecast = forecast or {}  # seconds by the run's name; other runs count as their mean
        self.mean = sum(self.forecast.values()) / len(self.forecast) if self.forecast else 1.0
        self.ahead = self.took = 0.0  # of the finished runs: seconds as forecast, as measured

    def learn(self, run: str, seconds: float) -> None:
        """A whole run took so long."""
        self.ahead += self.forecast.get(run, self.mean)
        self.took += seconds

    def left(self, runs: Sequence[str], jobs: int) -> float | None:
        """Seconds that these runs will take, where there is a forecast or one is finished.

        Before any is finished as if one ran after another, since side by side they share a machine.
        """
        ahead = sum(self.forecast.get(run, self.mean) for run in runs)
        if not self.ahead:
            return ahead if self.forecast else None
        return time_left(self.took, self.ahead, ahead / jobs)


@dataclass
class Pool:
    """One start of a sweep."""

    sweep: Sweep
    base: Base
    order: Order
    executor: Executor
    jobs: int  # at a time
    work: Work
    clock: Clock
    render: Callable[[Sweep, Path], Path]  # the sweep's report
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, supply: Listed | Search) -> Path:
        """Run what the supply gives, so many at a time; returns the report's path.

        Raises:
            RunError: runs failed, or it was stopped; the report is there.
        """
        with runs.working(self.sweep, failed=self._told):
            self._run_all(supply)
            self._close()
        return self._told(self.sweep)

    def _run_all(self, supply: Listed | Search) -> None:
        """A line for every event."""
        at_work: dict[Future, tuple[Trial, Run]] = {}
        bar = tqdm(total=len(supply.ahead()), unit="run", disable=None, smoothing=0)
        with _stoppable(self.sweep.path), bar:
            while True:
                while len(at_work) < self.jobs and not asked(self.sweep.path) and (trial := supply.next()):
                    run = self._opened(trial)
                    at_work[self.executor.submit(self.work, run)] = trial, run
                if not at_work:
                    break
                for ended in wait(at_work, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    trial, run = at_work.pop(ended)
                    ahead = [*supply.ahead(), *(other.run for other, _ in at_work.values())]
                    supply.told(trial, self._settled(trial, outcome_of(ended, run), ahead))
                    bar.update()

    def _opened(self, trial: Trial) -> Run:
        """The trial's run, made where it is new; and a line that says that it begins."""
        root, facts = self.sweep.path.parent, self.sweep.facts
        if trial.run not in [each["run"] for each in facts["trials"]]:  # of a search
            facts["trials"].append({"run": trial.run, "parameters": dict(trial.parameters)})
            write_json(self.sweep.path / FILE, facts)
        if (root / trial.run / "config.yaml").exists():
            run = runs.open_run(root, trial.run, trial.config)
        else:
            origin = {"config_file": facts["file"], "smoke": self.base.smoke, "sweep": self.sweep.name}
            origin |= {"parameters": trial.parameters, "command": self.base.command(trial.parameters)}
            run = runs.create(root, trial.run, trial.config, **origin)
        if self.order.anyway:
            run.add_to_manifest(anyway=True)
        state = run.status["state"]
        verbs = {"created": "started", "running": "waits for the process that runs it"}
        say(f"{verbs.get(state, f'goes on ({state})'):8} {run.name}  {described(trial.parameters)}")
        return run

    def _settled(self, trial: Trial, outcome: Outcome, ahead: Sequence[str]) -> float | None:
        """Say what came of a trial, and renew the sweep's report; returns its metric."""
        self.outcomes.append(outcome)
        run, value, log = outcome.run, None, ""
        if outcome.state == "done":
            what = "no comparison: 03_compare was not run"
            if found := figures_of_student(run).get(self.sweep.metric):
                what, value = f"{self.sweep.measure.words} {with_interval(found)}", found["value"]
            self._tidy(run)
        else:
            what, log = outcome.message, f"\n         all it said: {os.path.relpath(run.path / 'log.txt')}"
        if outcome.whole:
            self.clock.learn(run.name, outcome.seconds)
        took = f"; took {duration(outcome.seconds)}" if outcome.seconds else ""
        if ahead:
            left = self.clock.left(ahead, self.jobs)
            took += f"; {len(ahead)} to go" + (f", about {duration(left)}" if left else "")
        say(f"{outcome.state:8} {run.name}  {described(trial.parameters)}: {what}{took}{log}")
        if run.status["state"] in ("failed", "died"):  # perhaps before its own report
            self.order.render_run(run, self.order.reports)
        self.render(self.sweep, self.order.reports)
        return value

    def _tidy(self, run: Run) -> None:
        """What remains to do for a run that is done: also what an earlier start was killed before doing."""
        if not self.sweep.facts["settings"]["keep_checkpoints"]:
            runs.clean(run)
        if report_link(run.name, self.order.reports) is None:
            self.order.render_run(run, self.order.reports)

    def _close(self) -> None:
        """Tidy up; raise a RunError where runs failed, and Stopped where the sweep was asked to stop."""
        for trial in self.sweep.facts["trials"]:
            run = self.sweep.run(trial["run"])
            if run.status["state"] == "done":
                self._tidy(run)
        failed = [each for each in self.outcomes if each.state not in ("done", "stopped")]
        lines = [f"  {each.run.name}: {(each.message or each.state).splitlines()[0]}" for each in failed]
        message = "\n".join([f"{len(failed)} of the runs failed:", *lines]) if failed else ""
        if asked(self.sweep.path) or any(each.state == "stopped" for each in self.outcomes):
            again = "stopped; the same command goes on where it stopped"
            raise Stopped(f"sweep {self.sweep.name}: {again}{f'; {message}' if message else ''}")
        if message:
            raise RunError(f"sweep {self.sweep.name}: {message}")

    def _told(self, sweep: Sweep) -> Path:
        """The last report, and what was found, printed; returns the report's path."""
        reports = self.order.reports
        page = self.render(sweep, reports)
        self.order.render_index(sweep.path.parent, reports)
        index = os.path.relpath(reports / "index.html")
        trials = trial_table(sweep)
        said = findings(sweep, trials, setting_table(sweep, trials))
        print("\n".join([*said, f"report: {os.path.relpath(page)}    index: {index}"]), flush=True)
        return page


def say(line: str) -> None:
    """A line that no progress bar runs into."""
    tqdm.write(line)
    sys.stdout.flush()


@contextlib.contextmanager
def _stoppable(sweep: Path) -> Iterator[None]:
    """Ctrl-C, or a polite kill, asks all runs for a checkpoint; a second Ctrl-C ends them at once."""

    def stop() -> None:
        ask(sweep)
        say("stopping: the runs make a checkpoint and end; Ctrl-C again to end them at once")

    with heard(stop, partial(ask, sweep, AT_ONCE)):
        yield
