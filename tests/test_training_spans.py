"""The step's invariants with a teacher that has its own tokenizer, with SGD, for every term over spans."""

from dataclasses import replace

import pytest
import torch
from conftest import other_tokens, tiny_experiment
from tiny_training import pieces, trainer_of

from kdlib.config.run import parse
from kdlib.errors import ModelError
from kdlib.losses.buffers import Workspace
from kdlib.losses.signals import LinearSignal
from kdlib.routing.gates import compared_layers
from kdlib.runs.files import StudentFolder
from kdlib.students.student import check_pair, tokenizer_of
from kdlib.training.plan import objective_of
from kdlib.training.run import train

TERMS = ("span_kl", "projected_kl", "alm", "uld", "hidden", "relational", "contrastive")
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
SGD |= {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}


@pytest.fixture
def raw(teacher_folder, tmp_path):
    """Rows of many lengths, of a teacher and a student that read other tokens."""
    plain = tiny_experiment(teacher_folder, tmp_path)
    student = {"from": other_tokens(tmp_path / "student")}
    data = {**plain["data"], "packing": False, "max_length": 24}
    return {**plain, "student": student, "data": data, "loss": {"weights": {"ce": 1.0}}}


def padded(collate, rows, more: int = 9):
    """A batch with so much more padding, on both sides where there are two."""
    batch = collate(rows)
    fill = {"labels": -100}
    wide = {
        name: torch.nn.functional.pad(values, (0, more), value=fill.get(name, 0))
        for name, values in batch.items()
        if name not in ("spans", "kept")
    }
    if "spans" not in batch:
        return wide
    spans = dict(batch["spans"])
    for name in ("starts", "teacher_starts"):
        spans[name] = spans[name] + more * spans["rows"]
    return {**wide, "spans": spans}


def backwards(collate, rows):
    """The rows of a batch the other way round."""
    return collate(list(rows)[::-1])


def trained(raw, folder, term: str, *, collated=None, dense=False, chunk=7, **training):
    """The change that three steps make to the student's parameters, and what the first one logged."""
    size = {"per_device_train_batch_size": 8, **training}
    loss = {"weights": {term: 0.7, "ce": 0.3}, "temperature": 2.0}
    config = parse({**raw, "loss": loss, "training": {**raw["training"], **SGD, **size}})
    parts = pieces(config, dtype=torch.float64)
    student, teacher = parts["student"], parts["teacher"]
    pairs = compared_layers(config, student, teacher.model, objective_of(config))
    before = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    run = trainer_of(config, folder, parts, layer_pairs=pairs, collated=collated, dense=dense, chunk=chunk)
    run.train()
    return torch.nn.utils.parameters_to_vector(student.parameters()).detach() - before, run.state.log_history[
        0
    ]


VARIANTS = {
    "batch 8 x accumulation 1 = 2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padded further = padded to the longest": {"collated": padded},
    "rows the other way round": {"collated": backwards},
    "dense = chunked": {"dense": True},
    "chunks of 5 = chunks of 7": {"chunk": 5},
}


@pytest.mark.parametrize("term", TERMS)
def test_the_step_is_the_same(raw, tmp_path, term):
    one, log = trained(raw, tmp_path / "one", term)
    assert one.norm() > 0.01
    assert log[f"{term}_loss"] > 1e-3
    for name, variant in VARIANTS.items():
        other, other_log = trained(raw, tmp_path / name.replace(" ", "_"), term, **variant)
        assert (other - one).norm() <= 1e-9 * one.norm(), name
        figures = {key: value for key, value in log.items() if key.endswith(("loss", "weight"))}
        assert {key: other_log[key] for key in figures} == pytest.approx(figures, rel=1e-9), name


def test_an_evaluation_is_that_of_training_and_tokens_are_told_from_spans(raw, tmp_path):
    """All held-out rows in one batch of training; an evaluation sees them seven at a time."""
    weights = {"ce": 0.2, **dict.fromkeys(("span_kl", "projected_kl", "alm", "uld"), 0.2)}
    training = {**raw["training"], **SGD, "learning_rate": 0.0, "max_steps": 1}
    training |= {"per_device_train_batch_size": 200, "per_device_eval_batch_size": 7}
    config = parse({**raw, "loss": {"weights": weights}, "training": training})
    parts = pieces(config)
    parts["prepared"] = replace(parts["prepared"], train=parts["prepared"].validation)
    run = train(config, StudentFolder(tmp_path / "run"), **parts, stop_after=1)
    learned, held_out = run.state.log_history[0], run.evaluate()
    for name in ("loss", *(f"{term}_loss" for term in weights)):
        assert held_out[f"eval_{name}"] == pytest.approx(learned[name], rel=1e-5)
    assert 0 <= held_out["eval_agreement"] < 1
    assert 0 < learned["single_spans"] < learned["spans"] < learned["kept_tokens"]


def test_a_term_of_one_vocabulary_asked_of_two_names_the_four(raw):
    for term in ("kd", "reverse_kl", "attention"):
        config = parse({**raw, "loss": {"weights": {term: 1.0}}})
        with pytest.raises(ModelError, match="span_kl, projected_kl, alm, uld"):
            check_pair(config, tokenizer_of(config))


def test_no_more_logits_of_a_larger_vocabulary_exist_than_of_the_students():
    student = LinearSignal(torch.zeros(4, 8), torch.zeros(1000, 8))
    alone, beside = Workspace().chunk_for(student), Workspace(vocabulary=50_000).chunk_for(student)
    assert beside == Workspace().chunk_for(LinearSignal(torch.zeros(4, 8), torch.zeros(50_000, 8))) < alone
