"""What kdlib.workbench.explorers shows, as still pages: HTML that needs no script."""

import base64
import os
from collections.abc import Mapping
from typing import Any

from markupsafe import escape
from matplotlib.figure import Figure

from kdlib.errors import KdlibError, RunError
from kdlib.plots.axes import LABELS, png
from kdlib.plots.schedules import as_yaml, schedules_of
from kdlib.plots.softening import message, softening_figure
from kdlib.plots.tokens import heat_map, of
from kdlib.reports.html import page
from kdlib.runs.files import StudentFolder, read_json
from kdlib.runs.folder import Run
from kdlib.runs.log import plan_table

SETTINGS = {  # what makes up the schedules of a training, where a config gives it
    "loss": ("weights", "curriculum", "temperature"),
    "training": ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
}
NEEDED = ("softening", "temperature", "top_k", "tokens", "teacher", "students")


def static_html(run: Run) -> dict[str, str]:
    """Title → page, of each explorer; {} without an explorers.json; what is faulty in one, if anything."""
    try:
        return _pages(run)
    except KdlibError as error:  # torn, or the config is of another version
        return {"Explorers": f"<p>{escape(str(error).replace(f'{run.path}{os.sep}', ''))}</p>"}


def facts_of(run: Run) -> dict[str, Any]:
    """explorers.json; {} where there is none.

    Raises:
        RunError: it is torn, or lacks what the explorers draw.
    """
    path = run.path / "explorers.json"
    if not (facts := read_json(path)):
        return {}
    known = facts if isinstance(facts, dict) else {}
    if missing := [name for name in NEEDED if known.get(name, {}) == {}]:
        do = "delete it, and run the cells that explore again"
        raise RunError(f"{path}: found no {', '.join(missing)}, of what the explorers draw; {do}")
    return facts


def _pages(run: Run) -> dict[str, str]:
    if not (facts := facts_of(run)):
        return {}
    first, *others = most_trained(facts)
    folded = (f"<details><summary>{LABELS[n]}</summary>{heat_map(facts, n)}</details>" for n in others)
    by = "Row by row" if of(facts) == "rows" else "Token by token"
    return {
        "Temperature and top k": softening_page(facts),
        by: heat_map_page(facts, first) + "".join(folded),
        "Schedules of the training": schedules_page(run),
    }


def softening_page(facts: Mapping[str, Any]) -> str:
    """What the config's temperature and top k do to the teacher."""
    about = facts["softening"], facts["temperature"], facts["top_k"]
    return _picture(softening_figure(*about), message(*about))


def heat_map_page(facts: Mapping[str, Any], student: str) -> str:
    """The text in colours, under the student's name."""
    return f"<p>{escape(LABELS[student])}</p>{heat_map(facts, student)}"


def schedules_page(run: Run) -> str:
    """A run's own schedules, and the lines of its config that make them."""
    plans = [plan_table(each) for each in (run, StudentFolder(run.path / "dry_run"))]
    own, plan = run.config.as_dict(), next((plan for plan in plans if len(plan)), None)
    settings = {part: {n: own[part][n] for n in names if n in own[part]} for part, names in SETTINGS.items()}
    figure = schedules_of(run.config, steps_of(run), plan)
    picture = _picture(figure, "Learning rate, weights and temperature over the training")
    return picture + yaml_html(as_yaml(settings))


def most_trained(facts: Mapping[str, Any]) -> list[str]:
    """The students of explorers.json, the one that learned most first."""
    return sorted(facts["students"], key=list(LABELS).index, reverse=True)


def steps_of(run: Run) -> int | None:
    """Optimizer steps of a run's training, where the dry run has counted them or the config says."""
    planned = run.config.training.get("max_steps", -1)
    return run.manifest.get("optimizer_steps") or (planned if planned > 0 else None)


def yaml_html(text: str) -> str:
    """To be selected and copied."""
    return page("explorer.html.j2", yaml=text)


def _picture(figure: Figure, words: str) -> str:
    encoded = base64.b64encode(png(figure, dpi=130)).decode()
    return page("explorer.html.j2", png=encoded, words=words)
