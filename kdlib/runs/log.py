"""What a training logged: metrics.jsonl, written a line at a time and read on as it grows.

Each line is {"train/step": …, "train/epoch": …, "time": …} with `train/…` or `eval/…` figures.
"""

import copy
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from kdlib.errors import RunError
from kdlib.runs.files import WHOLE, StudentFolder, read_json, synced, writing

BLOCK = 4 << 20  # bytes that are parsed at a time
STEP = re.compile(rb'"train/step"\s*:\s*(\d+)')
PLACES = {"train/step": -2, "train/epoch": -1, "time": 1}  # of the columns; the others as logged
BYTES_KEPT = 600 << 20  # of the logs that a process keeps as tables
NULL = re.compile(rb"null\s*(?:[\[{]|$)", re.MULTILINE)  # a line of its own: pyarrow's reader dies of it
ALONE = pyarrow.json.ReadOptions(use_threads=False)  # others compute here
KEPT: dict[Path, "Tail"] = {}
KEEPING = threading.Lock()


def cut_metrics(folder: StudentFolder, step: int) -> None:
    """Drop what was logged after this step: training goes on from there and will log it again.

    Raises:
        RunError: a line names no step, or the disk refuses.
    """
    path = folder.metrics
    if not path.exists() or _ends_by(path, step):
        return
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        with neighbour.open("wb") as file:
            file.writelines(line for line in _lines(folder) if _step(line, path) <= step)
        synced(neighbour)
        neighbour.replace(path)
        synced(path.parent, within=False)


def _lines(folder: StudentFolder) -> Iterator[bytes]:
    """Whole lines only, one at a time."""
    if folder.metrics.exists():
        with folder.metrics.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n") and not line.isspace())


def _ends_by(path: Path, step: int) -> bool:
    """Whether the last line is whole and of this step or before: steps rise, so nothing is to be cut."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - (1 << 16), 0))
        *_, last = file.read().splitlines(keepends=True) or [b""]
    return bool(last.endswith(b"\n") and (found := STEP.search(last)) and int(found[1]) <= step)


def _step(line: bytes, path: Path) -> int:
    if found := STEP.search(line):
        return int(found[1])
    raise _refused(path, "train/step is missing")


def append_metrics(folder: StudentFolder, line: Mapping[str, Any]) -> None:
    """Add one line at once, so that a kill loses nothing already logged."""
    with writing(folder.metrics), folder.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(folder: StudentFolder) -> list[dict[str, float]]:
    """One line per epoch begun: the mean of its training figures, and its last evaluation.

    Raises:
        RunError: a line is no JSON, or names no epoch.
    """
    epochs: dict[int, dict[str, tuple[float, int, float]]] = {}  # figure → sum, count, last
    for text in _lines(folder):
        try:
            line = json.loads(text)
            figures = epochs.setdefault(math.ceil(line["train/epoch"]), {})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _refused(folder.metrics, error) from error
        for name, value in line.items():
            if isinstance(value, (int, float)):
                total, count, _ = figures.get(name, (0, 0, 0))
                figures[name] = (total + value, count + 1, value)
    ends = ("train/step", "train/epoch")
    return [
        {
            name: total / count if name.startswith("train/") and name not in ends else last
            for name, (total, count, last) in figures.items()
        }
        for figures in epochs.values()
    ]


class Tail:
    """metrics.jsonl as tables, parsed block by block, and read on from where it ended as it grows.

    Attributes:
        train: one row per log, without the train/ prefix; empty at first.
        evaluation: one row per evaluation, with step and epoch, without the eval/ prefix.
        broken: step and name of each figure that is nan or infinite, and whether of an evaluation.
        figures: how many figures were logged.
        length: bytes of the file that were read.
    """

    def __init__(self, folder: StudentFolder) -> None:
        self.folder = folder
        self._begin()
        self.read()

    def read(self) -> bool:
        """Take in what the file holds now; True where that is new.  A torn last line waits for its rest.

        Raises:
            RunError: a line is no JSON, or no line of a training.
        """
        path = self.folder.metrics
        found = path.stat() if path.exists() else None
        state = found and (found.st_ino, found.st_size, found.st_mtime_ns)
        if state == self._state:
            return False
        is_anew, end = self._state is not None and not self._goes_on(state), self.length
        if is_anew:
            self._begin()
        if state is not None:
            try:
                self._read_on()
            except (ValueError, pa.ArrowTypeError) as error:
                raise _refused(path, error) from error
        self._state = state
        return is_anew or self.length > end

    def _begin(self) -> None:
        self.train, self.evaluation, self.broken = NOTHING, NOTHING, NONE_BROKEN
        self._state: tuple[int, int, int] | None = None  # of the file when it was read
        self.length, self._last = 0, b""  # what was read, and its last line
        self.figures, self._counts = 0, Counter[str]()
        self._real: dict[str, pa.DataType] = {}  # figures, as against counts and words

    def _goes_on(self, state: tuple[int, int, int] | None) -> bool:
        """Whether what was read still stands there, so far as its last line tells."""
        if state is None or self._state is None or state[0] != self._state[0]:
            return False
        with self.folder.metrics.open("rb") as file:
            file.seek(self.length - len(self._last))
            return file.read(len(self._last)) == self._last

    def _read_on(self) -> None:
        """Parse what was added; takes in all of it, or where a line is faulty, nothing."""
        end, last, counts, real = self.length, self._last, self._counts.copy(), dict(self._real)
        parts, broken = {"train/": [], "eval/": []}, [self.broken]
        for block in _blocks(self.folder.metrics, end):
            end, last = end + len(block), block[block.rfind(b"\n", 0, -1) + 1 :]
            table = _parsed(NULL.sub(b"[]", block) if b"null" in block else block, real)  # [] is refused
            for name in table.column_names:
                counts[name] += len(table) - table[name].null_count
                if pa.types.is_floating(table[name].type):
                    real[name] = table[name].type
                    if len(steps := table["train/step"].filter(pc.invert(pc.is_finite(table[name])))):
                        broken.append(_broken(steps.to_numpy(), name))
            for prefix, own in parts.items():
                own += _of(table, prefix)
        before = {"train/": self.train, "eval/": self.evaluation}
        self.train, self.evaluation = [_joined(before[prefix], parts[prefix], prefix) for prefix in parts]
        self.broken = pd.concat(broken, ignore_index=True) if len(broken) > 1 else self.broken
        self.figures = sum(counts[name] for name in real)
        self.length, self._last, self._counts, self._real = end, last, counts, real


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    """Whole lines from here on, some MiB at a time."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            block += file.readline()
            if whole := block if block.endswith(b"\n") else block[: block.rfind(b"\n") + 1]:
                yield whole


def _parsed(block: bytes, real: Mapping[str, pa.DataType]) -> pa.Table:
    if block.isspace():
        return pa.table({})
    form = pyarrow.json.ParseOptions(explicit_schema=pa.schema([("time", pa.string()), *real.items()]))
    table = pyarrow.json.read_json(pa.BufferReader(block), read_options=ALONE, parse_options=form)
    _check_figures(table)
    return table


def _check_figures(lines: pa.Table) -> None:
    """Raises ValueError where a step or an epoch is missing, or a figure is no number."""
    for name in lines.column_names:
        kind = lines[name].type
        is_number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
        if name.startswith(("train/", "eval/")) and not is_number:
            raise ValueError(f"{name} is of type {str(kind)[:30]}")
    for name in ("train/step", "train/epoch"):
        if name not in lines.column_names or lines[name].null_count:
            raise ValueError(f"{name} is missing")
    if not pa.types.is_integer(lines["train/step"].type):
        raise ValueError("train/step is no whole number")


def _refused(path: Path, why: object) -> RunError:
    need = "each is an object with train/step, train/epoch and figures that are numbers"
    return RunError(f"{path}: found a line that is no JSON of a training ({why}); {need}; delete it")


def _broken(steps: Sequence[int] | np.ndarray, name: str) -> pd.DataFrame:
    what = {"name": name.partition("/")[2], "evaluation": name.startswith("eval/")}
    return pd.DataFrame({"step": steps, **what}, columns=["step", "name", "evaluation"])


NOTHING, NONE_BROKEN = pd.DataFrame(), _broken([], "")


def _of(lines: pa.Table, prefix: str) -> list[pa.Table]:
    """The lines of one kind, where there are any, with the columns that they fill."""
    if f"{prefix}loss" not in lines.column_names:
        return []
    own = lines.filter(lines[f"{prefix}loss"].is_valid()).combine_chunks()
    names = [name for name in own.column_names if own[name].null_count < len(own)]
    return [own.select(names)] if names else []


def _joined(before: pd.DataFrame, parts: list[pa.Table], prefix: str) -> pd.DataFrame:
    """One table, as logged, time last; `parts` is emptied on the way, to spare memory."""
    if not parts:
        return before
    table = pa.concat_tables(parts, promote_options="permissive")
    parts.clear()
    names = sorted(table.column_names, key=lambda name: PLACES.get(name, 0))
    table = table.select(names).rename_columns([n.removeprefix(prefix).removeprefix("train/") for n in names])
    added = table.to_pandas(split_blocks=True, self_destruct=True)
    pa.default_memory_pool().release_unused()
    if not len(before):
        return added
    names = sorted([*dict.fromkeys([*before, *added])], key="time".__eq__)
    return pd.concat([before, added], ignore_index=True)[names]


def tail_of(folder: StudentFolder) -> Tail:
    """The folder's log as it stands now, parsed once in a process and then read on; raises as `Tail.read`."""
    with KEEPING:
        tail = KEPT.pop(path := folder.path.absolute(), None) or Tail(folder)
        tail.read()
        KEPT[path] = tail  # the last one used comes last
        while len(KEPT) > 1 and sum(each.length for each in KEPT.values()) > BYTES_KEPT:
            del KEPT[next(iter(KEPT))]
        return copy.copy(tail)  # that others read on


def training_table(folder: StudentFolder) -> pd.DataFrame:
    """`Tail.train`, as it stands now."""
    return tail_of(folder).train


def eval_table(folder: StudentFolder) -> pd.DataFrame:
    """`Tail.evaluation`, as it stands now."""
    return tail_of(folder).evaluation


def plan_table(folder: StudentFolder) -> pd.DataFrame:
    """plan.json: learning rate, weights and temperatures of the whole training, as in `training_table`."""
    lines = read_json(folder.plan, [])
    if not all(isinstance(line, dict) and "step" in line for line in lines):
        raise RunError(f"{folder.plan}: found a line without a step; {WHOLE}")
    return pd.DataFrame(lines)


def terms_in(table: pd.DataFrame) -> list[str]:
    """The loss terms that a training or evaluation table, or a plan, has."""
    terms = [name.removesuffix("_weight") for name in table.columns if name.endswith("_weight")]
    return [term for term in terms if "loss" not in table or f"{term}_loss" in table]


def time_left(took: float, done: float, ahead: float) -> float | None:
    """Seconds for what is ahead at the pace of what is done; None before anything is."""
    return took / done * ahead if done else None


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
