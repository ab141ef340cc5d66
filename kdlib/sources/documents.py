"""A source's documents, each with a text, once, on one side: found out by batches of a table on the disk."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Value

from kdlib.config.data import DataConfig
from kdlib.errors import DataError
from kdlib.sources.places import read_splits
from kdlib.sources.rows import AT_ONCE, check_column, columns_of, group_values, kept_once, own_splits

SIDES = ("train", "validation")
TEXTS = (Value("string"), Value("large_string"))
DIGEST = 16  # bytes, by which a text is known again


def read_documents(config: DataConfig) -> DatasetDict:
    """The source's documents, each with a text: "train", and "validation" where the source has it."""
    source = read_splits(config)
    own = own_splits(config, [name for name in source if name != "train"])
    sides = {"train": "train", **{side: name for side, name in own.items() if side in SIDES}}
    documents = DatasetDict({side: source[name] for side, name in sides.items()})
    for split in documents:
        check_column(config, documents[split], config.text, "data.text")
        if (number := _without_text(documents[split], config.text)) is not None:
            text = documents[split][number][config.text]
            raise DataError(
                f"{config.source}: document {number} of {split} has {config.text!r} = {text!r} "
                f"({type(text).__name__}); every document needs a text"
            )
    return documents


def _without_text(rows: Dataset, column: str) -> int | None:
    """The first row whose text is none."""
    if rows.features[column] not in TEXTS:
        return next((n for n, text in enumerate(rows[column]) if not isinstance(text, str)), None)
    for number, texts in enumerate(columns_of(rows, column)):
        if texts.null_count:
            return number * AT_ONCE + int(np.argmax(texts.is_null()))
    return None


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
    """Train and validation: the source's own, else by document; each text is kept once, and on one side."""
    sides = [name for name in SIDES if name in documents]
    texts = known_again([(documents[name], config.text) for name in sides])
    kept = kept_once(config, {name: (each, each) for name, each in zip(sides, texts, strict=True)})
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
