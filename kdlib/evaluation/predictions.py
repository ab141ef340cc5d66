"""What teacher and students say about a few held-out tokens, or classified rows: logits for the
explorers, a summary for the run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.data.batches import Prepared, collate
from kdlib.losses.objective import SoftTargets, agreement, cross_entropy
from kdlib.losses.signals import kept
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.softening import Sight, softening_of
from kdlib.runs.files import read_json, write_json
from kdlib.runs.folder import Run

TOKENS = 128  # of the held-out text: as many as one reads
ROWS = 12  # where most of a row is given and little of it predicted
FEW = 8  # not worth a row of their own
CLASSIFIED = 32  # rows, spread over the held-out ones
BEGINNING = 72  # letters of a row's text
CANDIDATES = 5  # of each model, kept for each token


def look(
    voices: Mapping[str, Callable[[], LiveTeacher]],
    rows: Sequence[Mapping[str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = TOKENS,
) -> Sight:
    """Ask models, one after another, about the first tokens of held-out rows.

    Args:
        voices: name → what loads the model; the teacher first.
        rows: of {"input_ids": …}, with "prompt_tokens" where a beginning is given.
        tokens: how many are predicted, at most; each row costs one more, its first.
    """
    batch = collate(beginnings(rows, tokens), pad_id=tokenizer.pad_token_id)
    predicted, logits = kept(batch["labels"]), {}
    for name, load in voices.items():
        voice = load()
        there = {key: value.to(voice.model.device) for key, value in batch.items()}
        logits[name] = voice(there, kept(there["labels"])).logits().float().cpu().numpy()
    ids, length = batch["input_ids"].flatten().tolist(), batch["labels"].shape[1]
    here = (predicted.positions + 1).tolist()
    previous = [-1, *here[:-1]]
    before = [
        tokenizer.decode(ids[max(last + 1, place // length * length) : place]) if place - last > 1 else ""
        for last, place in zip(previous, here, strict=True)
    ]
    texts = [tokenizer.decode([token]) for token in predicted.targets.tolist()]
    return Sight(texts, before, predicted.targets.numpy(), logits, lambda token: tokenizer.decode([token]))


def look_at_rows(
    voices: Mapping[str, Callable[[], LiveTeacher]], prepared: Prepared, tokenizer: PreTrainedTokenizerBase
) -> Sight:
    """Ask models, one after another, about some of the held-out rows of a classification, from the first to
    the last.

    Args:
        voices: name → what loads the model; the teacher first.
    """
    rows, count = prepared.validation, min(CLASSIFIED, len(prepared.validation))
    some = [rows[i * len(rows) // count] for i in range(count)]
    batch, logits = prepared.collate(some), {}
    known = kept(batch["labels"])
    for name, load in voices.items():
        voice = load()
        there = {key: value.to(voice.model.device) for key, value in batch.items()}
        logits[name] = voice(there, kept(there["labels"])).logits().float().cpu().numpy()
    shown = [text_of(some[row], tokenizer) for row in known.rows.tolist()]
    texts = [
        text if len(text) <= BEGINNING else f"{text[:BEGINNING]}…"
        for text in (" ".join(text.split()) for text in shown)
    ]
    classes = [f"{prepared.labels[number]}: " for number in known.targets.tolist()]
    return Sight(texts, classes, known.targets.numpy(), logits, prepared.labels.__getitem__, of="rows")


def text_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row that is classified; where it is not kept, as it can be read from the tokens."""
    return row.get("text") or tokenizer.decode(row["input_ids"], skip_special_tokens=True)


def beginnings(rows: Sequence[Mapping[str, Sequence[int]]], tokens: int) -> list[dict[str, list[int]]]:
    """The first rows, the last one cut, that together have some so many tokens to predict, or all where
    they have fewer.
    """
    taken = []
    for row in rows:
        if tokens < (FEW if taken else 1) or len(taken) == (ROWS if "prompt_tokens" in row else len(rows)):
            break
        given = max(row.get("prompt_tokens", 1), 1)
        ids = list(row["input_ids"][: tokens + given])
        taken.append({**row, "input_ids": ids})
        tokens -= len(ids) - given
    return taken


def summary(sight: Sight, config: Config) -> dict[str, Any]:
    """A sight as plain data: temperatures x top k of the teacher, and each token with what every model
    made of it.
    """
    logits = {name: torch.from_numpy(values) for name, values in sight.logits.items()}
    targets = torch.from_numpy(sight.targets)
    return {
        **softening_of(sight, config),
        "of": sight.of,
        "tokens": [
            {"text": text, "before": before} for text, before in zip(sight.texts, sight.before, strict=True)
        ],
        "teacher": _said(logits["teacher"], targets, sight.decode),
        "students": {
            name: _said(logits[name], targets, sight.decode)
            | _against(logits[name], logits["teacher"], targets)
            for name in sight.students
        },
    }


def write(run: Run, sight: Sight) -> None:
    """Write explorers.json; students seen before on the same text stay in it."""
    path, found = run.path / "explorers.json", summary(sight, run.config)
    earlier = read_json(path, {})
    if earlier.get("tokens") == found["tokens"]:
        found["students"] = found["students"] | {
            n: s for n, s in earlier["students"].items() if n not in found["students"]
        }
    write_json(path, found)


def _said(logits: Tensor, targets: Tensor, decode: Callable[[int], str]) -> dict[str, list]:
    """Of one model: the cross-entropy of each token, in nats, and its likeliest candidates as [text,
    probability].
    """
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
