"""A comparison for reading: its tables and figures, its part of a run's report, and the page of `kd
compare`.  Imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.config.task_rules import rules_in, shown_in
from kdlib.metrics.names import MEASURES
from kdlib.plots import comparison as plots
from kdlib.plots.answer_tables import TITLES, answer_tables
from kdlib.plots.axes import label_of
from kdlib.plots.classification import ANSWER_FIGURES
from kdlib.reports import html as pages
from kdlib.reports.html import Picture
from kdlib.runs.folder import now


def tables_of(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table of a comparison, by name."""
    return {
        "quality": plots.quality_table(results),
        "cost": plots.cost_table(results),
        "differences": plots.difference_table(results),
        **answer_tables(results),
    }


def content_of(
    results: Mapping[str, Any] | None, pictures: Mapping[str, Picture], tables: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """What templates/comparison.html.j2 takes; next to nothing where nothing was compared."""
    return {
        "comparison": pictures.get(plots.BARS),
        "answer_pictures": [pictures[name] for name in ANSWER_FIGURES if name in pictures],
        **{name: pages.table(tables[name]) for name in ("quality", "cost", "differences") if name in tables},
        "answers": {title: pages.table(tables[name]) for name, title in TITLES.items() if name in tables},
        "measured_on": _measured_on(results) if results else "",
        "samples": _samples(results) if results else [],
    }


def render(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html of a comparison by itself, its figures and tables into the folder, and return the
    page's path.
    """
    pictures = {
        name: pages.picture(figure, name) for name, figure in plots.comparison_figures(results).items()
    }
    tables = tables_of(results)
    page = pages.page(
        "compared.html.j2",
        student=results["student"],
        sources=results["sources"],
        precision=results["precision"],
        made=now()[:16].replace("T", " "),
        message=plots.comparison_message(results),
        **content_of(results, pictures, tables),
    )
    return pages.write(folder, page, pictures, tables)


def _measured_on(results: Mapping[str, Any]) -> str:
    """Of what the intervals speak, which way is better, and which students were measured."""
    what = f"{results['rows']:,} {rules_in(results).rows}"
    lower = [MEASURES[name].brief for name in shown_in(results) if not MEASURES[name].higher_is_better]
    notes = ""
    if rules_in(results).rows == "blocks":
        notes = " Blocks of one document resemble each other, so the intervals are rather too narrow."
    if "groups" in results["interval"]:
        notes = " McNemar's test takes each row by itself."
    rule = f" Measured: {results['rule']}." if "rule" in results else ""
    return (
        f"Paired on the same {what}; intervals: {results['interval']}. Lower is better: "
        f"{', '.join(lower)}.{notes}{rule}"
    )


def _samples(results: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Each prompt with what every model makes of it, by the model's name for reading."""
    return [
        (prompt, {label_of(model): texts[i] for model, texts in results["samples"].items()})
        for i, prompt in enumerate(results.get("prompts", []))
    ]
