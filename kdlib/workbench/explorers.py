"""The explorers where a person sits: sliders over pictures and HTML, redrawn by observers.  Imports no torch.

Nothing here captures output (`Output`, `interact`): that deadlocks headless.
"""

import io
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
from markupsafe import escape
from matplotlib.figure import Figure

from kdlib.config.run import Config
from kdlib.errors import ConfigError
from kdlib.plots.axes import LABELS
from kdlib.plots.candidates import candidate_bars
from kdlib.plots.schedule_designer import COURSES, SHAPES, Design, Phase, as_yaml, design_of, pasted
from kdlib.plots.schedules import course_figure, curves
from kdlib.plots.softening import TEMPERATURES, Sight, chosen, sizes, softened, softening, softening_figure
from kdlib.plots.tokens import MEASURES, hardest, heat_map

USUAL_K = 256  # where the slider starts when the config has no top k
OFFERED = ("kd", "ce", "hidden")  # terms that the designer has sliders for, beside the config's own
PHASES = 4  # likewise
WIDE, SLIM = {"width": "27rem"}, {"width": "17rem"}
ROWS = {"flex_flow": "row wrap"}


def png(figure: Figure, dpi: int = 90) -> bytes:
    """A figure as a picture, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def course_picture(config: Config, steps: int | None, plan: Any = None) -> Figure:
    """A config's course, its phases shaded."""
    return course_figure(
        curves(config, steps, plan), [phase.until for phase in config.loss.curriculum or []], steps
    )


class TemperatureExplorer(widgets.VBox):
    """Sliders for the token, T and k; bars of the likeliest candidates, and the picture of the whole text
    below them.
    """

    def __init__(self, sight: Sight, config: Config) -> None:
        self.sight = sight
        temperature, top_k = chosen(config)
        self.top = sizes(sight.ranked.shape[-1], *[top_k] if top_k else [])
        self.rows = {
            row["temperature"]: row for row in softening(sight.ranked, TEMPERATURES, self.top)["rows"]
        }
        first = max(k for k in self.top if k <= (top_k or USUAL_K))
        self.token = _slider(widgets.IntSlider, sight.of.removesuffix("s"), 1, min=1, max=len(sight.texts))
        self.temperature = _slider(
            widgets.FloatSlider, "temperature T", min(max(temperature, 0.5), 8.0), min=0.5, max=8.0, step=0.1
        )
        self.top_k = _slider(
            widgets.SelectionSlider, "top k", first, options=[(f"{k:,}", k) for k in self.top]
        )
        self.bars, self.picture = widgets.HTML(), _picture()
        controls = [self.token, self.temperature, self.top_k]
        _watch(controls, self._redraw)
        super().__init__([*controls, self.bars, self.picture])

    def _redraw(self, change: Any = None) -> None:
        number, temperature, k = self.token.value - 1, round(self.temperature.value, 2), self.top_k.value
        entropy, outside = softened(self.sight.ranked[[number]], temperature, self.top)
        if temperature not in self.rows:
            (self.rows[temperature],) = softening(self.sight.ranked, [temperature], self.top)["rows"]
        table = {
            "of": self.sight.of,
            "sizes": self.top,
            "rows": [self.rows[each] for each in sorted(self.rows)],
        }
        self.bars.value = candidate_bars(self.sight, number, temperature, k)
        self.picture.value = png(
            softening_figure(table, temperature, k, {"entropy": entropy[0], "outside": outside[0]})
        )


class HeatMapExplorer(widgets.VBox):
    """Whose map, coloured by what, and whose candidates are shown: the hardest token's, the next one's,
    or under the cursor.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        students = [(LABELS.get(name, name), name) for name in facts["students"]]
        self.student = _slider(widgets.Dropdown, "student", students[0][1], options=students)
        self.measure = _slider(
            widgets.Dropdown, "coloured by", "kl", options=[(words, name) for name, words in MEASURES.items()]
        )
        self.rank = _slider(
            widgets.IntSlider,
            f"hardest {facts.get('of', 'tokens').removesuffix('s')}",
            1,
            min=1,
            max=len(facts["tokens"]),
        )
        self.map = widgets.HTML()
        controls = [self.student, self.measure, self.rank]
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
        self.course = _slider(widgets.Dropdown, "then", start.course, options=COURSES)
        self.last = _share("end, × the peak", start.last)
        self.shape = _slider(widgets.Dropdown, "temperature", start.shape, options=SHAPES)
        self.hot, self.cold = (
            _slider(widgets.FloatSlider, words, value, min=0.5, max=max(8.0, value), step=0.1)
            for words, value in zip(("at the start", "at the end"), start.temperature, strict=True)
        )
        self.phases = phase_sliders(start.phases)
        self.count = _slider(widgets.IntSlider, "phases", len(start.phases), min=1, max=len(self.phases))
        self.row = widgets.HBox(layout=widgets.Layout(**ROWS))
        self.fault, self.picture, self.yaml = widgets.HTML(), _picture(), widgets.HTML()
        columns = [
            widgets.VBox([self.learning_rate, self.warm_up, self.course, self.last]),
            widgets.VBox([self.shape, self.hot, self.cold, self.count]),
        ]
        _watch(
            [
                control
                for column in (*columns, *self.phases)
                for control in column.children
                if hasattr(control, "value")
            ],
            self._redraw,
        )
        said = widgets.HTML("".join(f"<p>{escape(note)}</p>" for note in notes))
        super().__init__(
            [
                said,
                widgets.HBox(columns, layout=widgets.Layout(**ROWS)),
                self.row,
                self.fault,
                self.picture,
                self.yaml,
            ]
        )

    def design(self) -> Design:
        """What the sliders say."""
        *phases, last = (phase.phase() for phase in self.phases[: self.count.value])
        warm_up, end, hot, cold = (
            round(control.value, 4) for control in (self.warm_up, self.last, self.hot, self.cold)
        )
        return Design(
            self.learning_rate.value,
            warm_up,
            self.course.value,
            end,
            (hot, cold),
            self.shape.value,
            (*phases, Phase(1.0, last.weights, last.ramp)),
        )

    def _redraw(self, change: Any = None) -> None:
        self._show_what_counts()
        design = self.design()
        text = as_yaml(design.loss(), design.training())
        try:
            made = pasted(self.config, text)
        except ConfigError as error:
            self.fault.value = f'<pre style="white-space:pre-wrap;color:#d55e00">{escape(error)}</pre>'
            return
        self.fault.value = ""
        self.picture.value = png(course_picture(made, self.steps))
        self.yaml.value = f"To paste in place of these settings:{yaml_html(text)}"

    def _show_what_counts(self) -> None:
        count = self.count.value
        self.last.disabled, self.cold.disabled = (
            self.course.value == "constant",
            self.shape.value == "constant",
        )
        if len(self.row.children) != count:
            self.row.children = self.phases[:count]
        for number, phase in enumerate(self.phases):
            for slider in (phase.until, phase.ramp):
                slider.layout.display = None if count > 1 else "none"
            phase.until.layout.visibility = "visible" if number + 1 < count else "hidden"


class PhaseSliders(widgets.VBox):
    """One phase: its end, its ramp, and a weight for each term."""

    def __init__(self, number: int, start: Phase) -> None:
        self.until = _share("until", start.until, **SLIM)
        self.ramp = _share("ramp", start.ramp, **SLIM)
        self.weights = {
            name: _share(name, weight, max=max(2.0, weight), **SLIM) for name, weight in start.weights.items()
        }
        super().__init__([widgets.Label(f"phase {number}"), self.until, self.ramp, *self.weights.values()])

    def phase(self) -> Phase:
        """What these sliders say."""
        weights = {name: round(slider.value, 4) for name, slider in self.weights.items()}
        return Phase(round(self.until.value, 4), weights, round(self.ramp.value, 4))


def phase_sliders(phases: tuple[Phase, ...]) -> list[PhaseSliders]:
    """For these phases and further ones, which divide the last one evenly until they are moved."""
    total, last = max(PHASES, len(phases)), phases[-1]
    begun = phases[-2].until if len(phases) > 1 else 0.0
    pieces = total - len(phases) + 1
    ends = [begun + (1 - begun) * (piece + 1) / pieces for piece in range(pieces)]
    every = [
        *phases[:-1],
        *(
            Phase(round(end, 4), last.weights, last.ramp if piece == 0 else 0.0)
            for piece, end in enumerate(ends)
        ),
    ]
    return [
        PhaseSliders(number, Phase(phase.until, dict.fromkeys(OFFERED, 0.0) | phase.weights, phase.ramp))
        for number, phase in enumerate(every, start=1)
    ]


def yaml_html(text: str) -> str:
    """YAML to be selected and copied."""
    return f'<pre class="kd-yaml" style="color:inherit;user-select:all;margin:.4rem 0">{escape(text)}</pre>'


def _slider(kind: type, words: str, value: Any, width: str = WIDE["width"], **options: Any) -> widgets.Widget:
    return kind(
        value=value,
        description=words,
        layout=widgets.Layout(width=width),
        style={"description_width": "9rem" if width == WIDE["width"] else "4.5rem"},
        **options,
    )


def _share(words: str, value: float, max: float = 1.0, width: str = WIDE["width"]) -> widgets.FloatSlider:
    return _slider(
        widgets.FloatSlider,
        words,
        value,
        width,
        min=0.0,
        max=max,
        step=0.01 if max < 1 else 0.05,
        readout_format=".2f",
    )


def _picture() -> widgets.Image:
    return widgets.Image(format="png", layout=widgets.Layout(max_width="100%", width="fit-content"))


def _watch(controls: list[widgets.Widget], redraw: Any) -> None:
    """Redraw now, and whenever a control moves."""
    for control in controls:
        control.observe(redraw, "value")
    redraw()
