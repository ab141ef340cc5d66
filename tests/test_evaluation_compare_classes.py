import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics
from tiny_classifiers import LABELS, bert, llama, raw_config, rows_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdlib.config.run import parse
from kdlib.config.sections import EarlyStopping
from kdlib.errors import ModelError
from kdlib.evaluation import compare
from kdlib.runs import folder as runs
from kdlib.students.student import tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.tasks.classification import ClassComparison


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A decoder that knows the classes in another order, an encoder with another tokenizer, a trained
    student and a baseline.
    """
    place = tmp_path_factory.mktemp("classes")
    llama(place / "teacher", labels=LABELS[::-1])
    bert(place / "student")
    for name, seed in (
        ("run/best_model", 1),
        ("run/final_model", 2),
        ("run/baseline/best_model", 3),
        ("run/baseline/final_model", 4),
    ):
        bert(place / name, seed=seed)
    rows_file(place)
    return place


@pytest.fixture(scope="module")
def config(place):
    return parse(raw_config(place / "teacher", place / "student", place / "rows.jsonl"))


def compared(place, config):
    tokenizer = tokenizer_of(config)
    prepared = tasks.prepare(config, tokenizer)
    run = runs.Run(place / "run")
    runs.write_json(run.path / "manifest.json", {"student_layers": None})
    (run.path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    return compare.compare_run(run, config, tokenizer, prepared), prepared


@pytest.fixture(scope="module")
def found(place, config):
    results, prepared = compared(place, config)
    # at once: other tests compare other settings in the same folder
    assert json.loads((place / "run" / "comparison_results.json").read_text()) == results
    return results, prepared


def answers_by_hand(folder, texts):
    """[N, C] in the order of `LABELS`, one row after another by transformers alone."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    order = [model.config.label2id[label] for label in LABELS]
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:24]])).logits[0, order]
            for text in texts
        ]
    return torch.stack(logits).softmax(-1).numpy()


def test_decoder_and_encoder_with_their_own_tokenizers_and_label_orders_are_measured_rightly(found, place):
    results, prepared = found
    true, texts = prepared.test["label"][:], prepared.test["text"][:]
    teacher = answers_by_hand(place / "teacher", texts)
    for name, folder in (
        ("teacher", "teacher"),
        ("baseline", "run/baseline/best_model"),
        ("distilled", "run/best_model"),
    ):
        said = answers_by_hand(place / folder, texts)
        expected = {
            "accuracy": metrics.accuracy_score(true, said.argmax(1)),
            "macro_f1": metrics.f1_score(true, said.argmax(1), average="macro"),
            "log_loss": metrics.log_loss(true, said.astype(float) / said.sum(1, keepdims=True, dtype=float)),
            "agreement": np.mean(said.argmax(1) == teacher.argmax(1)),
            "kl_to_teacher": (teacher * np.log(teacher / said)).sum(1).mean(),
        }
        assert {m: results["models"][name][m]["value"] for m in expected} == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )
        assert results["models"][name]["confusion"] == metrics.confusion_matrix(true, said.argmax(1)).tolist()


def test_the_results_are_plain_data_in_the_runs_folder(found):
    results, prepared = found
    assert results["task"] == "sequence-classification"
    assert list(results["models"]) == ["teacher", "untrained", "baseline", "distilled"]
    assert results["labels"] == list(LABELS)
    assert results["rows"] == len(prepared.test) == 40
    assert results["worst"][0]["text"] in prepared.test["text"]
    assert set(results["worst"][0]["said"]) == {"teacher", "baseline", "distilled"}


def test_with_test_rows_the_best_students_are_compared_on_them(found):
    results, _ = found
    assert results["split"] == "test"
    assert results["rule"].startswith("best_model/")


def test_without_test_rows_the_final_students_are_compared_on_the_validation_rows(place, config, found):
    data = config.data.model_copy(update={"test": None})
    results, prepared = compared(place, config.model_copy(update={"data": data, "baseline": None}))
    said = answers_by_hand(place / "run" / "final_model", prepared.validation["text"][:])
    assert results["split"] == "validation"
    assert results["rule"].startswith("final_model/")
    assert results["models"]["distilled"]["accuracy"]["value"] == np.mean(
        said.argmax(1) == prepared.validation["label"]
    )
    assert "baseline" not in results["models"]


def test_who_has_an_advantage_on_the_validation_rows_is_said(found, config):
    prepared = replace(found[1], test=None)
    said = compare.rule_of(config.model_copy(update={"early_stopping": EarlyStopping(patience=2)}), prepared)
    assert "when early stopping by these very rows ended it" in said
    assert "the teacher is the best by these rows" not in said


def test_what_a_model_takes_is_measured(found, place):
    facts = found[0]["models"]["distilled"]
    assert (
        facts["size_on_disk_gib"] * 2**30
        == (place / "run" / "best_model" / "model.safetensors").stat().st_size
    )
    for timed in (facts["latency_ms"], facts["throughput_rows_per_s"]):
        assert 0 < timed["low"] <= timed["value"] <= timed["high"]


def test_a_model_whose_logits_are_not_finite_is_refused(place, config):
    tokenizer = tokenizer_of(config)
    prepared = tasks.prepare(config, tokenizer)
    comparison = ClassComparison(prepared, tokenizer, resamples=100)
    model = tasks.task_of(config).load(str(place / "teacher"), prepared)
    model.score.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="teacher: its logits are not finite in 40 of 40 rows"):
        comparison.add("teacher", tasks.teacher_of(model, prepared), prepared)
