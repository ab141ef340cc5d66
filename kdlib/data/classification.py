"""From texts with a class each to rows for teacher and student: split by class, each text on one side,
tokenized for both.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kdlib.config.sections import DataConfig
from kdlib.data.batches import Prepared, collate_classes, fingerprint
from kdlib.data.labelled_rows import Texts, read_texts, shown, unique
from kdlib.data.strata import held_out, sample
from kdlib.data.text import cut_off
from kdlib.errors import DataError, listed
from kdlib.metrics.classification import class_figures

IDS = datasets.List(datasets.Value("int32"))


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedTokenizerBase | None,
    seed: int,
    known: Sequence[str] | None = None,
) -> Prepared:
    """Read, split by class, sample and tokenize the rows of a config; `data.split_seed`, else `seed`, chooses
    among them.

    Args:
        teacher: the teacher's tokenizer, where it reads otherwise than the student's.
        known: the teacher's classes by name, where it has such.

    Raises:
        DataError: not the named columns, rows without a text or a known class, a class with nothing to learn
            from or none held out.
    """
    seed = seed if config.split_seed is None else config.split_seed
    splits, labels, notes = split_texts(config, seed=seed, known=known)
    rows: dict[str, Dataset] = {}
    for name, texts in splits.items():
        limit = config.max_train_rows if name == "train" else config.max_eval_rows
        notes[f"{name}_documents"] = len(texts)
        if limit is not None:
            texts = texts.select(sample(texts.classes, limit, seed=seed))
        if name == "train":  # a source may be sorted by class, and the first rows are looked at
            texts = texts.select(random.Random(seed).sample(range(len(texts)), len(texts)))
        rows[name], of_tokens = tokenized(texts, tokenizer, teacher, config)
        notes |= {f"{name}_rows": len(texts), f"{name}_classes": texts.counts(labels)}
        notes |= {f"{name}_{what}": figure for what, figure in of_tokens.items()}
    notes["fingerprint"] = fingerprint(*rows.values())
    pad_id = tokenizer.pad_token_id
    gathered = partial(
        collate_classes, pad_id=pad_id, teacher_pad_id=pad_id if teacher is None else teacher.pad_token_id
    )
    return Prepared(
        rows["train"],
        rows["validation"],
        notes,
        gathered,
        len(labels),
        labels,
        rows.get("test"),
        figures=class_figures,
    )


def split_texts(
    config: DataConfig, *, seed: int, known: Sequence[str] | None = None
) -> tuple[dict[str, Texts], tuple[str, ...], dict[str, Any]]:
    """The texts of train, validation and, where there is one, test; the classes' names; notes.

    What is the source's own stays as it is, but for texts that stand twice; the rest is held out from train,
    class by class.
    """
    source, labels, notes = read_texts(config, known)
    splits, repeated = unique(source, labels)
    notes |= repeated
    whole, grouped = len(splits["train"]), splits["train"].groups is not None
    how = f"by class, and whole {config.group or 'module'}s" if grouped else "by class"
    for name, share, spare in (("test", config.test, 2), ("validation", config.validation, 1)):
        if name not in splits and isinstance(share, float):
            train = splits["train"]
            spare = spare if "validation" not in splits else 1
            out = held_out(train.classes, round(share * whole), seed=seed, spare=spare, groups=train.groups)
            splits |= {"train": train.without(out), name: train.select(out)}
            reached = len(out) / whole if grouped else share
            notes["split" if name == "validation" else "test"] = f"{reached:.3g} of the rows, {how}"
    if grouped:
        held = {group for name, rows in splits.items() if name != "train" for group in rows.groups or ()}
        notes["groups_on_two_sides"] = len(held & set(splits["train"].groups or ()))
    _check_classes(config, {name: splits[name].counts(labels) for name in ("train", "validation")}, labels)
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}, labels, notes


def tokenized(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    config: DataConfig,
) -> tuple[Dataset, dict[str, Any]]:
    """{"input_ids", "label", "text"} of each text, its group, the teacher's ids; special tokens, cut to
    `max_length`; notes on that.
    """
    ids, lengths = _cut_ids(texts.texts, tokenizer, config)
    columns = {"input_ids": ids, "label": texts.classes, "text": texts.texts}
    features = {"input_ids": IDS, "label": datasets.Value("int64"), "text": datasets.Value("string")}
    if texts.groups is not None:
        columns["group"], features["group"] = texts.groups, datasets.Value("string")
    notes = {"tokens": sum(map(len, ids)), **cut_off(lengths, config.max_length)}
    if teacher is not None:
        columns["teacher_input_ids"], lengths = _cut_ids(texts.texts, teacher, config)
        features["teacher_input_ids"] = IDS
        notes["documents_cut_for_the_teacher"] = cut_off(lengths, config.max_length)["documents_cut"]
    return Dataset.from_dict(columns, features=datasets.Features(features)), notes


def class_table(prepared: Prepared) -> pd.DataFrame:
    """How many rows of each class are in each split."""
    return pd.DataFrame(
        {
            name: prepared.notes[f"{name}_classes"]
            for name in ("train", "validation", "test")
            if f"{name}_classes" in prepared.notes
        },
        index=list(prepared.labels),
    ).rename_axis("class")


def _cut_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[list[int]], list[int]]:
    """Each text's tokens, and how many there were before they were cut."""
    if not texts:
        return [], []
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    lengths = list(map(len, ids))
    if empty := [shown(text) for text, length in zip(texts, lengths, strict=True) if length == 0]:
        raise DataError(
            (
                f"{config.source}: {len(empty)} texts have no token; a class needs something to be read "
                "from: "
                "leave them out"
            )
            + listed(empty)
        )
    long = [row for row, length in enumerate(lengths) if length > config.max_length]
    if long:  # by the tokenizer itself, which keeps the special token at the end
        short = tokenizer(
            [texts[row] for row in long], truncation=True, max_length=config.max_length, verbose=False
        )["input_ids"]
        for row, tokens in zip(long, short, strict=True):
            ids[row] = tokens
    return ids, lengths


def _check_classes(
    config: DataConfig, counts: Mapping[str, Mapping[str, int]], labels: Sequence[str]
) -> None:
    """Refuse a class that has no row in train, or none in validation."""
    faults = [
        f"{shown(label)}: {counts['train'][label]} to train on, {counts['validation'][label]} held out"
        for label in labels
        if not counts["train"][label] or not counts["validation"][label]
    ]
    if faults:
        raise DataError(
            f"{config.source}: {len(faults)} of the {len(labels)} classes are empty on one side after the "
            "split; each needs a row to train "
            "on and one in validation. Give more rows of them, leave them out, join them with others, or see "
            "whether data.label "
            f"({config.label}) and data.labels name the classes" + listed(faults)
        )
