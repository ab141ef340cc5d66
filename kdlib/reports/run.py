"""Reports: one self-contained HTML page per run.  They read files; nothing calls into them, and nothing
here imports torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from nbconvert.filters import strip_ansi

from kdlib.benchmarks import figures as benchmark_figures, reading
from kdlib.benchmarks.targets import target_table, verdict
from kdlib.errors import RunError
from kdlib.metrics.names import with_interval
from kdlib.plots import comparison as plots
from kdlib.plots.axes import LABELS
from kdlib.plots.classification import ANSWER_FIGURES
from kdlib.reports import compared, html as pages
from kdlib.reports.explorers import static_html
from kdlib.reports.html import Picture
from kdlib.reports.notebook_html import notebook_html
from kdlib.reports.scorecard import Line, scorecard_table
from kdlib.reports.summary import card, costs, flat, keys_of, number, summary
from kdlib.runs.folder import Run, now, read_json
from kdlib.runs.log import eval_table, training_table

SECTIONS = {
    "summary": "Summary",
    "scorecard": "Scorecard",
    "training": "Training",
    "figures": "Figures",
    "measurements": "Measurements",
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


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html, its figures and tables from whatever the run has left, and return
    the page's path.
    """
    if not (run.path / "config.yaml").exists():
        raise RunError(f"{run.path}: no run there, since there is no config.yaml")
    results, benchmark = read_json(run.path / "comparison_results.json"), reading.results_of(run)
    figures = benchmark_figures.run_figures(benchmark) if benchmark else plots.run_figures(run, results)
    pictures = {name: pages.picture(figure, name) for name, figure in figures.items()}
    students = {
        "teacher" if run.manifest.get("teacher_stage") else "distilled student": run,
        "baseline": run.baseline,
    }
    cards = {name: lines for name, student in students.items() if (lines := card(run, student))}
    tables = _tables(run, results, benchmark, cards)
    page = pages.page("report.html.j2", **_content(run, results, benchmark, pictures, tables, cards))
    return pages.write(reports / run.name, page, pictures, tables)


def _tables(
    run: Run, results: Mapping | None, benchmark: Mapping | None, cards: Mapping[str, list[Line]]
) -> dict[str, pd.DataFrame]:
    if benchmark:
        return {"targets": target_table(benchmark), **reading.run_tables(benchmark)}
    tables = {"metrics": training_table(run), "evaluation": eval_table(run)}
    if results:
        tables |= compared.tables_of(results)
    if cards:
        tables["scorecard"] = scorecard_table(next(iter(cards.values())))
    return tables


def _content(
    run: Run,
    results: Mapping[str, Any] | None,
    benchmark: Mapping[str, Any] | None,
    pictures: Mapping[str, Picture],
    tables: Mapping[str, pd.DataFrame],
    cards: Mapping[str, list[Line]],
) -> dict[str, Any]:
    manifest, status = run.manifest, run.status
    facts = {k: v for k, v in manifest.items() if k not in ("formula", "command", "stages")} | (
        benchmark or {}
    ).get("machine", {})
    others = [image for name, image in pictures.items() if name not in OWN_PLACE]
    content = {
        **compared.content_of(results, pictures, tables),
        "cards": cards,
        "dashboard": pictures.get("dashboard"),
        "pictures": others,
        "measured": {name: pages.table(reading.shown(table)) for name, table in tables.items()}
        if benchmark
        else {},
        "explorers": {title: Markup(html) for title, html in static_html(run).items()},
        "notebooks": {path.stem: notebook_html(path) for path in sorted(run.notebooks.glob("*.ipynb"))},
    }
    present = {
        "scorecard": cards,
        "training": not benchmark and (content["dashboard"] or others),
        "figures": benchmark and others,
        "measurements": benchmark,
        "comparison": results,
        "samples": content["samples"],
        "explorers": content["explorers"],
        "formula": manifest.get("formula"),
        "notebooks": content["notebooks"],
    }
    return content | {
        "run": run,
        "manifest": manifest,
        "compared": bool(results),
        "status": {**status, "message": strip_ansi(status.get("message", ""))},
        "partial": _partial(status["state"]),
        "sections": {id: name for id, name in SECTIONS.items() if present.get(id, True)},
        "message": plots.comparison_message(results) if results else verdict(benchmark) if benchmark else "",
        "strip": [] if benchmark else _strip(run, results, cards),
        "config": (run.path / "config.yaml").read_text(encoding="utf-8"),
        "facts": [(name.replace("_", " "), value) for name, value in flat(facts, " · ")],
        "reproduce": _reproduce(run, manifest, "bench" if benchmark else "run"),
    }


def _partial(state: str) -> str:
    """What is to be known of a page about a run that is not at its end."""
    if state == "done":
        return ""
    doing = {"running": "is running", "created": "is not at its end", "stopped": "was stopped"}.get(
        state, state
    )
    return (
        f"This report is partial: the run {doing}. It shows what there was on "
        f"{now()[:16].replace('T', ' at ')}."
    )


def _strip(
    run: Run, results: Mapping[str, Any] | None, cards: Mapping[str, list[Line]]
) -> list[tuple[str, str, list[str]]]:
    """Key figures: what, how much, and what to hold it against."""
    brief, strip = summary(run), []
    for metric, label in keys_of([brief]).items():
        value, _, interval = brief.key(metric).partition(" ")
        if value:
            where = (
                f"held-out, at step {brief.evaluation['step'].iloc[-1]}"
                if not results
                else _rival(results, metric)
            )
            strip.append((label, value, [interval, where]))
    if results:
        student, teacher = (results["models"][name]["parameters"] / 1e6 for name in ("distilled", "teacher"))
        strip.append(
            (
                "parameters",
                f"{number(student)} M",
                [f"{student / teacher:.0%} of the teacher's {number(teacher)} M"],
            )
        )
    if brief.step is not None:
        strip.append(("steps", f"{brief.step:,}", [f"of {brief.steps:,}"] if brief.steps else []))
    strip += [(name, value, []) for name, value in costs(None, brief.train, brief.evaluation).items()]
    if lines := next(iter(cards.values()), None):
        failed = [line.check for line in lines if line.passed is False]
        passed = f"{sum(line.passed is True for line in lines)} of {len(lines)} pass"
        strip.append(("scorecard", passed, [f"fails: {check}" for check in failed] or ["no check fails"]))
    return strip


def _rival(results: Mapping[str, Any], metric: str) -> str:
    name = "baseline" if "baseline" in results["models"] else "untrained"
    return f"{LABELS[name]} {with_interval(results['models'][name][metric])}"


def _reproduce(run: Run, manifest: Mapping[str, Any], verb: str) -> str:
    commit = f"git checkout {manifest['commit']}\n" if manifest.get("commit") else ""
    command = manifest.get("command", f"kd {verb} runs/{run.name}/config.yaml")
    return (
        f"{commit}{command}\n# the config above holds every setting: kd {verb} "
        f"runs/{run.name}/config.yaml does the same"
    )
