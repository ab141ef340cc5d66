"""A gate: which of the teacher's states each kept token of the student is to match, layer by layer.

A fixed map of layers says that a student's layer does the work of one teacher's layer at every token.  A gate
chooses among all of them (the *sources*), token by token, from the student's state and its gap to each.

Axes: N kept tokens, M student's layers, S sources, H hidden of the teacher, k sources that a token is given.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib.config.loss import RouteConfig
from kdlib.config.run import Config
from kdlib.errors import ConfigError
from kdlib.losses.features import LayerPairs, RouteAt, feature_terms, layer_pairs, projections
from kdlib.losses.objective import Objective
from kdlib.losses.signals import wide, widest
from kdlib.models.teacher import GATE, PROJECTIONS
from kdlib.routing.experts import routers_of
from kdlib.schedulers import sampled


def gaps(student: Tensor, sources: Tensor, *, normalise: bool = True) -> Tensor:
    """How far each state is from each source: `hidden_distance` of every pair, by one product per token.

    Of vectors that are not normalised the mean of the token's sources is taken off first, which changes no
    difference: a few dimensions of a language model are large in all layers, and squares would round.

    Args:
        student: [N, M, H]
        sources: [N, S, H]

    Returns:
        [N, M, S], 0 where the two are equal (normalised: point the same way).
    """
    with torch.autocast(student.device.type, enabled=False):
        dtype = wide(torch.promote_types(student.dtype, sources.dtype))
        ours, theirs = student.to(dtype), sources.to(dtype)
        if normalise:
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        else:
            middle = theirs.mean(1, keepdim=True)
            ours, theirs = ours - middle, theirs - middle
        squares = ours.square().sum(-1)[..., None] + theirs.square().sum(-1)[:, None]
        apart = (squares - 2 * ours @ theirs.transpose(1, 2)).clamp(min=0.0)
        return apart if normalise else apart / student.shape[-1]


class Gate(nn.Module):
    """Chooses k of S sources for each token and each of M student's layers.

    logits = weight · the state's direction + bias - scale · (gap - the source's usual gap).  The k sources
    with the largest logits, noise added in training, are chosen, and weighed by softmax(logits / T) among
    themselves; the hidden term is the sum over them of weight x gap.  So the student's gradient is that of a
    fixed map with these weights.  Routing for distillation has no settled form; choices of ours:

    - *What the gate sees carries no gradient.*  Else the student, and its projection, could lower the term by
      moving so as to be sent to a nearer source, instead of nearer to the one that it was given.
    - *The gate is paid by the expected gap over all sources*, softmax(logits / T) · (gap - usual), and not by
      that of the k chosen: with k = 1 its weight is always 1, and it would never learn.
    - *A gap counts less the source's usual one*, its mean in the optimizer step before, in what the gate sees
      and in what it is paid by.  Else it would choose the source that is nearest (a low layer, whose states
      are all alike) and never anything else; so a token goes where it is nearer than others are.
    - `route_balance`, S · Σ load · p per token, is 1 where sources are used evenly.  The load is that of the
      optimizer step before, over all ranks, so that the term is a mean over tokens like every other.
    - `route_entropy`, nats per token, is what the gate leaves open: made small, each token decides, while the
      balance keeps all sources in use.
    - Noise moves the choice alone; what is paid, and both of these terms, are without it.

    Projections are one per student's layer, shared by its sources, so that these are compared in one space.

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351, for the hidden term of a fixed
        map; Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, for noisy top-k gating; Fedus, Zoph &
        Shazeer 2021 (Switch), https://arxiv.org/abs/2101.03961, for the balance
    """

    load: Tensor  # [M, S] the share of each source in what was chosen, in the step before
    usual: Tensor  # [M, S] its mean gap

    def __init__(
        self,
        layers: Sequence[int],
        sources: Sequence[int | str],
        student_size: int,
        size: int,
        count: int | None = None,
    ) -> None:
        """
        Args:
            layers, sources: the student's and the teacher's, counted from 0; or a module of experts, by name.
            student_size, size: of the student's and the teacher's hidden states.
            count: S, where each expert is a source.
        """
        super().__init__()
        self.layers, self.sources = tuple(layers), tuple(sources)
        shape = len(self.layers), count or len(self.sources)
        self.projections = projections([(n, n) for n in self.layers], student_size, size)
        self.weight = nn.Parameter(torch.zeros(*shape, size))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.scale = nn.Parameter(torch.ones(shape[0], 1))
        self.register_buffer("load", torch.full(shape, 1 / shape[1]))
        self.register_buffer("usual", torch.zeros(shape))
        self.latest: Tensor | None = None  # see `_noted`, of the last micro-batch in training
        self.counts: Tensor | None = None  # of this rank's micro-batches of the optimizer step

    def forward(
        self, student: Tensor, sources: Tensor, route: RouteAt, *, normalise: bool
    ) -> dict[str, Tensor]:
        """{`hidden`, `route_balance`, `route_entropy`: [N] unweighted values, means over the M layers}.

        Args:
            student: [N, M, H] projected; sources: [N, S, H].
        """
        apart = gaps(student, sources, normalise=normalise)
        nearer = apart.detach() - self.usual.to(apart.dtype)
        logits = self._logits(student.detach(), nearer)
        log_p = F.log_softmax(logits / route.temperature, dim=-1)
        p = log_p.exp()
        if self.training and route.noise:
            logits = logits + route.noise * torch.randn_like(logits)
        chosen = logits.detach().topk(route.top_k, dim=-1).indices
        shares = log_p.detach().gather(-1, chosen).softmax(-1)
        matched, paid = (shares * apart.gather(-1, chosen)).sum(-1), (p * nearer).sum(-1)
        self.latest = self._noted(apart, chosen) if self.training else None
        return {
            "hidden": (matched + paid - paid.detach()).mean(-1),
            "route_balance": p.shape[-1] * (p * self.load.to(p.dtype)).sum(-1).mean(-1),
            "route_entropy": -(p * log_p).sum(-1).mean(-1),
        }

    def _logits(self, student: Tensor, nearer: Tensor) -> Tensor:
        """[N, M, S], from [N, M, H] and [N, M, S]."""
        with torch.autocast(student.device.type, enabled=False):
            dtype = nearer.dtype
            directions = F.normalize(student.to(dtype), dim=-1).transpose(0, 1)
            seen = (directions @ self.weight.to(dtype).transpose(1, 2)).transpose(0, 1)
            return seen + self.bias.to(dtype) - self.scale.to(dtype) * nearer

    @torch.no_grad()
    def _noted(self, apart: Tensor, chosen: Tensor) -> Tensor:
        """[3, M, S] sums over the tokens: in which share each source was chosen, its gap, 1."""
        parts = torch.zeros_like(apart).scatter(-1, chosen, 1 / chosen.shape[-1])
        return torch.stack([widest(each).sum(0) for each in (parts, apart, torch.ones_like(apart))])

    def count(self) -> None:
        """The last micro-batch, if it was routed, is of the optimizer step, and not only asked once more."""
        if self.latest is not None:
            self.counts = self.latest if self.counts is None else self.counts + self.latest
        self.latest = None

    @torch.no_grad()
    def settle(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """An optimizer step ends, counted by every rank; the next goes by its load and gaps."""
        if self.counts is None:
            return
        (parts, apart, tokens), self.counts = over_ranks(self.counts), None
        some = tokens > 0
        self.load.copy_(torch.where(some, parts / tokens.clamp(min=1), self.load))
        self.usual.copy_(torch.where(some, apart / tokens.clamp(min=1), self.usual))


def compared_layers(
    config: Config, student: PreTrainedModel, teacher: Any, objective: Objective
) -> LayerPairs:
    """The layers that feature terms compare; the student gets what they need beside it, never saved in it.

    Args:
        teacher: a model; without a gate anything that has its config.

    Raises:
        ConfigError: a model has no such layer, or too few.
    """
    if not feature_terms(objective.weights):
        return ()
    features, every = config.loss.features, objective.in_full
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    try:
        pairs = layer_pairs(features.fixed, ours.num_hidden_layers, theirs.num_hidden_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    made: dict[str, nn.Module | None] = {}
    torch.manual_seed(config.seed)
    with student.device:
        if features.route and every.needs_gate:
            made[GATE] = gate_of(features.route, ours, theirs, routers_of(teacher))
        if every.needs_projection:
            made[PROJECTIONS] = projections(pairs, ours.hidden_size, theirs.hidden_size)
    for name, module in made.items():
        if module is not None:  # float32: without data (meta) no conversion is made
            student.add_module(name, module if student.dtype is torch.float32 else module.to(student.dtype))
    return pairs


def gate_of(
    route: RouteConfig, student: Any, teacher: Any, routers: Mapping[str, nn.Module] | None = None
) -> Gate:
    """The gate that a config asks for, for models of these text configs.

    Args:
        routers: the teacher's; experts of the last one's layer may be sources.

    Raises:
        ConfigError: there are no such layers or no experts, or fewer sources than a token is to be given.
    """
    layers = _layers(route.student_layers, student.num_hidden_layers, "student")
    sources: list[int | str] = [*_layers(route.sources, teacher.num_hidden_layers, "teacher")]
    count = len(sources)
    if route.experts and not routers:
        found = "found true, but the teacher has none; leave it out, or name one that has"
        raise ConfigError(f"loss.features.layers.route.experts: {found}")
    if route.experts:
        name, router = [*routers.items()][-1]
        sources.append(f"{name.rpartition('.')[0]}.experts")
        count += int(router.num_experts)
    if (most := round(max(sampled(route.top_k)))) > count:
        what = "its layers and experts" if route.experts else "the teacher's layers"
        raise ConfigError(
            f"loss.features.layers.route.top_k: found {most}, but there are {count} sources, {what}; lower "
            "it, or give more sources"
        )
    return Gate(layers, sources, student.hidden_size, teacher.hidden_size, count)


def _layers(asked: Any, count: int, who: str) -> list[int]:
    if asked in ("all", "last"):
        return list(range(count)) if asked == "all" else [count - 1]
    if missing := [number for number in asked if number >= count]:
        where = "student_layers" if who == "student" else "sources"
        raise ConfigError(
            f"loss.features.layers.route.{where}: found {missing[0]}, the {who} has layers 0 to {count - 1}"
        )
    return list(asked)
