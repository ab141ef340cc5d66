"""Tokens and rows to be looked at: what is learned, how hard each is, what models say.

Ink and background are the page's own, and colours lie thinly over them, so that it reads in light and dark;
text stands in `code`, where no notebook looks for formulas, and is escaped.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from kdlib.plots.axes import COLOURS, label_of
from kdlib.plots.softening import Predictions

COLOURED_BY = {"kl": "KL to the teacher", "ce": "cross-entropy", "differs": "disagreement"}
FULL = 0.72  # opacity of the strongest colour
BROAD = 95  # per cent of the tokens that the colours tell apart; those above are as strong as it gets
HARDEST = 8  # in the list
BARS = 12  # candidates shown; the others of the top k in one line
CONTEXT = 24  # tokens of text before a token (and 8 after it), or characters in the list
LONGEST = 14  # em, of the longest bar
HERE = Path(__file__).parent
STYLE = Markup((HERE / "heat_map.css").read_text(encoding="utf-8"))
STATES = {  # of a token: its colour in a page and in a terminal, and what that means
    "learned": ("#c6e7f7", "\x1b[30;46m", "predicted, and counted in the loss"),
    "context": ("#eeeeee", "\x1b[2m", "read, not learned"),
    "padding": ("#ffffff", "\x1b[2;9m", "not even read"),
}
STRETCHES = {  # of a row that two tokenizers cut: likewise
    "single": ("rgba(86,180,233,.3)", "\x1b[30;46m", "one token on both sides"),
    "several": ("rgba(230,159,0,.3)", "\x1b[30;43m", "the same bytes in other tokens"),
    "apart": ("rgba(128,128,128,.12)", "\x1b[2m", "not compared"),
}
COLUMNS = 100  # of a terminal
CLASSES = 8  # of a row, the likeliest; the others in one line


def visible(text: str) -> str:
    """A token with its white space and control characters to be seen."""
    signs = {" ": "·", "\n": "⏎", "\t": "→"}
    return "".join(signs.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) or "∅"


def heat_map(facts: Mapping, student: str, measure: str | None = None, *, marked: int | None = None) -> str:
    """A text in colours, what teacher and student say of the token under the cursor, and the hardest tokens.

    Args:
        facts: explorers.json (kdlib.evaluation.predictions.summary); classified rows are coloured as a whole.
        measure: one of `COLOURED_BY`; with None the page itself offers the choice.
        marked: the token whose candidates are shown while no other is pointed at; the hardest unless given.
    """
    marked = hardest(facts, student, measure or "kl")[0] if marked is None else marked
    teacher, said = facts["teacher"], facts["students"][student]
    limits = {name: limit(facts, name) for name in COLOURED_BY}
    strengths = {n: FULL * np.minimum(values(facts, student, n) / most, 1.0) for n, most in limits.items()}
    tokens = [
        {
            **token,
            "number": n + 1,
            "context": _context(facts, n),
            "strengths": {name: strength[n] for name, strength in strengths.items()},
            "costs": (said["kl"][n], said["ce"][n], teacher["ce"][n]),
            "tops": list(zip(teacher["top"][n], said["top"][n], strict=True)),
        }
        for n, token in enumerate(facts["tokens"])
    ]
    return _filled(
        "heat_map.html.j2",
        of(facts),
        style=STYLE,
        who=label_of(student),
        measure=measure,
        measures=COLOURED_BY,
        limits=limits,
        message=partial(message, facts, student),
        tokens=tokens,
        marked=tokens[marked],
        hardest=lambda name: [tokens[n] for n in hardest(facts, student, name, HARDEST)],
    )


def values(facts: Mapping[str, Any], student: str, measure: str) -> np.ndarray:
    """[N] nats per token; of `differs` 1 where the first choices differ, else 0."""
    said = facts["students"][student]
    return 1.0 - np.array(said["agrees"], dtype=float) if measure == "differs" else np.array(said[measure])


def hardest(facts: Mapping[str, Any], student: str, measure: str, count: int | None = None) -> list[int]:
    """The tokens' numbers, the hardest first; first choices that differ in the order of their KL."""
    order = values(facts, student, measure)
    if measure == "differs":
        order = order * 1e6 + values(facts, student, "kl")
    return np.argsort(-order, kind="stable")[:count].tolist()


def limit(facts: Mapping[str, Any], measure: str) -> float:
    """Where the strongest colour begins: the same for all students, so that their maps can be compared."""
    if measure == "differs":
        return 1.0
    every = np.concatenate([values(facts, student, measure) for student in facts["students"]])
    return float(f"{max(np.percentile(every[np.isfinite(every)], BROAD), 1e-3):.2g}")


def message(facts: Mapping[str, Any], student: str, measure: str) -> str:
    """What the map shows, in a sentence: how much of it sits in how few tokens."""
    found, who = values(facts, student, measure), label_of(student)
    where = f"{len(found)} {of(facts)}"
    if measure == "differs":
        return f"Teacher and {who} have different first choices at {found.sum():.0f} of {where}"
    half = np.searchsorted(np.cumsum(-np.sort(-found)), found.sum() / 2) + 1
    few = f"{half} of {where}; the mean is {found.mean():.2f} nats"
    return f"Half of the {who}'s {COLOURED_BY[measure]} sits in {few}"


def of(facts: Mapping[str, Any]) -> str:
    """What is coloured: tokens, or rows."""
    return facts.get("of", "tokens")


def _context(facts: Mapping[str, Any], number: int) -> str:
    """The end of what was read before a token, within its row; of a row, its class."""
    tokens = facts["tokens"]
    text = tokens[number]["before"]
    if of(facts) == "rows":
        return text.removesuffix(": ")
    while number and not tokens[number]["before"] and len(text) <= CONTEXT:
        number -= 1
        text = tokens[number]["before"] + tokens[number]["text"] + text
    return text[-CONTEXT:]


def candidate_bars(predictions: Predictions, number: int, temperature: float, k: int) -> str:
    """The k likeliest candidates for a token: bars in HTML of what each model gives them at a temperature."""
    from scipy.special import entr, softmax  # takes a third of a second

    logits = {name: every[number].astype(np.float64) for name, every in predictions.logits.items()}
    probs = {name: softmax(each / temperature) for name, each in logits.items()}
    order = np.argsort(-logits["teacher"], kind="stable")[:k]
    longest = max(values[order[:BARS]].max() for values in probs.values())
    coloured = [(COLOURS.get(name, "#56b4e9"), values) for name, values in probs.items()]
    around = range(max(number - CONTEXT, 0), min(number + 9, len(predictions.texts)))
    return _filled(
        "candidates.html.j2",
        predictions.of,
        around=[(predictions.before[n], predictions.texts[n], n - number) for n in around],
        temperature=temperature,
        entropy=entr(probs["teacher"]).sum(),
        k=len(order),
        same=[(label_of(name), probs[name][order].sum()) for name in predictions.students],
        many="classes" if predictions.of == "rows" else "tokens",
        names=[label_of(name) for name in probs],
        bars=[
            (
                predictions.decode(int(token)),
                token == predictions.targets[number],
                [(LONGEST * values[token] / longest, colour, values[token]) for colour, values in coloured],
            )
            for token in order[:BARS]
        ],
        more=max(len(order) - BARS, 0),
        rest=[values[order[BARS:]].sum() for values in probs.values()],
        # summed from what is outside, so that a small mass keeps its digits
        outside=[float(np.delete(values, order).sum()) for values in probs.values()],
    )


def _filled(template: str, of: str, **content: Any) -> str:
    """A template with text escaped; tokens with their white space, which is part of them."""
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True)
    page.filters |= {"seen": str if of == "rows" else visible, "share": _share, "percent": _percent}
    return page.get_template(template).render(br=Markup("<br>"), rows=of == "rows", **content)


def _share(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.001 else "< 0.1 %"


def _percent(share: float) -> str:
    return "0 %" if share <= 1e-9 else "< 0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"


@dataclass(frozen=True)
class TokenView:
    """The tokens of a row as models see it, each learned, context, or padding; coloured, if in a terminal."""

    texts: Sequence[str]
    states: Sequence[str]

    def _repr_html_(self) -> str:
        tokens = list(zip(self.texts, self.states, strict=True))
        return _filled("token_view.html.j2", "tokens", tokens=tokens, states=STATES, legend=self._legend())

    def __str__(self) -> str:
        lines = [visible(text) + "\x1b[0m" + "\n" * text.count("\n") for text in self.texts]
        coloured = "".join(STATES[state][1] + line for state, line in zip(self.states, lines, strict=True))
        return f"{coloured}\n{_coloured(STATES, self._legend())}"

    def _legend(self) -> list[tuple[str, str]]:
        """[(state, `learned: 127 (predicted, and counted in the loss)`)] of the states that occur."""
        counts = Counter(self.states)
        return [(s, f"{s}: {counts[s]} ({meaning})") for s, (*_, meaning) in STATES.items() if counts[s]]


def _coloured(states: Mapping[str, Sequence[str]], legend: Sequence[tuple[str, str]]) -> str:
    """A legend in a terminal."""
    return "; ".join(f"{states[state][1]}{words}\x1b[0m" for state, words in legend)


def token_view(
    ids: Sequence[int], learned: Sequence[bool], read: Sequence[bool], decode: Callable[[list[int]], str]
) -> TokenView:
    """A row's tokens as text, and what becomes of each: whether it is learned, or at least read."""
    states = np.where(learned, "learned", np.where(read, "context", "padding")).tolist()
    return TokenView([decode([token]) for token in ids], states)


@dataclass(frozen=True)
class SpanView:
    """A row as student and teacher cut it, in stretches of the same bytes; coloured, if in a terminal."""

    stretches: Sequence[tuple[str, Sequence[str], Sequence[str]]]  # one of STRETCHES, both sides' tokens

    def _repr_html_(self) -> str:
        parts = {"stretches": self.stretches, "states": STRETCHES, "legend": self._legend()}
        return _filled("span_view.html.j2", "tokens", **parts)

    def __str__(self) -> str:
        """Two lines for each line of text, the student's tokens above the teacher's."""
        made, lines, width = [], ["", ""], 0
        for state, *sides in self.stretches:
            cuts = ["|".join(map(visible, side)) if side else "" for side in sides]
            longest = max(map(len, cuts))
            if lines[0] and width + longest >= COLUMNS:
                made, lines, width = [*made, *lines, ""], ["", ""], 0
            ink = STRETCHES[state][1]
            lines = [f"{line}{ink}{cut:{longest}}\x1b[0m " for line, cut in zip(lines, cuts, strict=True)]
            width += longest + 1
            if "\n" in "".join(sides[0]):
                made, lines, width = [*made, *lines, ""], ["", ""], 0
        return "\n".join([*made, *lines, _coloured(STRETCHES, self._legend())])

    def _legend(self) -> list[tuple[str, str]]:
        """[(state, `one token on both sides: 61`)] of the kinds of stretches that occur."""
        counts = Counter(state for state, *_ in self.stretches)
        return [(s, f"{meaning}: {counts[s]}") for s, (*_, meaning) in STRETCHES.items() if counts[s]]


@dataclass(frozen=True)
class RowView:
    """A classified row as the student reads it, its class, and the teacher's probabilities at T = 1."""

    text: str
    label: str
    said: Sequence[tuple[str, float]]

    @property
    def lines(self) -> list[tuple[str, float]]:
        """The likeliest classes first, the rest of many together."""
        ranked = sorted(self.said, key=lambda pair: -pair[1])
        shown, rest = ranked[:CLASSES], ranked[CLASSES:]
        return [*shown, (f"{len(rest)} others", sum(p for _, p in rest))] if rest else shown

    def _repr_html_(self) -> str:
        return _filled("row_view.html.j2", "rows", row=self)

    def __str__(self) -> str:
        said = (f"  {p:6.1%}  {n}{'  (its class)' if n == self.label else ''}\n" for n, p in self.lines)
        return f"{self.text}\nclass: {self.label}\nthe teacher says:\n{''.join(said)}".removesuffix("\n")
