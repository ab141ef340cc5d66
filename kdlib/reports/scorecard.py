"""The scorecard: did a training go as a training should?  Each line has its figure, the threshold, and pass
or fail.

Works from a run's files alone and imports no torch.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.metrics.names import MEASURES
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, plan_table, terms_in

GAP = 2.0  # held-out loss over training loss, and the other way round
BALANCE = 100.0  # the largest weighted share over the smallest
MEMORY = 0.9  # of the device's
PEAK = 0.5  # of training.learning_rate, that the learning rate should reach
OFF_PLAN = 1e-3  # of the planned peak
LATE = 0.2  # of the steps: "at the end"


@dataclass(frozen=True)
class Line:
    """One question with its answer; `passed` is None where it could not be measured, and `found` says why."""

    check: str
    found: str
    needed: str
    passed: bool | None

    @property
    def result(self) -> str:
        return {True: "pass", False: "fail", None: "not measured"}[self.passed]


def scorecard(run: Run, folder: StudentFolder | None = None, tail: Tail | None = None) -> list[Line]:
    """The distilled student's scorecard, or that of another folder of the run: the baseline's.  [] before
    anything is logged.

    Args:
        tail: the folder's, where it is at hand and need not be read again.
    """
    folder = folder or run
    tail, plan = tail or Tail(folder), plan_table(folder)
    train, evaluation = tail.train, tail.evaluation
    if not len(train):
        return []
    training = run.config.training
    return [
        _learning(train),
        _evaluation(evaluation, training["metric_for_best_model"].removeprefix("eval_")),
        _gap(train, evaluation),
        _learning_rate(train, plan, training.get("learning_rate", 5e-5)),
        _finite(folder, tail),
        _balance(train),
        _memory(train, run.manifest.get("machine", {}).get("memory_gib")),
    ]


def scorecard_table(lines: list[Line]) -> pd.DataFrame:
    """check → found, needed, result."""
    rows = [
        {"check": line.check, "found": line.found, "needed": line.needed, "result": line.result}
        for line in lines
    ]
    return pd.DataFrame(rows, columns=["check", "found", "needed", "result"]).set_index("check")


def _learning(train: pd.DataFrame) -> Line:
    term = "kd" if "kd" in terms_in(train) else terms_in(train)[0]
    check, needed = f"the model learns ({term})", "a fall, with its interval"
    values = train[["step", f"{term}_loss"]].dropna()
    values = values[values[f"{term}_loss"] > 0]
    if len(values) < 4:
        return Line(check, f"{len(values)} logged values; a trend needs 4", needed, None)
    changes = _trend(values["step"].to_numpy(), np.log(values[f"{term}_loss"].to_numpy()))
    value, low, high = (f"{change:+.0%}" for change in changes)
    return Line(check, f"{value} [{low}, {high}] over the steps", needed, bool(changes[2] < 0))


def _trend(steps: np.ndarray, logs: np.ndarray) -> tuple[float, float, float]:
    """The relative change from the first step to the last along a straight line through the logs, with
    its 95 % interval.
    """
    x = steps - steps.mean()
    slope = (x * logs).sum() / (x**2).sum()
    residuals = logs - logs.mean() - slope * x
    error = math.sqrt((residuals**2).sum() / (len(x) - 2) / (x**2).sum())
    length = steps[-1] - steps[0]
    return tuple(math.expm1(min((slope + side * 1.96 * error) * length, 50.0)) for side in (0, -1, 1))


def _evaluation(evaluation: pd.DataFrame, metric: str) -> Line:
    check, needed = f"held-out {metric.replace('_', ' ')} moves", "better than at the first evaluation"
    values = evaluation[metric].dropna() if metric in evaluation else pd.Series(dtype=float)
    if len(values) < 2:
        return Line(
            check, f"{len(values)} evaluation{'s' * (len(values) != 1)}; a change needs 2", needed, None
        )
    first, sign = values.iloc[0], 1 if MEASURES[metric].higher_is_better else -1
    best = sign * (sign * values.iloc[1:]).max()
    return Line(check, f"{first:.4g} → {best:.4g} at best", needed, bool(sign * (best - first) > 0))


def _gap(train: pd.DataFrame, evaluation: pd.DataFrame) -> Line:
    check, needed = (
        "training and held-out loss are near, under the same weights",
        f"a ratio from {1 / GAP:g} to {GAP:g}",
    )
    if not len(evaluation):
        return Line(check, "no evaluation", needed, None)
    last = evaluation.iloc[-1]
    near = _late(train[train["step"] <= last["step"]])
    weights = {
        term: last[f"{term}_weight"]
        for term in terms_in(evaluation)
        if f"{term}_loss" in near and last[f"{term}_weight"] > 0
    }
    if not len(near) or not weights:
        return Line(check, "no training line before the last evaluation", needed, None)
    held_out = sum(weight * last[f"{term}_loss"] for term, weight in weights.items())
    seen = sum(weight * near[f"{term}_loss"].mean() for term, weight in weights.items())
    ratio = held_out / seen if seen else math.inf
    return Line(check, f"{held_out:.3f} ÷ {seen:.3f} = {ratio:.2f}", needed, bool(1 / GAP < ratio < GAP))


def _learning_rate(train: pd.DataFrame, plan: pd.DataFrame, configured: float) -> Line:
    check = "the learning rate is as planned"
    needed = f"a peak of {PEAK:.0%} of {configured:.1e} or more, within {OFF_PLAN:.1%} of the plan"
    if "learning_rate" not in plan:
        return Line(check, "no plan: the schedule depends on the course of the training", needed, None)
    peak = plan["learning_rate"].max()
    planned = np.interp(train["step"], plan["step"], plan["learning_rate"])
    off = np.abs(train["learning_rate"] - planned).max() / peak if peak > 0 else 0.0
    found = (
        f"planned peak {peak:.1e}, used {train['learning_rate'].max():.1e} so far; off the plan by "
        f"{off:.1%} of the peak at most"
    )
    return Line(check, found, needed, bool(peak >= PEAK * configured and off <= OFF_PLAN))


def _finite(folder: StudentFolder, tail: Tail) -> Line:
    broken = len(tail.broken)
    report = (folder.path / "nan_report").exists()
    found = (
        f"{broken} of {tail.figures} logged figures are not; "
        f"{'see nan_report/' if report else 'no step was stopped for one'}"
    )
    return Line("every figure is finite", found, "0", broken == 0 and not report)


def _balance(train: pd.DataFrame) -> Line:
    check, needed = (
        "the terms are balanced",
        f"the largest weighted share less than {BALANCE:g} × the smallest",
    )
    shares = {term: (train[f"{term}_weight"] * train[f"{term}_loss"]).mean() for term in terms_in(train)}
    shares = {term: share for term, share in shares.items() if share > 0}
    found = ", ".join(f"{term} {share:.3g}" for term, share in shares.items())
    return Line(
        check,
        found or "no term has a share",
        needed,
        bool(shares and max(shares.values()) < BALANCE * min(shares.values())),
    )


def _memory(train: pd.DataFrame, device_gib: float | None) -> Line:
    check, needed = "memory suffices", f"less than {MEMORY:.0%} of the device's"
    if device_gib is None or "memory_gib" not in train:
        return Line(
            check, "the device's memory is not known: the run was not set up by 00_setup", needed, None
        )
    peak = train["memory_gib"].max()
    return Line(check, f"{peak:.2f} of {device_gib:.1f} GiB", needed, bool(peak < MEMORY * device_gib))


def _late(train: pd.DataFrame) -> pd.DataFrame:
    return train[train["step"] >= (1 - LATE) * train["step"].max()]
