"""Colours and names, the same in every figure; how an interval is drawn."""

import io
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TERM_COLOURS = {
    "kd": "#0072b2",
    "ce": "#e69f00",
    "hidden": "#009e73",
    "attention": "#cc79a7",
    "relational": "#d55e00",
    "contrastive": "#56b4e9",
    "router_aux": "#999933",
}  # Okabe and Ito's, safe for colour-blind eyes; spare ones by Tol, and theirs
SPARE = ("#332288", "#117733", "#882255", "#999933", "#aa4499", "#d55e00", "#56b4e9", "#cc79a7")
INK, SOFT, SHADE, BROKEN = "#1f2328", "#6e6e6e", "#f1f1ee", "#cc0000"

COLOURS = {"teacher": "#6e6e6e", "untrained": "#bdbdbd", "baseline": "#e69f00", "distilled": "#0072b2"}
COLOURS["trained"] = COLOURS["distilled"]  # without a teacher
LABELS = {
    "teacher": "teacher",
    "untrained": "untrained student",
    "baseline": "CE-only baseline",
    "distilled": "distilled student",
    "trained": "student",
}
POINTS = 1000  # that a curve is drawn from
OTHERS = ("#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#882255", "#999933")  # of models with own names

# a notebook has IPython, which knows what a Figure is only where pyplot is imported; nothing here does that
if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()) is not None:
    from IPython.core.pylabtools import select_figure_formats

    select_figure_formats(shell, {"png"})


def colours_of_models(names: Iterable[str]) -> dict[str, str]:
    """A colour for each model, by name."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(others)}


def label_of(model: str) -> str:
    """What a model is called: its own name where it has one."""
    return LABELS.get(model, model)


def called(model: str, article: str = "the") -> str:
    """The same within a sentence: the distilled student, but my-model."""
    return f"{article} {LABELS[model]}" if model in LABELS else model


def on_axis(model: str) -> str:
    """The same in lines so short that several stand side by side."""
    return "\n".join(wrap(label_of(model), 10))


def upper(words: str) -> str:
    """As a sentence begins."""
    return words[:1].upper() + words[1:]


def shortened(text: str, length: int) -> str:
    """Its beginning, where it is longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def colours_of(terms: Iterable[str]) -> dict[str, str]:
    """A colour for each term."""
    found = {term: TERM_COLOURS[term] for term in terms if term in TERM_COLOURS}
    spare = iter([colour for colour in SPARE if colour not in found.values()])
    return found | {term: next(spare, SOFT) for term in terms if term not in found}


def intervals(axes: Axes, at: Any, found: Mapping[str, Any], *, lying: bool = False, **look) -> None:
    """Values with whiskers over their intervals: the one way in which an interval is drawn.

    Args:
        at: places on the other axis, one or as many as there are values.
        found: `value`, `low` and `high`, numbers or columns of them.
        lying: along x.
    """
    value, low, high = (np.atleast_1d(np.asarray(found[name], float)) for name in ("value", "low", "high"))
    gaps = np.maximum([value - low, high - value], 0)
    along = {"x": value, "y": at, "xerr": gaps} if lying else {"x": at, "y": value, "yerr": gaps}
    axes.errorbar(**{"capsize": 3, "fmt": "o"} | along | look)


def panels(
    width: float, height: float, columns: int = 1, rows: int = 1, layout: str | None = "constrained", **shared
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its axes, line by line, open above and to the right."""
    figure = Figure(figsize=(width, height), layout=layout)
    every = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def legend(axes: Axes | Figure, *handles: Any, **look) -> None:
    """Small and without a frame; names from data are no formulas."""
    for text in axes.legend(*handles, **{"frameon": False, "fontsize": 8} | look).get_texts():
        text.set_parse_math(False)


def titled(figure: Figure, title: str) -> Figure:
    """With its message at the upper left; names from data are no formulas."""
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


def png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as a picture, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def thinned(curves: np.ndarray, *, points: int = POINTS) -> np.ndarray:
    """Which positions of a long curve to draw so that no spike is lost: the ends, and each bucket's extremes.

    Args:
        curves: [N], or [C, N] drawn at the same positions.
        points: about so many are kept, or 100 for each curve if that is more.

    Returns:
        Rising positions, with those where nan or infinite values begin or end, unless these are too many.
    """
    curves = np.atleast_2d(curves)
    count, length = curves.shape
    if length <= points:
        return np.arange(length)
    is_finite = np.isfinite(curves)
    gaps = np.flatnonzero(np.diff(is_finite).any(axis=0)) + 1
    kept = {0, length - 1, *(gaps if len(gaps) <= points else ())}
    edges = np.linspace(0, length, max(points // (2 * count), 50) + 1).astype(int)
    for start, end in pairwise(edges):
        part, known = curves[:, start:end], is_finite[:, start:end]
        for extreme in (
            np.where(known, part, np.inf).argmin(axis=1),
            np.where(known, part, -np.inf).argmax(axis=1),
        ):
            kept.update(start + extreme)
    return np.array(sorted(kept))


def few_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A long table's rows at which its columns of numbers would be drawn: ends, extremes, some between."""
    numbers = table.select_dtypes("number")
    share = POINTS // max(len(numbers.columns), 1)
    kept = (
        [thinned(numbers[name].to_numpy(), points=share) for name in numbers] if len(table) > POINTS else []
    )
    return table.iloc[np.unique(np.concatenate(kept))] if kept else table
