"""A narrower copy of a model: the hidden channels, MLP neurons and attention heads that do most, no others.

Which they are is seen in what they give on text. After Muralidharan et al. 2024 (Minitron),
https://arxiv.org/abs/2407.14679; that a norm has fewer squares to divide by is mended here, not there.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kdlib.config.models import WidthConfig
from kdlib.errors import ModelError
from kdlib.models.hooks import layers_name
from kdlib.models.loading import plain_config, plain_generation

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # whose parts are called as in AXES
AXES = {  # what the rows, and the columns, of a part's weight stand for; a bias has rows alone
    **dict.fromkeys(("gate_proj", "up_proj"), ("neurons", "hidden")),
    "down_proj": ("hidden", "neurons"),
    "q_proj": ("heads", "hidden"),
    **dict.fromkeys(("k_proj", "v_proj"), ("kv_heads", "hidden")),
    "o_proj": ("hidden", "heads"),
    **dict.fromkeys(("q_norm", "k_norm"), ("all",)),  # of a head's own channels, which stay
    **dict.fromkeys(("embed_tokens", "lm_head", "score"), ("all", "hidden")),
}
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def with_width(config: PreTrainedConfig, width: WidthConfig | None) -> PreTrainedConfig:
    """A copy of a model's config with these sizes, its heads as large as before; without a width, the config.

    Whole groups of heads leave, with the key and value head that they share, where that comes out even, which
    costs least; else as many of each group.

    Raises:
        ModelError: a kind of model that is not known here, sizes that it lacks, or heads that do not divide.
    """
    if width is None:
        return config
    if config.model_type not in KINDS:
        raise ModelError(
            f"student.width: a {config.model_type} cannot be made narrower, only {', '.join(KINDS)}; leave "
            "it out, and choose layers"
        )
    made, sizes = plain_config(config), width.sizes
    for name, size in sizes.items():
        if size > (whole := getattr(config, name)):
            raise ModelError(f"student.width: {name} is to be {size}, but is {whole}; choose 1 to {whole}")
    groups, of_each, heads = config.num_key_value_heads, _heads_of_group(config), config.num_attention_heads
    if (wanted := sizes.get("num_attention_heads", heads)) % groups and wanted % of_each:
        raise ModelError(
            f"student.width.heads: found {wanted}; the {heads} share {groups} key and value heads: choose a "
            f"multiple of {of_each}, for whole groups, or of {groups}, for as many of each"
        )
    made.head_dim = _head_size(config)
    made.num_key_value_heads = groups if wanted % of_each else wanted // of_each
    try:
        for name, size in sizes.items():
            setattr(made, name, size)
        return type(made).from_dict(made.to_dict())  # as it will be read again
    except (StrictDataclassError, ValueError) as error:
        raise ModelError(
            f"student.width: transformers makes no {config.model_type} of {made.hidden_size} channels and "
            f"{wanted} heads; choose width.hidden a multiple of the heads"
        ) from error


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _heads_of_group(config: PreTrainedConfig) -> int:
    return config.num_attention_heads // config.num_key_value_heads


@dataclass(frozen=True)
class Importance:
    """How much each part of a model gives on text: means over positions, then L2 norms over rows."""

    hidden: Tensor  # [H] of the norms' outputs, all norms together
    neurons: Tensor  # [L, I] of what MLPs hand to `down_proj`
    heads: Tensor  # [L, A] of each head's output, by its L2 norm, before `o_proj`


@torch.no_grad()
def importance(model: PreTrainedModel, input_ids: Tensor) -> Importance:
    """Of each hidden channel, MLP neuron and head of a model, on [B, T] text without padding.

    Reference: Muralidharan et al. 2024, section 2.2
    """
    seen: dict[str, list[Tensor]] = {"norms": [], "down_proj": [], "o_proj": []}

    def note(name: str, module: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
        values = (output if name == "norms" else args[0]).double()
        if name == "o_proj":
            values = values.unflatten(-1, (-1, _head_size(model.config))).norm(dim=-1)
        seen[name].append(values.abs().mean(1).norm(dim=0))

    with ExitStack() as hooks:
        for name, module in model.base_model.named_modules():
            part = name.split(".")[-1]
            if (what := "norms" if part in NORMS else part) in seen:
                hooks.enter_context(module.register_forward_hook(partial(note, what)))
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    hidden, neurons, heads = (torch.stack(each) for each in seen.values())
    return Importance(hidden.sum(0), neurons, heads)


def narrower(model: PreTrainedModel, width: WidthConfig, input_ids: Tensor) -> PreTrainedModel:
    """A copy of a model with these sizes, of its most important parts in the order that they had.

    A norm's weights are multiplied by √(H / H'), so that it gives what it gave where the channels that leave
    were zero.

    Args:
        input_ids: [B, T] text without padding, on which importance is seen.

    Raises:
        ModelError: see `with_width`.
    """
    config, seen = with_width(model.config, width), importance(model, input_ids)
    hidden, scale = most(seen.hidden, config.hidden_size), model.config.hidden_size / config.hidden_size
    every = [
        {
            "hidden": hidden,
            "neurons": most(neurons, config.intermediate_size),
            **_heads(heads, model.config, config),
        }
        for neurons, heads in zip(seen.neurons, seen.heads, strict=True)
    ]
    with no_init_weights():  # every weight is the model's
        made = type(model)(config).to(model.dtype)
    made.tie_weights()
    prefix, state = layers_name(model) + ".", {}
    for name, value in model.state_dict().items():
        part = name.split(".")[-2]
        kept = every[int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else 0]
        for axis, of in enumerate(AXES.get(part, ("hidden",))[: value.ndim]):
            value = value if of == "all" else value.index_select(axis, kept[of])
        state[name] = value * scale**0.5 if part in NORMS else value
    made.load_state_dict(state)
    if made.can_generate():  # without the model's sampling habits
        made.generation_config = plain_generation(model)
    return made.eval()


def most(importance: Tensor, count: int) -> Tensor:
    """The numbers of the `count` most important, rising."""
    return importance.topk(count).indices.sort().values


def _heads(importance: Tensor, before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Tensor]:
    """Of a layer's [A] heads those that stay: the rows that they have in queries, and in keys and values."""
    grouped = importance.unflatten(0, (before.num_key_value_heads, -1))
    groups = most(grouped.norm(dim=1), after.num_key_value_heads)
    heads = [most(grouped[group], _heads_of_group(after)) + group * grouped.shape[1] for group in groups]
    size = torch.arange(after.head_dim, device=importance.device)
    numbers = {"heads": torch.cat(heads), "kv_heads": groups}
    return {name: (each[:, None] * after.head_dim + size).flatten() for name, each in numbers.items()}
