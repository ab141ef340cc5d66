"""A held-out text coloured by how hard each token is for a student: HTML that needs no script.  Imports no
torch.

Reads what `kdlib.evaluation.predictions.summary` keeps in explorers.json; where rows are classified, each is
coloured as a whole.  Ink and background are the page's own, and colours lie thinly over them, so that it
reads in light and dark; text stands in `code`, where no notebook looks for formulas, and is escaped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from kdlib.plots.axes import LABELS
from kdlib.plots.visible import visible

MEASURES = {"kl": "KL to the teacher", "ce": "cross-entropy", "differs": "disagreement"}
FULL = 0.72  # opacity of the strongest colour
BROAD = 95  # per cent of the tokens that the colours tell apart; those above are as strong as it gets
HARDEST = 8  # in the list
STYLE = Path(__file__).with_name("heat_map.css").read_text(encoding="utf-8")


def heat_map(
    facts: Mapping[str, Any], student: str, measure: str | None = None, *, marked: int | None = None
) -> str:
    """The text in colours, with the candidates of teacher and student for the token under the cursor, and the
    hardest tokens.

    Args:
        facts: explorers.json.
        student: one of its students.
        measure: one of `MEASURES`; with None the page itself offers the choice.
        marked: the token whose candidates are shown while no other is pointed at; the hardest unless given.
    """
    marked = hardest(facts, student, measure or "kl", 1)[0] if marked is None else marked
    strengths = {name: _strengths(facts, student, name) for name in MEASURES}
    tokens = "".join(
        _token(facts, student, number, strengths, marked=number == marked)
        for number in range(len(facts["tokens"]))
    )
    resting = f'<span class="resting">{_card(facts, student, marked)}</span>'
    choice = "".join(
        (
            f'<label><input type="radio" name="measure" value="{name}"{" checked" * (name == "kl")}> '
            f"{words}</label>"
        )
        for name, words in MEASURES.items()
    )
    before = f'<p class="choice">coloured by: {choice}</p>' if measure is None else ""
    leads = "".join(
        (
            f'<p class="of {name}"><span class="lead">{message(facts, student, name)}.</span> '
            f"{_legend(facts, name)}</p>"
        )
        for name in MEASURES
    )
    lists = "".join(
        f'<div class="of {name}">{_hardest_table(facts, student, name)}</div>' for name in MEASURES
    )
    return (
        f'<style>{STYLE}</style><form class="kd-heat{f" {measure}" if measure else ""}">{before}{leads}'
        f'<code class="text">{tokens}{resting}</code>{lists}</form>'
    )


def values(facts: Mapping[str, Any], student: str, measure: str) -> np.ndarray:
    """[N] nats per token; of `differs` 1 where the first choices differ, else 0."""
    said = facts["students"][student]
    return 1.0 - np.array(said["agrees"], dtype=float) if measure == "differs" else np.array(said[measure])


def hardest(facts: Mapping[str, Any], student: str, measure: str, count: int | None = None) -> list[int]:
    """The tokens' numbers, the hardest first; first choices that differ in the order of their KL."""
    order = (
        values(facts, student, measure) * 1e6 + values(facts, student, "kl")
        if measure == "differs"
        else (values(facts, student, measure))
    )
    return np.argsort(-order, kind="stable")[:count].tolist()


def limit(facts: Mapping[str, Any], measure: str) -> float:
    """Where the strongest colour begins: the same for all students, so that their maps can be compared."""
    if measure == "differs":
        return 1.0
    every = np.concatenate([values(facts, student, measure) for student in facts["students"]])
    return float(f"{max(np.percentile(every[np.isfinite(every)], BROAD), 1e-3):.2g}")


def message(facts: Mapping[str, Any], student: str, measure: str) -> str:
    """What the map shows, in a sentence: how much of it sits in how few tokens."""
    found, who = values(facts, student, measure), LABELS.get(student, student)
    if measure == "differs":
        return (
            f"Teacher and {who} have different first choices at {found.sum():.0f} of {len(found)} {of(facts)}"
        )
    half = int(np.searchsorted(np.cumsum(-np.sort(-found)), found.sum() / 2)) + 1
    return (
        f"Half of the {who}'s {MEASURES[measure]} sits in {half} of {len(found)} {of(facts)}; the mean is "
        f"{found.mean():.2f} nats"
    )


def of(facts: Mapping[str, Any]) -> str:
    """What is coloured: tokens, or rows."""
    return facts.get("of", "tokens")


def _strengths(facts: Mapping[str, Any], student: str, measure: str) -> np.ndarray:
    return FULL * np.minimum(values(facts, student, measure) / limit(facts, measure), 1.0)


def _token(
    facts: Mapping[str, Any], student: str, number: int, strengths: Mapping[str, np.ndarray], *, marked: bool
) -> str:
    token = facts["tokens"][number]
    style = ";".join(f"--{name}:{strength[number]:.2f}" for name, strength in strengths.items())
    row = (
        f'{"<br>" * (number > 0)}<span class="before">{_seen(facts, token["before"])}</span>'
        if token["before"]
        else ""
    )
    return (
        f'{row}<span class="t{" marked" * marked}" '
        f'style="{style}">{_seen(facts, token["text"])}{_card(facts, student, number)}</span>'
    ) + "<br>" * token["text"].count("\n")


def _card(facts: Mapping[str, Any], student: str, number: int) -> str:
    """What came, what it cost, and what both models would have said."""
    teacher, said = facts["teacher"], facts["students"][student]
    columns = [
        [
            f'<span><code>{_seen(facts, text)}</code><span class="soft">{_share(p)}</span></span>'
            for text, p in top
        ]
        for top in (teacher["top"][number], said["top"][number])
    ]
    pairs = "".join(a + b for a, b in zip(*columns, strict=True))
    token = facts["tokens"][number]
    came = (
        f'<b><code>{_seen(facts, token["text"])}</code></b> <span class="soft">came, token '
        f"{number + 1}</span>"
    )
    if of(facts) == "rows":
        came = (
            f'<span class="soft">row {number + 1}, of the class</span> '
            f"<b>{_seen(facts, _context(facts, number))}</b>"
        )
    cost = (
        f"KL {said['kl'][number]:.2f} · cross-entropy {said['ce'][number]:.2f}, the teacher's "
        f"{teacher['ce'][number]:.2f} nats"
    )
    return (
        f'<span class="card">{came}<br><span class="soft">{cost}</span><span class="pair"><b>teacher</b><b>'
        f"{escape(LABELS.get(student, student))}</b>{pairs}</span></span>"
    )


def _hardest_table(facts: Mapping[str, Any], student: str, measure: str) -> str:
    said, teacher = facts["students"][student], facts["teacher"]
    names = (
        "hardest",
        "class" if of(facts) == "rows" else "after",
        "KL",
        "cross-entropy",
        "teacher's choice",
        "student's choice",
    )
    rows = "".join(
        f"<tr><td><b><code>{_seen(facts, facts['tokens'][n]['text'])}</code></b></td>"
        f'<td class="soft"><code>{_seen(facts, _context(facts, n))}</code></td>'
        f'<td class="n">{said["kl"][n]:.2f}</td><td '
        f'class="n">{said["ce"][n]:.2f}</td><td>{_first(facts, teacher["top"][n])}</td>'
        f"<td>{_first(facts, said['top'][n])}</td></tr>"
        for n in hardest(facts, student, measure, HARDEST)
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


def _context(facts: Mapping[str, Any], number: int, length: int = 24) -> str:
    """The end of what was read before a token, within its row; of a row, its class."""
    if of(facts) == "rows":
        return facts["tokens"][number]["before"].removesuffix(": ")
    text = ""
    for token in reversed(facts["tokens"][: number + 1]):
        text = (
            token["before"] if token is facts["tokens"][number] else token["before"] + token["text"]
        ) + text
        if token["before"] or len(text) > length:
            break
    return text[-length:]


def _legend(facts: Mapping[str, Any], measure: str) -> str:
    if measure == "differs":
        return '<span class="legend"><span class="two"></span> first choices differ</span>'
    return (
        f'<span class="legend">0 <span class="scale"></span> {limit(facts, measure):g} nats and more</span>'
    )


def _first(facts: Mapping[str, Any], top: Sequence[tuple[str, float]]) -> str:
    text, share = top[0]
    return f'<code>{_seen(facts, text)}</code> <span class="soft">{_share(share)}</span>'


def _share(probability: float) -> str:
    return f"{probability:.1%}".replace("%", " %") if probability >= 0.001 else "&lt; 0.1 %"


def _seen(facts: Mapping[str, Any], text: str) -> Markup:
    """Of a token with its white space, which is part of it."""
    return escape(text if of(facts) == "rows" else visible(text))
