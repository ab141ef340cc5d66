"""The likeliest candidates for one token as bars: what teacher and student give them at a temperature.
HTML, imports no torch.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from kdlib.plots.axes import COLOURS, LABELS
from kdlib.plots.softening import Sight
from kdlib.plots.visible import visible

BARS = 12  # candidates shown; the others of the top k in one line
CONTEXT = 24  # tokens of text before and 8 after
LONGEST = 14  # em, of the longest bar
CELL = "padding:.1rem .9rem .1rem 0;border:0;text-align:left;background:none;white-space:nowrap"


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T) along the last axis, in float64."""
    scaled = (logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature
    weights = np.exp(scaled)
    return weights / weights.sum(-1, keepdims=True)


def candidate_bars(sight: Sight, number: int, temperature: float, k: int) -> str:
    """Text before a token, entropy and the mass outside the teacher's top k, what the student gives to the
    same, and bars.

    Args:
        number: of the token, from 0.
        k: up to the vocabulary.
    """
    probs = {name: probabilities(logits[number], temperature) for name, logits in sight.logits.items()}
    order = np.argsort(-sight.logits["teacher"][number], kind="stable")[:k]
    columns = {name: values[order] for name, values in probs.items()}
    longest = max(values[:BARS].max() for values in columns.values())
    rows = "".join(
        _row(
            _seen(sight, sight.decode(int(token))),
            [(name, values[rank]) for name, values in columns.items()],
            longest,
            came=token == sight.targets[number],
        )
        for rank, token in enumerate(order[:BARS])
    )
    if k > BARS:
        rows += _sums(
            f"{k - BARS:,} more of the top {k:,}", [values[BARS:].sum() for values in columns.values()]
        )
    rows += _sums(f"outside the top {k:,}", [_outside(values, order) for values in probs.values()])
    names = "".join(f'<th style="{CELL}">{escape(LABELS.get(name, name))}</th>' for name in ("", *probs))
    sentence = _sentence(probs, order, temperature, "classes" if sight.of == "rows" else "tokens")
    return (
        f'<div style="line-height:1.5">{_context(sight, number)}{sentence}'
        f'<table style="border-collapse:collapse;margin:.3rem 0"><tr>{names}</tr>{rows}</table></div>'
    )


def _sentence(probs: dict[str, np.ndarray], order: np.ndarray, temperature: float, many: str) -> str:
    teacher, k = probs["teacher"], len(order)
    entropy = -np.sum(teacher * np.log(teacher, where=teacher > 0, out=np.zeros_like(teacher)))
    others = ", ".join(
        f"the {escape(LABELS.get(name, name))} gives the same {many} {_percent(values[order].sum())}"
        for name, values in probs.items()
        if name != "teacher"
    )
    return (
        f"<p>At T = {temperature:g} the teacher's entropy is <b>{max(entropy, 0):.2f} nats</b>; "
        f"<b>{_percent(_outside(teacher, order))}</b> of its mass lies outside the top {k:,}; {others}.</p>"
    )


def _outside(probs: np.ndarray, order: np.ndarray) -> float:
    """Summed from what is outside, so that a small mass keeps its digits."""
    return float(np.delete(probs, order).sum())


def _context(sight: Sight, number: int) -> str:
    """The text around a token, with the token marked; what the models have not read yet is faint."""
    spans = []
    for n in range(max(number - CONTEXT, 0), min(number + 9, len(sight.texts))):
        style = (
            "outline:2px solid currentColor;font-weight:600"
            if n == number
            else "opacity:.45"
            if n > number
            else ""
        )
        read = f"{'<br>' * (n > 0)}{_seen(sight, sight.before[n])}" if sight.before[n] else ""
        spans.append(
            f"{read}<span "
            f'style="{style}">{_seen(sight, sight.texts[n])}</span>{"<br>" * sight.texts[n].count(chr(10))}'
        )
    return f'<pre style="white-space:pre-wrap;color:inherit;margin:.3rem 0">{"".join(spans)}</pre>'


def _row(text: Markup, shares: Sequence[tuple[str, float]], longest: float, *, came: bool) -> str:
    name = f'<code style="color:inherit;background:none">{text}</code>'
    cells = "".join(
        f'<td style="{CELL}"><span '
        f'style="display:inline-block;height:.8em;width:{LONGEST * share / longest:.2f}em;'
        f'background:{COLOURS.get(model, "#56b4e9")}"></span> {_percent(share)}</td>'
        for model, share in shares
    )
    return f'<tr><td style="{CELL}">{f"<b>{name}</b> came" if came else name}</td>{cells}</tr>'


def _seen(sight: Sight, text: str) -> Markup:
    """Of a token with its white space, which is part of it."""
    return escape(text if sight.of == "rows" else visible(text))


def _sums(words: str, shares: Sequence[float]) -> str:
    return (
        f'<tr style="opacity:.75"><td style="{CELL}">{words}</td>'
        + "".join(f'<td style="{CELL}">{_percent(share)}</td>' for share in shares)
        + "</tr>"
    )


def _percent(share: float) -> str:
    return "0 %" if share <= 1e-9 else "&lt; 0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"
