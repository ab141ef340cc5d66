"""The scorecard: did a training go as it should?  Each line has its figure, the threshold, pass or fail.

To add one: a function that returns a `Line`, and its call in `scorecard`.  A line that fails says what to do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kdlib.errors import KdlibError
from kdlib.reports.learning import Case, Line, learning_lines
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, plan_table, tail_of, terms_in
from kdlib.runs.verdict import critical_findings

GAP = 2.0  # held-out loss over training loss, and the other way round
BALANCE = 100.0  # the largest weighted share over the smallest
MEMORY = 0.9  # of the device's
PEAK = 0.5  # of training.learning_rate, that the learning rate should reach
OFF_PLAN = 1e-3  # of the planned peak
LATE = 0.2  # of the steps: "at the end"
WHOLE = 0.995  # of an epoch: rounding
OTHER_EXPERTS = "; in training the teacher's experts are asked as teacher.experts says, here as it was made"
SHOWN = 3  # critical findings in a line


def scorecard(
    run: Run,
    folder: StudentFolder | None = None,
    tail: Tail | None = None,
    results: Mapping[str, Any] | None = None,
) -> list[Line]:
    """The distilled student's scorecard, or of another folder: the baseline's.  [] before anything is logged.

    `tail` is the folder's and `results` the run's comparison, where they are at hand.
    """
    folder = folder or run
    tail = tail or tail_of(folder)
    train, evaluation = tail.train, tail.evaluation
    if not len(train):
        return []
    try:
        training = run.config.training
    except KdlibError as error:  # of another version
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        return [Line("the settings can be read", faults, "a config of this version", None)]
    if folder.path != run.path:
        results = None
    elif results is None:
        results = run.comparison
    case = Case(run, folder, train, evaluation, results)
    return [
        *_doctor(case),
        *learning_lines(case),
        _epoch(case),
        _gap(train, evaluation, asks_alike=not case.is_own or _asks_as_made(case)),
        _learning_rate(train, plan_table(folder), training.get("learning_rate", 5e-5)),
        _finite(folder, tail),
        _balance(train),
        _memory(train, run.manifest.get("machine", {}).get("memory_gib")),
    ]


def counted(lines: Sequence[Line]) -> str:
    """`8 of 11 pass, 2 fail, 1 not measured`."""
    said = [f"{sum(line.passed is True for line in lines)} of {len(lines)} pass"]
    for result in ("fail", "not measured"):
        if count := sum(line.result == result for line in lines):
            said.append(f"{count} {result}" + "s" * (result == "fail" and count == 1))
    return ", ".join(said)


def scorecard_table(lines: list[Line]) -> pd.DataFrame:
    """check → found, needed, result, and what to do about what fails."""
    columns = ["check", "found", "needed", "result", "do"]
    rows = [[getattr(line, column) for column in columns] for line in lines]
    return pd.DataFrame(rows, columns=columns).set_index("check")


def _doctor(case: Case) -> list[Line]:
    """What spoke against this training before it began."""
    if not case.is_own or case.run.manifest.get("teacher_stage"):
        return []
    check, needed, found = (
        "the doctor had no objection",
        "no critical finding",
        critical_findings(case.run.manifest),
    )
    if found is None:
        return [Line(check, "it was not asked", needed, None, "ask kd doctor, or run 00_setup")]
    said = "; ".join(f"{each['where']}: {each['what']}" for each in found[:SHOWN])
    do = "; ".join(f"{each['where']}: {each['fix']}" for each in found[:SHOWN])
    return [Line(check, said or "nothing critical", needed, not found, do)]


def _epoch(case: Case) -> Line:
    """Every training row was seen once, or why not: what the config says by itself is no fault."""
    training, needed = case.config.training, "1 epoch, or as much as the config says"
    epoch, step = case.train["epoch"].iloc[-1], case.train["step"].iloc[-1]
    check, found = "it trained for an epoch, or for as long as it should", f"{epoch:.2f} epochs"
    if epoch >= WHOLE:
        return Line(check, found, needed, True)
    if not case.folder.is_trained:
        return Line(check, f"{found} so far", needed, None)
    every = np.diff(case.train["step"], prepend=0).max()  # so seldom that the last may be missing
    if case.config.early_stopping and case.steps - step >= every:
        why = f"early stopping ended it at step {step} of {case.steps}"
        do = "raise early_stopping.patience, or evaluate less often"
        return Line(check, f"{found}: {why}", needed, False, do)
    of = "max_steps" if training.get("max_steps", -1) > 0 else "num_train_epochs"
    whole = f", and an epoch takes {math.ceil(step / epoch)} steps" if epoch > 0 else ""
    return Line(check, f"{found}: training.{of} is {training.get(of, 3):g}{whole}", needed, True)


def _asks_as_made(case: Case) -> bool:
    """Whether the teacher is asked in training as it is in every evaluation."""
    return case.config.teacher is None or case.config.teacher.experts == "topk"


def _gap(train: pd.DataFrame, evaluation: pd.DataFrame, *, asks_alike: bool = True) -> Line:
    check = "training and held-out loss are near, under the same weights"
    needed = f"a ratio from {1 / GAP:g} to {GAP:g}"
    if not len(evaluation):
        return Line(check, "no evaluation", needed, None)
    last = evaluation.iloc[-1]
    steps = train["step"][train["step"] <= last["step"]]
    steps = steps[steps >= (1 - LATE) * steps.max()]
    terms = [term for term in terms_in(evaluation) if f"{term}_loss" in train and last[f"{term}_weight"] > 0]
    if not len(steps) or not terms:
        return Line(check, "no training line before the last evaluation", needed, None)
    held_out = sum(last[f"{term}_weight"] * last[f"{term}_loss"] for term in terms)
    seen = sum(last[f"{term}_weight"] * train[f"{term}_loss"][steps.index].mean() for term in terms)
    ratio = held_out / seen if seen else math.inf
    do = "give more text, or train for fewer passes: it learns its rows by heart"
    if ratio < 1:
        do = "see whether held-out rows are easier, or are among the training rows: kd doctor"
    found = f"{held_out:.3f} ÷ {seen:.3f} = {ratio:.2f}{'' if asks_alike else OTHER_EXPERTS}"
    return Line(check, found, needed, bool(1 / GAP < ratio < GAP), do)


def _learning_rate(train: pd.DataFrame, plan: pd.DataFrame, configured: float) -> Line:
    check = "the learning rate is as planned"
    needed = f"a peak of {PEAK:.0%} of {configured:.1e} or more, within {OFF_PLAN:.1%} of the plan"
    if "learning_rate" not in plan:
        return Line(check, "no plan: the schedule depends on how the training goes", needed, None)
    if "learning_rate" not in train:
        return Line(check, "none was logged", needed, None)
    peak, used = plan["learning_rate"].max(), train["learning_rate"]
    planned = np.interp(train["step"], plan["step"], plan["learning_rate"])
    off = np.abs(used - planned).max() / peak if peak > 0 else 0.0
    found = f"planned peak {peak:.1e}, used {used.max():.1e} so far; "
    found += f"off the plan by {off:.1%} of the peak at most"
    do = "let the schedule reach it: a shorter warm-up (warmup_steps: 0.1) or more steps"
    if peak >= PEAK * configured:
        do = "see what else sets the learning rate: the log and the plan do not agree"
    return Line(check, found, needed, bool(peak >= PEAK * configured and off <= OFF_PLAN), do)


def _finite(folder: StudentFolder, tail: Tail) -> Line:
    broken, report = len(tail.broken), (folder.path / "nan_report").exists()
    more = "see nan_report/" if report else "no step was stopped for one"
    found = f"{broken} of {tail.figures} logged figures are not; {more}"
    do = "nan_report/ names the first value that was not, and what to try, in which order"
    return Line("every figure is finite", found, "0", broken == 0 and not report, do)


def _balance(train: pd.DataFrame) -> Line:
    needed = f"the largest weighted share less than {BALANCE:g} × the smallest"
    shares = {term: (train[f"{term}_weight"] * train[f"{term}_loss"]).mean() for term in terms_in(train)}
    shares = {term: share for term, share in shares.items() if share > 0}
    found = ", ".join(f"{term} {share:.3g}" for term, share in shares.items()) or "no term has a share"
    is_balanced = bool(shares and max(shares.values()) < BALANCE * min(shares.values()))
    do = "raise the weight of the smallest, or leave it out; kd doctor proposes a weight"
    return Line("the terms are balanced", found, needed, is_balanced, do)


def _memory(train: pd.DataFrame, device_gib: float | None) -> Line:
    check, needed = "memory suffices", f"less than {MEMORY:.0%} of the device's"
    if device_gib is None or "memory_gib" not in train:
        found = "the device's memory is not known: the run was not set up by 00_setup"
        return Line(check, found, needed, None)
    peak = train["memory_gib"].max()
    do = "lower per_device_train_batch_size and raise gradient_accumulation_steps; kd forecast says what fits"
    return Line(check, f"{peak:.2f} of {device_gib:.1f} GiB", needed, bool(peak < MEMORY * device_gib), do)
