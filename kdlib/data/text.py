"""From text to token blocks: read documents, split them by document, tokenize, pack or pad."""

import itertools
import random
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.sections import DataConfig
from kdlib.data import pairs
from kdlib.data.batches import (
    Prepared,
    collate,
    fingerprint,
    runs,
    token_lists,
    vocabulary_of,
)
from kdlib.data.sources import check_column, group_values, kept_once, read_splits
from kdlib.errors import DataError
from kdlib.tokens.spans import PairReader
from kdlib.tokens.vocabulary import beginning, ending

SIDES = ("train", "validation")
IDS, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("int32")
WHOLE = datasets.Features({"input_ids": IDS, "document": NUMBER})
ROWS = datasets.Features({"input_ids": IDS, "documents": IDS})
ONE_TEXT = "blocks of one text, as if independent: rather too narrow"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a SentencePiece vocabulary


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, teacher: Tokenizer | None = None
) -> Prepared:
    """Read, split by document (or whole groups of them), tokenize and cut the text of a config.

    All depends on the documents and `data.split_seed` (else the seed) alone.

    Args:
        teacher: its tokenizer, where it reads with another: rows then have its tokens and the spans of both.

    Raises:
        DataError: nothing to read, not the named column, or not enough tokens.
        ModelError: of one of two tokenizers it is not known which bytes its tokens stand for.
    """
    seed = seed if config.split_seed is None else config.split_seed
    documents, length = read_documents(config), config.max_length
    split, own = split_documents(documents, config, seed=seed), "validation" in documents
    repeated = sum(len(documents[name]) for name in SIDES if name in documents) - sum(
        map(len, split.values())
    )
    grouped = f", whole {config.group}s" if config.group else ""
    how = "the source's own" if own else f"by document{grouped}"
    notes: dict[str, Any] = {"source": config.source, "split": how, "duplicate_documents_left_out": repeated}
    rows, numbered, sides = {}, 0, []
    reader = PairReader(tokenizer, teacher) if teacher else None
    for name, limit in (("train", config.max_train_rows), ("validation", config.max_eval_rows)):
        groups = group_values(config, split[name], name)
        sides.append(set(groups or ()))
        numbers = np.arange(len(split[name])) if groups is None else np.unique(groups, return_inverse=True)[1]
        numbered, numbers = numbered + int(numbers.max(initial=0)) + 1, numbers + numbered
        blocks, found = _blocks(split[name], config, tokenizer, reader, numbers)
        notes |= {f"{name}_{what}": figure for what, figure in found.items()}
        if len(blocks) == 0:
            fault = "are all shorter than two tokens, so there is nothing to predict"
            if tokens := found["tokens"]:
                fault = f"have {tokens} tokens together, fewer than one block of data.max_length={length}"
                fault += "; lower max_length, or give more text"
            if lost := found.get("documents_not_aligned"):
                fault += (
                    f"; without {lost} that one of both tokenizers does not give back: name another teacher"
                )
            raise DataError(f"{config.source}: the {len(split[name])} {name} documents {fault}")
        if limit is not None and limit < len(blocks):  # a sample over all documents, not the first of them
            compared = name == "validation"  # of as many documents as there can be
            order = random.Random(seed).sample(range(len(blocks)), len(blocks) if compared else limit)
            blocks = blocks.select(sorted((_in_turn(order, blocks) if compared else order)[:limit]))
        rows[name] = blocks
        notes[f"{name}_rows"], notes[f"{name}_tokens"] = len(blocks), len(token_lists(blocks).flatten())
    notes["groups_on_two_sides"] = len(set.intersection(*sides))
    notes["units"] = "documents" if groups is None else "groups of documents"
    if Path(config.source).suffix == ".txt":  # its paragraphs are parts of one text
        rows = {name: each.remove_columns("documents") for name, each in rows.items()}
        notes["units"] = ONE_TEXT
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["each_document_ends_with"] = tokenizer.eos_token or ""
    notes["fingerprint"] = fingerprint(rows["train"], rows["validation"])
    pads = {"teacher_pad_id": teacher.pad_token_id} if teacher else {}
    gathered = partial(collate, pad_id=tokenizer.pad_token_id, **pads)
    common = pairs.vocabularies(tokenizer, teacher) if teacher else None
    return Prepared(
        rows["train"], rows["validation"], notes, gathered, vocabulary_of(tokenizer), vocabularies=common
    )


def _blocks(
    documents: Dataset,
    config: DataConfig,
    tokenizer: Tokenizer,
    reader: PairReader | None,
    numbers: np.ndarray,
) -> tuple[Dataset, dict[str, Any]]:
    """Rows of documents, packed or one of each; and what was left out.

    Unpacked, a document that is not cut ends as documents do when packed.
    """
    length, end, notes = config.max_length, ending(tokenizer), {}
    if reader:
        most = pairs.limits(reader.teacher, length)
        whole, notes = pairs.tokenized(documents, config.text, reader, numbers, most)
        blocks = pairs.cut(whole, most, is_packed=config.packing)
    else:
        whole = tokenized(documents, config.text, tokenizer, numbers)
        blocks = (
            packed(whole, length, separator=tokenizer.eos_token_id)
            if config.packing
            else whole.map(
                lambda row: {
                    "input_ids": (row["input_ids"] + end)[:length],
                    "documents": [0, row["document"]],
                },
                remove_columns=["document"],
                features=ROWS,
            )
        )
    lengths = (token_lists(whole).value_lengths().to_numpy() - (len(end) if reader else 0)).tolist()
    if not config.packing:
        notes |= cut_off(lengths, length)
    short = len(documents) - len(whole) - notes.get("documents_not_aligned", 0)
    notes |= {"documents": len(documents), "documents_shorter_than_two_tokens": short, "tokens": sum(lengths)}
    return blocks, notes


def _in_turn(order: Sequence[int], blocks: Dataset) -> list[int]:
    """The same blocks, one of each document, then a second of each, …; whose its middle is, whose it is."""
    halves = token_lists(blocks).value_lengths().to_numpy() // 2
    runs = [np.array(each).reshape(-1, 2) for each in blocks["documents"]]
    owners = np.array([each[each[:, 0] <= half][-1, 1] for each, half in zip(runs, halves, strict=True)])
    turn = pd.Series(order).groupby(owners[order]).cumcount()
    return np.array(order)[turn.argsort(kind="stable")].tolist()


def read_documents(config: DataConfig) -> DatasetDict:
    """The source's documents, each with a text: "train", and "validation" where the source has it."""
    documents = read_splits(config)
    for split in {"train", "validation"} & set(documents):
        check_column(config, documents[split], config.text, "data.text")
        for number, text in enumerate(documents[split][config.text]):
            if not isinstance(text, str):
                raise DataError(
                    f"{config.source}: document {number} of {split} has {config.text!r} = {text!r} "
                    f"({type(text).__name__}); every document needs a text"
                )
    return documents


def split_documents(documents: DatasetDict, config: DataConfig, *, seed: int) -> DatasetDict:
    """Train and validation: the source's own, else by document; each text is kept once, and on one side."""
    texts = {name: documents[name][config.text][:] for name in SIDES if name in documents}
    kept = kept_once(config, {name: [(text, text) for text in each] for name, each in texts.items()})
    unique = DatasetDict({name: documents[name].select(rows) for name, rows in kept.items()})
    if "validation" in unique:
        return unique
    train, total = unique["train"], len(unique["train"])
    if total < 2:
        raise DataError("the source has one document only, so nothing can be held out; give two or more")
    count = max(1, round(config.validation * total))
    if (groups := group_values(config, train, "train")) is not None:
        out = _whole_groups(config, groups, count, seed)
        split = {"train": train.select(np.flatnonzero(~out)), "test": train.select(np.flatnonzero(out))}
    else:
        split = train.train_test_split(test_size=count, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def _whole_groups(config: DataConfig, groups: Sequence[str], count: int, seed: int) -> np.ndarray:
    """[documents] whether it is held out: whole groups, as they come, until they have so many documents."""
    names, belongs, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise DataError(
            f"{config.source}: all documents are of one {config.group} (data.group), so nothing can be held "
            "out; give documents of two or more, or leave data.group out"
        )
    order = np.random.default_rng(seed).permutation(len(names))[:-1]
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.isin(belongs, order[before < count])


def tokenized(
    documents: Dataset, column: str, tokenizer: Tokenizer, numbers: Sequence[int] | None = None
) -> Dataset:
    """{"input_ids", "document"} of each document of two tokens or more; shorter ones predict nothing and go.

    Args:
        numbers: what each is called in "document", several alike where they belong together; else its place.
    """
    first, numbers = beginning(tokenizer), range(len(documents)) if numbers is None else numbers

    def ids(batch, places):
        lists = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        kept = [
            (first + ids, numbers[place]) for ids, place in zip(lists, places, strict=True) if len(ids) > 1
        ]
        return {"input_ids": [ids for ids, _ in kept], "document": [number for _, number in kept]}

    return documents.map(
        ids, batched=True, with_indices=True, remove_columns=documents.column_names, features=WHOLE
    )


def packed(rows: Dataset, length: int, *, separator: int | None) -> Dataset:
    """Documents end to end, a separator after each, in blocks of exactly `length`; what is left over goes.

    Returns:
        {"input_ids", "documents": [start, number, …]}: whose the tokens from each start on are.
    """
    after = [] if separator is None else [separator]

    def blocks(batch, places):
        numbers = batch["document"] if "document" in rows.column_names else places
        stream = list(itertools.chain.from_iterable([*ids, *after] for ids in batch["input_ids"]))
        sizes = [len(ids) + len(after) for ids in batch["input_ids"]]
        owners = np.repeat(numbers, sizes)
        starts = range(0, len(stream) - length + 1, length)
        return {
            "input_ids": [stream[start : start + length] for start in starts],
            "documents": [runs(owners[start : start + length]) for start in starts],
        }

    options = {
        "batched": True,
        "with_indices": True,
        "batch_size": 10_000,
        "remove_columns": rows.column_names,
    }
    return rows.map(blocks, features=ROWS, **options)


def units_of_tokens(prepared: Prepared) -> tuple[list[np.ndarray], str]:
    """Of the measured rows: the number of the unit that each token belongs to, from 0; and what units are.

    Documents, or what they belong to; of rows that know none, or one alone, the rows, and the words say so.
    """
    rows, what = prepared.measured, prepared.notes.get("units")
    lengths = token_lists(rows).value_lengths().to_numpy()
    owners = np.repeat(np.arange(len(rows)), lengths)
    if "documents" in rows.column_names:
        spans = [np.array(each).reshape(-1, 2).T for each in rows["documents"]]
        sizes = [np.diff(starts, append=n) for (starts, _), n in zip(spans, lengths, strict=True)]
        each = [np.repeat(numbers, size) for (_, numbers), size in zip(spans, sizes, strict=True)]
        known, what = np.concatenate(each), what or "documents"
        owners, what = (owners, ONE_TEXT) if len(np.unique(known)) == 1 else (known, what)
    elif "group" in rows.column_names:
        owners = np.repeat(np.unique(rows["group"][:], return_inverse=True)[1], lengths)
    return np.split(np.unique(owners, return_inverse=True)[1], np.cumsum(lengths)[:-1]), what or "rows"


def bytes_of_tokens(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[N] bytes of text that each token stands for; 0 for a special one.

    Of a character that is made of several tokens each has its own bytes, wherever a row is cut; decoded by
    itself it would count as the three bytes of U+FFFD.
    """
    known, places = np.unique(ids, return_inverse=True)
    once, twice = (
        tokenizer.batch_decode([[i] * n for i in known.tolist()], skip_special_tokens=True) for n in (1, 2)
    )
    # a first token may lose the space before it
    sizes = [len(two.encode()) - len(one.encode()) for one, two in zip(once, twice, strict=True)]
    for place, (text, token) in enumerate(
        zip(once, tokenizer.convert_ids_to_tokens(known.tolist()), strict=True)
    ):
        if "\N{REPLACEMENT CHARACTER}" in text:  # part of a character: a byte a letter, or written out
            sizes[place] = 1 if BYTE.fullmatch(token) else len(token)
    return np.array(sizes)[places]


def cut_off(lengths: Sequence[int], length: int) -> dict[str, float]:
    """What cutting takes from documents of these lengths: how many it shortens, the share of all tokens."""
    lost = [each - length for each in lengths if each > length]
    return {
        "documents_cut": len(lost),
        "longest_document": max(lengths, default=0),
        "share_of_tokens_cut_off": round(sum(lost) / max(sum(lengths), 1), 4),
    }
