"""Texts with a class each, as a source has them: columns joined, classes by name, every row that has none
of either refused.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from kdlib.config.sections import DataConfig
from kdlib.data.sources import BUILT_IN, check_column, read_splits
from kdlib.errors import DataError, listed, nearest

NAMED = 10  # rows or classes in one message
SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class Texts:
    """Rows of one split: a text, the number of its class, and the group that must not be divided, where
    there is one.
    """

    texts: list[str]
    classes: list[int]
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> "Texts":
        return Texts(
            [self.texts[row] for row in rows],
            [self.classes[row] for row in rows],
            None if self.groups is None else [self.groups[row] for row in rows],
        )

    def without(self, rows: Sequence[int]) -> "Texts":
        gone = set(rows)
        return self.select([row for row in range(len(self)) if row not in gone])

    def counts(self, labels: Sequence[str]) -> dict[str, int]:
        """{class by name: rows}, also of those without any."""
        found = Counter(self.classes)
        return {label: found[number] for number, label in enumerate(labels)}


def read_texts(
    config: DataConfig, known: Sequence[str] | None = None
) -> tuple[dict[str, Texts], tuple[str, ...], dict[str, Any]]:
    """The splits that the config names or the source has: "train", and "validation" and "test" where they are
    its own.

    Args:
        known: the teacher's classes; None where it has none yet, or none with names.

    Returns:
        The splits, the classes' names in the order of their numbers, and notes.

    Raises:
        DataError: a column or split that is not there, or rows without a text or without a known class, named
            one by one.
    """
    splits, notes = _named_splits(config, read_splits(config))
    for rows in splits.values():
        named = {
            **dict.fromkeys(_text_columns(config), "data.text"),
            config.label: "data.label",
            **({config.group: "data.group"} if config.group else {}),
        }
        for column, setting in named.items():
            check_column(config, rows, column, setting)
    values = {name: _label_values(rows, config.label) for name, rows in splits.items()}
    if "test" in splits and set(values["test"]) == {None}:
        if config.test is not None:
            raise DataError(
                f"{config.source}: no row of {config.test!r} has a label, so nothing can be tested on it; "
                "name another in "
                "data.test"
            )
        del splits["test"], values["test"]
        notes["test"] = "none: the source's has no labels"
    labels, number_of = _numbering(config, splits["train"].features[config.label], values)
    texts = {name: _joined(rows, _text_columns(config)) for name, rows in splits.items()}
    _refuse(config, labels, list(_faults(texts, values, labels, number_of, known)))
    found = {
        name: Texts(texts[name], [number_of(value) for value in values[name]], _groups(config, rows, name))
        for name, rows in splits.items()
    }
    return found, labels, notes


def unique(splits: Mapping[str, Texts], labels: Sequence[str]) -> tuple[dict[str, Texts], dict[str, Any]]:
    """Each text once, and none on two sides: of a text in several splits the one in test stays, else in
    validation.

    A text with two classes is left out altogether.  Both are counted in the notes.
    """
    found: dict[str, set[int]] = {}
    for rows in splits.values():
        for text, number in zip(rows.texts, rows.classes, strict=True):
            found.setdefault(text, set()).add(number)
    torn = {text: numbers for text, numbers in found.items() if len(numbers) > 1}
    seen, kept, repeated = set(torn), {}, 0
    for name in ("test", "validation", "train"):
        if name in splits:
            rows = []
            for row, text in enumerate(splits[name].texts):
                if text not in seen:
                    rows.append(row)
                    seen.add(text)
                repeated += text not in torn
            kept[name] = splits[name].select(rows)
    repeated -= sum(map(len, kept.values()))
    conflicting = sum(text in torn for rows in splits.values() for text in rows.texts)
    notes = {"duplicate_documents_left_out": repeated, "conflicting_documents_left_out": conflicting}
    if torn:
        notes["conflicting_documents"] = [
            f"{shown(text)}: {', '.join(labels[number] for number in sorted(numbers))}"
            for text, numbers in list(torn.items())[:NAMED]
        ]
    return {name: kept[name] for name in splits}, notes


def shown(text: Any) -> str:
    """The beginning of a text, as one line."""
    whole = repr(text)
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}…"


def _text_columns(config: DataConfig) -> list[str]:
    return [config.text] if isinstance(config.text, str) else config.text


def _named_splits(config: DataConfig, source: DatasetDict) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """train, and what is held out by name; shares are taken later."""
    notes = {"source": config.source, "test": "none"}
    splits = {"train": source["train"]}
    for name, asked in (("validation", config.validation), ("test", config.test)):
        wanted = asked if isinstance(asked, str) else None if name == "test" and asked is not None else name
        if isinstance(asked, str) and (asked not in source or asked == "train"):
            raise DataError(
                f"{config.source}: data.{name}: found {asked!r}{nearest(asked, source)}; it has the splits "
                f"{', '.join(source)}: name one of them other than train, or give a share of the rows, such "
                "as 0.1"
            )
        if wanted in source:
            splits[name] = source[wanted]
            notes["split" if name == "validation" else "test"] = (
                "the source's own" if wanted == name else f"the source's {wanted}"
            )
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
            "kept together "
            f"with their like; name what each belongs to{listed(faults)}"
        )
    return list(map(str, values))


def _label_values(rows: Dataset, column: str) -> list[Any]:
    """What each row says of its class: a name, a whole number, or None where it says nothing."""
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return [_label_value(value) for value in values]


def _label_value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):  # a column of numbers with gaps
        return None if value != value else int(value) if value.is_integer() else repr(value)
    if isinstance(value, str):
        return value if value.strip() else None
    return value if value is None or isinstance(value, int) else repr(value)


def _numbering(
    config: DataConfig, feature: Any, values: Mapping[str, list[Any]]
) -> tuple[tuple[str, ...], Callable[[Any], int | None]]:
    """The classes' names in order, and what gives the number of a label; None where it is none of them."""
    found = {value for each in values.values() for value in each if value is not None}
    numeric = bool(found) and all(isinstance(value, int) for value in found)
    given = config.labels
    if isinstance(feature, datasets.ClassLabel):
        labels = _renamed(config, feature.names)
        place = {
            name: labels.index(name) if set(labels) == set(feature.names) else number
            for number, name in enumerate(feature.names)
        }
    elif numeric:
        labels = given or [str(value) for value in sorted(found)]
        from_one = bool(given) and found == set(range(1, len(given) + 1))
        place = (
            {number + from_one: number for number in range(len(labels))}
            if given
            else {value: number for number, value in enumerate(sorted(found))}
        )
    else:
        labels = given or sorted(map(str, found))
        place = {name: number for number, name in enumerate(labels)}
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"{config.source}: the classes in {config.label!r} are {', '.join(map(repr, labels)) or 'none'}; "
            "two or more, each "
            "once, are needed: name the column with the class in data.label, and the classes in data.labels"
        )
    return tuple(labels), place.get


def _renamed(config: DataConfig, names: Sequence[str]) -> Sequence[str]:
    """The source's names of its classes, or the config's for them: the same in another order, or others
    in the same order.
    """
    given = config.labels
    if given is None or set(given) == set(names):
        return given or names
    moved = [label for number, label in enumerate(given) if label in names and names.index(label) != number]
    if len(given) != len(names) or moved:
        elsewhere = f"; {moved[0]!r} stands elsewhere there" if moved else ""
        raise DataError(
            f"{config.source}: data.labels: found {', '.join(given)}; the source has {', '.join(names)}. "
            "Write these in any "
            f"order, or as many other names in this order{elsewhere}"
        )
    return given


def _joined(rows: Dataset, columns: Sequence[str]) -> list[Any]:
    """The columns' texts, a line each, without those that are empty; what is no text as it is."""
    if len(columns) == 1:
        return rows[columns[0]][:]
    lists = [rows[column][:] for column in columns]
    return [_line_each(row) for row in zip(*lists, strict=True)]


def _line_each(parts: Sequence[Any]) -> Any:
    for part in parts:
        if part is not None and not isinstance(part, str):
            return part
    return "\n".join(part for part in parts if part and part.strip())


def _faults(
    texts: Mapping[str, list[Any]],
    values: Mapping[str, list[Any]],
    labels: Sequence[str],
    number_of: Callable[[Any], int | None],
    known: Sequence[str] | None,
) -> Iterator[str]:
    taught = {label.casefold() for label in known or ()}
    # names of something else: kdlib.models.classifier says so
    if not any(label.casefold() in taught for label in labels):
        taught = {label.casefold() for label in labels}
    for name, each in texts.items():
        for row, (text, value) in enumerate(zip(each, values[name], strict=True)):
            if not isinstance(text, str) or not text.strip():
                yield f"row {row} of {name}: its text is {shown(text)}" + f" ({type(text).__name__})" * (
                    not isinstance(text, str)
                )
            elif value is None:
                yield f"row {row} of {name}: no label; text {shown(text)}"
            elif (number := number_of(value)) is None:
                yield f"row {row} of {name}: label {value!r}{nearest(str(value), labels)}; text {shown(text)}"
            elif labels[number].casefold() not in taught:
                yield (
                    f"row {row} of {name}: label {labels[number]!r}, which the teacher does not know; text "
                    f"{shown(text)}"
                )


def _refuse(config: DataConfig, labels: Sequence[str], faults: Sequence[str]) -> None:
    if faults:
        raise DataError(
            f"{config.source}: {len(faults)} row{'s' * (len(faults) > 1)} cannot be used; each needs a text, "
            "and a label that is one of "
            f"{some(labels)}. Correct them or leave them out, or see whether data.text, data.label and "
            "data.labels are meant so" + listed(faults)
        )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(map(repr, names[:NAMED])) + (f", … ({len(names)} in all)" if len(names) > NAMED else "")
