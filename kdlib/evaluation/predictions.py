"""What teacher and students say about a few held-out tokens or rows: logits, and a summary to keep."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.config.run import Config
from kdlib.losses.alignment import Alignment, SpanSignal, TeacherSignal, single_in, spans_in
from kdlib.losses.signals import kept, moved
from kdlib.losses.terms import SoftTargets, agreement, cross_entropy
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.softening import Predictions, softening_of
from kdlib.runs.files import read_json, write_json
from kdlib.runs.folder import Run
from kdlib.tasks.base import Sample
from kdlib.tokens.vocabulary import Vocabularies

CANDIDATES = 5  # of each model, kept for each token
OTHERS = "(all others)"  # of two vocabularies, the tokens that one of them has not


def look(loads: Mapping[str, Callable[[], LiveTeacher]], sample: Sample, unit: str) -> Predictions:
    """Ask models, one after another and the teacher first, about a task's sample; `unit` is the task's.

    Of two vocabularies these are the tokens that both have, and one for all others, as of `span_kl`.
    """
    logits, known = {}, sample.vocabularies
    for name, load in loads.items():
        model = load()
        batch = moved(sample.batch, model.model.device)
        said = model(batch, kept(batch["labels"]))
        made = said.logits() if known is None else _in_common(said, batch, moved(known, said.device))
        logits[name] = made.float().cpu().numpy()
    targets, decode = kept(sample.batch["labels"]).targets, sample.decode
    if known is not None:
        targets, decode = _numbered(targets[single_in(sample.batch)], decode, known)
    return Predictions(sample.texts, sample.before, targets.numpy(), logits, decode, of=f"{unit}s")


def _numbered(
    targets: Tensor, decode: Callable[[int], str], known: Vocabularies
) -> tuple[Tensor, Callable[[int], str]]:
    """Tokens of the student's by their numbers among those that both have, and what a number stands for."""
    common = (known.shared >= 0).nonzero()[:, 0]
    places = torch.full((known.student_size,), len(common)).scatter(0, common, torch.arange(len(common)))
    names = common.tolist()
    return places[targets], lambda number: decode(names[number]) if number < len(names) else OTHERS


def _in_common(said: TeacherSignal, batch: Mapping[str, Any], known: Vocabularies) -> Tensor:
    """[P, shared + 1] log-probabilities of the spans of one token: of what both may say, and of the rest.

    Where every token of the student's is shared there is no rest, as of `span_kl`.
    """
    lines, shared = Alignment(**spans_in(batch)[0]), known.shared[known.shared >= 0]
    if isinstance(said, SpanSignal):
        said, places, ids, others = said.said, lines.teacher_first, shared, known.others
    else:
        places, ids, others = lines.first, (known.shared >= 0).nonzero()[:, 0], known.own
    log_probs = said.select(places[lines.single]).logits().float().log_softmax(-1)
    rest = log_probs[:, others].logsumexp(-1, keepdim=True)
    return torch.cat([log_probs[:, ids], *([rest] if len(known.own) else [])], dim=-1)


def summary(predictions: Predictions, config: Config) -> dict[str, Any]:
    """As plain data: temperatures x top k of the teacher, and each token with what every model made of it."""
    logits = {name: torch.from_numpy(values) for name, values in predictions.logits.items()}
    targets = torch.from_numpy(predictions.targets)
    texts = zip(predictions.texts, predictions.before, strict=True)
    return {
        **softening_of(predictions, config),
        "of": predictions.of,
        "tokens": [{"text": text, "before": before} for text, before in texts],
        "teacher": _said(logits["teacher"], targets, predictions.decode),
        "students": {
            name: _said(logits[name], targets, predictions.decode)
            | _against(logits[name], logits["teacher"], targets)
            for name in predictions.students
        },
    }


def write(run: Run, predictions: Predictions) -> None:
    """Write explorers.json; students seen before on the same text stay in it."""
    path, found = run.path / "explorers.json", summary(predictions, run.config)
    earlier = read_json(path, {})
    if earlier.get("tokens") == found["tokens"]:
        for name, student in earlier["students"].items():
            found["students"].setdefault(name, student)
    write_json(path, found)


def _said(logits: Tensor, targets: Tensor, decode: Callable[[int], str]) -> dict[str, list]:
    """Of one model, of each token: cross-entropy, nats, and the likeliest candidates [text, probability]."""
    top = logits.softmax(-1).topk(min(CANDIDATES, logits.shape[-1]))
    candidates = [
        [[decode(token), round(p, 6)] for token, p in zip(*row, strict=True)]
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return {"ce": _rounded(cross_entropy(logits, None, targets)), "top": candidates}


def _against(student: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, list]:
    return {
        "kl": _rounded(SoftTargets()(student, teacher, targets, 1.0).clamp(min=0)),
        "agrees": [bool(same) for same in agreement(student, teacher, targets).tolist()],
    }


def _rounded(values: Tensor) -> list[float]:
    return np.round(values.double().numpy(), 5).tolist()
