import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import sentences, tiny_tokenizer
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing

from kdlib.config.data import DataConfig
from kdlib.data.batches import collate
from kdlib.data.blocks import packed
from kdlib.data.text import prepare, units_of_tokens
from kdlib.errors import DataError
from kdlib.losses.signals import IGNORED
from kdlib.sources.documents import read_documents, split_documents
from kdlib.sources.places import identity
from kdlib.workbench.tables import texts_in


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


def config(source, **changes) -> DataConfig:
    return DataConfig(**{"source": str(source), "max_length": 16, **changes})


def write(folder, form: str):
    """Fifty documents in one of the forms that a source may have."""
    table, path = Dataset.from_dict({"text": sentences(50)}), folder / f"text.{form}"
    if form == "saved":
        table.save_to_disk(path)
    elif form == "saved_splits":
        DatasetDict(train=table, validation=table.select(range(5))).save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        table.to_parquet(path / "train-0000.parquet")
    elif form == "txt":
        path.write_text("\n\n".join(sentences(50)))
    else:
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[form](str(path))
    return path


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "txt", "saved", "saved_splits", "folder"])
def test_every_form_of_a_source_gives_the_same_documents(tmp_path, form):
    documents = read_documents(config(write(tmp_path, form)))
    assert [text.strip() for text in documents["train"]["text"]] == sentences(50)
    assert ("validation" in documents) == (form == "saved_splits")


def test_the_built_in_text_needs_no_file():
    documents = read_documents(config("python-docs"))
    assert sum(map(len, documents["train"]["text"])) > 400_000


@pytest.mark.parametrize(("share", "count"), [(0.1, 3), (0.99, 29)])
def test_no_document_is_on_both_sides_and_each_is_read_where_it_comes(share, count):
    texts = sentences(30) * 2  # every document twice
    documents = DatasetDict(train=Dataset.from_dict({"text": texts}))
    sides = [split_documents(documents, config("x", validation=share), seed=seed) for seed in (0, 0, 1)]
    (train, held_out), again, other = ([side["text"][:] for side in split.values()] for split in sides)
    assert len(held_out) == count
    assert sorted([*train, *held_out], key=texts.index) == texts[:30]
    for side in (train, held_out):  # a disk is read from its beginning to its end
        assert sorted(side, key=texts.index) == side
    assert (train, held_out) == tuple(again)
    assert (train, held_out) != tuple(other)


@pytest.mark.parametrize("validation", [sentences(40)[30:], sentences(40)[30:] * 2], ids=["once", "twice"])
def test_what_a_sources_own_validation_repeats_of_train_is_not_trained_on(tmp_path, tokenizer, validation):
    train = sentences(40)
    splits = {"train": [*train, train[0]], "validation": validation}
    DatasetDict({n: Dataset.from_dict({"text": texts}) for n, texts in splits.items()}).save_to_disk(tmp_path)
    split = split_documents(read_documents(config(tmp_path)), config(tmp_path), seed=0)
    assert split["train"]["text"][:] == train[:30]
    assert split["validation"]["text"][:] == train[30:]
    notes = prepare(config(tmp_path), tokenizer, seed=0).notes
    assert notes["duplicate_documents_left_out"] == 11 + len(validation) - 10
    assert (notes["train_documents"], notes["validation_documents"]) == (30, 10)


def test_splits_may_have_other_names(tmp_path, tokenizer):
    parts = {"train_sft": sentences(40)[:30], "test_sft": sentences(40)[30:], "train": ["not this one"] * 3}
    DatasetDict({n: Dataset.from_dict({"text": texts}) for n, texts in parts.items()}).save_to_disk(tmp_path)
    asked = config(tmp_path, train="train_sft", validation="test_sft")
    documents = read_documents(asked)
    assert [documents[name]["text"][:] for name in documents] == [parts["train_sft"], parts["test_sft"]]
    assert prepare(asked, tokenizer, seed=0).notes["split"] == "the source's own"
    with pytest.raises(DataError, match=r"none of the name 'sft'; name the one to train on in data\.train"):
        read_documents(config(tmp_path, train="sft"))


def test_a_train_split_that_is_held_out_as_well_is_refused(tmp_path, tokenizer):
    DatasetDict(
        dict.fromkeys(("train", "validation"), Dataset.from_dict({"text": sentences(9)}))
    ).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="all that train has is held out .* give splits that do not repeat"):
        prepare(config(tmp_path), tokenizer, seed=0)


def test_blocks_are_the_documents_end_to_end():
    prepared = packed(Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}), 3, separator=0)
    assert prepared["input_ids"][:] == [[1, 2, 3], [0, 4, 5]]  # the last 0 does not fill a block
    assert prepared["documents"][:] == [[0, 0], [0, 0, 1, 1]]  # a separator is its document's


def authored(folder, authors):
    lines = [
        json.dumps({"text": text, "author": authors[n]}) for n, text in enumerate(sentences(len(authors)))
    ]
    path = folder / "authored.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("packing", [True, False])
def test_what_belongs_together_is_on_one_side_and_counts_as_one(tmp_path, tokenizer, packing):
    authors = [f"author {n % 12}" for n in range(60)]
    asked = config(authored(tmp_path, authors), group="author", validation=0.25, packing=packing)
    split = split_documents(read_documents(asked), asked, seed=0)
    sides = [set(each["author"]) for each in split.values()]
    assert not sides[0] & sides[1]
    assert len(split["validation"]) == 15
    made = prepare(asked, tokenizer, seed=0)
    units, what = units_of_tokens(made)
    assert what == "groups of documents"
    assert sorted(set(np.concatenate(units).tolist())) == [0, 1, 2]
    assert [len(each) for each in units] == list(map(len, made.validation["input_ids"]))


@pytest.mark.parametrize(
    ("authors", "changes", "expected"),
    [
        (["a"] * 6, {"group": "author"}, "all documents are of one author (data.group)"),
        (["a", "b", None, "", float("nan"), "a"], {"group": "author"}, "3 rows have nothing in 'author'"),
        (["a"] * 6, {"group": "writer"}, "no column 'writer'"),
    ],
)
def test_groups_that_are_none_are_refused_with_a_reason(tmp_path, tokenizer, authors, changes, expected):
    with pytest.raises(DataError) as caught:
        prepare(config(authored(tmp_path, authors), **changes), tokenizer, seed=0)
    assert expected in str(caught.value)


def test_held_out_blocks_are_taken_of_as_many_documents_as_there_can_be(tmp_path, tokenizer):
    """One document of half of all text, and many short ones."""
    path = tmp_path / "text.jsonl"
    texts = [" ".join(sentences(400)), *(" ".join(sentences(6, seed=n)) for n in range(1, 30))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = config(path, validation=0.5, max_eval_rows=15)
    for seed in range(3):
        made = prepare(asked, tokenizer, seed=seed)
        assert len(made.validation) == 15
        owners = {row["documents"][1] for row in made.validation} | {
            row["documents"][-1] for row in made.validation
        }
        assert len(owners) >= 14


def test_paragraphs_of_a_text_file_are_no_documents(tmp_path, tokenizer):
    made = prepare(config(write(tmp_path, "txt")), tokenizer, seed=0)
    units, what = units_of_tokens(made)
    assert [set(each.tolist()) for each in units] == [{n} for n in range(len(made.validation))]
    assert what == "blocks of one text, as if independent: rather too narrow"


def test_what_is_left_out_is_noted(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in [*sentences(30), *sentences(30)[:4], "a"]))
    notes = prepare(config(path), tokenizer, seed=0).notes
    assert notes["duplicate_documents_left_out"] == 4
    assert (
        notes["train_documents_shorter_than_two_tokens"]
        + notes["validation_documents_shorter_than_two_tokens"]
        == 1
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_without_a_text_are_left_out_and_counted_where_that_is_asked(
    tmp_path, tokenizer, streaming
):
    texts = [*sentences(30), None, 7, *sentences(30, seed=2)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how = {"packing": False, "streaming": streaming}
    how |= {"max_train_rows": 50, "max_eval_rows": 5} if streaming else {}
    with pytest.raises(DataError, match="document 30 of train has 'text' = None"):
        prepare(config(path, **how), tokenizer, seed=0)
    made = prepare(config(path, **how, skip_unusable=True), tokenizer, seed=0)
    notes, first = made.notes, [*made.train["input_ids"], *made.validation["input_ids"]]
    assert all(tokenizer.decode(ids).split()[0] in " ".join(sentences(9)) for ids in first)
    assert notes["unusable_rows_left_out"] == 2
    assert notes["first_unusable_rows"][0].startswith("document 30 of train has 'text' = None")
    assert texts_in(notes)["left out"].startswith("2 rows that cannot be used, as document 30")
    assert notes["train_documents"] + notes["validation_documents"] == 60


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path, tokenizer):
    path = write(tmp_path, "jsonl")
    prints = [prepare(config(path), tokenizer, seed=seed).notes["fingerprint"] for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_limits_take_a_sample_over_all_rows(tmp_path, tokenizer):
    path = write(tmp_path, "jsonl")
    whole, sample = (
        prepare(config(path), tokenizer, seed=0),
        prepare(config(path, max_train_rows=10), tokenizer, seed=0),
    )
    assert len(sample.train) == 10 < len(whole.train)
    rows = whole.train["input_ids"][:]
    assert all(row in rows for row in sample.train["input_ids"])
    assert sample.train["input_ids"][:] != rows[:10]


def test_unpacked_rows_are_one_document_each_cut_to_length(tmp_path, tokenizer):
    prepared = prepare(config(write(tmp_path, "jsonl"), packing=False), tokenizer, seed=0)
    assert len(prepared.train) == 45
    assert max(map(len, prepared.train["input_ids"])) == 16


def test_the_collator_masks_padding_and_the_first_token():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch["labels"].dtype is torch.long


@pytest.mark.parametrize(
    ("name", "content", "changes", "expected"),
    [
        ("txet.jsonl", None, {}, "no such file"),
        ("text.jsonl", "", {}, "is empty"),
        ("text.jsonl", '{"text": "a b c"}\n{"text": \nnot json\n[1]\n', {}, "3 broken lines\n  line 2"),
        ("text.jsonl", '{"txt": "a b c"}\n{"txt": "d"}\n', {}, "no column 'text'; it has txt"),
        (
            "text.jsonl",
            '{"text": "one document only, and long enough for a block of sixteen tokens"}\n',
            {},
            "one document only",
        ),
        ("text.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', {}, "shorter than two tokens"),
        (
            "text.jsonl",
            '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n',
            {"packing": False},
            "shorter than two tokens",
        ),
        ("text.jsonl", '{"text": "a b"}\n{"text": "b c d"}\n', {}, "lower max_length"),
        (
            "text.jsonl",
            '{"text": "a b"}\n{"text": null}\n',
            {},
            "1 row without a text, and every document needs one",
        ),
        (
            "text.jsonl",
            '{"text": ["a"]}\n{"text": ["b"]}\n',
            {},
            "document 0 of train has 'text' = ['a'] (list)",
        ),
        ("text.parquet", "this is no parquet", {}, "text.parquet: cannot be read: Parquet magic bytes"),
        ("text.csv", "text\n", {}, "no data"),
    ],
)
def test_text_that_cannot_be_used_is_refused_with_a_reason(
    tmp_path, tokenizer, name, content, changes, expected
):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        prepare(config(path, **changes), tokenizer, seed=0)
    assert expected in str(caught.value)


def test_folders_and_names_that_cannot_be_read_are_refused_with_a_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text("{")
    (tmp_path / "book.docx").write_text("text")
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ["a", "b"]}), validation=Dataset.from_dict({"body": ["c"]})
    )
    splits.save_to_disk(tmp_path / "uneven")
    reasons = {
        "empty": "no data file in it; it may be .jsonl, ",
        "torn": "torn: cannot be read: ",
        "book.docx": "unknown type of file",
        "uneven": "no column 'text'",
    }
    for name, expected in reasons.items():
        with pytest.raises(DataError) as caught:
            read_documents(config(tmp_path / name))
        assert expected in str(caught.value)


def test_a_file_name_is_not_a_pattern(tmp_path):
    path = write(tmp_path, "jsonl").rename(tmp_path / "we[ird]*.jsonl")
    assert len(read_documents(config(path))["train"]) == 50


def test_a_document_begins_with_bos_where_the_tokenizers_own_call_does(tmp_path, tokenizer):
    path = write(tmp_path, "jsonl")
    assert prepare(config(path, packing=False), tokenizer, seed=0).notes["each_document_begins_with"] == ""
    llama = tiny_tokenizer(sentences(200))
    llama.add_special_tokens({"bos_token": "<bos>"})
    llama._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", llama.bos_token_id)]
    )
    prepared = prepare(config(path, packing=False), llama, seed=0)
    assert prepared.notes["each_document_begins_with"] == "<bos>"
    assert all(row[0] == llama.bos_token_id != row[1] for row in prepared.train["input_ids"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [("pyton-docs", "did you mean 'python-docs'?"), ("./nowhere", "no such file or folder")],
)
def test_a_source_that_is_nothing_says_what_it_may_be(source, expected):
    with pytest.raises(DataError) as caught:
        read_documents(config(source))
    assert expected in str(caught.value)


def test_rows_of_the_hub_are_read_as_others_are_and_lie_where_datasets_looks_for_them(tmp_path, monkeypatch):
    asked, load = [], datasets.load_dataset_builder
    path = tmp_path / "rows.csv"
    path.write_text("text,n\nNone,1\nNA,02\n")

    def hub(*args):
        asked.append((args, load("csv", data_files=str(path))))
        return asked[-1][1]

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    rows = read_documents(config("org/rows", subset="small"))["train"]
    assert rows.to_list() == [{"text": "None", "n": "1"}, {"text": "NA", "n": "02"}]
    ((args, builder),) = asked
    assert args == ("org/rows", "small")
    before = identity(config("org/rows"))
    assert identity(config("org/rows")) == before
    path.write_text("text,n\nNone,1\nNA,03\n")  # as another revision is other files
    assert identity(config("org/rows")) != before
    assert Path(rows.cache_files[0]["filename"]).parent == Path(builder.cache_dir)


def test_rows_that_only_a_script_would_make_are_refused_and_it_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(DataError, match=r"code of its own, which is never run here .*rows\.py"):
        read_documents(config(str(tmp_path / "rows")))
    assert not ran.exists()


def test_a_whole_document_ends_with_eos_and_a_cut_one_does_not(tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    texts = ["the student learns", "the teacher says what it sees", "a student sees words again and again"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lengths = {len(tokenizer(text)["input_ids"]): text for text in texts}
    prepared = prepare(config(path, packing=False, max_length=max(lengths) - 1), tokenizer, seed=0)
    for row in [*prepared.train, *prepared.validation]:
        is_whole = tokenizer.decode(row["input_ids"], skip_special_tokens=True) in texts
        assert (row["input_ids"][-1] == tokenizer.eos_token_id) == is_whole
    labels = prepared.first_rows()["labels"]
    assert (labels == tokenizer.eos_token_id).any() or len(prepared.train) == 1  # and it is learned
    assert prepared.notes["each_document_ends_with"] == tokenizer.eos_token
