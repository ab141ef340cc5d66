"""How a training stands, by its folder's files."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from kdlib.config.task_rules import rules_of
from kdlib.metrics.names import MEASURES
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, duration, plan_table, tail_of, terms_in, time_left
from kdlib.runs.verdict import best_by, moving_settings

QUIET_S = 60.0  # without a line, after which a training that nobody keeps a status of may have stopped
PAUSE, PAUSE_S = 10.0, 60.0  # more usual times than that, and more seconds, from line to line: it stood still
RECENT = 50  # lines that a forecast goes by
FINAL = ("done", "stopped", "failed", "died")
HELD_OUT = {  # told of the last evaluation, by what is predicted
    "token": ("kl_to_teacher", "perplexity", "choice_accuracy", "agreement"),
    "row": ("accuracy", "log_loss", "kl_to_teacher"),
}


@dataclass(frozen=True)
class Progress:
    """One student's training so far, or all of it."""

    name: str  # of the run, and of the student where it is not the distilled one
    state: str  # created, running, quiet (no news for a while), trained, done, stopped, failed or died
    tail: Tail
    plan: pd.DataFrame  # learning rate, weights and temperatures; empty where there is no plan.json
    phases: tuple[tuple[float, str], ...]  # of the curriculum: fraction of training at its end, its weights
    best_by: str  # the measure that chooses the best model
    message: str  # why it stopped or failed
    quiet_s: float  # since the last line
    of: str  # what is predicted: a token or a row
    moving: Mapping[str, tuple[str, ...]]  # term → the settings that change its size while it trains

    @property
    def step(self) -> int:
        """The last optimizer step that was logged."""
        return int(self.tail.train["step"].iloc[-1]) if len(self.tail.train) else 0

    @property
    def steps(self) -> int:
        """Of the whole training, where that is planned; otherwise those made."""
        return max(int(self.plan["step"].iloc[-1]) if len(self.plan) else 0, self.step, 1)

    @property
    def terms(self) -> list[str]:
        """Those logged or planned, in the order of the config."""
        return list(dict.fromkeys([*terms_in(self.plan), *terms_in(self.tail.train)]))

    @property
    def seconds_left(self) -> float | None:
        """By the pace of the last lines, evaluations and checkpoints included, and pauses not."""
        recent = self.tail.train.iloc[-RECENT:]
        if self.state not in ("running", "quiet") or len(recent) < 2:
            return None
        took = seconds_taken(recent, self.tail.evaluation)
        made = recent["step"].iloc[-1] - recent["step"].iloc[0]
        return None if took is None else time_left(took, made, self.steps - self.step)

    def measured(self, measure: str) -> tuple[float, int, float] | None:
        """(best value, its step, last value) of a measure on held-out text; None if it was not evaluated."""
        best = best_by(self.tail.evaluation, measure)
        return best and (best.value, best.step, float(self.tail.evaluation[measure].iloc[-1]))


def progress(run: Run, folder: StudentFolder | None = None, tail: Tail | None = None) -> Progress:
    """How a run's distilled student stands, or that of another folder: the baseline; `tail` is its log."""
    folder, config = folder or run, run.config
    state, quiet_s = _state(run, folder)
    is_own = folder.path == run.path
    phases = config.loss.curriculum if is_own else None
    return Progress(
        name=run.name if is_own else f"{run.name}, {folder.path.name}",
        state=state,
        tail=tail or tail_of(folder),
        plan=plan_table(folder),
        phases=tuple((phase.until, _words(phase.weights)) for phase in phases or []),
        best_by=config.training["metric_for_best_model"].removeprefix("eval_"),
        message=run.status.get("message", "") if state in ("stopped", "failed", "died") else "",
        quiet_s=quiet_s,
        of=rules_of(config).unit,
        moving=moving_settings(config, is_baseline=not is_own),
    )


def headline(progress: Progress) -> str:
    """Which run, and how it stands."""
    going = "training" if len(progress.tail.train) else "nothing logged yet"
    words = {"quiet": f"no news for {duration(progress.quiet_s)}", "created": going, "running": going}
    return f"{progress.name}  ·  {words.get(progress.state, progress.state)}"


def where_line(progress: Progress) -> str:
    """The step of all steps, and the time that is left."""
    if not len(progress.tail.train):
        drawn = "Loss terms, weights, temperature, learning rate and gradient norms"
        return f"{drawn} are drawn here as soon as a step is logged."
    line, left = f"step {progress.step:,}", progress.seconds_left
    if progress.steps > progress.step:
        line += f" of {progress.steps:,}"
    return line if left is None else f"{line}  ·  {duration(left)} left"


def held_out_line(progress: Progress) -> str:
    """The last figure of each measure on held-out text, and the best of the one that chooses the model."""
    parts = []
    for measure in dict.fromkeys([progress.best_by, *HELD_OUT[progress.of]]):
        if figures := progress.measured(measure):
            best, step, last = figures
            ever = "" if parts else f" (best {best:.3g} at step {step:,})"
            parts.append(f"{MEASURES[measure].name} {last:.3g}{ever}")
    return "held-out: " + "  ·  ".join(parts) if parts else "no evaluation yet"


def seconds_taken(train: pd.DataFrame, evaluation: pd.DataFrame | None = None) -> float | None:
    """How long a training took from the first to the last of its lines; None where they do not tell.

    A pause between two sittings does not count: where a line comes far later after the one before it than
    lines of its kind usually do, the usual time stands in.
    """
    if "time" not in train or len(train) < 2:
        return None
    timed = [train] if evaluation is None or "time" not in evaluation else [train, evaluation]
    kinds = [_seconds(table["time"]) for table in timed]
    if not len(kinds[0]):
        return None
    times = np.concatenate(kinds)
    is_own = np.repeat([True, False], [len(kinds[0]), len(times) - len(kinds[0])])
    is_within = (times >= kinds[0].min()) & (times <= kinds[0].max())
    order = np.argsort(times[is_within], kind="stable")
    took, is_own = np.diff(times[is_within][order]), is_own[is_within][order][1:]
    for kind in (is_own, ~is_own):
        if kind.any():
            usual = np.quantile(took[kind], 0.5, method="lower")
            took[kind & (took > max(PAUSE * usual, PAUSE_S))] = usual
    return float(took.sum())


def _state(run: Run, folder: StudentFolder) -> tuple[str, float]:
    """The state, and the seconds since a log.  A training by hand keeps no status: its files tell."""
    status, is_begun = run.status, folder.metrics.exists()
    logged = folder.metrics.stat().st_mtime if is_begun else 0.0
    quiet_s = time.time() - logged if is_begun else 0.0
    state = status["state"]
    if folder.is_trained:
        return state if state == "done" else "trained", quiet_s
    goes_on = is_begun and quiet_s < QUIET_S and math.floor(logged * 1000) / 1000 > _since(status)
    if state == "running" or goes_on:  # after a failure too: by hand
        return "running", quiet_s
    return state if state in FINAL else "quiet" if is_begun else "created", quiet_s


def _since(status: Mapping[str, Any]) -> float:
    """When this state began, in seconds; 0 where that is not told."""
    try:
        return datetime.fromisoformat(str(status.get("since"))).timestamp()
    except ValueError:
        return 0.0


def _words(weights: Mapping[str, object]) -> str:
    return ", ".join(
        f"{term} {weight:g}" if isinstance(weight, (int, float)) else f"{term} {next(iter(weight))}"
        for term, weight in weights.items()
    )


def _seconds(times: pd.Series) -> np.ndarray:
    text = pa.array(times, pa.string()).drop_null()
    try:
        return text.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() / 1e6
    except pa.ArrowInvalid:  # some are no times
        some = pd.to_datetime(text.to_pandas(), utc=True, format="ISO8601", errors="coerce").dropna()
        return some.dt.as_unit("us").astype("int64").to_numpy() / 1e6
