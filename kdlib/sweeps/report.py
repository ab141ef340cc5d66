"""The report of a sweep: one self-contained page over all its trials, from their files."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kdlib.metrics.names import MEASURES, with_interval
from kdlib.reports import html
from kdlib.sweeps.config import UNITS, WORDS
from kdlib.sweeps.figures import run_figures
from kdlib.sweeps.results import (
    COSTS,
    Sweep,
    gain_tables,
    gain_words,
    model_table,
    pareto,
    results_of,
    same_rows,
    setting_table,
    shown_trials,
    trial_table,
    verdict,
)
from kdlib.sweeps.trials import described


def render(sweep: Sweep, reports: Path) -> Path:
    """Write reports/<sweep>/report.html, its figures and tables from what its runs left; returns its path."""
    facts, metric = sweep.facts, sweep.metric
    trials = trial_table(sweep)
    settings = setting_table(sweep, trials)
    gains = gain_tables(sweep, settings)
    figures = run_figures(sweep, trials, settings, gains)
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    tables = {"trials": trials, "settings": settings}
    for cost in COSTS:
        if settings[cost].notna().any():
            higher = MEASURES[metric].higher_is_better
            tables[f"pareto_{cost}"] = pareto(settings, cost, higher_is_better=higher)
    gain, models = "", ""
    if gains:
        tables["gains"] = pd.concat(gains, names=["metric", None]).reset_index(0)
        first = gains[metric].iloc[0] if metric in gains else None
        if first is not None and first["runs"] == settings.iloc[0]["runs"]:  # else the best has no baseline
            gain = gain_words(first, metric)
    if len(settings):
        models = html.table(model_table(results_of(sweep, settings.iloc[0]["runs"])))
    shown = shown_trials(sweep, trials)
    rows = [{**row, "link": _link(row["run"], reports)} for row in shown.to_dict("records")]
    given = {name: value for name, value in facts["settings"].items() if value is not None}
    page = html.page(
        "sweep.html.j2",
        name=sweep.name,
        facts=facts,
        status=sweep.status,
        message=verdict(sweep, settings),
        counts=trials["state"].value_counts().to_dict(),
        best=_best(sweep, settings, reports),
        gain=gain,
        models=models,
        same_rows=same_rows(sweep, trials.loc[trials["value"].notna(), "run"]),
        words=WORDS[metric],
        unit=UNITS[metric],
        columns=[name for name in shown if name not in ("run", "state", "message")],
        rows=rows,
        failed=[row for row in rows if row["state"] not in ("done", "running", "waiting")],
        pictures=list(pictures.values()),
        config=yaml.safe_dump(given, sort_keys=False, allow_unicode=True, default_flow_style=None),
    )
    return html.write(reports / sweep.name, page, pictures, tables, index=False)


def _best(sweep: Sweep, settings: pd.DataFrame, reports: Path) -> dict[str, Any] | None:
    """The best setting, for reading."""
    if not len(settings):
        return None
    row = settings.iloc[0]
    return {
        "what": described(row[sweep.varied]),
        "value": with_interval(row),
        "n": row["n"],
        "runs": [(name, _link(name, reports)) for name in row["runs"]],
        "values": ", ".join(f"{value:.4g}" for value in row["values"]),
    }


def _link(run: str, reports: Path) -> str | None:
    """The run's report as seen from the sweep's own; None where there is none."""
    link = html.report_link(run, reports)
    return link and f"../{link}"
