"""What a training logged: metrics.jsonl, written a line at a time and read on as it grows.

Each line is {"train/step": …, "train/epoch": …, "time": …} with `train/…` or `eval/…` figures.
"""

import io
import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from kdlib.errors import RunError
from kdlib.runs.files import StudentFolder, read_json, write_text, writing

POINTS = 1000  # that a curve is drawn from
PAUSE, PAUSE_S = 10.0, 60.0  # more usual times than that, and more seconds, from line to line: it stood still
FORM = {
    "parse_options": pyarrow.json.ParseOptions(explicit_schema=pa.schema([("time", pa.string())])),
    "read_options": pyarrow.json.ReadOptions(use_threads=False),  # others compute here
}


def read_metrics(folder: StudentFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    if not folder.metrics.exists():
        return []
    text = folder.metrics.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def cut_metrics(folder: StudentFolder, step: int) -> None:
    """Drop what was logged after this step: training goes on from there and will log it again."""
    if folder.metrics.exists():
        lines = [line for line in read_metrics(folder) if line["train/step"] <= step]
        write_text(folder.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def append_metrics(folder: StudentFolder, line: Mapping[str, Any]) -> None:
    """Add one line at once, so that a kill loses nothing already logged."""
    with writing(folder.metrics), folder.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def history(folder: StudentFolder) -> list[dict[str, float]]:
    """One line per epoch begun: the mean of its training figures, and its last evaluation."""
    epochs: dict[int, dict[str, list[float]]] = {}
    for line in read_metrics(folder):
        figures = epochs.setdefault(math.ceil(line["train/epoch"]), {})
        for name, value in line.items():
            if isinstance(value, (int, float)):
                figures.setdefault(name, []).append(value)
    last = ("train/step", "train/epoch")
    return [
        {
            name: sum(v) / len(v) if name.startswith("train/") and name not in last else v[-1]
            for name, v in figures.items()
        }
        for figures in epochs.values()
    ]


class Tail:
    """metrics.jsonl as tables, read again as it grows.

    Attributes:
        train: one row per log, without the train/ prefix; empty at first.
        evaluation: one row per evaluation, with step and epoch, without the eval/ prefix.
        broken: step and name of each figure that is nan or infinite, and whether of an evaluation.
        figures: how many figures were logged.
    """

    def __init__(self, folder: StudentFolder) -> None:
        self.folder, self._lines = folder, b""
        self._take(pa.table({}))
        self.read()

    def read(self) -> bool:
        """Take in what the file holds now; True where that is new.  A torn last line waits for its rest.

        Raises:
            RunError: a line is no JSON.
        """
        text = self.folder.metrics.read_bytes() if self.folder.metrics.exists() else b""
        lines = text[: text.rfind(b"\n") + 1]
        if lines == self._lines:
            return False
        try:
            self._take(pyarrow.json.read_json(io.BytesIO(lines), **FORM) if lines else pa.table({}))
        except pa.ArrowInvalid as error:
            what = f"found a line that is no JSON ({error}); each must be an object; delete it"
            raise RunError(f"{self.folder.metrics}: {what}") from error
        self._lines = lines
        return True

    def _take(self, lines: pa.Table) -> None:
        self.train, self.evaluation = _of(lines, "train/"), _of(lines, "eval/")
        self.figures, broken = 0, []
        for name in lines.column_names:
            if pa.types.is_floating(lines[name].type):
                self.figures += len(lines) - lines[name].null_count
                steps = lines["train/step"].filter(pc.invert(pc.is_finite(lines[name]))).to_pylist()
                broken += [(step, name.split("/")[1], name.startswith("eval/")) for step in steps]
        self.broken = pd.DataFrame(broken, columns=["step", "name", "evaluation"])


def _of(lines: pa.Table, prefix: str) -> pd.DataFrame:
    if f"{prefix}loss" not in lines.column_names:
        return pd.DataFrame()
    own = lines.filter(lines[f"{prefix}loss"].is_valid())
    # as logged, time last
    names = sorted((name for name in own.column_names if own[name].null_count < len(own)), key="time".__eq__)
    table = own.select(names).to_pandas()
    return table.rename(columns=lambda name: name.removeprefix(prefix).removeprefix("train/"))


def training_table(folder: StudentFolder) -> pd.DataFrame:
    """`Tail.train`, once."""
    return Tail(folder).train


def eval_table(folder: StudentFolder) -> pd.DataFrame:
    """`Tail.evaluation`, once."""
    return Tail(folder).evaluation


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
    lines = pd.concat(
        pd.DataFrame({"time": pd.to_datetime(table["time"], utc=True, format="ISO8601"), "kind": kind})
        for kind, table in enumerate((train, evaluation))
        if table is not None and "time" in table
    )
    own = lines["time"][lines["kind"] == 0]
    lines = lines[lines["time"].between(own.min(), own.max())].sort_values("time", kind="stable")
    took = lines["time"].diff().dt.total_seconds().iloc[1:]
    usual = took.groupby(lines["kind"].iloc[1:]).transform("quantile", 0.5, interpolation="lower")
    return float(took.where(took <= (PAUSE * usual).clip(lower=PAUSE_S), usual).sum())


def time_left(took: float, done: float, ahead: float) -> float | None:
    """Seconds for what is ahead at the pace of what is done; None before anything is."""
    return took / done * ahead if done else None


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def thinned(curves: np.ndarray, *, points: int = POINTS) -> np.ndarray:
    """Which positions of a long curve to draw so that no spike is lost: the ends, and each bucket's extremes.

    Args:
        curves: [N], or [C, N] drawn at the same positions.
        points: about so many are kept, or 100 for each curve if that is more.

    Returns:
        Rising positions, with those where nan or infinite values begin or end, unless these are too many.
    """
    curves = np.atleast_2d(curves)
    count, length = curves.shape
    if length <= points:
        return np.arange(length)
    is_finite = np.isfinite(curves)
    gaps = np.flatnonzero(np.diff(is_finite).any(axis=0)) + 1
    kept = {0, length - 1, *(gaps if len(gaps) <= points else ())}
    edges = np.linspace(0, length, max(points // (2 * count), 50) + 1).astype(int)
    lows, highs = np.where(is_finite, curves, np.inf), np.where(is_finite, curves, -np.inf)
    for start, end in pairwise(edges):
        kept |= {*(start + lows[:, start:end].argmin(axis=1)), *(start + highs[:, start:end].argmax(axis=1))}
    return np.array(sorted(kept))
