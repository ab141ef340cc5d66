"""A run seen live, in the notebook where it goes on or in any other: from the run's files alone.

with dashboard.watch(bench.run):       # the picture moves while the cell trains
    bench.train()
dashboard.watch("runs/<run>")          # as a last line: a run that goes on elsewhere, or is over

A training has controls where somebody can use them; a run that makes rows is a picture everywhere.
"""

import contextvars
import os
import threading
import time
from dataclasses import replace
from functools import cache

import ipywidgets
from IPython import get_ipython
from IPython.display import Image, display
from markupsafe import escape

from kdlib.errors import KdlibError
from kdlib.plots import generation
from kdlib.plots.axes import png
from kdlib.plots.training import dashboard
from kdlib.plots.training_panels import View
from kdlib.reports.html import page
from kdlib.reports.scorecard import Line, scorecard
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail
from kdlib.runs.progress import headline, progress, where_line

SHARE = 0.05  # of the time, at most, that goes into watching
PAUSE_S, HEADLESS_PAUSE_S = 1.0, 20.0  # between two looks, at least
PATIENCE_S = 3600.0  # without news, after which nobody is waited for any more
PICTURE = {"min_width": "0", "max_width": "800px", "object_fit": "contain", "align_self": "flex-start"}
LATE = {"continuous_update": False}  # a slider speaks when it is let go


def watch(run: Run | str, view: View | None = None) -> "Dashboard":
    """A run's dashboard, by its name or its folder as seen from the project's; `view` is shown at first.

    Raises:
        RunError: there is no such run.
    """
    if not isinstance(run, Run):
        run = runs.open_run(*runs.locate(str(runs.project_root() / run) if os.sep in run else run))
    makes_rows = run.manifest.get("kind") == "generation"
    return Dashboard(LiveGeneration(run) if makes_rows else LiveRun(run, view or View()))


class LiveRun:
    """What is seen of a run, kept up to date from its files."""

    def __init__(self, run: Run, view: View) -> None:
        self.run, self.view, self.tail = run, view, cache(Tail)
        # what it can be compared with, each the run and its folder
        self.candidates = {"baseline": (run, run.baseline)} if run.config.baseline else {}
        self.rivals = tuple(self.candidates)
        others = (each for each in runs.all_runs(run.path.parent) if each.name != run.name)
        self.candidates |= {each.name: (each, each) for each in others if each.metrics.exists()}
        self.has_ended = False  # what trained in this kernel
        self.words: tuple[str, ...] = ()
        self.read()

    @property
    def is_training(self) -> bool:
        """Whether one of the run's students seems to learn just now."""
        return "running" in (self.progress.state, progress(self.run, self.run.baseline).state)

    def read(self) -> bool:
        """Read on; True where there is something new to show."""
        before, rivals = self.words, [self.candidates[name][1] for name in self.rivals]
        is_new = [self.tail(folder).read() for folder in (self.run, *rivals)]
        self.progress = progress(self.run, tail=self.tail(self.run))
        if self.has_ended and self.progress.state == "running":
            self.progress = replace(self.progress, state="stopped")  # who runs the notebooks will say so
        self.words = (headline(self.progress), where_line(self.progress), self.progress.message)
        return any(is_new) or self.words != before

    @property
    def headline(self) -> str:
        return headline(self.progress)

    def png(self) -> bytes:
        rivals = (self.candidates[name] for name in self.rivals)
        shown = [progress(run, folder, self.tail(folder)) for run, folder in rivals]
        return png(dashboard(self.progress, self.view, [each for each in shown if len(each.tail.train)]))

    def scorecard(self) -> list[Line]:
        return scorecard(self.run, tail=self.tail(self.run))


class LiveGeneration:
    """The same of a run that makes rows."""

    is_training = has_ended = False

    def __init__(self, run: Run) -> None:
        self.run, self.changed = run, (0,)
        self.read()

    def read(self) -> bool:
        files = [self.run.path / name for name in ("answers.jsonl", "progress.json", "status.json")]
        before, self.changed = self.changed, tuple(file.stat().st_mtime_ns for file in files if file.exists())
        if is_new := self.changed != before:
            self.found = generation.generated(self.run)
        return is_new

    @property
    def headline(self) -> str:
        return generation.headline(self.found)

    def png(self) -> bytes:
        return png(generation.live_figure(self.found))


class Dashboard:
    """A picture that follows its run, with controls where somebody is there to use them."""

    def __init__(self, live: LiveRun | LiveGeneration) -> None:
        self.live = live
        self.drawing, self.ended = threading.RLock(), threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "Dashboard":
        self._show()
        self._follow()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.has_ended = True
        self.close()

    def _ipython_display_(self) -> None:
        self._show()
        if not runs.headless():
            self._follow()

    def close(self) -> None:
        """Look for the last time, and follow the run no more."""
        self.ended.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()
        self.refresh(always=True)

    def refresh(self, *, always: bool = False) -> bool:
        """Read on and draw what is new; True where anything was.  A fault in a file is only said."""
        with self.drawing:
            try:
                is_new = self.live.read()
                if (is_new or always) and self.controls is None:
                    self.handle.update(self._static())
                elif is_new or always:
                    self.controls.show()
            except KdlibError as error:
                self.say(str(error))
                return False
            return is_new

    def say(self, text: str) -> None:
        """A line above the picture, or where there are no widgets, below it."""
        if self.controls is None:
            print(text, flush=True)
        else:
            self.controls.message.value = str(escape(text))

    def _show(self) -> None:
        self.ended.clear()
        if runs.headless() or isinstance(self.live, LiveGeneration):
            # headless widgets would stay blank, and Output or @interact would hang
            self.controls, self.context = None, contextvars.copy_context()  # the cell's, whose output it is
            self.handle = display(self._static(), display_id=True)
        else:
            self.context = _beside_cells()
            self.controls = self.context.run(Controls, self)
            self.refresh(always=True)
            display(self.controls.box)

    def _follow(self) -> None:
        self.thread = threading.Thread(target=self.context.run, args=(self._watch,), daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        pause = least = HEADLESS_PAUSE_S if runs.headless() else PAUSE_S
        news = time.monotonic()
        while not self.ended.wait(pause):
            began, spent = time.monotonic(), time.thread_time()
            if self.refresh():
                news = began
            # another process may go on with one that was stopped or killed
            is_over = self.live.run.status["state"] == "done" and not self.live.is_training
            if is_over or began - news > PATIENCE_S:
                return
            pause = max(least, (time.thread_time() - spent) / SHARE)

    def _static(self) -> Image:
        return Image(data=self.live.png(), format="png", alt=self.live.headline)


class Controls:
    """The widgets: picture, scorecard, what to show, and a stop."""

    def __init__(self, board: Dashboard) -> None:
        self.board, self.live, view = board, board.live, board.live.view
        button = {"layout": {"width": "auto"}}
        self.image = ipywidgets.Image(format="png", layout={"flex": "1 1 560px", **PICTURE})
        self.card = ipywidgets.HTML(layout={"flex": "0 1 290px", "margin": "0 0 0 12px"})
        self.message = ipywidgets.HTML()
        self.terms = [
            ipywidgets.ToggleButton(
                view.terms is None or term in view.terms, description=term, tooltip=f"show {term}", **button
            )
            for term in board.live.run.config.loss.schedules
        ]
        log = "raw values and gradient norms on a log scale"
        self.log = ipywidgets.ToggleButton(view.log, description="log scale", tooltip=log, **button)
        self.smoothing = ipywidgets.FloatSlider(
            view.smoothing, min=0, max=0.3, step=0.01, description="smoothing", readout_format=".0%", **LATE
        )
        self.steps = ipywidgets.IntRangeSlider(value=(0, 100), description="steps, %", **LATE)
        self.rivals = ipywidgets.SelectMultiple(
            options=list(self.live.candidates), value=self.live.rivals, rows=3, description="compare"
        )
        stop = {"button_style": "danger", "tooltip": "finish the step, save a checkpoint, stop"}
        self.stop = ipywidgets.Button(description="Stop", icon="stop", **stop, **button)
        controls = [*self.terms, self.log, self.smoothing, self.steps, self.rivals]
        for control in controls:
            control.observe(self._changed, "value")
        self.stop.on_click(self._stop)
        wrapped = {"flex_flow": "row wrap"}
        above = ipywidgets.HBox([*controls, self.stop], layout={**wrapped, "align_items": "center"})
        below = ipywidgets.HBox([self.image, self.card], layout=wrapped)
        self.box = ipywidgets.VBox([above, self.message, below])

    def show(self) -> None:
        self.image.value = self.live.png()
        self.card.value = page("card.html.j2", lines=self.live.scorecard())

    def _changed(self, change: object) -> None:
        chosen = tuple(button.description for button in self.terms if button.value)
        low, high = (share / 100 * self.live.progress.step for share in self.steps.value)
        with self.board.drawing:
            self.live.view = View(
                terms=None if len(chosen) == len(self.terms) else chosen,
                smoothing=self.smoothing.value,
                log=self.log.value,
                steps=None if self.steps.value == (0, 100) or low == high else (low, high),
            )
            self.live.rivals = self.rivals.value
            self.board.refresh(always=True)

    def _stop(self, button: object) -> None:
        """A click may come late, after the cell that it was meant to stop: then it must not stop the next."""
        if self.board.ended.is_set() or not self.live.is_training:
            self.board.say("No training goes on here that could be stopped.")
            return
        run = self.live.run
        (run.path / "STOP").touch()
        config = os.path.relpath(run.path / "config.yaml", runs.project_root())
        again = f"in a terminal: kd run {config} --resume {run.name}"
        self.board.say(
            f"It stops after this step, with a checkpoint. To go on, run the training cell again, or {again}"
        )


def _beside_cells() -> contextvars.Context:
    """A context in which widgets belong to no cell.

    ipykernel 7 answers a widget that a cell made when that cell is done, which for a training is too late;
    one that no cell made it answers beside it, on the subshell that JupyterLab asks for.
    """
    context, kernel = contextvars.copy_context(), getattr(get_ipython(), "kernel", None)
    if hasattr(kernel, "_shell_parent"):  # ipykernel 7
        context.run(kernel._shell_parent.set, {})
    return context
