"""Vocabularies: the bytes of each token; one in another's tokens; a new one."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kdlib.errors import DataError, ModelError

END, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's alphabet


def trained_tokenizer(texts: Iterable[str] | Iterable[list[str]], size: int) -> Tokenizer:
    """A byte-level BPE of so many tokens for these texts, digits one by one; the same for the same texts.

    They are taken one after the other, or some at a time: what they are cut into is held, and not they.

    Two of its tokens are special: the end of a text, and padding.

    Raises:
        DataError: a size without room for every byte, or texts too short for so many tokens.
    """
    least = BYTES + len((END, PAD))
    if size < least:
        raise DataError(f"a vocabulary of {size} tokens: every byte and {END} need {least}; ask for more")
    made = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END, PAD], "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    if (found := made.get_vocab_size()) < size:
        raise DataError(
            f"the text has pieces for {found:,} tokens, not {size:,}; ask for fewer, or give more"
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)


def token_of_bytes(tokenizer: Tokenizer, every: Sequence[bytes | None]) -> dict[bytes, int]:
    """The token of each piece; of several the one that the tokenizer itself makes: "A" and not "<0x41>"."""
    numbers: dict[bytes, list[int]] = {}
    for number, piece in enumerate(every):
        if piece:
            numbers.setdefault(piece, []).append(number)
    model, added = tokenizer.backend_tokenizer.model, tokenizer.added_tokens_decoder

    def rank(number):
        name = tokenizer.convert_ids_to_tokens(number)
        return number not in added, [each.value for each in model.tokenize(name)] != [name], number

    return {piece: min(each, key=rank) if len(each) > 1 else each[0] for piece, each in numbers.items()}


def pieces(
    ours: Sequence[bytes | None],
    theirs: Sequence[bytes | None],
    tokenizer: Tokenizer,
    roles: Mapping[int, int],
) -> list[list[int]]:
    """Of each of our tokens those of theirs that together stand for the same bytes; [] where none do.

    One, where they have the same; else as their tokenizer cuts it where this gives its bytes, and of bytes
    that are no text, or to which it would add a space, the longest tokens of theirs from left to right.

    Args:
        ours, theirs: the bytes of each token by id; None of special ones.
        tokenizer: theirs.
        roles: {a special token of ours: theirs in the same role}.
    """
    known = {piece: number for number, piece in reversed([*enumerate(theirs)]) if piece}
    longest = max(map(len, known), default=0)
    texts = [(piece or b"").decode(errors="ignore") for piece in ours]
    cuts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    found = []
    for number, (piece, cut) in enumerate(zip(ours, cuts, strict=True)):
        if piece is None:
            found.append([roles[number]] if number in roles else [])
        elif piece in known:
            found.append([known[piece]])
        else:
            says = b"".join(theirs[each] or b"" for each in cut)
            found.append(cut if cut and says == piece else _longest_matches(piece, known, longest))
    return found


def beginning(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer's own call begins with it (Llama, Gemma: lost without it), else []."""
    first = tokenizer.bos_token_id
    return [first] if tokenizer("a")["input_ids"][:1] == [first] else []


def ids_of(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The tokens of each text, as the tokenizer's own call gives them, without what else it makes.

    Where the call is the usual one of `transformers`, all but the first text are given to its backend, which
    then need not find out where each token stands.

    Args:
        special: whether with the tokens that the tokenizer puts around a text.
    """
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    usual = [getattr(PreTrainedTokenizerFast, name, None) for name in ("__call__", "_encode_plus")]
    if [getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus")] != usual:
        return tokenizer([*texts], **options)["input_ids"] if len(texts) else []
    first = tokenizer([*texts[:1]], **options)["input_ids"] if len(texts) else []  # and sets up the backend
    rest = tokenizer.backend_tokenizer.encode_batch_fast([*texts[1:]], add_special_tokens=special)
    return [*first, *(each.ids for each in rest)]


def ending(tokenizer: Tokenizer) -> list[int]:
    """[EOS] where there is one, else []."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _longest_matches(piece: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    """The bytes as known pieces, the longest that fits next each time; [] where some cannot be had."""
    found, start = [], 0
    while start < len(piece):
        ends = range(min(start + longest, len(piece)), start, -1)
        if (end := next((end for end in ends if piece[start:end] in known), None)) is None:
            return []
        found.append(known[piece[start:end]])
        start = end
    return found


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
    for number in special_ids(tokenizer):
        found[number] = None
    return found


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that stand for no text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.union(tokenizer.all_special_ids)


def _of_alphabet(token: str) -> bytes:
    return bytes(BYTE_OF[letter] for letter in token) if BYTE_OF.keys() >= set(token) else token.encode()


def _of_piece(token: str) -> bytes:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()


def _of_word_piece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()


@dataclass(frozen=True, eq=False)
class Vocabularies:
    """What the tokens of student and teacher have in common."""

    student_size: int  # one more than its tokenizer's largest id
    teacher_size: int
    shared: Tensor  # [student's V] the teacher's token of the same bytes, or the same role; -1 where none
    pieces: Tensor  # [larger V] the first of the smaller vocabulary's tokens that make each; -1 where none
    own: Tensor = field(init=False)  # ids of the student's tokens that the teacher has not
    others: Tensor = field(init=False)  # ids of the teacher's that the student has not
    whole: Tensor = field(init=False)  # ids of the larger vocabulary's that have a first piece
    never: Tensor = field(init=False)  # ids of the smaller vocabulary's that are no token's first piece

    def __post_init__(self) -> None:
        common = self.shared[self.shared >= 0]
        whole = (self.pieces >= 0).nonzero()[:, 0]
        for name, value in {
            "own": (self.shared < 0).nonzero()[:, 0],
            "others": _without(common, self.teacher_size),
            "whole": whole,
            "never": _without(self.pieces[whole], min(self.student_size, self.teacher_size)),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def onto_student(self) -> bool:
        """Whether `pieces` are of the teacher's tokens: the larger vocabulary is cut into the smaller."""
        return self.teacher_size >= self.student_size

    def in_students(self, teacher: Tensor) -> Tensor:
        """[n, teacher's V] to [n, student's V]: at each shared token the teacher's value, -inf at others."""
        found = teacher.index_select(-1, self.shared.clamp(min=0))
        return found if not len(self.own) else found.index_fill(-1, self.own, -math.inf)

    def cut(self, log_probs: Tensor) -> Tensor:
        """[n, larger V] log-probabilities of tokens to [n, smaller V], of their first pieces."""
        mass = log_probs.index_select(-1, self.whole).exp()
        empty = mass.new_zeros(len(mass), min(self.student_size, self.teacher_size))
        made = empty.index_add(-1, self.pieces.index_select(0, self.whole), mass)
        return made.clamp(min=torch.finfo(made.dtype).tiny).log()


def _without(ids: Tensor, size: int) -> Tensor:
    """Those of 0 .. size - 1 that are not among these."""
    return torch.ones(size, dtype=torch.bool, device=ids.device).index_fill(0, ids, False).nonzero()[:, 0]


def vocabulary_sizes(student: int, known: Vocabularies | None) -> tuple[int, int]:
    """What student and teacher choose among; the same where they read alike."""
    return student, student if known is None else known.teacher_size
