"""Where signals come from: a model run on a batch, now.  The student's go through the same function."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdlib.models import captured_hidden, has_plain_head
from kdlib.signals import DenseSignal, Kept, LinearSignal, Signal


def signal_of(
    model, batch: Mapping[str, Tensor], kept: Kept, *, vocabulary: int, linear: bool, unwrapped: PreTrainedModel | None = None
) -> Signal:
    """What a model says about the kept tokens of a batch.

    Args:
        model: called once with input_ids and attention_mask; may be a wrapper (DDP) of `unwrapped`.
        vocabulary: the tokenizer's size; rows that pad the head beyond it are left out.
        linear: True gives a LinearSignal (the head is applied later, chunk by chunk), False a DenseSignal.
    """
    unwrapped = unwrapped or model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not linear:
        return DenseSignal(kept.select(model(**inputs, use_cache=False).logits)[:, :vocabulary])
    with captured_hidden(unwrapped) as states:
        model(**inputs, use_cache=False, logits_to_keep=1)
    head = unwrapped.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if len(weight) > vocabulary:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return LinearSignal(kept.select(states[-1]), weight, bias)


@dataclass
class LiveTeacher:
    """A frozen model that is asked about each batch as it comes."""

    model: PreTrainedModel
    vocabulary: int

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.linear = has_plain_head(self.model)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], kept: Kept) -> Signal:
        """The teacher's signal for the kept tokens; without gradient."""
        return signal_of(self.model, batch, kept, vocabulary=self.vocabulary, linear=self.linear)
