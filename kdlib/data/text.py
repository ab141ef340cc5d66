"""From text to token blocks: read documents, split them by document, tokenize, pack or pad.

A row that reaches training is {"input_ids": [...]}; kdlib.data.batches makes labels and padding of it.
"""

import itertools
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from kdlib.config.sections import DataConfig
from kdlib.data.batches import Prepared, collate, fingerprint, token_lists
from kdlib.data.sources import check_column, read_splits
from kdlib.errors import DataError

ROWS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Prepared:
    """Read, split by document, tokenize and cut the text of a config.

    The split, the order and the fingerprint depend on the documents and `data.split_seed` (else the seed)
    alone.

    Raises:
        DataError: nothing to read, not the named column, or not enough tokens.
    """
    seed = seed if config.split_seed is None else config.split_seed
    documents = read_documents(config)
    split = split_documents(documents, config, seed=seed)
    own = "validation" in documents
    notes: dict[str, Any] = {"source": config.source, "split": "the source's own" if own else "by document"}
    notes["duplicate_documents_left_out"] = (
        0 if own else len(documents["train"]) - sum(map(len, split.values()))
    )
    rows = {}
    for name, limit in (("train", config.max_train_rows), ("validation", config.max_eval_rows)):
        ids = tokenized(split[name], config.text, tokenizer)
        notes[f"{name}_documents"] = len(split[name])
        notes[f"{name}_documents_shorter_than_two_tokens"] = len(split[name]) - len(ids)
        lengths = token_lists(ids).value_lengths().to_pylist()
        if not config.packing:
            notes |= {
                f"{name}_{what}": figure for what, figure in cut_off(lengths, config.max_length).items()
            }
        blocks = (
            packed(ids, config.max_length, separator=tokenizer.eos_token_id)
            if config.packing
            else cut(ids, config.max_length)
        )
        if len(blocks) == 0:
            raise DataError(_too_little(name, config, len(split[name]), sum(lengths)))
        if limit is not None and limit < len(blocks):  # a sample over all documents, not the first of them
            blocks = blocks.select(sorted(random.Random(seed).sample(range(len(blocks)), limit)))
        rows[name] = blocks
        notes[f"{name}_rows"], notes[f"{name}_tokens"] = len(blocks), len(token_lists(blocks).flatten())
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["fingerprint"] = fingerprint(rows["train"], rows["validation"])
    return Prepared(
        rows["train"],
        rows["validation"],
        notes,
        partial(collate, pad_id=tokenizer.pad_token_id),
        len(tokenizer),
    )


def read_documents(config: DataConfig) -> DatasetDict:
    """The source's documents: a "train" split, and "validation" where the source has one of its own; each
    has a text.
    """
    documents = read_splits(config)
    for split in {"train", "validation"} & set(documents):
        check_column(config, documents[split], config.text, "data.text")
        for number, text in enumerate(documents[split][config.text]):
            if not isinstance(text, str):
                raise DataError(
                    f"{config.source}: document {number} of {split} has {config.text!r} = {text!r} "
                    f"({type(text).__name__}); "
                    "every document needs a text"
                )
    return documents


def split_documents(documents: DatasetDict, config: DataConfig, *, seed: int) -> DatasetDict:
    """Train and validation: the source's own, else by document, each text kept once so that none is on
    both sides.
    """
    if "validation" in documents:
        return DatasetDict(train=documents["train"], validation=documents["validation"])
    texts = documents["train"]
    first = {text: number for number, text in reversed(list(enumerate(texts[config.text])))}
    unique = texts.select(sorted(first.values()))
    if len(unique) < 2:
        raise DataError(
            "the source has one document only, so nothing can be held out from it; give two or more"
        )
    held_out = max(1, round(config.validation * len(unique)))
    split = unique.train_test_split(test_size=held_out, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def tokenized(documents: Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """{"input_ids": …} of each document of two tokens or more; shorter ones predict nothing and are left
    out.
    """
    first = beginning(tokenizer)

    def ids(batch):
        lists = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [first + tokens for tokens in lists if len(tokens) >= 2]}

    return documents.map(ids, batched=True, remove_columns=documents.column_names, features=ROWS)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer's own call begins with it (Llama, Gemma: such teachers are lost without),
    else [].
    """
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def packed(rows: Dataset, length: int, *, separator: int | None) -> Dataset:
    """Documents end to end, a separator after each, cut into blocks of exactly `length`; what is left
    over is dropped.
    """
    after = [] if separator is None else [separator]

    def blocks(batch):
        stream = list(itertools.chain.from_iterable([*ids, *after] for ids in batch["input_ids"]))
        return {
            "input_ids": [
                stream[start : start + length] for start in range(0, len(stream) - length + 1, length)
            ]
        }

    return rows.map(blocks, batched=True, batch_size=10_000, features=ROWS)


def cut(rows: Dataset, length: int) -> Dataset:
    """One document a row, its first `length` tokens."""
    return rows.map(lambda row: {"input_ids": row["input_ids"][:length]})


def cut_off(lengths: Sequence[int], length: int) -> dict[str, float]:
    """What `cut` takes from documents of these lengths: how many it shortens, and the share of all tokens
    that goes.
    """
    lost = [each - length for each in lengths if each > length]
    return {
        "documents_cut": len(lost),
        "longest_document": max(lengths, default=0),
        "share_of_tokens_cut_off": round(sum(lost) / max(sum(lengths), 1), 4),
    }


def _too_little(name: str, config: DataConfig, documents: int, tokens: int) -> str:
    if tokens < 2:
        return (
            f"{config.source}: all {documents} {name} documents are shorter than two tokens, so there is "
            "nothing to predict"
        )
    return (
        f"{config.source}: the {documents} {name} documents have {tokens} tokens together, fewer than one "
        "block of "
        f"data.max_length={config.max_length}; lower max_length, or give more text"
    )
