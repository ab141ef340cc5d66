"""A model's routers and experts, by transformers' own classes: Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek, …

There every router returns (logits [B·T, E], weights [B·T, k], chosen [B·T, k]) and counts `top_k` on itself;
so a forward hook on it sees who speaks, and may say so.  E experts, k of them asked by each token.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.errors import ModelError

ROUTER = ("top_k", "num_experts", "weight")  # what a router has, by transformers' names


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by their dotted names, in the order of its layers; {} where it is dense."""
    return {
        name: part
        for name, part in model.named_modules()
        if "Router" in type(part).__name__ and all(hasattr(part, each) for each in ROUTER)
    }


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects, of one forward pass made inside, what each router gave its experts: {router: [B·T, E]}.

    The weight of each expert, 0 where it was not asked; without gradient, in float32.

    Raises:
        ModelError: a router was not called: a kernel has taken the place of the module around it.
    """
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(name: str, router: Any, args: Any, output: Any) -> None:
        logits, weights, chosen = output
        spread = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        found[name] = spread.scatter(1, chosen, weights.float())

    with ExitStack() as hooks:
        routers = routers_of(model)
        for name, router in routers.items():
            hooks.enter_context(router.register_forward_hook(partial(note, name)))
        yield found
    if missing := [name for name in routers if name not in found]:
        raise ModelError(
            f"{type(model).__name__}: its router {missing[0]} is not called, as where a kernel from a hub "
            "stands in for its layer; load the model without kernels (use_kernels=False)"
        )
