"""Reports: a self-contained HTML page of a run's files, or of a comparison made by `kd compare`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from nbconvert.filters import strip_ansi

from kdlib.config.task_rules import rules_in, shown_in
from kdlib.errors import RunError
from kdlib.metrics.names import MEASURES, three_digits, with_interval
from kdlib.plots import comparison as plots
from kdlib.plots.axes import LABELS, label_of
from kdlib.plots.classification import ANSWER_FIGURES, TITLES, answer_tables
from kdlib.plots.training import run_figures
from kdlib.reports import html
from kdlib.reports.explorers import static_html
from kdlib.reports.notebook_html import notebook_html
from kdlib.reports.scorecard import Line, scorecard, scorecard_table
from kdlib.reports.summary import Summary, flat, keys_of, summary
from kdlib.runs.files import now, read_json
from kdlib.runs.folder import Run

SECTIONS = {
    "summary": "Summary",
    "scorecard": "Scorecard",
    "training": "Training",
    "comparison": "Comparison",
    "samples": "Continuations",
    "explorers": "Explorers",
    "config": "Config",
    "formula": "Formula",
    "environment": "Environment and data",
    "reproduce": "How to reproduce",
    "notebooks": "Notebooks as they ran",
}
OWN_PLACE = ("dashboard", plots.BARS, *ANSWER_FIGURES)  # figures that stand by themselves
DOING = {"running": "is running", "created": "is not at its end", "stopped": "was stopped"}


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html with its figures and tables; return the page's path.

    Raises:
        RunError: there is no run, or it is a benchmark's.
    """
    if not (run.path / "config.yaml").exists():
        raise RunError(f"{run.path}: no run there, since there is no config.yaml")
    results, brief = read_json(run.path / "comparison_results.json"), summary(run)
    if brief.is_benchmark:
        command = f"python -m kdlib.benchmarks --report {run.name}"
        raise RunError(f"{run.name} is a benchmark: `{command}` makes its page")
    pictures = {name: html.picture(figure, name) for name, figure in run_figures(run, results).items()}
    students = {"teacher" if brief.is_teacher else "distilled student": run, "baseline": run.baseline}
    cards = {name: lines for name, student in students.items() if (lines := scorecard(run, student))}
    tables = {"metrics": brief.train, "evaluation": brief.evaluation}
    if results:
        tables |= comparison_tables(results)
    if cards:
        tables["scorecard"] = scorecard_table(next(iter(cards.values())))
    content = {
        **run_content(run),
        **_comparison_content(results, pictures, tables),
        "cards": cards,
        "dashboard": pictures.get("dashboard"),
        "pictures": [picture for name, picture in pictures.items() if name not in OWN_PLACE],
        "message": plots.comparison_message(results) if results else "",
        "strip": _strip(brief, results, cards),
    }
    empty = {
        "scorecard": not cards,
        "training": not (content["dashboard"] or content["pictures"]),
        "comparison": not results,
        "samples": not (results and results.get("prompts")),
        "formula": not run.manifest.get("formula"),
        **{name: not content[name] for name in ("explorers", "notebooks")},
    }
    sections = {name: title for name, title in SECTIONS.items() if not empty.get(name)}
    page = html.page("report.html.j2", sections=sections, **content)
    return html.write(reports / run.name, page, pictures, tables)


def render_comparison(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html of a comparison by itself, with its figures and tables; return the page's path."""
    pictures = {
        name: html.picture(figure, name) for name, figure in plots.comparison_figures(results).items()
    }
    tables = comparison_tables(results)
    page = html.page(
        "compared.html.j2",
        **{name: results[name] for name in ("student", "sources", "precision")},
        made=now()[:16].replace("T", " "),
        message=plots.comparison_message(results),
        **_comparison_content(results, pictures, tables),
    )
    return html.write(folder, page, pictures, tables)


def comparison_tables(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table of a comparison, by name."""
    return {
        "quality": plots.quality_table(results),
        "cost": plots.cost_table(results),
        "differences": plots.difference_table(results),
        **answer_tables(results),
    }


def run_content(run: Run, *, command: str = "kd run") -> dict[str, Any]:
    """What the page shows of a run's files as they are; `command` makes it again."""
    manifest, status = run.manifest, run.status
    facts = {name: value for name, value in manifest.items() if name not in ("formula", "command", "stages")}
    again = f"{command} runs/{run.name}/config.yaml"
    commit = f"git checkout {manifest['commit']}\n" if manifest.get("commit") else ""
    doing = DOING.get(status["state"], status["state"])
    at = now()[:16].replace("T", " at ")
    partial = f"This report is partial: the run {doing}. It shows what there was on {at}."
    return {
        "run": run,
        "manifest": manifest,
        "status": {**status, "message": strip_ansi(status.get("message", ""))},
        "partial": "" if status["state"] == "done" else partial,
        "explorers": {title: Markup(drawn) for title, drawn in static_html(run).items()},
        "config": (run.path / "config.yaml").read_text(encoding="utf-8"),
        "facts": [(name.replace("_", " "), value) for name, value in flat(facts, " · ")],
        "reproduce": f"{commit}{manifest.get('command', again)}\n"
        f"# the config above holds every setting: {again} does the same",
        "notebooks": {path.stem: notebook_html(path) for path in sorted(run.notebooks.glob("*.ipynb"))},
    }


def _strip(
    brief: Summary, results: Mapping[str, Any] | None, cards: Mapping[str, list[Line]]
) -> list[tuple[str, str, list[str]]]:
    """Key figures: what, how much, and what to hold it against."""
    strip = []
    for metric, label in keys_of([brief]).items():
        value, _, interval = brief.key(metric).partition(" ")
        if results:
            rival = "baseline" if "baseline" in results["models"] else "untrained"
            against = f"{LABELS[rival]} {with_interval(results['models'][rival][metric])}"
        else:
            against = f"held-out, at step {brief.evaluation['step'].iloc[-1]}"
        strip.append((label, value, [interval, against]))
    if results:
        student, teacher = (results["models"][name]["parameters"] / 1e6 for name in ("distilled", "teacher"))
        share = f"{student / teacher:.0%} of the teacher's {three_digits(teacher)} M"
        strip.append(("parameters", f"{three_digits(student)} M", [share]))
    if brief.step is not None:
        strip.append(("steps", f"{brief.step:,}", [f"of {brief.steps:,}"] if brief.steps else []))
    strip += [(name, cost, []) for name, cost in brief.costs.items() if name.startswith("training")]
    if lines := next(iter(cards.values()), None):
        failed = [f"fails: {line.check}" for line in lines if line.passed is False]
        passed = f"{sum(line.passed is True for line in lines)} of {len(lines)} pass"
        strip.append(("scorecard", passed, failed or ["no check fails"]))
    return strip


def _comparison_content(
    results: Mapping[str, Any] | None,
    pictures: Mapping[str, html.Picture],
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, Any]:
    """What templates/comparison.html.j2 takes; nothing where nothing was compared."""
    if not results:
        return {}
    lower = [MEASURES[name].brief for name in shown_in(results) if not MEASURES[name].higher_is_better]
    return {
        "results": results,
        "rows": rules_in(results).rows,
        "lower": lower,
        "label_of": label_of,
        "comparison": pictures.get(plots.BARS),
        "answer_pictures": [pictures[name] for name in ANSWER_FIGURES if name in pictures],
        **{name: html.table(tables[name]) for name in ("quality", "cost", "differences")},
        "answers": {title: html.table(tables[name]) for name, title in TITLES.items() if name in tables},
    }
