"""From text to token blocks: read documents, split them by document, tokenize, pack or pad."""

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.data import DataConfig
from kdlib.data import pairs
from kdlib.data.batches import Prepared, collate, fingerprint, flat, lengths_of, vocabulary_of
from kdlib.data.blocks import one_each, packed, tokenized
from kdlib.errors import DataError
from kdlib.sources.documents import interleaved, split_sources
from kdlib.sources.files import is_prose
from kdlib.sources.rows import group_numbers, group_values
from kdlib.sources.stream import streamed
from kdlib.tokens.spans import PairReader
from kdlib.tokens.vocabulary import beginning, ending

ONE_TEXT = "blocks of one text, as if independent: rather too narrow"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a SentencePiece vocabulary


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, teacher: Tokenizer | None = None
) -> Prepared:
    """Read, split by document (or whole groups of them), tokenize and cut the text of a config; mix sources.

    All depends on the documents and `data.split_seed` (else the seed) alone.

    Args:
        teacher: its tokenizer, where it reads with another: rows then have its tokens and the spans of both.

    Raises:
        DataError: nothing to read, not the named column, or not enough tokens.
        ModelError: of one of two tokenizers it is not known which bytes its tokens stand for.
    """
    seed = seed if config.split_seed is None else config.split_seed
    skipped: dict[str, Any] = {}
    if config.streaming:
        part, split, repeated = streamed(config, tokenizer, skipped)
        sources = [(part, split, False)]
    else:
        sources, repeated = split_sources(config, seed=seed, notes=skipped)
    reader = PairReader(tokenizer, teacher) if teacher else None
    made, numbered = [], 0
    for part, split, _ in sources:
        made.append(
            _of_source(part, split, tokenizer, reader, seed=seed, first=numbered, alone=not config.mix)
        )
        numbered = made[-1][1].pop("numbered")
    rows, found = mixed(config, made, seed=seed) if config.mix else made[0]
    grouped = f", whole {config.group}s" if config.group else ""
    divided = "the beginning of a stream" if config.streaming else f"by document{grouped}"
    how = {"the source's own" if is_own else divided for _, _, is_own in sources}
    notes = {"source": config.source, "split": ", or ".join(sorted(how, reverse=True)), **found, **skipped}
    notes["duplicate_documents_left_out"] = repeated
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["each_document_ends_with"] = tokenizer.eos_token or ""
    notes["fingerprint"] = fingerprint(rows["train"], rows["validation"])
    pads = {"teacher_pad_id": teacher.pad_token_id} if teacher else {}
    gathered = partial(collate, pad_id=tokenizer.pad_token_id, **pads)
    common = pairs.vocabularies(tokenizer, teacher) if teacher else None
    return Prepared(
        rows["train"], rows["validation"], notes, gathered, vocabulary_of(tokenizer), vocabularies=common
    )


def _of_source(
    config: DataConfig,
    split: DatasetDict,
    tokenizer: Tokenizer,
    reader: PairReader | None,
    *,
    seed: int,
    first: int,
    alone: bool,
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """One source's rows, whose documents are numbered from `first` on, and what is to be known about them."""
    rows, numbered, sides, notes = {}, first, [], {}
    is_one_text = is_prose(config.source)  # its paragraphs are parts of one text
    for name, limit in (("train", config.max_train_rows), ("validation", config.max_eval_rows)):
        groups = group_values(config, split[name], name)
        sides.append(set(groups or ()))
        numbers = np.arange(len(split[name])) if groups is None else group_numbers(groups)[0]
        numbers = numbers * (alone or not is_one_text)
        numbered, numbers = numbered + int(numbers.max(initial=0)) + 1, numbers + numbered
        blocks, found = _blocks(split[name], config, tokenizer, reader, numbers)
        notes |= {f"{name}_{what}": figure for what, figure in found.items()}
        if len(blocks) == 0:
            fault = "are all shorter than two tokens, so there is nothing to predict"
            if tokens := found["tokens"]:
                fault = f"have {tokens} tokens together, fewer than one block of data.max_length="
                fault += f"{config.max_length}; lower max_length, or give more text"
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
        notes[f"{name}_rows"], notes[f"{name}_tokens"] = len(blocks), int(lengths_of(blocks).sum())
    notes["groups_on_two_sides"] = len(set.intersection(*sides))
    notes["units"] = "documents" if groups is None else "groups of documents"
    if is_one_text and alone:
        rows = {name: each.remove_columns("documents") for name, each in rows.items()}
        notes["units"] = ONE_TEXT
    return rows, {**notes, "numbered": numbered}


def mixed(
    config: DataConfig, made: Sequence[tuple[dict[str, Dataset], dict[str, Any]]], *, seed: int
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """The rows of several sources by their weights, each with its source's number; notes of all together.

    Held out is what each source holds out.  Under "mix" of each its weight, its share of the training rows,
    and how many it has on both sides.
    """
    each = [
        {name: part.add_column("source", np.full(len(part), number, np.int32)) for name, part in rows.items()}
        for number, (rows, _) in enumerate(made)
    ]
    train = interleaved([part["train"] for part in each], [part.weight for part in config.mix], seed=seed)
    train = train.select(range(min(len(train), config.max_train_rows or len(train))))
    rows = {"train": train, "validation": concatenate_datasets([part["validation"] for part in each])}
    if not len(train):
        raise DataError(f"{config.source}: one source of the mix has no row to begin with; give more text")
    table = pd.DataFrame([notes for _, notes in made])
    sums = table.select_dtypes("number").sum()
    notes = {**made[0][1], **{name: int(sums[name]) for name in sums.index}}
    for name, part in rows.items():
        notes |= {f"{name}_rows": len(part), f"{name}_tokens": int(lengths_of(part).sum())}
        if (lost := f"{name}_share_of_tokens_cut_off") in table:
            notes[lost] = round(float(np.average(table[lost], weights=table[f"{name}_tokens"])), 4)
            notes[f"{name}_longest_document"] = int(table[f"{name}_longest_document"].max())
    counts = {n: np.bincount(part["source"][:], minlength=len(made)).tolist() for n, part in rows.items()}
    notes["mix"] = [
        {
            **part.model_dump(include={"source", "subset", "weight"}, exclude_none=True),
            "share": round(counts["train"][number] / len(train), 4),
            **{f"{name}_rows": counts[name][number] for name in rows},
        }
        for number, part in enumerate(config.mix)
    ]
    return rows, notes


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
            else one_each(whole, length, end=end)
        )
    lengths = lengths_of(whole) - (len(end) if reader else 0)
    if not config.packing:
        notes |= cut_off(lengths, length)
    short = len(documents) - len(whole) - notes.get("documents_not_aligned", 0)
    notes |= {
        "documents": len(documents),
        "documents_shorter_than_two_tokens": short,
        "tokens": int(lengths.sum()),
    }
    return blocks, notes


def _in_turn(order: Sequence[int], blocks: Dataset) -> list[int]:
    """The same blocks, one of each document, then a second of each, …; whose its middle is, whose it is."""
    starts, numbers = np.concatenate(list(flat(blocks, "documents"))).reshape(-1, 2).T
    counts = lengths_of(blocks, "documents") // 2
    rows = np.repeat(np.arange(len(blocks)), counts)
    begun = np.bincount(rows[starts <= (lengths_of(blocks) // 2)[rows]], minlength=len(blocks))
    owners = numbers[np.cumsum(counts) - counts + begun - 1]
    turn = pd.Series(order).groupby(owners[order]).cumcount()
    return np.array(order)[turn.argsort(kind="stable")].tolist()


def units_of_tokens(prepared: Prepared) -> tuple[list[np.ndarray], str]:
    """Of the measured rows: the number of the unit that each token belongs to, from 0; and what units are.

    Documents, or what they belong to; of rows that know none, or one alone, the rows, and the words say so.
    """
    rows, what = prepared.measured, prepared.notes.get("units")
    lengths = lengths_of(rows)
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


def cut_off(lengths: Sequence[int] | np.ndarray, length: int) -> dict[str, float]:
    """What cutting takes from documents of these lengths: how many it shortens, the share of all tokens."""
    every = np.asarray(lengths, np.int64)
    lost = every[every > length] - length
    return {
        "documents_cut": len(lost),
        "longest_document": int(every.max(initial=0)),
        "share_of_tokens_cut_off": round(int(lost.sum()) / max(int(every.sum()), 1), 4),
    }
