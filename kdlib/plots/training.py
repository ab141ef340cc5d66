"""The picture of a training: panels above each other on one x axis, each with what it shows as its title.
Imports no torch.
"""

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from kdlib.plots.axes import INK, SHADE, SOFT, Panel, colours_of
from kdlib.plots.training_panels import HEIGHTS, HELD_OUT, TRAIN, UNITS, Scene, View, kinds
from kdlib.runs.progress import Progress, headline, held_out_line, where_line

DPI = 100  # of the picture on the screen
WIDTH, LEFT, RIGHT, HEAD, FOOT, GAP, EPOCHS, BLANK = 8.0, 0.92, 0.3, 1.62, 0.5, 0.36, 0.44, 1.0  # inches
LETTERS = 104  # that a line of the head holds


def dashboard(course: Progress, view: View | None = None, others: Sequence[Progress] = ()) -> Figure:
    """The whole picture of a training, with other trainings behind it, dashed."""
    return Sheet(course).draw(course, view or View(), others)


class Sheet:
    """The panels of one training, drawn again and again while it goes on."""

    def __init__(self, course: Progress) -> None:
        self.key, self.colours, self.background = self._key(course), colours_of(course.terms), None
        heights = {kind: HEIGHTS[kind] for kind in kinds(course)}
        self.height = (
            HEAD + sum(heights.values()) + GAP * max(len(heights) - 1, 0) + FOOT if heights else BLANK
        )
        self.figure = Figure(figsize=(WIDTH, self.height), facecolor="white")
        self.canvas, self.words = FigureCanvasAgg(self.figure), []
        self.head = [
            self._word(at, size, weight)
            for at, size, weight in ((0.3, 12, "bold"), (0.55, 9.5, "normal"), (0.77, 9.5, "normal"))
        ]
        self.panels = self._panels(heights, course.of)
        if self.panels:
            self._axes_of_steps()
            self._backdrop(course)

    @staticmethod
    def _key(course: Progress) -> tuple:
        return (*kinds(course), course.steps if len(course.plan) else None, len(course.plan), *course.terms)

    def fits(self, course: Progress) -> bool:
        """Whether this sheet can show the training as it stands now; a new one is needed when new kinds
        of figures came in.
        """
        return self.key == self._key(course)

    def draw(self, course: Progress, view: View, others: Sequence[Progress] = ()) -> Figure:
        """Show the training as it stands."""
        words = (
            headline(course),
            where_line(course),
            course.message or (held_out_line(course) if self.panels else ""),
        )
        for line, text in zip(self.head, words, strict=True):
            first = text.strip().splitlines()[0] if text.strip() else ""
            line.set_text(first if len(first) <= LETTERS else first[: LETTERS - 1] + "…")
        if self.panels:
            scene, table = Scene(course, view, others), course.tail.train
            self.epochs_per_step = float(f"{table['epoch'].iloc[-1] / max(course.step, 1):.4g}") or 1.0
            self.first.axes.set_xlim(*scene.span)
            for kind, panel in self.panels.items():
                panel.begin()
                getattr(scene, kind)(panel)
            self._legend(scene)
        return self.figure

    def png(self) -> bytes:
        """The picture as last drawn, for the screen.  What seldom changes is kept from one call to the
        next.
        """
        self.figure.set_dpi(DPI)
        frame = (
            self.shown,
            getattr(self, "epochs_per_step", None),
            *(panel.frame for panel in self.panels.values()),
        )
        if self.background is None or self.background[0] != frame:
            for word in self.words:
                word.set_visible(False)
            self.canvas.draw()
            for word in self.words:
                word.set_visible(True)
            self.background = (frame, self.canvas.copy_from_bbox(self.figure.bbox))
        self.canvas.restore_region(self.background[1])
        for panel in self.panels.values():
            panel.draw_lines()
        image, buffer = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3]), io.BytesIO()
        pencil = ImageDraw.Draw(image)
        for word in self.words:  # by Pillow, which takes 1 ms where matplotlib takes 20
            x, y = word.get_position()
            font = _font(findfont(word.get_fontproperties()), word.get_fontsize() * DPI / 72)
            pencil.text(
                (x * image.width, (1 - y) * image.height),
                word.get_text(),
                fill=word.get_color(),
                font=font,
                anchor="ls",
            )
        image.save(buffer, format="png", compress_level=1)
        return buffer.getvalue()

    def _word(self, at: float, size: float, weight: str = "normal") -> Text:
        """A line of words whose foot is so many inches below the upper edge."""
        self.words.append(
            self.figure.text(
                LEFT / WIDTH, 1 - at / self.height, "", fontsize=size, fontweight=weight, color=INK
            )
        )
        return self.words[-1]

    def _panels(self, heights: dict[str, float], of: str) -> dict[str, Panel]:
        made, top, first = {}, HEAD, None
        for kind, tall in heights.items():
            box = (
                LEFT / WIDTH,
                1 - (top + tall) / self.height,
                1 - (LEFT + RIGHT) / WIDTH,
                tall / self.height,
            )
            axes, title = (
                self.figure.add_axes(box, sharex=first),
                self._word(top - (0.06 if first else EPOCHS), 9.5),
            )
            first, top = first or axes, top + tall + GAP
            form = "{:.1e}".format if kind == "learning_rate" else "{:,.6g}".format
            made[kind] = Panel(
                axes,
                title,
                UNITS[kind].replace("per token", f"per {of}"),
                form,
                label_at=-0.6 / (WIDTH - LEFT - RIGHT),
            )
        return made

    def _axes_of_steps(self) -> None:
        """Steps below the last panel, epochs above the first."""
        self.first, *_, last = self.panels.values()
        self.first.axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        self.first.axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        last.axes.set_xlabel("optimizer step", fontsize=9, color=INK)
        last.axes.tick_params(labelbottom=True)
        self.epochs_per_step = 1.0
        above = self.first.axes.secondary_xaxis(
            "top", functions=(lambda x: x * self.epochs_per_step, lambda x: x / self.epochs_per_step)
        )
        above.tick_params(labelsize=8, length=3, color=SOFT)
        above.set_xlabel("epoch", fontsize=8, color=SOFT)
        above.spines["top"].set_color(SOFT)

    def _backdrop(self, course: Progress) -> None:
        """What does not move: the plan, thin, and the phases of the curriculum."""
        planned = {
            "weights": [f"{term}_weight" for term in course.terms],
            "learning_rate": ["learning_rate"],
            "temperature": [name for name in course.plan if name.endswith("_temperature")] or ["temperature"],
        }
        for kind, names in planned.items():
            for name in names:
                if name in course.plan and kind in self.panels:
                    colour = self.colours.get(name.rsplit("_", 1)[0], INK)
                    self.panels[kind].axes.plot(
                        course.plan["step"],
                        course.plan[name],
                        color=colour,
                        linewidth=0.8,
                        alpha=0.6,
                        zorder=1,
                    )
        ends = [0.0, *(until * course.steps for until, _ in course.phases)]
        for panel in self.panels.values():
            for end in ends[1:-1]:
                panel.axes.axvline(end, color=SOFT, linewidth=0.6, zorder=0)
        for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
            axes = self.panels["weights"].axes
            axes.axvspan(start, end, color=SHADE if number % 2 else "white", zorder=0)
            axes.annotate(
                f" phase {number}",
                (start, 1),
                xycoords=axes.get_xaxis_transform(),
                fontsize=7,
                color=SOFT,
                va="top",
                annotation_clip=True,
            )

    @property
    def shown(self) -> tuple[str, ...]:
        """What the legend names."""
        return tuple(text.get_text() for legend in self.figure.legends for text in legend.get_texts())

    def _legend(self, scene: Scene) -> None:
        handles = [Patch(color=self.colours[term], label=term) for term in scene.terms]
        handles += [
            Line2D([], [], color=TRAIN, label="training loss"),
            Line2D([], [], color=HELD_OUT, marker="o", markersize=3.5, label="held-out loss"),
        ]
        if len(scene.course.plan):
            handles.append(Line2D([], [], color=SOFT, linewidth=0.8, label="as planned"))
        handles += [
            Line2D([], [], color=SOFT, linestyle=dash, label=other.name) for other, dash in scene.others
        ]
        if self.shown != tuple(handle.get_label() for handle in handles):
            for legend in list(self.figure.legends):
                legend.remove()
            self.figure.legend(
                handles=handles,
                loc="upper left",
                bbox_to_anchor=(LEFT / WIDTH - 0.004, 1 - 0.88 / self.height),
                ncols=9,
                frameon=False,
                fontsize=8.5,
                borderpad=0,
                borderaxespad=0,
                handlelength=1.4,
                columnspacing=1.2,
                handletextpad=0.5,
                labelcolor=INK,
            )


_font = lru_cache(ImageFont.truetype)
