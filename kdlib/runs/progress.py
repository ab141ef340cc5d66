"""How a training stands, by its folder's files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from kdlib.config.reading import differences
from kdlib.config.task_rules import rules_of
from kdlib.metrics.names import MEASURES
from kdlib.runs import states
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, duration, plan_table, tail_of, terms_in, time_left
from kdlib.runs.states import ILL
from kdlib.runs.verdict import best_by, moving_settings

PAUSE, PAUSE_S = 10.0, 60.0  # more usual times than that, and more seconds, from line to line: it stood still
RECENT = 50  # lines that a forecast goes by
HELD_OUT = {  # told of the last evaluation, by what is predicted
    "token": ("kl_to_teacher", "perplexity", "choice_accuracy", "agreement"),
    "row": ("accuracy", "log_loss", "kl_to_teacher"),
}


@dataclass(frozen=True)
class Progress:
    """One student's training so far, or all of it."""

    name: str  # of the run, and of the student where it is not the distilled one
    state: str  # one of `states.STATES`
    tail: Tail
    plan: pd.DataFrame  # learning rate, weights and temperatures; empty where there is no plan.json
    phases: tuple[tuple[float, str], ...]  # of the curriculum: fraction of training at its end, its weights
    best_by: str  # the measure that chooses the best model
    message: str  # why it stopped or failed
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
        if self.state != "running" or len(recent) < 2:
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
    folder, config, status = folder or run, run.config, run.status
    facts = {"is_begun": folder.metrics.exists(), "is_trained": folder.is_trained}
    state = states.of_student(status["state"], **facts)
    is_own = folder.path == run.path
    phases = config.loss.curriculum if is_own else None
    return Progress(
        name=run.name if is_own else f"{run.name}, {folder.path.name}",
        state=state,
        tail=tail or tail_of(folder),
        plan=plan_table(folder),
        phases=tuple((phase.until, _words(phase.weights)) for phase in phases or []),
        best_by=config.training["metric_for_best_model"].removeprefix("eval_"),
        message=status.get("message", "") if state in ILL else "",
        of=rules_of(config).unit,
        moving=moving_settings(config, is_baseline=not is_own),
    )


def headline(progress: Progress) -> str:
    """Which run, and how it stands."""
    going = "training" if len(progress.tail.train) else "nothing logged yet"
    words = going if progress.state in ("created", "running") else progress.state
    return f"{progress.name}  ·  {words}"


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


def edits(run: Run) -> list[str]:
    """`training.learning_rate: 0.001 -> 0.01`: what somebody changed in a run's config.yaml by hand."""
    made = run.manifest.get("settings")
    return [] if made is None else differences(made, json.loads(json.dumps(run.settings, default=str)))


def say_where_edited(run: Run) -> None:
    """Print what `edits` finds."""
    if lines := edits(run):
        print(f"config.yaml of {run.name} was changed by hand since it was made:", *lines, sep="\n  ")


def say_where_rows_changed(run: Run, fingerprint: str) -> None:
    """Print it where a training that has begun saw other rows than those of this fingerprint."""
    before = run.manifest.get("data", {}).get("fingerprint")
    if run.metrics.exists() and before not in (None, fingerprint):
        why = "the source has changed, or kdlib's way of choosing them"
        print(f"other rows than {run.name} began with ({why}): figures before and after do not compare")


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
