"""What the notebooks show where student and teacher read with two tokenizers."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from conftest import sentences, tiny_experiment, tiny_tokenizer

from kdlib.config.run import parse
from kdlib.diagnostics import doctor
from kdlib.plots.tokens import SpanView
from kdlib.tokens.vocabulary import trained_tokenizer
from kdlib.workbench import session

TEXTS = [f"{line.rpartition(' ')[0]} 4711" for line in sentences(120, seed=1)]
"""With a number that is one token for the teacher, and four for the student."""


@pytest.fixture(scope="module")
def raw(teacher_folder, tmp_path_factory):
    """The tiny experiment on texts with a number, with a tokenizer for each model."""
    folder = tmp_path_factory.mktemp("two-tokenizers")
    teacher = shutil.copytree(teacher_folder, folder / "teacher")
    made = tiny_experiment(teacher, folder)
    tiny_tokenizer([f"{text} 4711 4711" for text in TEXTS]).save_pretrained(teacher)
    trained_tokenizer(TEXTS, 290).save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made["student"]["tokenizer"] = str(folder / "tokenizer")
    made["training"]["metric_for_best_model"] = "eval_perplexity"
    return {**made, "loss": {"weights": {"span_kl": 0.7, "ce": 0.3}}}


@pytest.fixture(scope="module")
def bench(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run-of-two")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return session.open_run(str(folder / "tiny.yaml"), str(folder / "run"), new=True)


def test_the_setup_says_what_two_vocabularies_share_and_what_is_lost(bench):
    said = bench.setup()[""]
    assert re.match(r"290 tokens, the teacher's 300; \d+ are of both, \d+% of", said["vocabularies"])
    assert re.match(r"\d+% of what is learned \(latin letters \d+%.*digits \d+%", said["one token of both"])
    assert re.match(r"\d\d\.\d% of what is learned", said["spans of both"])
    assert "vocabulary" not in said
    assert "read by one alone" not in said


def test_shapes_are_of_each_models_own_tokens(bench):
    table = bench.shapes()
    assert [vocabulary for _, vocabulary in table.loc["logits [N, V]"]] == [300, 290]
    assert table.loc["kept tokens N", "student"] == 30
    assert table.loc["kept tokens N", "teacher"] == table.loc["logits [N, V]", "teacher"][0]


def test_the_example_is_a_row_as_both_cut_it(bench):
    view, row = bench.example(), bench.prepared.train[0]
    assert isinstance(view, SpanView)
    kinds, ours, theirs = zip(*view.stretches, strict=True)
    assert sum(map(len, ours)) == len(row["input_ids"])
    assert sum(map(len, theirs)) == len(row["teacher_input_ids"])
    spans = bench.prepared.collate([row])["spans"]
    single = (spans["sizes"] == 1) & (spans["teacher_sizes"] == 1)
    assert kinds.count("single") == int(single.sum())
    assert kinds.count("several") == int((~single).sum())
    for kind, *sides in view.stretches:
        ends = {"".join(side).replace("<|endoftext|>", "<eos>") for side in sides}
        assert kind == "apart" or len(ends) == 1, sides


def test_the_doctor_names_a_class_of_tokens_that_no_term_sees_and_the_terms_that_do(raw):
    found = [each for each in doctor.diagnose(parse(raw), quick=True) if each.where == "loss.weights"]
    (digits,) = (each for each in found if "digits" in each.what)
    assert digits.severity == "warning"
    assert re.search(r"of digits \d% of the \d+ tokens", digits.what)
    assert digits.fix.startswith("weight projected_kl or alm or uld beside it")
    served = parse(raw, {"loss.weights.alm": 0.1})
    assert not [each for each in doctor.diagnose(served, quick=True) if "digits" in each.what]


def test_a_document_that_only_one_can_read_is_told(bench):
    notes = {**bench.prepared.notes, "train_documents_not_aligned": 3}
    told = bench.task.facts(replace(bench.prepared, notes=notes), bench.tokenizer, bench.teacher)
    assert told["read by one alone"] == "3 documents, left out"
