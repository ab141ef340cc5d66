"""What one explores on real teacher output: temperature and top k, a text token by token, the course of a
training.

Each is a widget where a person sits, and a still page where nobody does (`kdlib.runs.folder.headless`) and in
reports.  Imports no torch.
"""

import base64
from collections.abc import Mapping
from typing import Any

from IPython.display import HTML
from ipywidgets import Widget
from markupsafe import escape
from matplotlib.figure import Figure

from kdlib.config.run import Config
from kdlib.errors import RunError
from kdlib.plots.axes import LABELS
from kdlib.plots.schedule_designer import as_yaml
from kdlib.plots.softening import Sight, message, softening_figure, softening_of
from kdlib.plots.tokens import heat_map, of as heat_map_of
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder, read_json
from kdlib.runs.folder import Run, headless
from kdlib.workbench.explorers import (
    HeatMapExplorer,
    ScheduleDesigner,
    TemperatureExplorer,
    course_picture,
    png,
    yaml_html,
)

SETTINGS = {
    "loss": ("weights", "curriculum", "temperature"),
    "training": ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
}
"""What makes up the course of a training, where a config gives it."""


def temperature_and_top_k(sight: Sight, config: Config) -> Widget | HTML:
    """Temperature and top k: the teacher's distribution softened and cut, at one token and over a text."""
    return (
        HTML(_temperature_page(softening_of(sight, config)))
        if headless()
        else TemperatureExplorer(sight, config)
    )


def token_heat_map(run: Run) -> Widget | HTML:
    """A held-out text token by token, or texts row by row: where the students are far from the teacher, and
    what both say.

    Raises:
        RunError: the run has no explorers.json.
    """
    facts = read_json(run.path / "explorers.json")
    if facts is None:
        raise RunError(f'run {run.name} has no explorers.json yet; call `bench.explore("distilled")` first')
    return HTML(_heat_map_of(facts, _most_trained(facts)[0])) if headless() else HeatMapExplorer(facts)


def schedule_designer(run: Run) -> Widget | HTML:
    """Warm-up, phases, weights and temperature: their curves over training, and the YAML to paste."""
    return HTML(_course_page(run)) if headless() else ScheduleDesigner(run.config, steps_of(run))


def static_html(run: Run) -> dict[str, str]:
    """The explorers without a person: title → HTML that needs no script; {} where the run has no
    explorers.json.
    """
    facts = read_json(run.path / "explorers.json")
    if facts is None:
        return {}
    return {
        "Temperature and top k": _temperature_page(facts),
        "Row by row" if heat_map_of(facts) == "rows" else "Token by token": _heat_map_page(facts),
        "Course of the training": _course_page(run),
    }


def steps_of(run: Run) -> int | None:
    """Optimizer steps of a run's training, where the dry run has counted them or the config says."""
    planned = run.config.training.get("max_steps", -1)
    return run.manifest.get("optimizer_steps") or (planned if planned > 0 else None)


def _temperature_page(facts: Mapping[str, Any]) -> str:
    about = facts["softening"], facts["temperature"], facts["top_k"]
    return _picture(softening_figure(*about), message(*about))


def _heat_map_page(facts: Mapping[str, Any]) -> str:
    """The map of the student that learned most, and the others' folded away."""
    first, *others = _most_trained(facts)
    folded = "".join(
        f"<details><summary>{escape(LABELS[name])}</summary>{heat_map(facts, name)}</details>"
        for name in others
    )
    return _heat_map_of(facts, first) + folded


def _heat_map_of(facts: Mapping[str, Any], student: str) -> str:
    return f"<p>{escape(LABELS[student])}</p>{heat_map(facts, student)}"


def _most_trained(facts: Mapping[str, Any]) -> list[str]:
    return sorted(facts["students"], key=list(LABELS).index, reverse=True)


def _course_page(run: Run) -> str:
    """A run's own course: its curves, and the lines of its config that make it."""
    own, plans = (
        run.config.as_dict(),
        [metrics.plan_table(folder) for folder in (run, StudentFolder(run.path / "dry_run"))],
    )
    settings = {
        section: {name: own[section][name] for name in names if name in own[section]}
        for section, names in SETTINGS.items()
    }
    figure = course_picture(run.config, steps_of(run), next((plan for plan in plans if len(plan)), None))
    return _picture(figure, "Learning rate, weights and temperature over the training") + yaml_html(
        as_yaml(**settings)
    )


def _picture(figure: Figure, words: str) -> str:
    encoded = base64.b64encode(png(figure, dpi=130)).decode()
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{encoded}" style="max-width:100%">'
    return f'<figure style="margin:.4rem 0">{image}</figure>'
