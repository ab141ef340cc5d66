"""A source's rows as items, split by question; the form is told by the columns.

multiple choice       question, choices, answer: names as in data.question, data.choices, data.answer
messages              messages: [{role, content}, …], the last one the assistant's
prompt and response   prompt, response
"""

import json
import math
import random
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Dataset

from kdlib.config.sections import DataConfig
from kdlib.errors import DataError
from kdlib.sources.columns import AT_ONCE
from kdlib.sources.rows import group_values, kept_once, own_splits, refuse_rows
from kdlib.tokens.answers import Fault, attempted

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Item:
    """One row, whatever its form."""

    where: str = field(compare=False)  # `row 3 of train`, counted from 0
    question: str  # what is asked; of messages, all that comes before the first answer
    answers: tuple[str, ...]  # the choices, or the one response
    right: int = 0
    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    group: str = field(default="", compare=False)  # what it belongs to, where data.group says


def form_of(config: DataConfig, rows: Dataset) -> str:
    """Which form these rows have; a DataError where none, with the columns that are missing."""
    found, wanted = rows.column_names, (config.question, config.choices, config.answer)
    for form, (columns, _) in FORMS.items():
        if set(columns or wanted) <= set(found):
            return form
    raise DataError(
        f"{config.source}: found the columns {', '.join(found)}; needed are {', '.join(wanted)} (for "
        "multiple choice), or prompt and response, or messages; name the columns of a multiple choice in "
        "data.question, data.choices and data.answer"
    )


def read_items(config: DataConfig, rows: Dataset, split: str, form: str) -> list[Item]:
    """These rows as items; those of which nothing can be asked are refused one by one."""
    if (other := form_of(config, rows)) != form:
        raise DataError(
            f"{config.source}: {split} has {other} and train has {form}; needed is one form in all splits"
        )
    wheres = [f"row {number} of {split}" for number in range(len(rows))]
    what = f"of {split} with nothing to ask or to answer; mend them, or take them out"
    items = collected(config, what, wheres, attempted(partial(FORMS[form][1], config), wheres, _each(rows)))
    groups = group_values(config, rows, split)
    if groups is None:
        return items
    return [replace(item, group=group) for item, group in zip(items, groups, strict=True)]


def split_items(
    config: DataConfig, found: Mapping[str, Dataset], form: str, *, seed: int, notes: dict[str, Any]
) -> dict[str, list[Item]]:
    """Train, validation, test where there is one: the source's own, else taken by question.

    Exact repetitions go, and from the source's train the questions that its other splits ask.
    """
    own = own_splits(config, found)
    if "test" in own and config.test is None and form == "multiple choice":
        rows = found["test"]
        answers = rows[config.answer] if config.answer in rows.column_names else [0]
        if all(answer in (None, "", -1, "-1") for answer in answers):
            notes["test"] = "the source's own has no answers and is not used"
            del own["test"]
    sides = {"train": "train", **own}
    splits = {what: read_items(config, found[split], split, form) for what, split in sides.items()}
    wanted = {"validation": config.validation, "test": config.test}
    shares = {what: each for what, each in wanted.items() if isinstance(each, float) and what not in own}
    notes["split"] = "by question" if "validation" in shares else "the source's own"
    if "test" in shares or "test" in own:
        notes["test"] = f"{config.test:g} of the questions" if "test" in shares else "the source's own"
    given = sum(map(len, splits.values()))
    kept = kept_once(
        config, {what: (items, [each.question for each in items]) for what, items in splits.items()}
    )
    splits = {what: [splits[what][number] for number in numbers] for what, numbers in kept.items()}
    notes["duplicate_documents_left_out"] = given - sum(map(len, splits.values()))
    if shares:
        splits |= _taken(config, splits["train"], shares, seed)
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _taken(
    config: DataConfig, items: Sequence[Item], shares: Mapping[str, float], seed: int
) -> dict[str, list[Item]]:
    """Shares of the questions held out; all rows of one question, or of one group, on one side."""
    questions = list(dict.fromkeys(item.group or item.question for item in items))
    random.Random(seed).shuffle(questions)
    side, start = dict.fromkeys(questions, "train"), 0
    for what, share in shares.items():
        count = max(1, round(share * len(questions)))
        side |= dict.fromkeys(questions[start : start + count], what)
        start += count
    if start >= len(questions):
        count = f"{len(questions)} question{'s' * (len(questions) != 1)}"
        raise DataError(
            f"{config.source}: {count} in train, of which {start} would be held out for "
            f"{' and '.join(shares)}; give more, or lower data.{' and data.'.join(shares)}"
        )
    return {
        what: [item for item in items if side[item.group or item.question] == what]
        for what in ("train", *shares)
    }


def check_one_answer(config: DataConfig, items: Sequence[Item]) -> None:
    """Refuse a question with the same choices and two answers: one of them is wrong, and would be taught."""
    first, faults = {}, []
    for item in items:
        if len(item.answers) > 1:
            earlier = first.setdefault((item.question, frozenset(item.answers)), item)
            before, now = (each.answers[each.right] for each in (earlier, item))
            if before != now:
                asks = f"asks what {earlier.where} asks, whose answer is {before!r}, and answers {now!r}"
                faults.append(f"{item.where}: {asks}")
    refuse_rows(config, faults, "with another answer to a question asked before; keep one of each")


def collected(config: DataConfig, what: str, wheres: Sequence[str], made: Iterable) -> list[Any]:
    """These as they are; a DataError of all the `Fault`s among them, where there are any: `refuse_rows`."""
    found = list(made)
    both = zip(wheres, found, strict=True)
    refuse_rows(config, [f"{where}: {each}" for where, each in both if isinstance(each, Fault)], what)
    return found


def _each(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows, read many at a time."""
    for batch in rows.iter(AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _multiple_choice(config: DataConfig, where: str, row: Mapping[str, Any]) -> Item:
    question = _text(row[config.question], config.question)
    choices, labels = _choices(row[config.choices], config.choices)
    return Item(where, question, choices, _right(row[config.answer], choices, labels, config.answer))


def _choices(value: Any, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices' texts, and labels where they have some (ARC); a table's cell holds a list as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise Fault(f"{column} = {value[:60]!r}; needed is a list of choices") from None
    labels: tuple[str, ...] = ()
    if isinstance(value, Mapping):
        value, labels = value.get("text"), tuple(map(str, value.get("label") or ()))
    if not isinstance(value, list):
        raise Fault(f"{column} = {value!r}; needed is a list of choices, or {{text: […], label: […]}}")
    if len(value) < 2:
        raise Fault(f"{len(value)} choice{'s' * (not value)}; needed are two or more to choose among")
    if labels and len(labels) != len(value):
        raise Fault(f"{len(value)} choices with {len(labels)} labels")
    written = [str(each) if type(each) in (int, float) else each for each in value]
    return tuple(_text(each, f"choice {number}") for number, each in enumerate(written)), labels


def _right(answer: Any, choices: Sequence[str], labels: Sequence[str], column: str) -> int:
    """Which choice is right: by its label where there are some, its text, letter A to Z, or number from 0."""
    if isinstance(answer, float) and math.isfinite(answer) and answer == int(answer):
        answer = int(answer)
    words = answer.strip() if isinstance(answer, str) else str(answer)
    if answer is None or isinstance(answer, bool) or not words:
        raise Fault(f"no answer: {column} = {answer!r}; needed is a choice's number, letter or text")
    if words in labels:
        return labels.index(words)
    same = [number for number, choice in enumerate(choices) if choice.strip() == words]
    if isinstance(answer, str) and len(same) > 1:
        both = " and ".join(map(str, same))
        raise Fault(f"the answer {answer!r} is the text of the choices {both}; say which, by its number")
    if isinstance(answer, str) and same:
        return same[0]
    letters = string.ascii_uppercase
    place = int(words) if words.isdecimal() else letters.find(words.upper()) if len(words) == 1 else -1
    if labels or not 0 <= place < len(choices):
        last = letters[min(len(choices), 26) - 1]
        among = ", ".join(labels) or f"0 to {len(choices) - 1}, A to {last}"
        raise Fault(
            f"the answer {answer!r} is none of the {len(choices)} choices ({among}, or a choice's text)"
        )
    return place


def _pair(config: DataConfig, where: str, row: Mapping[str, Any]) -> Item:
    return Item(where, _text(row["prompt"], "prompt"), (_text(row["response"], "response"),))


def _conversation(config: DataConfig, where: str, row: Mapping[str, Any]) -> Item:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise Fault(f"messages = {messages!r}; needed is a list of {{role, content}}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            needed = f"{{role, content}} with a role of {', '.join(ROLES)}"
            raise Fault(f"message {number} = {message!r}; needed is {needed}")
        _text(message.get("content"), f"the content of message {number}")
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant" or roles[0] == "assistant":
        raise Fault(
            f"the roles are {', '.join(roles)}; needed is a beginning by someone else, and the assistant "
            "at the end"
        )
    spoken = tuple((message["role"], message["content"]) for message in messages)
    asked = "\n".join(content for _, content in spoken[: roles.index("assistant")])
    return Item(where, asked, (spoken[-1][1],), messages=spoken)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "empty" if value is None or isinstance(value, str) else repr(value)
        raise Fault(f"{what} is {found}; needed is a text")
    return value


# form → its columns (of a multiple choice those that the config names), and what reads a row
FORMS: dict[str, tuple[tuple[str, ...], Callable[[DataConfig, str, Mapping[str, Any]], Item]]] = {
    "multiple choice": ((), _multiple_choice),
    "messages": (("messages",), _conversation),
    "prompt and response": (("prompt", "response"), _pair),
}
