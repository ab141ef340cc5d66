"""From text to token blocks: read documents, split them by document, tokenize, pack or pad."""

import itertools
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.sections import DataConfig
from kdlib.data.batches import Prepared, collate, fingerprint, token_lists
from kdlib.data.sources import check_column, kept_once, read_splits
from kdlib.errors import DataError

ROWS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
SIDES = ("train", "validation")


def prepare(config: DataConfig, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Read, split by document, tokenize and cut the text of a config.

    All depends on the documents and `data.split_seed` (else the seed) alone.

    Raises:
        DataError: nothing to read, not the named column, or not enough tokens.
    """
    seed = seed if config.split_seed is None else config.split_seed
    documents, length = read_documents(config), config.max_length
    split, own = split_documents(documents, config, seed=seed), "validation" in documents
    repeated = sum(len(documents[name]) for name in SIDES if name in documents) - sum(
        map(len, split.values())
    )
    notes: dict[str, Any] = {"source": config.source, "split": "the source's own" if own else "by document"}
    notes["duplicate_documents_left_out"], rows = repeated, {}
    for name, limit in (("train", config.max_train_rows), ("validation", config.max_eval_rows)):
        ids = tokenized(split[name], config.text, tokenizer)
        lengths = token_lists(ids).value_lengths().to_pylist()
        notes[f"{name}_documents"] = len(split[name])
        notes[f"{name}_documents_shorter_than_two_tokens"] = len(split[name]) - len(ids)
        if config.packing:
            blocks = packed(ids, length, separator=tokenizer.eos_token_id)
        else:  # a document a row, its first tokens
            blocks = ids.map(lambda row: {"input_ids": row["input_ids"][:length]})
            notes |= {f"{name}_{what}": figure for what, figure in cut_off(lengths, length).items()}
        if len(blocks) == 0:
            fault = "are all shorter than two tokens, so there is nothing to predict"
            if tokens := sum(lengths):
                fault = f"have {tokens} tokens together, fewer than one block of data.max_length={length}"
                fault += "; lower max_length, or give more text"
            raise DataError(f"{config.source}: the {len(split[name])} {name} documents {fault}")
        if limit is not None and limit < len(blocks):  # a sample over all documents, not the first of them
            blocks = blocks.select(sorted(random.Random(seed).sample(range(len(blocks)), limit)))
        rows[name] = blocks
        notes[f"{name}_rows"], notes[f"{name}_tokens"] = len(blocks), len(token_lists(blocks).flatten())
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["fingerprint"] = fingerprint(rows["train"], rows["validation"])
    gathered = partial(collate, pad_id=tokenizer.pad_token_id)
    return Prepared(rows["train"], rows["validation"], notes, gathered, len(tokenizer))


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
    split = train.train_test_split(test_size=max(1, round(config.validation * total)), seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def tokenized(documents: Dataset, column: str, tokenizer: Tokenizer) -> Dataset:
    """{"input_ids": …} of each document of two tokens or more; shorter ones predict nothing and go."""
    first = beginning(tokenizer)

    def ids(batch):
        lists = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [first + tokens for tokens in lists if len(tokens) >= 2]}

    return documents.map(ids, batched=True, remove_columns=documents.column_names, features=ROWS)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer's own call begins with it (Llama, Gemma: lost without it), else []."""
    first = tokenizer.bos_token_id
    return [first] if tokenizer("a")["input_ids"][:1] == [first] else []


def packed(rows: Dataset, length: int, *, separator: int | None) -> Dataset:
    """Documents end to end, a separator after each, in blocks of exactly `length`; what is left over goes."""
    after = [] if separator is None else [separator]

    def blocks(batch):
        stream = list(itertools.chain.from_iterable([*ids, *after] for ids in batch["input_ids"]))
        starts = range(0, len(stream) - length + 1, length)
        return {"input_ids": [stream[start : start + length] for start in starts]}

    return rows.map(blocks, batched=True, batch_size=10_000, features=ROWS)


def cut_off(lengths: Sequence[int], length: int) -> dict[str, float]:
    """What cutting takes from documents of these lengths: how many it shortens, the share of all tokens."""
    lost = [each - length for each in lengths if each > length]
    return {
        "documents_cut": len(lost),
        "longest_document": max(lengths, default=0),
        "share_of_tokens_cut_off": round(sum(lost) / max(sum(lengths), 1), 4),
    }
