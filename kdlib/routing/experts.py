"""A model's routers and experts, and how they are asked while it teaches; evaluation asks it as it was made.

By transformers' own classes: Mixtral, Qwen-MoE, OLMoE, gpt-oss, DeepSeek, …  There every router returns
(logits [B·T, E], weights [B·T, k], chosen [B·T, k]) and counts `top_k` on itself; so a forward hook on it
sees who speaks, and may say so.  E experts, k of them asked by each token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.errors import ModelError
from kdlib.models.hooks import instead

ROUTER = ("top_k", "num_experts", "weight")  # what a router has, by transformers' names
Answer = tuple[Tensor, Tensor, Tensor]  # logits [B·T, E], weights [B·T, k], chosen [B·T, k]

SCALED = (
    "; their weights are not made to sum to one (norm_topk_prob: false), so all together weigh more than the "
    "likeliest do, and layers give more than they were trained to"
)


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
        loads = over_ranks(torch.stack([*self.loads.values()]))  # [routers, E]
        busiest = loads.amax(-1) / loads.sum(-1).clamp(min=1) * loads.shape[-1]
        return {
            "expert_entropy": float(totals[0] / totals[1].clamp(min=1)),
            "expert_max_load": float(busiest.mean()),
            "expert_coverage": float((loads > 0).float().mean()),
        }


class Routing:
    """How a teacher's experts are asked while it teaches: the likeliest k of each token, as it was made."""

    draws = 1  # passes, of which the student learns the mean of their probabilities
    learns = False

    def __init__(self, model: nn.Module) -> None:
        self.model, self.routers = model, routers_of(model)
        self.use = Use()

    @contextmanager
    def asked(self, tokens: Tensor) -> Iterator[None]:
        """Inside, one forward pass of the teacher is made so.

        Args:
            tokens: [N] places among the batch's B·T whose use of experts counts: not the padding.
        """
        with instead(*self.changes()), heard(self.model, partial(self.hear, tokens)):
            yield

    def changes(self) -> list[tuple[Any, str, Any]]:
        """(object, attribute, value) that hold while it is asked."""
        return []

    def answer(self, name: str, answer: Answer) -> Answer:
        """What a router is taken to have said."""
        return answer

    def reset(self) -> None:
        """As before a training."""
        self.use = Use()

    def figures(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What is logged of the passes since the last call."""
        use, self.use = self.use, Use()
        return use.figures(over_ranks)

    def hear(self, tokens: Tensor, name: str, answer: Answer) -> Answer:
        """Note what a router gave these tokens; what it is taken to have said."""
        given = self.answer(name, answer)
        with torch.no_grad():
            self.use.add(name, spread(given).index_select(0, tokens))
        return given

    def __str__(self) -> str:
        return f"each token asks the likeliest {_count(self.routers, 'top_k')}"


class AllExperts(Routing):
    """Every expert of every layer takes part, with the weight that the router's probabilities give it."""

    def changes(self) -> list[tuple[Any, str, Any]]:
        return [(router, "top_k", router.num_experts) for router in self.routers.values()]

    def __str__(self) -> str:
        scale = "" if all(map(normalises, self.routers.values())) else SCALED
        return f"each token asks all {_count(self.routers, 'num_experts')}{scale}"


class Augmented(AllExperts):
    """Knowledge augmentation: experts drawn by the router's probabilities, several times over.

    Each draw takes the model's own k experts for each token and layer, without replacement, in proportion to
    the router's probabilities (Gumbel's trick), and weighs them as the model weighs its k.  The student
    learns the mean over draws of their probabilities at T = 1: there forward KL's gradient is linear in them,
    so it is that of learning from each draw, for one product with the student's head in place of one per
    draw.  Costs a forward pass of the teacher per draw.  The draws are fresh in each step, by torch's own
    random numbers.

    Reference: Kim, Chu & Yang 2025, https://arxiv.org/abs/2502.12947
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__(model)
        self.draws = draws
        self.asks = {name: int(router.top_k) for name, router in self.routers.items()}

    def answer(self, name: str, answer: Answer) -> Answer:
        logits, weights, chosen = answer
        noise = torch.empty_like(weights, dtype=torch.float32).exponential_()
        drawn = (weights.float().log() - noise.log()).topk(self.asks[name], dim=-1).indices
        given = weights.gather(-1, drawn)
        if normalises(self.routers[name]):  # to what all had together
            given = given * (weights.sum(-1, keepdim=True) / given.sum(-1, keepdim=True))
        return logits, given, chosen.gather(-1, drawn)

    def __str__(self) -> str:
        of = f"{next(iter(self.asks.values()))} of {_count(self.routers, 'num_experts')}"
        return f"each token asks {of}, drawn by the router's probabilities, {self.draws} times over"


def normalises(router: nn.Module) -> bool:
    """Whether the weights of those asked are made to sum to one; Mixtral and gpt-oss always do."""
    return bool(getattr(router, "norm_topk_prob", True))


def _count(routers: Mapping[str, Any], name: str) -> str:
    return " or ".join(dict.fromkeys(str(getattr(router, name)) for router in routers.values()))
