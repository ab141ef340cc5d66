"""What a column says of its rows' classes: names, one each, whoever wrote them and however."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset

from kdlib.config.data import DataConfig
from kdlib.errors import DataError, listed, shown

UNLABELLED = "-1"  # of a test split whose classes are kept secret
IGNORED = "-100"  # what torch's losses leave out
WHOLE = re.compile(r"0|-?[1-9][0-9]*")
DECIMAL = re.compile(r"(0|-?[1-9][0-9]*)\.0")  # a whole number of a column with gaps, as pandas writes it


class Unusable(str):
    """In words what stands in place of a class."""


def label_values(rows: Dataset, column: str) -> list[str | None]:
    """What each row says of its class: a name, None where it says nothing; `Unusable` where neither."""
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    labels = list(map(_label, values))
    if all(DECIMAL.fullmatch(label) for label in {*labels} - {None}):
        return [label and label.removesuffix(".0") for label in labels]
    return labels


def _label(value: Any) -> str | None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and value.is_integer():  # of a column with gaps
        value = int(value)
    if str(value) == IGNORED or not isinstance(value, str | int):
        return Unusable(f"{shown(value)} ({type(value).__name__})")
    return str(value)


def merged(config: DataConfig, frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Makes one of labels that differ in case, spaces or Unicode's forms; notes of which, and how many rows.

    Raises:
        DataError: there are such, and neither `data.merge_labels` nor `data.labels` says what they are.
    """
    counts = Counter(label for each in frames.values() for label in each["label"] if _is_name(label))
    known = Counter(dict.fromkeys(config.labels or (), counts.total()))  # what the config names stands
    alike: dict[str, list[str]] = {}
    for label, _ in (counts + known).most_common():
        alike.setdefault(_plain(label), []).append(label)
    given = {*(config.labels or ())}
    several = [each for each in alike.values() if len(each) > 1 and {*each} - given]
    if not several:
        return {}
    told = [" and ".join(f"{label!r} ({counts[label]:,} rows)" for label in each) for each in several]
    if not config.merge_labels:
        what = "differ in case, spaces or Unicode's forms alone; correct them, set data.merge_labels: true "
        what += "where they are one class, or name each in data.labels where they are several"
        raise DataError(f"{config.source}: labels in {config.label!r} {what}{listed(told)}")
    names = {label: each[0] for each in several for label in each if label not in given}
    for frame in frames.values():
        frame["label"] = [names.get(label, label) for label in frame["label"]]
    return {"merged_labels": told}


def _is_name(label: Any) -> bool:
    return label is not None and not isinstance(label, Unusable)


def _plain(label: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def numbering(
    config: DataConfig, feature: Any, found: Collection[str | None]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names in order, and the number of each label; numbers are in their own order.

    Where the config names what the source numbers, its names stand in the order of the numbers.

    Raises:
        DataError: fewer than two classes; or it is not certain what is one.
    """
    names, given = sorted(filter(_is_name, found), key=_in_order), config.labels
    if isinstance(feature, datasets.ClassLabel):
        labels = _renamed(config, feature.names)
        same = set(labels) == set(feature.names)
        numbers = {name: labels.index(name) if same else number for number, name in enumerate(feature.names)}
    elif given and names and not {*names} & {*given} and all(map(WHOLE.fullmatch, names)):
        labels, values = given, list(range(len(given)))
        found_as = list(map(int, names))
        if len(names) == len(given) == found_as[-1] - found_as[0] + 1:  # as from 1 or -1 on
            values = found_as
        numbers = {str(value): number for number, value in enumerate(values)}
    else:
        labels = given or names
        numbers = {name: number for number, name in enumerate(labels)}
        if not given and names[:1] == [UNLABELLED] and len(names) > 2:
            what = f"-1 stands in {config.label!r} beside {', '.join(names[1:4])}: a class, or rows without?"
            do = f"Name all {len(names)} classes in data.labels; or these without it"
            raise DataError(f"{config.source}: {what} {do}")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            f"{config.source}: the classes in {config.label!r} are {', '.join(map(repr, labels)) or 'none'}; "
            "two or more, each once, are needed: name their column in data.label, and them in data.labels"
        )
    return tuple(labels), numbers


def _in_order(label: str) -> tuple[int, str]:
    """Numbers by what they say, before names, by their letters."""
    return (int(label), "") if WHOLE.fullmatch(label) else (2**63, label)


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
