"""What a saved student must have: the special tokens it began with, and what it said when it was saved."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.losses.signals import kept
from kdlib.losses.terms import cross_entropy
from kdlib.models.loading import SPECIAL, load_tokenizer, load_weights, plain_generation
from kdlib.models.teacher import signal_of

FIRST_ROWS = 4  # held-out rows of which a student that is loaded again must say the same
SMALL = 0.1  # nats, against which a smaller cross-entropy's difference is held


def mean_of_first(sums: Mapping[str, Tensor]) -> float:
    """Nats per token of the first held-out rows, from the sums over every row."""
    nats, tokens = (float(sums[name][:FIRST_ROWS].sum()) for name in ("ce", "tokens"))
    return nats / max(tokens, 1.0)


def settle_generation(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Let a student stop where its rows end, and be saved; in words, what was changed for it.

    Its generation config gets the tokenizer's special tokens where it has none, and stops at the tokenizer's
    EOS beside its own; one that transformers would not write is left out but for these.  The model's own
    config stays: what a model makes of its pad token is part of it.
    """
    if not student.can_generate():
        return []
    said, generation = [], student.generation_config
    stops = (
        generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    )
    if (end := tokenizer.eos_token_id) is not None and end not in stops:
        stops = [each for each in stops if each is not None]
        generation.eos_token_id = [end, *stops] if stops else end
        said += [f"it stops at the tokenizer's {tokenizer.eos_token} ({end}) too"] if stops else []
    rows = student.get_input_embeddings().weight.shape[0]
    for name in ("bos_token_id", "pad_token_id"):
        if (
            getattr(generation, name) is None
            and (token := getattr(tokenizer, name)) is not None
            and token < rows
        ):
            setattr(generation, name, token)
    try:
        generation.validate(strict=True)  # one that was changed is saved only if it is sound
    except ValueError as error:
        student.generation_config = plain_generation(student)
        said.append(
            f"of its generation config only the special tokens are kept: {str(error).splitlines()[0]}"
        )
    return said


def drawing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of `generate`: greedy without a temperature; it ends where model or tokenizer say so."""
    plain = plain_generation(model)
    known = plain.eos_token_id if isinstance(plain.eos_token_id, list) else [plain.eos_token_id]
    plain.update(
        max_new_tokens=new_tokens,
        do_sample=bool(temperature),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({*known, tokenizer.eos_token_id} - {None}) or None,
    )
    if temperature:
        plain.update(temperature=temperature, top_p=top_p or 1.0, top_k=0)
    ends = {"stop_strings": [*stop], "tokenizer": tokenizer} if stop else {}
    return {"generation_config": plain, **ends}


def special_tokens(model: PreTrainedModel) -> dict[str, Any]:
    """Of a model's config, and of its generation config, by name."""
    parts = {"config": model.config.get_text_config()}
    if model.can_generate():
        parts["generation config"] = model.generation_config
    return {f"{part} {name}": getattr(each, name, None) for part, each in parts.items() for name in SPECIAL}


@dataclass(frozen=True)
class Trained:
    """A trained student, and by what it is known again."""

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    special: Mapping[str, Any]  # its `special_tokens` before it was trained
    batch: Mapping[str, Tensor]  # a few rows, on the CPU
    vocabulary: int  # what it chooses among
    tolerance: float  # of its cross-entropy, relative

    def faults(self, folder: Path, nats: float | None) -> list[str]:
        """How it differs where it is loaded again: in a fresh object, on the CPU.

        Args:
            nats: the rows' cross-entropy when it was saved; None where a kdlib of before saved it, which
                noted none, and let the Trainer move special tokens.
        """
        try:
            loaded, info = load_weights(type(self.student), str(folder), self.student.dtype)
            tokenizer = load_tokenizer(str(folder))
        except Exception as error:  # whatever transformers makes of it: whether it loads is the question
            return [f"it cannot be loaded: {type(error).__name__}: {error}"]
        kinds = {kind.removesuffix("_keys"): names for kind, names in info.items() if names}
        found = [f"{len(names)} of its weights: {kind}" for kind, names in kinds.items()]
        found += _of_tokenizer(self.tokenizer, tokenizer, self.batch["input_ids"][0])
        if nats is None:
            return found
        found += _of_special(self.special, special_tokens(loaded))
        again = plain_ce(loaded.eval(), self.batch, self.vocabulary)
        if not abs(again - nats) <= self.tolerance * max(abs(nats), SMALL):
            found.append(f"its cross-entropy of the first held-out rows is {again:.4f}, and was {nats:.4f}")
        return found


@torch.no_grad()
def plain_ce(model: PreTrainedModel, batch: Mapping[str, Tensor], vocabulary: int) -> float:
    """Nats per kept token of a batch, row by row, from the logits that the model itself makes."""
    nats, count = 0.0, 0
    for row in range(len(batch["input_ids"])):
        one = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels")}
        tokens = kept(one["labels"])
        logits = signal_of(model, one, tokens, vocabulary=vocabulary, form=None).logits()
        nats += float(cross_entropy(logits, None, tokens.targets).sum())
        count += len(tokens.targets)
    return nats / max(count, 1)


def _of_special(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name, ids in before.items():
        if after.get(name) != ids:
            yield f"its {name} is {after.get(name)}, and was {ids}"


def _of_tokenizer(
    ours: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase, ids: Tensor
) -> Iterator[str]:
    if saved.get_vocab() != ours.get_vocab():
        yield f"its tokenizer has other tokens ({len(saved)}, and had {len(ours)})"
    for name in (*SPECIAL, "chat_template"):
        if getattr(saved, name) != getattr(ours, name):
            yield f"its tokenizer's {name} is {getattr(saved, name)!r}, and was {getattr(ours, name)!r}"
    text = ours.decode(ids)
    if saved(text)["input_ids"] != ours(text)["input_ids"]:
        yield "its tokenizer cuts the first held-out row otherwise"
