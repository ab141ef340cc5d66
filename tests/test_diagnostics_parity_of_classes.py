"""The self-test of a classification passes where all is well, and names each planted error by the line
that it belongs to.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from made_classifiers import classification, classifier, prepared_rows, source

from kdlib.config.run import parse
from kdlib.data.batches import collate_classes
from kdlib.diagnostics import parity
from kdlib.losses.signals import DenseSignal
from kdlib.models.loading import load_tokenizer
from kdlib.models.teacher import LiveTeacher
from kdlib.tasks import base as tasks
from kdlib.training.trainer import DistillationTrainer

ACCUMULATION, PADDING, EVALUATION, TEACHER = (
    "1 batch of 3 rows = 3 of 1",
    "rows padded together = each row alone",
    "training = evaluation",
    "student = teacher",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    return (
        classifier(folder / "teacher", labels=["weather", "tools", "animals"]),
        classifier(folder / "student", "bert", labels=["one", "two"], tokens=280, seed=1),
    )


def table(raw: dict, *, collate=collate_classes, own_tokenizer: bool = True):
    config = parse(raw)
    teacher, student = config.teacher.model, config.student.source
    made = prepared_rows(student, teacher if own_tokenizer else None)
    prepared = replace(made, collate=partial(collate, pad_id=0, teacher_pad_id=0))
    return parity.parity(
        config,
        student=tasks.untrained_student(config, prepared, None),
        teacher=tasks.load_teacher(config, prepared),
        tokenizer=load_tokenizer(student),
        prepared=prepared,
    )


def failed(found) -> list[str]:
    return [re.split("[:,]", line)[0] for line in found[found["result"] == "fail"]["compared"]]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "loss",
    [
        {"weights": {"kd": 0.7, "ce": 0.3}, "temperature": 3},
        {"weights": {"ce": 1.0}},
        {"weights": {"kd": 1.0}, "top_k": 2},
    ],
    ids=["kd and ce", "ce", "top k"],
)
def test_a_sound_classification_passes_and_the_line_on_chunks_is_left_out(pair, precision, loss):
    found = table({**classification(*pair), "loss": loss, "precision": precision})
    assert list(found["result"]) == ["left out", "pass", "pass", "pass", "pass"], found.to_string()
    assert found["compared"][0].startswith("logits by the chunk: a row has 3")
    assert found["difference"][0] == ""


def test_rows_keep_their_classes_and_are_cut_for_both_models():
    rows = [
        {"input_ids": list(range(90)), "teacher_input_ids": list(range(30)), "label": 2} for _ in range(4)
    ]
    found = parity.shortened(rows)
    assert [len(row["input_ids"]) for row in found] == [21, 42, 64]
    assert [len(row["teacher_input_ids"]) for row in found] == [10, 20, 30]
    assert [row["label"] for row in found] == [2, 2, 2]


def mean_of_means(monkeypatch):
    right = DistillationTrainer.compute_loss

    def wrong(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return right(self, model, inputs, return_outputs, (inputs["labels"] != -100).sum())

    monkeypatch.setattr(DistillationTrainer, "compute_loss", wrong)


def classes_by_position(monkeypatch):
    """A teacher whose outputs stay in the order of its own."""
    right = LiveTeacher.__call__

    def wrong(self, *given, **asked):
        return DenseSignal(right(self, *given, **asked).values.roll(1, 1))

    monkeypatch.setattr(LiveTeacher, "__call__", wrong)


PLANTED = [(mean_of_means, [ACCUMULATION]), (classes_by_position, [TEACHER])]


@pytest.mark.parametrize(("plant", "lines"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_error_fails_the_line_that_it_belongs_to_and_no_other(pair, monkeypatch, plant, lines):
    plant(monkeypatch)
    assert failed(table(classification(*pair))) == lines


@pytest.mark.parametrize("whose", ["", "teacher_"], ids=["the student's", "the teacher's"])
def test_padding_that_is_read_fails_the_line_on_padding(pair, whose):
    """An encoder that attends to padding; or a decoder whose rows are padded with a token that it takes
    for text.
    """

    def wrong(rows, **pads):
        batch = collate_classes(rows, **pads)
        mask = batch[f"{whose}attention_mask"]
        filled = batch[f"{whose}input_ids"].where(mask == 1, 5)
        return {**batch, f"{whose}attention_mask": torch.ones_like(mask), f"{whose}input_ids": filled}

    assert failed(table(classification(*pair), collate=wrong)) == [PADDING]


def test_a_teacher_that_is_still_to_be_trained_does_for_the_self_test_of_a_config(tmp_path):
    body = classifier(tmp_path / "body", "bert", labels=["one", "two"])
    raw = {
        **classification(body, "teacher"),
        "student": {"from": "teacher", "layers": 1},
        "teacher_stage": {"training": {"max_steps": 5}},
    }
    found = parity.selftest(parse({**raw, "data": {"source": source(tmp_path, 60), "max_length": 32}}))
    assert list(found["result"]) == ["left out", "pass", "pass", "pass", "pass"], found.to_string()
