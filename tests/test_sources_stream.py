import json

import pytest
from conftest import sentences, tiny_tokenizer
from datasets import Dataset

from kdlib.config.data import DataConfig
from kdlib.config.run import parse
from kdlib.data.text import prepare
from kdlib.errors import ConfigError, DataError
from kdlib.sources import stream
from kdlib.tasks.base import task_of


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture
def corpus(tmp_path):
    """As on the hub: a folder with its train split in several files."""
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    texts = sentences(900)
    texts[400] = texts[399]
    for number in range(3):
        part = Dataset.from_dict({"text": texts[300 * number : 300 * (number + 1)]})
        part.to_parquet(folder / "data" / f"train-0000{number}-of-00003.parquet")
    return str(folder)


def streaming(source, **changes) -> DataConfig:
    settings = {"max_length": 16, "max_train_rows": 200, "max_eval_rows": 20, "streaming": True}
    return DataConfig(**{"source": str(source), **settings, **changes})


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_is_read_as_far_as_needed_and_its_head_is_held_out(corpus, tokenizer, packing, monkeypatch):
    seen = []

    def counted(**asked):
        for row in documents(**asked):
            seen.append(row["text"])
            yield row

    documents = stream._documents
    monkeypatch.setattr(stream, "_documents", counted)
    made = prepare(streaming(corpus, packing=packing), tokenizer, seed=0)
    assert (len(made.train), len(made.validation)) == (200, 20)
    assert seen == sentences(900)[: len(seen)]
    assert len(seen) < 300
    assert made.notes["split"] == "the beginning of a stream"
    head = [ids + [tokenizer.eos_token_id] for ids in tokenizer(seen)["input_ids"]]
    head = head[: made.notes["validation_documents"]]
    flat = sum(head, [])
    blocks = [flat[n : n + 16] for n in range(0, len(flat), 16)] if packing else [ids[:16] for ids in head]
    assert set(map(tuple, made.validation["input_ids"])) <= set(map(tuple, blocks))


def test_who_goes_on_sees_the_same_rows_and_changed_files_are_read_anew(
    corpus, tokenizer, tmp_path, monkeypatch
):
    first = prepare(streaming(corpus), tokenizer, seed=0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "another machine"))
    again = prepare(streaming(corpus), tokenizer, seed=0)
    assert again.notes["fingerprint"] == first.notes["fingerprint"]
    assert again.train.to_list() == first.train.to_list()
    name = f"{corpus}/data/train-00000-of-00003.parquet"
    Dataset.from_dict({"text": sentences(300, seed=5)}).to_parquet(name)
    assert prepare(streaming(corpus), tokenizer, seed=0).notes["fingerprint"] != first.notes["fingerprint"]


def test_each_text_of_a_stream_is_kept_once(corpus, tokenizer):
    notes = prepare(streaming(corpus, packing=False, max_train_rows=450), tokenizer, seed=0).notes
    assert notes["duplicate_documents_left_out"] == 1


def test_the_rows_that_max_steps_need_are_read(corpus, teacher_folder):
    training = {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    raw = {"teacher": {"model": str(teacher_folder)}, "student": {"from": "teacher", "layers": 2}}
    raw |= {"loss": {"weights": {"ce": 1}}, "training": training, "launch": {"processes": 2}}
    data = {"source": corpus, "streaming": True, "max_length": 16}
    config = parse({**raw, "data": data})
    made = task_of(config).prepare(config, tiny_tokenizer(sentences(200)))
    assert (len(made.train), len(made.validation)) == (80, 8)
    assert parse(config.as_dict()) == config
    for changes, expected in (
        ({"training": {}}, "data.streaming: needs training.max_steps"),
        ({"data": {**data, "group": "text"}}, "leave group out"),
        ({"task": "question-answering"}, "question-answering does not read"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse({**raw, "data": data, **changes})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "is empty"),
        ([{"txt": "a b"}] * 3, "no column 'text'; it has txt"),
        ([{"text": "a b c"}, {"text": None}], "document 1 of train has 'text' = None"),
        ([{"text": text} for text in sentences(3)], "ends after 3 documents"),
        ([{"text": text} for text in sentences(1200)] + ["broken"], "corpus.jsonl: 1 broken line"),
    ],
)
def test_a_stream_that_cannot_be_used_is_refused_with_a_reason(tmp_path, tokenizer, lines, expected):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join((line if line == "broken" else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        prepare(streaming(path, max_train_rows=50_000), tokenizer, seed=0)
    assert expected in str(caught.value)
