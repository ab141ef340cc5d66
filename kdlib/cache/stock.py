"""All caches of a folder: what they hold, which are used at this moment, and their end.

Who makes or reads a cache shares the lock of a file beside it, which tells by its date when that last was;
the operating system frees the lock of a process that died.  Who deletes one needs the lock alone.
"""

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.errors import RunError
from kdlib.hardware import GIB
from kdlib.runs.files import read_json

FOLDER = ".signals"  # of all caches, beside the runs
ABOUT, HEAD = "cache.json", "head.safetensors"
OURS = ("shard_*", HEAD, f"{HEAD}.tmp", ABOUT)  # that lie in a cache; the last is what makes it one


def keep(shards: Any) -> None:
    """Keep a cache from being deleted, as long as its kdlib.cache.shards.Shards live."""
    with suppress(OSError):  # of a folder that can only be read: nobody deletes it
        file = _beside(shards.folder).open("a")
        weakref.finalize(shards, file.close)
        fcntl.flock(file, fcntl.LOCK_SH)
        _beside(shards.folder).touch()


@dataclass(frozen=True)
class Listed:
    """A cache, as it is listed."""

    folder: Path

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    @property
    def is_used(self) -> bool:
        with self._alone() as is_alone:
            return not is_alone

    def facts(self) -> dict[str, Any]:
        """A line of the list."""
        rows, form, when = "damaged", "", _beside(self.folder)
        with suppress(RunError):
            form = read_json(self.folder / ABOUT, {}).get("form", "")
            rows = f"{sum(read_json(path, {}).get('rows', 0) for path in self.folder.glob('shard_*.json')):,}"
        last = (when if when.exists() else self.folder / ABOUT).stat().st_mtime
        return {
            "cache": self.folder.name,
            "form": form,
            "rows": rows,
            "MB": f"{self.bytes / 1e6:,.1f}",
            "last used": time.strftime("%Y-%m-%d %H:%M", time.localtime(last)),
            "": "in use" if self.is_used else "",
        }

    def delete(self) -> bool:
        """Delete it, where nobody uses it; files that are not ours stay."""
        with self._alone() as is_alone:
            for path in self._files() if is_alone else ():
                path.unlink()
            with suppress(OSError):  # something else lies there
                self.folder.rmdir()
            return is_alone

    def _files(self) -> list[Path]:
        return [path for pattern in OURS for path in sorted(self.folder.glob(pattern))]

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else uses it, and until the end nobody does."""
        with _beside(self.folder).open("a") as file:
            is_alone = False
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
            yield is_alone


def cleaned(root: Path, *, delete: bool = False) -> str:
    """The caches in a folder as a table; and what came of it where those that nobody uses are deleted."""
    caches = [Listed(path.parent) for path in sorted(root.glob(f"*/{ABOUT}"))]
    if not caches:
        return f"{os.path.relpath(root)}: no caches"
    table = pd.DataFrame([each.facts() for each in caches]).to_string(index=False)
    if not delete:
        return f"{table}\n--yes deletes those that are not in use"
    sizes = [each.bytes for each in caches]
    freed = [size for each, size in zip(caches, sizes, strict=True) if each.delete()]
    return f"{table}\n{len(freed)} of {len(caches)} deleted: {sum(freed) / GIB:.2f} GiB freed"


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.used")
