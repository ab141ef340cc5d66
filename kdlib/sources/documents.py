"""Documents of one source or of several, each text once, on one side: by batches of tables on the disk."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Value

from kdlib.config.data import DataConfig
from kdlib.errors import DataError, shown
from kdlib.sources.places import read_splits
from kdlib.sources.rows import (
    check_column,
    columns_of,
    group_numbers,
    group_values,
    kept_once,
    own_splits,
    refuse_rows,
)

SIDES = ("train", "validation")
TEXTS = (Value("string"), Value("large_string"))
DIGEST = 16  # bytes, by which a text is known again


def read_documents(config: DataConfig, notes: dict[str, Any] | None = None) -> DatasetDict:
    """The source's documents, each with a text: "train", and "validation" where the source has it.

    Args:
        notes: where it is counted which rows without a text were left out (`data.skip_unusable`).
    """
    source = read_splits(config)
    own = own_splits(config, [name for name in source if name != "train"])
    sides = {"train": "train", **{side: name for side, name in own.items() if side in SIDES}}
    documents = DatasetDict({side: source[name] for side, name in sides.items()})
    for split, rows in documents.items():
        check_column(config, rows, config.text, "data.text")
        documents[split] = with_text(config, rows, split, config.text, notes)
    return documents


def with_text(
    config: DataConfig, rows: Dataset, split: str, column: str, notes: dict[str, Any] | None
) -> Dataset:
    """The rows that have a text; others are refused, or counted in the notes (`data.skip_unusable`)."""
    if rows.features[column] in TEXTS:
        nulls = [texts.is_null() for texts in columns_of(rows, column)]
        without = np.flatnonzero(np.concatenate(nulls)).tolist() if nulls else []
    else:
        texts = [text if isinstance(text, str) else None for text in rows[column]]
        without = [n for n, text in enumerate(texts) if text is None]
    values = ((number, rows[number][column]) for number in without)
    faults = [f"document {n} of {split} has {column!r} = {shown(v)} ({type(v).__name__})" for n, v in values]
    counted = {} if notes is None else notes
    refuse_rows(config, faults, "without a text, and every document needs one", counted)
    if without and len(without) == len(rows):
        raise DataError(f"{config.source}: no row of {split} has a text in {column!r}; see data.text")
    if rows.features[column] not in TEXTS:
        texts_alone = rows.add_column(f"{column} as text", texts, feature=Value("string"))
        rows = texts_alone.remove_columns(column).rename_column(f"{column} as text", column)
    return rows.select(np.setdiff1d(np.arange(len(rows)), without)) if without else rows


def known_again(parts: Sequence[tuple[Dataset, str]]) -> list[np.ndarray]:
    """Of each table, and its column, [documents] a number of each text: the same for the same text."""
    digests = [
        b"".join(blake2b(text, digest_size=DIGEST).digest() for text in texts.cast(pa.binary()).to_pylist())
        for rows, column in parts
        for texts in columns_of(rows, column)
    ]
    halves = pd.DataFrame(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))
    numbers = halves.groupby([0, 1], sort=False).ngroup().to_numpy()
    return np.split(numbers, np.cumsum([len(rows) for rows, _ in parts])[:-1])


def split_documents(documents: DatasetDict, config: DataConfig, *, seed: int) -> DatasetDict:
    """Train and validation: the source's own, else by document; each text is kept once, and on one side.

    They stay in the source's order: out of it each would be read from another place of the disk, and with it
    all that a system reads ahead, a hundred times the text where that is larger than the memory.  It is rows
    that a training shuffles.
    """
    sides = [name for name in SIDES if name in documents]
    texts = known_again([(documents[name], config.text) for name in sides])
    kept = kept_once(config, {name: (each, each) for name, each in zip(sides, texts, strict=True)})
    unique = DatasetDict({name: documents[name].select(rows) for name, rows in kept.items()})
    if "validation" in unique:
        return unique
    train, total = unique["train"], len(unique["train"])
    if total < 2:
        raise DataError("the source has one document only, so nothing can be held out; give two or more")
    count = min(max(1, round(config.validation * total)), total - 1)
    if (groups := group_values(config, train, "train")) is not None:
        out = _whole_groups(config, groups, count, seed)
    else:
        out = np.isin(np.arange(total), np.random.default_rng(seed).permutation(total)[:count])
    sides = {"train": ~out, "validation": out}
    return DatasetDict({name: train.select(np.flatnonzero(side)) for name, side in sides.items()})


def _whole_groups(config: DataConfig, groups: Sequence[str], count: int, seed: int) -> np.ndarray:
    """[documents] whether it is held out: whole groups, as they come, until they have so many documents."""
    belongs, names = group_numbers(groups)
    if len(names) < 2:
        raise DataError(
            f"{config.source}: all documents are of one {config.group} (data.group), so nothing can be held "
            "out; give documents of two or more, or leave data.group out"
        )
    order = np.random.default_rng(seed).permutation(len(names))[:-1]
    sizes = np.bincount(belongs)[order]
    before = np.cumsum(sizes) - sizes
    return np.isin(belongs, order[before < count])


def parts_of(config: DataConfig) -> list[DataConfig]:
    """What the config says of each source of its mix; of one source alone what it says."""
    if config.mix is None:
        return [config]
    most = config.max_eval_rows and max(config.max_eval_rows // len(config.mix), 1)
    same = {"mix": None, "max_train_rows": None, "max_eval_rows": most}
    named = [{"source": part.source, "subset": part.subset} for part in config.mix]
    texts = [{"text": part.text or config.text} for part in config.mix]
    return [config.model_copy(update={**same, **n, **t}) for n, t in zip(named, texts, strict=True)]


def split_sources(
    config: DataConfig, *, seed: int, notes: dict[str, Any] | None = None
) -> tuple[list[tuple[DataConfig, DatasetDict, bool]], int]:
    """Train and validation of each source: what the config says of it, and whether the split is its own.

    Each text is kept once, in one source, on one side.

    Args:
        notes: as of `read_documents`.

    Returns:
        The sources; and how many documents stood there before and were left out.

    Raises:
        DataError: as `read_documents` and `split_documents`; or all of a source stands in others.
    """
    parts, found, given = parts_of(config), [], 0
    for part in parts:
        documents = read_documents(part, notes)
        given += sum(len(documents[name]) for name in SIDES if name in documents)
        found.append((split_documents(documents, part, seed=seed), "validation" in documents))
    splits = [split for split, _ in found]
    if config.mix:
        splits = _apart(config, parts, splits)
    left = sum(len(split[name]) for split in splits for name in SIDES)
    both = zip(parts, splits, found, strict=True)
    return [(part, split, is_own) for part, split, (_, is_own) in both], given - left


def _apart(
    config: DataConfig, parts: Sequence[DataConfig], splits: Sequence[DatasetDict]
) -> list[DatasetDict]:
    """The same, but a text of several sources stays where it is held out, else where it is first."""
    tables = [(split[name], part.text) for name in SIDES for part, split in zip(parts, splits, strict=True)]
    sizes = {name: [len(split[name]) for split in splits] for name in SIDES}
    every = np.concatenate(known_again(tables))
    texts = dict(zip(SIDES, np.split(every, [sum(sizes["train"])]), strict=True))
    kept = kept_once(config, {name: (each, each) for name, each in texts.items()})
    made = [DatasetDict() for _ in splits]
    for name in SIDES:
        ends = np.cumsum(sizes[name])
        rows = np.split(kept[name], np.searchsorted(kept[name], ends[:-1]))
        for number, (split, its) in enumerate(zip(splits, rows, strict=True)):
            if not len(its):
                what = f"all {len(split[name])} {name} documents stand in other sources of the mix too"
                raise DataError(f"{parts[number].source}: {what}; leave this source out")
            made[number][name] = split[name].select(its - (ends[number] - sizes[name][number]))
    return made


def interleaved(parts: Sequence[Dataset], weights: Sequence[float], *, seed: int) -> Dataset:
    """Rows of all, drawn by these weights without putting back, until the first source has none left."""
    shares = np.asarray(weights, float) / sum(weights)
    return datasets.interleave_datasets(
        [*parts], shares.tolist(), seed=seed, stopping_strategy="first_exhausted"
    )
