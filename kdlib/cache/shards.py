"""Rows of signals in a folder: Arrow files of some hundred MB, found by key, that several processes read.

A shard is there when the note beside it is, which is written last: a kill loses the shard that is being
written.  Its name is a digest of its keys: the same rows make the same files, in whatever order they came.
Arrow's files are mapped into memory, and only what is asked for is read.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdlib.cache.rows import KEY, Arrays, checksum, packed, unpacked
from kdlib.cache.stock import ABOUT, HEAD
from kdlib.errors import RunError
from kdlib.runs.checkpoints import digest
from kdlib.runs.files import read_json, synced, write_json, writing

FIXED = [("key", pa.binary(KEY)), ("tokens", pa.uint32()), ("checksum", pa.uint32())]
AGAIN = "delete it and its .json, then `kd cache` makes these rows again"


class Shards:
    """The rows of one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._open = folder, dict[int, pa.Table]()

    @property
    def about(self) -> dict[str, Any]:
        """What its rows were made of, and how they are stored; {} where there is no cache yet."""
        return read_json(self.folder / ABOUT, {})

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        """Of each shard: file, rows, tokens, bytes, digest; in the order of their names."""
        found = [read_json(path) for path in sorted(self.folder.glob("shard_*.json"))]
        for note in found:
            path = self.folder / note["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != note["bytes"]:
                raise RunError(f"{path}: found {size:,} bytes, needs {note['bytes']:,}; {AGAIN}")
        return found

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted first halves of all keys, and where each row is: [N, 2] shard and place in it."""
        halves, places = [np.zeros(0, "<u8")], [np.zeros((0, 2), np.int64)]
        for number in range(len(self.notes)):
            keys = np.frombuffer(b"".join(self._table(number)["key"].to_pylist()), "<u8")[::2]
            halves.append(keys)
            places.append(np.column_stack([np.full(len(keys), number), np.arange(len(keys))]))
        whole = np.concatenate(halves)
        order = whole.argsort(kind="stable")
        return whole[order], np.concatenate(places)[order]

    def __len__(self) -> int:
        return sum(note["rows"] for note in self.notes)

    @property
    def tokens(self) -> int:
        return sum(note["tokens"] for note in self.notes)

    @property
    def bytes(self) -> int:
        """On the disk, with the teacher's head."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def __str__(self) -> str:
        """`…/tiny_top_k_1f2e: top_k, 120 rows, 1,800 tokens, 0.2 MB, 98.1 bytes a token`, and its head."""
        kept = sum(note["bytes"] for note in self.notes)
        head = (self.folder / HEAD).stat().st_size if (self.folder / HEAD).exists() else 0
        each = f"{kept / max(self.tokens, 1):.1f} bytes a token"
        beside = f", and the teacher's head, {head / 1e6:,.1f} MB" if head else ""
        rows = f"{len(self):,} rows, {self.tokens:,} tokens, {kept / 1e6:,.1f} MB, {each}{beside}"
        return f"{os.path.relpath(self.folder)}: {self.about.get('form', 'nothing')}, {rows}"

    def has(self, key: bytes) -> bool:
        return self._place(key) is not None

    def read(self, key: bytes) -> Arrays | None:
        """What is kept of a row; None where it is not there.

        Raises:
            RunError: its bytes are not those that were written.
        """
        if (place := self._place(key)) is None:
            return None
        number, row = place
        table, stored = self._table(number), self._stored
        blobs = [table[name].chunk(0)[row].as_buffer() for name in stored]
        if checksum(key, blobs) != table["checksum"].chunk(0)[row].as_py():
            raise RunError(f"{self.folder / self.notes[number]['file']}: row {row} is damaged; {AGAIN}")
        tokens = table["tokens"].chunk(0)[row].as_py()
        each = zip(stored.items(), blobs, strict=True)
        return {name: unpacked(blob, dtype, (tokens, *shape)) for (name, (dtype, shape)), blob in each}

    def nothing(self) -> Arrays:
        """What is kept of no token."""
        return {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in self._stored.items()}

    def check(self) -> bool:
        """True, after every byte was read; a RunError names the shards that are not as they were written."""
        wrong = [n["file"] for n in self.notes if digest(self.folder / n["file"]) != n["digest"]]
        if wrong:
            raise RunError(f"{self.folder}: damaged are {', '.join(wrong)}; of each: {AGAIN}")
        return True

    def add(self, rows: Sequence[tuple[bytes, Arrays]]) -> None:
        """Write a shard of these rows.

        Raises:
            RunError: the disk refuses; what is there stays.
        """
        name = f"shard_{blake2b(b''.join(key for key, _ in rows), digest_size=8).hexdigest()}"
        path, half_made = self.folder / f"{name}.arrow", self.folder / f"{name}.tmp"
        names = list(self._stored)
        blobs = [[packed(arrays[each]) for each in names] for _, arrays in rows]
        tokens = [len(arrays[names[0]]) for _, arrays in rows]
        sums = [checksum(key, each) for (key, _), each in zip(rows, blobs, strict=True)]
        columns = [[key for key, _ in rows], tokens, sums, *map(list, zip(*blobs, strict=True))]
        schema = pa.schema([*FIXED, *((each, pa.large_binary()) for each in names)])
        with writing(path):
            try:
                with pa.OSFile(str(half_made), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                synced(half_made)
                half_made.replace(path)
                synced(self.folder, within=False)
            except OSError:
                half_made.unlink(missing_ok=True)
                raise
        size = path.stat().st_size
        note = {"file": path.name, "rows": len(rows), "tokens": sum(tokens), "bytes": size}
        write_json(self.folder / f"{name}.json", {**note, "digest": digest(path)})

    def look_again(self) -> None:
        """Take in what was written since."""
        self._open.clear()
        for name in ("notes", "_index"):
            self.__dict__.pop(name, None)

    @cached_property
    def _stored(self) -> dict[str, tuple[str, list[int]]]:
        """{name: dtype, shape of a token's}."""
        return {name: (dtype, shape) for name, (dtype, shape) in self.about["arrays"].items()}

    def _table(self, number: int) -> pa.Table:
        if number not in self._open:
            path = self.folder / self.notes[number]["file"]
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowException) as error:
                raise RunError(f"{path}: found no Arrow file ({error}); {AGAIN}") from error
            self._open[number] = table
        return self._open[number]

    def _place(self, key: bytes) -> tuple[int, int] | None:
        halves, places = self._index
        half = np.frombuffer(key, "<u8")[0]
        at = int(halves.searchsorted(half))
        while at < len(halves) and halves[at] == half:
            number, row = map(int, places[at])
            if self._table(number)["key"].chunk(0)[row].as_py() == key:
                return number, row
            at += 1
        return None


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`name: found …, needs …` of what is not the same."""
    names = dict.fromkeys([*found, *wanted])
    return [
        f"{name}: found {found.get(name)}, needs {wanted.get(name)}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
