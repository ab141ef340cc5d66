"""The explorers: sliders over pictures and HTML, or still pages where nobody sits.

Nothing here captures output (`Output`, `interact`): that deadlocks headless.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML
from markupsafe import escape

from kdlib.config.run import Config
from kdlib.errors import ConfigError, RunError
from kdlib.plots.axes import label_of, png
from kdlib.plots.schedules import DECAYS, SHAPES, Design, Phase, design_of, pasted, schedules_of
from kdlib.plots.softening import (
    TEMPERATURES,
    Predictions,
    chosen,
    sizes,
    softened,
    softening,
    softening_figure,
    softening_of,
)
from kdlib.plots.tokens import COLOURED_BY, candidate_bars, hardest, heat_map, of
from kdlib.reports import explorers as still
from kdlib.runs.folder import Run
from kdlib.runs.processes import headless

USUAL_K = 256  # where the slider starts when the config has no top k
OFFERED = ("kd", "ce", "hidden")  # terms that the designer has sliders for, beside the config's own
PHASES = 4  # likewise
WIDE, SLIM = "27rem", "17rem"
WRAPPED = {"flex_flow": "row wrap"}


def temperature_and_top_k(predictions: Predictions | None, config: Config) -> widgets.Widget | HTML | None:
    """Temperature and top k: the teacher's distribution softened and cut, at one token and over a text.

    Nothing where there is no teacher, and so no predictions of one.
    """
    if predictions is None:
        return None
    if headless():
        return HTML(still.softening_page(softening_of(predictions, config)))
    return TemperatureExplorer(predictions, config)


def token_heat_map(run: Run) -> widgets.Widget | HTML | None:
    """A text token by token, or texts row by row: where students are far from the teacher, what both say.

    Nothing where there is no teacher.

    Raises:
        RunError: the run has no explorers.json, or a faulty one.
    """
    if run.config.teacher is None:
        return None
    if not (facts := still.facts_of(run)):
        raise RunError(f'run {run.name} has no explorers.json yet; call `bench.explore("distilled")` first')
    if headless():
        return HTML(still.heat_map_page(facts, still.most_trained(facts)[0]))
    return HeatMapExplorer(facts)


def schedule_designer(run: Run) -> widgets.Widget | HTML:
    """Warm-up, phases, weights and temperature: their curves over training, and the YAML to paste."""
    if headless():
        return HTML(still.schedules_page(run))
    return ScheduleDesigner(run.config, still.steps_of(run))


class TemperatureExplorer(widgets.VBox):
    """Sliders for the token, T and k; bars of the likeliest candidates, and the whole text's picture."""

    def __init__(self, predictions: Predictions, config: Config) -> None:
        self.predictions, (temperature, top_k) = predictions, chosen(config)
        self.top = sizes(predictions.ranked.shape[-1], *[top_k] if top_k else [])
        rows = softening(predictions.ranked, TEMPERATURES, self.top)["rows"]
        self.rows = {row["temperature"]: row for row in rows}
        self.token = _number(predictions.of.removesuffix("s"), 1, len(predictions.texts))
        self.temperature = _hotness("temperature T", min(max(temperature, 0.5), 8.0))
        options = [(f"{k:,}", k) for k in self.top]
        first = max(k for k in self.top if k <= (top_k or USUAL_K))
        self.top_k = _slider(widgets.SelectionSlider, "top k", first, options=options)
        self.bars, self.picture = widgets.HTML(), _picture()
        controls = [self.token, self.temperature, self.top_k]
        _watch(controls, self._redraw)
        super().__init__([*controls, self.bars, self.picture])

    def _redraw(self, change: Any = None) -> None:
        number, temperature, k = self.token.value - 1, round(self.temperature.value, 2), self.top_k.value
        self.bars.value = candidate_bars(self.predictions, number, temperature, k)
        ranked = self.predictions.ranked
        if temperature not in self.rows:
            (self.rows[temperature],) = softening(ranked, [temperature], self.top)["rows"]
        rows = [row for _, row in sorted(self.rows.items())]
        table = {"of": self.predictions.of, "sizes": self.top, "rows": rows}
        entropy, outside = softened(ranked[[number]], temperature, self.top)
        token = {"entropy": entropy[0], "outside": outside[0]}
        self.picture.value = png(softening_figure(table, temperature, k, token), dpi=90)


class HeatMapExplorer(widgets.VBox):
    """Whose map, coloured by what, and whose candidates are shown: the hardest token's, the next one's, …"""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        students = [(label_of(name), name) for name in facts["students"]]
        measures = [(words, name) for name, words in COLOURED_BY.items()]
        self.student = _slider(widgets.Dropdown, "student", students[0][1], options=students)
        self.measure = _slider(widgets.Dropdown, "coloured by", "kl", options=measures)
        self.rank = _number(f"hardest {of(facts).removesuffix('s')}", 1, len(facts["tokens"]))
        self.map, controls = widgets.HTML(), [self.student, self.measure, self.rank]
        _watch(controls, self._redraw)
        super().__init__([*controls, self.map])

    def _redraw(self, change: Any = None) -> None:
        student, measure = self.student.value, self.measure.value
        marked = hardest(self.facts, student, measure)[self.rank.value - 1]
        self.map.value = heat_map(self.facts, student, measure, marked=marked)


class ScheduleDesigner(widgets.VBox):
    """Learning rate, temperature and phases to move; their curves, and the YAML that gives them."""

    def __init__(self, config: Config, steps: int | None = None) -> None:
        self.config, self.steps = config, steps
        start, notes = design_of(config, steps)
        self.learning_rate = _slider(widgets.FloatText, "peak learning rate", start.learning_rate)
        self.warm_up = _share("warm-up", start.warm_up, max=0.9)
        self.decay = _slider(widgets.Dropdown, "then", start.decay, options=DECAYS)
        self.last = _share("end, × the peak", start.last)
        self.shape = _slider(widgets.Dropdown, "temperature", start.shape, options=SHAPES)
        self.hot, self.cold = map(_hotness, ("at the start", "at the end"), start.temperature)
        self.phases = phase_sliders(start.phases)
        self.count = _number("phases", len(start.phases), len(self.phases))
        left = [self.learning_rate, self.warm_up, self.decay, self.last]
        right = [self.shape, self.hot, self.cold, self.count]
        self.row = widgets.HBox(layout=WRAPPED)
        self.fault, self.picture, self.yaml = widgets.HTML(), _picture(), widgets.HTML()
        _watch([*left, *right, *(slider for phase in self.phases for slider in phase.sliders)], self._redraw)
        said = widgets.HTML("".join(f"<p>{escape(note)}</p>" for note in notes))
        upper = widgets.HBox([widgets.VBox(left), widgets.VBox(right)], layout=WRAPPED)
        super().__init__([said, upper, self.row, self.fault, self.picture, self.yaml])

    def design(self) -> Design:
        *phases, last = (phase.phase() for phase in self.phases[: self.count.value])
        sliders = (self.warm_up, self.last, self.hot, self.cold)
        warm_up, end, *temperature = (round(slider.value, 4) for slider in sliders)
        rate, decay, shape = (each.value for each in (self.learning_rate, self.decay, self.shape))
        phases = (*phases, replace(last, until=1.0))
        return Design(rate, warm_up, decay, end, tuple(temperature), shape, phases)

    def _redraw(self, change: Any = None) -> None:
        count = self.count.value
        self.last.disabled = self.decay.value == "constant"
        self.cold.disabled = self.shape.value == "constant"
        if len(self.row.children) != count:
            self.row.children = self.phases[:count]
        for number, phase in enumerate(self.phases, start=1):
            for slider in (phase.until, phase.ramp):
                slider.layout.display = None if count > 1 else "none"
            phase.until.layout.visibility = "visible" if number < count else "hidden"
        text = self.design().yaml()
        try:
            made = pasted(self.config, text)
        except ConfigError as error:
            self.fault.value = f'<pre style="white-space:pre-wrap;color:#d55e00">{escape(error)}</pre>'
            return
        self.fault.value = ""
        self.picture.value = png(schedules_of(made, self.steps), dpi=90)
        self.yaml.value = f"To paste in place of these settings:{still.yaml_html(text)}"


class PhaseSliders(widgets.VBox):
    """One phase: its end, its ramp, and a weight for each term."""

    def __init__(self, number: int, start: Phase) -> None:
        self.until, self.ramp = _share("until", start.until, SLIM), _share("ramp", start.ramp, SLIM)
        self.weights = {name: _share(name, x, SLIM, max=max(2.0, x)) for name, x in start.weights.items()}
        self.sliders = [self.until, self.ramp, *self.weights.values()]
        super().__init__([widgets.Label(f"phase {number}"), *self.sliders])

    def phase(self) -> Phase:
        weights = {name: round(slider.value, 4) for name, slider in self.weights.items()}
        return Phase(round(self.until.value, 4), weights, round(self.ramp.value, 4))


def phase_sliders(phases: tuple[Phase, ...]) -> list[PhaseSliders]:
    """For these phases and further ones, which divide the last one evenly until they are moved."""
    *before, last = phases
    pieces, begun = max(PHASES - len(before), 1), before[-1].until if before else 0.0
    ends = [round(begun + (1 - begun) * (piece + 1) / pieces, 4) for piece in range(pieces)]
    parts = [Phase(end, last.weights, 0.0 if number else last.ramp) for number, end in enumerate(ends)]
    offered = dict.fromkeys(OFFERED, 0.0)
    every = (replace(phase, weights=offered | phase.weights) for phase in (*before, *parts))
    return [PhaseSliders(number, phase) for number, phase in enumerate(every, start=1)]


def _slider(kind: type, words: str, value: Any, width: str = WIDE, **options: Any) -> widgets.Widget:
    style = {"description_width": "9rem" if width == WIDE else "4.5rem"}
    return kind(value=value, description=words, layout={"width": width}, style=style, **options)


def _number(words: str, value: int, most: int) -> widgets.IntSlider:
    return _slider(widgets.IntSlider, words, value, min=1, max=most)


def _share(words: str, value: float, width: str = WIDE, max: float = 1.0) -> widgets.FloatSlider:
    options = {"min": 0.0, "max": max, "step": 0.01 if max < 1 else 0.05, "readout_format": ".2f"}
    return _slider(widgets.FloatSlider, words, value, width, **options)


def _hotness(words: str, value: float) -> widgets.FloatSlider:
    return _slider(widgets.FloatSlider, words, value, min=0.5, max=max(8.0, value), step=0.1)


def _picture() -> widgets.Image:
    return widgets.Image(format="png", layout={"max_width": "100%", "width": "fit-content"})


def _watch(controls: list[widgets.Widget], redraw: Callable[..., None]) -> None:
    """Redraw now, and whenever a control moves."""
    for control in controls:
        control.observe(redraw, "value")
    redraw()
