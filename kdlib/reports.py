"""Reports: one self-contained HTML page per run, and an index over all runs.  They read files; nothing calls into them.

Text from data and models is escaped, and a content-security policy forbids scripts and outside requests besides.
"""

import base64
import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from kdlib import plots
from kdlib.benchmarks import figures as benchmark_figures
from kdlib.benchmarks import reading
from kdlib.benchmarks.targets import target_table, verdict
from kdlib.diagnostics.scorecard import Line, scorecard, scorecard_table
from kdlib.errors import RunError
from kdlib.metrics import eval_table, training_table
from kdlib.runs import Run, all_runs, read_json, write_error, write_text

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = {"summary": "Summary", "scorecard": "Scorecard", "figures": "Figures", "measurements": "Measurements",
            "differences": "Differences", "samples": "Continuations", "config": "Config", "environment": "Environment",
            "reproduce": "Reproduce", "notebooks": "Notebooks"}
DPI = 130


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html, its figures and tables from whatever the run has left, and return the page's path."""
    if not (run.path / "config.yaml").exists():
        raise RunError(f"{run.path}: no run there, since there is no config.yaml")
    results = read_json(run.path / "comparison_results.json")
    benchmark = reading.results_of(run)
    figures = benchmark_figures.run_figures(benchmark) if benchmark else plots.run_figures(run, results)
    tables = {"metrics": training_table(run), "evaluation": eval_table(run)}
    if benchmark:
        tables = {"targets": target_table(benchmark), **reading.run_tables(benchmark)}
    if results:
        tables |= {"quality": plots.quality_table(results), "cost": plots.cost_table(results),
                   "differences": plots.difference_table(results)}
    students = {"distilled student": run, "baseline": run.baseline}
    cards = {name: lines for name, student in students.items() if (lines := scorecard(run, student))}
    if "distilled student" in cards:
        tables["scorecard"] = scorecard_table(cards["distilled student"])
    folder = reports / run.name
    images = {name: _png(figure) for name, figure in figures.items()}
    embedded = {name: base64.b64encode(image).decode() for name, image in images.items()}
    page = _page("report.html.j2", **_content(run, results, benchmark, tables, cards), figures=embedded)
    try:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            (folder / "figures" / f"{name}.png").write_bytes(image)
        for name, table in tables.items():
            table.to_csv(folder / "tables" / f"{name}.csv")
        write_text(folder / "report.html", page)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder / "report.html"


def render_index(runs: Path, reports: Path) -> Path:
    """Write reports/index.html over all runs, and return its path."""
    try:
        reports.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(reports, error) from error
    write_text(reports / "index.html", _page("index.html.j2", rows=[_row(run, reports) for run in all_runs(runs)]))
    return reports / "index.html"


def notebook_html(path: Path) -> str:
    """An executed notebook as HTML: prose and results, code folded away."""
    exporter = HTMLExporter(template_name="notebook", extra_template_basedirs=[str(TEMPLATES)])
    body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
    return body


def _content(
    run: Run, results: dict | None, benchmark: dict | None, tables: dict[str, pd.DataFrame], cards: dict[str, list[Line]]
) -> dict[str, Any]:
    manifest = run.manifest
    prompts = results["prompts"] if results else []
    samples = [(prompt, {model: texts[i] for model, texts in results["samples"].items()}) for i, prompt in enumerate(prompts)]
    notebooks = {path.stem: Markup(notebook_html(path)) for path in sorted(run.notebooks.glob("*.ipynb"))}
    measured = {name: _table(reading.shown(table)) for name, table in tables.items()} if benchmark else {}
    present = {"scorecard": cards, "figures": benchmark or len(tables["metrics"]), "measurements": measured, "differences": results,
               "samples": samples, "notebooks": notebooks}
    facts = {k: v for k, v in manifest.items() if k not in ("formula", "command", "stages")} | (benchmark or {}).get("machine", {})
    return {
        "run": run, "status": run.status, "manifest": manifest, "labels": plots.LABELS, "samples": samples, "notebooks": notebooks,
        "cards": cards,
        "sections": [(id, name) for id, name in SECTIONS.items() if present.get(id, True)],
        "message": plots.comparison_message(results) if results else verdict(benchmark) if benchmark else "",
        **{name: _table(tables.get(name)) for name in ("quality", "cost", "differences")},
        "config": (run.path / "config.yaml").read_text(encoding="utf-8"),
        "facts": list(_flat(facts)), "measured": measured,
        "reproduce": _reproduce(run, manifest, "bench" if benchmark else "run"),
    }


def _reproduce(run: Run, manifest: dict, verb: str) -> str:
    commit = f"git checkout {manifest['commit']}\n" if manifest.get("commit") else ""
    command = manifest.get("command", f"kd {verb} runs/{run.name}/config.yaml")
    return f"{commit}{command}\n# the config above holds every setting: kd {verb} runs/{run.name}/config.yaml does the same"


def _row(run: Run, reports: Path) -> dict[str, Any]:
    results, manifest = read_json(run.path / "comparison_results.json"), run.manifest
    distilled = (results or {}).get("models", {}).get("distilled", {})
    figures = {m: plots.with_interval(distilled[m]) if m in distilled else "" for m in ("kl_to_teacher", "agreement", "perplexity")}
    link = f"{quote(run.name)}/report.html" if (reports / run.name / "report.html").exists() else None
    return {"name": run.name, "created": manifest.get("created", "")[:16].replace("T", " "), "state": run.status["state"], "link": link,
            "steps": manifest.get("optimizer_steps", ""), **figures}


def _page(template: str, **content: Any) -> str:
    environment = Environment(loader=PackageLoader("kdlib"), autoescape=True, trim_blocks=True)
    style = (TEMPLATES / "style.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
    return environment.get_template(template).render(style=Markup(style), **content)


def _table(table: pd.DataFrame | None) -> Markup | None:
    return None if table is None else Markup(table.rename_axis(None).to_html(border=0, escape=True, justify="left"))


def _flat(nested: dict, prefix: str = ""):
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} · ")
        else:
            yield prefix + name.replace("_", " "), value


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
