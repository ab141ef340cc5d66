"""The scorecard's lines on what a student learned, by held-out figures that no schedule changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from kdlib.config.run import Config
from kdlib.config.task_rules import TaskRules, primary_in, rules_of
from kdlib.metrics.names import MEASURES, difference, is_better, student_of, three_digits, with_interval
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import plan_table, terms_in
from kdlib.runs.verdict import best_by, change, critical_findings, mean_at, moving_settings, trend, value_at

WORSE = 0.05  # of the best value: a smaller loss at the end is none to act on
IN_NATS = {"perplexity": "nats of cross-entropy", "macro_f1": "of accuracy"}  # what an interval is of


@dataclass(frozen=True)
class Line:
    """One question with its answer; `passed` is None where it could not be measured, and `found` says why."""

    check: str
    found: str
    needed: str
    passed: bool | None
    advice: str = ""

    @property
    def result(self) -> str:
        return {True: "pass", False: "fail", None: "not measured"}[self.passed]

    @property
    def do(self) -> str:
        """What to change; nothing where it passed."""
        return "" if self.passed else self.advice


@dataclass(frozen=True)
class Case:
    """One student's training, as its files tell it."""

    run: Run
    folder: StudentFolder
    train: pd.DataFrame
    evaluation: pd.DataFrame
    results: Mapping[str, Any] | None  # of the comparison, where this is the student that it is about

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def rules(self) -> TaskRules:
        return rules_of(self.config)

    @property
    def is_own(self) -> bool:
        """Of the student itself, not the baseline."""
        return self.folder.path == self.run.path

    @cached_property
    def steps(self) -> int:
        """Planned."""
        plan = plan_table(self.folder)
        return int(plan["step"].max()) if len(plan) else int(self.train["step"].iloc[-1])

    @property
    def chosen_by(self) -> str:
        return self.config.training["metric_for_best_model"].removeprefix("eval_")

    @property
    def learned_by(self) -> str:
        """Nearness to the teacher where that teaches, else nearness to the text, or to the classes."""
        wanted = ["kl_to_teacher"] * (set(terms_in(self.train)) != {"ce"}) + ["perplexity", "log_loss"]
        return next((name for name in wanted if name in self.evaluation), wanted[0])

    def change(self, measure: str, before: int, after: int, looks: int = 1) -> dict[str, float] | None:
        return change(self.folder, measure, before, after, looks=looks)

    @property
    def lower_rate(self) -> str:
        """What to do where a training went apart."""
        known = [
            each for each in critical_findings(self.run.manifest) or [] if "learning_rate" in each["where"]
        ]
        if known:
            return f"{known[0]['where']}: {known[0]['fix']}"
        rate = self.config.training.get("learning_rate", 5e-5)
        return f"lower training.learning_rate ({rate:.1e}), by ten times at first; kd doctor names its range"


def learning_lines(case: Case) -> list[Line]:
    """Does it learn, and keep what it learned; is it above a guess, and above the baseline?"""
    measures = dict.fromkeys([case.learned_by, case.chosen_by][: 2 if case.is_own else 1])
    found = [_moves(case, measure) for measure in measures if measure in case.evaluation]
    lines = found or [_trend(case)]
    lines.append(_kept(case, [name for name in measures if name in case.evaluation]))
    lines += _above_a_guess(case)
    is_taught = case.is_own and case.config.teacher and not case.run.manifest.get("teacher_stage")
    return lines + ([_baseline(case)] if is_taught else [])


def _moves(case: Case, measure: str) -> Line:
    """Best and last evaluation against the first, with paired intervals."""
    words, is_learning = MEASURES[measure].words, measure == case.learned_by
    check = f"the model learns ({words})" if is_learning else f"held-out {words} improves"
    needed = "better than at the first evaluation, beyond chance"
    best = best_by(case.evaluation, measure)
    if best is None:
        return Line(check, "never finite", needed, False, case.lower_rate)
    against = _untrained(case, measure)
    if best.first_step > 0 and against is not None:  # the comparison has measured where it began
        return _since_untrained(case, check, needed, measure, against)
    if best.count < 2:
        do = "evaluate more often: training.eval_on_start: true, eval_strategy: steps, eval_steps"
        return Line(check, "1 evaluation; a change needs 2", needed, None, do)
    first, last = (value_at(case.evaluation, measure, step) for step in (best.first_step, best.last_step))
    found = f"{first:.4g} at step {best.first_step:,} → {best.value:.4g} at best (step {best.step:,})"
    found += "" if best.is_last else f" → {last:.4g} at the end"
    to_best = case.change(measure, best.first_step, best.step, best.count - 1)
    to_end = case.change(measure, best.first_step, best.last_step)
    if to_best is None or to_end is None:
        do = "it was made before evaluations kept what each held-out unit contributed"
        return Line(check, f"{found}, without an interval", needed, None, do)
    if best.step == best.first_step:
        to_best = to_end
    found += f"; change {_signed(measure, to_best)}"
    gained, lost = is_better(to_best, measure) is True, is_better(to_end, measure) is False
    do = case.lower_rate
    if not gained and not lost:
        do = "raise training.learning_rate (kd doctor names its range), or train for longer"
        if best.first_step > 0:
            do += "; training.eval_on_start: true measures where it began"
    return Line(check, found, needed, gained and not lost, do)


def _untrained(case: Case, measure: str) -> dict[str, Any] | None:
    """The compared student's difference to the untrained one, with its interval."""
    results = case.results or {}
    student, models = student_of(results), results.get("models", {})
    if not all(measure in models.get(name, {}) for name in (student, "untrained")):
        return None
    return difference(results, student, "untrained", measure)


def _since_untrained(case: Case, check: str, needed: str, measure: str, against: Mapping[str, Any]) -> Line:
    results = case.results or {}
    every = (results["models"][name][measure] for name in ("untrained", student_of(results)))
    before, after = (three_digits(each["value"]) for each in every)
    found = f"{before} untrained → {after}, as compared; change {with_interval(against, '+')}"
    gained = is_better(against, measure)
    do = case.lower_rate
    if gained is None:
        do = "raise training.learning_rate (kd doctor names its range), or train for longer"
    return Line(check, found, needed, gained is True, do)


def _trend(case: Case) -> Line:
    """Without an evaluation: by a raw term, while its settings stand still."""
    moving, terms = moving_settings(case.config, is_baseline=not case.is_own), terms_in(case.train)
    term = "kd" if "kd" in terms else next(iter(terms), "no")
    check, needed = f"the model learns ({term} loss)", "a fall, beyond chance"
    if not terms:
        return Line(check, "no evaluation, and no term was logged", needed, None)
    do = "evaluate while it trains: training.eval_strategy: steps, eval_steps, eval_on_start: true"
    found = trend(case.train[f"{term}_loss"], term, moving)
    if found is None or found.falls is None:
        words = "no finite value" if found is None else found.words(case.rules.unit)
        return Line(check, f"no evaluation; {words}", needed, None, do)
    return Line(check, f"no evaluation; {found.words(case.rules.unit)}", needed, found.falls, case.lower_rate)


def _kept(case: Case, measures: list[str]) -> Line:
    """The last evaluation is not clearly worse than the best."""
    check, needed = "what it learned is kept to the end", f"no clear loss of over {WORSE:.0%} since the best"
    found, passed, away = [], [], 0
    for measure in measures:
        best = best_by(case.evaluation, measure)
        if best is None or best.count < 2:
            continue
        last = value_at(case.evaluation, measure, best.last_step)
        text = (
            f"{MEASURES[measure].brief} {best.value:.4g} at best (step {best.step:,}), {last:.4g} at the end"
        )
        lost = case.change(measure, best.step, best.last_step, best.count - 1)
        is_far = abs(last - best.value) > WORSE * abs(best.value)
        if best.is_last:
            passed.append(True)
        elif lost is None:
            passed.append(None if is_far else True)
        else:
            passed.append(not (is_far and is_better(lost, measure) is False))
            text += f", {_signed(measure, lost)}"
        if passed[-1] is False:
            away = best.step
        found.append(text)
    if not found:
        return Line(check, "fewer than two evaluations", needed, None)
    result = False if False in passed else None if None in passed else True
    do = f"stop near step {away:,} (early_stopping: {{patience: 3}}), or " * (away > 0) + case.lower_rate
    return Line(check, "; ".join(found), needed, result, do)


def _above_a_guess(case: Case) -> list[Line]:
    """Of classes: above always saying the commonest; of questions: above a choice at random."""
    questions = "choice_accuracy" in case.evaluation
    measure = "choice_accuracy" if questions else "accuracy"
    split = (case.results or {}).get("split", "validation")
    counts = case.run.manifest.get("data", {}).get(f"{split}_classes") or {}
    best = best_by(case.evaluation, case.chosen_by)
    if best is None or not (questions or counts) or measure not in case.evaluation:
        return []
    if questions:
        guess = (mean_at(case.folder, "chance", best.step) or {}).get("value")
        check = "it chooses better than at random"
    else:
        guess = max(counts.values()) / max(sum(counts.values()), 1)
        check = f"it beats always saying {max(counts, key=counts.get)!r}"
    measured = mean_at(case.folder, measure, best.step)
    results = case.results or {}
    if measure in (told := results.get("models", {}).get(student_of(results), {})):
        measured = told[measure]
    if measured is None or guess is None:
        return []
    found = f"{MEASURES[measure].brief} {with_interval(measured)}, such a guess {guess:.3f}"
    do = f"see whether the labels are right and the classes told apart: kd doctor; else {_longer(case)}"
    return [Line(check, found, "above it, beyond chance", bool(measured["low"] > guess), do)]


def _longer(case: Case) -> str:
    return "train for longer" if case.train["epoch"].iloc[-1] < 3 else "try another learning rate"


def _baseline(case: Case) -> Line:
    """The comparison's difference in the task's first measure."""
    check, needed = "better than the baseline", "a difference in its favour, beyond chance"
    if case.config.baseline is None:
        do = "give the config one, baseline: {weights: {ce: 1.0}}: else nobody knows what the teacher brings"
        return Line(check, "there is none", needed, None, do)
    if not case.results or "baseline" not in case.results["models"]:
        return Line(check, "not compared yet", needed, None, "run 03_compare")
    measure = primary_in(case.results)
    found = difference(case.results, "distilled", "baseline", measure)
    values = (
        three_digits(case.results["models"][name][measure]["value"]) for name in ("distilled", "baseline")
    )
    text = "{} {} against {}".format(MEASURES[measure].brief, *values) + f", {with_interval(found, '+')}"
    gained = is_better(found, measure)
    began = _untrained(case, measure)
    do = "hold out more rows, or repeat it over seeds (kd sweep); if it stays, this teacher brings nothing"
    if began is not None and is_better(began, measure) is not True:
        do = f"let the student learn at first: {case.lower_rate}"
    elif gained is False:
        do = "the teacher does harm: see how good it is here; lower its terms' weights, or the temperature"
    return Line(check, text + "; no clear difference" * (gained is None), needed, gained is True, do)


def _signed(measure: str, difference: Mapping[str, float]) -> str:
    return f"{with_interval(difference, '+')} {IN_NATS.get(measure, '')}".rstrip()
