import unicodedata
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from made_tokenizers import SCRIPTS, byte_level, sentence_piece, texts, unigram
from tokenizers import decoders

from kdlib.errors import ModelError
from kdlib.models.loading import load_tokenizer
from kdlib.tokens.spans import Answer, Reader, agreed, spans
from kdlib.tokens.vocabulary import family_of, token_bytes

MADE = {
    "byte-level": lambda: load_tokenizer("smollm2-135m-instruct"),
    "small": byte_level,
    "sentencepiece": sentence_piece,
    "unigram": unigram,
    "wordpiece": lambda: load_tokenizer("all-minilm-l6-v2"),
}
PAIRS = [
    ("small", "byte-level"),
    ("small", "sentencepiece"),
    ("sentencepiece", "wordpiece"),
    ("wordpiece", "byte-level"),
    ("unigram", "small"),
]


@cache
def reader(name):
    return Reader(MADE[name]())


def says(name, ids, part):
    """Whether tokens say these bytes of a text, as far as their tokenizer keeps them."""
    tokenizer, pieces = reader(name).tokenizer, reader(name).pieces
    if any(pieces[token] is None for token in ids):  # unknown, or a special one's name in the text
        return True
    made = b"".join(pieces[token] for token in ids)
    if name in ("byte-level", "small"):
        return made == part
    if name == "sentencepiece":  # which begins what it is given with a space, and reads its own sign as one
        read = part.replace("▁".encode(), b" ")
        return made in (read, b" " + read)
    as_read = tokenizer.backend_tokenizer.normalizer.normalize_str(part.decode()).replace("▁", " ")
    return "".join(made.decode().replace("▁", " ").split()) == "".join(as_read.split())


def check(pair, every):
    """Spans give every text back on both sides, in order, and could not be smaller; how many were checked."""
    checked, sides = 0, [reader(name)(every) for name in pair]
    for text, (ours, ends), (theirs, other_ends) in zip(every, *sides, strict=True):
        if ends is None or other_ends is None:
            continue
        checked += 1
        found = spans(ends, other_ends)
        before = np.vstack([np.zeros((1, 2), int), found])
        assert (np.diff(before, axis=0) >= 0).all()
        assert tuple(before[-1]) == (len(ours), len(theirs))
        places = [int(ends[end - 1]) if end else 0 for end in before[:, 0]]
        assert places == [int(other_ends[end - 1]) if end else 0 for end in before[:, 1]], "other bytes"
        assert places[-1] == len(text.encode())
        common = set(ends.tolist()) & set(other_ends.tolist()) - {0}
        assert len(found) == max(len(common), len(ours) + len(theirs) > 0)
        if "unigram" in pair and any(map(unicodedata.combining, text)):
            continue  # NFKC orders marks anew and joins them to what is before: said, but in other places
        for n, (start, end) in enumerate(pairwise(places)):
            for name, ids, side in zip(pair, (ours, theirs), (0, 1), strict=True):
                tokens, part = ids[before[n, side] : before[n + 1, side]], text.encode()[start:end]
                assert says(name, tokens, part), (text, tokens, part)
    return checked


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_spans_give_every_text_back_on_both_sides(pair):
    every = texts(10_000)
    assert check(pair, every) > 0.9 * len(every)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=200, deadline=None)
@given(every=st.lists(st.one_of(st.text(), st.lists(st.sampled_from(SCRIPTS)).map("".join)), min_size=1))
def test_spans_give_any_text_back(pair, every):
    check(pair, every)


@pytest.mark.parametrize(
    ("ends", "other_ends", "found"),
    [
        ([1, 2, 5], [2, 5], [[2, 1], [3, 2]]),
        ([5], [1, 2, 3, 5], [[1, 4]]),
        ([3, 6], [2, 4, 6], [[2, 3]]),
        ([0, 0, 3, 3, 6, 6], [3, 6], [[3, 1], [6, 2]]),  # of no width: with what comes after, at last before
        ([], [], np.zeros((0, 2))),
        ([], [0], [[0, 1]]),
    ],
)
def test_spans_are_the_smallest_that_end_together(ends, other_ends, found):
    ends, other_ends = (np.array(each, dtype=np.int64) for each in (ends, other_ends))
    np.testing.assert_array_equal(spans(ends, other_ends), found)
    np.testing.assert_array_equal(spans(other_ends, ends), np.array(found)[:, ::-1])


@pytest.mark.parametrize(
    ("name", "family", "token", "stands_for"),
    [
        ("small", "ByteLevel", "Ġ", b" "),
        ("small", "ByteLevel", "ð", b"\xf0"),
        ("sentencepiece", "SentencePiece", "▁", b" "),
        ("sentencepiece", "SentencePiece", "<0xF0>", b"\xf0"),
        ("unigram", "SentencePiece", "▁hello", b" hello"),
        ("wordpiece", "WordPiece", "hello", b" hello"),
        ("wordpiece", "WordPiece", "##ing", b"ing"),
        ("small", "ByteLevel", "<eos>", None),
        ("wordpiece", "WordPiece", "[UNK]", None),
    ],
)
def test_a_token_stands_for_its_bytes(name, family, token, stands_for):
    tokenizer = reader(name).tokenizer
    assert family_of(tokenizer) == family
    assert reader(name).pieces[tokenizer.convert_tokens_to_ids(token)] == stands_for


def test_what_was_added_to_a_vocabulary_stands_for_its_text():
    tokenizer = byte_level()
    tokenizer.add_tokens(["→ ü"])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("→ ü")] == "→ ü".encode()


def test_the_parts_of_a_split_character_end_where_their_bytes_do():
    ((ids, ends),) = reader("small")(["a𐍈b"])
    assert len(ids) == 6
    assert ends.tolist() == [1, 2, 3, 4, 5, 6]
    assert spans(ends, np.array([1, 3, 5, 6])).tolist() == [[1, 1], [3, 2], [5, 3], [6, 4]]


def test_a_mark_that_no_token_covers_belongs_to_what_it_marks_and_a_space_to_what_follows():
    ((ids, ends),) = reader("wordpiece")(["cafe\u0301  bar "])
    assert len(ids) == 2
    assert ends.tolist() == [6, 12]


def test_parts_that_are_not_the_texts_own_bytes_end_together():
    ((ids, ends),) = reader("unigram")(["a… b"])  # NFKC: three dots, of three bytes as … is
    dots = [n for n, token in enumerate(ids) if "." in reader("unigram").tokenizer.decode([token])]
    assert ends[dots[-1]] == 4
    assert {1, 4} >= set(ends[dots].tolist())


def test_a_text_that_is_not_given_back_has_no_ends():
    lacking = reader("byte-level")  # which has no token for this byte, and counts on as if it were not there
    (_, ends), (_, other) = lacking(["\x13, it says", "it says"])
    assert ends is None
    assert other is not None
    (_, ends), (_, empty) = reader("wordpiece")(["\t \n", ""])
    assert ends is None
    assert empty.tolist() == []


def test_a_megabyte_in_one_row_is_cut():
    text = "The quick 😀 brown fox 12345\n\t한국어 " * 24_000
    (_, ends), (_, other) = reader("small")([text])[0], reader("sentencepiece")([text])[0]
    assert len(text.encode()) > 1_000_000
    assert ends[-1] == other[-1] == len(text.encode())
    assert len(spans(ends, other)) > 100_000


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused():
    class Slow:
        is_fast, name_or_path = False, "old"

    with pytest.raises(ModelError, match="old: found a slow tokenizer.*need a fast one.*tokenizer.json"):
        token_bytes(Slow())


def test_a_tokenizer_that_spells_bytes_in_another_way_is_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.BPEDecoder()
    with pytest.raises(ModelError, match="decoder is BPEDecoder.*needed is one of ByteLevel.*use a model"):
        token_bytes(tokenizer)


def answer(text, *edges, start):
    return Answer(list(range(len(edges) - 1)), np.array(edges), text, start, is_ended=False)


def test_answers_agree_as_far_as_the_texts_around_them_do():
    ours, theirs = answer(b"Q: abc. Z", 3, 6, 7, 9, start=3), answer(b"Ask: abc! Z", 5, 8, 9, 11, start=5)
    assert agreed(ours, theirs).edges.tolist() == [[0, 0], [1, 1], [3, 1], [3, 3]]  # "abc"
    ours, theirs = answer(b"Q abc", 1, 5, start=2), answer(b"Q\nabc", 1, 5, start=2)
    assert agreed(ours, theirs).edges.tolist() == [[0, 0], [1, 0], [1, 1]]  # nothing: " abc" and "\nabc"
    assert agreed(ours, ours).edges.tolist() == [[0, 0], [1, 1]]
