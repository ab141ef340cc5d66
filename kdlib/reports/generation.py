"""The page of a run that made rows: what came of its prompts, what it cost, what was thrown out and why."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.filters.sift import thrown_out
from kdlib.plots.axes import legend, panels, shortened, titled
from kdlib.reports import html
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run

ENDS = {"kept": "#0072b2", "rejected": "#e69f00", "failed": "#d55e00"}
SAMPLES, EXAMPLE = 3, 400  # kept rows of each category; characters of one that was thrown out


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html with its figures and tables; returns the page's path."""
    rows = {name: rows_in(run.path / f"{name}.jsonl") for name in ENDS}
    table, costs = by_category(rows), costs_over_time(run)
    reasons = [each for each in thrown_out(rows["rejected"]) if each["count"]]
    reasons += [each | {"reason": f"failed: {each['reason']}"} for each in _failed(rows["failed"])]
    figures = {"yield": yield_figure(table), "lengths": lengths_figure(rows["kept"])} if len(table) else {}
    if len(costs) > 1 and costs["usd"].iloc[-1] > 0:
        figures["cost"] = cost_figure(costs)
    pictures = {name: html.picture(figure, name) for name, figure in figures.items()}
    tables = {"yield": table, "cost": costs}
    page = html.page(
        "generation.html.j2",
        name=run.name,
        status=run.status,
        manifest=run.manifest,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        progress=read_json(run.path / "progress.json", {}),
        pictures=pictures,
        tables=tables,
        reasons=reasons,
        samples=samples(rows["kept"]),
        example=lambda row: shortened(" ".join(_said(row).split()), EXAMPLE),
        asked=_asked,
    )
    return html.write(reports / run.name, page, pictures, tables)


def rows_in(path: Path) -> list[dict[str, Any]]:
    """A file's rows; none where it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def by_category(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """A row a category: how many of its prompts were kept, rejected, failed, and which share was kept."""
    counts = {end: Counter(row["category"] for row in found) for end, found in rows.items()}
    names = sorted(set().union(*counts.values()))
    table = pd.DataFrame({end: [counts[end][name] for name in names] for end in ENDS}, index=names)
    return table.assign(yielded=(table["kept"] / table.sum(axis=1)).round(3))


def costs_over_time(run: Run) -> pd.DataFrame:
    """Of the log: when (minutes from its beginning) how many answers had come, for how many dollars."""
    found, usd, answers = [], 0.0, 0
    for entry in rows_in(run.path / "answers.jsonl"):
        about = entry.get("answer") or entry.get("failure") or {}
        usd += about.get("cost") or (entry["at_most"] if entry["event"] == "lost" else entry.get("usd", 0.0))
        answers += entry["event"] == "answered"
        found.append({"at": entry["at"], "answers": answers, "usd": usd})
    table = pd.DataFrame(found, columns=["at", "answers", "usd"])
    times = pd.to_datetime(table.pop("at"), utc=True)
    return table.assign(minutes=(times - times.min()).dt.total_seconds() / 60)


def samples(kept: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The first rows of each category."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in kept:
        if len(own := found.setdefault(row["category"], [])) < SAMPLES:
            own.append(row)
    return found


def yield_figure(table: pd.DataFrame) -> Figure:
    """What came of each category's prompts."""
    figure, (axes,) = panels(7, 1.2 + 0.3 * len(table))
    left = np.zeros(len(table))
    for end, colour in ENDS.items():
        axes.barh(range(len(table)), table[end], left=left, color=colour, label=end)
        left += table[end].to_numpy()
    axes.set_yticks(range(len(table)), list(table.index), fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("prompts", fontsize=8)
    legend(axes, loc="lower right")
    kept = table["kept"].sum()
    return titled(figure, f"{kept} of {int(left.sum())} prompts ended in a row that is kept")


def lengths_figure(kept: Sequence[Mapping[str, Any]]) -> Figure:
    """How long the answers are that are kept."""
    lengths = [len(row["response"]) for row in kept]
    figure, (axes,) = panels(7, 2.2)
    axes.hist(lengths, bins=min(40, max(len(set(lengths)), 1)), color=ENDS["kept"])
    axes.set_xlabel("characters of an answer", fontsize=8)
    axes.set_ylabel("rows", fontsize=8)
    middle = f"half of them are longer than {np.median(lengths):,.0f} characters" if lengths else "none yet"
    return titled(figure, f"Answers that are kept: {middle}")


def cost_figure(costs: pd.DataFrame) -> Figure:
    """Dollars over time, everything counted."""
    figure, (axes,) = panels(7, 2.2)
    axes.step(costs["minutes"], costs["usd"], where="post", color=ENDS["kept"])
    axes.set_xlabel("minutes since the first request", fontsize=8)
    axes.set_ylabel("dollars", fontsize=8)
    last = costs.iloc[-1]
    each = f", {last['usd'] / last['answers']:.5f} an answer" if last["answers"] else ""
    return titled(figure, f"${last['usd']:.4f} for {last['answers']:,.0f} answers{each}")


def _failed(failed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    of: dict[str, list[Mapping[str, Any]]] = {}
    for row in failed:
        of.setdefault(row["reason"].partition(":")[0], []).append(row)
    return [{"reason": why, "count": len(rows), "examples": rows[:SAMPLES]} for why, rows in of.items()]


def _asked(row: Mapping[str, Any]) -> str:
    """The last that a row's user said."""
    if "prompt" in row:
        return row["prompt"]
    return next(each["content"] for each in reversed(row["messages"]) if each["role"] == "user")


def _said(row: Mapping[str, Any]) -> str:
    """What there is to see of a row that is not kept."""
    return row.get("response") or _asked(row)
