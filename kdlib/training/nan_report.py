"""What is said and written of a value that is not finite: report.json, the batch, and what to do, from what
was seen.

    runs/<run>/nan_report/  report.json   batch.safetensors: input_ids, attention_mask, labels [B, T] of the
    optimizer step

Where rows are classified, labels are [B] and counts are of rows; what a teacher with another tokenizer reads
is there too.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.losses.signals import IGNORED
from kdlib.runs.files import StudentFolder, write_json
from kdlib.training.culprits import Culprit

FOLDER = "nan_report"
# what pads them
NAMES = {
    "input_ids": 0,
    "attention_mask": 0,
    "teacher_input_ids": 0,
    "teacher_attention_mask": 0,
    "labels": IGNORED,
}
AROUND = 12  # tokens shown on either side
BEGINNING = 40  # tokens shown of a row that is classified
GREW = 5.0  # times the median of those before: a gradient norm that was running away
SEARCHED = 200_000  # rows of the data set, at most, among which the culprit's is looked up


@dataclass(frozen=True)
class Standing:
    """Where training stood."""

    stage: str  # training, evaluation
    step: int
    precision: Mapping[str, str]  # dtype of student and teacher, and autocast's
    loss: float | None  # of the step, this rank's part of it; None outside a step
    learning_rate: float
    max_grad_norm: float
    grad_norms: Sequence[float]  # of the optimizer steps before, the last one last
    last_log: Mapping[str, Any]
    checkpoint: str | None


def report_of(
    culprit: Culprit,
    standing: Standing,
    micro_batches: Sequence[Mapping[str, Tensor]],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """All that is known, as plain data.  A row is counted over this rank's micro-batches of the optimizer
    step, as they are saved.

    Args:
        rows: the data set, in which the row is looked up.
    """
    batch, row = joined(micro_batches), culprit.row
    if row is not None:
        row += sum(len(each["labels"]) for each in micro_batches[: culprit.micro_batch])
    found = {
        "stage": standing.stage,
        "step": standing.step,
        "who": culprit.who,
        "term": next(iter(culprit.terms), None),
        "terms": {
            name: {"value": str(value), "tokens": count} for name, (value, count) in culprit.terms.items()
        },
        "tokens": culprit.tokens,
        "of": "tokens" if of_tokens(batch) else "rows",
        "module": culprit.module,
        "parameter": next(iter(culprit.tensors), None),
        "tensors": {name: asdict(broken) for name, broken in culprit.tensors.items()},
        "micro_batch": culprit.micro_batch,
        "row_of_micro_batch": culprit.row,
        "row": row,
        "position": culprit.position,
        "row_of_data": None,
        "text": None,
        "rows_without_kept_token": _silent_rows(batch["labels"]),
        "precision": dict(standing.precision),
        "loss": _written(standing.loss),
        "learning_rate": standing.learning_rate,
        "max_grad_norm": standing.max_grad_norm,
        "grad_norm_before": _written(standing.grad_norms[-1]) if standing.grad_norms else None,
        "grad_norms_before": [_written(norm) for norm in standing.grad_norms],
        "last_log": {name: _written(value) for name, value in standing.last_log.items()},
        "last_checkpoint": standing.checkpoint,
    }
    if row is not None:
        ids = _unpadded(batch, row)
        found["row_of_data"] = row_of_data(ids, rows)
        found["text"] = text_around(tokenizer, batch["input_ids"][row].tolist(), culprit.position, len(ids))
    return {**found, "suggestions": list(suggestions(found))}


def write(
    folder: StudentFolder, report: Mapping[str, Any], micro_batches: Sequence[Mapping[str, Tensor]]
) -> None:
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


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Micro-batches one below the other, padded on the right to one length; on the CPU."""
    found = {}
    for name, fill in NAMES.items():
        if parts := [batch[name].cpu() for batch in batches if name in batch]:
            longest = max(part.shape[-1] for part in parts)
            found[name] = torch.cat(
                [
                    F.pad(part, (0, longest - part.shape[-1]), value=fill) if part.ndim > 1 else part
                    for part in parts
                ]
            )
    return found


def of_tokens(batch: Mapping[str, Tensor]) -> bool:
    """Whether tokens are predicted, and not rows classified."""
    return batch["labels"].ndim == 2


def _silent_rows(labels: Tensor) -> list[int]:
    """The rows that have no kept token, or no class."""
    masked = (labels[:, 1:] == IGNORED).all(-1) if labels.ndim == 2 else labels == IGNORED
    return masked.nonzero()[:, 0].tolist()


def nothing_kept(
    step: int, micro_batches: Sequence[Mapping[str, Tensor]], rows: Sequence[Mapping[str, Any]] | None
) -> str:
    """The words for an optimizer step from which nothing can be learned."""
    batch = joined(micro_batches)
    numbers = [row_of_data(_unpadded(batch, row), rows) for row in range(len(batch["labels"]))]
    if not of_tokens(batch):
        return (
            f"step {step}: no row has a class ({IGNORED} stands for none), in rows {numbers} of the "
            "training data; leave such rows out"
        )
    return (
        f"step {step}: no row has a token that counts: every label is masked ({IGNORED}), in rows {numbers} "
        "of the training data; leave "
        "such rows out, or lengthen data.max_length where it cuts off what is to be learned"
    )


def message(report: Mapping[str, Any], folder: StudentFolder) -> str:
    """The error's words: what was not finite, where, when; what to do."""
    where = "on held-out text " if report["stage"] == "evaluation" else ""
    of = f"of {report['tokens']} {report['of']}"
    terms = ", ".join(
        f"{name} = {term['value']} at {term['tokens']} {of}" for name, term in report["terms"].items()
    )
    norm = report["grad_norm_before"]
    known = "unknown" if norm is None else norm if isinstance(norm, str) else f"{norm:.3g}"
    lines = [
        f"step {report['step']}: {where}{terms}{': ' if terms else ''}{_blame(report)}{_where(report)}",
        "training has stopped before this reached a checkpoint (the last one: "
        f"{report['last_checkpoint'] or 'none yet'}); "
        f"learning rate {report['learning_rate']:.1e}, gradient norm before {known}",
        *(f"{number}. {advice}" for number, advice in enumerate(report["suggestions"], 1)),
        f"batch and report: {folder.path / FOLDER}",
    ]
    return "\n  ".join(lines)


def suggestions(report: Mapping[str, Any]) -> Iterator[str]:
    """What to do, the likeliest first; each follows from something in the report."""
    who, weights, half = report["who"], report["tensors"], "float16" in report["precision"].values()
    first, rate = report["parameter"], f"training.learning_rate (now {report['learning_rate']:.1e})"
    if who == "teacher" and weights:
        yield (
            f"the teacher's own weights are not finite ({first}): load a sound copy, or check how "
            "teacher.model was converted"
        )
    elif half and who in ("teacher", "student", "loss") and not weights:
        yield (
            f"float16 ends at 65504, and {report['module'] or 'a term'} passed it: set precision: bfloat16 "
            "(or float32)"
        )
    elif who == "teacher":
        dtype = report["precision"].get("teacher")
        yield (
            f"the teacher's weights are finite, its outputs in {dtype} are not: ask it in float32 "
            "(precision: float32)"
        )
    if who == "student" and weights and not report["grad_norms_before"]:
        yield (
            f"no step was made yet, so {first} came so: load or make a sound student, or go on from an "
            "earlier checkpoint"
        )
    elif who == "student" and weights:
        yield f"an update made {first} not finite: go on from the last checkpoint with a lower {rate}"
    elif who == "student":
        yield (
            f"the student's weights are finite, but too large to compute with: lower {rate}, or warm up "
            "longer (training.warmup_steps)"
        )
    if who == "loss":
        yield (
            f"both models are finite at this {report['of'].removesuffix('s')}, so {report['term']} itself is "
            "not: look at its "
            f"temperature and divergence, or leave it out to go on (loss.weights.{report['term']}: 0)"
        )
    if who == "gradient":
        clipping = f"; clipping is off: set training.max_grad_norm to 1 (now {report['max_grad_norm']:g})" * (
            report["max_grad_norm"] <= 0
        )
        yield f"the loss is finite and the gradient of {first} is not: lower {rate}{clipping}"
    norms = [norm for norm in report["grad_norms_before"] if not isinstance(norm, str)]
    if len(norms) > 2 and norms[-1] > GREW * sorted(norms[:-1])[len(norms) // 2 - 1]:
        yield (
            f"the gradient norm grew from {norms[0]:.3g} to {norms[-1]:.3g} in the {len(norms)} steps "
            f"before: lower {rate}, warm up "
            f"longer, or clip harder (training.max_grad_norm, now {report['max_grad_norm']:g})"
        )
    if who == "nobody":
        yield (
            "asked once more, the same batch is finite: try loss.compile: false; where it comes back at "
            "other steps, suspect the "
            "memory or the device"
        )
    if masked := report["rows_without_kept_token"]:
        why = "every label is masked" if report["of"] == "tokens" else "there is no class"
        yield (
            f"in rows {masked} of the batch {why}, so nothing is learned from them: leave them out of the "
            "data"
        )


def text_around(
    tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int], position: int | None, end: int
) -> str | None:
    """The tokens around a position decoded, the one at it between ⟦ ⟧; without one, the row's first.
    `end` is where padding begins.
    """
    if tokenizer is None:
        return None
    if position is None:
        return tokenizer.decode(ids[: min(BEGINNING, end)]) + "…" * (end > BEGINNING)
    before, after = (
        ids[max(position - AROUND, 0) : position],
        ids[position + 1 : min(position + 1 + AROUND, max(end, position + 1))],
    )
    return f"{tokenizer.decode(before)}⟦{tokenizer.decode([ids[position]])}⟧{tokenizer.decode(after)}"


def row_of_data(ids: Sequence[int], rows: Sequence[Mapping[str, Any]] | None) -> int | None:
    """The first row of the data set with these tokens; None where it is not among the first `SEARCHED`,
    or cannot be looked up.
    """
    if rows is None or not hasattr(rows, "__getitem__"):
        return None
    return next(
        (
            number
            for number in range(min(len(rows), SEARCHED))
            if list(rows[number]["input_ids"]) == list(ids)
        ),
        None,
    )


def _unpadded(batch: Mapping[str, Tensor], row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()


def _blame(report: Mapping[str, Any]) -> str:
    who, tensors = report["who"], report["tensors"]
    broken = ", ".join(
        f"{name} ({found['values']} values, the first at {found['first']})"
        for name, found in list(tensors.items())[:3]
    )
    if who == "gradient" and not tensors[report["parameter"]]["values"]:
        return (
            f"the gradient's norm is not finite; every value of it is, the largest in {report['parameter']}"
        )
    if who == "gradient":
        return f"the loss is finite ({report['loss']:.3g}), but not the gradient of {broken}"
    if who == "loss":
        return "teacher and student are finite, the term is not"
    if who == "nobody":
        return "the loss or its gradient was not finite; asked once more, it is"
    module = f": {report['module']} is the first module whose output is not" if report["module"] else ""
    return f"the {who} is not finite{module}" + (
        f"; weights not finite: {broken}" if broken else "; its weights are"
    )


def _where(report: Mapping[str, Any]) -> str:
    if report["row"] is None:
        return ""
    data = "" if report["row_of_data"] is None else f" (row {report['row_of_data']} of the data)"
    position = "" if report["position"] is None else f", position {report['position']}"
    return f"; first at row {report['row']}{data}{position}: {report['text']!r}"


def _written(value: Any) -> Any:
    """JSON knows no nan."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
