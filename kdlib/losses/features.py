"""What goes on inside: hidden states and attention maps of chosen layers, student's against teacher's.

Axes: N kept tokens, H hidden, A heads, T positions.  Every function returns [N], one value per token, in
float32 (float64 for float64 inputs); a feature term is masked and normalised as every other term is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.config.terms import GATED, ROUTER, check_temperature
from kdlib.losses.divergences import KNOWN
from kdlib.losses.signals import Signal, wide
from kdlib.schedulers import Schedule

LayerPairs = Sequence[tuple[int, int]]  # (student's layer, teacher's layer), counted from 0


def hidden_distance(student: Tensor, teacher: Tensor, *, normalise: bool = True) -> Tensor:
    """How far apart two hidden states are; 0 where they are equal (normalised: point the same way).

    Args:
        student, teacher: [N, H].
        normalise: compare directions, |u - v|^2 of unit vectors = 2 - 2 cos, from 0 to 4.  Otherwise the mean
            squared difference per dimension, which the few largest dimensions of a language model dominate.

    Reference: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351
    """
    student, teacher = _wide(student), _wide(teacher)
    if normalise:
        return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)
    return (student - teacher).square().mean(-1)


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently two attention layers look back from a token: nats, 0 where they agree.

    The mean over the student's heads of KL(teacher || 0.1 teacher + 0.9 student); not of the KL itself, as
    attention rounds to an exact 0 in places.  Where head counts differ, each student head is held against the
    mean of the teacher's heads at its place in the order.

    Args:
        student: [N, A, T] attention probabilities.
        teacher: [N, A', T] likewise.

    Reference: Wang et al. 2020 (MiniLM), https://arxiv.org/abs/2002.10957, with a skewed divergence and every
        head
    """
    student, teacher = _wide(student), _wide(teacher)
    if teacher.shape[1] != student.shape[1]:
        teacher = F.adaptive_avg_pool1d(teacher.transpose(1, 2), student.shape[1]).transpose(1, 2)
    return KNOWN["skewed_forward_kl"].function(_log(student), _log(teacher)).mean(-1)


def relational_distance(student: Tensor, teacher: Tensor, rows: Tensor | Sequence[int]) -> Tensor:
    """How differently two models relate a token to the others of its row, from 0 to 4.

    The mean squared difference of cosines; 0 where a row has one kept token.  Needs no projection, as only
    angles within one model are compared.

    Args:
        student: [N, H].
        teacher: [N, H'].
        rows: [N] rising row numbers, or how many tokens each row has, which asks no device; tokens of other
            rows are not compared, so batches may be cut anywhere.

    Reference: Park et al. 2019 (RKD), https://arxiv.org/abs/1904.05068; Tung & Mori 2019,
        https://arxiv.org/abs/1907.09682
    """
    values = []
    for ours, theirs in _row_by_row(student, teacher, rows):
        squares = (ours @ ours.T - theirs @ theirs.T).square()
        values.append((squares.sum(-1) - squares.diagonal()) / max(len(squares) - 1, 1))
    return torch.cat(values) if values else _wide(student).sum(-1)  # no token kept: [0], with a graph


def contrastive_loss(
    student: Tensor, teacher: Tensor, rows: Tensor | Sequence[int], *, temperature: float = 0.1
) -> Tensor:
    """-log of the chance to pick the teacher's state of the same token among those of its row: InfoNCE, nats.

    Not 0 where the two agree, as other tokens of a row are alike too; 0 where a row has one kept token.

    Args:
        student, teacher: [N, H], projected to one size.
        rows: as of `relational_distance`.
        temperature: of the softmax over cosines; smaller looks at the nearest wrong token more.

    Reference: Tian et al. 2020 (CRD), https://arxiv.org/abs/1910.10699, with the negatives of the token's own
        row
    """
    check_temperature(temperature)
    values = []
    for ours, theirs in _row_by_row(student, teacher, rows):
        own = torch.arange(len(ours), device=ours.device)
        values.append(F.cross_entropy(ours @ theirs.T / temperature, own, reduction="none"))
    return torch.cat(values) if values else _wide(student).sum(-1)


@dataclass(frozen=True)
class FeatureTerm:
    """A term on what goes on inside: the mean, over the pairs of layers, of one of the functions above."""

    per_pair: Callable[..., Tensor]  # (student's, teacher's, rows, temperature, normalise) -> [N]
    attention: bool = False  # of the maps, not of the hidden states
    projected: bool = False  # needs the student's states in the teacher's size

    def values(
        self, student: Signal, teacher: Signal | None, *, temperature: float, normalise: bool
    ) -> Tensor:
        """[N] per-token values of two signals that have what this term looks at."""
        inside, other = student.features, None if teacher is None else teacher.features
        assert inside is not None
        assert other is not None
        ours, theirs = (inside.projected if self.projected else inside.hidden), other.hidden
        if self.attention:
            ours, theirs = inside.attention, other.attention
        how = inside.rows, temperature, normalise
        return torch.stack([self.per_pair(a, b, *how) for a, b in zip(ours, theirs, strict=True)]).mean(0)


FEATURE_TERMS = {
    "hidden": FeatureTerm(
        lambda a, b, rows, temperature, normalise: hidden_distance(a, b, normalise=normalise), projected=True
    ),
    "attention": FeatureTerm(lambda a, b, *_: attention_divergence(a, b), attention=True),
    "relational": FeatureTerm(lambda a, b, rows, *_: relational_distance(a, b, rows)),
    "contrastive": FeatureTerm(
        lambda a, b, rows, temperature, _: contrastive_loss(a, b, rows, temperature=temperature),
        projected=True,
    ),
}
"""By the names that a config may weight; kdlib.config.loss, which loads no torch, lists them too."""


def feature_terms(names: Iterable[str]) -> list[FeatureTerm]:
    """Those of these names that are feature terms."""
    return [FEATURE_TERMS[name] for name in names if name in FEATURE_TERMS]


@dataclass(frozen=True)
class RouteAt:
    """How a gate chooses at one moment of training."""

    top_k: int  # sources of each token
    temperature: float = 1.0  # of its softmax
    noise: float = 0.0  # standard deviation, on its logits, in training alone

    def __str__(self) -> str:
        return f"routed, top-{self.top_k} by a gate at T={self.temperature:g}"


@dataclass(frozen=True)
class Route:
    """How a gate chooses over training."""

    top_k: Schedule
    temperature: Schedule
    noise: Schedule

    def at(self, fraction: float, *, noisy: bool) -> RouteAt:
        """At this fraction of training, 0 to 1; not `noisy`, without exploration."""
        noise = self.noise(fraction) if noisy else 0.0
        return RouteAt(self.k(fraction), self.temperature(fraction), noise)

    def k(self, fraction: float) -> int:
        """Sources that each token is given."""
        return round(self.top_k(fraction))


class Gate(Protocol):
    """What chooses, for each token, the teacher's states that a student's is to match."""

    def __call__(
        self, student: Tensor, sources: Tensor, route: RouteAt, *, normalise: bool
    ) -> dict[str, Tensor]:
        """{each of GATED: [N] unweighted values}, of [N, layers, H] projected and [N, sources, H]."""


class Asked(Protocol):
    """An ObjectiveAt, without its import."""

    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def temperatures(self) -> Mapping[str, float]: ...
    @property
    def normalise(self) -> bool: ...
    @property
    def route(self) -> RouteAt | None: ...


def feature_values(student: Signal, teacher: Signal | None, at: Asked) -> dict[str, Tensor]:
    """{term: [N] unweighted values} of those on features; [S] of signals whose features are spans'.

    The router's auxiliary loss is one number for a batch, and counts for each of its kept tokens: over a
    step it is the mean over micro-batches, by their kept tokens.  (transformers adds them up, so that it
    weighs more the more batches are accumulated.)
    """
    found, router = {}, student.features.router if student.features and ROUTER in at.weights else None
    if router is not None:
        found[ROUTER] = router.expand(len(student))
    if at.route and (wanted := [name for name in at.weights if name in GATED]):
        inside, other = student.features, teacher and teacher.features
        assert inside
        assert other
        given = inside.gate(inside.routed, other.routed, at.route, normalise=at.normalise)
        found |= {name: given[name] for name in wanted}
    return found | {
        name: FEATURE_TERMS[name].values(
            student, teacher, temperature=at.temperatures.get(name, 1.0), normalise=at.normalise
        )
        for name in at.weights
        if name in FEATURE_TERMS and name not in found
    }


def layer_pairs(
    spec: str | Mapping[str, int] | LayerPairs, student_layers: int, teacher_layers: int
) -> LayerPairs:
    """Which layers are compared, counted from 0.

    Args:
        spec: `even`: every student layer with the teacher's at the same depth, last with last;
            `{last: k}`: the last k with the last k; or a list of [student's, teacher's].

    Raises:
        ValueError: a model has no such layer.
    """
    if isinstance(spec, str):  # even
        depths = [(i + 1) * teacher_layers / student_layers for i in range(student_layers)]
        return [(i, max(round(depth), 1) - 1) for i, depth in enumerate(depths)]
    if isinstance(spec, Mapping):
        pairs = [(student_layers - i, teacher_layers - i) for i in range(spec["last"], 0, -1)]
    else:
        pairs = [(ours, theirs) for ours, theirs in spec]
    for ours, theirs in pairs:
        if not (0 <= ours < student_layers and 0 <= theirs < teacher_layers):
            raise ValueError(
                f"loss.features.layers {spec}: there is no pair {[ours, theirs]}; the student has layers 0 "
                f"to {student_layers - 1}, the teacher 0 to {teacher_layers - 1}"
            )
    return pairs


def projections(pairs: LayerPairs, student_size: int, teacher_size: int) -> nn.ModuleList | None:
    """A matrix per pair of layers from the student's size to the teacher's; None where they are equal."""
    if student_size == teacher_size:
        return None
    return nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in pairs)


def _row_by_row(
    student: Tensor, teacher: Tensor, rows: Tensor | Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Unit vectors ([n, H], [n, H']) of each row that has kept tokens."""
    counts = rows
    if isinstance(rows, Tensor):
        counts = rows.unique_consecutive(return_counts=True)[1].tolist()
    units = [F.normalize(_wide(hidden), dim=-1).split(list(counts)) for hidden in (student, teacher)]
    return list(zip(*units, strict=True)) if len(student) else []


def _log(probabilities: Tensor) -> Tensor:
    """log, whose gradient at an exact 0 is 0 and not nan."""
    never = probabilities == 0
    return probabilities.masked_fill(never, 1.0).log().masked_fill(never, -torch.inf)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))
