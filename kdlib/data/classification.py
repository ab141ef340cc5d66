"""From texts with a class each to rows for teacher and student: split by class, each text on one side.

The stratified split is our own, as scikit-learn's know no groups that hold several classes, spare none of a
small class, and would change with the number of rows of another class.
"""

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.data import DataConfig
from kdlib.data.batches import Prepared, collate_classes, fingerprint
from kdlib.data.labelled_rows import counts, read_texts, shown, unique
from kdlib.data.text import cut_off
from kdlib.errors import DataError, listed
from kdlib.metrics.classification import class_figures
from kdlib.sources.progress import Told
from kdlib.tokens.vocabulary import ids_of

IDS, TEXT, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("string"), datasets.Value("int64")
SPLITS = ("train", "validation", "test")
AT_ONCE = 1000  # texts of which all is known that a tokenizer finds out
EXACT = 100  # groups of which every sum is looked at


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    teacher: Tokenizer | None,
    seed: int,
    known: Sequence[str] | None = None,
) -> Prepared:
    """Read, split by class, sample and tokenize the rows; `data.split_seed`, else `seed`, chooses among them.

    Args:
        teacher: its tokenizer, where it reads otherwise than the student's.
        known: the teacher's classes by name, where it has such.

    Raises:
        DataError: not the named columns, unusable rows, a class without rows to learn from or held out.
    """
    seed = seed if config.split_seed is None else config.split_seed
    splits, labels, notes = split_texts(config, seed=seed, known=known)
    rows: dict[str, Dataset] = {}
    for name, texts in splits.items():
        limit = config.max_train_rows if name == "train" else config.max_eval_rows
        notes[f"{name}_documents"] = len(texts)
        if limit is not None:
            texts = texts.iloc[sample(texts["class"].tolist(), limit, seed=seed)]
        if name == "train":  # a source may be sorted by class, and the first rows are looked at
            texts = texts.iloc[random.Random(seed).sample(range(len(texts)), len(texts))]
        rows[name], of_tokens = tokenized(texts, tokenizer, teacher, config)
        found = {"rows": len(texts), "classes": counts(texts, labels), **of_tokens}
        notes |= {f"{name}_{what}": figure for what, figure in found.items()}
    notes["fingerprint"] = fingerprint(*rows.values())
    pads = {"pad_id": tokenizer.pad_token_id, "teacher_pad_id": (teacher or tokenizer).pad_token_id}
    gathered = partial(collate_classes, **pads)
    return Prepared(
        **rows, notes=notes, collate=gathered, vocabulary=len(labels), labels=labels, figures=class_figures
    )


def split_texts(
    config: DataConfig, *, seed: int, known: Sequence[str] | None = None
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...], dict[str, Any]]:
    """Train, validation and, where there is one, test, as frames; the classes' names; notes.

    The source's own splits stay, but for texts that stand twice; else train is divided, class by class.
    """
    source, labels, notes = read_texts(config, known)
    splits, repeated = unique(source, labels)
    notes |= repeated
    whole, grouped = len(splits["train"]), "group" in splits["train"]
    how = f"by class, and whole {config.group or 'module'}s" if grouped else "by class"
    for name, share in (("test", config.test), ("validation", config.validation)):
        if name not in splits and isinstance(share, float):
            train = splits["train"]
            spare = 1 if name == "validation" or "validation" in splits else 2  # a row for each side to come
            groups, total = train["group"].tolist() if grouped else None, round(share * whole)
            out = held_out(train["class"].tolist(), total, seed=seed, spare=spare, groups=groups)
            splits |= {"train": train.drop(out).reset_index(drop=True), name: train.loc[out]}
            reached = len(out) / whole if grouped else share
            notes["split" if name == "validation" else "test"] = f"{reached:.3g} of the rows, {how}"
    if grouped:
        held = {group for name, rows in splits.items() if name != "train" for group in rows["group"]}
        notes["groups_on_two_sides"] = len(held & set(splits["train"]["group"]))
    to_train, out_of_it = (counts(splits[name], labels) for name in ("train", "validation"))
    if faults := [
        f"{shown(label)}: {to_train[label]} to train on, {out_of_it[label]} held out"
        for label in labels
        if not to_train[label] or not out_of_it[label]
    ]:
        raise DataError(
            f"{config.source}: {len(faults)} of the {len(labels)} classes are empty on one side after the "
            "split; each needs a row to train on and one in validation. Give more rows of them, leave them "
            f"out, or see whether data.label ({config.label}) and data.labels name them{listed(faults)}"
        )
    return {name: splits[name] for name in SPLITS if name in splits}, labels, notes


def tokenized(
    texts: pd.DataFrame, tokenizer: Tokenizer, teacher: Tokenizer | None, config: DataConfig
) -> tuple[Dataset, dict[str, Any]]:
    """{"input_ids", "label", "text"} of each text, its group, the teacher's ids, cut to max_length; notes."""
    written = texts["text"].tolist()
    ids, lengths = _cut_ids(written, tokenizer, config)
    columns = {"input_ids": ids, "label": texts["class"].tolist(), "text": written}
    features = {"input_ids": IDS, "label": NUMBER, "text": TEXT}
    if "group" in texts:
        columns["group"], features["group"] = texts["group"].tolist(), TEXT
    notes = {"tokens": sum(map(len, ids)), **cut_off(lengths, config.max_length)}
    if teacher is not None:
        columns["teacher_input_ids"], lengths = _cut_ids(written, teacher, config)
        features["teacher_input_ids"] = IDS
        notes["documents_cut_for_the_teacher"] = cut_off(lengths, config.max_length)["documents_cut"]
    return Dataset.from_dict(columns, features=datasets.Features(features)), notes


def class_table(prepared: Prepared) -> pd.DataFrame:
    """How many rows of each class are in each split."""
    notes = prepared.notes
    table = {name: notes[f"{name}_classes"] for name in SPLITS if f"{name}_classes" in notes}
    return pd.DataFrame(table, index=list(prepared.labels)).rename_axis("class")


def apportioned(sizes: Sequence[int], total: int, *, spare: int = 0) -> list[int]:
    """`total` divided among classes in proportion to their sizes, by largest remainder.

    Args:
        spare: so many of each class are not to be given away.

    Returns:
        For each class a count: one or more where `total` is enough for all of them, `size - spare` at most.
    """
    most = [max(size - spare, 0) for size in sizes]
    least = [min(limit, 1) for limit in most]
    if sum(least) > total:
        least = [0] * len(sizes)
    ideal = [total * size / max(sum(sizes), 1) for size in sizes]
    counts = [min(max(int(share), low), high) for share, low, high in zip(ideal, least, most, strict=True)]
    while missing := min(total, sum(most)) - sum(counts):
        step, bounds = (1, most) if missing > 0 else (-1, least)
        open_ = [i for i, count in enumerate(counts) if count != bounds[i]]
        counts[max(open_, key=lambda i: step * (ideal[i] - counts[i]))] += step
    return counts


def sample(classes: Sequence[int], total: int, *, seed: int) -> list[int]:
    """The numbers of `total` rows, rising, that keep the classes' proportions; all if there are no more."""
    rows = _by_class(classes)
    return _drawn(rows, apportioned(list(map(len, rows)), min(total, len(classes))), seed)


def held_out(
    classes: Sequence[int], total: int, *, seed: int, spare: int, groups: Sequence[str] | None = None
) -> list[int]:
    """The numbers of some `total` rows to be held out, rising, that keep the classes' proportions.

    Args:
        total: raised to one of each class.
        spare: so many rows (or groups) of each class stay, for training and for what is held out later.
        groups: of each row; then whole groups are held out, whose rows come nearest to each class's count.
    """
    rows = _by_class(classes)
    total = max(total, sum(len(each) > spare for each in rows))
    counts = apportioned(list(map(len, rows)), total, spare=0 if groups else spare)
    if groups is None:
        return _drawn(rows, counts, seed)
    out: set[str] = set()
    # a group may hold rows of several classes
    for number, each in sorted(enumerate(rows), key=lambda pair: len(pair[1])):
        left = [groups[row] for row in each if groups[row] not in out]
        wanted = counts[number] - (len(each) - len(left))
        out |= _groups_nearest(left, wanted, seed, number, spare) if wanted > 0 else set()
    return [row for row, group in enumerate(groups) if group in out]


def _by_class(classes: Sequence[int]) -> list[list[int]]:
    """The numbers of each class's rows; classes as they come first, so that their names change no split."""
    return [list(rows) for _, rows in pd.Series(range(len(classes))).groupby(list(classes), sort=False)]


def _drawn(rows: Sequence[Sequence[int]], counts: Sequence[int], seed: int) -> list[int]:
    """So many of each class, by a generator of its own: whatever the others' rows, the same are drawn."""
    each = zip(rows, counts, strict=True)
    drawn = (random.Random(f"{seed} {number}").sample(of, count) for number, (of, count) in enumerate(each))
    return sorted(chain.from_iterable(drawn))


def _groups_nearest(groups: Sequence[str], count: int, seed: int, number: int, spare: int) -> set[str]:
    """The groups, one or more, whose sizes sum nearest to `count`, with `spare` left; none of too few.

    Of many groups most are taken as they come while they fit, and the last hundred make up the rest.
    """
    sizes, taken = Counter(groups), []
    names = sorted(sizes)
    random.Random(f"{seed} {number}").shuffle(names)
    most = len(names) - spare
    while len(names) > EXACT:
        if sizes[name := names.pop()] < count and len(taken) < most - 1:
            taken.append(name)
            count -= sizes[name]
    reached: dict[int, tuple[str, ...]] = {0: ()}  # sum of sizes -> the first groups found that have it
    for name in names:
        for total, chosen in list(reached.items()):
            if len(taken) + len(chosen) < most and total < count and total + sizes[name] not in reached:
                reached[total + sizes[name]] = (*chosen, name)
    if not taken:
        del reached[0]
    nearest = min(reached, key=lambda total: (abs(total - count), total), default=None)
    return {*taken, *(() if nearest is None else reached[nearest])}


def _cut_ids(
    texts: Sequence[str], tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[list[int]], list[int]]:
    """Each text's tokens, and how many there were before they were cut."""
    ids, tell = [], Told("tokenizing", len(texts), "texts")
    for first in range(0, len(texts), AT_ONCE):
        ids += ids_of(tokenizer, texts[first : first + AT_ONCE], special=True)
        tell(len(ids))
    lengths = list(map(len, ids))
    if empty := [shown(text) for text, tokens in zip(texts, ids, strict=True) if not tokens]:
        needed = "a class needs something to be read from: leave them out"
        raise DataError(f"{config.source}: {len(empty)} texts have no token; {needed}{listed(empty)}")
    if long := [row for row, length in enumerate(lengths) if length > config.max_length]:
        # by the tokenizer itself, which keeps the special token at the end
        options = {"truncation": True, "max_length": config.max_length, "verbose": False}
        short = tokenizer([texts[row] for row in long], **options)["input_ids"]
        for row, tokens in zip(long, short, strict=True):
            ids[row] = tokens
    return ids, lengths
