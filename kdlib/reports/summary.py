"""A run in brief, from its files: how far it came, its key figures, settings and cost."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from kdlib.config.task_rules import primary_in, rules_in
from kdlib.errors import KdlibError
from kdlib.metrics.names import MEASURES, called_student, difference, student_of, three_digits, with_interval
from kdlib.plots.comparison import costs_of
from kdlib.plots.generation import ENDS, dollars
from kdlib.reports.scorecard import Line, scorecard
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run, all_runs
from kdlib.runs.log import duration, eval_table, plan_table, tail_of
from kdlib.runs.progress import seconds_taken
from kdlib.runs.verdict import Best, best_by, mean_at, value_at

UNREADABLE = "unreadable"  # a run whose files are torn, or of another shape


@dataclass(frozen=True)
class Summary:
    """One run in brief; what it has not come to is empty or None."""

    name: str
    state: str
    message: str = ""
    created: str = ""
    config: str = ""  # the file's name without its ending, or the kind
    sweep: str = ""
    kind: str = ""  # benchmark, generation: of runs that teach no student
    is_teacher: bool = False  # its own training, before it teaches
    student: str = "distilled"  # as its results name it
    step: int | None = None
    steps: int | None = None  # planned
    stage: str = ""
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # metric → value (low, high, of)
    compared: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # final_model/'s, where another
    best: Best | None = None  # whose student best_model/ is
    train: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluation: pd.DataFrame = field(default_factory=pd.DataFrame)
    baseline: pd.DataFrame = field(default_factory=pd.DataFrame)
    costs: Mapping[str, str] = field(default_factory=dict)  # of training and of the student; and the gain
    settings: Mapping[str, str] = field(default_factory=dict)  # dotted name → as text
    card: tuple[Line, ...] = ()

    @property
    def progress(self) -> float | None:
        """The fraction of the student's steps that were made."""
        return self.step / self.steps if self.step is not None and self.steps else None

    @property
    def about_best(self) -> str:
        """Which student best_model/ is, in a sentence or two."""
        if self.best is None:
            return ""
        by, of = MEASURES[self.best.measure].words, f" of {self.steps:,}" if self.steps else ""
        if self.best.is_untrained:
            said = f"best_model/ is the untrained student: no evaluation after step 0 was better by {by}."
        else:
            said = f"best_model/ is the student of step {self.best.step:,}{of}, the best by {by}."
        if self.compared:
            said += (
                f" Compared is final_model/, of step {self.best.last_step:,}, in fairness to the baseline."
            )
        return said

    def key(self, metric: str) -> str:
        """`0.958 [0.904, 1.01]`, or of the last evaluation, which has no interval, `0.958`; else nothing."""
        figures = self.keys.get(metric)
        if figures is None:
            return ""
        return with_interval(figures) if "low" in figures else three_digits(figures["value"])


def summaries(root: Path) -> list[Summary]:
    """Every run below this folder, newest first."""
    return [summary(run) for run in all_runs(root)]


def keys_of(found: Sequence[Summary]) -> dict[str, str]:
    """Metric → heading of every key figure that one of the runs has; a run has those of its task."""
    shown = (metric for metric in MEASURES if any(metric in each.keys for each in found))
    return {metric: MEASURES[metric].brief for metric in shown}


def summary(run: Run) -> Summary:
    """What the run's files say; where they are torn or of another shape, state and message say so."""
    try:
        return _read(run)
    except (KdlibError, OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        said = f"{type(error).__name__}: {error}".replace(f"{run.path}{os.sep}", "")
        return Summary(run.name, UNREADABLE, said)


def flat(nested: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("loss.temperature", 2.0)` for each leaf."""
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value


def _read(run: Run) -> Summary:
    results, manifest, status = run.comparison, run.manifest, run.status
    settings = run.settings
    kind = manifest.get("kind") or ("" if "student" in settings else "benchmark")
    tail, plan = tail_of(run), plan_table(run)
    steps = [int(table["step"].iloc[-1]) for table in (tail.train, tail.evaluation) if len(table)]
    best = _best(settings, tail.evaluation)
    keys, compared = _keys(run, settings, results, tail.evaluation, best)
    asking = read_json(run.path / "progress.json", {}) if kind == "generation" else {}
    return Summary(
        run.name,
        status["state"],
        status.get("message", ""),
        created=manifest.get("created", "")[:16].replace("T", " "),
        config=Path(manifest.get("config_file") or "").stem or kind,
        sweep=str(manifest.get("sweep") or ""),
        kind=kind,
        is_teacher=bool(manifest.get("teacher_stage")),
        student=called_student(settings.get("teacher")),
        step=max(steps, default=None),
        steps=int(plan["step"].max()) if len(plan) else manifest.get("optimizer_steps"),
        stage=_asked(asking) if asking else _stage(run, results, steps),
        keys=keys,
        compared=compared,
        best=best,
        train=tail.train,
        evaluation=tail.evaluation,
        baseline=eval_table(run.baseline),
        costs=_costs_of_rows(asking) if asking else _costs(results, tail.train, tail.evaluation),
        settings={name: _as_text(value) for name, value in flat(settings)},
        card=() if asking else tuple(scorecard(run, tail=tail, results=results)),
    )


def _stage(run: Run, results: Mapping | None, steps: list[int]) -> str:
    if results:
        return "compared"
    if run.is_trained:
        return "trained"
    return "training" if steps else "set up" * ("formula" in run.manifest)


def _asked(progress: Mapping[str, Any]) -> str:
    """Of a run that makes rows: `81 kept, 19 rejected, 14 failed`, or how many prompts are answered."""
    if "kept" in progress:
        return ", ".join(f"{progress[end]:,} {end}" for end in ENDS if progress[end] or end == "kept")
    return f"{progress['stage']}: {progress['answered']:,} of {progress['prompts']:,} prompts answered"


def _costs_of_rows(progress: Mapping[str, Any]) -> dict[str, str]:
    spent, tokens = progress["spent_usd"], progress["output_tokens"]
    return {"generation, spent": dollars(spent)} | {"generation, tokens of answers": f"{tokens:,}"}


def _best(settings: Mapping, evaluation: pd.DataFrame) -> Best | None:
    chosen_by = (settings.get("training") or {}).get("metric_for_best_model", "")
    return best_by(evaluation, chosen_by.removeprefix("eval_"))


def _keys(
    run: Run, settings: Mapping, results: Mapping | None, evaluation: pd.DataFrame, best: Best | None
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Of best_model/, the one to be used; and of final_model/, where that is another, and was compared."""
    named = rules_in(settings).told_first
    found = (results or {}).get("models", {}).get(student_of(results or {}), {})
    compared = {metric: found[metric] for metric in named if metric in found}
    if compared and (best is None or best.is_last or (results or {}).get("split") == "test"):
        return compared, {}  # the same student
    at = best.step if best else int(evaluation["step"].iloc[-1]) if len(evaluation) else 0
    own = {m: {"value": value_at(evaluation, m, at)} for m in named if m in evaluation}
    own |= {m: found for m in own if (found := mean_at(run, m, at))}
    return {
        m: own.get(m) or {**compared[m], "of": "final_model/"} for m in named if m in own or m in compared
    }, {m: compared[m] for m in own if m in compared}


def _costs(results: Mapping | None, train: pd.DataFrame, evaluation: pd.DataFrame) -> dict[str, str]:
    found = {}
    for what in ("tokens", "rows"):
        if f"{what}_per_s" in train:
            low, median, high = np.nanquantile(train[f"{what}_per_s"], [0.25, 0.5, 0.75])
            spread = {"value": median, "low": low, "high": high}
            found[f"training, {what}/s"] = with_interval(spread)
    if "memory_gib" in train:
        found["training, peak GiB"] = f"{train['memory_gib'].max():.2f}"
    if seconds := seconds_taken(train, evaluation):
        found["training, time"] = duration(seconds)
    if not results:
        return found
    found |= costs_of(results["models"][student_of(results)])
    if "baseline" in results["models"]:
        metric = primary_in(results)
        gain = difference(results, "distilled", "baseline", metric)
        found[f"{MEASURES[metric].brief}, difference to the baseline"] = with_interval(gain, "+")
    return found


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
