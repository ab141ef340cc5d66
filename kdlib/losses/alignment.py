"""A teacher with another tokenizer: which of its tokens stand for the same text as the student's.

A span is the fewest tokens of student and teacher that cover the same bytes of the text.  Before it both have
read the same bytes, so what they say there can be compared; what differs is what they can say next.

Axes: N kept tokens of the student's, M of the teacher's, S spans; V vocabulary, student's and teacher's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdlib.config.terms import GATED
from kdlib.losses.signals import FOUND, Features, Kept, Signal, found_in, kept, widest
from kdlib.tokens.vocabulary import Vocabularies

SPANS = "spans"  # under which a batch has them
UNITS = ("tokens", "spans", "single")  # the student's kept tokens; spans; those of one token on both sides
UNIT_OF = {
    **dict.fromkeys(("span_kl", "kl_to_teacher", "agreement"), "single"),
    **dict.fromkeys(("projected_kl", "alm", "uld", *GATED, "relational", "contrastive"), "spans"),
}
"""Of the terms whose value is not of each kept token, where the teacher has a tokenizer of its own."""


class Counts(NamedTuple):
    """What the terms of a whole optimizer step are divided by: all micro-batches, all ranks."""

    tokens: Tensor | int  # the student's kept ones
    spans: Tensor | int
    single: Tensor | int  # spans of one token on both sides

    @property
    def figures(self) -> dict[str, float]:
        """As they are logged."""
        return {
            "kept_tokens": float(self.tokens),
            "spans": float(self.spans),
            "single_spans": float(self.single),
        }


def unit_of(term: str, *, spans: bool) -> str:
    """What a term has a value for: each of the "tokens", the "spans", or the "single" ones.

    Args:
        spans: whether the teacher has a tokenizer of its own.
    """
    return UNIT_OF.get(term, "tokens") if spans else "tokens"


@dataclass(frozen=True)
class Alignment:
    """The S spans of a batch, by their places among the student's N kept tokens and the teacher's M."""

    first: Tensor  # [S] each span's first token among the N
    teacher_first: Tensor  # [S] and among the M
    owner: Tensor  # [N] whose span a token is in; S for one in none
    teacher_owner: Tensor  # [M]
    single: Tensor  # [P] the spans of one token on both sides
    several: Tensor  # [S - P] the others
    rest: Tensor  # [N - S] the student's tokens that begin no span
    counts: list[int]  # spans of each row that has any

    @property
    def spans(self) -> int:
        return len(self.first)

    def at_first(self, values: Tensor) -> Tensor:
        """[S] values of spans to [N], each at its first token, 0 elsewhere."""
        return values.new_zeros(len(self.owner)).index_copy(0, self.first, values)

    def sums(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[N] and [M] values of tokens to [S] and [S], of the spans that they are in."""
        pairs = (student, self.owner), (teacher, self.teacher_owner)
        ours, theirs = (v.new_zeros(self.spans + 1).index_add(0, at, v)[: self.spans] for v, at in pairs)
        return ours, theirs


@dataclass(frozen=True)
class SpanSignal:
    """What a teacher with its own tokenizer said of its tokens, and where they stand beside the student's."""

    said: Signal
    kept: Kept  # the teacher's M tokens
    alignment: Alignment
    vocabularies: Vocabularies

    @property
    def targets(self) -> Tensor:
        """[M]"""
        return self.kept.targets

    @property
    def features(self) -> Features | None:
        return self.said.features

    @property
    def device(self) -> torch.device:
        return self.said.device

    @property
    def counts(self) -> Counts:
        """Of this batch alone."""
        lines = self.alignment
        return Counts(len(lines.owner), lines.spans, len(lines.single))


TeacherSignal = Signal | SpanSignal


def said_of(teacher: TeacherSignal) -> Signal:
    """What it said of its own tokens."""
    return teacher.said if isinstance(teacher, SpanSignal) else teacher


def spans_in(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a batch's Alignment, and of the teacher's Kept; where it lies on the CPU, as collated."""
    found, tokens = batch[SPANS], kept(batch["labels"])
    sizes, teacher_sizes = found["sizes"], found["teacher_sizes"]
    numbers = torch.arange(len(sizes), device=sizes.device)
    first = torch.searchsorted(tokens.positions, found["starts"])
    owner = tokens.positions.new_full((len(tokens.positions),), len(sizes))
    owner[_runs(first, sizes)] = numbers.repeat_interleave(sizes)
    begins = torch.zeros_like(owner, dtype=torch.bool).index_fill(0, first, True)
    single = is_single(found)
    alignment = {
        "first": first,
        "teacher_first": teacher_sizes.cumsum(0) - teacher_sizes,
        "owner": owner,
        "teacher_owner": numbers.repeat_interleave(teacher_sizes),
        "single": single.nonzero()[:, 0],
        "several": (~single).nonzero()[:, 0],
        "rest": (~begins).nonzero()[:, 0],
        "counts": found["rows"].unique_consecutive(return_counts=True)[1].tolist(),
    }
    positions = _runs(found["teacher_starts"], teacher_sizes)
    targets = batch["teacher_input_ids"].flatten()[positions + 1]
    rows = found["rows"].repeat_interleave(teacher_sizes)
    return alignment, {"positions": positions, "targets": targets, "rows": rows}


def single_in(batch: Mapping[str, Any]) -> Tensor:
    """[P] which of the student's N kept tokens are a span of one token on both sides."""
    found, _ = spans_in(batch)
    return found["first"][found["single"]]


def is_single(spans: Mapping[str, Any]) -> Any:
    """[S] whether a span is one token on both sides; of tensors or arrays."""
    return (spans["sizes"] == 1) & (spans["teacher_sizes"] == 1)


def counted(spans: Mapping[str, Tensor]) -> Tensor:
    """[2] how many spans a batch has, and how many of one token on both sides."""
    single = is_single(spans)
    return torch.stack([torch.ones_like(single).sum(), single.sum()])


def with_kept(collate: Callable[[Any], Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A collated batch with what is kept of it, found before it goes to a device."""
    batch = collate(rows)
    return {**batch, FOUND: found_in(batch["labels"]) | ({SPANS: spans_in(batch)} if SPANS in batch else {})}


def _runs(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, … of each, one after the other."""
    before = sizes.cumsum(0) - sizes
    return (starts - before).repeat_interleave(sizes) + torch.arange(int(sizes.sum()), device=sizes.device)


@dataclass(frozen=True)
class Arranged:
    """Tokens that terms look at, in an order in which those of the same terms stand together."""

    student: Signal
    teacher: Signal | None  # of the first of them, those that a term asks it about
    targets: Tensor
    order: Tensor | None  # their places among the N; None where all stand there
    segments: Sequence[tuple[int, Sequence[int]]]  # how many tokens, and the numbers of the terms they have


def arranged(
    student: Signal, teacher: TeacherSignal | None, targets: Tensor, units: Sequence[str]
) -> Arranged:
    """Which tokens the terms on logits look at: all, the first of each span, or spans of one token.

    Args:
        units: `unit_of` each term.
    """
    every = [number for number, _ in enumerate(units)]
    if not isinstance(teacher, SpanSignal):
        return Arranged(student, teacher, targets, None, [(len(student), every)])
    lines, tokens = teacher.alignment, [number for number in every if units[number] == "tokens"]
    if len(tokens) == len(units):
        return Arranged(student, None, targets, None, [(len(student), every)])
    starts = [number for number in every if units[number] != "single"]
    looks = [(lines.first[lines.single], every), (lines.first[lines.several], starts), (lines.rest, tokens)]
    looks = [(places, having) for places, having in looks if having]
    order = torch.cat([places for places, _ in looks])
    asked = torch.cat([lines.single, lines.several]) if len(starts) > len(tokens) else lines.single
    said = teacher.said.select(lines.teacher_first[asked])
    segments = [(len(places), having) for places, having in looks]
    return Arranged(student.select(order), said, targets[order], order, segments)


def features_beside(student: Signal, teacher: TeacherSignal | None) -> tuple[Signal, Signal | None]:
    """Both with their features where a span is predicted from, if there are: of what has read the same."""
    if not isinstance(teacher, SpanSignal):
        return student, teacher
    lines, (ours, theirs) = teacher.alignment, (student.features, teacher.features)
    if ours is None or theirs is None:
        return student, teacher.said
    return (
        replace(student, features=ours.select(lines.first, lines.counts)),
        replace(teacher.said, features=theirs.select(lines.teacher_first, lines.counts)),
    )


def alm(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How differently two models expect the bytes of a span, however each cuts them: [S] nats.

    Approximate likelihood matching: τ times the KL between two coins, which fall on "these bytes" with the
    models' probabilities of the span to the power of 1 / τ.  Of the binary cross-entropy of the paper it is
    what depends on the student: 0 where they agree.  At τ = 100, as there, nearly KL's summand without
    normalisation, b·log(b / a) - b + a for surprisals a (student's) and b, so that all spans count; at τ = 1
    likely ones count most.  Needs the tokens that came, and no other: no bias of a tokenizer's cutting is
    taken out (the paper's debiasing is not here).  Costs one more product with the student's head.

    Args:
        student, teacher: [S] log-probability of each span.
        temperature: τ.

    Reference: Minixhofer, Vulic & Ponti 2025 (ALM), https://arxiv.org/abs/2503.20083
    """
    ours, theirs = (widest(each).clamp(max=-1e-12) / temperature for each in (student, teacher))
    kept_back, theirs_back = (torch.log(-torch.expm1(each)) for each in (ours, theirs))
    p = theirs.exp()
    return temperature * (p * (theirs - ours) - torch.expm1(theirs) * (theirs_back - kept_back))
