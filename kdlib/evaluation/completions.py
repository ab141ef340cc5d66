"""What models write for programming problems: in batches, on disk as it comes, taken up where it stopped."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from kdlib.code.problems import Problem
from kdlib.config.sections import CodeConfig
from kdlib.errors import ModelError
from kdlib.models.loading import device_of, load_model, load_tokenizer, positions_of
from kdlib.models.saved import drawing
from kdlib.runs.files import add_json_lines, json_lines
from kdlib.tokens.templates import Refused, written

WHAT_TELLS = ("temperature", "max_new_tokens", "chat")  # settings on which a completion depends


def answers_of(
    name: str,
    source: str,
    problems: Sequence[Problem],
    settings: CodeConfig,
    file: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, list[str]]:
    """A model's answers, `settings.samples` to each problem: those on file, and the others made now.

    Args:
        name: how the model is called in messages and in the file.
        file: JSONL, to which each batch is added when it is made; an answer is known again by its model's
            weights, its problem, its number, the settings and the seed.

    Returns:
        task_id → its answers.

    Raises:
        ModelError: no such model, or one that cannot read a prompt and answer it.
    """
    asked = {"source": source, "weights": _weights(source), "seed": seed, "dtype": str(dtype)}
    asked |= {setting: getattr(settings, setting) for setting in WHAT_TELLS}
    wanted = {
        _key(asked, problem, sample): (problem, sample)
        for problem in sorted(problems, key=lambda each: len(each.prompt))  # so that little is padded
        for sample in range(settings.samples)
    }
    known = {row["key"]: row["answer"] for row in json_lines(file) if row["key"] in wanted}
    if missing := [key for key in wanted if key not in known]:
        had = f", {len(known):,} are there" if known else ""
        print(f"{name}: writing {len(missing):,} programs{had} …", flush=True)
        model, tokenizer = load_model(source, dtype).to(device_of(device)), load_tokenizer(source)
        for start in range(0, len(missing), settings.batch_size):
            keys = missing[start : start + settings.batch_size]
            asked_now = [wanted[key][0] for key in keys]
            torch.manual_seed(int(keys[0], 16) % 2**32)  # so that a sample is another, and a restart no other
            answers = _generated(model, tokenizer, asked_now, settings)
            asked_for = [{"task_id": wanted[key][0].task_id, "sample": wanted[key][1]} for key in keys]
            rows = zip(keys, asked_for, answers, strict=True)
            add_json_lines(file, [{"key": k, "model": name, **a, "answer": t} for k, a, t in rows])
            known |= zip(keys, answers, strict=True)
    found: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
    for key, (problem, _) in wanted.items():
        found[problem.task_id].append(known[key])
    return found


@torch.no_grad()
def _generated(
    model: PreTrainedModel, tokenizer: Tokenizer, problems: Sequence[Problem], settings: CodeConfig
) -> list[str]:
    """One answer to each, as text; a completion stops soon after its program's end."""
    tokenizer.padding_side = "left"
    texts = [_written(problem, tokenizer, chat=settings.chat) for problem in problems]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not settings.chat)
    given = inputs["input_ids"].shape[1]
    room = (positions_of(model.config) or given + settings.max_new_tokens) - given
    if room < 1:
        raise ModelError(
            f"{problems[-1].task_id}: its prompt has {given} tokens, and the model reads no more than "
            f"{given + room}; leave the problem out, or take another model"
        )
    how = drawing(
        model,
        tokenizer,
        new_tokens=min(settings.max_new_tokens, room),
        temperature=settings.temperature,
        stop=() if settings.chat else problems[0].ends,
    )
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, **how)
    return tokenizer.batch_decode(output[:, given:], skip_special_tokens=True)


def _written(problem: Problem, tokenizer: Tokenizer, *, chat: bool) -> str:
    """A problem as the model reads it."""
    if not chat:
        return problem.prompt
    if not tokenizer.chat_template:
        raise ModelError("code.chat: the tokenizer has no chat template; set code.chat: false")
    asked = [{"role": "user", "content": problem.question}]
    try:
        return written(tokenizer, asked, begins=True)
    except Refused as refused:
        raise ModelError(
            f"code.chat: found a chat template that refuses a user's message ({refused}); needed is one that "
            "takes it: set code.chat: false"
        ) from refused


def _weights(source: str) -> list[list[Any]]:
    """By what a folder's weights are known: the files, their sizes, and when they were written."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _key(asked: Mapping[str, Any], problem: Problem, sample: int) -> str:
    text = json.dumps([asked, problem.task_id, problem.prompt, sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
