"""What is said and written of a value that is not finite.

    runs/<run>/nan_report/  report.json
                            batch.safetensors: input_ids, attention_mask, labels [B, T] of the optimizer step

Where rows are classified, labels are [B] and counts are of rows; what a teacher with another tokenizer reads
is there too.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from kdlib.losses.signals import IGNORED
from kdlib.runs.files import StudentFolder, write_json
from kdlib.training.nan_search import Batch, Origin

FOLDER = "nan_report"
INPUTS = ("input_ids", "attention_mask", "teacher_input_ids", "teacher_attention_mask", "labels")
AROUND = 12  # tokens shown on either side
BEGINNING = 40  # tokens shown of a row that is classified
WARM_UP = "warm up longer (training.warmup_steps)"
GREW = 5.0  # times the median of those before: a gradient norm that was running away
SEARCHED = 200_000  # rows of the data set, at most, among which the one at fault is looked up

Rows = Sequence[Mapping[str, Any]]
Report = Mapping[str, Any]


def report_of(
    origin: Origin,
    state: Report,
    micro_batches: Sequence[Batch],
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Rows,
) -> dict[str, Any]:
    """All that is known, as plain data; a row is counted over this rank's micro-batches, as saved."""
    batch, row, row_of_data, text = joined(micro_batches), origin.row, None, None
    if row is not None:
        row += sum(len(each["labels"]) for each in micro_batches[: origin.micro_batch])
        row_of_data = _row_of_data(batch, row, rows)
        text = _text_around(tokenizer, batch, row, origin.position) if tokenizer else None
    found = {
        **json.loads(json.dumps(state), parse_constant=lambda name: str(float(name))),  # JSON knows no nan
        **asdict(origin),
        "row": row,
        "row_of_micro_batch": origin.row,
        "row_of_data": row_of_data,
        "text": text,
        "rows_without_kept_token": _silent_rows(batch["labels"]),
        "of": "tokens" if batch["labels"].ndim == 2 else "rows",
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
    for name in INPUTS:
        if rows := [row for batch in batches if name in batch for row in batch[name].cpu()]:
            fill = IGNORED if name == "labels" else 0
            found[name] = pad_sequence(rows, True, fill) if rows[0].ndim else torch.stack(rows)
    return found


def nothing_kept(step: int, micro_batches: Sequence[Batch], rows: Rows) -> str:
    """The words for a step from which nothing can be learned."""
    batch = joined(micro_batches)
    numbers = [_row_of_data(batch, row, rows) for row in range(len(batch["labels"]))]
    what, more = f"a class ({IGNORED} stands for none)", ""
    if batch["labels"].ndim == 2:
        what = f"a token that counts: every label is masked ({IGNORED})"
        more = ", or lengthen data.max_length where it cuts off what is to be learned"
    there = f"in rows {numbers} of the training data"
    return f"step {step}: no row has {what}, {there}; leave such rows out{more}"


def message(report: Report, folder: StudentFolder) -> str:
    """The error's words: what was not finite, where, when; what to do."""
    where = "on held-out text " if report["stage"] == "evaluation" else ""
    of = f"of {report['tokens']} {report['of']}"
    terms = [f"{name} = {term['value']} at {term['tokens']} {of}" for name, term in report["terms"].items()]
    norm = report["grad_norm_before"]
    known = "unknown" if norm is None else f"{float(norm):.3g}"
    lines = [
        f"step {report['step']}: {where}{', '.join(terms)}{': ' * bool(terms)}{_blame(report)}{_at(report)}",
        "training has stopped before this reached a checkpoint (the last one: "
        f"{report['last_checkpoint'] or 'none yet'}); "
        f"learning rate {report['learning_rate']:.1e}, gradient norm before {known}",
        *(f"{number}. {advice}" for number, advice in enumerate(report["suggestions"], 1)),
        f"batch and report: {folder.path / FOLDER}",
    ]
    return "\n  ".join(lines)


def suggestions(report: Report) -> Iterator[str]:
    """What to do, the likeliest first."""
    who, first, term, broken = report["who"], report["parameter"], report["term"], bool(report["tensors"])
    limit, precision = report["max_grad_norm"], report["precision"]
    lower = f"lower training.learning_rate (now {report['learning_rate']:.1e})"
    overflow = "float16" in precision.values() and who in ("teacher", "student", "loss") and not broken
    if overflow:
        passed = report["module"] or "a term"
        yield f"float16 ends at 65504, and {passed} passed it: set precision: bfloat16 (or float32)"
    match who, broken:
        case "teacher", True:
            yield f"the teacher's own weights are not finite ({first}): load a sound copy of teacher.model"
        case "teacher", False if not overflow:
            outputs = f"its outputs in {precision['teacher']} are not"
            yield f"the teacher's weights are finite, {outputs}: set precision: float32"
        case "student", True if report["grad_norms_before"]:
            yield f"an update made {first} not finite: go on from the last checkpoint and {lower}"
        case "student", True:
            yield f"no step was made yet, so {first} came so: load or make a sound student"
        case "student", False:
            yield f"the student's weights are finite, but too large to compute with: {lower}, or {WARM_UP}"
        case "loss", _:
            leave = f"look at its temperature and divergence, or leave it out (loss.weights.{term}: 0)"
            yield f"both models are finite here, so {term} itself is not: {leave}"
        case "gradient", _:
            off = "" if limit > 0 else "; clipping is off: set training.max_grad_norm to 1"
            yield f"the loss is finite and the gradient of {first} is not: {lower}{off}"
        case "nobody", _:
            yield (
                "asked once more, the same batch is finite: try loss.compile: false; where it comes back at "
                "other steps, suspect the memory or the device"
            )
    norms = [norm for norm in report["grad_norms_before"] if not isinstance(norm, str)]
    if len(norms) > 2 and norms[-1] > GREW * sorted(norms[:-1])[len(norms) // 2 - 1]:
        grew = f"grew from {norms[0]:.3g} to {norms[-1]:.3g} in the {len(norms)} steps before"
        harder = f"clip harder (training.max_grad_norm, now {limit:g})"
        yield f"the gradient norm {grew}: {lower}, {WARM_UP}, or {harder}"
    if masked := report["rows_without_kept_token"]:
        why = "every label is masked" if report["of"] == "tokens" else "there is no class"
        yield f"in rows {masked} of the batch {why}, so nothing is learned from them: leave them out"


def _silent_rows(labels: Tensor) -> list[int]:
    """The rows that have no kept token, or no class."""
    masked = labels == IGNORED
    return (masked[:, 1:].all(-1) if labels.ndim == 2 else masked).nonzero()[:, 0].tolist()


def _text_around(tokenizer: PreTrainedTokenizerBase, batch: Batch, row: int, position: int | None) -> str:
    """The tokens around a position, the one at it in ⟦ ⟧; without one the row's first."""
    end = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row].tolist()
    if position is None:
        return f"{tokenizer.decode(ids[: min(BEGINNING, end)])}{'…' * (end > BEGINNING)}"
    before, at, after = ids[max(position - AROUND, 0) : position], ids[position], ids[position + 1 : end]
    return "{}⟦{}⟧{}".format(*(tokenizer.decode(part) for part in (before, [at], after[:AROUND])))


def _row_of_data(batch: Batch, row: int, rows: Rows) -> int | None:
    """The first row with these tokens, of the first `SEARCHED`; None where there is none."""
    wanted = batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()
    numbers = range(min(len(rows), SEARCHED))
    return next((number for number in numbers if list(rows[number]["input_ids"]) == wanted), None)


def _blame(report: Report) -> str:
    who, tensors = report["who"], report["tensors"]
    shown = list(tensors.items())[:3]
    broken = ", ".join(f"{name} ({at['values']} values, the first at {at['first']})" for name, at in shown)
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
    weights = f"; weights not finite: {broken}" if broken else "; its weights are"
    return f"the {who} is not finite{module}{weights}"


def _at(report: Report) -> str:
    if report["row"] is None:
        return ""
    data = "" if report["row_of_data"] is None else f" (row {report['row_of_data']} of the data)"
    position = "" if report["position"] is None else f", position {report['position']}"
    return f"; first at row {report['row']}{data}{position}: {report['text']!r}"
