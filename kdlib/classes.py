"""From texts with a class each to rows for teacher and student."""

from transformers import PreTrainedTokenizerBase

from kdlib.batches import Prepared
from kdlib.config import DataConfig


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, teacher: PreTrainedTokenizerBase | None, seed: int) -> Prepared:
    raise NotImplementedError
