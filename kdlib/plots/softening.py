"""What temperature and top k do to a teacher's distribution: entropy, mass outside.

Axes: N tokens, V vocabulary, K numbers of top tokens.  A softening is plain data, as explorers.json keeps it:

    {"of": "tokens", "sizes": [1, 2, 4, …, V],
     "rows": [{"temperature": 2.0, "entropy": [low, median, high], "outside": [three lists of K]}, …]}

where low, median and high are the quartiles over the tokens of a text; of a classification ("of": "rows")
over rows, V its classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.config.run import Config
from kdlib.plots.axes import SOFT, legend, panels
from kdlib.schedulers import from_spec

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SHOWN = {1.0: "#9ecae1", 2.0: "#4292c6", 4.0: "#2171b5", 8.0: "#08306b"}  # the softer, the darker
CHOSEN, TOKEN = "#d55e00", "#009e73"
QUARTILES = (25, 50, 75)
ENOUGH = 0.95  # of the mass: the top k that is proposed where the config has none
FLOOR = 1e-4  # of the mass: where the axis ends


@dataclass(frozen=True)
class Predictions:
    """What each model says of each token of a held-out text, or of some rows where they are classified.

    Attributes:
        texts: [N] the tokens that came; of rows their beginnings.
        before: [N] what was read and not predicted since the token before: a row's first token, a prompt; of
            rows the class (`tools: `).
        targets: [N] ids of tokens or classes.
        logits: model -> [N, V] float32; the teacher first, then students.
        decode: id -> a token's text, or a class's name.
        of: tokens or rows.
    """

    texts: Sequence[str]
    before: Sequence[str]
    targets: np.ndarray
    logits: Mapping[str, np.ndarray]
    decode: Callable[[int], str]
    of: str = "tokens"

    @cached_property
    def ranked(self) -> np.ndarray:
        """[N, V] the teacher's logits, the largest first: an order that no temperature changes."""
        return -np.sort(-self.logits["teacher"], axis=-1)

    @cached_property
    def students(self) -> list[str]:
        return [name for name in self.logits if name != "teacher"]


def sizes(vocabulary: int, *more: int) -> list[int]:
    """1, 2, 4, … and the whole vocabulary, with `more` between them."""
    powers = (2**i for i in range(vocabulary.bit_length()))
    return sorted({vocabulary, *(k for k in (*powers, *more) if k <= vocabulary)})


def softened(ranked: np.ndarray, temperature: float, top: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A distribution's entropy, [N] nats, and the mass outside its top k, [N, K] from 0 to 1.

    Args:
        ranked: [N, V] logits, the largest first.
        temperature: above 0.
        top: K rising numbers of tokens, the last one V.
    """
    scaled = (ranked - ranked[:, :1]) / np.asarray(temperature, ranked.dtype)
    weights = np.exp(scaled)
    # [N, K] of the tokens from one size to the next
    between = np.add.reduceat(weights, [0, *top[:-1]], axis=-1, dtype=np.float64)
    total = between.sum(-1)
    inner = np.where(weights > 0, scaled, 0) * weights  # a logit of -inf has no share in the entropy
    entropy = np.log(total) - inner.sum(-1, dtype=np.float64) / total
    tails = between[:, ::-1].cumsum(-1)[:, ::-1]  # so a small mass keeps its digits
    outside = np.concatenate([tails[:, 1:], np.zeros((len(ranked), 1))], axis=-1)
    return np.maximum(entropy, 0.0), outside / total[:, None]


def softening(ranked: np.ndarray, temperatures: Sequence[float], top: Sequence[int]) -> dict[str, Any]:
    """Quartiles over the tokens, for each temperature and top k: see the module's docstring."""

    def row(temperature: float) -> dict[str, Any]:
        found = [np.percentile(each, QUARTILES, axis=0) for each in softened(ranked, temperature, top)]
        return {"temperature": temperature, "entropy": found[0].tolist(), "outside": found[1].tolist()}

    return {"sizes": list(top), "rows": [row(temperature) for temperature in sorted(set(temperatures))]}


def chosen(config: Config) -> tuple[float, int | None]:
    """Temperature and top k of kd, or of the first term with a temperature, as a config's training begins."""
    loss = config.loss
    terms = loss.temperatures(["kd", *loss.schedules])
    term = next(name for name in (*loss.schedules, "kd") if name in terms and name != "contrastive")
    top_k = None if loss.top_k is None else round(from_spec(loss.top_k)(0.0))
    return from_spec(terms[term])(0.0), top_k


def softening_of(predictions: Predictions, config: Config) -> dict[str, Any]:
    """{"temperature", "top_k", "softening"}: a config's choice, and what others do to this teacher."""
    ranked, (temperature, top_k) = predictions.ranked, chosen(config)
    top_k = top_k and min(top_k, ranked.shape[-1])
    table = softening(ranked, [*TEMPERATURES, temperature], sizes(ranked.shape[-1], top_k or 1))
    return {"temperature": temperature, "top_k": top_k, "softening": {**table, "of": predictions.of}}


def message(table: Mapping[str, Any], temperature: float, top_k: int | None = None) -> str:
    """`At T = 2 the top 256 hold 97 % of the teacher's mass`, at the median token.

    Without a top k, the fewest that hold enough; of classes, which are few, the likeliest.
    """
    one, many = words(table)
    held = {k: 1 - x for k, x in zip(table["sizes"], _row(table, temperature)["outside"][1], strict=True)}
    k = min(top_k or next(k for k, mass in held.items() if mass >= ENOUGH), table["sizes"][-1])
    what, mass = f"top {k:,} hold", held[k]
    if many == "classes" and not top_k:
        what, mass = "likeliest class holds", held[1]
    return f"At T = {temperature:g} the {what} {_percent(mass)} of the teacher's mass, at the median {one}"


def words(table: Mapping[str, Any]) -> tuple[str, str]:
    """What the figures are of, and what is chosen among: a token and tokens, or a row and classes."""
    return ("row", "classes") if table.get("of") == "rows" else ("token", "tokens")


def softening_figure(
    table: Mapping[str, Any], temperature: float, top_k: int | None = None, token: Mapping | None = None
) -> Figure:
    """Entropy against the temperature, and the mass outside the top k against k: median and quartiles.

    Args:
        table: with a row for `temperature`, and a size for `top_k`.
        token: one token's {"entropy": …, "outside": …}, to be drawn beside the others.
    """
    figure, (left, right) = panels(9, 3.6, 2, layout=None)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.14, top=0.79, wspace=0.24)
    _entropies(left, table, temperature, token)
    _masses(right, table, temperature, token)
    if top_k:
        right.axvline(top_k, color="black", linestyle=":", linewidth=1)
        above = right.get_xaxis_transform()
        right.text(top_k, 1.02, f"k = {top_k:,}", ha="center", va="bottom", fontsize=8, transform=above)
    for axes, title in ((left, "How soft the teacher is"), (right, "Mass outside the top k")):
        axes.set_title(title, loc="left", fontsize=9.5, y=1.07)  # its own place: finding one takes long
        legend(axes)
    figure.suptitle(message(table, temperature, top_k), fontsize=11, x=0.01, y=0.98, ha="left", va="top")
    return figure


def _entropies(axes: Axes, table: Mapping, temperature: float, token: Mapping | None) -> None:
    at, (one, many) = [row["temperature"] for row in table["rows"]], words(table)
    low, median, high = zip(*(row["entropy"] for row in table["rows"]), strict=True)
    half, even = f"middle half of the {one}s", f"all {many} equally likely"
    axes.fill_between(at, low, high, color="#4292c6", alpha=0.2, linewidth=0, label=half)
    axes.plot(at, median, color="#2171b5", label=f"median {one}")
    axes.axhline(np.log(table["sizes"][-1]), color=SOFT, linestyle="--", linewidth=0.8, label=even)
    now = _row(table, temperature)["entropy"][1]
    axes.plot(temperature, now, "o", color=CHOSEN, label=f"T = {temperature:g}: {now:.2f} nats")
    if token:
        now = token["entropy"]
        axes.plot(temperature, now, "D", color=TOKEN, label=f"this {one}: {now:.2f} nats")
    axes.set(xlabel="temperature T", ylabel="entropy, nats", ylim=(0, None))


def _masses(axes: Axes, table: Mapping, temperature: float, token: Mapping | None) -> None:
    top, (one, many) = table["sizes"], words(table)
    below = top[:-1]  # outside the whole vocabulary lies nothing, which has no logarithm
    for row in table["rows"]:
        if (other := row["temperature"]) in SHOWN and other != temperature:
            axes.plot(below, row["outside"][1][:-1], color=SHOWN[other], linewidth=1, label=f"T = {other:g}")
    low, median, high = (np.maximum(line[:-1], FLOOR / 10) for line in _row(table, temperature)["outside"])
    axes.fill_between(below, low, high, color=CHOSEN, alpha=0.18, linewidth=0)
    axes.plot(below, median, color=CHOSEN, linewidth=2, label=f"T = {temperature:g}, and its middle half")
    if token:
        outside = np.maximum(token["outside"][:-1], FLOOR / 10)
        axes.plot(below, outside, color=TOKEN, linewidth=1.5, label=f"this {one}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set(xlabel=f"k, likeliest {many}", ylim=(FLOOR, 1), xlim=(1, top[-1]))
    marks = [4**i for i in range(16) if 4**i <= top[-1]] if top[-1] > 32 else top
    axes.set_xticks(marks, [f"{k:,}" for k in marks])
    shares = [10.0**-i for i in range(5)]
    axes.set_yticks(shares, [f"{100 * share:g} %" for share in shares])


def _row(table: Mapping[str, Any], temperature: float) -> Mapping[str, Any]:
    rows = {row["temperature"]: row for row in table["rows"]}
    if temperature not in rows:
        raise KeyError(f"T = {temperature:g} is not in the table; it has {list(rows)}")
    return rows[temperature]


def _percent(share: float) -> str:
    """Two digits that do not round to all of it."""
    return f"{100 * share:.0f} %" if share < 0.985 or share == 1 else f"{min(100 * share, 99.99):.2f} %"
