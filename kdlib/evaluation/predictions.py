"""What teacher and students say about a few held-out tokens or rows: logits, and a summary to keep."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.config.run import Config
from kdlib.losses.signals import kept
from kdlib.losses.terms import SoftTargets, agreement, cross_entropy
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.softening import Predictions, softening_of
from kdlib.runs.files import read_json, write_json
from kdlib.runs.folder import Run
from kdlib.tasks.base import Sample

CANDIDATES = 5  # of each model, kept for each token


def look(loads: Mapping[str, Callable[[], LiveTeacher]], sample: Sample, unit: str) -> Predictions:
    """Ask models, one after another and the teacher first, about a task's sample; `unit` is the task's."""
    logits, targets = {}, kept(sample.batch["labels"]).targets.numpy()
    for name, load in loads.items():
        model = load()
        batch = {key: value.to(model.model.device) for key, value in sample.batch.items()}
        logits[name] = model(batch, kept(batch["labels"])).logits().float().cpu().numpy()
    return Predictions(sample.texts, sample.before, targets, logits, sample.decode, of=f"{unit}s")


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
