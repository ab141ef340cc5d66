"""The scorecard: did a training go as it should?  Each line has its figure, the threshold, pass or fail.

To add one: a function that returns a `Line`, and its call in `scorecard`.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import linregress

from kdlib.errors import ConfigError
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
    """The distilled student's scorecard, or of another folder: the baseline's.  [] before anything is logged.

    `tail` is the folder's, where it is at hand.
    """
    folder = folder or run
    tail = tail or Tail(folder)
    train, evaluation = tail.train, tail.evaluation
    if not len(train):
        return []
    try:
        training = run.config.training
    except ConfigError as error:  # of another version
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        return [Line("the settings can be read", faults, "a config of this version", None)]
    return [
        _learning(train),
        _evaluation(evaluation, training["metric_for_best_model"].removeprefix("eval_")),
        _gap(train, evaluation),
        _learning_rate(train, plan_table(folder), training.get("learning_rate", 5e-5)),
        _finite(folder, tail),
        _balance(train),
        _memory(train, run.manifest.get("machine", {}).get("memory_gib")),
    ]


def scorecard_table(lines: list[Line]) -> pd.DataFrame:
    """check → found, needed, result."""
    columns = ["check", "found", "needed", "result"]
    rows = [[getattr(line, column) for column in columns] for line in lines]
    return pd.DataFrame(rows, columns=columns).set_index("check")


def _learning(train: pd.DataFrame) -> Line:
    """By the change from the first step to the last along a straight line through the logarithms."""
    term = "kd" if "kd" in terms_in(train) else terms_in(train)[0]
    check, needed = f"the model learns ({term})", "a fall, with its interval"
    values = train.set_index("step")[f"{term}_loss"]
    values = values[values > 0]
    if len(values) < 4:
        return Line(check, f"{len(values)} logged values; a trend needs 4", needed, None)
    fit, length = linregress(values.index, np.log(values)), values.index[-1] - values.index[0]
    slopes = (fit.slope + side * 1.96 * fit.stderr for side in (0, -1, 1))
    value, low, high = (math.expm1(min(slope * length, 50.0)) for slope in slopes)
    return Line(check, f"{value:+.0%} [{low:+.0%}, {high:+.0%}] over the steps", needed, high < 0)


def _evaluation(evaluation: pd.DataFrame, metric: str) -> Line:
    check, needed = f"held-out {metric.replace('_', ' ')} moves", "better than at the first evaluation"
    values = evaluation[metric].dropna() if metric in evaluation else pd.Series(dtype=float)
    if len(values) < 2:
        found = f"{len(values)} evaluation{'s' * (len(values) != 1)}; a change needs 2"
        return Line(check, found, needed, None)
    first, later, higher = values.iloc[0], values.iloc[1:], MEASURES[metric].higher_is_better
    best = later.max() if higher else later.min()
    is_better = bool(best > first if higher else best < first)
    return Line(check, f"{first:.4g} → {best:.4g} at best", needed, is_better)


def _gap(train: pd.DataFrame, evaluation: pd.DataFrame) -> Line:
    check = "training and held-out loss are near, under the same weights"
    needed = f"a ratio from {1 / GAP:g} to {GAP:g}"
    if not len(evaluation):
        return Line(check, "no evaluation", needed, None)
    last = evaluation.iloc[-1]
    near = train[train["step"] <= last["step"]]
    near = near[near["step"] >= (1 - LATE) * near["step"].max()]
    terms = [term for term in terms_in(evaluation) if f"{term}_loss" in near and last[f"{term}_weight"] > 0]
    if not len(near) or not terms:
        return Line(check, "no training line before the last evaluation", needed, None)
    held_out = sum(last[f"{term}_weight"] * last[f"{term}_loss"] for term in terms)
    seen = sum(last[f"{term}_weight"] * near[f"{term}_loss"].mean() for term in terms)
    ratio = held_out / seen if seen else math.inf
    return Line(check, f"{held_out:.3f} ÷ {seen:.3f} = {ratio:.2f}", needed, bool(1 / GAP < ratio < GAP))


def _learning_rate(train: pd.DataFrame, plan: pd.DataFrame, configured: float) -> Line:
    check = "the learning rate is as planned"
    needed = f"a peak of {PEAK:.0%} of {configured:.1e} or more, within {OFF_PLAN:.1%} of the plan"
    if "learning_rate" not in plan:
        return Line(check, "no plan: the schedule depends on how the training goes", needed, None)
    peak, used = plan["learning_rate"].max(), train["learning_rate"]
    planned = np.interp(train["step"], plan["step"], plan["learning_rate"])
    off = np.abs(used - planned).max() / peak if peak > 0 else 0.0
    found = f"planned peak {peak:.1e}, used {used.max():.1e} so far; "
    found += f"off the plan by {off:.1%} of the peak at most"
    return Line(check, found, needed, bool(peak >= PEAK * configured and off <= OFF_PLAN))


def _finite(folder: StudentFolder, tail: Tail) -> Line:
    broken, report = len(tail.broken), (folder.path / "nan_report").exists()
    more = "see nan_report/" if report else "no step was stopped for one"
    found = f"{broken} of {tail.figures} logged figures are not; {more}"
    return Line("every figure is finite", found, "0", broken == 0 and not report)


def _balance(train: pd.DataFrame) -> Line:
    needed = f"the largest weighted share less than {BALANCE:g} × the smallest"
    shares = {term: (train[f"{term}_weight"] * train[f"{term}_loss"]).mean() for term in terms_in(train)}
    shares = {term: share for term, share in shares.items() if share > 0}
    found = ", ".join(f"{term} {share:.3g}" for term, share in shares.items()) or "no term has a share"
    is_balanced = bool(shares and max(shares.values()) < BALANCE * min(shares.values()))
    return Line("the terms are balanced", found, needed, is_balanced)


def _memory(train: pd.DataFrame, device_gib: float | None) -> Line:
    check, needed = "memory suffices", f"less than {MEMORY:.0%} of the device's"
    if device_gib is None or "memory_gib" not in train:
        found = "the device's memory is not known: the run was not set up by 00_setup"
        return Line(check, found, needed, None)
    peak = train["memory_gib"].max()
    return Line(check, f"{peak:.2f} of {device_gib:.1f} GiB", needed, bool(peak < MEMORY * device_gib))
