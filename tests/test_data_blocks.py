import hashlib

import datasets
import numpy as np
import pytest
from conftest import sentences, tiny_tokenizer
from datasets import Dataset

from kdlib.data import blocks
from kdlib.data.batches import fingerprint, flat, largest_id, lengths_of, units_of_rows
from kdlib.data.blocks import one_each, packed, tokenized
from kdlib.sources import progress

TEXTS = [*sentences(2300), "a", "ein Fluß, 一つ", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture(scope="module")
def documents(tokenizer):
    return tokenized(Dataset.from_dict({"text": TEXTS}), "text", tokenizer)


def test_tokens_are_those_of_each_text_by_itself(tokenizer, documents, monkeypatch):
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    kept = [number for number, ids in enumerate(expected) if len(ids) > 1]
    assert documents["document"][:] == kept
    assert documents["input_ids"][:] == [expected[number] for number in kept]
    monkeypatch.setattr(blocks, "AT_ONCE", 500)  # bytes
    called = np.arange(len(TEXTS)) // 7
    again = tokenized(Dataset.from_dict({"text": TEXTS}), "text", tokenizer, called)
    assert again["input_ids"][:] == documents["input_ids"][:]
    assert again["document"][:] == called[kept].tolist()


def end_to_end(documents, length, together, separator):
    """As one would write it down: a list of pairs (token, whose), cut."""
    rows = list(zip(documents["input_ids"][:], documents["document"][:], strict=True))
    for first in range(0, len(rows), together):
        stream = [(i, whose) for ids, whose in rows[first : first + together] for i in [*ids, *separator]]
        for start in range(0, len(stream) - length + 1, length):
            block = stream[start : start + length]
            runs = [
                part
                for place, (_, whose) in enumerate(block)
                if place == 0 or block[place - 1][1] != whose
                for part in (place, whose)
            ]
            yield {"input_ids": [i for i, _ in block], "documents": runs}


@pytest.mark.parametrize(("together", "separator"), [(10_000, 0), (2_000, 0), (2_000, None)])
def test_blocks_go_on_from_batch_to_batch_and_begin_anew_after_so_many_documents(
    documents, together, separator, monkeypatch
):
    monkeypatch.setattr(blocks, "TOGETHER", together)
    after = [] if separator is None else [separator]
    made = packed(documents, 50, separator=separator)
    assert made.to_list() == list(end_to_end(documents, 50, together, after))


@pytest.mark.parametrize("end", [[], [0], [0, 7]])
def test_a_document_of_its_own_row_ends_unless_it_is_cut(documents, end):
    rows = zip(documents["input_ids"][:], documents["document"][:], strict=True)
    expected = [{"input_ids": [*ids, *end][:20], "documents": [0, whose]} for ids, whose in rows]
    assert one_each(documents, 20, end=end).to_list() == expected


def test_figures_over_batches_are_those_of_all_rows_at_once(documents):
    made = documents.select(range(1500, 100, -1)).add_column("prompt_tokens", list(range(1400)))
    lists = made["input_ids"][:]
    assert lengths_of(made).tolist() == list(map(len, lists))
    assert np.concatenate([*flat(made)]).tolist() == sum(lists, [])
    assert largest_id(made) == max(map(max, lists))
    digest = hashlib.sha256()
    for numbers in (list(map(len, lists)), sum(lists, []), list(range(1400))):
        digest.update(len(numbers).to_bytes(8) + np.array(numbers, "<i8").tobytes())
    assert fingerprint(made) == digest.hexdigest()[:16]


def test_a_row_belongs_to_the_document_of_which_it_holds_most_and_of_equals_to_the_first():
    documents = [[0, 4], [0, 1, 3, 2, 8, 3], [0, 9, 5, 5], [0, 6, 1, 7, 2, 8]]
    rows = Dataset.from_dict({"input_ids": [[0] * 10, [0] * 10, [0] * 10, [0] * 10], "documents": documents})
    assert units_of_rows(rows).tolist() == [4, 2, 9, 8]
    assert units_of_rows(rows.select([2, 1])).tolist() == [9, 2]
    assert units_of_rows(rows.select([])).tolist() == []


def test_a_long_wait_is_told_where_no_bar_is_drawn_and_what_was_made_is_known_again(
    tokenizer, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    texts = Dataset.from_dict({"text": [f"{number} is told" for number in range(2500)]})
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: True)
    once = tokenized(texts, "text", tokenizer)
    assert "tokenizing: 1,000 of 2,500 documents in" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: False)
    again = tokenized(texts, "text", tokenizer)
    assert again._fingerprint == once._fingerprint
    assert "tokenizing: " not in capsys.readouterr().out
