"""What a model said about a batch, and which of its tokens count.

Axes: B batch, T position, N kept tokens, V vocabulary, H hidden.  The causal shift and the mask happen once, in `kept`;
below it no loss sees a label, a mask or a batch shape.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not trained on; transformers' own convention


@dataclass(frozen=True)
class Kept:
    """The N kept tokens of a batch: where they are predicted from, what they are, and which row they came from."""

    positions: Tensor  # [N] index into the flattened [B * T]; the position whose output predicts the token
    targets: Tensor  # [N] token ids
    rows: Tensor  # [N] 0 .. B-1

    def select(self, per_position: Tensor) -> Tensor:
        """[B, T, X] to [N, X]: the outputs from which the kept tokens are predicted."""
        return per_position.flatten(0, 1).index_select(0, self.positions)


def kept(labels: Tensor) -> Kept:
    """The causal shift and the mask, once for every term: output t predicts token t + 1.

    Args:
        labels: [B, T] token ids, `IGNORED` where a token is not trained on.  The first of a row is never predicted.
    """
    length = labels.shape[1]
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return Kept(positions=rows * length + columns, targets=labels[rows, columns + 1], rows=rows)


@dataclass(frozen=True)
class DenseSignal:
    """Logits as they are: the reference, and the way for models whose head is not a plain matrix."""

    values: Tensor  # [N, V]

    def __len__(self) -> int:
        return self.values.shape[0]

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[n, V] logits of these kept tokens."""
        return self.values[rows]


@dataclass(frozen=True)
class LinearSignal:
    """Hidden states and the output head, so that logits are only ever made for the rows asked for."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[n, V] logits of these kept tokens, in the dtype of the product (autocast applies)."""
        return F.linear(self.hidden[rows].to(self.dtype), self.weight.to(self.dtype), self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the product with the head is made: autocast's where it is active, else the head's."""
        device = self.hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype


Signal = DenseSignal | LinearSignal
