"""Rows are classified on the same road as tokens are predicted: the step's invariants with SGD, two
tokenizers, two orders of classes.
"""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from made_classifiers import LABELS, classification, classifier, permuted, prepared_rows
from made_log import read_metrics
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    TrainerControl,
    TrainerState,
)

from kdlib.config.run import parse
from kdlib.data.batches import collate_classes
from kdlib.errors import RunError
from kdlib.losses.signals import kept
from kdlib.models.classifier import load_classifier
from kdlib.models.loading import load_tokenizer
from kdlib.runs.files import StudentFolder
from kdlib.tasks import base as tasks
from kdlib.training.callbacks import EarlyStop
from kdlib.training.run import train

SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "eval_strategy": "no",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """A decoder as teacher, its classes in another order than the data's, and an encoder as student that
    reads otherwise.
    """
    folder = tmp_path_factory.mktemp("pair")
    teacher = classifier(folder / "teacher", "llama", labels=["weather", "tools", "animals"], tokens=300)
    return teacher, classifier(folder / "student", "bert", labels=["one", "two"], tokens=280, seed=1)


def trained(pair, folder, *, prepared=None, weights=None, student=None, early_stopping=None, **training):
    """A finished training; the change of the student's parameters as one vector, in float64."""
    raw = classification(*pair, **training)
    config = parse(
        {
            **raw,
            "early_stopping": early_stopping,
            "loss": {**raw["loss"], **({"weights": weights} if weights else {})},
        }
    )
    prepared = prepared or prepared_rows(*reversed(pair))
    double = training.get("optim") == "sgd"
    teacher, student = (
        tasks.load_teacher(config, prepared),
        student or tasks.untrained_student(config, prepared, None),
    )
    if double:
        teacher.model.double(), student.double()
    before = parameters_to_vector(student.parameters()).detach().clone()
    run = train(
        config,
        StudentFolder(folder),
        student=student,
        teacher=teacher,
        tokenizer=load_tokenizer(config.student.source),
        prepared=prepared,
    )
    return run, parameters_to_vector(student.parameters()).detach() - before


def without_dropout(pair):
    student = load_classifier(pair[1], LABELS, untrained=True)
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return student


def steps(pair, folder, *, prepared=None, weights=None, **training):
    torch.manual_seed(5)
    run, change = trained(
        pair, folder, prepared=prepared, weights=weights, student=without_dropout(pair), **{**SGD, **training}
    )
    assert change.norm() > 0.01  # SGD moved: an unmoved student would be equal too
    return change, run.state.log_history[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_8_is_the_same_as_so_many_accumulated(pair, tmp_path, batch):
    one, log = steps(pair, tmp_path / "one", per_device_train_batch_size=8)
    other, other_log = steps(
        pair, tmp_path / "other", per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch
    )
    assert (other - one).norm() <= 1e-12 * one.norm()
    assert other_log["loss"] == pytest.approx(log["loss"], rel=1e-6)


def test_rows_permuted_within_the_step_and_padded_further_change_nothing(pair, tmp_path):
    prepared = prepared_rows(*reversed(pair))
    order = [start + i for start in (0, 8, 16) for i in (3, 1, 7, 0, 6, 2, 5, 4)]

    def further(rows):
        batch = prepared.collate(rows)
        return {
            name: values if values.ndim == 1 else torch.nn.functional.pad(values, (0, 5))
            for name, values in batch.items()
        }

    sequential = {"train_sampling_strategy": "sequential"}
    one, _ = steps(pair, tmp_path / "one", prepared=prepared, **sequential)
    changed = replace(prepared, train=prepared.train.select(order), collate=further)
    other, _ = steps(pair, tmp_path / "other", prepared=changed, **sequential)
    assert (other - one).norm() <= 1e-12 * one.norm()


def test_a_step_is_the_one_written_out_by_hand(pair, tmp_path):
    """One SGD step against plain torch: mean over rows, each model with its own inputs, the teacher's
    outputs put into order by hand.
    """
    prepared = prepared_rows(*reversed(pair))
    change, log = steps(pair, tmp_path, prepared=prepared, max_steps=1, train_sampling_strategy="sequential")
    torch.manual_seed(5)
    student, batch = (
        without_dropout(pair).double().train(),
        prepared.collate([prepared.train[i] for i in range(8)]),
    )
    teacher = AutoModelForSequenceClassification.from_pretrained(pair[0]).double()
    assert batch["teacher_input_ids"].shape != batch["input_ids"].shape
    s = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    t = (
        teacher(input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"])
        .logits[:, [1, 2, 0]]
        .detach()
    )
    p, log_q = (t / 2).softmax(-1), (s / 2).log_softmax(-1)
    kd, ce = 4 * (p * (p.log() - log_q)).sum(-1).mean(), cross_entropy(s, batch["labels"])
    (0.7 * kd + 0.3 * ce).backward()
    by_hand = -0.05 * torch.cat(
        [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in student.parameters()]
    )
    assert (change - by_hand).norm() <= 1e-12 * by_hand.norm()
    assert (log["kd_loss"], log["ce_loss"]) == (
        pytest.approx(kd.item(), rel=1e-6),
        pytest.approx(ce.item(), rel=1e-6),
    )


def test_the_ledgers_total_is_the_loss_and_a_weight_of_0_removes_its_term(pair, tmp_path):
    _, log = steps(pair, tmp_path / "both")
    assert log["loss"] == pytest.approx(0.7 * log["kd_loss"] + 0.3 * log["ce_loss"], rel=1e-6)
    one, alone = steps(pair, tmp_path / "alone", weights={"ce": 0.3})
    other, silent = steps(pair, tmp_path / "silent", weights={"ce": 0.3, "kd": 0})
    assert torch.equal(one, other)
    assert "kd_loss" not in silent
    assert silent["loss"] == alone["loss"] == pytest.approx(0.3 * alone["ce_loss"], rel=1e-6)


def test_a_teacher_against_itself_through_a_permuted_copy_has_nothing_to_teach(pair, tmp_path):
    other = permuted(pair[0], tmp_path / "permuted", [1, 2, 0])
    config = parse({**classification(pair[0], other), "loss": {"weights": {"kd": 1.0}}})
    prepared = prepared_rows(other)
    run = train(
        config,
        StudentFolder(tmp_path / "run"),
        student=load_classifier(other, LABELS),
        prepared=prepared,
        stop_after=1,
        teacher=tasks.load_teacher(config, prepared),
        tokenizer=load_tokenizer(other),
    )
    figures = read_metrics(StudentFolder(tmp_path / "run"))
    assert figures[0]["train/kd_loss"] == pytest.approx(0, abs=1e-6)
    metrics = run.evaluate()
    assert metrics["eval_agreement"] == 1


def test_an_evaluation_has_the_measures_of_a_classification_as_by_hand(pair, tmp_path):
    run, _ = trained(pair, tmp_path)
    prepared, history = (
        prepared_rows(*reversed(pair)),
        [line for line in run.state.log_history if "eval_loss" in line],
    )
    assert {"eval_log_loss", "eval_accuracy", "eval_kl_to_teacher", "eval_agreement"} <= set(history[-1])
    assert "eval_perplexity" not in history[-1]
    batch = prepared.collate([prepared.validation[i] for i in range(len(prepared.validation))])
    tokens, student = kept(batch["labels"]), run.model.eval()
    with torch.no_grad():
        s = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(
            -1
        )
        t = run.teacher(batch, tokens).logits().log_softmax(-1)
    assert history[-1]["eval_log_loss"] == pytest.approx(
        -s[range(24), batch["labels"]].mean().item(), rel=1e-5
    )
    assert history[-1]["eval_accuracy"] == pytest.approx(
        (s.argmax(-1) == batch["labels"]).double().mean().item()
    )
    assert history[-1]["eval_macro_f1"] == pytest.approx(
        f1_score(batch["labels"], s.argmax(-1), average="macro", zero_division=0)
    )
    assert history[-1]["eval_agreement"] == pytest.approx(
        (s.argmax(-1) == t.argmax(-1)).double().mean().item()
    )
    assert history[-1]["eval_kl_to_teacher"] == pytest.approx(
        (t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-4
    )


def test_the_best_model_is_that_of_the_best_accuracy_and_loads_with_its_classes(pair, tmp_path):
    run, _ = trained(pair, tmp_path, learning_rate=2e-2, max_steps=12)
    lines = [line for line in run.state.log_history if "eval_loss" in line]
    best = max(line["eval_accuracy"] for line in lines)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best_model")
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.id2label == dict(enumerate(LABELS))
    prepared = prepared_rows(*reversed(pair))
    batch = prepared.collate(list(prepared.validation))
    with torch.no_grad():
        said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert (said == batch["labels"]).double().mean().item() == pytest.approx(best)
    assert load_tokenizer(str(tmp_path / "final_model")).get_vocab() == load_tokenizer(pair[1]).get_vocab()


def test_early_stopping_stops_and_leaves_the_final_model_and_the_history(pair, tmp_path):
    run, _ = trained(
        pair,
        tmp_path,
        early_stopping={"patience": 1},
        learning_rate=0.0,
        max_steps=20,
        save_strategy="steps",
        save_steps=2,
    )
    assert run.state.global_step == 4  # the second evaluation is no better than the first
    assert (tmp_path / "final_model" / "model.safetensors").exists()
    assert (tmp_path / "best_model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "history.json").read_text())


@pytest.mark.parametrize(
    ("accuracies", "patience", "min_delta", "stops"),
    [
        ([0.5, 0.6, 0.6, 0.6], 2, 0.0, True),
        ([0.5, 0.6, 0.6, 0.61], 2, 0.0, False),
        ([0.5, 0.52, 0.54, 0.56], 2, 0.03, False),  # small gains add up
        ([0.5, 0.51, 0.52], 2, 0.03, True),
        ([0.5, float("nan"), float("nan")], 2, 0.0, True),
        ([0.5, 0.4], 2, 0.0, False),
    ],
)
def test_early_stopping_counts_in_the_logged_evaluations_so_that_a_resumed_training_counts_on(
    accuracies, patience, min_delta, stops
):
    state = TrainerState(
        log_history=[
            {"loss": 1.0},
            *({"eval_accuracy": value, "step": n} for n, value in enumerate(accuracies)),
        ]
    )
    control = TrainerControl()
    args = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=True)
    EarlyStop(patience, min_delta).on_evaluate(args, state, control)
    assert control.should_training_stop is stops


def test_a_loss_is_better_where_it_is_lower():
    state, control = (
        TrainerState(log_history=[{"eval_log_loss": value} for value in (2.0, 1.5, 1.4)]),
        TrainerControl(),
    )
    EarlyStop(1, 0.0).on_evaluate(
        SimpleNamespace(metric_for_best_model="eval_log_loss", greater_is_better=False), state, control
    )
    assert control.should_training_stop is False


class Narrow(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_whose_forward_takes_no_kwargs_is_refused(pair, tmp_path):
    student = Narrow.from_pretrained(pair[1], num_labels=3, ignore_mismatched_sizes=True)
    with pytest.raises(RunError, match="takes \\*\\*kwargs, and Narrow's does not"):
        trained(pair, tmp_path, student=student)


def test_a_student_of_the_teachers_layers_learns(tmp_path):
    teacher = classifier(tmp_path / "teacher")
    config = parse({**classification(teacher, "teacher"), "student": {"from": "teacher", "layers": 1}})
    prepared = prepared_rows(teacher)
    voice = tasks.load_teacher(config, prepared)
    keep = tasks.layers_for_student(config, voice.model, prepared)
    student = tasks.untrained_student(config, prepared, keep)
    assert student.config.num_hidden_layers == 1
    assert torch.equal(student.score.weight, voice.model.score.weight)
    train(
        config,
        StudentFolder(tmp_path / "run"),
        student=student,
        teacher=voice,
        prepared=prepared,
        tokenizer=load_tokenizer(teacher),
    )
    assert load_classifier(str(tmp_path / "run" / "final_model"), LABELS).config.num_hidden_layers == 1


def test_rows_without_a_class_are_left_out_of_every_figure(pair, tmp_path):
    prepared = prepared_rows(*reversed(pair), held_out=8)
    unknown = Dataset.from_list(
        [
            {**row, "label": -100 if number % 2 else row["label"]}
            for number, row in enumerate(prepared.validation)
        ]
    )
    known = Dataset.from_list([row for row in unknown if row["label"] != -100])
    pads = partial(collate_classes, pad_id=0, teacher_pad_id=0)
    found = [
        trained(
            pair, tmp_path / name, prepared=replace(prepared, validation=rows, collate=pads), max_steps=2
        )[0]
        for name, rows in (("unknown", unknown), ("known", known))
    ]
    one, other = ([line for line in run.state.log_history if "eval_loss" in line][0] for run in found)
    assert one["eval_loss"] == pytest.approx(other["eval_loss"])
    assert one["eval_accuracy"] == pytest.approx(other["eval_accuracy"])


def test_each_terms_gradient_norm_is_logged(pair, tmp_path):
    raw = {**classification(*pair, max_steps=2), "diagnostics": {"grad_norms_every": 1}}
    config, prepared = parse(raw), prepared_rows(*reversed(pair))
    train(
        config,
        StudentFolder(tmp_path),
        student=without_dropout(pair),
        teacher=tasks.load_teacher(config, prepared),
        prepared=prepared,
        tokenizer=load_tokenizer(pair[1]),
    )
    first = read_metrics(StudentFolder(tmp_path))[0]
    assert first["train/kd_grad_norm"] > 0
    assert first["train/ce_grad_norm"] > 0
