"""A value that is not finite in a classification is named by whose it is and by the row with its text;
rows have no token position.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from datasets import Dataset
from made_classifiers import classification, classifier, prepared_rows
from safetensors.torch import load_file
from test_training_nan_guard import At, spoil

from kdlib.config.run import parse
from kdlib.data.batches import collate_classes
from kdlib.errors import NonFiniteLoss, RunError
from kdlib.models.loading import load_tokenizer
from kdlib.runs.files import StudentFolder
from kdlib.tasks import base as tasks
from kdlib.training.nan_report import joined
from kdlib.training.run import train

RARE, ROW = 250, 11  # a token that occurs once: in step 3, its second micro-batch
SLOW = {
    "optim": "sgd",
    "learning_rate": 0.01,
    "max_steps": 4,
    "eval_strategy": "no",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
}


@pytest.fixture
def stopped(tmp_path):
    """Trains until the planted value; gives the message and the report."""
    teacher = classifier(tmp_path / "teacher")
    student = classifier(tmp_path / "student", "bert", labels=["one", "two"], tokens=280, seed=1)
    made = prepared_rows(student, teacher)
    rows = made.train.to_list()
    for name in ("input_ids", "teacher_input_ids"):
        rows[ROW][name][2] = RARE
    prepared = replace(made, train=Dataset.from_list(rows))

    def run(plant):
        config = parse(classification(teacher, student, **SLOW))
        voice, model = tasks.load_teacher(config, prepared), tasks.untrained_student(config, prepared, None)
        with pytest.raises(NonFiniteLoss) as caught:
            train(
                config,
                StudentFolder(tmp_path / "run"),
                student=model,
                teacher=voice,
                prepared=prepared,
                tokenizer=load_tokenizer(student),
                callbacks=[At(3, partial(plant, model, voice.model))],
            )
        place = tmp_path / "run" / "nan_report"
        return (
            str(caught.value),
            json.loads((place / "report.json").read_text()),
            load_file(place / "batch.safetensors"),
            rows,
        )

    return run


def embedding_of_the_student(student, teacher):
    spoil(student.bert.embeddings.word_embeddings.weight, RARE)


def embedding_of_the_teacher(student, teacher):
    spoil(teacher.model.embed_tokens.weight, RARE)


@pytest.mark.parametrize(
    ("plant", "who", "module"),
    [
        (embedding_of_the_student, "student", "bert.embeddings.word_embeddings"),
        (embedding_of_the_teacher, "teacher", "model.embed_tokens"),
    ],
)
def test_a_spoilt_token_names_the_row_and_its_text(stopped, tmp_path, plant, who, module):
    message, report, batch, rows = stopped(plant)
    assert (report["step"], report["who"], report["module"]) == (3, who, module)
    assert (report["micro_batch"], report["row"], report["row_of_data"], report["position"]) == (
        1,
        3,
        ROW,
        None,
    )
    text = load_tokenizer(str(tmp_path / "student")).decode(rows[ROW]["input_ids"])
    assert report["text"] == text
    assert f"first at row 3 (row {ROW} of the data): {text!r}" in message
    assert "at 1 of 2 rows" in message
    assert batch["labels"].tolist() == [rows[i]["label"] for i in range(8, 12)]
    assert batch["teacher_input_ids"].shape[0] == batch["input_ids"].shape[0] == 4


def test_a_spoilt_head_is_named_with_the_first_row(stopped):
    message, report, _, _ = stopped(lambda student, teacher: spoil(student.classifier.weight, 0, 0))
    assert (report["module"], report["parameter"], report["row_of_data"]) == (
        "classifier",
        "classifier.weight",
        8,
    )
    assert "the student is not finite: classifier" in message


def test_a_step_without_a_class_says_which_rows(tmp_path):
    teacher = classifier(tmp_path / "teacher")
    made = prepared_rows(teacher)
    rows = Dataset.from_list([{**row, "label": -100} for row in made.train])
    config = parse(classification(teacher, teacher, **SLOW))
    prepared = replace(made, train=rows, collate=partial(collate_classes, pad_id=0, teacher_pad_id=0))
    with pytest.raises(
        RunError, match="step 1: no row has a class .* in rows \\[0, 1, 2, 3\\] of the training data"
    ):
        train(
            config,
            StudentFolder(tmp_path / "run"),
            student=tasks.untrained_student(config, prepared, None),
            prepared=prepared,
            teacher=tasks.load_teacher(config, prepared),
            tokenizer=load_tokenizer(teacher),
        )


def test_a_report_of_padded_micro_batches_keeps_every_row():
    one = collate_classes(
        [{"input_ids": [1, 2], "label": 0, "teacher_input_ids": [3]}], pad_id=0, teacher_pad_id=9
    )
    two = collate_classes(
        [{"input_ids": [4], "label": 2, "teacher_input_ids": [5, 6, 7]}], pad_id=0, teacher_pad_id=9
    )
    found = joined([one, two])
    assert torch.equal(found["input_ids"], torch.tensor([[1, 2], [4, 0]]))
    assert torch.equal(found["teacher_attention_mask"], torch.tensor([[1, 0, 0], [1, 1, 1]]))
    assert torch.equal(found["labels"], torch.tensor([0, 2]))


def test_a_held_out_row_that_the_teacher_cannot_read_is_named(tmp_path):
    teacher = classifier(tmp_path / "teacher")
    made = prepared_rows(teacher)
    rows = made.validation.to_list()
    rows[ROW]["input_ids"][1] = RARE
    prepared = replace(made, validation=Dataset.from_list(rows))
    config = parse(classification(teacher, teacher, **{**SLOW, "eval_strategy": "steps", "eval_steps": 1}))
    voice = tasks.load_teacher(config, prepared)
    spoil(voice.model.model.embed_tokens.weight, RARE)
    with pytest.raises(NonFiniteLoss, match=f"on held-out text .*row {ROW} of the data"):
        train(
            config,
            StudentFolder(tmp_path / "run"),
            student=tasks.untrained_student(config, prepared, None),
            teacher=voice,
            prepared=prepared,
            tokenizer=load_tokenizer(teacher),
        )
