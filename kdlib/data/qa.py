"""From questions and answers to rows whose prompt is given and whose answer is learned.

A row is {"input_ids", "prompt_tokens", "text": the question}, with "read_only" in conversations.  Of a
multiple choice the right choice is learned, and every choice of every held-out question stands in
`Prepared.choices` to be scored.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kdlib.config.sections import DataConfig
from kdlib.data.batches import Prepared, collate, fingerprint
from kdlib.data.prompts import Encoded, encoded_choices, encoded_response
from kdlib.data.qa_rows import Item, collected, form_of, read_items, refusal
from kdlib.data.sources import read_splits
from kdlib.data.text import beginning
from kdlib.errors import DataError, nearest

ROWS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "prompt_tokens": datasets.Value("int32"),
        "text": datasets.Value("string"),
        "read_only": datasets.List(datasets.Value("int32")),
    }
)
CHOICES = datasets.Features(
    {
        "item": datasets.Value("int32"),
        "choice": datasets.Value("int32"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "prompt_tokens": datasets.Value("int32"),
        "is_answer": datasets.Value("bool"),
        "characters": datasets.Value("int32"),
        "text": datasets.Value("string"),
        "question": datasets.Value("string"),
    }
)


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Prepared:
    """Read, split by question and tokenize the questions of a config; nothing is cut, and nothing left out
    but exact repetitions.

    The split, the order and the fingerprint depend on the rows and `data.split_seed` (else the seed) alone.

    Raises:
        DataError: nothing to read, not the named columns, or rows of which nothing can be asked, named one by
            one.
    """
    seed = seed if config.split_seed is None else config.split_seed
    found = {name: rows for name, rows in read_splits(config).items() if len(rows)}
    if "train" not in found:
        raise DataError(f"{config.source}: no row to train on; it needs questions with answers")
    form, notes = form_of(config, found["train"]), {"source": config.source}
    splits = _splits(config, found, form, seed=seed, notes=notes)
    _check_one_answer(config, [item for items in splits.values() for item in items])
    rows, choices, first = {}, {}, beginning(tokenizer)
    for name, items in splits.items():
        encoded = _encoded(config, name, items, form, tokenizer, first)
        limit = config.max_train_rows if name == "train" else config.max_eval_rows
        taken = (
            range(len(items))
            if limit is None
            else sorted(random.Random(seed).sample(range(len(items)), min(limit, len(items))))
        )
        items, encoded = [items[n] for n in taken], [encoded[n] for n in taken]
        rows[name] = _rows(items, encoded)
        if form == "multiple choice" and name != "train":
            choices[name] = _choices(items, encoded)
        notes |= {f"{name}_{what}": figure for what, figure in _counts(items, encoded).items()}
    notes |= {"form": form, "each_document_begins_with": tokenizer.decode(first)}
    notes["fingerprint"] = fingerprint(*rows.values(), *choices.values())
    return Prepared(
        rows["train"],
        rows["validation"],
        notes,
        partial(collate, pad_id=tokenizer.pad_token_id),
        len(tokenizer),
        test=rows.get("test"),
        choices=choices,
    )


def _splits(
    config: DataConfig, found: Mapping[str, Dataset], form: str, *, seed: int, notes: dict[str, Any]
) -> dict[str, list[Item]]:
    """Train, validation, and test where there is one: the source's own as they stand, else taken from
    train by question.
    """
    named = {
        "validation": config.validation if isinstance(config.validation, str) else "validation",
        "test": config.test if isinstance(config.test, str) else "test",
    }
    for what, split in named.items():
        if split not in found and split == getattr(config, what):
            raise DataError(
                f"{config.source}: no split {split!r}{nearest(split, found)}; it has {', '.join(found)}: "
                f"name one of them in data.{what}, or write a share of the rows, as 0.1"
            )
    own = {what: split for what, split in named.items() if split in found}
    if isinstance(config.test, float):
        own.pop("test", None)
    elif (
        own.get("test")
        and config.test is None
        and form == "multiple choice"
        and _has_no_answers(found[own["test"]], config)
    ):
        notes["test"] = "the source's own has no answers and is not used"
        own.pop("test")
    splits = {"train": read_items(config, found["train"], "train", form)}
    splits |= {what: read_items(config, found[split], split, form) for what, split in own.items()}
    shares = {"validation": config.validation} if "validation" not in own else {}
    shares |= {"test": config.test} if isinstance(config.test, float) else {}
    first = {}
    for item in splits["train"]:
        first.setdefault(replace(item, where=""), item)
    unique = list(first.values())
    notes["split"] = "by question" if "validation" in shares else "the source's own"
    if "test" in shares:
        notes["test"] = f"{shares['test']:g} of the questions"
    elif "test" in own:
        notes["test"] = "the source's own"
    notes["duplicate_documents_left_out"] = len(splits["train"]) - len(unique) if shares else 0
    if shares:
        splits |= _taken(config, unique, shares, seed)
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _taken(
    config: DataConfig, items: Sequence[Item], shares: Mapping[str, float], seed: int
) -> dict[str, list[Item]]:
    """Shares of the questions held out; all rows of one question on one side."""
    questions = list(dict.fromkeys(item.question for item in items))
    random.Random(seed).shuffle(questions)
    side, start = {}, 0
    for what, share in shares.items():
        count = max(1, round(share * len(questions)))
        side |= dict.fromkeys(questions[start : start + count], what)
        start += count
    if start >= len(questions):
        raise DataError(
            f"{config.source}: {len(questions)} question{'s' * (len(questions) != 1)} in train, of which "
            f"{start} would be held "
            f"out for {' and '.join(shares)}; give more, or lower data.{' and data.'.join(shares)}"
        )
    return {
        what: [item for item in items if side.get(item.question, "train") == what]
        for what in ("train", *shares)
    }


def _has_no_answers(rows: Dataset, config: DataConfig) -> bool:
    return config.answer in rows.column_names and all(
        answer in (None, "", -1, "-1") for answer in rows[config.answer]
    )


def _check_one_answer(config: DataConfig, items: Sequence[Item]) -> None:
    """Refuse a question with the same choices and two answers: one of them is wrong, and would be taught."""
    first, faults = {}, []
    for item in items:
        if len(item.answers) > 1:
            earlier = first.setdefault((item.question, frozenset(item.answers)), item)
            if earlier.answers[earlier.right] != item.answers[item.right]:
                faults.append(
                    f"{item.where}: asks what {earlier.where} asks, whose answer is "
                    f"{earlier.answers[earlier.right]!r}, and "
                    f"answers {item.answers[item.right]!r}"
                )
    if faults:
        raise DataError(
            refusal(
                f"{config.source}: {{count}} with another answer to a "
                "question asked before; keep one of each",
                faults,
            )
        )


def _encoded(
    config: DataConfig,
    name: str,
    items: Sequence[Item],
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[int],
) -> list[list[Encoded]]:
    """Each item's rows: one for each choice, or one.

    Raises:
        DataError: rows that cannot be written, or that are longer than data.max_length.
    """
    write = encoded_choices if form == "multiple choice" else lambda *args: [encoded_response(*args)]
    made = collected(
        lambda item: write(item, tokenizer, first),
        items,
        name=lambda item: item.where,
        found=(
            f"{config.source}: {{count}} of {name} that cannot be written as tokens; mend them, or take "
            "them out"
        ),
    )
    longest = [max(each, key=lambda row: len(row.input_ids)) for each in made]
    faults = [
        f"{item.where}: {len(row.input_ids)} tokens, {row.prompt_tokens} before the answer"
        for item, row in zip(items, longest, strict=True)
        if len(row.input_ids) > config.max_length
    ]
    if faults:
        needed = max(len(row.input_ids) for row in longest)
        raise DataError(
            refusal(
                f"{config.source}: {{count}} of {name} longer than data.max_length = {config.max_length}, "
                "whose answers would be cut; raise "
                f"data.max_length to {needed}, or take them out",
                faults,
            )
        )
    return made


def _rows(items: Sequence[Item], encoded: Sequence[Sequence[Encoded]]) -> Dataset:
    """What is learned of each item: its right choice, or its response."""
    learned = [each[item.right] for item, each in zip(items, encoded, strict=True)]
    columns = {
        "input_ids": [row.input_ids for row in learned],
        "prompt_tokens": [row.prompt_tokens for row in learned],
        "text": [item.question for item in items],
        "read_only": [list(row.read_only) for row in learned],
    }
    made = Dataset.from_dict(columns, features=ROWS)
    return made if any(row.read_only for row in learned) else made.remove_columns("read_only")


def _choices(items: Sequence[Item], encoded: Sequence[Sequence[Encoded]]) -> Dataset:
    """Every choice of every item, a row each, in order."""
    return Dataset.from_list(
        [
            {
                "item": number,
                "choice": choice,
                "is_answer": choice == item.right,
                "text": item.answers[choice],
                "question": item.question,
                "characters": len(item.answers[choice]),
                "input_ids": row.input_ids,
                "prompt_tokens": row.prompt_tokens,
            }
            for number, (item, each) in enumerate(zip(items, encoded, strict=True))
            for choice, row in enumerate(each)
        ],
        features=CHOICES,
    )


def _counts(items: Sequence[Item], encoded: Sequence[Sequence[Encoded]]) -> dict[str, Any]:
    """What the notes say of a split."""
    learned = [each[item.right] for item, each in zip(items, encoded, strict=True)]
    counts = {
        "documents": len({item.question for item in items}),
        "documents_shorter_than_two_tokens": 0,
        "rows": len(items),
        "tokens": sum(len(row.input_ids) for row in learned),
        "learned_tokens": sum(row.learned for row in learned),
        "longest": max(len(row.input_ids) for each in encoded for row in each),
    }
    if any(item.messages for item in items):
        counts["turns_read_only"] = sum(row.turns_read_only for row in learned)
    elif any(len(item.answers) > 1 for item in items):
        counts["choices"] = sum(len(item.answers) for item in items)
    return counts
