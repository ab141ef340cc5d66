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
from kdlib.runs.files import StudentFolder, read_json, synced, writing

PAUSE, PAUSE_S = 10.0, 60.0  # more usual times than that, and more seconds, from line to line: it stood still
BLOCK = 4 << 20  # bytes that are parsed at a time
STEP = re.compile(rb'"train/step"\s*:\s*(\d+)')
NO_STEP = "found a line without train/step, which each must have; delete it"
PLACES = {"train/step": -2, "train/epoch": -1, "time": 1}  # of the columns; the others as logged
LINES_KEPT = 2_000_000  # of the logs that a process keeps in memory, about
NULL = re.compile(rb"null\s*(?:[\[{]|$)", re.MULTILINE)  # a line of its own: pyarrow's reader dies of it
ALONE = pyarrow.json.ReadOptions(use_threads=False)  # others compute here
KEPT: dict[Path, "Tail"] = {}
KEEPING = threading.Lock()


def read_metrics(folder: StudentFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    return [json.loads(line) for line in _lines(folder)]


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
    raise RunError(f"{path}: {NO_STEP}")


def append_metrics(folder: StudentFolder, line: Mapping[str, Any]) -> None:
    """Add one line at once, so that a kill loses nothing already logged."""
    with writing(folder.metrics), folder.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(folder: StudentFolder) -> list[dict[str, float]]:
    """One line per epoch begun: the mean of its training figures, and its last evaluation."""
    epochs: dict[int, dict[str, tuple[float, int, float]]] = {}  # figure → sum, count, last
    for line in map(json.loads, _lines(folder)):
        figures = epochs.setdefault(math.ceil(line["train/epoch"]), {})
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
    """

    def __init__(self, folder: StudentFolder) -> None:
        self.folder = folder
        self._begin()
        self.read()

    def read(self) -> bool:
        """Take in what the file holds now; True where that is new.  A torn last line waits for its rest.

        Raises:
            RunError: a line is no JSON, or has figures and no step.
        """
        path = self.folder.metrics
        found = path.stat() if path.exists() else None
        state = found and (found.st_ino, found.st_size, found.st_mtime_ns)
        if state == self._state:
            return False
        is_anew, end = self._state is not None and not self._goes_on(state), self._end
        if is_anew:
            self._begin()
        if state is not None:
            try:
                self._read_on()
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                what = f"found a line that is no JSON ({error}); each must be an object; delete it"
                raise RunError(f"{path}: {what}") from error
        self._state = state
        return is_anew or self._end > end

    def _begin(self) -> None:
        self.train, self.evaluation, self.broken = pd.DataFrame(), pd.DataFrame(), _broken([], "")
        self._state: tuple[int, int, int] | None = None  # of the file when it was read
        self._end, self._last = 0, b""  # of what was read: its length and its last line
        self.figures, self._counts = 0, Counter[str]()
        self._real: dict[str, pa.DataType] = {}  # figures, as against counts and words

    def _goes_on(self, state: tuple[int, int, int] | None) -> bool:
        """Whether what was read still stands there, so far as its last line tells."""
        if state is None or self._state is None or state[0] != self._state[0]:
            return False
        with self.folder.metrics.open("rb") as file:
            file.seek(self._end - len(self._last))
            return file.read(len(self._last)) == self._last

    def _read_on(self) -> None:
        """Parse what was added; takes in all of it, or where a line is faulty, nothing."""
        end, last, counts, real = self._end, self._last, self._counts.copy(), dict(self._real)
        parts, broken = {"train/": [], "eval/": []}, [self.broken]
        for block in _blocks(self.folder.metrics, end):
            end, last = end + len(block), block[block.rfind(b"\n", 0, -1) + 1 :]
            table = _parsed(NULL.sub(b"[]", block), real)  # which is refused
            for name in table.column_names:
                counts[name] += len(table) - table[name].null_count
                if pa.types.is_floating(table[name].type):
                    real[name] = table[name].type
                    if "train/step" not in table.column_names:
                        raise RunError(f"{self.folder.metrics}: {NO_STEP}")
                    if len(steps := table["train/step"].filter(pc.invert(pc.is_finite(table[name])))):
                        broken.append(_broken(steps.to_numpy(), name))
            for prefix, own in parts.items():
                own += _of(table, prefix)
        before = {"train/": self.train, "eval/": self.evaluation}
        self.train, self.evaluation = [_joined(before[prefix], parts[prefix], prefix) for prefix in parts]
        self.broken = pd.concat(broken, ignore_index=True) if len(broken) > 1 else self.broken
        self.figures = sum(counts[name] for name in real)
        self._end, self._last, self._counts, self._real = end, last, counts, real


def _blocks(path: Path, start: int) -> Iterator[bytes]:
    """Whole lines from here on, some MiB at a time."""
    with path.open("rb") as file:
        file.seek(start)
        rest = b""
        while block := file.read(BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield whole + newline


def _parsed(block: bytes, real: Mapping[str, pa.DataType]) -> pa.Table:
    if block.isspace():
        return pa.table({})
    form = pyarrow.json.ParseOptions(explicit_schema=pa.schema([("time", pa.string()), *real.items()]))
    return pyarrow.json.read_json(pa.BufferReader(block), read_options=ALONE, parse_options=form)


def _broken(steps: Sequence[int] | np.ndarray, name: str) -> pd.DataFrame:
    what = {"name": name.partition("/")[2], "evaluation": name.startswith("eval/")}
    return pd.DataFrame({"step": steps, **what}, columns=["step", "name", "evaluation"])


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
        while len(KEPT) > 1 and sum(len(each.train) for each in KEPT.values()) > LINES_KEPT:
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
    return pd.DataFrame(read_json(folder.plan, []))


def terms_in(table: pd.DataFrame) -> list[str]:
    """The loss terms that a training or evaluation table, or a plan, has."""
    return [name.removesuffix("_weight") for name in table.columns if name.endswith("_weight")]


def seconds_taken(train: pd.DataFrame, evaluation: pd.DataFrame | None = None) -> float | None:
    """How long a training took from the first to the last of its lines; None where they do not tell.

    A pause between two sittings does not count: where a line comes far later after the one before it than
    lines of its kind usually do, the usual time stands in.
    """
    if "time" not in train or len(train) < 2:
        return None
    timed = [train] if evaluation is None or "time" not in evaluation else [train, evaluation]
    kinds = [_seconds(table["time"]) for table in timed]
    times = np.concatenate(kinds)
    is_own = np.repeat([True, False], [len(kinds[0]), len(times) - len(kinds[0])])
    is_within = (times >= kinds[0].min()) & (times <= kinds[0].max())
    order = np.argsort(times[is_within], kind="stable")
    took, is_own = np.diff(times[is_within][order]), is_own[is_within][order][1:]
    for kind in (is_own, ~is_own):
        if kind.any():
            usual = np.quantile(took[kind], 0.5, method="lower")
            took[kind & (took > max(PAUSE * usual, PAUSE_S))] = usual
    return float(took.sum())


def _seconds(times: pd.Series) -> np.ndarray:
    text = pa.array(times, pa.string()).drop_null()
    return text.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() / 1e6


def time_left(took: float, done: float, ahead: float) -> float | None:
    """Seconds for what is ahead at the pace of what is done; None before anything is."""
    return took / done * ahead if done else None


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
