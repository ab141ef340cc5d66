"""The ledger: what a step cost, term by term, with sum, count and weight kept apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from kdlib.losses.signals import widest

SUM_TOLERANCE = 1e-5  # relative; between the loss that was back-propagated and the sum of its logged terms
EXPLAINED = 1e-3  # relative; how near a factor must be to be named as the reason of a breach


@dataclass(frozen=True)
class Entry:
    """One term of one batch."""

    sum: Tensor  # unweighted, nats; carries the gradient while training
    count: Tensor | int  # kept tokens of the whole optimizer step, all micro-batches and ranks
    weight: float

    @property
    def mean(self) -> Tensor:
        """Unweighted nats per token; 0 where nothing was kept.  Does not wait for the device."""
        return self.sum / torch.as_tensor(self.count, device=self.sum.device).clamp(min=1)

    @property
    def share(self) -> Tensor:
        """What the optimizer sees of this term: weight x mean."""
        return self.weight * self.mean


@dataclass(frozen=True)
class Ledger:
    """All terms of one batch.  A term of weight 0 is not in it."""

    entries: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The loss: sum of weight x sum / count.  The only place where a total is made."""
        return reduce(add, [entry.share for entry in self.entries.values()])


class LedgerWindow:
    """Sums the ledgers of the optimizer steps between two log lines, without waiting for the device.

    In float64: float32 sums of 160,000 micro-batches were off by more than the tolerance.  What goes back is
    summed here too, as the Trainer's own sum is of float32.

    A term's logged value is its mean over the steps in which it was active, and its logged weight the one
    that makes value x weight its mean share over all steps: so the logged terms add up to the logged loss
    even while a weight moves.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}
        self.weights: dict[str, dict[int, float]] = {}  # term -> step -> weight
        self.steps: set[int] = set()
        self.back_propagated: Tensor | float = 0.0
        self.micro_batches = 0

    def add(self, ledger: Ledger, step: int) -> None:
        """Take in a micro-batch of an optimizer step; its entries are divided by the whole step's count."""
        self.steps.add(step)
        for name, entry in ledger.entries.items():  # without their graph
            self.means[name] = self.means.get(name, 0.0) + widest(entry.mean.detach())
            self.shares[name] = self.shares.get(name, 0.0) + widest(entry.share.detach())
            self.weights.setdefault(name, {})[step] = entry.weight

    def went_back(self, loss: Tensor) -> None:
        """Take in what was back-propagated of a micro-batch."""
        self.back_propagated = self.back_propagated + widest(loss.detach())
        self.micro_batches += 1

    def loss(self, over_ranks: Callable[[Tensor], Any] = float) -> float:
        """The mean over the steps of what was back-propagated."""
        return float(over_ranks(torch.as_tensor(self.back_propagated))) / max(len(self.steps), 1)

    @property
    def tolerance(self) -> float:
        """Relative, of `breach`: at least what rounding may do to a sum of so many (Higham 2002, 4.2)."""
        dtype = torch.as_tensor(self.back_propagated).dtype
        return max(SUM_TOLERANCE, self.micro_batches * torch.finfo(dtype).eps)

    def figures(self, over_ranks: Callable[[Tensor], Any] = float) -> dict[str, tuple[float, float]]:
        """{term: (value in nats per token, weight)}; `over_ranks` sums a number over ranks."""
        figures = {}
        for name, total in self.means.items():
            weights = list(self.weights[name].values())
            value = float(over_ranks(total)) / len(weights)
            share = float(over_ranks(self.shares[name])) / len(self.steps)
            unmoved = len(weights) == len(self.steps) and min(weights) == max(weights)
            figures[name] = (value, weights[0] if unmoved or value == 0 else share / value)
        return figures


def breach(
    figures: Mapping[str, tuple[float, float]], loss: float, tolerance: float = SUM_TOLERANCE
) -> str | None:
    """How the logged terms, {name: (value, weight)}, fail to sum to the loss back-propagated, or None.

    A sum cannot prove whose fault it is: a term is named where a usual mistake with it alone explains it.
    """
    shares = {name: value * weight for name, (value, weight) in figures.items()}
    total = sum(shares.values())
    gap = loss - total
    if abs(gap) <= tolerance * max(abs(loss), abs(total)):
        return None
    reasons = []
    for name, share in shares.items():
        weight = figures[name][1]
        mistakes = {
            "was left out": 0.0,
            "was counted twice": 2.0,
            f"was weighted by {weight:g} twice": weight,
            f"was taken without its weight {weight:g}": 1 / weight if weight else 1.0,
        }
        factor = 1 + gap / share if share else 1.0  # with which it would have entered, were all others right
        reasons += [(abs(factor - x), f"{name} {words}") for words, x in mistakes.items() if x != 1]
    miss, reason = min(reasons, default=(float("inf"), ""))
    alike = f": the loss is {loss / total:g} x the sum" if total else ""
    why = f"as if {reason}" if miss <= EXPLAINED else f"no usual mistake with one term explains it{alike}"
    terms = ", ".join(f"{name}: {x} x {weight} = {shares[name]}" for name, (x, weight) in figures.items())
    return f"the terms sum to {total}, but {loss} was back-propagated, {gap:+g}: {why} ({terms})"
