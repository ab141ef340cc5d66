"""The report of a sweep: one self-contained page over all its trials.  It reads files; nothing calls into
it.  Imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kdlib.metrics.names import with_interval
from kdlib.reports import html as pages
from kdlib.reports.html import Picture
from kdlib.reports.summary import report_link
from kdlib.sweeps.config import METRICS
from kdlib.sweeps.figures import run_figures
from kdlib.sweeps.gains import gain_tables, gain_words, model_table, results_of, same_rows
from kdlib.sweeps.results import (
    COSTS,
    UNITS,
    WORDS,
    Sweep,
    pareto,
    setting_table,
    shown_trials,
    trial_table,
    varied,
    verdict,
)
from kdlib.sweeps.trials import described


def render(sweep: Sweep, reports: Path) -> Path:
    """Write reports/<sweep>/report.html, its figures and tables from whatever its runs have left, and
    return the page's path.
    """
    trials = trial_table(sweep)
    settings = setting_table(sweep, trials)
    gains = gain_tables(sweep, settings)
    pictures = {
        name: pages.picture(figure, name)
        for name, figure in run_figures(sweep, trials, settings, gains).items()
    }
    tables = {"trials": trials, "settings": settings, **_fronts(sweep, settings)}
    if gains:
        tables["gains"] = pd.concat(gains, names=["metric", None]).reset_index(0)
    return pages.write(
        reports / sweep.name,
        _page(sweep, trials, settings, gains, pictures, reports),
        pictures,
        tables,
        index=False,
    )


def _fronts(sweep: Sweep, settings: pd.DataFrame) -> dict[str, pd.DataFrame]:
    highest = METRICS[sweep.facts["metric"]]
    return {
        f"pareto_{cost}": pareto(settings, cost, higher_is_better=highest)
        for cost in COSTS
        if settings[cost].notna().any()
    }


def _page(
    sweep: Sweep,
    trials: pd.DataFrame,
    settings: pd.DataFrame,
    gains: Mapping[str, pd.DataFrame],
    pictures: dict[str, Picture],
    reports: Path,
) -> str:
    facts, status = sweep.facts, sweep.folder.status
    shown = shown_trials(sweep, trials)
    return pages.page(
        "sweep.html.j2",
        name=sweep.name,
        facts=facts,
        status=status,
        message=verdict(sweep, settings),
        counts=trials["state"].value_counts().to_dict(),
        best=_best(sweep, settings, reports),
        gain=_gain_of_the_best(sweep, settings, gains),
        models=pages.table(model_table(results_of(sweep, settings.iloc[0]["runs"]))) if len(settings) else "",
        same_rows=same_rows(sweep, trials.loc[trials["value"].notna(), "run"]),
        words=WORDS[facts["metric"]],
        unit=UNITS[facts["metric"]],
        columns=[name for name in shown if name not in ("run", "state", "message")],
        rows=[{**row, "link": _link(row["run"], reports)} for row in shown.to_dict("records")],
        failed=[
            row for row in shown.to_dict("records") if row["state"] not in ("done", "running", "waiting")
        ],
        pictures=list(pictures.values()),
        config=yaml.safe_dump(
            {name: value for name, value in facts["settings"].items() if value is not None},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
        ),
    )


def _gain_of_the_best(sweep: Sweep, settings: pd.DataFrame, gains: Mapping[str, pd.DataFrame]) -> str:
    """What the teacher adds in the best setting; nothing where that has no baseline."""
    metric = sweep.facts["metric"]
    if metric not in gains or gains[metric].iloc[0]["runs"] != settings.iloc[0]["runs"]:
        return ""
    return gain_words(gains[metric].iloc[0], metric)


def _best(sweep: Sweep, settings: pd.DataFrame, reports: Path) -> dict[str, Any] | None:
    """The best setting, for reading."""
    if not len(settings):
        return None
    row = settings.iloc[0]
    links = [(name, _link(name, reports)) for name in row["runs"]]
    return {
        "what": described(row[varied(sweep)]),
        "value": with_interval(row),
        "n": row["n"],
        "runs": links,
        "values": ", ".join(f"{value:.4g}" for value in row["values"]),
    }


def _link(run: str, reports: Path) -> str | None:
    """The run's report as seen from the sweep's own; None where there is none."""
    link = report_link(run, reports)
    return link and f"../{link}"
