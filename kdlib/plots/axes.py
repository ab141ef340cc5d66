"""Axes that keep their lines and give them new data, over a background that is drawn again only when a limit
moves.

Nine axes made anew for each picture, with all their words, take some ten times as long.  Imports no torch.
"""

import math
from collections.abc import Callable, Iterable
from textwrap import wrap

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

TERM_COLOURS = {
    "kd": "#0072b2",
    "ce": "#e69f00",
    "hidden": "#009e73",
    "attention": "#cc79a7",
    "relational": "#d55e00",
    "contrastive": "#56b4e9",
}  # Okabe and Ito's, safe for colour-blind eyes
# Tol's, and theirs
SPARE = ("#332288", "#117733", "#882255", "#999933", "#aa4499", "#d55e00", "#56b4e9", "#cc79a7")
INK, SOFT, SHADE, BROKEN = "#1f2328", "#6e6e6e", "#f1f1ee", "#cc0000"

COLOURS = {"teacher": "#6e6e6e", "untrained": "#bdbdbd", "baseline": "#e69f00", "distilled": "#0072b2"}
LABELS = {
    "teacher": "teacher",
    "untrained": "untrained student",
    "baseline": "CE-only baseline",
    "distilled": "distilled student",
}
# of models with names of their own
OTHERS = ("#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#882255", "#999933")


def colours_of_models(names: Iterable[str]) -> dict[str, str]:
    """A colour for each model, the same in every figure for the usual ones."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(others)}


def label_of(model: str) -> str:
    """What a model is called; one with a name of its own by that."""
    return LABELS.get(model, model)


def called(model: str, article: str = "the") -> str:
    """The same within a sentence: the distilled student, but my-model."""
    return f"{article} {LABELS[model]}" if model in LABELS else model


def on_axis(model: str) -> str:
    """The same in lines so short that several stand side by side."""
    return "\n".join(wrap(label_of(model), 10))


def colours_of(terms: Iterable[str]) -> dict[str, str]:
    """A colour for each term, the same in every figure for the usual ones."""
    found = {term: TERM_COLOURS[term] for term in terms if term in TERM_COLOURS}
    spare = iter([colour for colour in SPARE if colour not in found.values()])
    return found | {term: next(spare, SOFT) for term in terms if term not in found}


class Panel:
    """One set of axes whose lines are kept from one drawing to the next."""

    def __init__(
        self,
        axes: Axes,
        title: Text,
        unit: str,
        form: Callable[[float], str] = "{:g}".format,
        *,
        label_at: float,
    ) -> None:
        """
        Args:
            title: where the panel's title goes.
            unit: of the y axis.
            form: how its ticks are written.
            label_at: where its label stands, in widths of the axes; the same for all panels, so that labels
                are aligned.
        """
        self.axes, self.title, self.form, self.artists = axes, title, form, {}
        self.is_log, self.is_placed = None, False
        axes.set_ylabel(unit, fontsize=8, color=SOFT)
        axes.tick_params(labelsize=8, labelbottom=False, length=3, color=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.grid(axis="y", color="#ececec", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.set_label_coords(label_at, 0.5)
        self.begin()

    def begin(self) -> None:
        """A new drawing: what is not drawn again by `end` disappears."""
        self.used: set[str] = set()
        self.low, self.high, self.lowest_positive = math.inf, -math.inf, math.inf

    def line(self, key: str, x: np.ndarray, y: np.ndarray, **style) -> None:
        """A line through these points; nan leaves a gap."""
        self._kept(key, lambda: self.axes.plot([], [])[0]).set(data=(x, y), **style)
        self.reach(y)

    def area(self, key: str, x: np.ndarray, lower: np.ndarray, upper: np.ndarray, **style) -> None:
        """A filled area between two lines."""
        artist = self._kept(key, lambda: self.axes.fill_between([0, 1], [0, 0], linewidth=0))
        artist.set_data(x, lower, upper)
        artist.set(**style)
        self.reach(upper)

    def marks(self, key: str, x: np.ndarray) -> None:
        """Crosses at the upper edge: there a value was nan or infinite."""
        if len(x):
            top = self.axes.get_xaxis_transform()
            artist = self._kept(
                key,
                lambda: self.axes.plot(
                    [],
                    [],
                    transform=top,
                    clip_on=False,
                    zorder=9,
                    linestyle="",
                    marker="x",
                    color=BROKEN,
                    markersize=6,
                    markeredgewidth=1.6,
                )[0],
            )
            artist.set_data(x, np.full(len(x), 0.97))

    def reach(self, values: np.ndarray) -> None:
        """Make room for these values."""
        finite = values[np.isfinite(values)]
        if len(finite):
            self.low, self.high = min(self.low, finite.min()), max(self.high, finite.max())
            self.lowest_positive = min(self.lowest_positive, finite[finite > 0].min(initial=math.inf))

    def end(self, title: str, *, log: bool = False, floor: float | None = None) -> None:
        """Title and limits; log only where there is something above 0 to show, and `floor` in sight where
        not.
        """
        for key, artist in self.artists.items():
            artist.set_visible(key in self.used)
        self.title.set_text(title)
        log = log and math.isfinite(self.lowest_positive)
        if log is not self.is_log:
            self._scale(log)
        low, high = (
            (self.lowest_positive, max(self.high, self.lowest_positive)) if log else (self.low, self.high)
        )
        if math.isfinite(low) and math.isfinite(high):
            self._limit(low if floor is None or log else min(low, floor), high)

    def draw_lines(self) -> None:
        """What is neither background nor words: lines, areas, crosses."""
        for artist in sorted(self.artists.values(), key=Artist.get_zorder):
            self.axes.draw_artist(artist)

    @property
    def frame(self) -> tuple:
        """What the background depends on."""
        return (*self.axes.get_xlim(), *self.axes.get_ylim(), self.is_log)

    def _limit(self, low: float, high: float) -> None:
        """New limits where the values do not fit the old ones, or fill less than half of them."""
        bottom, top = self.axes.get_ylim()
        fills = _between(low, high, self.is_log) > 0.5 * _between(bottom, top, self.is_log)
        if not self.is_placed or low < bottom or high > top or not fills:
            self.axes.set_ylim(*_roomy(low, high, self.is_log))
            self.is_placed = True
            count = max(2, round(self.axes.get_position().height * self.axes.figure.get_figheight() / 0.28))
            wide = self.is_log and high > 5 * low
            self.axes.yaxis.set_major_locator(
                LogLocator(subs=(1, 2, 5), numticks=count) if wide else MaxNLocator(min(count, 5))
            )

    def _scale(self, log: bool) -> None:
        self.is_log, self.is_placed = log, False
        self.axes.set_yscale("log" if log else "linear")
        self.axes.yaxis.set_minor_locator(NullLocator())
        self.axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else self.form(value))

    def _kept(self, key: str, make: Callable[[], Artist]) -> Artist:
        if key not in self.artists:
            self.artists[key] = make()
            self.artists[key].set_animated(True)
        self.used.add(key)
        return self.artists[key]


def _between(low: float, high: float, log: bool) -> float:
    return math.log(high / low) if log else high - low


def _roomy(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        room = max((high / low) ** 0.06, 1.05)
        return low / room, high * room
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return (0.0 if low == 0 else low - room), high + room
