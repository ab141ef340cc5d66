"""From text to token blocks: read documents, split them by document, tokenize, pack or pad.

A row that reaches training is {"input_ids": [...]}; the collator makes labels and padding.
"""

import glob
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from kdlib.config import DataConfig
from kdlib.errors import DataError, nearest
from kdlib.signals import IGNORED

ROWS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class TokenBlocks:
    """Training and validation rows, with what a reader of the report wants to know about them."""

    train: Dataset
    validation: Dataset
    notes: dict[str, Any]  # documents, tokens, dropped rows, fingerprint


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> TokenBlocks:
    """Read, split by document, tokenize and cut the text of a config.

    The split, the order and the fingerprint depend on the documents and the seed alone.

    Raises:
        DataError: nothing to read, not the named column, or not enough tokens.
    """
    documents = read_documents(config)
    split = split_documents(documents, config, seed=seed)
    own = "validation" in documents
    notes: dict[str, Any] = {"source": config.source, "split": "the source's own" if own else "by document"}
    notes["duplicate_documents_left_out"] = 0 if own else len(documents["train"]) - sum(map(len, split.values()))
    rows = {}
    for name, limit in (("train", config.max_train_rows), ("validation", config.max_eval_rows)):
        ids = tokenized(split[name], config.text, tokenizer)
        notes[f"{name}_documents"] = len(split[name])
        notes[f"{name}_documents_shorter_than_two_tokens"] = len(split[name]) - len(ids)
        lengths = _token_lists(ids).value_lengths().to_pylist()
        if not config.packing:
            notes |= {f"{name}_{what}": figure for what, figure in cut_off(lengths, config.max_length).items()}
        blocks = packed(ids, config.max_length, separator=tokenizer.eos_token_id) if config.packing else cut(ids, config.max_length)
        if len(blocks) == 0:
            raise DataError(_too_little(name, config, len(split[name]), sum(lengths)))
        if limit is not None and limit < len(blocks):  # a sample over all documents, not the first of them
            blocks = blocks.select(sorted(random.Random(seed).sample(range(len(blocks)), limit)))
        rows[name] = blocks
        notes[f"{name}_rows"], notes[f"{name}_tokens"] = len(blocks), len(_token_lists(blocks).flatten())
    notes["each_document_begins_with"] = tokenizer.decode(beginning(tokenizer))
    notes["fingerprint"] = fingerprint(rows["train"], rows["validation"])
    return TokenBlocks(rows["train"], rows["validation"], notes)


def read_documents(config: DataConfig) -> DatasetDict:
    """The source's documents: a "train" split, and "validation" where the source has one of its own.

    `config.source` is a built-in name, a file (.jsonl, .csv, .parquet, .txt by paragraph), a folder saved by `datasets` or
    holding such files, or a hub id.
    """
    path = Path(config.source).expanduser()
    if config.source in BUILT_IN:
        documents = BUILT_IN[config.source]()
    elif path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        documents = _loaded(path, datasets.load_from_disk if saved else datasets.load_dataset, str(path))
    elif path.suffix in READERS or path.is_file():
        documents = _read_file(path)
    else:
        documents = _from_hub(config)
    if isinstance(documents, Dataset):
        documents = DatasetDict(train=documents)
    if "train" not in documents:
        raise DataError(f"{config.source}: has the splits {', '.join(documents)}; one named train is needed")
    if len(documents["train"]) == 0:
        raise DataError(f"{config.source}: is empty; at least two documents are needed")
    for split in {"train", "validation"} & set(documents):
        columns = documents[split].column_names
        if config.text not in columns:
            raise DataError(
                f"{config.source}: no column {config.text!r}{nearest(config.text, columns)}; it has {', '.join(columns)}: "
                "name the one with the text in data.text"
            )
        for number, text in enumerate(documents[split][config.text]):
            if not isinstance(text, str):
                raise DataError(
                    f"{config.source}: document {number} of {split} has {config.text!r} = {text!r} ({type(text).__name__}); "
                    "every document needs a text"
                )
    return documents


def split_documents(documents: DatasetDict, config: DataConfig, *, seed: int) -> DatasetDict:
    """Train and validation: the source's own, else by document, each text kept once so that none is on both sides."""
    if "validation" in documents:
        return DatasetDict(train=documents["train"], validation=documents["validation"])
    texts = documents["train"]
    first = {text: number for number, text in reversed(list(enumerate(texts[config.text])))}
    unique = texts.select(sorted(first.values()))
    if len(unique) < 2:
        raise DataError("the source has one document only, so nothing can be held out from it; give two or more")
    held_out = max(1, round(config.validation * len(unique)))
    split = unique.train_test_split(test_size=held_out, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def tokenized(documents: Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """{"input_ids": …} of each document of two tokens or more; shorter ones predict nothing and are left out."""
    first = beginning(tokenizer)

    def ids(batch):
        lists = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [first + tokens for tokens in lists if len(tokens) >= 2]}

    return documents.map(ids, batched=True, remove_columns=documents.column_names, features=ROWS)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer's own call begins with it (Llama, Gemma: such teachers are lost without), else []."""
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def packed(rows: Dataset, length: int, *, separator: int | None) -> Dataset:
    """Documents end to end, a separator after each, cut into blocks of exactly `length`; what is left over is dropped."""
    after = [] if separator is None else [separator]

    def blocks(batch):
        stream = list(itertools.chain.from_iterable([*ids, *after] for ids in batch["input_ids"]))
        return {"input_ids": [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]}

    return rows.map(blocks, batched=True, batch_size=10_000, features=ROWS)


def cut(rows: Dataset, length: int) -> Dataset:
    """One document a row, its first `length` tokens."""
    return rows.map(lambda row: {"input_ids": row["input_ids"][:length]})


def cut_off(lengths: Sequence[int], length: int) -> dict[str, float]:
    """What `cut` takes from documents of these lengths: how many it shortens, and the share of all tokens that goes."""
    lost = [each - length for each in lengths if each > length]
    return {"documents_cut": len(lost), "longest_document": max(lengths, default=0),
            "share_of_tokens_cut_off": round(sum(lost) / max(sum(lengths), 1), 4)}


def collate(rows: Sequence[dict[str, list[int]]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows to a batch, padded on the right: input_ids, attention_mask, labels, each [B, T].

    Labels are `IGNORED` at padding and at each row's first token, which nothing predicts; so the Trainer's own count of
    labels is the count of kept tokens, for every architecture.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = list(row["input_ids"])
        padding = longest - len(ids)
        batch["input_ids"].append(ids + [pad_id] * padding)
        batch["attention_mask"].append([1] * len(ids) + [0] * padding)
        batch["labels"].append([IGNORED, *ids[1:]] + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def calibration_rows(rows: Dataset, count: int = 8) -> torch.Tensor:
    """[count, T] training text without padding, on which layer influence is measured."""
    ids = [row["input_ids"] for row in rows.select(range(min(count, len(rows))))]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


def fingerprint(*parts: Dataset) -> str:
    """16 hex digits that change when any token of any row does."""
    digest = hashlib.sha256()
    for part in parts:
        rows = _token_lists(part)
        for numbers in (rows.value_lengths(), rows.flatten()):
            digest.update(len(numbers).to_bytes(8))
            digest.update(np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False), dtype="<i8"))
    return digest.hexdigest()[:16]


def _token_lists(rows: Dataset) -> pa.ListArray:
    """All rows' ids as one Arrow array: a million rows in a second, without a Python list each."""
    ids = rows.with_format("arrow")[:]["input_ids"]
    return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids


def python_docs() -> Dataset:
    """The language reference that comes with every Python: 79 documents, 465 kB of prose and code."""
    from pydoc_data.topics import topics

    return Dataset.from_dict({"name": sorted(topics), "text": [topics[name] for name in sorted(topics)]})


BUILT_IN = {"python-docs": python_docs}


def _read_file(path: Path) -> DatasetDict:
    if not path.exists():
        others = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, others)}")
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown type of file; it may be {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; at least two documents are needed")
    if path.suffix == ".jsonl":
        _check_lines(path)
    options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    return _loaded(path, datasets.load_dataset, READERS[path.suffix], data_files=glob.escape(str(path)), **options)


def _loaded(path: Path, load: Callable[..., DatasetDict | Dataset], *args, **options) -> DatasetDict | Dataset:
    try:
        return load(*args, **options)
    except (DatasetGenerationError, OSError, ValueError, KeyError) as error:  # pyarrow's and json's errors are ValueErrors
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {path.suffix or 'a folder of data files'}: {cause}") from error


def _check_lines(path: Path) -> None:
    """Name every broken line of a .jsonl file, where the reader would name a byte."""
    broken = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        broken.append(f"line {number}: not an object")
                except json.JSONDecodeError as error:
                    broken.append(f"line {number}: {error.msg}: {line.strip()[:60]!r}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if broken:
        more = f"\n  … and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(f"{path}: {len(broken)} broken lines\n  " + "\n  ".join(broken[:5]) + more)


def _from_hub(config: DataConfig) -> DatasetDict:
    if config.source.startswith((".", "/", "~")):
        raise DataError(f"{config.source}: no such file or folder")
    try:
        return datasets.load_dataset(config.source, config.subset)
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # ValueError: a subset must be named, or is not there
        raise DataError(
            f"{config.source}: no data set to be had by this name{nearest(config.source, BUILT_IN)}. It is no file, no folder and "
            f"no built-in name ({', '.join(BUILT_IN)}); as a hub id (its configuration goes into data.subset): {error}"
        ) from error


def _too_little(name: str, config: DataConfig, documents: int, tokens: int) -> str:
    if tokens < 2:
        return f"{config.source}: all {documents} {name} documents are shorter than two tokens, so there is nothing to predict"
    return (
        f"{config.source}: the {documents} {name} documents have {tokens} tokens together, fewer than one block of "
        f"data.max_length={config.max_length}; lower max_length, or give more text"
    )
