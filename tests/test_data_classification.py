"""Data of a classification: every form of a source, classes by name, stratified splits, each text once;
bad rows named one by one.
"""

import json
import re

import pytest
from conftest import sentences, tiny_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers.processors import TemplateProcessing

from kdlib.config.data import DataConfig
from kdlib.data.batches import fingerprint
from kdlib.data.classification import class_table, prepare
from kdlib.errors import DataError

TOPICS = ["World", "Sports", "Business", "Sci/Tech"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture(scope="module")
def bert_like():
    """Another vocabulary, and a token before and after each text."""
    made = tiny_tokenizer(sentences(50, seed=9), size=280)
    made.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    marks = [("[CLS]", made.cls_token_id), ("[SEP]", made.sep_token_id)]
    made._tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return made


def config(source, **changes) -> DataConfig:
    return DataConfig(**{"source": str(source), "max_length": 64, **changes})


def prepared(source, tokenizer, *, teacher=None, seed=0, known=None, **changes):
    return prepare(config(source, **changes), tokenizer, teacher=teacher, seed=seed, known=known)


def rows_of(count=200, seed=0) -> list[dict]:
    """Half World, a quarter Sports, the rest Business and Sci/Tech."""
    return [
        {"text": text, "label": TOPICS[[0, 1, 0, 2, 0, 1, 0, 3][row % 8]]}
        for row, text in enumerate(sentences(count, seed))
    ]


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_numbers(rows: list[dict], text: str = "text") -> Dataset:
    """The rows as a hub data set has them: numbers whose names stand in the features."""
    features = Features({text: Value("string"), "label": ClassLabel(names=TOPICS)})
    return Dataset.from_list(
        [{text: row["text"], "label": TOPICS.index(row["label"])} for row in rows], features=features
    )


def refusal(*args, **options) -> str:
    with pytest.raises(DataError) as caught:
        prepared(*args, **options)
    return str(caught.value)


def by_name(made, split="train") -> set[tuple[str, str]]:
    rows = getattr(made, split)
    return {(text, made.labels[number]) for text, number in zip(rows["text"], rows["label"], strict=True)}


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "saved", "folder"])
def test_every_form_of_a_source_gives_the_same_classes_by_name(tmp_path, tokenizer, form):
    rows, path = rows_of(), tmp_path / f"rows.{form}"
    if form == "parquet":
        with_numbers(rows).to_parquet(path)
    elif form == "saved":
        DatasetDict(train=with_numbers(rows)).save_to_disk(path)
    elif form == "folder":
        path.mkdir()
        with_numbers(rows).to_parquet(path / "train-00000.parquet")
    else:
        {"csv": Dataset.from_list(rows).to_csv, "jsonl": Dataset.from_list(rows).to_json}[form](str(path))
    made = prepared(path, tokenizer)
    assert list(made.labels) == (sorted(TOPICS) if form in ("csv", "jsonl") else TOPICS)
    assert by_name(made) | by_name(made, "validation") == {(row["text"], row["label"]) for row in rows}
    assert made.vocabulary == 4


def test_dbpedias_form_joins_title_and_content_and_takes_its_own_test(tmp_path, tokenizer):
    features = Features(
        {"label": ClassLabel(names=TOPICS), "title": Value("string"), "content": Value("string")}
    )
    rows = [
        {"label": row % 4, "title": f"Title {row}" if row % 5 else "", "content": text}
        for row, text in enumerate(sentences(120))
    ]
    (tmp_path / "dbpedia").mkdir()
    Dataset.from_list(rows[:100], features=features).to_parquet(
        tmp_path / "dbpedia" / "train-00000-of-00001.parquet"
    )
    Dataset.from_list(rows[100:], features=features).to_parquet(
        tmp_path / "dbpedia" / "test-00000-of-00001.parquet"
    )
    made = prepared(tmp_path / "dbpedia", tokenizer, text=["title", "content"])
    texts = {text for text, _ in by_name(made) | by_name(made, "validation")}
    assert f"Title 1\n{rows[1]['content']}" in texts
    assert rows[5]["content"] in texts  # nothing stands for the empty title
    assert (len(made.train), len(made.validation), len(made.test)) == (90, 10, 20)
    assert made.notes["test"] == "the source's own"


def test_glues_form_takes_named_splits_and_leaves_a_test_without_labels_aside(tmp_path, tokenizer):
    features = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=["yes", "maybe", "no"]),
        }
    )
    one, other = sentences(90), sentences(90, seed=1)
    rows = [
        {"premise": a, "hypothesis": b, "label": row % 3}
        for row, (a, b) in enumerate(zip(one, other, strict=True))
    ]
    unlabelled = [{"premise": f"{row['premise']}?", "hypothesis": "so", "label": -1} for row in rows[:10]]
    splits = {
        "train": rows[:60],
        "validation_matched": rows[60:80],
        "validation_mismatched": rows[80:],
        "test": unlabelled,
    }
    DatasetDict(
        {name: Dataset.from_list(each, features=features) for name, each in splits.items()}
    ).save_to_disk(tmp_path / "mnli")
    both = {"text": ["premise", "hypothesis"]}
    made = prepared(tmp_path / "mnli", tokenizer, validation="validation_matched", **both)
    assert (len(made.train), len(made.validation), made.test) == (60, 20, None)
    assert made.notes["test"] == "none: the source's has no labels"
    assert made.notes["split"] == "the source's validation_matched"
    made = prepared(
        tmp_path / "mnli", tokenizer, validation="validation_matched", test="validation_mismatched", **both
    )
    assert len(made.test) == 10
    assert "no row of 'test' has a label" in refusal(tmp_path / "mnli", tokenizer, test="test", **both)
    assert "did you mean 'validation_matched'?" in refusal(
        tmp_path / "mnli", tokenizer, validation="validation_match", **both
    )


def test_numbers_are_named_by_data_labels_and_may_begin_at_one(tmp_path, tokenizer):
    rows = rows_of()
    for first in (0, 1):
        path = jsonl(
            tmp_path,
            [{**row, "label": TOPICS.index(row["label"]) + first} for row in rows],
            f"from{first}.jsonl",
        )
        made = prepared(path, tokenizer, labels=TOPICS)
        assert by_name(made) | by_name(made, "validation") == {(row["text"], row["label"]) for row in rows}
        assert list(prepared(path, tokenizer).labels) == [str(number + first) for number in range(4)]


def test_names_of_the_config_put_classes_in_order_or_rename_them_but_never_both(tmp_path, tokenizer):
    rows, path = rows_of(), tmp_path / "rows.parquet"
    with_numbers(rows).to_parquet(path)
    turned = prepared(path, tokenizer, labels=TOPICS[::-1])
    assert list(turned.labels) == TOPICS[::-1]
    assert by_name(turned) == by_name(prepared(path, tokenizer))
    renamed = prepared(path, tokenizer, labels=["world", "sport", "Business", "science"])
    assert {label for _, label in by_name(renamed)} == {"world", "sport", "Business", "science"}
    assert "'Business' stands elsewhere there" in refusal(
        path, tokenizer, labels=["Business", "sport", "world", "science"]
    )
    assert "as many other names in this order" in refusal(path, tokenizer, labels=["a", "b"])


def test_splits_and_samples_keep_proportions_and_come_again_with_their_seed(tmp_path, tokenizer):
    path = jsonl(tmp_path, rows_of(800))
    changes = {"validation": 0.2, "test": 0.1, "max_train_rows": 80, "max_eval_rows": 40}
    made = prepared(path, tokenizer, **changes)
    table = class_table(made)
    assert table.loc[sorted(TOPICS)].to_dict("list") == {
        "train": [10, 10, 20, 40],
        "validation": [5, 5, 10, 20],
        "test": [5, 5, 10, 20],
    }
    assert made.notes["validation_documents"] == 160
    sides = [set(getattr(made, name)["text"]) for name in ("train", "validation", "test")]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 160
    prints = [
        prepared(path, tokenizer, seed=seed, split_seed=split_seed, **changes).notes["fingerprint"]
        for seed, split_seed in ((0, None), (0, None), (1, None), (1, 0))
    ]
    assert prints[0] == prints[1] == prints[3] != prints[2]
    assert prints[0] == fingerprint(made.train, made.validation, made.test)
    # not in the source's order
    assert made.train["text"][:] != sorted(made.train["text"], key=lambda text: int(text.split()[-1][:-1]))


def test_each_text_is_kept_once_and_one_with_two_classes_not_at_all(tmp_path, tokenizer):
    rows = rows_of(80)
    doubled = [*rows, *rows[:6], {**rows[10], "label": "Sports"}, {**rows[12], "label": "Sports"}]
    made = prepared(jsonl(tmp_path, doubled), tokenizer, test=0.2)
    texts = [text for name in ("train", "validation", "test") for text in getattr(made, name)["text"]]
    assert len(texts) == len(set(texts)) == 78
    assert (made.notes["duplicate_documents_left_out"], made.notes["conflicting_documents_left_out"]) == (
        6,
        4,
    )
    assert all("Sports, World" in line for line in made.notes["conflicting_documents"])


def test_a_text_of_the_sources_own_test_is_not_trained_on(tmp_path, tokenizer):
    rows = rows_of(80)
    DatasetDict(train=with_numbers(rows), test=with_numbers(rows[:20])).save_to_disk(tmp_path / "leaky")
    made = prepared(tmp_path / "leaky", tokenizer)
    assert by_name(made, "test") == {(row["text"], row["label"]) for row in rows[:20]}
    assert not by_name(made, "test") & (by_name(made) | by_name(made, "validation"))
    assert made.notes["duplicate_documents_left_out"] == 20


def test_rows_are_cut_with_their_last_token_and_read_by_the_teacher_in_its_own_way(
    tmp_path, tokenizer, bert_like
):
    made = prepared(jsonl(tmp_path, rows_of()), tokenizer, teacher=bert_like, max_length=12)
    for row in made.train:
        ids = row["teacher_input_ids"]
        assert (ids[0], ids[-1]) == (bert_like.cls_token_id, bert_like.sep_token_id)
        assert max(len(ids), len(row["input_ids"])) <= 12
        assert bert_like.decode(ids[1:-1]) == row["text"][: len(bert_like.decode(ids[1:-1]))]
    whole = [len(tokenizer(row["text"])["input_ids"]) for row in made.train]
    assert made.notes["train_documents_cut"] == sum(length > 12 for length in whole)
    assert made.notes["train_tokens"] == sum(min(length, 12) for length in whole)
    assert made.notes["train_documents_cut_for_the_teacher"] >= made.notes["train_documents_cut"]
    batch = made.collate([made.train[row] for row in range(3)])
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "teacher_input_ids",
        "teacher_attention_mask",
    }
    assert batch["labels"].tolist() == made.train[:3]["label"]
    assert (batch["teacher_input_ids"][batch["teacher_attention_mask"] == 0] == bert_like.pad_token_id).all()
    assert "teacher_input_ids" not in prepared(jsonl(tmp_path, rows_of()), tokenizer).train.column_names


def test_bad_rows_are_named_the_first_ten_and_their_count(tmp_path, tokenizer):
    rows = rows_of(60)
    for row in range(20, 34):
        rows[row]["label"] = "Sport"
    rows[3]["label"], rows[5]["text"], rows[7]["text"] = None, None, "  "
    said = refusal(jsonl(tmp_path, rows), tokenizer, labels=TOPICS)
    assert (
        "17 rows cannot be used; each needs a text, and a label that is one of 'World', 'Sports', "
        "'Business', 'Sci/Tech'" in said
    )
    assert "row 3 of train: no label; text '" in said
    assert "row 5 of train: its text is None (NoneType)" in said
    assert "row 7 of train: its text is '  '" in said
    assert "row 20 of train: label 'Sport'; did you mean 'Sports'?; text '" in said
    assert said.count("\n  row") == 10
    assert said.endswith("… and 7 more")


def test_a_class_that_the_teacher_does_not_know_is_named_row_by_row(tmp_path, tokenizer):
    path = jsonl(tmp_path, rows_of(80))
    # as heads are: whatever the case of their letters
    said = refusal(path, tokenizer, known=["world", "sports", "business"])
    assert "10 rows cannot be used" in said
    assert "row 7 of train: label 'Sci/Tech', which the teacher does not know" in said
    # a head for something else: the model is refused
    assert prepared(path, tokenizer, known=["POSITIVE", "NEGATIVE"]).vocabulary == 4


def test_texts_that_are_no_texts_are_named(tmp_path, tokenizer):
    path = jsonl(tmp_path, [{"text": row, "label": "ab"[row % 2]} for row in range(20)])
    assert "row 0 of train: its text is 0 (int)" in refusal(path, tokenizer)
    path = jsonl(
        tmp_path,
        [{"text": text, "more": row, "label": "ab"[row % 2]} for row, text in enumerate(sentences(20))],
    )
    assert "row 0 of train: its text is 0 (int)" in refusal(path, tokenizer, text=["text", "more"])


def test_a_class_that_is_empty_on_one_side_is_named(tmp_path, tokenizer):
    rows = [*rows_of(80), {"text": "one of a kind", "label": "Weather"}]
    said = refusal(jsonl(tmp_path, rows), tokenizer)
    assert "1 of the 5 classes are empty on one side after the split" in said
    assert "'Weather': 1 to train on, 0 held out" in said
    DatasetDict(
        train=with_numbers([row for row in rows[:80] if row["label"] != "Sports"]),
        validation=with_numbers(rows[:40]),
    ).save_to_disk(tmp_path / "lacking")
    assert "'Sports': 0 to train on, 10 held out" in refusal(tmp_path / "lacking", tokenizer)


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (rows_of(20), {"label": "labels"}, "no column 'labels'; it has text, label"),
        (rows_of(20), {"text": ["text", "titel"]}, "no column 'titel'"),
        (
            [{"text": text, "label": "a"} for text in sentences(20)],
            {},
            "the classes in 'label' are 'a'; two or more",
        ),
        (rows_of(20), {"labels": ["World", "World"]}, "each once"),
        (
            [{"text": text, "label": row % 3} for row, text in enumerate(sentences(20))],
            {"labels": ["a", "b"]},
            "row 2 of train: label '2';",
        ),
        (
            [{"text": text, "label": ["a"]} for text in sentences(20)],
            {"labels": ["a", "b"]},
            "whose label is no class; needed is one name",
        ),
    ],
)
def test_what_cannot_be_classified_is_refused_with_a_reason(tmp_path, tokenizer, rows, changes, expected):
    assert expected in refusal(jsonl(tmp_path, rows), tokenizer, **changes)


def test_more_classes_than_rows_wanted_leaves_some_out_of_the_sample_only(tmp_path, tokenizer):
    made = prepared(jsonl(tmp_path, rows_of(80)), tokenizer, max_eval_rows=2)
    assert len(made.validation) == 2
    assert sorted(made.notes["validation_classes"].values()) == [0, 0, 1, 1]


def grouped(count=200) -> list[dict]:
    """Rows of forty authors, five each."""
    return [{**row, "author": f"a{number // 5}"} for number, row in enumerate(rows_of(count))]


def test_what_belongs_together_is_held_out_together(tmp_path, tokenizer):
    rows = [{**row, "author": f"{row['label']} {number % 7}"} for number, row in enumerate(rows_of())]
    made = prepared(jsonl(tmp_path, rows), tokenizer, group="author", validation=0.2, test=0.2)
    sides = [set(getattr(made, name)["group"]) for name in ("train", "validation", "test")]
    assert set.union(*sides) == {row["author"] for row in rows}
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert re.fullmatch(r"0\.\d+ of the rows, by class, and whole authors", made.notes["split"])
    assert len(made.validation) / 200 == pytest.approx(float(made.notes["split"].split()[0]), abs=1e-3)
    assert made.notes["groups_on_two_sides"] == 0


def test_a_source_whose_own_splits_divide_what_belongs_together_is_counted(tmp_path, tokenizer):
    rows = grouped()
    saved = DatasetDict({"train": Dataset.from_list(rows[:152]), "validation": Dataset.from_list(rows[152:])})
    saved.save_to_disk(str(tmp_path / "own"))
    assert prepared(tmp_path / "own", tokenizer, group="author").notes["groups_on_two_sides"] == 1


def test_rows_that_belong_to_nothing_are_named(tmp_path, tokenizer):
    rows = grouped()
    rows[3]["author"] = rows[7]["author"] = None
    said = refusal(jsonl(tmp_path, rows), tokenizer, group="author")
    assert "2 rows have nothing in 'author' (data.group)" in said
    assert "row 3 of train" in said
    assert "no column 'writer'" in refusal(jsonl(tmp_path, rows), tokenizer, group="writer")
