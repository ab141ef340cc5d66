"""How a teacher's experts are asked while it teaches; evaluation asks it as it was made."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.models.hooks import instead
from kdlib.routing.experts import Answer, Use, heard, routers_of, spread

SCALED = (
    "; their weights are not made to sum to one (norm_topk_prob: false), so all together weigh more than the "
    "likeliest do, and layers give more than they were trained to"
)


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
