"""Tokenizers trained on a text, and tokens in another's tokens."""

import pytest
from conftest import sentences, tiny_tokenizer
from transformers import AutoTokenizer

from kdlib.data.vocabulary import pieces, trained_tokenizer
from kdlib.errors import DataError

TEXTS = [f"{line} {number * 7919} naïve “Ω” 東京\n\tdef f(x):" for number, line in enumerate(sentences(60))]


def test_a_trained_tokenizer_gives_every_text_back_and_cuts_digits_one_by_one():
    made = trained_tokenizer(TEXTS, 320)
    assert len(made) == 320
    for text in (*TEXTS, "  \t🙂é 31 ", ""):
        assert made.decode(made(text)["input_ids"]) == text
    assert made.convert_ids_to_tokens(made("a 2026")["input_ids"])[-4:] == ["2", "0", "2", "6"]
    assert (made.eos_token_id, made.pad_token_id) == (0, 1)


def test_the_same_text_trains_the_same_tokenizer():
    one, other = (trained_tokenizer(TEXTS, 320).backend_tokenizer.to_str() for _ in range(2))
    assert one == other


def test_a_saved_tokenizer_is_loaded_again(tmp_path):
    made = trained_tokenizer(TEXTS, 300)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == made.get_vocab()
    assert loaded(TEXTS)["input_ids"] == made(TEXTS)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token) == (made.eos_token, made.pad_token)


@pytest.mark.parametrize(
    ("texts", "size", "words"),
    [
        (TEXTS, 100, "100 tokens: every byte and .* need 258; ask for more"),
        (["a b a b"], 2000, r"pieces for \d+ tokens, not 2,000; ask for fewer, or give more"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(texts, size, words):
    with pytest.raises(DataError, match=words):
        trained_tokenizer(texts, size)


OURS = [b"the", b" th", b"e!", b"\xc3", b"\xa9", b"zz", None, None]
THEIRS = [b"th", b"e", b" the", b" ", b"\xc3", b"\xa9", None, b"the", b"e", b"!"]


def their_tokenizer(cuts):
    return lambda texts, **_: {"input_ids": [cuts.get(text, []) for text in texts]}


def test_a_token_is_the_same_one_else_what_their_tokenizer_cuts_else_its_longest_pieces():
    tokenizer = their_tokenizer({" th": [2], "e!": [8, 9], "the": [0, 1]})
    found = pieces(OURS, THEIRS, tokenizer, {6: 6})
    assert found == [[7], [3, 0], [8, 9], [4], [5], [], [6], []]


def test_pieces_of_a_real_tokenizer_say_what_each_token_says():
    ours, theirs = trained_tokenizer(TEXTS, 330), tiny_tokenizer(sentences(200))
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 writes as themselves
    others = [byte for byte in range(256) if byte not in own]
    byte_of = {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}

    def said(tokenizer):
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        special = set(tokenizer.all_special_tokens)
        return [None if t in special else bytes(byte_of[letter] for letter in t) for t in tokens]

    mine, its = said(ours), said(theirs)
    cut = pieces(mine, its, theirs, {ours.eos_token_id: theirs.eos_token_id})
    assert [b"".join(its[each] for each in row) for row in cut[2:]] == mine[2:]
    assert cut[:2] == [[theirs.eos_token_id], []]
