"""Vocabularies: one trained on a text; each token of one in the tokens of another."""

from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase as Tokenizer, PreTrainedTokenizerFast

from kdlib.errors import DataError

END, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256


def trained_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of so many tokens for these texts, digits one by one; the same for the same texts.

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


def roles(ours: Tokenizer, theirs: Tokenizer) -> dict[int, int]:
    """{a special token of ours: theirs in the same role}: the beginning of a text, and its end."""
    both = [[getattr(each, f"{name}_token_id") for each in (ours, theirs)] for name in ("bos", "eos")]
    return {one: other for one, other in both if None not in (one, other)}


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
