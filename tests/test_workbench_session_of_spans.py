"""What the notebooks show where student and teacher read with two tokenizers."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import sentences, tiny_experiment, tiny_tokenizer
from transformers import AutoTokenizer

from kdlib.config.run import parse
from kdlib.data.batches import row_of
from kdlib.data.pairs import first_of
from kdlib.diagnostics import doctor, parity
from kdlib.losses.alignment import counted, single_in, spans_in
from kdlib.losses.objective import EVAL_TERMS, values_of
from kdlib.losses.signals import kept
from kdlib.plots.tokens import SpanView
from kdlib.tasks import base as tasks
from kdlib.tasks.language_modeling import _stretches
from kdlib.tokens.vocabulary import trained_tokenizer
from kdlib.training import trainer
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
    found = doctor.diagnose(parse(raw))
    assert "critical" not in {each.severity for each in found}
    (digits,) = (each for each in found if each.where == "loss.weights" and "digits" in each.what)
    assert digits.severity == "warning"
    assert re.search(r"of digits \d% of the \d+ tokens", digits.what)
    assert digits.fix.startswith("weight projected_kl or alm or uld beside it")
    served = parse(raw, {"loss.weights.alm": 0.1})
    assert not [each for each in doctor.diagnose(served, quick=True) if "digits" in each.what]


def test_a_document_that_only_one_can_read_is_told(bench):
    notes = {**bench.prepared.notes, "train_documents_not_aligned": 3}
    told = bench.task.facts(replace(bench.prepared, notes=notes), bench.tokenizer, bench.teacher)
    assert told["read by one alone"] == "3 documents, left out"


EVERY = {"span_kl": 0.3, "projected_kl": 0.2, "alm": 0.1, "uld": 0.3, "ce": 0.2, "hidden": 0.1}


def test_the_selftest_holds_every_term_over_spans_and_sees_a_wrong_count(raw, monkeypatch):
    config = parse({**raw, "loss": {"weights": EVERY}})
    table = parity.selftest(config)
    assert set(table["result"]) == {"pass"}
    assert "student = teacher: 0 in every divergence, nats" in table["compared"].tolist()
    monkeypatch.setattr(trainer, "counted", lambda spans: 2 * counted(spans))
    failed = parity.selftest(config).query("result == 'fail'")["compared"].tolist()
    assert "training = evaluation, loss and terms" in failed


def test_a_row_is_cut_between_stretches_and_taken_from_a_batch_as_it_is(bench):
    rows = [
        first_of(row, tokens) for row, tokens in zip(bench.prepared.train.to_list(), (4, 9), strict=False)
    ]
    for row, tokens in zip(rows, (4, 9), strict=True):
        ours, theirs = row["spans"][-2:]
        assert (len(row["input_ids"]), len(row["teacher_input_ids"])) == (ours, theirs)
        assert 2 <= ours <= max(tokens, row["spans"][2])
    batch = bench.prepared.collate(rows)
    for number, row in enumerate(rows):
        one, alone = row_of(batch, number), bench.prepared.collate([row])
        assert one["input_ids"].shape == (1, max(len(each["input_ids"]) for each in rows))
        for name in ("targets", "positions"):
            assert torch.equal(spans_in(one)[1][name], spans_in(alone)[1][name])
        assert spans_in(one)[0]["counts"] == spans_in(alone)[0]["counts"]


def test_a_question_keeps_the_last_token_of_its_prompt():
    row = {"input_ids": [5, 6, 7, 8, 9], "teacher_input_ids": [1, 2, 3], "prompt_tokens": 3}
    row |= {"teacher_prompt_tokens": 1, "spans": [3, 0, 3, 1, 4, 2, 5, 3]}
    cut = first_of(row, 9)
    assert cut == {
        "prompt_tokens": 1,
        "input_ids": [7, 8, 9],
        "teacher_input_ids": [1, 2, 3],
        "spans": [1, 1, 2, 2, 3, 3],
    }


def test_the_explorers_show_what_both_may_say_where_a_span_is_one_token(bench):
    bench.setup()
    found, known = bench.explore("untrained"), bench.prepared.vocabularies
    batch = bench.task.sample(bench.prepared, bench.tokenizer).batch
    assert len(found.texts) == len(found.targets) == len(single_in(batch)) > 20
    shared = int((known.shared >= 0).sum())
    for logits in found.logits.values():
        assert logits.shape == (len(found.texts), shared + 1)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(np.exp(logits.astype(float)).sum(-1), 1.0, rtol=1e-4)
    said = [found.decode(int(target)) for target in found.targets]
    assert said == list(found.texts)
    assert found.decode(shared) == "(all others)"
    facts = json.loads((bench.run.path / "explorers.json").read_text())
    assert np.isfinite(facts["students"]["untrained"]["kl"]).all()


def test_their_kl_is_span_kl(bench):
    found = bench.explore("untrained")
    facts = json.loads((bench.run.path / "explorers.json").read_text())
    batch, student = bench.task.sample(bench.prepared, bench.tokenizer).batch, bench.student()
    tokens = kept(batch["labels"])
    signals = [tasks.asked(student, bench.prepared)(batch, tokens), bench.teacher(batch, tokens)]
    values = values_of(*signals, tokens.targets, terms={"kl_to_teacher": EVAL_TERMS["kl_to_teacher"]})[
        "kl_to_teacher"
    ]
    expected = values[single_in(batch)].tolist()
    assert facts["students"]["untrained"]["kl"] == pytest.approx(expected, abs=2e-5)
    assert len(found.texts) == len(expected)


def test_what_is_not_compared_stands_in_one_box(bench):
    eos, other = bench.tokenizer.eos_token_id, AutoTokenizer.from_pretrained(bench.config.teacher.model)
    row = {"input_ids": [eos, 5, 6, 7], "teacher_input_ids": [0, 4, 5, 7], "prompt_tokens": 2}
    row |= {"spans": [2, 0, 2, 2, 3, 3, 4, 4]}
    kinds, *sides = zip(*_stretches(row, bench.tokenizer, other), strict=True)
    assert kinds == ("apart", "single", "single")
    assert [[len(each) for each in side] for side in sides] == [[2, 1, 1], [2, 1, 1]]
