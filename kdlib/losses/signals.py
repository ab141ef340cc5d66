"""What a model said about a batch, and which of its tokens count.

Axes: B batch, T position, N kept tokens, V vocabulary, H hidden, A heads.  The causal shift and the mask
happen once, in `kept`: below it no loss sees a label, a mask or a batch shape.  Where rows are classified, N
are the rows and V the classes.  `rows` are a batch's, [N]; as a slice of a signal, n of its N tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.hardware import product_dtype

FOUND = "kept"  # under which a batch has what `found_in` says
IGNORED = -100  # the label of a token that is not trained on; transformers' own convention


def wide(dtype: torch.dtype) -> torch.dtype:
    """What softmaxes and sums are made in: float32, whatever the model's dtype; float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widest(tensor: Tensor) -> Tensor:
    """In float64, or float32 on a device without it (MPS)."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


@dataclass(frozen=True)
class Kept:
    """The N kept tokens of a batch."""

    positions: Tensor  # [N] into the flattened [B * T], or into [B]: whose output predicts the token
    targets: Tensor  # [N] token ids, or classes
    rows: Tensor  # [N] 0 .. B-1
    counts: Sequence[int] | None = (
        None  # of each row that has kept tokens, where they are known without a wait
    )

    def select(self, outputs: Tensor) -> Tensor:
        """[B, T, X], or [B, X] where rows are classified, to [N, X]: what the kept are predicted from."""
        per_position = outputs if outputs.ndim == 2 else outputs.flatten(0, 1)
        return per_position.index_select(0, self.positions)


def kept(labels: Tensor, found: Any = None) -> Kept:
    """The causal shift and the mask, once for every term: output t predicts token t + 1.

    Args:
        labels: [B, T] token ids, `IGNORED` where a token is not trained on; the first of a row is never
            predicted.  Or [B] classes where rows are classified, `IGNORED` likewise; nothing is shifted then.
        found: what `found_in` says of them, where it was asked: then nothing waits for the labels' device.
    """
    if found is not None:
        positions, counts = found["positions"], found["counts"]
        if labels.ndim == 1:
            return Kept(positions, labels[positions], positions, counts)
        rows = positions.div(labels.shape[1], rounding_mode="floor")
        return Kept(positions, labels.flatten()[positions + 1], rows, counts)
    if labels.ndim == 1:
        (rows,) = (labels != IGNORED).nonzero(as_tuple=True)
        return Kept(positions=rows, targets=labels[rows], rows=rows)
    length = labels.shape[1]
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return Kept(positions=rows * length + columns, targets=labels[rows, columns + 1], rows=rows)


def found_in(labels: Tensor) -> dict[str, Any]:
    """Which tokens of a batch are kept, for `kept`: where its labels lie on the CPU, as collated."""
    tokens = kept(labels)
    counts = tokens.rows.unique_consecutive(return_counts=True)[1].tolist()
    return {"positions": tokens.positions, "counts": counts}


@dataclass(frozen=True)
class Form:
    """How the head's products, hidden @ weight.T + bias, become logits; by default as they are."""

    scale: float = 1.0  # Cohere, Granite
    softcap: float | None = None  # Gemma

    def logits(self, products: Tensor) -> Tensor:
        """softcap · tanh(scale · products / softcap), in float32 at least where there is anything to do."""
        if self == Form():
            return products
        scaled = products.to(wide(products.dtype)) * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


@dataclass(frozen=True)
class Features:
    """What a model had inside at the N kept tokens, for each pair of layers."""

    rows: Tensor | Sequence[int]  # [N], or how many tokens each row has
    hidden: Sequence[Tensor] = ()  # [N, H] each: a layer's output
    attention: Sequence[Tensor] = ()  # [N, A, T] each: how much the token looks at each position
    projected: Sequence[Tensor] = ()  # [N, H of the teacher] each; the student's alone
    router: Tensor | None = None  # the auxiliary loss of its router on this batch; the student's alone
    routed: Tensor | None = None  # [N, layers or sources, H of the teacher]: what a gate looks at
    gate: Any = None  # a kdlib.losses.features.Gate; the student's alone

    def select(self, places: Tensor, counts: Sequence[int]) -> "Features":
        """Of these among the N tokens, `counts` in each row; without maps, whose T is another model's too."""
        hidden, projected = ([each[places] for each in states] for states in (self.hidden, self.projected))
        routed = None if self.routed is None else self.routed[places]
        return replace(self, rows=counts, hidden=hidden, projected=projected, attention=(), routed=routed)


@dataclass(frozen=True)
class DenseSignal:
    """Logits as they are: the reference, and the way for models whose head is not a plain matrix."""

    values: Tensor  # [N, V]
    features: Features | None = None
    form = Form()  # they are logits already

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[n, V]"""
        return self.values[rows]

    def select(self, places: Tensor) -> "DenseSignal":
        """Of these among the N tokens, without features."""
        return DenseSignal(self.values[places])

    def cast(self) -> "DenseSignal":
        """Itself: no head."""
        return self

    @torch.no_grad()
    def write(self, out: Tensor, rows: slice) -> None:
        """Puts logits into `out`, [n, V]."""
        out.copy_(self.values[rows])


@dataclass(frozen=True)
class PartSignal(DenseSignal):
    """What is left of a teacher's distributions where not all is kept: `values` are no logits, but packed.

    See kdlib.cache.parts.
    """

    def read_by(self, name: str, term: Any) -> Any:
        """The Weighted term of this name, made to read them; a ConfigError where too little was kept."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearSignal:
    """Hidden states and the output head, so that logits are only ever made for the rows asked for."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    form: Form = Form()
    features: Features | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: autocast's where active, else the head's; float32 where a CPU would emulate it."""
        kind, asked = self.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind):
            asked = torch.get_autocast_dtype(kind)
        return product_dtype(asked, self.device)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[n, V] in the dtype of the product."""
        ready = self.cast()
        with torch.autocast(self.device.type, enabled=False):
            return self.form.logits(F.linear(ready.hidden[rows], ready.weight, ready.bias))

    def select(self, places: Tensor) -> "LinearSignal":
        """Of these among the N tokens, without features."""
        return replace(self, hidden=self.hidden[places], features=None)

    def cast(self) -> "LinearSignal":
        """The same in the dtype of the products, so that the head is converted once, not for each chunk."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return replace(self, hidden=self.hidden.to(self.dtype), weight=self.weight.to(self.dtype), bias=bias)

    @torch.no_grad()
    def write(self, out: Tensor, rows: slice) -> None:
        """Puts products, not yet logits, into `out`, [n, V] of `dtype`."""
        if self.bias is None:
            torch.mm(self.hidden[rows], self.weight.T, out=out)
        else:
            torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)


@dataclass(frozen=True)
class MeanSignal:
    """Several draws of one teacher as one: the mean of their probabilities at T = 1, logits by the chunk."""

    draws: Sequence["DenseSignal | LinearSignal"]
    features: Features | None = None
    form = Form()  # they are logits already

    def __len__(self) -> int:
        return len(self.draws[0])

    @property
    def vocabulary(self) -> int:
        return self.draws[0].vocabulary

    @property
    def dtype(self) -> torch.dtype:
        return wide(self.draws[0].dtype)

    @property
    def device(self) -> torch.device:
        return self.draws[0].device

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[n, V] log-probabilities."""
        each = [draw.logits(rows).to(self.dtype).log_softmax(-1) for draw in self.draws]
        return torch.stack(each).logsumexp(0) - math.log(len(each))

    def select(self, places: Tensor) -> "MeanSignal":
        """Of these among the N tokens, without features."""
        return MeanSignal([draw.select(places) for draw in self.draws])

    def cast(self) -> "MeanSignal":
        """The same in the dtype of the products."""
        return replace(self, draws=[draw.cast() for draw in self.draws])

    @torch.no_grad()
    def write(self, out: Tensor, rows: slice) -> None:
        """Puts logits into `out`, [n, V]."""
        out.copy_(self.logits(rows))


def mean_of(draws: Sequence["DenseSignal | LinearSignal"]) -> "Signal":
    """One signal of several draws of the same tokens; of what goes on inside the mean too."""
    if len(draws) == 1:
        return draws[0]
    first, inside = draws[0].features, [draw.features for draw in draws if draw.features]
    if first is None:
        return MeanSignal(draws)
    hidden, maps = (
        [torch.stack(each).mean(0) for each in zip(*(getattr(one, name) for one in inside), strict=True)]
        for name in ("hidden", "attention")
    )
    seen = [each.routed for each in inside if each.routed is not None]
    routed = torch.stack(seen).mean(0) if seen else None
    return MeanSignal(draws, replace(first, hidden=hidden, attention=maps, projected=hidden, routed=routed))


Signal = DenseSignal | LinearSignal | MeanSignal


def moved(said: Any, device: torch.device) -> Any:
    """A batch, kept tokens, a signal, or what they are made of, on another device."""
    if isinstance(said, Tensor):
        return said.to(device)
    if isinstance(said, (list, tuple)):
        return type(said)(moved(each, device) for each in said)
    if isinstance(said, dict):
        return {name: moved(each, device) for name, each in said.items()}
    if is_dataclass(said) and not isinstance(said, type):
        parts = {each.name: moved(getattr(said, each.name), device) for each in fields(said) if each.init}
        return replace(said, **parts)
    return said
