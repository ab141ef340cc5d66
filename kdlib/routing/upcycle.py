"""A dense model as a mixture of experts that are copies of its MLPs: sparse upcycling.

Before it is trained it says what the dense model says, whoever is asked: k copies of one MLP, whose weights
sum to 1.  Komatsuzaki et al. 2023, https://arxiv.org/abs/2212.05055
"""

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase as Tokenizer,
)
from transformers.initialization import no_init_weights

from kdlib.config.data import DataConfig
from kdlib.data.batches import lengths_of
from kdlib.data.blocks import tokenized
from kdlib.errors import DataError, ModelError, refuse_existing
from kdlib.models.loading import load_model, load_tokenizer, parameters, plain_config, plain_generation
from kdlib.routing.experts import routers_of
from kdlib.sources.documents import read_documents

DENSE = (LlamaForCausalLM, MistralForCausalLM)  # whose layers are a Mixtral's but for the MLP
NOT_OURS = (
    "architectures",
    "model_type",
    "transformers_version",
    "mlp_bias",
    "attention_bias",
    "pretraining_tp",
)
MLP = re.compile(r"(.*\.mlp)\.(gate|up|down)_proj\.weight")
ROWS, LENGTH = 32, 128  # of the text on which routers are calibrated
SPREAD = 3.0  # standard deviation of a calibrated router's logits: of two experts, one gets most of a token
BYTES = 4  # of a weight on disk
BALANCE = 0.01  # of the auxiliary loss, as in Switch (Fedus et al. 2022); transformers' 0.001 balances less


def make(
    source: str, folder: str | Path, experts: int, top_k: int, *, seed: int = 0, text: str | None = None
) -> str:
    """Write `upcycled` of a model named as in `load_model`, and its tokenizer, into a folder; says its size.

    Args:
        text: a source, as data.source, for `calibrate`.

    Raises:
        ConfigError: there is something in this place.
        ModelError: see `upcycled`.
    """
    refuse_existing(folder)
    try:
        made = upcycled(load_model(source), experts, top_k, seed=seed)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    tokenizer = load_tokenizer(source)
    if text is not None:
        calibrate(made, beginnings(text, tokenizer), seed=seed)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = parameters(made)
    idle = sum(each.numel() for name, each in made.named_parameters() if ".experts." in name)
    asked = count - idle * (experts - top_k) // experts
    return (
        f"{count / 1e6:.1f}M parameters ({count * BYTES / 2**30:.2f} GiB), of which a token meets "
        f"{asked / 1e6:.1f}M: {top_k} of {experts} experts in each of {made.config.num_hidden_layers} layers"
    )


@torch.no_grad()
def upcycled(dense: PreTrainedModel, experts: int, top_k: int, *, seed: int = 0) -> MixtralForCausalLM:
    """A Mixtral of the dense model, each MLP copied `experts` times, `top_k` of them asked by each token.

    Its routers are random: of a token's state, which the norm before has made of size 1 and weighted, the
    experts' logits have a standard deviation of about 1.  What tells tokens apart tells their experts apart.
    It is trained with its auxiliary loss (`output_router_logits`).

    Raises:
        ModelError: the model is none of DENSE, or has what a Mixtral has not; or there are too few experts.
    """
    _check(dense, experts, top_k)
    with no_init_weights():  # every weight is the dense model's, or made below
        made = MixtralForCausalLM(_config(dense.config, experts, top_k))
    made.tie_weights()
    state, draw = _copied(dense.state_dict(), experts), torch.Generator().manual_seed(seed)
    for name, size in ((name, each.shape) for name, each in made.state_dict().items() if name not in state):
        norm = state[name.replace("mlp.gate.weight", "post_attention_layernorm.weight")].float()
        state[name] = torch.randn(size, generator=draw) / norm.norm()
    made.load_state_dict(state)
    made.generation_config = plain_generation(dense)
    return made.eval()


@torch.no_grad()
def calibrate(made: PreTrainedModel, ids: Tensor, *, seed: int = 0) -> None:
    """Begin the routers where they tell kinds of tokens apart: a row for each of E clusters of their inputs.

    A row is its cluster's centre without what all tokens share, along which no token is told from another;
    scaled so that logits have the standard deviation SPREAD.  It is still the dense model.

    Args:
        ids: [B, T] text without padding.
    """
    draw, inputs = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    with ExitStack() as hooks:
        for name, router in routers_of(made).items():
            note = partial(lambda name, _, args: inputs.update({name: args[0].flatten(0, -2)}), name)
            hooks.enter_context(router.register_forward_pre_hook(note))
        made(input_ids=ids, use_cache=False)
    for name, router in routers_of(made).items():
        states = inputs[name].float()
        mean, rows = states.mean(0), _centres(states, len(router.weight), draw)
        rows = rows - rows.mean(0)
        rows = rows - (rows @ mean)[:, None] * mean / mean.square().sum()
        router.weight.copy_(rows * SPREAD / (states @ rows.T).std(0).mean())


def _centres(states: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """[count, H] of so many clusters, by Lloyd's k-means from random states."""
    centres = states[torch.randperm(len(states), generator=draw)[:count]].clone()
    for _ in range(20):
        nearest = torch.cdist(states, centres).argmin(1)
        for number in nearest.unique():
            centres[number] = states[nearest == number].mean(0)
    return centres


def beginnings(source: str, tokenizer: Tokenizer) -> Tensor:
    """At most [ROWS, LENGTH] tokens: the beginnings of documents spread over a source.

    Raises:
        DataError: it cannot be read, or no document is as long.
    """
    rows = tokenized(read_documents(DataConfig(source=source))["train"], "text", tokenizer)
    long = np.flatnonzero(lengths_of(rows) >= LENGTH)
    if not len(long):
        raise DataError(
            f"{source}: no document has {LENGTH} tokens, as calibrating routers needs; give another"
        )
    chosen = rows.select(long[:: -(-len(long) // ROWS)])
    return torch.tensor([ids[:LENGTH] for ids in chosen["input_ids"]])


def _check(dense: PreTrainedModel, experts: int, top_k: int) -> None:
    kind, text = type(dense), dense.config
    if kind not in DENSE:
        known = " or ".join(each.__name__.removesuffix("ForCausalLM") for each in DENSE)
        raise ModelError(
            f"found a {text.model_type} model, and experts are made of a {known} one, whose layers are a "
            "Mixtral's but for the MLP; name such a model"
        )
    if biased := [name for name in ("attention_bias", "mlp_bias") if getattr(text, name, False)]:
        raise ModelError(f"the model has {biased[0]}, and a Mixtral has none; name one without biases")
    if not 1 <= top_k <= experts or experts < 2:
        raise ModelError(
            f"found {experts} experts, of which each token asks {top_k}; needed are 2 experts or more, and a "
            "top-k from 1 to as many"
        )


def _config(dense: Any, experts: int, top_k: int) -> MixtralConfig:
    plain = plain_config(dense).to_dict()
    return MixtralConfig(
        **{name: value for name, value in plain.items() if name not in NOT_OURS},
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=True,
        router_aux_loss_coef=BALANCE,
    )


def _copied(dense: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """A Mixtral's weights but for its routers'."""
    state = {name: value for name, value in dense.items() if not MLP.fullmatch(name)}
    for mlp in dict.fromkeys(found[1] for name in dense if (found := MLP.fullmatch(name))):
        gate, up, down = (dense[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1).clone()
        state[f"{mlp}.experts.down_proj"] = down.expand(experts, -1, -1).clone()
    return state
