"""Texts with a class each, as a source has them; every row that has none of either is refused.

A split is a frame with a row for each text and the columns text, class (its number) and, where a column says
what must not be divided, group.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset

from kdlib.config.data import DataConfig
from kdlib.errors import DataError, nearest
from kdlib.sources.labels import UNLABELLED, Unusable, label_values, merged, numbering
from kdlib.sources.places import read_splits
from kdlib.sources.rows import check_column, group_values, own_splits, refuse_rows

NAMED = 10  # rows or classes in one message
SHOWN = 60  # characters of a text


def read_texts(
    config: DataConfig, known: Sequence[str] | None = None
) -> tuple[dict[str, pd.DataFrame], tuple[str, ...], dict[str, Any]]:
    """The source's "train", and "validation" and "test" where they are its own or the config names them.

    Args:
        known: the teacher's classes; None where it has none yet, or none with names.

    Returns:
        The splits, the classes' names in the order of their numbers, and notes.

    Raises:
        DataError: a column or split that is not there; rows without a text or a known class, one by one.
    """
    source, notes = read_splits(config), {"source": config.source, "test": "none"}
    own = own_splits(config, [name for name in source if name != "train"])
    for name, split in own.items():
        whose = "own" if split == name else split
        notes["split" if name == "validation" else "test"] = f"the source's {whose}"
    splits = {name: source[split] for name, split in {"train": "train", **own}.items()}
    columns = [config.text] if isinstance(config.text, str) else config.text
    named = {**dict.fromkeys(columns, "data.text"), config.label: "data.label"}
    frames: dict[str, pd.DataFrame] = {}
    for name, rows in splits.items():
        for column, setting in named.items():
            check_column(config, rows, column, setting)
        read = {"text": _joined(rows, columns), "label": label_values(rows, config.label)}
        if (groups := group_values(config, rows, name)) is not None:
            read["group"] = groups
        frames[name] = pd.DataFrame(read, dtype=object)
    secret = {None, UNLABELLED} - {*frames["train"]["label"]}
    if "test" in frames and {*frames["test"]["label"]} <= secret | {None}:
        if config.test is not None:
            raise DataError(
                f"{config.source}: no row of {config.test!r} has a label, so nothing can be tested on it; "
                "name another in data.test"
            )
        del frames["test"]
        notes["test"] = "none: the source's has no labels"
    odd = [
        f"row {row} of {name}: its label is {label}"
        for name, frame in frames.items()
        for row, label in enumerate(frame["label"])
        if isinstance(label, Unusable) and not config.skip_unusable
    ]
    what = "whose label is no class; needed is one name, or whole number, for each row: mend them, or name "
    refuse_rows(config, odd, f"{what}another column in data.label")
    feature = splits["train"].features[config.label]
    if not isinstance(feature, datasets.ClassLabel):
        notes |= merged(config, frames)
    labels, numbers = numbering(
        config, feature, {label for each in frames.values() for label in each["label"]}
    )
    what = f"cannot be used; each needs a text, and a label that is one of {some(labels)}. Correct them or "
    what += "leave them out, or see whether data.text, data.label and data.labels are meant so"
    faults = list(_faults(frames, labels, numbers, known))
    refuse_rows(config, [f"row {row} of {name}: {fault}" for name, row, fault in faults], what, notes)
    for name, frame in frames.items():
        frame = frame.drop([row for split, row, _ in faults if split == name]).reset_index(drop=True)
        frames[name] = frame.assign(**{"class": [numbers[label] for label in frame["label"]]}).drop(
            columns="label"
        )
    return frames, labels, notes


def unique(
    splits: Mapping[str, pd.DataFrame], labels: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Each text once, and none on two sides: of a text in several splits that in test stays, else validation.

    A text with two classes is left out altogether.  Both are counted in the notes.
    """
    order = [name for name in ("test", "validation", "train") if name in splits]
    every = pd.concat({name: splits[name] for name in order}, names=["split", None])
    torn = every.groupby("text")["class"].transform("nunique") > 1
    kept = every[~torn].drop_duplicates("text")
    notes: dict[str, Any] = {
        "duplicate_documents_left_out": int((~torn).sum()) - len(kept),
        "conflicting_documents_left_out": int(torn.sum()),
    }
    if torn.any():
        both = pd.concat([splits[name] for name in splits]).groupby("text", sort=False)["class"].unique()
        notes["conflicting_documents"] = [
            f"{shown(text)}: {', '.join(labels[number] for number in sorted(numbers))}"
            for text, numbers in both[both.map(len) > 1].head(NAMED).items()
        ]
    return {name: kept.xs(name).reset_index(drop=True) for name in splits}, notes


def counts(rows: pd.DataFrame, labels: Sequence[str]) -> dict[str, int]:
    """{class by name: rows}, also of those without any."""
    found = rows["class"].value_counts()
    return {label: int(found.get(number, 0)) for number, label in enumerate(labels)}


def shown(text: Any) -> str:
    """The beginning of a text, as one line."""
    whole = repr(text)
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}…"


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(map(repr, names[:NAMED])) + (f", … ({len(names)} in all)" if len(names) > NAMED else "")


def _joined(rows: Dataset, columns: Sequence[str]) -> list[Any]:
    """The columns' texts, a line each, without those that are empty; what is no text as it is."""

    def line_each(parts: Sequence[Any]) -> Any:
        foreign = [part for part in parts if part is not None and not isinstance(part, str)]
        return foreign[0] if foreign else "\n".join(part for part in parts if part and part.strip())

    lists = [rows[column][:] for column in columns]
    return lists[0] if len(columns) == 1 else list(map(line_each, zip(*lists, strict=True)))


def _faults(
    frames: Mapping[str, pd.DataFrame],
    labels: Sequence[str],
    numbers: Mapping[Any, int],
    known: Sequence[str] | None,
) -> Iterator[tuple[str, int, str]]:
    """(split, row, what is wrong with it) of each of which nothing can be learned."""
    ours, taught = ({label.casefold() for label in names} for names in (labels, known or ()))
    if not ours & taught:  # names of something else: kdlib.models.classifier says so
        taught = ours
    for name, frame in frames.items():
        for row, (text, label) in enumerate(zip(frame["text"], frame["label"], strict=True)):
            number, beside = numbers.get(label), f"; text {shown(text)}"
            if not isinstance(text, str):
                yield name, row, f"its text is {shown(text)} ({type(text).__name__})"
            elif not text.strip():
                yield name, row, f"its text is {shown(text)}"
            elif label is None:
                yield name, row, f"no label{beside}"
            elif isinstance(label, Unusable):
                yield name, row, f"its label is {label}{beside}"
            elif number is None:
                yield name, row, f"label {label!r}{nearest(str(label), labels)}{beside}"
            elif labels[number].casefold() not in taught:
                yield name, row, f"label {labels[number]!r}, which the teacher does not know{beside}"
