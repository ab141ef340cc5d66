import json
from functools import cache
from itertools import chain, pairwise

import numpy as np
import pytest
from made_tokenizers import byte_level, texts, without
from tokenizers.processors import TemplateProcessing

from kdlib.config.data import DataConfig
from kdlib.data import pairs
from kdlib.data.batches import collate
from kdlib.data.pairs import class_of, coverage, of_teacher
from kdlib.data.text import prepare
from kdlib.errors import DataError
from kdlib.losses.alignment import spans_in
from kdlib.losses.signals import IGNORED, kept
from kdlib.models.loading import load_tokenizer
from kdlib.tokens.spans import joined, matched
from kdlib.tokens.vocabulary import token_bytes

LENGTH = 24


@pytest.fixture(scope="module")
def student():
    return byte_level(400)


@pytest.fixture(scope="module")
def teacher():
    return byte_level(900, seed=5, eos_token="</s>", bos_token="<s>", pad_token="</s>")


@pytest.fixture(scope="module")
def teacher_with_bos(teacher):
    made = byte_level(900, seed=5, eos_token="</s>", bos_token="<s>", pad_token="</s>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(300, seed=9)))
    return path


def prepared(source, student, teacher, **changes):
    asked = DataConfig(**{"source": str(source), "max_length": LENGTH, "validation": 0.2, **changes})
    return prepare(asked, student, seed=0, teacher=teacher)


bytes_of = cache(token_bytes)


def said(tokenizer, ids):
    """The bytes of tokens, and each special one by its name."""
    pieces = bytes_of(tokenizer)
    return b"".join(pieces[n] or tokenizer.convert_ids_to_tokens([n])[0].encode() for n in ids)


def both(row, student, teacher):
    """What student and teacher read in each stretch of a row."""
    edges = [(0, 0), *zip(row["spans"][::2], row["spans"][1::2], strict=True)]
    return [
        (said(student, row["input_ids"][a:c]), said(teacher, row["teacher_input_ids"][b:d]))
        for (a, b), (c, d) in pairwise(edges)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_has_the_same_text_for_both_stretch_by_stretch(source, student, teacher, packing):
    made = prepared(source, student, teacher, packing=packing)
    for row in chain(made.train, made.validation):
        assert len(row["input_ids"]) <= LENGTH
        assert row["spans"][-2:] == [len(row["input_ids"]), len(row["teacher_input_ids"])]
        for ours, theirs in both(row, student, teacher):
            assert (ours, theirs) == (b"<eos>", b"</s>") or ours == theirs
    assert made.notes["train_documents_not_aligned"] == 0
    assert made.notes["train_tokens"] == sum(map(len, made.train["input_ids"]))


def owners(rows):
    """The document of each token of all rows."""
    found = []
    for row in rows:
        starts, numbers = row["documents"][::2], row["documents"][1::2]
        found += np.repeat(numbers, np.diff([*starts, len(row["input_ids"])])).tolist()
    return found


def test_packed_rows_have_all_documents_end_to_end_but_for_the_last_block(source, student, teacher):
    made = prepared(source, student, teacher)
    whole = prepare(DataConfig(source=str(source), max_length=2, validation=0.2), student, seed=0).train
    stream = list(chain.from_iterable(whole["input_ids"]))
    found = list(chain.from_iterable(made.train["input_ids"]))
    assert stream[: len(found)] == found
    assert len(stream) - len(found) < LENGTH
    assert owners(made.train) == owners(whole)[: len(found)]


@pytest.mark.parametrize("together", [300, 12])
def test_documents_are_packed_alike_however_many_are_read_at_a_time(
    source, student, teacher, together, monkeypatch
):
    monkeypatch.setattr(pairs, "TOGETHER", together)
    made = []
    for at_once in (together, 4):
        monkeypatch.setattr(pairs, "BATCH", at_once)
        made.append(prepared(source, student, teacher).train.to_list())
    assert made[0] == made[1]
    assert len(made[0]) > 100


def test_a_row_is_no_longer_than_the_teacher_may_read(source, student, teacher):
    short = byte_level(260, seed=5)
    short.model_max_length = 30
    for packing in (True, False):
        made = prepared(source, student, short, packing=packing)
        assert max(map(len, made.train["teacher_input_ids"])) <= 30
        assert max(map(len, made.train["input_ids"])) <= LENGTH


def test_each_model_has_its_own_beginning(source, student, teacher_with_bos):
    made = prepared(source, student, teacher_with_bos, packing=False)
    for row in made.train:
        assert row["teacher_input_ids"][0] == teacher_with_bos.bos_token_id
        assert row["spans"][:2] == [0, 1]  # a stretch that the student has nothing of
        assert both(row, student, teacher_with_bos)[0] == (b"", b"<s>")


def test_a_batchs_spans_are_those_whose_tokens_are_predicted(source, student, teacher):
    made = prepared(source, student, teacher)
    rows = [made.train[n] for n in range(12)]
    batch = made.collate(rows)
    spans, ids, teacher_ids = (
        batch["spans"],
        batch["input_ids"].flatten(),
        batch["teacher_input_ids"].flatten(),
    )
    assert {each.dtype.itemsize for each in spans.values()} == {8}
    names = ("starts", "sizes", "teacher_starts", "teacher_sizes", "rows")
    found = [spans[name].tolist() for name in names]
    for start, size, teacher_start, teacher_size, row in zip(*found, strict=True):
        ours = said(student, ids[start + 1 : start + 1 + size].tolist())
        theirs = said(teacher, teacher_ids[teacher_start + 1 : teacher_start + 1 + teacher_size].tolist())
        assert ours == theirs or (ours, theirs) == (b"<eos>", b"</s>")
        assert start // ids.numel() * 12 <= row == start // batch["input_ids"].shape[1]
        assert row == teacher_start // batch["teacher_input_ids"].shape[1]
    stretches = sum(len(row["spans"]) // 2 for row in rows)
    assert stretches - 12 == len(spans["starts"])  # all but the first of each row
    apart = [made.collate([row])["spans"] for row in rows]
    assert spans["sizes"].tolist() == list(chain.from_iterable(each["sizes"].tolist() for each in apart))


def test_a_span_is_learned_where_all_of_its_tokens_are():
    row = {
        "input_ids": list(range(8)),
        "teacher_input_ids": list(range(9)),
        "spans": [1, 0, 2, 1, 4, 2, 5, 4, 5, 5, 7, 6, 8, 9],
        "prompt_tokens": 3,
        "read_only": [7, 8],
    }
    batch = collate([{**row, "prompt_tokens": 0, "read_only": None}, row], pad_id=0, teacher_pad_id=0)
    spans = {name: each.tolist() for name, each in batch["spans"].items()}
    # of the first row not [1, 0]: nothing of the teacher's; not [2, 1]: its first token; not [5, 5]: nothing
    # of the student's.  Of the second not [4, 2] either, half of which is given, nor [8, 9], read only
    assert spans == {
        "starts": [1, 3, 4, 6, 8 + 3, 8 + 4],
        "teacher_starts": [0, 1, 4, 5, 9 + 1, 9 + 4],
        "sizes": [2, 1, 2, 1, 1, 2],
        "teacher_sizes": [1, 2, 1, 3, 2, 1],
        "rows": [0, 0, 0, 0, 1, 1],
    }


@pytest.mark.parametrize("packing", [True, False])
def test_with_one_tokenizer_every_learned_token_is_a_span(source, student, packing):
    made = prepared(source, student, student, packing=packing)
    alone = prepare(
        DataConfig(source=str(source), max_length=LENGTH, validation=0.2, packing=packing), student, seed=0
    )
    assert made.train["input_ids"][:] == alone.train["input_ids"][:] == made.train["teacher_input_ids"][:]
    assert made.train["documents"][:] == alone.train["documents"][:]
    batch = made.collate([made.train[n] for n in range(8)])
    tokens = kept(batch["labels"])
    for name in ("starts", "teacher_starts"):
        assert batch["spans"][name].tolist() == tokens.positions.tolist()
    assert set(batch["spans"]["sizes"].tolist()) == {1}
    assert (batch["labels"] != IGNORED).sum() == len(tokens.positions)
    same = ("train_documents", "train_rows", "train_tokens", "train_documents_shorter_than_two_tokens")
    assert {name: made.notes[name] for name in same} == {name: alone.notes[name] for name in same}


def test_what_one_of_both_cannot_give_back_is_left_out_and_named(tmp_path, student):
    path = tmp_path / "texts.jsonl"
    lines = ["the teacher learns hello " * 9 + str(n) for n in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, "\t \n " * 9]))
    wordpiece = load_tokenizer("all-minilm-l6-v2")
    made = prepared(path, student, wordpiece, validation=0.1, packing=False, max_length=200)
    lost = {name: made.notes[f"{name}_documents_not_aligned"] for name in ("train", "validation")}
    assert sum(lost.values()) == 1
    (where,) = (name for name, count in lost.items() if count)
    assert "\\t \\n" in made.notes[f"{where}_first_not_aligned"][0]
    assert made.notes["train_documents_shorter_than_two_tokens"] == 0


def test_the_fingerprint_changes_with_the_teachers_tokens(source, student, teacher, teacher_with_bos):
    prints = [prepared(source, student, each).notes["fingerprint"] for each in (teacher, teacher_with_bos)]
    assert prints[0] != prints[1]


def test_spans_take_at_most_16_bytes_a_token(source, student, teacher):
    made = prepared(source, student, teacher).train
    assert 4 * sum(map(len, made["spans"])) <= 16 * sum(map(len, made["input_ids"]))


def test_parts_are_joined_in_order():
    reader_parts = [matched([1], []), matched([2, 3], [4]), matched([], []), matched([5], [6])]
    whole = joined(reader_parts)
    assert (whole.input_ids, whole.teacher_input_ids) == ([1, 2, 3, 5], [4, 6])
    assert whole.edges.tolist() == [[0, 0], [1, 0], [3, 1], [4, 2]]
    assert whole.cuts((3, 3)) == [0, 2, 3]
    assert whole.row(1, 3) == {"input_ids": [2, 3, 5], "teacher_input_ids": [4, 6], "spans": [2, 1, 3, 2]}


def test_both_sides_of_what_is_learned_are_the_same_bytes(source, student, teacher_with_bos):
    for packing in (True, False):
        made = prepared(source, student, teacher_with_bos, packing=packing)
        assert made.teacher_vocabulary == made.vocabularies.teacher_size
        for pair in made.train:
            batch = made.collate([pair])
            lines, theirs = spans_in(batch)
            found = []
            ours = kept(batch["labels"]).targets[lines["owner"] < len(lines["first"])]
            for tokenizer, ids in ((student, ours), (teacher_with_bos, theirs["targets"])):
                found.append(said(tokenizer, ids.tolist()).replace(tokenizer.eos_token.encode(), b"<end>"))
            assert found[0].replace(b"<s>", b"") == found[1].replace(b"<s>", b"")
            assert len(ours) == batch["spans"]["sizes"].sum()
            assert sum(of_teacher(batch)["labels"][0] != IGNORED) == batch["spans"]["teacher_sizes"].sum()


def test_coverage_counts_learned_tokens_by_class(source, student, teacher):
    made = prepared(source, student, teacher)
    table = coverage(made, student)
    batch = made.collate(list(made.train))
    assert table.loc["all", "tokens"] == (batch["labels"] != IGNORED).sum() == table["tokens"][:-1].sum()
    single = (batch["spans"]["sizes"] == 1) & (batch["spans"]["teacher_sizes"] == 1)
    assert table.loc["all", "one_to_one"] == pytest.approx(single.sum() / table.loc["all", "tokens"])
    assert table.loc["special", "one_to_one"] == 1
    inside = batch["spans"]["sizes"].sum() / table.loc["all", "tokens"]
    assert table.loc["all", "in_spans"] == pytest.approx(inside)
    shared = (made.vocabularies.shared >= 0).float().mean()
    assert table.loc["all", "shared"] == pytest.approx(float(shared))
    alone = coverage(prepared(source, student, student), student)
    assert (alone[["one_to_one", "in_spans", "shared"]] == 1).all(axis=None)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (b" hello", "latin letters"),
        ("naïve".encode(), "latin letters"),
        ("мир".encode(), "other scripts"),
        ("日".encode()[:2], "other scripts"),
        (b" 12", "digits"),
        (b"...", "punctuation"),
        (b" \n\t", "white space"),
        (None, "special"),
    ],
)
def test_a_token_is_of_a_class(piece, expected):
    assert class_of(piece) == expected


def test_texts_that_none_of_both_gives_back_leave_nothing_to_predict(tmp_path, student, teacher):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"the teacher {n}"}) + "\n" for n in range(20)))
    with pytest.raises(DataError, match="without 18 that one of both .*: name another teacher"):
        prepared(path, student, without(teacher, "e"), validation=0.1)


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_that_both_cut_nowhere_within_a_row_is_left_out(tmp_path, student, packing):
    path = tmp_path / "texts.jsonl"
    lines = [*(f"the teacher learns {n}" for n in range(29)), "the \N{EGYPTIAN HIEROGLYPH A001}" * 3]
    lines[-1] += "\N{EGYPTIAN HIEROGLYPH A001}" * 9  # of WordPiece one [UNK], of bytes 40 tokens
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    wordpiece = load_tokenizer("all-minilm-l6-v2")
    made = prepared(path, student, wordpiece, validation=0.1, packing=packing)
    lost = [made.notes[f"{name}_documents_not_aligned"] for name in ("train", "validation")]
    assert sorted(lost) == [0, 1]
    assert max(map(len, made.train["input_ids"])) <= LENGTH
