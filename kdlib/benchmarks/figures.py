"""Figures of a benchmark, one message each, stated in the title from the figures themselves; and its page.
Imports no torch.

Ours blue, other packages orange, naive light grey, what cannot be avoided a dashed line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kdlib.benchmarks.results import (
    Lines,
    memory_table,
    ratio,
    results_of,
    run_tables,
    shown,
    step_table,
    time_table,
    verdict,
)
from kdlib.benchmarks.settings import CASES, CONTENDERS
from kdlib.errors import RunError
from kdlib.plots.axes import COLOURS, intervals
from kdlib.reports import html
from kdlib.reports.run import run_content
from kdlib.reports.summary import flat
from kdlib.runs.folder import Run

PEER = COLOURS["baseline"]


def run_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that the results allow, by the name of its table."""
    figures = {}
    for dtype, part in results["heads"].items():
        figures |= {f"time_{dtype}": times(results, dtype)} if part.get("rounds") else {}
        figures |= {f"memory_{dtype}": memory(results, dtype)} if part.get("memory") else {}
    return figures | {f"steps_{precision}": steps(results, precision) for precision in results["steps"]}


def times(results: Mapping[str, Any], dtype: str) -> Figure:
    """Each case's time over naive's; the floor is a line."""
    part, table = results["heads"][dtype], time_table(results, dtype)
    to = "÷ naive" if "÷ naive" in table else f"{'CPU' if 'CPU s' in table else 'wall'} s"
    floor = CASES["floor"]
    title = _sentence(
        table,
        f"In {dtype}, KD + CE takes ",
        {"÷ naive": "naive's time", "÷ floor": "that of the matrix products alone"},
    )
    figure = _bars(table.drop(index=[floor], errors="ignore"), to, title)
    clock = "CPU" if "CPU s" in table else "wall"
    label = f"{clock} time {to}" if to.startswith("÷") else f"{clock} time, s"
    figure.axes[0].set_xlabel(f"{label}: {_rounds(part['rounds'])}; {part['tokens']:,} tokens")
    if floor in table.index:
        _line(figure, table.loc[floor, to], floor)
    return figure


def memory(results: Mapping[str, Any], dtype: str) -> Figure:
    """Each case's peak memory above its inputs."""
    table = memory_table(results, dtype)
    figure = _bars(
        table,
        "above inputs, MB",
        _sentence(table, f"In {dtype}, KD + CE needs ", {"÷ naive": "naive's peak memory"}),
    )
    figure.axes[0].set_xlabel(
        f"peak memory above the inputs, MB; {results['heads'][dtype]['tokens']:,} tokens unless said"
    )
    return figure


def steps(results: Mapping[str, Any], precision: str) -> Figure:
    """Seconds per whole training step; what the matrix products take at the machine's measured peak is a
    line.
    """
    part, table = results["steps"][precision], step_table(results, precision)
    title = f"A whole training step in {precision}"
    both = ratio(part["rounds"], "ours_kd", ("teacher", "trainer_sft"), "wall_s")
    gkd = ratio(part["rounds"], "trl_gkd", "ours_kd", "wall_s")
    if both:
        title = (
            f"In {precision}, a KD step takes {both['value']:.2f} × the teacher's forward pass and an "
            "SFT step together"
        )
    if gkd:
        title += f";\nTRL's GKDTrainer takes {gkd['value']:.2f} × ours"
    *contenders, floor = table.index
    figure = _bars(table.loc[contenders], "s per step", title)
    figure.axes[0].set_xlabel(
        f"wall time per step, s: {_rounds(part['rounds'])}; {part['tokens']:,} tokens a step"
    )
    _line(figure, table.loc[floor, "s per step"], floor)
    return figure


def _sentence(table: pd.DataFrame, start: str, parts: Mapping[str, str]) -> str:
    """`… 0.92 × naive's time and 1.08 × that of …`, from the row of ours."""
    ours = CASES["ours"]
    known = [
        f"{table.loc[ours, column]:.2f} × {words}"
        for column, words in parts.items()
        if column in table and ours in table.index
    ]
    return start + " and ".join(known) if known else start.split(",")[0] + ": each case"


def _bars(table: pd.DataFrame, column: str, title: str) -> Figure:
    figure = Figure(figsize=(8, 1.2 + 0.27 * len(table)), layout="constrained")
    axes = figure.subplots()
    values = table[column].astype(float)
    low, high = (table.get(f"{column}, {end}", values).astype(float) for end in ("low", "high"))
    positions = range(len(table))
    axes.barh(positions, values, color=[_colour(label) for label in table.index])
    found = {"value": values, "low": low, "high": high}
    intervals(axes, positions, found, lying=True, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for position, (value, end) in enumerate(zip(values, high, strict=True)):
        axes.text(
            end, position, f"  {value:.3g}" if value < 1000 else f"  {value:,.0f}", va="center", fontsize=8
        )
    axes.set_yticks(positions, table.index, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _line(figure: Figure, value: float, label: str) -> None:
    axes = figure.axes[0]
    axes.axvline(value, color="black", linestyle="--", linewidth=1)
    left = value < sum(axes.get_xlim()) / 2  # the words go where there is room
    axes.text(
        value,
        1,
        f" {label}: {value:.3g} ",
        transform=axes.get_xaxis_transform(),
        va="bottom",
        ha="left" if left else "right",
        fontsize=8,
    )


def _rounds(lines: Lines) -> str:
    count = len({line["round"] for line in lines})
    return f"median, lowest and highest of {count} rounds" if count > 1 else "one round"


def _colour(label: str) -> str:
    if label.startswith("ours"):
        return COLOURS["distilled"]
    if label.startswith(("TRL", "Liger", "torchtune")):
        return PEER
    return COLOURS["teacher"] if label == CONTENDERS["teacher"] else COLOURS["untrained"]


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
