"""The readers of `datasets`, so that a text stays the text that it is and a fault has its file and line.

Its own reader of JSON takes texts that look like dates for dates, makes 5 of "5" beside a number, and dies of
a line that is `null`, and the process with it.  So JSON is read by its reader of text, and taken apart by
Python's json.  In a table, which does not tell 7 from "007" or a class called None from nothing, all is text.

It stands alone: `datasets` puts what opens compressed files in the place of `open` in a reader's module.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from lzma import LZMAError
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import DatasetInfo, Features, Json as Anything, Value
from datasets.builder import Key
from datasets.packaged_modules.arrow import arrow
from datasets.packaged_modules.csv import csv
from datasets.packaged_modules.parquet import parquet
from datasets.packaged_modules.text import text

from kdlib.errors import DataError, listed, shown
from kdlib.sources.progress import Told

# pyarrow's, pandas' and json's own errors are ValueErrors
BROKEN = (OSError, ValueError, LookupError, EOFError, RuntimeError, LZMAError, zlib.error, zipfile.BadZipFile)
for _name in ("compression.zstd", "backports.zstd"):  # zstandard does not see where a file is cut short
    with suppress(ImportError):
        BROKEN = (*BROKEN, import_module(_name).ZstdError)
HAS_ZSTD = any(error.__name__ == "ZstdError" for error in BROKEN)
SCALARS = {str: "string", int: "int64", float: "float64", bool: "bool"}
SPACE = re.compile(r"\s*")


class _ByFile:
    """A reader of files one by one, each of whose faults names its file."""

    config: Any

    def _split_generators(self, dl_manager: Any) -> list:
        """The splits, and what is looked at in the first file before."""
        with self._naming(next(iter(self.config.data_files.values()))[0]):
            return super()._split_generators(dl_manager)  # type: ignore[misc]

    def _generate_tables(self, **lists: Sequence) -> Iterator[tuple[Key, pa.Table]]:
        yield from self._of_files(self._tables, **lists)

    def _of_files(self, read: Callable, **lists: Sequence) -> Iterator[tuple[Key, Any]]:
        """(number of the file and of its part, what `read` makes of the part); `lists`: as of the splits."""
        for number, each in enumerate(zip(*lists.values(), strict=True)):
            one = dict(zip(lists, each, strict=True))
            with self._naming(one.get("base_files") or one["files"]):
                for part, made in enumerate(read(**one)):
                    yield Key(number, part), made

    def _tables(self, **one: Any) -> Iterator[pa.Table]:
        """A file's tables: those that the reader of `datasets` makes of it."""
        made = super()._generate_tables(**{name: [each] for name, each in one.items()})  # type: ignore[misc]
        yield from (table for _, table in made)

    @contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            name = (getattr(self.config, "encoding", None) or "utf-8").removesuffix("-sig")
            do = "name its encoding in data.encoding, as cp1252 or utf-16"
            raise DataError(f"{file}: is no text in {name} ({error.reason}); {do}") from error
        except BROKEN as error:
            raise DataError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


class Parquet(_ByFile, parquet.Parquet):
    """Parquet."""


class Arrow(_ByFile, arrow.Arrow):
    """Arrow's own files."""


class Text(_ByFile, text.Text):
    """Text, by paragraph where the config says so."""


@dataclass
class JsonConfig(text.TextConfig):
    """Of `Json`; `field`: under which an object holds the rows."""

    encoding: str = "utf-8-sig"
    field: str | None = None


class Json(_ByFile, text.Text):
    """JSON: an object a line; or objects one after the other, or a list of them, or one that holds it.

    A column that is all text, whole numbers, numbers or truth values is of that type; of any other each value
    is as it stands.
    """

    BUILDER_CONFIG_CLASS = JsonConfig

    def _info(self) -> DatasetInfo:
        self.given, self.config.features = self.config.features, None  # they are the rows', not the lines'
        self.object_of = _object
        return DatasetInfo(features=self.given)

    def _split_generators(self, dl_manager: Any) -> list:
        splits, self.is_stream = super()._split_generators(dl_manager), dl_manager.is_streaming
        if self.info.features is None and not self.is_stream:
            files = [file for split in splits for file in split.gen_kwargs["base_files"]]
            tell, read = Told("reading", sum(map(os.path.getsize, files)), "bytes"), 0
            kinds: dict[str, set[type]] = {}
            for split in splits:
                for _, (rows, size) in self._of_files(self._rows, **split.gen_kwargs):
                    for name, value in chain.from_iterable(row.items() for row in rows):
                        kinds.setdefault(name, set()).add(type(value))
                    tell(read := read + size)
            if not kinds:
                raise DataError(f"{files[0]}: is empty; rows are needed")
            self.info.features = Features({name: _feature(each) for name, each in kinds.items()})
            self.object_of = QUICK.decode  # each line was looked at
        return splits

    def _cast_table(self, table: pa.Table) -> pa.Table:
        return table

    def _tables(self, **one: Any) -> Iterator[pa.Table]:
        for rows, _ in self._rows(**one):
            features = self.info.features
            if self.given:
                rows = [features.encode_example({n: row.get(n) for n in features}) for row in rows]
                yield pa.Table.from_pylist(rows, schema=features.arrow_schema)
                continue
            names = features or dict.fromkeys(chain.from_iterable(rows))
            columns = {n: _column([row.get(n) for row in rows], features and features[n]) for n in names}
            yield pa.table(columns, schema=features and features.arrow_schema)

    def _rows(self, **one: Any) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """A file's objects, some at a time, and their characters; a DataError that names each broken line."""
        file = one["base_files"]
        pieces = (table["text"].to_pylist() for table in super()._tables(**one))
        first = next(pieces, [])
        if self.config.field or not _is_line(next((line for line in first if line.strip()), "")):
            document = "\n".join(chain(first, *pieces))
            yield _of_document(document, file, self.config.field), len(document)
            return
        faults: list[str] = []
        begun = 0
        for lines in chain([first], pieces):
            rows = []
            for number, line in enumerate(lines, begun + 1):
                if line.strip():
                    try:
                        rows.append(self.object_of(line))
                    except (ValueError, RecursionError) as error:
                        what = error.msg if isinstance(error, json.JSONDecodeError) else error
                        faults.append(f"line {number}: {what}: {shown(line.strip()[:60])}")
            begun += len(lines)
            if not faults:
                yield rows, sum(map(len, lines))
            elif self.is_stream:  # which may have no end
                break
        if faults:
            raise DataError(f"{file}: {len(faults)} broken line{'s'[len(faults) < 2 :]}{listed(faults, 5)}")


class Csv(_ByFile, csv.Csv):
    """Tables of text."""

    def _split_generators(self, dl_manager: Any) -> list:
        splits = super()._split_generators(dl_manager)
        if self.config.features is None:
            self.config.na_filter = False
            for split in splits:
                for _ in self._of_files(self._header, **split.gen_kwargs):
                    pass
        return splits

    def _header(self, base_files: str, files_iterables: Any) -> Iterator[list[str]]:
        """The names of a table's columns; a ValueError where its first rows have more fields."""
        options = {n: each for n, each in self.config.pd_read_csv_kwargs.items() if n != "chunksize"}
        if named := self.config.names:
            options |= {"header": None, "names": None}
        table = pd.read_csv(next(iter(files_iterables)), dtype=object, **options | {"nrows": 1})
        if named and len(table.columns) != len(named):
            has = f"line 1 has {len(table.columns)} fields"
            raise ValueError(f"{has}, and data.header names {len(named)} columns; name each")
        names = named or [*map(str, table.columns)]
        if self.config.header is None:
            self.config.names = names
        if not isinstance(table.index, pd.RangeIndex):  # pandas would name the rows by the first
            raise ValueError(f"line 2 has more fields than line 1, which names {', '.join(names)}")
        if self.config.features is None:
            self.config.features = self.info.features = Features(dict.fromkeys(names, Value("string")))
        elif {*names} != {*self.config.features}:
            others = ", ".join(self.config.features)
            raise ValueError(f"line 1 names {', '.join(names)}, where other files have {others}")
        yield names


READERS = {"json": Json, "csv": Csv, "text": Text, "parquet": Parquet, "arrow": Arrow}
"""By the names that `datasets` has for its own."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(max(found, key=[name for name, _ in pairs].count))} stands twice")
    return found


def _whole(digits: str) -> int:
    if (number := int(digits)).bit_length() > 63:
        raise ValueError(f"{shown(digits)} is a number of more than 64 bits; write it as text")
    return number


def _constant(name: str) -> None:
    """NaN is how several writers have nothing."""
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_int=_whole, parse_constant=_constant)
QUICK = json.JSONDecoder(parse_constant=_constant)


def _object(line: str) -> dict[str, Any]:
    return _checked(DECODER.decode(line), is_escaped="\\u" in line)


def _checked(value: Any, *, is_escaped: bool) -> dict[str, Any]:
    """A row that can be kept; a ValueError where it is none."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if is_escaped:
        json.dumps(value, ensure_ascii=False).encode()  # half a character is none
    return value


def _is_line(line: str) -> bool:
    """Whether the first line of a file is all of an object, so that each is a line."""
    try:
        return isinstance(DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_document(document: str, file: str, field: str | None) -> list[dict[str, Any]]:
    """The objects of a file that is no object a line."""
    rows: list[dict[str, Any]] = []
    is_escaped, at = "\\u" in document, 0
    try:
        while (at := SPACE.match(document, at).end()) < len(document):  # type: ignore[union-attr]
            value, at = DECODER.raw_decode(document, at)
            if field:
                if not isinstance(value, dict) or field not in value:
                    has = f"its keys are {', '.join(value)}" if isinstance(value, dict) else "it is no object"
                    raise DataError(f"{file}: nothing under {field!r} (data.field); {has}")
                value = value[field]
            rows += value if isinstance(value, list) else [value]
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        found = document[error.pos :].split("\n")[0][:60]
        raise DataError(f"{file}: broken JSON in {where}: {error.msg}: {shown(found)}") from error
    for number, row in enumerate(rows):
        try:
            _checked(row, is_escaped=is_escaped)
        except ValueError as error:
            raise DataError(f"{file}: entry {number}: {error}: {shown(row)}") from error
    return rows


def _feature(kinds: set[type]) -> Any:
    kinds = kinds - {type(None)}
    kind = next(iter(kinds), str) if len(kinds) < 2 else None
    return Value(SCALARS[kind]) if kind in SCALARS else Anything()


def _column(values: list[Any], feature: Any) -> pa.Array:
    """A column of a table; of a stream, whose types are not known, as it comes, of mixed values the texts."""
    if isinstance(feature, Anything):
        written = [None if value is None else json.dumps(value) for value in values]
        return pa.array(written, pa.string()).cast(pa.json_())
    try:
        return pa.array(values, feature and feature.pa_type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if feature is not None:
            raise
        return pa.array([value if isinstance(value, str) else None for value in values], pa.string())
