"""What is asked of a source's rows: columns that are there, groups, own splits, each row on one side."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from kdlib.config.data import DataConfig
from kdlib.errors import DataError, listed, nearest
from kdlib.sources.files import ending

GROUPED = "stdlib-sections"  # the built-in source whose rows say in `group` what they belong to
AT_ONCE = 1000  # rows
FIRST = 3  # of those left out that a run's notes name


def check_column(config: DataConfig, rows: Dataset, column: str, setting: str) -> None:
    """Refuse a column that is not there; `setting` names it in the config."""
    if column not in rows.column_names:
        what, names = setting.rpartition(".")[2], rows.column_names
        do = f"name the one with the {what} in {setting}"
        if ending(config.source) in (".csv", ".tsv") and config.header is None:
            do += (
                "; set data.header where its first line names none, data.separator where no comma parts them"
            )
        elif len(rows) == 1 and isinstance(rows[0][names[0]], list):
            do = f"where its rows stand under {names[0]!r}, set data.field: {names[0]}"
        raise DataError(f"{config.source}: no column {column!r}; it has {', '.join(names)}: {do}")


def group_values(config: DataConfig, rows: Dataset, split: str) -> list[str] | None:
    """What each row belongs to and is not divided from: `data.group`, a built-in source's own; None without.

    Raises:
        DataError: no such column, or rows with nothing in it.
    """
    group = config.group or ("group" if config.source == GROUPED else None)
    if config.group:
        check_column(config, rows, config.group, "data.group")
    if group not in rows.column_names:
        return None
    names: dict[str, str] = {}  # which may be long, and are held once
    values, faults = [], []
    for number, value in enumerate(chain.from_iterable(each.to_pylist() for each in columns_of(rows, group))):
        values.append(names.setdefault(str(value), str(value)))
        if value is None or value != value or not values[-1].strip():
            faults.append(f"row {number} of {split}")
    what = f"have nothing in {group!r} (data.group), so they cannot be kept together with their like"
    refuse_rows(config, faults, f"{what}; name what each belongs to")
    return values


def group_numbers(groups: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """[rows] the number of each one's group, in the order of their names; and these, each once."""
    return pd.factorize(np.array(groups, object), sort=True)


def own_splits(config: DataConfig, names: Collection[str]) -> dict[str, str]:
    """{"validation" or "test": which split of the source it is}: those that the config names, else so called.

    A `data.test` that is a share is taken from train, whatever the source has.  A DataError where the config
    names a split that is none of `names`.
    """
    own = {}
    for what, asked in (("validation", config.validation), ("test", config.test)):
        name = asked if isinstance(asked, str) else what
        if name in names:
            own[what] = name
        elif name == asked:
            raise DataError(
                f"{config.source}: no split {asked!r}{nearest(asked, names)}; held out can be "
                f"{', '.join(names) or 'none of its own'}: name it in data.{what}, or write a share of the "
                "rows, as 0.1"
            )
    if isinstance(config.test, float):
        own.pop("test", None)
    return own


def kept_once(
    config: DataConfig, splits: Mapping[str, tuple[Sequence | np.ndarray, Sequence | np.ndarray]]
) -> dict[str, np.ndarray]:
    """{split: the numbers of its rows that stay}: each row once, and none trained on that is held out.

    Args:
        splits: the rows themselves, and what of each must not stand on two sides: its text, its question.
            Where it does it stays in test, else in validation, so that held-out rows are whole.

    Raises:
        DataError: that leaves a split empty.
    """
    kept, held_out = {}, pd.Series(dtype=object)
    for name in ("test", "validation", "train"):
        rows, sides = (
            pd.Series(each, dtype=None if len(each) else object) for each in splits.get(name, ((), ()))
        )
        kept[name] = np.flatnonzero(~rows.duplicated() & ~sides.isin(held_out))
        held_out = pd.concat([held_out, sides]).drop_duplicates() if len(held_out) else sides
        if len(rows) and not len(kept[name]):
            raise DataError(
                f"{config.source}: all that {name} has is held out in another split too, so nothing is left "
                "of it; give splits that do not repeat each other, or train alone, and kdlib divides it"
            )
    return {name: kept[name] for name in splits}


def refuse_rows(
    config: DataConfig, faults: Sequence[str], what: str, notes: dict[str, Any] | None = None
) -> None:
    """Raise where there are faults: `3 rows <what>`, and the first ten of them, a line each.

    Args:
        notes: of who leaves such rows out where `data.skip_unusable` says so; they are counted there.
    """
    if faults and notes is not None and config.skip_unusable:
        notes["unusable_rows_left_out"] = notes.get("unusable_rows_left_out", 0) + len(faults)
        notes["first_unusable_rows"] = [*notes.get("first_unusable_rows", ()), *faults][:FIRST]
    elif faults:
        count = f"{len(faults)} row{'s' * (len(faults) != 1)}"
        raise DataError(f"{config.source}: {count} {what}{listed(faults)}")


def columns_of(rows: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    """A column as it lies on the disk, some rows at a time: nothing becomes an object of Python's."""
    for table in rows.select_columns([column]).with_format("arrow").iter(AT_ONCE):
        yield table[column]
