"""What is kept of each token that a teacher predicts, and how the objective reads it.

`hidden`: what its head reads; with the head beside it every divergence, at any temperature.  All logits where
a head is more than a matrix, or there are classes.
`top_k`: the likeliest k tokens, and the mass of all others at some temperatures; for kd of loss.top_k.
`samples`: tokens that it drew at some temperatures; for a forward KL of loss.samples.

Axes: N kept tokens, V vocabulary, H hidden, k likeliest tokens, s draws, m temperatures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdlib.errors import ConfigError
from kdlib.losses.chunked import Weighted
from kdlib.losses.divergences import KNOWN
from kdlib.losses.signals import DenseSignal, Features, Form, LinearSignal, PartSignal, Signal, wide, widest
from kdlib.losses.terms import OnSamples, OnTopK, accuracy, cross_entropy, log_probs, of_tokens

CHUNK = 128  # tokens whose logits exist at a time
LAYER = "layer_{}"  # what a layer of this number put out
ALONE = (cross_entropy, accuracy)  # terms that look at no teacher
WHOLE = "`teacher: {cache: hidden}` keeps what every term needs"


@dataclass(frozen=True)
class Head:
    """A teacher's: what makes logits of the hidden states that are kept."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    form: Form


@dataclass(frozen=True)
class Recipe:
    """What is kept of each token."""

    form: str  # hidden, top_k or samples
    vocabulary: int
    hidden_size: int
    count: int = 0  # k, or draws at each temperature
    temperatures: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()  # whose outputs are kept too
    experts: str = "topk"  # how they are asked: see kdlib.routing

    @property
    def bytes_per_token(self) -> int:
        """Before they are compressed, where the head is a matrix."""
        wide = 2 if self.vocabulary <= 2**16 else 4
        each = {
            "hidden": 2 * self.hidden_size,
            "top_k": (wide + 2) * self.count + 2 * len(self.temperatures),
            "samples": (wide * self.count + 4) * len(self.temperatures),
        }
        return each[self.form] + 2 * self.hidden_size * len(self.layers)

    def taken(self, signal: Signal, seed: int) -> dict[str, Tensor]:
        """Of a teacher's signal, what is kept: {name: [N, …]}, on the CPU.

        Args:
            seed: of the draws.
        """
        states = signal.features.hidden if signal.features else ()
        beside = {LAYER.format(n): half(each) for n, each in zip(self.layers, states, strict=True)}
        if self.form == "hidden" and isinstance(signal, LinearSignal):
            return {"hidden": half(signal.hidden), **beside}
        generator = torch.Generator(signal.device).manual_seed(seed)
        parts = [self._of_logits(each, generator) for each in _by_chunk(signal)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | beside

    def _of_logits(self, logits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if self.form == "hidden":
            return {"logits": logits.cpu()}
        if self.form == "top_k":
            # by logits: a softmax in float32 makes some of them equal
            values, ids = logits.topk(min(self.count, self.vocabulary), dim=-1)
            values = values - logits.logsumexp(-1, keepdim=True)
            tails = [of_tokens(log_probs(logits, t), ids)[:, -1:] for t in self.temperatures]
            least = torch.finfo(torch.float16).min
            values, tail = (each.clamp(min=least).half() for each in (values, torch.cat(tails, -1)))
            return {"ids": ids.cpu(), "values": values.cpu(), "tails": tail.cpu()}
        each = [log_probs(logits, t) for t in self.temperatures]
        drawn = [p.exp().multinomial(self.count, replacement=True, generator=generator) for p in each]
        entropies = [-(p.exp() * p.masked_fill(p.isneginf(), 0.0)).sum(-1) for p in each]
        return {"ids": torch.cat(drawn, -1).cpu(), "entropies": torch.stack(entropies, -1).float().cpu()}

    def said(self, kept: Mapping[str, Tensor], counts: list[int], head: Head | None) -> Signal:
        """A teacher's signal, of what was kept.

        Args:
            counts: tokens of each row.
        """
        states = [kept[LAYER.format(n)].float() for n in self.layers]
        beside = Features(counts, states, projected=states) if states else None
        if "logits" in kept:
            return DenseSignal(kept["logits"], beside)
        if head is not None and self.form == "hidden":
            return LinearSignal(kept["hidden"], head.weight, head.bias, head.form, beside)
        ids = kept["ids"].float()  # exact up to 2^24
        if self.form == "top_k":
            packed = torch.cat([ids, kept["values"].float(), kept["tails"].float()], -1)
            return TopKSignal(packed, beside, recipe=self)
        return SamplesSignal(torch.cat([ids, kept["entropies"]], -1), beside, recipe=self)


def half(states: Tensor) -> Tensor:
    """Hidden states as they are kept: 8 bits of precision, which they are computed in on most devices."""
    return states.detach().to(torch.bfloat16).cpu()


def _by_chunk(signal: Signal) -> Iterator[Tensor]:
    """[n, V] logits in float32 at least."""
    ready = signal.cast()
    for start in range(0, max(len(signal), 1), CHUNK):
        logits = ready.logits(slice(start, start + CHUNK))
        yield logits.float() if logits.dtype.itemsize < 4 else logits


@dataclass(frozen=True)
class ReadPart(PartSignal):
    """A PartSignal of a recipe."""

    recipe: Recipe = Recipe("top_k", 0, 0)

    def read_by(self, name: str, term: Weighted) -> Weighted:
        """kd's function, of what was kept; those that look at no teacher as they are."""
        if term.function in ALONE:
            return term
        if term.temperature not in self.recipe.temperatures:
            kept = ", ".join(f"{each:g}" for each in self.recipe.temperatures)
            raise ConfigError(
                f"teacher.cache: {name} is asked at T = {term.temperature:g}, and the teacher's "
                f"{self.recipe.form} were kept at {kept}; list it in teacher.cache.temperatures, or {WHOLE}"
            )
        at = self.recipe.temperatures.index(term.temperature)
        return replace(term, function=self._function(name, term.function, at))

    def _function(self, name: str, function: Any, at: int) -> Any:
        raise NotImplementedError

    def _refused(self, name: str) -> ConfigError:
        return ConfigError(
            f"teacher.cache: {name} needs more than the {self.recipe.form} that were kept; {WHOLE}"
        )


@dataclass(frozen=True)
class TopKSignal(ReadPart):
    """values: [N, k ids, k log-probabilities at T = 1, m log-masses of all other tokens]."""

    def _function(self, name: str, function: Any, at: int) -> Any:
        """That of the top k, or of fewer."""
        asked, kept = getattr(function, "divergence", None), min(self.recipe.count, self.recipe.vocabulary)
        if not isinstance(asked, OnTopK) or (asked.k > kept and kept < self.recipe.vocabulary):
            raise self._refused(name)
        return OnKept(asked, kept, at, function.power)


@dataclass(frozen=True)
class OnKept:
    """T^power x a divergence of the top k and the tail, of a teacher's that were kept: a TokenFunction."""

    divergence: OnTopK
    kept: int
    column: int  # of the tails
    power: int

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        """
        Args:
            teacher: as of TopKSignal; targets: not looked at.
        """
        k, least = self.kept, self.divergence.k
        ids, values = teacher[:, :k].long(), widest(teacher[:, k : 2 * k]) / temperature
        tail = widest(teacher[:, 2 * k + self.column, None])
        # the k share what the tail leaves: with it they are a distribution, whatever rounding did
        theirs = values.log_softmax(-1) + torch.log(-torch.expm1(tail))
        if least < k:
            tail = torch.cat([theirs[:, least:], tail], -1).logsumexp(-1, keepdim=True)
            ids, theirs = ids[:, :least], theirs[:, :least]
        renormalise = self.divergence.renormalise
        theirs = theirs.log_softmax(-1) if renormalise else torch.cat([theirs, tail], -1)
        ours = of_tokens(log_probs(student, temperature), ids, renormalise=renormalise)
        value = self.divergence.divergence(ours, theirs).to(wide(student.dtype))
        return temperature**self.power * value


@dataclass(frozen=True)
class SamplesSignal(ReadPart):
    """values: [N, s ids at each of m temperatures, m entropies]."""

    def _function(self, name: str, function: Any, at: int) -> Any:
        asked = getattr(function, "divergence", None)
        if not isinstance(asked, OnSamples) or asked.divergence is not KNOWN["forward_kl"].function:
            raise self._refused(name)
        if asked.count > self.recipe.count:
            raise self._refused(f"{name} of {asked.count} samples")
        return OnDraws(at * self.recipe.count, asked.count, at - len(self.recipe.temperatures))


@dataclass(frozen=True)
class OnDraws:
    """T^2 KL(teacher || student), its sum over the vocabulary estimated by tokens that the teacher drew.

    A TokenFunction.  Of a KL alone the student's part needs no teacher's probabilities: the mean of
    -log student over what the teacher draws, less the teacher's entropy.  Unbiased, value and gradient.
    """

    first: int  # column of its ids
    count: int
    entropy: int  # its column

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
        """
        Args:
            teacher: as of SamplesSignal; targets: not looked at.
        """
        ours = log_probs(student, temperature)
        ids = teacher[:, self.first : self.first + self.count].long()
        drawn = ours.gather(-1, ids)
        return temperature**2 * (-drawn.mean(-1) - teacher[:, self.entropy])
