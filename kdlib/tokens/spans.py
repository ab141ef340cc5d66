"""Spans: where two tokenizers cut a text at the same byte, so that tokens between stand for the same bytes.

Ends are bytes of the text, not characters or decoded strings: a character that is split into several tokens
is cut where it is cut, and what a token leaves out or changes (white space, capitals, accents) moves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.tokens.vocabulary import beginning, ending, family_of, special_ids, token_bytes

NO_BYTES = -(2**40)  # the size of a token that stands for none, so that no sum with it is a text's


class Reader:
    """A tokenizer that says at which byte of a text each of its tokens ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises a ModelError where `token_bytes` does."""
        self.tokenizer, self.pieces, self.special = tokenizer, token_bytes(tokenizer), special_ids(tokenizer)
        self.sizes = np.array([NO_BYTES if piece is None else len(piece) for piece in self.pieces])
        self.drops_bytes = family_of(tokenizer) == "ByteLevel"  # those that its vocabulary lacks
        self.named = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

    def __reduce__(self) -> tuple:
        """By its tokenizer alone: what `datasets` hashes, and hands to other processes."""
        return Reader, (self.tokenizer,)

    def __call__(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray | None]]:
        """Of each text its token ids, without special ones around them, and where they end.

        No ends where a tokenizer does not give the text back: it leaves out bytes that its vocabulary lacks,
        or its tokens do not cover the text in order.
        """
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        each = zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
        return [
            (ids, None if self.drops_bytes and self._lacks(text, ids) else self._ends(text, ids, offsets))
            for text, ids, offsets in each
        ]

    def _lacks(self, text: str, ids: Sequence[int]) -> bool:
        """Whether byte-level tokens are not all of a text: offsets after what they leave out are wrong."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        data = (normalizer.normalize_str(text) if normalizer else text).encode()
        made = b"".join([self.pieces[n] or self.named.get(n, "").encode() for n in ids])
        return made not in (data, b" " + data)

    def _ends(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """[tokens] bytes.  Marks that no token covers belong to the one before, white space to the one after.

        At the end of the text all belongs to the last.  Tokens that share characters (bytes of one) end where
        their own bytes do, if these are the text's; else only the last of them ends, and those before have
        no width.
        """
        data = np.frombuffer(text.encode(), np.uint8)
        if not len(ids):
            return None if len(data) else np.zeros(0, np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        at = np.zeros(len(codes) + 1, np.int64)  # the byte at which each character starts
        np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=at[1:])
        starts, ends = np.array(offsets, np.int64).T.copy()
        if (np.diff(ends) < 0).any():
            return None
        blanks = np.append(np.flatnonzero(np.char.isspace(codes.view("U1"))), len(codes))
        blank = blanks[np.searchsorted(blanks, ends[:-1])]
        ends[:-1] = np.maximum(ends[:-1], np.minimum(starts[1:], blank))
        starts, ends = at[starts], at[ends]
        ends[-1] = len(data)
        firsts = np.flatnonzero(np.append(True, starts[1:] >= ends[:-1]))  # of groups that share characters
        counts = np.diff(firsts, append=len(ids))
        if (counts == 1).all():
            return ends
        widths, own = np.diff(ends[firsts + counts - 1], prepend=0), self.sizes[ids]
        fits = (counts > 1) & (widths > 0) & (np.add.reduceat(own, firsts) == widths)
        if fits.any():  # in size; in bytes?
            made = b"".join([self.pieces[ids[n]] for n in np.flatnonzero(np.repeat(fits, counts))])
            same = np.frombuffer(made, np.uint8) == data[np.repeat(fits, widths)]
            fits[fits] = np.logical_and.reduceat(same, np.cumsum(widths[fits]) - widths[fits])
        begins, before = np.cumsum(widths) - widths, np.cumsum(own) - own
        inside = np.repeat(begins - before[firsts], counts) + before + own
        several, fitting = np.repeat(counts > 1, counts), np.repeat(fits, counts)
        several[firsts + counts - 1] = False  # the last of a group ends where it does
        return np.where(several, np.where(fitting, inside, np.repeat(begins, counts)), ends)


def spans(student_ends: np.ndarray, teacher_ends: np.ndarray) -> np.ndarray:
    """[S, 2] after which token each of the smallest spans over the same bytes ends, for student and teacher.

    Together they cover all tokens.  A token without width belongs to the span after it, or to the last.

    Args:
        student_ends: [tokens] of a `Reader`; both end at the same byte.
        teacher_ends: likewise.
    """
    whole, marks = (len(student_ends), len(teacher_ends)), []
    for ends in (student_ends, teacher_ends):
        marks.append(np.zeros(1 + int(ends.max(initial=0)), bool))
        marks[-1][ends] = True
    shared = np.flatnonzero(marks[0] & marks[1])
    cuts = [np.searchsorted(ends, shared[shared > 0][:-1]) + 1 for ends in (student_ends, teacher_ends)]
    return np.vstack([np.column_stack(cuts), [whole]]) if any(whole) else np.zeros((0, 2), np.int64)


def edges_of(ends: np.ndarray) -> np.ndarray:
    """[S + 1, 2] where stretches that end there begin, and the end of all."""
    return np.vstack([np.zeros((1, 2), np.int64), ends.astype(np.int64)])


@dataclass(frozen=True)
class Pair:
    """A text's tokens for student and teacher, in stretches of both that follow each other."""

    input_ids: Sequence[int]
    teacher_input_ids: Sequence[int]
    edges: np.ndarray  # [S + 1, 2] tokens of each side before each stretch, and in all

    def row(self, first: int = 0, last: int | None = None) -> dict[str, Any]:
        """From one edge to another, by number, as a row."""
        edges = self.edges[first : None if last is None else last + 1]
        (ours, theirs), (our_end, their_end) = edges[0], edges[-1]
        return {
            "input_ids": self.input_ids[ours:our_end],
            "teacher_input_ids": self.teacher_input_ids[theirs:their_end],
            "spans": (edges[1:] - edges[0]).flatten().tolist(),
        }

    def fits(self, most: tuple[int, int]) -> bool:
        """Whether no stretch has more tokens of either side."""
        return bool((np.diff(self.edges, axis=0) <= most).all())

    def cuts(self, most: tuple[int, int]) -> list[int]:
        """The edges of parts that are as long as may be, by number; each stretch must fit."""
        found = [0]
        while found[-1] < len(self.edges) - 1:
            ends = zip(self.edges.T, self.edges[found[-1]] + most, strict=True)
            found.append(int(min(np.searchsorted(side, end, "right") for side, end in ends)) - 1)
        return found


def matched(ours: Sequence[int], theirs: Sequence[int]) -> Pair:
    """Tokens of both that are one stretch: two in the same role, or what only one side has."""
    whole = (len(ours), len(theirs))
    return Pair(ours, theirs, np.array([(0, 0), whole] if any(whole) else [(0, 0)]))


def apart(ours: Sequence[int], theirs: Sequence[int]) -> Pair:
    """Tokens that have nothing to do with each other."""
    return joined([matched(ours, []), matched([], theirs)])


def joined(parts: Sequence[Pair]) -> Pair:
    """One after the other."""
    begins = np.vstack([np.zeros((1, 2), np.int64), [each.edges[-1] for each in parts]]).cumsum(0)
    edges = [each.edges[1:] + begin for each, begin in zip(parts, begins, strict=False)]
    ours = chain.from_iterable(each.input_ids for each in parts)
    theirs = chain.from_iterable(each.teacher_input_ids for each in parts)
    return Pair(list(ours), list(theirs), np.vstack([begins[:1], *edges]))


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer in one model's row, and the text around it."""

    input_ids: Sequence[int]
    edges: np.ndarray  # [tokens + 1] bytes of the text before each token, and after the last
    text: bytes
    start: int  # the byte at which the answer begins
    is_ended: bool  # whether the last token ends a turn, or all


def agreed(student: Answer, teacher: Answer) -> Pair:
    """Both matched by bytes, as far as their texts agree around where the answer begins; the ends by role.

    What differs (the white space before an answer, in one chat template and the other) is a stretch apart.
    """
    both = (student, teacher)
    if student.is_ended and teacher.is_ended:
        cut = [
            replace(each, input_ids=each.input_ids[:-1], edges=each.edges[:-1], is_ended=False)
            for each in both
        ]
        return joined([agreed(*cut), matched(student.input_ids[-1:], teacher.input_ids[-1:])])
    before = commonprefix([each.text[each.edges[0] : each.start][::-1] for each in both])
    after = commonprefix([each.text[each.start : each.edges[-1]] for each in both])
    shared = np.intersect1d(*(each.edges - each.start for each in both))
    shared = shared[(shared >= -len(before)) & (shared <= len(after))]
    if len(shared) < 2:
        return apart(student.input_ids, teacher.input_ids)
    parts, ends = [], []
    for each in both:
        at = each.edges - each.start
        first, last = np.searchsorted(at, shared[0]), np.searchsorted(at, shared[-1], "right") - 1
        parts.append((each.input_ids[:first], each.input_ids[first:last], each.input_ids[last:]))
        ends.append(at[first + 1 : last + 1] - shared[0])
    befores, middles, afters = zip(*parts, strict=True)
    return joined([apart(*befores), Pair(*middles, edges_of(spans(*ends))), apart(*afters)])


class PairReader:
    """Two tokenizers that read the same texts, the student's first."""

    def __init__(self, tokenizer: Tokenizer, teacher: Tokenizer) -> None:
        """Raises a ModelError where a `Reader` does."""
        self.teacher, both = teacher, (tokenizer, teacher)
        self.readers = [Reader(each) for each in both]
        self.first, self.last = (matched(*map(part, both)) for part in (beginning, ending))

    def __call__(self, texts: Sequence[str]) -> list[Pair | None]:
        """Each text without beginning and end; None where one of the two does not give it back."""
        both = zip(*(read(texts) for read in self.readers), strict=True)
        return [
            None if ends is None or others is None else Pair(ours, theirs, edges_of(spans(ends, others)))
            for (ours, ends), (theirs, others) in both
        ]
