"""A source's rows as items, split by question; kdlib.questions knows their forms."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import datasets
from datasets import Dataset

from kdlib.config.data import DataConfig
from kdlib.errors import DataError
from kdlib.questions.choices import (
    READINGS,
    Question,
    answer_in,
    choices_in,
    joined,
    reading_of,
    right_among,
    right_choice,
)
from kdlib.questions.forms import Form, form_of
from kdlib.questions.messages import talk_in
from kdlib.sources.rows import AT_ONCE, group_values, kept_once, own_splits, refuse_rows
from kdlib.tokens.answers import Fault, Talk, attempted

UNASKED = "with nothing to ask or to answer; mend them, or take them out"


@dataclass(frozen=True, slots=True)
class Item:
    """One row, whatever its form."""

    where: str = field(compare=False)  # `row 3 of train`, counted from 0
    question: str  # what is asked; of messages, all that comes before the first answer
    answers: tuple[str, ...]  # the choices, or the one response
    right: int = 0
    talk: Talk | None = None  # all of it, where it is more than a question and an answer
    group: str = field(default="", compare=False)  # what it belongs to, where data.group says


def read_items(
    config: DataConfig, splits: Mapping[str, Dataset], form: Form, notes: dict[str, Any]
) -> dict[str, list[Item]]:
    """The rows of each split as items; those of which nothing can be asked are refused one by one.

    Of a multiple choice what its answers mean is found over all splits, and stands in `notes["answers"]`.
    """
    found = {}
    for split, rows in splits.items():
        if (other := form_of(config, rows.column_names)).columns != form.columns:
            raise DataError(
                f"{config.source}: {split} has {other} and train has {form}; needed is one form in all splits"
            )
        wheres = [f"row {number} of {split}" for number in range(len(rows))]
        read = attempted(partial(READERS[form.kind], config, form), wheres, _each(rows))
        found[split] = usable(config, f"of {split} {UNASKED}", wheres, read, notes)
    if "answer" in form.columns:
        found = _understood(config, found, form, notes)
    elif config.answer_as:
        raise DataError(
            f"{config.source}: data.answer_as: found {config.answer_as}, and these rows are {form}, of which "
            "no answer is to be understood; leave it out"
        )
    made = {split: items for split, (_, items) in found.items()}
    for split, items in made.items():
        if (groups := group_values(config, splits[split], split)) is not None:
            of = {f"row {number} of {split}": group for number, group in enumerate(groups)}
            made[split] = [replace(item, group=of[item.where]) for item in items]
    return made


def _understood(
    config: DataConfig,
    found: Mapping[str, tuple[Sequence[str], Sequence[Question]]],
    form: Form,
    notes: dict[str, Any],
) -> dict[str, tuple[Sequence[str], list[Item]]]:
    """The questions of all splits as items, by what the column of their answers means."""
    every = [each for wheres, questions in found.values() for each in zip(wheres, questions, strict=True)]
    (column,) = form.columns["answer"]
    try:
        reading = reading_of(every, config.answer_as, column)
    except Fault as fault:
        raise DataError(f"{config.source}: {fault}") from fault
    how = "as data.answer_as says" if config.answer_as else f"as all {len(every):,} answers can be read"
    notes["answers"] = f"{column!r} is {READINGS[reading][0]} ({reading}), {how}"

    def item(where: str, each: Question) -> Item:
        return Item(where, each.question, each.choices, right_choice(each, reading))

    return {
        split: usable(config, f"of {split} {UNASKED}", wheres, attempted(item, wheres, questions), notes)
        for split, (wheres, questions) in found.items()
    }


def split_items(
    config: DataConfig, found: Mapping[str, Dataset], form: Form, *, seed: int, notes: dict[str, Any]
) -> dict[str, list[Item]]:
    """Train, validation, test where there is one: the source's own, else taken by question.

    Exact repetitions go, and from the source's train the questions that its other splits ask.
    """
    own = own_splits(config, found)
    if "test" in own and config.test is None and "answer" in form.columns:
        (column,), rows = form.columns["answer"], found["test"]
        answers = rows[column] if column in rows.column_names else [None]
        if all(answer in (None, "", -1, "-1") for answer in answers):
            notes["test"] = "the source's own has no answers and is not used"
            del own["test"]
    sides = {"train": "train", **own}
    read = read_items(config, {split: found[split] for split in sides.values()}, form, notes)
    splits = {what: read[split] for what, split in sides.items()}
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


def usable(
    config: DataConfig, what: str, wheres: Sequence[str], made: Iterable, notes: dict[str, Any]
) -> tuple[list[str], list[Any]]:
    """These, and where they stand, without the `Fault`s among them, which `refuse_rows` counts or refuses."""
    both = list(zip(wheres, made, strict=True))
    refuse_rows(config, [f"{where}: {each}" for where, each in both if isinstance(each, Fault)], what, notes)
    kept = [(where, each) for where, each in both if not isinstance(each, Fault)]
    if not kept:
        raise DataError(f"{config.source}: no row {what}")
    return [where for where, _ in kept], [each for _, each in kept]


def _each(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows, read many at a time; what is stored as the number of a name is the name."""
    names = {n: each.int2str for n, each in rows.features.items() if isinstance(each, datasets.ClassLabel)}
    for batch in rows.iter(AT_ONCE):
        for name, of in names.items():
            batch[name] = [number if number is None or number < 0 else of(number) for number in batch[name]]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _multiple_choice(config: DataConfig, form: Form, where: str, row: Mapping[str, Any]) -> Question | Item:
    question = joined(row, form.columns["question"])
    if "answer" in form.columns:
        choices, labels = choices_in({name: row[name] for name in form.columns["choices"]})
        (column,) = form.columns["answer"]
        return Question(question, choices, labels, answer_in(row[column], column))
    (right,) = form.columns["right"]
    choices, place = right_among(row[right], {name: row[name] for name in form.columns["wrong"]})
    return Item(where, question, choices, place)


def _talk(config: DataConfig, form: Form, where: str, row: Mapping[str, Any]) -> Item:
    try:
        talk, asked, answer = talk_in(form, row, config.ignore or ())
    except RecursionError:
        raise Fault("it has lists in lists beyond what can be read") from None
    return Item(where, asked, (answer,), talk=talk)


READERS: dict[str, Callable[[DataConfig, Form, str, Mapping[str, Any]], Any]] = {
    "multiple choice": _multiple_choice,
    "messages": _talk,
    "prompt and response": _talk,
}
