"""Columns of tables that are larger than the memory."""

from collections.abc import Iterator

import pyarrow as pa
from datasets import Dataset

AT_ONCE = 1000  # rows


def columns_of(rows: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    """A column as it lies on the disk, some rows at a time: nothing becomes an object of Python's."""
    for table in rows.select_columns([column]).with_format("arrow").iter(AT_ONCE):
        yield table[column]
