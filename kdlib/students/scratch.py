"""The config of a student from scratch: of a size that is asked for, or of sizes given one by one."""

import math

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase as Tokenizer

from kdlib.errors import ModelError, nearest
from kdlib.models.loading import SPECIAL

ASPECT, TOLERANCE = 64, 0.04  # hidden size over layers, as in most models; of a count that is asked for


def llama_of(count: float, vocabulary: int) -> dict[str, int]:
    """Sizes of a Llama with so many parameters, within 4 %, embedding and head tied and counted once.

    Of these the one whose hidden size is nearest to 64 times its number of layers; heads are 64 wide, an MLP
    8/3 of the hidden size (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).
    """
    fits = []
    for hidden in range(128, 8193, 128):
        inner = math.ceil(hidden * 8 / 3 / 128) * 128
        layer, rest = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden, (vocabulary + 1) * hidden
        layers = max(round((count - rest) / layer), 1)
        if abs((rest + layers * layer) / count - 1) <= TOLERANCE:
            sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
            fits.append((abs(math.log(hidden / layers / ASPECT)), hidden, sizes))
    if not fits:
        found = f"found {count / 1e6:g}m parameters, of which {vocabulary:,} tokens leave none for layers"
        raise ModelError(f"student.shape: {found}; ask for more, or give sizes: {{model_type: llama, …}}")
    sizes = min(fits)[-1]
    heads = sizes["hidden_size"] // 64
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads}


def shaped(shape: str | dict, tokenizer: Tokenizer) -> PreTrainedConfig:
    """The config of a model from scratch, which speaks by this tokenizer."""
    asked = of_tokens(tokenizer)
    if isinstance(shape, str):
        count = float(shape[:-1]) * {"m": 1e6, "b": 1e9}[shape[-1]]
        sizes = {**llama_of(count, asked["vocab_size"]), "tie_word_embeddings": True}
        return AutoConfig.for_model("llama", max_position_embeddings=4096, **asked, **sizes)
    kind, sizes = shape["model_type"], {name: x for name, x in shape.items() if name != "model_type"}
    try:
        known = AutoConfig.for_model(kind)
        if strange := next((name for name in sizes if not hasattr(known, name)), None):
            hint = nearest(strange, known.to_dict())
            raise ModelError(f"student.shape.{strange}: a {kind} has no such setting{hint}")
        return AutoConfig.for_model(kind, **asked | sizes)
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(f"student.shape: transformers makes no such {kind}: {error}") from error


def of_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    """What a model's config says of the tokens that it knows."""
    known = max(tokenizer.get_vocab().values()) + 1
    return {"vocab_size": known, **{name: getattr(tokenizer, name) for name in SPECIAL}}
