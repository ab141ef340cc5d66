"""A model's routers and experts, by transformers' own classes: Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek, …

There every router returns (logits [B·T, E], weights [B·T, k], chosen [B·T, k]) and counts `top_k` on itself;
so a forward hook on it sees who speaks, and may say so.  E experts, k of them asked by each token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.errors import ModelError

ROUTER = ("top_k", "num_experts", "weight")  # what a router has, by transformers' names
Answer = tuple[Tensor, Tensor, Tensor]  # logits [B·T, E], weights [B·T, k], chosen [B·T, k]


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by their dotted names, in the order of its layers; {} where it is dense."""
    return {
        name: part
        for name, part in model.named_modules()
        if "Router" in type(part).__name__ and all(hasattr(part, each) for each in ROUTER)
    }


def spread(answer: Answer) -> Tensor:
    """[B·T, E] the weight that each expert is given, in float32; 0 where it is not asked."""
    logits, weights, chosen = answer
    none = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    return none.scatter(1, chosen, weights.float())


@contextmanager
def heard(model: nn.Module, each: Callable[[str, Answer], Answer | None]) -> Iterator[None]:
    """Calls `each` with every router's name and answer in one forward pass made inside; it may give another.

    Raises:
        ModelError: a router was not called: a kernel has taken the place of the module around it.
    """
    called = set()

    def hook(name: str, router: nn.Module, args: Any, answer: Answer) -> Answer | None:
        called.add(name)
        return each(name, answer)

    with ExitStack() as hooks:
        routers = routers_of(model)
        for name, router in routers.items():
            hooks.enter_context(router.register_forward_hook(partial(hook, name)))
        yield
    if missing := [name for name in routers if name not in called]:
        raise ModelError(
            f"{type(model).__name__}: its router {missing[0]} is not called, as where a kernel from a hub "
            "stands in for its layer; load the model without kernels (use_kernels=False)"
        )


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects, of one forward pass made inside, `spread` of each router: {router: [B·T, E]}, no gradient."""
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(name: str, answer: Answer) -> None:
        found[name] = spread(answer)

    with heard(model, note):
        yield found


class Use:
    """How evenly experts are used, over some forward passes; nothing waits for the device."""

    def __init__(self) -> None:
        self.loads: dict[str, Tensor] = {}  # router → [E] sum over tokens of each expert's share
        self.entropies: Tensor | float = 0.0
        self.answers = 0  # tokens × routers

    def add(self, name: str, weights: Tensor) -> None:
        """Take in what one router gave: [N, E]."""
        shares = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        self.loads[name] = self.loads.get(name, 0.0) + shares.sum(0)
        self.entropies = self.entropies + torch.special.entr(shares).sum()
        self.answers += len(shares)

    def figures(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """By the names of the log; {} where nothing was heard.

        `expert_entropy`: of a token's shares, nats, mean over tokens and layers.  `expert_max_load`: the
        busiest expert's share, times E, mean over layers: 1 where all are used alike.  `expert_coverage`: of
        all experts of all layers, the share that was asked at all.
        """
        if not self.loads:
            return {}
        device = next(iter(self.loads.values())).device
        totals = over_ranks(torch.tensor([float(self.entropies), float(self.answers)], device=device))
        loads = [over_ranks(load) for load in self.loads.values()]
        busiest = [float(load.max() / load.sum().clamp(min=1) * len(load)) for load in loads]
        return {
            "expert_entropy": float(totals[0] / totals[1].clamp(min=1)),
            "expert_max_load": sum(busiest) / len(busiest),
            "expert_coverage": float((torch.cat(loads) > 0).float().mean()),
        }
