"""What is said and written of a value that is not finite: report.json, the batch, and what to do.

    runs/<run>/nan_report/  report.json
                            batch.safetensors: input_ids, attention_mask, labels [B, T] of the optimizer step

Where rows are classified, labels are [B] and counts are of rows; what a teacher with another tokenizer reads
is there too.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.losses.signals import IGNORED
from kdlib.runs.files import StudentFolder, write_json
from kdlib.training.nan_search import Batch, Origin

FOLDER = "nan_report"
PADDING = {"input_ids": 0, "attention_mask": 0, "teacher_input_ids": 0, "teacher_attention_mask": 0}
AROUND = 12  # tokens shown on either side
BEGINNING = 40  # tokens shown of a row that is classified
GREW = 5.0  # times the median of those before: a gradient norm that was running away
SEARCHED = 200_000  # rows of the data set, at most, among which the one at fault is looked up

Rows = Sequence[Mapping[str, Any]]
Report = Mapping[str, Any]


def report_of(
    origin: Origin,
    state: Report,
    micro_batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Rows | None,
) -> dict[str, Any]:
    """All that is known, as plain data; a row is counted over this rank's micro-batches, as saved."""
    batch, row = joined(micro_batches), origin.row
    if row is not None:
        row += sum(len(each["labels"]) for each in micro_batches[: origin.micro_batch])
    ids = [] if row is None else _unpadded(batch, row)
    shown = None if row is None else batch["input_ids"][row].tolist()
    found = {
        **_written(state),
        **asdict(origin),
        "row": row,
        "row_of_micro_batch": origin.row,
        "row_of_data": row_of_data(ids, rows) if ids else None,
        "text": text_around(tokenizer, shown, origin.position, len(ids)) if tokenizer and shown else None,
        "rows_without_kept_token": _silent_rows(batch["labels"]),
        "of": "tokens" if of_tokens(batch) else "rows",
        "term": next(iter(origin.terms), None),
        "parameter": next(iter(origin.tensors), None),
    }
    return {**found, "suggestions": list(suggestions(found))}


def write(folder: StudentFolder, report: Report, micro_batches: Sequence[Batch]) -> None:
    """report.json and batch.safetensors."""
    place = folder.path / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    save_file(joined(micro_batches), place / "batch.safetensors")
    write_json(place / "report.json", report)


def put_aside(folder: StudentFolder) -> None:
    """Keep an earlier try's report as nan_report_before/: a training that goes on is judged by its own."""
    if (folder.path / FOLDER).exists():
        shutil.rmtree(folder.path / f"{FOLDER}_before", ignore_errors=True)
        (folder.path / FOLDER).rename(folder.path / f"{FOLDER}_before")


def joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Micro-batches one below the other, padded on the right to one length; on the CPU."""
    found = {}
    for name, fill in {**PADDING, "labels": IGNORED}.items():
        if parts := [batch[name].cpu() for batch in batches if name in batch]:
            longest = max(part.shape[-1] for part in parts)
            missing = [(0, longest - part.shape[-1]) if part.ndim > 1 else (0, 0) for part in parts]
            padded = [F.pad(part, more, value=fill) for part, more in zip(parts, missing, strict=True)]
            found[name] = torch.cat(padded)
    return found


def of_tokens(batch: Batch) -> bool:
    """Whether tokens are predicted, and not rows classified."""
    return batch["labels"].ndim == 2


def _silent_rows(labels: Tensor) -> list[int]:
    """The rows that have no kept token, or no class."""
    masked = (labels[:, 1:] == IGNORED).all(-1) if labels.ndim == 2 else labels == IGNORED
    return masked.nonzero()[:, 0].tolist()


def nothing_kept(step: int, micro_batches: Sequence[Batch], rows: Rows | None) -> str:
    """The words for an optimizer step from which nothing can be learned."""
    batch = joined(micro_batches)
    numbers = [row_of_data(_unpadded(batch, row), rows) for row in range(len(batch["labels"]))]
    what, more = f"a class ({IGNORED} stands for none)", ""
    if of_tokens(batch):
        what = f"a token that counts: every label is masked ({IGNORED})"
        more = ", or lengthen data.max_length where it cuts off what is to be learned"
    rows_there = f"in rows {numbers} of the training data"
    return f"step {step}: no row has {what}, {rows_there}; leave such rows out{more}"


def message(report: Report, folder: StudentFolder) -> str:
    """The error's words: what was not finite, where, when; what to do."""
    where = "on held-out text " if report["stage"] == "evaluation" else ""
    of = f"of {report['tokens']} {report['of']}"
    terms = [f"{name} = {term['value']} at {term['tokens']} {of}" for name, term in report["terms"].items()]
    norm = report["grad_norm_before"]
    known = "unknown" if norm is None else norm if isinstance(norm, str) else f"{norm:.3g}"
    found = f"{', '.join(terms)}{': ' if terms else ''}{_blame(report)}{_where(report)}"
    lines = [
        f"step {report['step']}: {where}{found}",
        "training has stopped before this reached a checkpoint (the last one: "
        f"{report['last_checkpoint'] or 'none yet'}); "
        f"learning rate {report['learning_rate']:.1e}, gradient norm before {known}",
        *(f"{number}. {advice}" for number, advice in enumerate(report["suggestions"], 1)),
        f"batch and report: {folder.path / FOLDER}",
    ]
    return "\n  ".join(lines)


def suggestions(report: Report) -> Iterator[str]:
    """What to do, the likeliest first."""
    who, weights, half = report["who"], report["tensors"], "float16" in report["precision"].values()
    first, rate = report["parameter"], f"training.learning_rate (now {report['learning_rate']:.1e})"
    term, limit, dtype = report["term"], report["max_grad_norm"], report["precision"].get("teacher")
    if who == "teacher" and weights:
        yield f"the teacher's own weights are not finite ({first}): load a sound copy of teacher.model"
    elif half and who in ("teacher", "student", "loss") and not weights:
        passed = report["module"] or "a term"
        yield f"float16 ends at 65504, and {passed} passed it: set precision: bfloat16 (or float32)"
    elif who == "teacher":
        yield f"the teacher's weights are finite, its outputs in {dtype} are not: set precision: float32"
    if who == "student" and weights and not report["grad_norms_before"]:
        yield f"no step was made yet, so {first} came so: load or make a sound student"
    elif who == "student" and weights:
        yield f"an update made {first} not finite: go on from the last checkpoint with a lower {rate}"
    elif who == "student":
        yield (
            f"the student's weights are finite, but too large to compute with: lower {rate}, or warm up "
            "longer (training.warmup_steps)"
        )
    if who == "loss":
        yield (
            f"both models are finite at this {report['of'].removesuffix('s')}, so {term} itself is not: look "
            f"at its temperature and divergence, or leave it out (loss.weights.{term}: 0)"
        )
    if who == "gradient":
        off = "" if limit > 0 else f"; clipping is off: set training.max_grad_norm to 1 (now {limit:g})"
        yield f"the loss is finite and the gradient of {first} is not: lower {rate}{off}"
    norms = [norm for norm in report["grad_norms_before"] if not isinstance(norm, str)]
    if len(norms) > 2 and norms[-1] > GREW * sorted(norms[:-1])[len(norms) // 2 - 1]:
        yield (
            f"the gradient norm grew from {norms[0]:.3g} to {norms[-1]:.3g} in the {len(norms)} steps "
            f"before: lower {rate}, warm up longer, or clip harder (training.max_grad_norm, now {limit:g})"
        )
    if who == "nobody":
        yield (
            "asked once more, the same batch is finite: try loss.compile: false; where it comes back at "
            "other steps, suspect the memory or the device"
        )
    if masked := report["rows_without_kept_token"]:
        why = "every label is masked" if report["of"] == "tokens" else "there is no class"
        yield f"in rows {masked} of the batch {why}, so nothing is learned from them: leave them out"


def text_around(tokenizer: PreTrainedTokenizerBase, ids: list[int], position: int | None, end: int) -> str:
    """The tokens around a position, the one at it in ⟦ ⟧; without one the row's first, before `end`."""
    if position is None:
        return f"{tokenizer.decode(ids[: min(BEGINNING, end)])}{'…' * (end > BEGINNING)}"
    before, at, after = ids[max(position - AROUND, 0) : position], ids[position], ids[position + 1 : end]
    return "{}⟦{}⟧{}".format(*(tokenizer.decode(part) for part in (before, [at], after[:AROUND])))


def row_of_data(ids: Sequence[int], rows: Rows | None) -> int | None:
    """The first row with these tokens, of the first `SEARCHED`; None where there is none."""
    if rows is None or not hasattr(rows, "__getitem__"):
        return None
    numbers = range(min(len(rows), SEARCHED))
    return next((number for number in numbers if list(rows[number]["input_ids"]) == list(ids)), None)


def _unpadded(batch: Batch, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()


def _blame(report: Report) -> str:
    who, tensors = report["who"], report["tensors"]
    shown = list(tensors.items())[:3]
    broken = ", ".join(f"{name} ({at['values']} values, the first at {at['first']})" for name, at in shown)
    if who == "gradient" and not tensors[report["parameter"]]["values"]:
        largest = report["parameter"]
        return f"the gradient's norm is not finite; every value of it is, the largest in {largest}"
    if who == "gradient":
        return f"the loss is finite ({report['loss']:.3g}), but not the gradient of {broken}"
    if who == "loss":
        return "teacher and student are finite, the term is not"
    if who == "nobody":
        return "the loss or its gradient was not finite; asked once more, it is"
    module = f": {report['module']} is the first module whose output is not" if report["module"] else ""
    weights = f"; weights not finite: {broken}" if broken else "; its weights are"
    return f"the {who} is not finite{module}{weights}"


def _where(report: Report) -> str:
    if report["row"] is None:
        return ""
    data = "" if report["row_of_data"] is None else f" (row {report['row_of_data']} of the data)"
    position = "" if report["position"] is None else f", position {report['position']}"
    return f"; first at row {report['row']}{data}{position}: {report['text']!r}"


def _written(value: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(value, Mapping):
        return {name: _written(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_written(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
