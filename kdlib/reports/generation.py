"""The page of a run that made rows: what came of its prompts, what is not kept and why, what it cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlib.filters.sift import thrown_out
from kdlib.plots.axes import few_rows
from kdlib.plots.generation import dollars, figures_of, generated, reasons_table, yield_table
from kdlib.reports import html
from kdlib.reports.run import run_content
from kdlib.runs.folder import Run
from kdlib.runs.log import duration

SAMPLES = 2  # kept rows of each category
LONGEST, LINES = 3000, 40  # characters of one text, and its lines


def render(run: Run, reports: Path) -> Path:
    """Write reports/<run>/report.html with its figures and tables; returns the page's path."""
    found = generated(run)
    pictures = {name: html.picture(figure, name) for name, figure in figures_of(found).items()}
    tables = {"yield": yield_table(found), "cost": few_rows(found.costs)}
    if found.rows["rejected"] or found.rows["failed"]:
        tables["reasons"] = reasons_table(found).set_index("reason")
    last = found.costs.iloc[-1].to_dict() if len(found.costs) else {}
    page = html.page(
        "generation.html.j2",
        pictures=pictures,
        tables=tables,
        progress=found.progress,
        counts=found.counts,
        spent=found.spent,
        each=dollars(last["usd"] / len(found.rows["kept"])) if found.spent and found.rows["kept"] else "",
        took=duration(last.get("seconds", 0.0)),
        last=last,
        left_out={"rejected": examples(found.rows["rejected"]), "failed": examples(found.rows["failed"])},
        samples=samples(found.rows["kept"]),
        asked=asked,
        cut=cut,
        **run_content(run, command="kd generate"),
    )
    return html.write(reports / run.name, page, pictures, tables)


def examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each kind of reason that holds of some, with their count and the first few of them."""
    return [kind for kind in thrown_out(rows) if kind["count"]]


def samples(kept: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The first rows of each category."""
    found: dict[str, list[Mapping[str, Any]]] = {row["category"]: [] for row in kept}
    for row in kept:
        if len(own := found[row["category"]]) < SAMPLES:
            own.append(row)
    return found


def asked(row: Mapping[str, Any]) -> str:
    """What a row's conversation was before the answer, as one text."""
    messages = [each for each in row.get("messages", []) if each["role"] != "assistant"]
    return row.get("prompt") or "\n\n".join(f"{each['role']}: {each['content']}" for each in messages)


def cut(text: str) -> str:
    """A text as far as a page has room for it."""
    shown = "\n".join(text[:LONGEST].split("\n")[:LINES])
    left = len(text) - len(shown)
    return f"{shown}\n… {left:,} characters left out" if left else text
