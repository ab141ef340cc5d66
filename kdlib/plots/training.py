"""The picture of a training: panels above each other on one x axis."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from kdlib.errors import ConfigError
from kdlib.metrics.names import called_student
from kdlib.plots.axes import INK, SHADE, SOFT, shortened
from kdlib.plots.comparison import LEARNED, comparison_figures, learning_curves
from kdlib.plots.training_panels import HELD_OUT, PANELS, TRAIN, Panel, Scene, View
from kdlib.runs.folder import Run
from kdlib.runs.log import eval_table, training_table
from kdlib.runs.progress import Progress, headline, held_out_line, progress, where_line

WIDTH, LEFT, RIGHT, HEAD, FOOT, GAP, EPOCHS, BLANK = 8.0, 0.92, 0.3, 1.62, 0.5, 0.36, 0.44, 1.0  # inches
LETTERS = 104  # that a line of the head holds


def run_figures(run: Run, results: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Every figure that the files of a run allow, by name: for notebook and report alike."""
    evaluation = eval_table(run)
    figures = comparison_figures(results) if results else {}
    if len(training_table(run)):
        with suppress(ConfigError):  # of another version: its report says so
            others = [progress(run, run.baseline)] if len(training_table(run.baseline)) else []
            figures["dashboard"] = dashboard(progress(run), others=others)
    if any(name in evaluation for name in LEARNED):
        who = "teacher" if run.manifest.get("teacher_stage") else called_student(run.settings.get("teacher"))
        tables = {who: evaluation, "baseline": eval_table(run.baseline)}
        figures["learning_curves"] = learning_curves({n: table for n, table in tables.items() if len(table)})
    return figures


def dashboard(training: Progress, view: View | None = None, others: Sequence[Progress] = ()) -> Figure:
    """The whole picture of a training, with other trainings behind it, dashed."""
    scene = Scene(training, view or View(), others)
    panels = [panel for panel in PANELS if (panel.needs or panel.name) in scene.train]
    tall = HEAD + sum(panel.height + GAP for panel in panels) - GAP + FOOT if panels else BLANK
    figure = Figure(figsize=(WIDTH, tall), facecolor="white")
    # which run, how it stands, and what it said, or has reached
    said = training.message or (held_out_line(training) if panels else "")
    lines = (headline(training), where_line(training), said)
    for text, at, size in zip(lines, (0.3, 0.55, 0.77), (12, 9.5, 9.5), strict=True):
        shown = shortened(text.strip().partition("\n")[0], LETTERS)
        look = {"fontsize": size, "fontweight": "bold" if size == 12 else "normal", "color": INK}
        figure.text(LEFT / WIDTH, 1 - at / tall, shown, parse_math=False, **look)
    if not panels:
        return figure
    top, first = HEAD, None
    for panel in panels:
        box = (LEFT / WIDTH, 1 - (top + panel.height) / tall, 1 - (LEFT + RIGHT) / WIDTH, panel.height / tall)
        axes = figure.add_axes(box, sharex=first, label=panel.name)
        _draw(panel, scene, axes, title_above=GAP / 6 if first else EPOCHS)
        first, top = first or axes, top + panel.height + GAP
    _steps_and_epochs(scene, first, axes)
    _legend(figure, scene)
    return figure


def _draw(panel: Panel, scene: Scene, axes: Axes, *, title_above: float) -> None:
    """A panel in its axes; log only where there is something above 0 to show."""
    axes.set_ylabel(panel.unit.replace("per token", f"per {scene.training.of}"), fontsize=8, color=SOFT)
    axes.yaxis.set_label_coords(-0.6 / (WIDTH - LEFT - RIGHT), 0.5)  # the same for all: aligned
    axes.tick_params(labelsize=8, labelbottom=False, length=3, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.grid(axis="y", color="#ececec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.07)
    title = panel.draw(scene, axes)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, y=1.0, pad=72 * title_above)
    data, ticks = axes.dataLim, max(2, round(panel.height / 0.28))
    is_log = panel.log and scene.view.log and data.minposy < float("inf")
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero:
        axes.update_datalim([(scene.span[0], 0)])
        axes.set_ylim(bottom=0 if data.y0 == 0 else None)
    is_wide = is_log and data.y1 > 5 * data.minposy
    by_decade, evenly = LogLocator(subs=(1, 2, 5), numticks=ticks), MaxNLocator(min(ticks, 5))
    axes.yaxis.set_major_locator(by_decade if is_wide else evenly)
    axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else panel.form.format(value))
    _phases(scene, axes, named=panel.name == "weights")


def _phases(scene: Scene, axes: Axes, *, named: bool) -> None:
    """Where the curriculum's phases end; in one panel shaded, and by name."""
    ends = [0.0, *(until * scene.training.steps for until, _ in scene.training.phases)]
    for end in ends[1:-1]:
        axes.axvline(end, color=SOFT, linewidth=0.6, zorder=0)
    for number, (start, end) in enumerate(pairwise(ends) if named else (), start=1):
        axes.axvspan(start, end, color=SHADE if number % 2 else "white", zorder=0)
        look = {"fontsize": 7, "color": SOFT, "va": "top", "annotation_clip": True}
        axes.annotate(f" phase {number}", (start, 1), xycoords=axes.get_xaxis_transform(), **look)


def _steps_and_epochs(scene: Scene, first: Axes, last: Axes) -> None:
    """Steps below the last panel, epochs above the first."""
    first.set_xlim(*scene.span)
    first.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    first.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    last.set_xlabel("optimizer step", fontsize=9, color=INK)
    last.tick_params(labelbottom=True)
    per_step = scene.train["epoch"].iloc[-1] / max(scene.training.step, 1) or 1.0
    above = first.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    above.tick_params(labelsize=8, length=3, color=SOFT)
    above.set_xlabel("epoch", fontsize=8, color=SOFT)
    above.spines["top"].set_color(SOFT)


def _legend(figure: Figure, scene: Scene) -> None:
    handles = [
        *(Patch(color=scene.colours[term], label=term) for term in scene.terms),
        Line2D([], [], color=TRAIN, label="training loss"),
        Line2D([], [], color=HELD_OUT, marker="o", markersize=3.5, label="held-out loss"),
        *[Line2D([], [], color=SOFT, linewidth=0.8, label="as planned")][: len(scene.training.plan)],
        *(
            Line2D([], [], color=SOFT, label=name, linestyle=look["linestyle"])
            for name, _, look in scene.dashed
        ),
    ]
    at = (LEFT / WIDTH - 0.004, 1 - 0.88 / figure.get_figheight())
    look = {"ncols": 9, "frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1.4}
    close = {"borderpad": 0, "borderaxespad": 0, "columnspacing": 1.2, "handletextpad": 0.5}
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=at, **look, **close)
