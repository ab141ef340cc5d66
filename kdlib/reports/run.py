"""Reports: a self-contained HTML page of a run's files, or of a comparison made by `kd compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from click import unstyle

from kdlib.config.task_rules import rules_in, shown_in
from kdlib.errors import RunError
from kdlib.metrics.bootstrap import FEW_UNITS
from kdlib.metrics.names import MEASURES
from kdlib.plots import comparison as plots
from kdlib.plots.axes import few_rows, label_of
from kdlib.plots.classification import ANSWER_FIGURES, TITLES, answer_tables
from kdlib.plots.training import run_figures
from kdlib.reports import html
from kdlib.reports.explorers import static_html
from kdlib.reports.scorecard import counted, scorecard, scorecard_table
from kdlib.reports.summary import UNREADABLE, flat, keys_of, summary
from kdlib.routing.figures import FILE, expert_figures
from kdlib.routing.tables import expert_tables, routing_table
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run
from kdlib.runs.progress import edits
from kdlib.runs.states import ILL, STATES
from kdlib.runs.verdict import critical_findings

NOT_FACTS = ("formula", "command", "stages", "doctor", "settings")  # of a manifest: told elsewhere
OWN_PLACE = ("dashboard", plots.BARS, *ANSWER_FIGURES)  # figures that stand by themselves


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html with its figures and tables; return the page's path.

    Raises:
        RunError: there is no run, or it is a benchmark's, or made rows.
    """
    if not (run.path / "config.yaml").exists():
        raise RunError(f"{run.path}: no run there, since there is no config.yaml")
    brief = summary(run)
    if brief.kind == "generation":
        raise RunError(f"{run.name} made rows: `kd report {run.name}` makes its page")
    if brief.kind:
        command = f"python -m kdlib.benchmarks --report {run.name}"
        raise RunError(f"{run.name} is a benchmark: `{command}` makes its page")
    is_readable = brief.state != UNREADABLE
    results = run.comparison if is_readable else None
    figures = run_figures(run, results) if is_readable else {}
    code = read_json(run.code / "results.json", [])
    experts = read_json(run.path / FILE, {})
    figures |= plots.code_figures(code) | (by_expert := expert_figures(experts))
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    students = {"teacher" if brief.is_teacher else label_of(brief.student): run, "baseline": run.baseline}
    cards = {
        name: lines
        for name, student in students.items()
        if is_readable and (lines := scorecard(run, student, results=results))
    }
    tables = {"metrics": few_rows(brief.train), "evaluation": few_rows(brief.evaluation)}
    tables |= plots.code_tables(code) | expert_tables(experts)
    if results:
        tables |= comparison_tables(results)
    if cards:
        tables["scorecard"] = scorecard_table(next(iter(cards.values())))
    page = html.page(
        "report.html.j2",
        brief=brief,
        unread=brief.message * (not is_readable),
        keys=keys_of([brief]),
        pictures=pictures,
        tables=tables,
        cards=cards,
        counted=counted,
        objections=critical_findings(run.manifest) or [],
        own_place=(*OWN_PLACE, *by_expert, *(f"code_{each['benchmark']}" for each in code)),
        experts=experts,
        by_expert=[*by_expert],
        routings=routing_table(experts),
        code=code,
        few_units=FEW_UNITS,
        label_of=label_of,
        **run_content(run),
        **_comparison_content(results),
    )
    return html.write(reports / run.name, page, pictures, tables)


def render_comparison(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html of a comparison by itself, with its figures and tables; return the page's path."""
    figures, tables = plots.comparison_figures(results), comparison_tables(results)
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    content = _comparison_content(results)
    words = {"few_units": FEW_UNITS, "label_of": label_of}
    page = html.page("compared.html.j2", pictures=pictures, tables=tables, **words, **content)
    return html.write(folder, page, pictures, tables)


def render_code(name: str, code: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write report.html of what models wrote for programming problems; return the page's path."""
    figures, tables = plots.code_figures(code), plots.code_tables(code)
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    words = {"few_units": FEW_UNITS, "label_of": label_of, "name": name}
    page = html.page("evaluated.html.j2", pictures=pictures, tables=tables, code=code, **words)
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
    """What templates/run.html.j2 takes: the run's files as they are; `command` makes it again."""
    manifest, status, notebooks = run.manifest, run.status, {}
    if pages := sorted(run.notebooks.glob("*.ipynb")):
        from kdlib.reports.notebook_html import notebook_html  # nbconvert takes two seconds to load

        notebooks = {path.stem: notebook_html(path) for path in pages}
    facts = {name: value for name, value in manifest.items() if name not in NOT_FACTS}
    return {
        "run": run,
        "unit": "row" if rules_in(run.settings).unit == "row" else "kept token",
        "manifest": manifest,
        "edits": edits(run),
        "means": STATES[status["state"]].means,
        "is_ill": status["state"] in ILL,
        "status": {**status, "message": unstyle(status.get("message", ""))},
        "explorers": static_html(run),
        "config": (run.path / "config.yaml").read_text(encoding="utf-8"),
        "facts": [(name.replace("_", " "), value) for name, value in flat(facts, " · ")],
        "again": f"{command} runs/{run.name}/config.yaml",
        "notebooks": notebooks,
    }


def _comparison_content(results: Mapping[str, Any] | None) -> dict[str, Any]:
    """What templates/comparison.html.j2 takes; nothing where nothing was compared."""
    if not results:
        return {}
    shown = [MEASURES[name] for name in shown_in(results)]
    return {
        "results": results,
        "message": plots.comparison_message(results),
        "decided_by": plots.decided_by(results),
        "rows": rules_in(results).rows,
        "lower": [measure.brief for measure in shown if not measure.higher_is_better],
        "bars": plots.BARS,
        "answer_figures": ANSWER_FIGURES,
        "answer_tables": TITLES,
    }
