"""From questions and answers to rows whose prompt is given and whose answer is learned."""

from transformers import PreTrainedTokenizerBase

from kdlib.batches import Prepared
from kdlib.config import DataConfig


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Prepared:
    raise NotImplementedError
