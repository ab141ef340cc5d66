"""The report of a sweep: one self-contained page over all its trials, from their files."""

from functools import partial
from pathlib import Path

import pandas as pd

from kdlib.config.sections import as_yaml
from kdlib.metrics.names import with_interval
from kdlib.reports import html
from kdlib.runs.states import ILL
from kdlib.sweeps import results
from kdlib.sweeps.cautions import findings
from kdlib.sweeps.figures import run_figures
from kdlib.sweeps.results import COSTS, Sweep
from kdlib.sweeps.trials import described


def render(sweep: Sweep, reports: Path) -> Path:
    """Write reports/<sweep>/report.html, its figures and tables from what its runs left; returns its path."""
    facts, metric, measure = sweep.facts, sweep.metric, sweep.measure
    trials = results.trial_table(sweep)
    settings = results.setting_table(sweep, trials)
    gains = results.gain_tables(sweep, settings)
    figures = run_figures(sweep, trials, settings, gains)
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    tables = {"trials": trials, "settings": settings}
    for cost in COSTS:
        if settings[cost].notna().any():
            tables[f"pareto_{cost}"] = results.pareto(settings, cost, measure)
    gain, models = "", ""
    if len(settings):
        best = settings.iloc[0]
        models = html.table(results.model_table(results.results_of(sweep, best["runs"])))
    if gains:
        tables["gains"] = pd.concat(gains, names=["metric", None]).reset_index(0)
        if metric in gains and gains[metric].iloc[0]["runs"] == best["runs"]:  # else the best has no baseline
            gain = results.gain_words(gains[metric].iloc[0], metric)
    shown = results.shown_trials(sweep, trials)
    rows = shown.to_dict("records")
    given = {name: value for name, value in facts["settings"].items() if value is not None}
    page = html.page(
        "sweep.html.j2",
        name=sweep.name,
        facts=facts,
        status=sweep.status,
        found=findings(sweep, trials, settings),
        counts_of_gains=html.table(results.counts_table(gains)) if gains else "",
        counts=trials["state"].value_counts().to_dict(),
        best={**best, "what": described(best[sweep.varied])} if len(settings) else None,
        with_interval=with_interval,
        link=partial(html.report_link, reports=reports),
        gain=gain,
        models=models,
        same_rows=results.same_rows(sweep, trials.loc[trials["value"].notna(), "run"]),
        measure=measure,
        columns=[name for name in shown if name not in ("run", "state", "message")],
        rows=rows,
        failed=[row for row in rows if row["state"] in ILL],
        pictures=list(pictures.values()),
        config=as_yaml(given, default_flow_style=None),
    )
    return html.write(reports / sweep.name, page, pictures, tables, index=False)
