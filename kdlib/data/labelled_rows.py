"""Texts with a class each, as a source has them; every row that has none of either is refused.

A split is a frame with a row for each text and the columns text, class (its number) and, where a column says
what must not be divided, group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset, DatasetDict

from kdlib.config.sections import DataConfig
from kdlib.data.sources import BUILT_IN, check_column, read_splits
from kdlib.errors import DataError, listed, nearest

NAMED = 10  # rows or classes in one message
SHOWN = 60  # characters of a text
NumberOf = Callable[[Any], int | None]  # a label → the number of its class; None where it is none of them


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
    splits, notes = _named_splits(config, read_splits(config))
    columns = [config.text] if isinstance(config.text, str) else config.text
    named = {**dict.fromkeys(columns, "data.text"), config.label: "data.label"}
    named |= {config.group: "data.group"} if config.group else {}
    for rows in splits.values():
        for column, setting in named.items():
            check_column(config, rows, column, setting)
    values = {name: _label_values(rows, config.label) for name, rows in splits.items()}
    if "test" in splits and set(values["test"]) == {None}:
        if config.test is not None:
            raise DataError(
                f"{config.source}: no row of {config.test!r} has a label, so nothing can be tested on it; "
                "name another in data.test"
            )
        del splits["test"], values["test"]
        notes["test"] = "none: the source's has no labels"
    labels, number_of = _numbering(config, splits["train"].features[config.label], values)
    texts = {name: _joined(rows, columns) for name, rows in splits.items()}
    if faults := list(_faults(texts, values, labels, number_of, known)):
        raise DataError(
            f"{config.source}: {len(faults)} row{'s' * (len(faults) > 1)} cannot be used; each needs a text, "
            f"and a label that is one of {some(labels)}. Correct them or leave them out, or see whether "
            "data.text, data.label and data.labels are meant so" + listed(faults)
        )
    found = {}
    for name, rows in splits.items():
        found[name] = pd.DataFrame({"text": texts[name], "class": list(map(number_of, values[name]))})
        if (groups := _groups(config, rows, name)) is not None:
            found[name]["group"] = groups
    return found, labels, notes


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


def _named_splits(config: DataConfig, source: DatasetDict) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """train, and what is held out by name; shares are taken later."""
    notes, splits = {"source": config.source, "test": "none"}, {"train": source["train"]}
    for name, asked in (("validation", config.validation), ("test", config.test)):
        wanted = asked if isinstance(asked, str) else None if name == "test" and asked is not None else name
        if isinstance(asked, str) and (asked not in source or asked == "train"):
            raise DataError(
                f"{config.source}: data.{name}: found {asked!r}{nearest(asked, source)}; it has the splits "
                f"{', '.join(source)}: name one of them other than train, or give a share of the rows, such "
                "as 0.1"
            )
        if wanted in source:
            splits[name], own = source[wanted], "own" if wanted == name else wanted
            notes["split" if name == "validation" else "test"] = f"the source's {own}"
    return splits, notes


def _groups(config: DataConfig, rows: Dataset, name: str) -> list[str] | None:
    """What each row belongs to, where the config names such a column or the built-in source has one."""
    column = config.group or ("group" if config.source in BUILT_IN and "group" in rows.column_names else None)
    if column is None:
        return None
    values = rows[column][:]
    if faults := [f"row {row} of {name}" for row, value in enumerate(values) if value in (None, "")]:
        raise DataError(
            f"{config.source}: {len(faults)} rows have nothing in {column!r} (data.group), so they cannot be "
            f"kept together with their like; name what each belongs to{listed(faults)}"
        )
    return list(map(str, values))


def _label_values(rows: Dataset, column: str) -> list[Any]:
    """What each row says of its class: a name, a whole number, or None where it says nothing."""
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return [_label_value(value) for value in values]


def _label_value(value: Any) -> Any:
    if isinstance(value, float):  # a column of numbers with gaps
        return None if value != value else int(value) if value.is_integer() else repr(value)
    if isinstance(value, str):
        return value if value.strip() else None
    return value if value is None or type(value) is int else repr(value)


def _numbering(
    config: DataConfig, feature: Any, values: Mapping[str, list[Any]]
) -> tuple[tuple[str, ...], NumberOf]:
    """The classes' names in order, and what gives the number of a label."""
    found = {value for each in values.values() for value in each if value is not None}
    given = config.labels
    if isinstance(feature, datasets.ClassLabel):
        labels = _renamed(config, feature.names)
        same = set(labels) == set(feature.names)
        place = {name: labels.index(name) if same else number for number, name in enumerate(feature.names)}
    elif found and all(isinstance(value, int) for value in found):
        labels = given or [str(value) for value in sorted(found)]
        from_one = given and found == set(range(1, len(given) + 1))
        numbers = range(bool(from_one), len(labels) + bool(from_one)) if given else sorted(found)
        place = {value: number for number, value in enumerate(numbers)}
    else:
        labels = given or sorted(map(str, found))
        place = {name: number for number, name in enumerate(labels)}
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"{config.source}: the classes in {config.label!r} are {', '.join(map(repr, labels)) or 'none'}; "
            "two or more, each once, are needed: name the column with the class in data.label, and the "
            "classes in data.labels"
        )
    return tuple(labels), place.get


def _renamed(config: DataConfig, names: Sequence[str]) -> Sequence[str]:
    """The source's names of its classes, or the config's: these in another order, or others in this one."""
    given = config.labels
    if given is None or set(given) == set(names):
        return given or names
    moved = [label for number, label in enumerate(given) if label in names and names.index(label) != number]
    if len(given) != len(names) or moved:
        elsewhere = f"; {moved[0]!r} stands elsewhere there" if moved else ""
        raise DataError(
            f"{config.source}: data.labels: found {', '.join(given)}; the source has {', '.join(names)}. "
            f"Write these in any order, or as many other names in this order{elsewhere}"
        )
    return given


def _joined(rows: Dataset, columns: Sequence[str]) -> list[Any]:
    """The columns' texts, a line each, without those that are empty; what is no text as it is."""

    def line_each(parts: Sequence[Any]) -> Any:
        foreign = [part for part in parts if part is not None and not isinstance(part, str)]
        return foreign[0] if foreign else "\n".join(part for part in parts if part and part.strip())

    lists = [rows[column][:] for column in columns]
    return lists[0] if len(columns) == 1 else list(map(line_each, zip(*lists, strict=True)))


def _faults(
    texts: Mapping[str, list[Any]],
    values: Mapping[str, list[Any]],
    labels: Sequence[str],
    number_of: NumberOf,
    known: Sequence[str] | None,
) -> Iterator[str]:
    """What is wrong with each row of which nothing can be learned."""
    ours, taught = ({label.casefold() for label in names} for names in (labels, known or ()))
    if not ours & taught:  # names of something else: kdlib.models.classifier says so
        taught = ours
    for name, each in texts.items():
        for row, (text, value) in enumerate(zip(each, values[name], strict=True)):
            where, number = f"row {row} of {name}", number_of(value)
            if not isinstance(text, str):
                yield f"{where}: its text is {shown(text)} ({type(text).__name__})"
            elif not text.strip():
                yield f"{where}: its text is {shown(text)}"
            elif value is None:
                yield f"{where}: no label; text {shown(text)}"
            elif number is None:
                yield f"{where}: label {value!r}{nearest(str(value), labels)}; text {shown(text)}"
            elif labels[number].casefold() not in taught:
                found = f"label {labels[number]!r}, which the teacher does not know"
                yield f"{where}: {found}; text {shown(text)}"
