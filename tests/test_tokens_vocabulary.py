"""Tokenizers trained on a text, and tokens in another's tokens."""

import json

import pytest
import torch
from conftest import sentences, tiny_tokenizer
from made_tokenizers import byte_level, sentence_piece, unigram
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdlib.data.pairs import vocabularies, within
from kdlib.errors import DataError, ModelError
from kdlib.tokens.answers import roles, turn_end
from kdlib.tokens.vocabulary import (
    Vocabularies,
    ids_of,
    pieces,
    token_bytes,
    trained_tokenizer,
)

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


CHAT = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"


def chatting(*names, **special):
    """A byte-level tokenizer whose turns end with <|end|>."""
    made = byte_level(300, seed=4, **special)
    made.add_special_tokens({"additional_special_tokens": [*names, "<|end|>"]})
    made.chat_template = CHAT
    return made


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (byte_level, lambda: byte_level(900, seed=7, eos_token="</s>", pad_token="<pad>")),
        (sentence_piece, byte_level),
        (byte_level, sentence_piece),
        (unigram, sentence_piece),
    ],
    ids=["bytes-bytes", "pieces-bytes", "bytes-pieces", "unigram-pieces"],
)
def test_tokens_are_shared_by_their_bytes_and_their_role(student, teacher):
    student, teacher = student(), teacher()
    found = vocabularies(student, teacher)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    assert (found.student_size, found.teacher_size) == (len(ours), len(theirs))
    pairs = [(one, other) for one, other in enumerate(found.shared.tolist()) if other >= 0]
    assert len({other for _, other in pairs}) == len(pairs)
    plain = [(one, other) for one, other in pairs if ours[one] is not None]
    assert all(ours[one] == theirs[other] for one, other in plain)
    assert {ours[one] for one, _ in plain} == set(ours) & set(theirs) - {None}
    special = {pair for pair in pairs if ours[pair[0]] is None}
    assert (student.eos_token_id, teacher.eos_token_id) in special
    assert special == set(roles(student, teacher).items())
    # pieces: of each token of the larger vocabulary how the smaller begins it
    larger, smaller = (theirs, ours) if found.onto_student else (ours, theirs)
    pinned = {other: one for one, other in pairs} if found.onto_student else dict(pairs)
    assert len(found.pieces) == len(larger)
    for number, first in enumerate(found.pieces.tolist()):
        if number in pinned:
            assert first == pinned[number]
        elif larger[number] is None:
            assert first == -1
        else:
            assert first == -1 or larger[number].startswith(smaller[first])


def test_of_two_tokens_of_the_same_bytes_the_one_that_is_made_is_shared():
    pieces_of, bytes_of = sentence_piece(), byte_level()
    found = vocabularies(pieces_of, bytes_of)
    by_name, their_a = pieces_of.get_vocab(), bytes_of.get_vocab()["t"]
    assert found.shared[by_name["t"]] == their_a
    assert found.shared[by_name["<0x74>"]] == -1


def test_the_same_tokens_in_another_order_are_each_its_namesakes():
    plain = byte_level(300, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    state = plain.backend_tokenizer.to_str()
    names = sorted(plain.get_vocab())
    turned = json.loads(state)
    turned["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    turned["added_tokens"] = [{**each, "id": names.index(each["content"])} for each in turned["added_tokens"]]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(turned)), **plain.special_tokens_map
    )
    found = vocabularies(plain, other)
    for name, number in plain.get_vocab().items():
        assert found.shared[number] == other.get_vocab()[name]
        assert found.pieces[other.get_vocab()[name]] == number


def test_the_end_of_a_turn_is_shared_where_both_have_one():
    ours, theirs = chatting(eos_token="<eos>"), chatting("<other>", eos_token="</s>")
    assert ours.convert_ids_to_tokens(turn_end(ours)) == "<|end|>"
    assert vocabularies(ours, theirs).shared[turn_end(ours)] == turn_end(theirs)
    assert roles(ours, theirs)[ours.eos_token_id] == theirs.eos_token_id
    theirs.chat_template = None
    assert turn_end(theirs) is None
    assert vocabularies(ours, theirs).shared[turn_end(ours)] == -1


def test_a_template_that_refuses_or_shows_no_end_of_turn_has_none():
    made = chatting(eos_token="<eos>")
    plain = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    for template in ("{{ raise_exception('no') }}", plain):
        made.chat_template = template
        assert turn_end(made) is None


def test_one_token_of_theirs_in_two_roles_stands_for_one_of_ours():
    ours = byte_level(300, bos_token="<s>", eos_token="</s>")
    theirs = byte_level(310, bos_token="<both>", eos_token="<both>")
    found = vocabularies(ours, theirs)
    assert found.shared[ours.eos_token_id] == theirs.eos_token_id
    assert found.shared[ours.bos_token_id] == -1


def test_vocabularies_that_share_nothing_are_refused():
    def of(*words):
        names = {name: number for number, name in enumerate(["[UNK]", *words])}
        made = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
        made.decoder = decoders.WordPiece()
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")

    with pytest.raises(ModelError, match="3 and 2 tokens of which no two .*; needed are some; use a student"):
        vocabularies(of("мир", "да"), of("no"))


def test_a_token_without_a_row_in_a_head_is_said_by_none_and_stands_for_none():
    shared, cut = torch.tensor([3, -1, 0]), torch.tensor([2, 0, 1, 0, 2])
    found = within(Vocabularies(3, 5, shared, cut), 2, 3)
    assert (found.student_size, found.teacher_size) == (2, 3)
    assert (found.shared.tolist(), found.pieces.tolist()) == ([-1, -1], [-1, 0, 1])
    same = within(Vocabularies(3, 5, shared, cut), 9, 9)
    assert (same.shared.tolist(), same.pieces.tolist()) == (shared.tolist(), cut.tolist())
    with pytest.raises(ModelError, match="3 tokens of the student and 5 .* heads of 3 and 2 rows"):
        within(Vocabularies(3, 5, shared, cut), 3, 2)


@pytest.mark.parametrize("special", [False, True])
def test_ids_are_those_of_the_tokenizers_own_call_whatever_it_was_asked_before(special):
    tokenizer = tiny_tokenizer(TEXTS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    found = ids_of(tokenizer, TEXTS, special=special)
    assert found == [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
    assert ids_of(tokenizer, [], special=special) == []


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([each.upper() for each in text], **options)

    tokenizer = Own(tokenizer_object=tiny_tokenizer(TEXTS).backend_tokenizer, eos_token="<eos>")
    assert tokenizer.decode(ids_of(tokenizer, ["one", "two"])[1]) == "TWO"
