"""Spans: where two tokenizers cut a text at the same byte, so that tokens between stand for the same bytes.

Ends are bytes of the text, not characters or decoded strings: a character that is split into several tokens
is cut where it is cut, and what a token leaves out or changes (white space, capitals, accents) moves nothing.
"""

import json
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdlib.errors import ModelError

BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's alphabet
NO_BYTES = -(2**40)  # the size of a token that stands for none, so that no sum with it is a text's


def check_fast(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot say where in a text its tokens stand.

    Raises:
        ModelError: it is a slow one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: found a slow tokenizer ({type(tokenizer).__name__}), which does not "
            "say where its tokens stand in a text; spans need a fast one: save it with its tokenizer.json, "
            "or name a model that has one"
        )


def family_of(tokenizer: Tokenizer) -> str:
    """How a vocabulary spells bytes: "ByteLevel", "SentencePiece" or "WordPiece", by the tokenizer's decoder.

    Raises:
        ModelError: it is slow, or spells them in another way.
    """
    check_fast(tokenizer)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    steps = {step["type"] for step in [decoder, *decoder.get("decoders", ())] if step}
    for family, marks in FAMILIES.items():
        if steps & marks:
            return family
    raise ModelError(
        f"{tokenizer.name_or_path}: found a tokenizer whose decoder is {decoder.get('type', 'left out')}, by "
        f"which no token's bytes are known; needed is one of {', '.join(FAMILIES)}: use a model that has it"
    )


FAMILIES = {
    "ByteLevel": {"ByteLevel"},  # GPT-2, Llama 3, Qwen, SmolLM
    "WordPiece": {"WordPiece"},  # BERT
    "SentencePiece": {"Metaspace", "ByteFallback"},  # T5, Llama 2, Gemma
}


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes that each token stands for in the middle of a text, by id; None for special and unknown ones.

    GPT-2's alphabet is read back to bytes; SentencePiece's ▁ is a space and <0x0A> that byte; WordPiece's ##x
    is x and its x a space and x.  What was added to a vocabulary stands for its text.

    Raises:
        ModelError: the tokenizer is slow, or of none of the three families.
    """
    family, names = family_of(tokenizer), tokenizer.get_vocab()
    read = {"ByteLevel": _of_alphabet, "SentencePiece": _of_piece, "WordPiece": _of_word_piece}[family]
    found: list[bytes | None] = [None] * (1 + max(names.values()))
    for token, number in names.items():
        found[number] = read(token)
    for number, token in tokenizer.added_tokens_decoder.items():
        found[number] = token.content.encode()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number in special.union(tokenizer.all_special_ids):
        found[number] = None
    return found


def _of_alphabet(token: str) -> bytes:
    return bytes(BYTE_OF[letter] for letter in token) if BYTE_OF.keys() >= set(token) else token.encode()


def _of_piece(token: str) -> bytes:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()


def _of_word_piece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()


class Reader:
    """A tokenizer that says at which byte of a text each of its tokens ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises a ModelError where `token_bytes` does."""
        self.tokenizer, self.pieces = tokenizer, token_bytes(tokenizer)
        self.sizes = np.array([NO_BYTES if piece is None else len(piece) for piece in self.pieces])
        self.drops_bytes = family_of(tokenizer) == "ByteLevel"  # those that its vocabulary lacks
        self.named = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

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
