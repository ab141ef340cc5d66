"""Labels as people write them: one class for each name, numbers in their order, what is no class refused."""

import datetime
import json

import pytest
from conftest import sentences
from datasets import Dataset, Features, Sequence, Value

from kdlib.config.data import DataConfig
from kdlib.data.classification import split_texts
from kdlib.data.labelled_rows import read_texts
from kdlib.errors import DataError


def read(folder, column, *, form="jsonl", features=None, **settings):
    """The classes, each row's class by name, and notes."""
    texts = settings.pop("texts", None) or sentences(len(column))
    rows = Dataset.from_dict({"text": texts, "label": column}, features=features)
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        {"csv": rows.to_csv, "parquet": rows.to_parquet}[form](str(path))
    frames, names, notes = read_texts(DataConfig(source=str(path), **settings))
    return names, [names[number] for number in frames["train"]["class"]], notes


TWELVE = [n % 12 for n in range(36)]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("as_text", [True, False])
def test_numbers_are_in_the_order_of_numbers_in_every_form(tmp_path, form, as_text):
    written = list(map(str, TWELVE)) if as_text else TWELVE
    names, classes, _ = read(tmp_path, written, form=form)
    assert names == tuple(map(str, range(12)))
    assert classes == list(map(str, TWELVE))
    called = [f"class {n}" for n in range(12)]
    assert read(tmp_path, written, form=form, labels=called)[1] == [called[n] for n in TWELVE]
    later = [str(n + 1) if as_text else n + 1 for n in TWELVE]
    assert read(tmp_path, later, form=form, labels=called)[1] == [called[n] for n in TWELVE]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_words_that_mean_nothing_elsewhere_are_classes(tmp_path, form):
    words = ["None", "NA", "null", "nan", "2024-01-01", "true", "007", "1e3"]
    names, classes, _ = read(tmp_path, words * 2, form=form)
    assert names == tuple(sorted(words))
    assert classes == words * 2


def test_numbers_of_a_column_with_gaps_are_whole(tmp_path):
    for form in ("csv", "parquet", "jsonl"):
        names, classes, notes = read(tmp_path, [0.0, 1.0, None, 10.0] * 2, form=form, skip_unusable=True)
        assert (names, classes) == (("0", "1", "10"), ["0", "1", "10"] * 2)
        assert notes["unusable_rows_left_out"] == 2


ALIKE = ["Positive", "positive", "Positive", " positive", "negative", "Cafe\u0301", "Caf\u00e9", "Ca\ufb01"]


def test_names_that_are_alike_are_asked_for_merged_or_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, ALIKE)
    said = str(caught.value)
    assert "differ in case, spaces or Unicode's forms alone" in said
    assert "'Positive' (2 rows) and 'positive' (1 rows) and ' positive' (1 rows)" in said
    assert "set data.merge_labels: true" in said
    names, classes, notes = read(tmp_path, ALIKE, merge_labels=True)
    assert classes[:5] == ["Positive"] * 4 + ["negative"]
    assert len(names) == 4
    assert len(notes["merged_labels"]) == 2
    given = ["positive", "negative", "caf\u00e9", "cafi"]
    assert read(tmp_path, ALIKE, merge_labels=True, labels=given)[1] == [
        *["positive"] * 4,
        "negative",
        *["caf\u00e9"] * 2,
        "cafi",
    ]
    names, classes, _ = read(tmp_path, ["US", "us"] * 3, labels=["us", "US"])
    assert (names, classes) == (("us", "US"), ["US", "us"] * 3)


DAY = datetime.date(2024, 1, 1)
ODD = {
    "a list": ([["a"], ["a", "b"]], None),
    "a one-hot vector": ([[0, 1], [1, 0]], Sequence(Value("int64"))),
    "a date": ([DAY, DAY], Value("date32")),
    "a share": ([0.25, 0.5], Value("float64")),
    "what losses pass over": ([-100, 1], Value("int64")),
}


@pytest.mark.parametrize(("labels", "feature"), ODD.values(), ids=ODD.keys())
def test_what_is_no_class_is_refused_by_row(tmp_path, labels, feature):
    features = feature and Features({"text": Value("string"), "label": feature})
    with pytest.raises(DataError, match=r"whose label is no class.*\n  row 0 of train: its label is "):
        read(tmp_path, labels * 3, form="parquet", features=features)


def test_minus_one_is_a_class_where_it_can_be_nothing_else_and_is_asked_for_elsewhere(tmp_path):
    assert read(tmp_path, [-1, 1] * 3)[0] == ("-1", "1")
    with pytest.raises(DataError, match="-1 stands in 'label' beside 0, 1: a class, or rows without?"):
        read(tmp_path, [-1, 0, 1] * 3)
    names, classes, _ = read(tmp_path, [-1, 0, 1] * 3, labels=["bad", "fair", "good"])
    assert (names, classes) == (("bad", "fair", "good"), ["bad", "fair", "good"] * 3)
    with pytest.raises(DataError, match=r"3 rows cannot be used.*\n  row 0 of train: label '-1'"):
        read(tmp_path, [-1, 0, 1] * 3, labels=["no", "yes"])


def test_unusable_rows_are_left_out_where_that_is_asked_and_counted(tmp_path):
    texts, labels = sentences(40), ["a", "b"] * 20
    texts[3], texts[4], labels[5], labels[6] = None, " ", None, "c"
    with pytest.raises(DataError, match="4 rows cannot be used"):
        read(tmp_path, labels, texts=texts, labels=["a", "b"])
    names, classes, notes = read(tmp_path, labels, texts=texts, labels=["a", "b"], skip_unusable=True)
    assert (names, len(classes)) == (("a", "b"), 36)
    assert notes["unusable_rows_left_out"] == 4
    assert notes["first_unusable_rows"][0] == "row 3 of train: its text is None (NoneType)"
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), labels=["a", "b"], skip_unusable=True)
    splits, _, counted = split_texts(config, seed=0)
    assert sum(map(len, splits.values())) == 36
    assert counted["unusable_rows_left_out"] == 4
