"""A run in brief, from its files: how far it came, its key figures, its settings, its cost.  Imports no
torch.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml

from kdlib.benchmarks import reading
from kdlib.config.task_rules import rules_in
from kdlib.errors import ConfigError, KdlibError
from kdlib.metrics.names import MEASURES, difference, with_interval
from kdlib.plots import comparison as plots
from kdlib.plots.axes import LABELS
from kdlib.reports.scorecard import Line, scorecard
from kdlib.runs import log as metrics
from kdlib.runs.folder import Run, StudentFolder, read_json


@dataclass(frozen=True)
class Summary:
    """One run in brief; what it has not come to is empty or None."""

    name: str
    state: str
    message: str = ""
    created: str = ""
    config: str = ""  # the file's name without its ending
    sweep: str = ""
    is_benchmark: bool = False
    is_teacher: bool = False  # its own training, before it teaches
    step: int | None = None
    steps: int | None = None  # planned
    stage: str = ""
    # metric → value, and low, high where it was compared
    keys: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    against: Mapping[str, float] | None = None  # the baseline: the paired difference in KL to the teacher
    train: pd.DataFrame = field(default_factory=pd.DataFrame)
    evaluation: pd.DataFrame = field(default_factory=pd.DataFrame)
    baseline: pd.DataFrame = field(default_factory=pd.DataFrame)
    costs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)  # dotted name → as text
    card: tuple[Line, ...] = ()

    @property
    def progress(self) -> float | None:
        """The fraction of the distilled student's steps that were made."""
        return self.step / self.steps if self.step is not None and self.steps else None

    def key(self, metric: str) -> str:
        """`0.958 [0.904, 1.01]`; of the last evaluation, which has no interval, `0.958`."""
        figures = self.keys.get(metric)
        return (
            ""
            if figures is None
            else with_interval(figures)
            if "low" in figures
            else number(figures["value"])
        )


def summaries(root: Path) -> list[Summary]:
    """Every run below this folder, newest first."""
    found = [summary(Run(path.parent)) for path in root.glob("*/config.yaml")]
    return sorted(found, key=lambda each: (each.created, each.name), reverse=True)


def keys_of(found: Sequence[Summary]) -> dict[str, str]:
    """Metric → heading of every key figure that one of the runs has; a run has those of its task."""
    return {
        metric: measure.brief
        for metric, measure in MEASURES.items()
        if any(metric in each.keys for each in found)
    }


def summary(run: Run) -> Summary:
    """What the run's files say; where they are torn or of another shape, a summary whose state and
    message say so.
    """
    try:
        return _read(run)
    except (KdlibError, OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        return Summary(
            run.name, "unreadable", f"{type(error).__name__}: {error}".replace(f"{run.path}{os.sep}", "")
        )


def number(value: float) -> str:
    """Three digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def flat(nested: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("loss.temperature", 2.0)` for each leaf."""
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value


def report_link(name: str, reports: Path) -> str | None:
    """The report of this run as seen from the folder of reports; None where there is none."""
    return f"{quote(name)}/report.html" if (reports / name / "report.html").exists() else None


def planned_steps(run: Run) -> int | None:
    """How many optimizer steps the training has, as soon as it has begun or was tried."""
    plan = metrics.plan_table(run)
    return int(plan["step"].max()) if len(plan) else run.manifest.get("optimizer_steps")


def costs(results: Mapping[str, Any] | None, train: pd.DataFrame, evaluation: pd.DataFrame) -> dict[str, str]:
    """What the distilled student cost to train, and costs to keep and to run: name → figure with its unit."""
    found = {}
    for what in ("tokens", "rows"):
        if f"{what}_per_s" in train:
            found[f"training, {what}/s"] = number(train[f"{what}_per_s"].median())
    if "memory_gib" in train:
        found["training, peak GiB"] = f"{train['memory_gib'].max():.2f}"
    if seconds := metrics.seconds_taken(train, evaluation):
        found["training, time"] = metrics.duration(seconds)
    if results:
        found |= plots.cost_table(results).loc[LABELS["distilled"]].to_dict()
    return found


def card(run: Run, student: StudentFolder | None = None) -> list[Line]:
    """The scorecard; of a run whose settings this version refuses, why there is none."""
    try:
        return scorecard(run, student)
    except ConfigError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        return [Line("the settings can be read", faults, "a config of this version", None)]


def _read(run: Run) -> Summary:
    results, manifest, status = read_json(run.path / "comparison_results.json"), run.manifest, run.status
    settings = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")) or {}
    train, evaluation = metrics.training_table(run), metrics.eval_table(run)
    steps = [int(table["step"].iloc[-1]) for table in (train, evaluation) if len(table)]
    against = (
        difference(results, "distilled", "baseline", "kl_to_teacher")
        if results and "baseline" in results["models"]
        else None
    )
    return Summary(
        run.name,
        status["state"],
        status.get("message", ""),
        created=manifest.get("created", "")[:16].replace("T", " "),
        config=Path(manifest.get("config_file") or "").stem,
        sweep=str(manifest.get("sweep") or ""),
        is_benchmark=reading.results_of(run) is not None or "task" not in settings,
        is_teacher=bool(manifest.get("teacher_stage")),
        step=max(steps, default=None),
        steps=planned_steps(run),
        stage=_stage(run, results, steps),
        keys=_keys(settings, results, evaluation),
        against=against,
        train=train,
        evaluation=evaluation,
        baseline=metrics.eval_table(run.baseline),
        costs=costs(results, train, evaluation),
        settings={name: _as_text(value) for name, value in flat(settings)},
        card=tuple(card(run)),
    )


def _stage(run: Run, results: Mapping | None, steps: list[int]) -> str:
    if results:
        return "compared"
    return (
        "trained"
        if run.is_trained
        else "training"
        if steps
        else "set up"
        if "formula" in run.manifest
        else ""
    )


def _keys(
    settings: Mapping[str, Any], results: Mapping[str, Any] | None, evaluation: pd.DataFrame
) -> dict[str, dict[str, float]]:
    named = rules_in(settings).told_first
    if results:
        distilled = results["models"].get("distilled", {})
        return {metric: distilled[metric] for metric in named if metric in distilled}
    return {metric: {"value": float(evaluation[metric].iloc[-1])} for metric in named if metric in evaluation}


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
