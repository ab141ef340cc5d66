"""Multiple choices in the forms of published ones: what can be chosen, and what a column says is right.

What an answer means is found for the whole column: one row says nothing of whether "2" is the second choice,
the third, or the one whose text is 2.
"""

import ast
import contextlib
import json
import math
import re
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.errors import shown
from kdlib.tokens.answers import Fault

LETTER = re.compile(r"\(?([A-Za-z])[).]?")
COUNTED = re.compile(r"[0-9]{1,3}")
TOO_DEEP = (RecursionError, MemoryError)  # what Python says of brackets within brackets


@dataclass(frozen=True, slots=True)
class Question:
    """A row of a multiple choice whose answer is not yet understood."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]  # what the row itself calls its choices; or nothing
    answer: str


def _number(question: Question, first: int) -> int | None:
    words = question.answer
    place = int(words) - first if COUNTED.fullmatch(words) else -1
    return place if 0 <= place < len(question.choices) else None


def _letter(question: Question) -> int | None:
    found = LETTER.fullmatch(question.answer)
    place = string.ascii_uppercase.index(found[1].upper()) if found else len(question.choices)
    return place if place < len(question.choices) else None


def _label(question: Question) -> int | None:
    return question.labels.index(question.answer) if question.answer in question.labels else None


def _same_text(question: Question) -> int | None:
    same = [n for n, choice in enumerate(question.choices) if choice.strip() == question.answer]
    return same[0] if same else None


READINGS: dict[str, tuple[str, Callable[[Question], int | None]]] = {
    "label": ("the label of a choice", _label),
    "from_0": ("the number of a choice, counted from 0", lambda question: _number(question, 0)),
    "from_1": ("the number of a choice, counted from 1", lambda question: _number(question, 1)),
    "letter": ("the letter of a choice, A for the first", _letter),
    "text": ("the text of a choice", _same_text),
}
"""`data.answer_as` → what it means, and which choice that makes of a row; None where none."""


def reading_of(questions: Sequence[tuple[str, Question]], asked: str | None, column: str) -> str:
    """What the answers of a column mean, one of `READINGS`: the one that fits all rows, or most.

    What labels its choices itself says by that what its answers mean.

    Args:
        questions: (where it stands, as it is).
        asked: `data.answer_as`.

    Raises:
        Fault: two fit, which understand some row differently; the two are shown.
    """
    if asked:
        return asked
    places = {name: [read(each) for _, each in questions] for name, (_, read) in READINGS.items()}
    fitting = {name: sum(place is not None for place in found) for name, found in places.items()}
    if fitting["label"] == len(questions):
        return "label"
    if not (most := max(fitting.values())):
        return "text"
    best = [name for name, count in fitting.items() if count == most]
    for name in best[1:]:
        for (where, each), one, other in zip(questions, places[best[0]], places[name], strict=True):
            if one != other:
                ways = [
                    f"{READINGS[way][0]} ({where}: {shown(each.answer)} is "
                    + ("none of them)" if place is None else f"{shown(each.choices[place])})")
                    for way, place in ((best[0], one), (name, other))
                ]
                raise Fault(
                    f"the answers in {column!r} can be {' or '.join(ways)}; the rows do not tell which is "
                    f"meant: write data.answer_as: {best[0]} or data.answer_as: {name}"
                )
    return best[0]


def right_choice(question: Question, reading: str) -> int:
    """Which choice is right, by what the column's answers mean.

    Raises:
        Fault: none of them; or its text is that of several.
    """
    what, read = READINGS[reading]
    place = read(question)
    if place is None:
        among = question.labels if reading == "label" else question.choices
        found = f"the answer {shown(question.answer)} is none of the {len(among)} choices"
        raise Fault(f"{found} ({shown(', '.join(among))}); in this column it is {what}")
    same = [n for n, choice in enumerate(question.choices) if choice.strip() == question.answer]
    if reading == "text" and len(same) > 1:
        both = " and ".join(map(str, same))
        raise Fault(
            f"the answer {shown(question.answer)} is the text of the choices {both}; say which, by its number"
        )
    return place


def answer_in(value: Any, column: str) -> str:
    """An answer as a text: 2.0, as tables have it, is "2"."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    words = value.strip() if isinstance(value, str) else str(value)
    if value is None or value != value or isinstance(value, bool) or not words:
        raise Fault(f"no answer: {column} = {shown(value)}; needed is a choice's number, letter or text")
    return words


def choices_in(values: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices' texts, and labels where they have some, in one column or several.

    One has a list, {text: […], label: […]} (ARC), {A: …, B: …}, or any of these as text.  Of several columns
    each has a choice, and they are labels where each is a letter; empty ones at the end are none.
    """
    found, labels = _listed(values)
    if len(found) < 2:
        raise Fault(f"{len(found)} choice{'s' * (not found)}; needed are two or more to choose among")
    if labels and len(labels) != len(found):
        raise Fault(f"{len(found)} choices with {len(labels)} labels")
    if len(set(labels)) < len(labels):
        raise Fault(f"two choices have one label: {shown(', '.join(labels))}")
    return tuple(text_of(each, f"choice {number}") for number, each in enumerate(found)), labels


def right_among(right: Any, wrong: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """The right answer among the wrong ones, and its place; in order of the alphabet, which tells nothing."""
    true = text_of(right, "the right answer").strip()
    false = [text_of(each, f"wrong answer {number}").strip() for number, each in enumerate(_listed(wrong)[0])]
    if not false or true in false:
        raise Fault(f"the right answer, {shown(true)}, is {'among' if false else 'without'} wrong ones")
    every = tuple(sorted([true, *false]))
    return every, every.index(true)


def _listed(values: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    if len(values) > 1:
        found = list(values.values())
        while found and found[-1] in (None, ""):
            found.pop()
        are_letters = all(len(name) == 1 and name.isalpha() for name in values)
        return found, tuple(values)[: len(found)] if are_letters else ()
    ((column, value),) = values.items()
    labels: Sequence[Any] = ()
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value, labels = value["text"], value.get("label") or ()
    elif isinstance(value, Mapping):
        there = {label: each for label, each in value.items() if each is not None}
        value, labels = list(there.values()), list(there)
    if not isinstance(value, list):
        raise Fault(f"{column} = {shown(value)}; needed is a list of choices, or {{text: […], label: […]}}")
    return value, tuple(map(str, labels))


def _parsed(text: str) -> Any:
    """What a table's cell holds as JSON, or as Python prints it; else the text."""
    for parse in (json.loads, ast.literal_eval):
        with warnings.catch_warnings(), contextlib.suppress(ValueError, SyntaxError, *TOO_DEEP):
            warnings.simplefilter("ignore")  # of backslashes, which formulas have
            found = parse(text)
            return [*found] if isinstance(found, tuple) else found
    return text


def text_of(value: Any, what: str) -> str:
    """A text, or a whole number as one; a Fault where there is none.

    2.0 is refused: among numbers with a fraction 2 looks the same, and which was written is lost.
    """
    if type(value) is int or (type(value) is float and math.isfinite(value) and value % 1):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value is None or isinstance(value, str) else shown(value)
        raise Fault(f"{what} is {found}; needed is a text")
    return value


def joined(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The texts of these columns, a line each; of several some may be empty."""
    there = [name for name in columns if row[name] is not None and str(row[name]).strip()]
    return "\n".join(text_of(row[name], name) for name in there or columns)
