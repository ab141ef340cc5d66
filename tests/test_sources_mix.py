import json
from pathlib import Path

import numpy as np
import pytest
from conftest import sentences, tiny_tokenizer

from kdlib.config.data import DataConfig
from kdlib.config.run import parse
from kdlib.data.batches import fingerprint
from kdlib.data.kinds import kinds_of
from kdlib.data.text import prepare, units_of_tokens
from kdlib.errors import ConfigError, DataError
from kdlib.sources.documents import split_sources


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(sentences(200))


@pytest.fixture
def sources(tmp_path):
    """Two files, the second with its texts in another column, and ten of them in both."""
    both, paths, loud = sentences(10, seed=7), [], [text.upper() for text in sentences(300, seed=3)]
    for name, column, texts in (("one", "text", sentences(90)), ("two", "body", loud)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in [*texts, *both]))
        paths.append(str(path))
    return paths


def mix(sources, weights=(3, 1), **changes) -> DataConfig:
    parts = [{"source": path, "weight": weight} for path, weight in zip(sources, weights, strict=True)]
    parts[1]["text"] = "body"
    return DataConfig(**{"mix": parts, "max_length": 16, **changes})


def test_rows_are_mixed_by_weight_each_with_its_source_and_every_source_is_held_out(sources, tokenizer):
    config = mix(sources)
    made = prepare(config, tokenizer, seed=0)
    of = np.array(made.train["source"][:])
    first, second = made.notes["mix"]
    assert first["share"] == pytest.approx(np.mean(of == 0), abs=1e-4)
    assert first["share"] == pytest.approx(0.75, abs=0.08)
    assert set(made.validation["source"][:]) == {0, 1}
    assert [part["train_rows"] for part in (first, second)] == np.bincount(of).tolist()
    is_loud = np.array([any(map(str.isupper, tokenizer.decode(ids))) for ids in made.train["input_ids"]])
    assert not is_loud[of == 0].any()
    assert is_loud[of == 1].mean() > 0.9  # but for the ten texts that both have
    assert len(set(map(tuple, made.train["input_ids"]))) == len(made.train)  # none twice
    assert fingerprint(prepare(config, tokenizer, seed=0).train) == fingerprint(made.train)
    unlearned = prepare(mix(sources, weights=(1, 0)), tokenizer, seed=0)
    assert [part["share"] for part in unlearned.notes["mix"]] == [1, 0]
    assert unlearned.notes["mix"][1]["validation_rows"] > 0
    assert len(prepare(mix(sources, max_train_rows=20, max_eval_rows=6), tokenizer, seed=0).train) == 20


def test_a_text_of_two_sources_is_kept_once_and_on_one_side(sources):
    parts, repeated = split_sources(mix(sources, validation=0.3), seed=0)
    sides = {
        name: [text for config, split, _ in parts for text in split[name][config.text]]
        for name in ("train", "validation")
    }
    assert repeated == 10
    assert len(set(sides["train"])) + len(set(sides["validation"])) == 400
    assert not set(sides["train"]) & set(sides["validation"])


def test_units_and_kinds_know_their_source(sources, tokenizer):
    made = prepare(mix(sources, max_eval_rows=12), tokenizer, seed=0)
    units, what = units_of_tokens(made)
    assert what == "documents"
    of = made.validation["source"][:]
    assert not {n for u, s in zip(units, of, strict=True) if s == 0 for n in u} & {
        n for u, s in zip(units, of, strict=True) if s == 1 for n in u
    }
    kinds, names, how = kinds_of(made.validation, made, tokenizer)
    assert (set(names), how) == (set(sources), "source")
    assert [names[each[0]] for each in kinds] == [sources[number] for number in of]


FAULTS = {
    "nothing": ([{"source": "a", "weight": 0}, {"source": "b", "weight": 0.0}], "the weights sum to nothing"),
    "negative": ([{"source": "a", "weight": -1}, {"source": "b", "weight": 1}], "data.mix.0.weight"),
    "no number": ([{"source": "a", "weight": "x"}, {"source": "b", "weight": 1}], "data.mix.0.weight"),
    "alone": ([{"source": "a", "weight": 1}], "data.mix"),
    "key": ([{"source": "a", "wieght": 1}, {"source": "b", "weight": 1}], "did you mean 'weight'?"),
    "nameless": ([{"weight": 1}, {"source": "b", "weight": 1}], "data.mix.0.source: missing"),
    "twice": ([{"source": "a", "weight": 1}] * 2, "a source stands there twice"),
    "no list": ({"a": 1}, "data.mix"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mix_that_is_none_is_refused_with_the_reason(fault):
    parts, expected = FAULTS[fault]
    raw = {"teacher": {"model": "x"}, "student": {"from": "y"}, "data": {"mix": parts}, "training": {}}
    with pytest.raises(ConfigError) as caught:
        parse({**raw, "loss": {"weights": {"ce": 1}}})
    assert expected in str(caught.value)


def test_a_mix_is_written_and_read_again_and_other_tasks_do_not_read_it():
    raw = {"teacher": {"model": "x"}, "student": {"from": "y"}, "training": {}}
    parts = [{"source": name, "weight": 1} for name in "ab"]
    raw |= {"loss": {"weights": {"ce": 1}}, "data": {"mix": parts}}
    config = parse(raw)
    assert config.data.source == "a + b"
    assert parse(config.as_dict()) == config
    assert "mix" not in parse({**raw, "data": {"source": "a"}}).as_dict()["data"]
    for changes, expected in (
        ({"data": {"mix": parts, "source": "c"}}, "`mix` names the sources"),
        ({"task": "question-answering"}, "question-answering does not read"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse({**raw, **changes})


def test_a_source_of_a_mix_without_rows_of_its_own_is_refused_by_name(sources, tmp_path, tokenizer):
    same, empty = (tmp_path / f"{name}.jsonl" for name in ("same", "empty"))
    same.write_text(Path(sources[0]).read_text())
    empty.write_text("")
    parts = [{"source": name, "weight": 1} for name in (sources[0], str(same))]
    with pytest.raises(DataError, match=r"same\.jsonl: all \d+ train documents stand in other sources"):
        prepare(DataConfig(mix=parts, max_length=16), tokenizer, seed=0)
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty"):
        prepare(mix([str(empty), sources[1]]), tokenizer, seed=0)
