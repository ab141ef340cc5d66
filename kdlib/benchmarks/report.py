"""The report of a study: one self-contained page with its figures and tables, from its files."""

from pathlib import Path

from kdlib.benchmarks.figures import run_figures
from kdlib.benchmarks.results import results_of, run_tables, shown, verdict
from kdlib.errors import RunError
from kdlib.reports import html
from kdlib.reports.run import run_content
from kdlib.reports.summary import flat
from kdlib.runs.folder import Run


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html, its figures and tables from what the study found; returns its path.

    Raises:
        RunError: there is no study.
    """
    if not (run.path / "config.yaml").exists():
        raise RunError(f"{run.path}: no study there, since there is no config.yaml")
    results = results_of(run) or {"heads": {}, "steps": {}}
    pictures = {name: html.picture(figure, name) for name, figure in run_figures(results).items()}
    tables = run_tables(results) if results["heads"] or results["steps"] else {}
    content = run_content(run, command="python -m kdlib.benchmarks")
    machine = [(name, value) for name, value in flat(results.get("machine", {}), " · ")]
    content["facts"] = [*content["facts"], *machine]
    page = html.page(
        "benchmark.html.j2",
        message=verdict(results) if tables else "",
        pictures=list(pictures.values()),
        measured={name: html.table(shown(table)) for name, table in tables.items()},
        **content,
    )
    return html.write(reports / run.name, page, pictures, tables)
