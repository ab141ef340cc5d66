"""The report of a sweep: one self-contained page over all its trials.  It reads files; nothing calls into it.  Imports no torch."""

import base64
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from kdlib.plots import with_interval
from kdlib.runs import write_error, write_text
from kdlib.sweeps.figures import run_figures
from kdlib.sweeps.reading import COSTS, UNITS, WORDS, Sweep, pareto, setting_table, shown_trials, trial_table, varied, verdict
from kdlib.sweeps.settings import METRICS
from kdlib.sweeps.trials import described

DPI = 130
ALT = {
    "ranking": "every setting with its interval, the best first", "course": "the metric over the parameter",
    "map": "the metric over two parameters", "parallel_coordinates": "a line a run through its parameters to the metric",
    "pareto": "the metric against the cost; the line joins what nothing else beats in both",
}


def render(sweep: Sweep, reports: Path) -> Path:
    """Write reports/<sweep>/report.html, its figures and tables from whatever its runs have left, and return the page's path."""
    trials = trial_table(sweep)
    settings = setting_table(sweep, trials)
    images = {name: _png(figure) for name, figure in run_figures(sweep, trials, settings).items()}
    tables = {"trials": trials, "settings": settings, **_fronts(sweep, settings)}
    folder = reports / sweep.name
    page = _page(sweep, trials, settings, images, reports)
    try:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            (folder / "figures" / f"{name}.png").write_bytes(image)
        for name, table in tables.items():
            table.to_csv(folder / "tables" / f"{name}.csv", index=False)
        write_text(folder / "report.html", page)
    except OSError as error:
        raise write_error(folder, error) from error
    return folder / "report.html"


def _fronts(sweep: Sweep, settings: pd.DataFrame) -> dict[str, pd.DataFrame]:
    highest = METRICS[sweep.facts["metric"]]
    return {f"pareto_{cost}": pareto(settings, cost, higher_is_better=highest) for cost in COSTS if len(settings)}


def _page(sweep: Sweep, trials: pd.DataFrame, settings: pd.DataFrame, images: dict[str, bytes], reports: Path) -> str:
    facts, status = sweep.facts, sweep.folder.status
    shown = shown_trials(sweep, trials)
    environment = Environment(loader=PackageLoader("kdlib"), autoescape=True, trim_blocks=True)
    style = (Path(__file__).parent.parent / "templates" / "style.css").read_text()
    return environment.get_template("sweep.html.j2").render(
        style=Markup(style), name=sweep.name, facts=facts, status=status, message=verdict(sweep, settings),
        counts=trials["state"].value_counts().to_dict(), best=_best(sweep, settings),
        words=WORDS[facts["metric"]], unit=UNITS[facts["metric"]],
        columns=[name for name in shown if name not in ("run", "state", "message")],
        rows=[{**row, "link": _link(row["run"], reports)} for row in shown.to_dict("records")],
        failed=[row for row in shown.to_dict("records") if row["state"] not in ("done", "running", "waiting")],
        figures={name: (ALT[name], base64.b64encode(image).decode()) for name, image in images.items()},
        config=yaml.safe_dump({name: value for name, value in facts["settings"].items() if value is not None}, sort_keys=False,
                              allow_unicode=True, default_flow_style=None),
    )


def _best(sweep: Sweep, settings: pd.DataFrame) -> dict[str, Any] | None:
    """The best setting, for reading."""
    if not len(settings):
        return None
    row = settings.iloc[0]
    links = [(name, quote(f"../{name}/report.html")) for name in row["runs"]]
    return {"what": described(row[varied(sweep)]), "value": with_interval(row), "n": row["n"], "runs": links,
            "values": ", ".join(f"{value:.4g}" for value in row["values"])}


def _link(run: str, reports: Path) -> str | None:
    page = os.path.join(run, "report.html")
    return quote(f"../{page}") if (reports / page).exists() else None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
