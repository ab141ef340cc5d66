"""Several sources of text at once, each with its weight."""

from collections.abc import Sequence

import datasets
import numpy as np
from datasets import Dataset, DatasetDict

from kdlib.config.data import DataConfig
from kdlib.errors import DataError
from kdlib.sources.documents import SIDES, known_again, read_documents, split_documents
from kdlib.sources.rows import kept_once


def parts_of(config: DataConfig) -> list[DataConfig]:
    """What the config says of each source of its mix; of one source alone what it says."""
    if config.mix is None:
        return [config]
    most = config.max_eval_rows and max(config.max_eval_rows // len(config.mix), 1)
    same = {"mix": None, "max_train_rows": None, "max_eval_rows": most}
    named = [{"source": part.source, "subset": part.subset} for part in config.mix]
    texts = [{"text": part.text or config.text} for part in config.mix]
    return [config.model_copy(update={**same, **n, **t}) for n, t in zip(named, texts, strict=True)]


def split_sources(config: DataConfig, *, seed: int) -> tuple[list[tuple[DataConfig, DatasetDict, bool]], int]:
    """Train and validation of each source: what the config says of it, and whether the split is its own.

    Each text is kept once, in one source, on one side.

    Returns:
        The sources; and how many documents stood there before and were left out.

    Raises:
        DataError: as `read_documents` and `split_documents`; or all of a source stands in others.
    """
    parts, found, given = parts_of(config), [], 0
    for part in parts:
        documents = read_documents(part)
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
