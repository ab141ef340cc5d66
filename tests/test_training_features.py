"""Training with feature terms, curricula, schedules and samples: the same invariants, and nothing asked
for out of its phase.
"""

import traceback
from pathlib import Path

import pytest
import torch
from made_log import read_metrics
from safetensors.torch import load_file
from tiny_training import pieces
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kdlib.config.run import parse
from kdlib.losses.signals import FOUND, found_in, kept
from kdlib.models import hooks as captures
from kdlib.runs.files import StudentFolder
from kdlib.training.plan import objective_of
from kdlib.training.run import train

SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
}
ALL = {"kd": 0.5, "ce": 0.2, "hidden": 0.3, "attention": 0.2, "relational": 0.1, "contrastive": 0.1}


def raw(raw_config, student=None, *, loss=None, **training) -> dict:
    changed = {
        **raw_config,
        "loss": {"weights": ALL, **(loss or {})},
        "training": {**raw_config["training"], **SGD, **training},
    }
    changed["data"] = {**raw_config["data"], "packing": False, "max_length": 24}  # rows of many lengths
    return {**changed, "student": {"from": student}} if student else changed


def trained(settings: dict, folder: Path, **options):
    """The trainer, its log lines, and the student's final parameters as one vector."""
    config = parse(settings)
    run = train(config, StudentFolder(folder), **pieces(config, dtype=torch.float64), **options)
    final = load_file(folder / "final_model" / "model.safetensors")
    return (
        run,
        read_metrics(StudentFolder(folder)),
        torch.cat([final[name].flatten() for name in sorted(final)]),
    )


@pytest.mark.parametrize(
    "variant",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True},
    ],
    ids=["1 x 8", "2 x 4", "gradient checkpointing"],
)
@pytest.mark.parametrize("other_sizes", [False, True], ids=["teacher's sizes", "projected"])
def test_the_step_is_the_same_with_every_feature_term(raw_config, narrow, tmp_path, variant, other_sizes):
    student = narrow if other_sizes else None
    _, lines, one = trained(raw(raw_config, student), tmp_path / "one")
    _, other_lines, other = trained(raw(raw_config, student, **variant), tmp_path / "other")
    # attention's softmax and the norms round to float32 inside the models
    assert (other - one).norm() <= 1e-8 * one.norm()
    for name in ALL:
        figures = [
            [line[f"train/{name}_loss"] for line in each if f"train/{name}_loss" in line]
            for each in (lines, other_lines)
        ]
        assert figures[0] == pytest.approx(figures[1], rel=1e-6)
        assert len(figures[0]) == 4


def test_projections_learn_and_are_not_saved_in_the_student(raw_config, narrow, tmp_path):
    settings = raw(
        raw_config, narrow, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
    )
    run, _, _ = trained(settings, tmp_path / "a")
    assert all(
        matrix.weight.grad is None or matrix.weight.isfinite().all()
        for matrix in run.model.distillation_projections
    )
    start = torch.nn.Linear(24, 32, bias=False, dtype=torch.float64).weight
    assert run.model.distillation_projections[0].weight.shape == start.shape
    for name in ("best_model", "final_model"):
        assert not [
            key for key in load_file(tmp_path / "a" / name / "model.safetensors") if "projection" in key
        ]
        AutoModelForCausalLM.from_pretrained(tmp_path / "a" / name)
    saved = [
        load_file(tmp_path / "a" / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4)
    ]
    one, other = (state["distillation_projections.0.weight"] for state in saved)
    assert (one - other).abs().max() > 0


def test_a_training_with_projections_resumes_to_the_same_end(raw_config, narrow, tmp_path):
    settings = raw(raw_config, narrow, save_strategy="steps", save_steps=2)
    _, lines, whole = trained(settings, tmp_path / "whole")
    config = parse(settings)
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(tmp_path / "kept")
    (tmp_path / "broken" / "checkpoints").mkdir()
    (tmp_path / "kept").rename(tmp_path / "broken" / "checkpoints" / "checkpoint-2")
    train(config, StudentFolder(tmp_path / "broken"), **pieces(config, dtype=torch.float64))
    final = load_file(tmp_path / "broken" / "final_model" / "model.safetensors")
    assert (
        torch.cat([final[name].flatten() for name in sorted(final)]) - whole
    ).norm() <= 1e-12 * whole.norm()


def test_outside_its_phase_a_feature_term_is_absent_and_nothing_is_asked_of_the_models(
    raw_config, narrow, tmp_path, monkeypatch
):
    asked = []

    def watched(model, numbers, *, hidden, attention):
        asked.append((hidden, attention, model.config._attn_implementation))
        return captured_layers(model, numbers, hidden=hidden, attention=attention)

    captured_layers = captures.captured_layers
    monkeypatch.setattr("kdlib.models.teacher.captured_layers", watched)
    curriculum = [
        {"until": 0.5, "weights": {"hidden": 0, "attention": 0}},
        {"until": 1.0, "weights": {"hidden": 0.3, "attention": 0.2}},
    ]
    settings = raw(
        raw_config,
        narrow,
        loss={"weights": {"kd": 1.0}, "curriculum": curriculum},
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=False,
    )
    _, lines, _ = trained(settings, tmp_path / "a")
    for split in ("train", "eval"):
        at = {line["train/step"]: line for line in lines if f"{split}/loss" in line}
        first = [1, 2] if split == "train" else [1]  # an evaluation after step 2 is judged as step 3 will be
        assert all(("hidden" in "".join(at[step])) == (step not in first) for step in at)
    assert asked[0] == (False, False, "sdpa")
    assert (True, True, "eager") in asked
    assert {look[2] for look in asked if not look[1]} == {"sdpa"}


def test_a_feature_term_that_ends_leaves_the_models_as_they_were(raw_config, tmp_path):
    curriculum = [{"until": 0.5, "weights": {"attention": 0.2}}, {"until": 1.0, "weights": {"attention": 0}}]
    run, lines, _ = trained(
        raw(raw_config, loss={"weights": {"kd": 1.0}, "curriculum": curriculum}), tmp_path / "a"
    )
    assert run.model.config._attn_implementation == "sdpa"
    assert run.teacher.model.config._attn_implementation == "sdpa"
    assert ["train/attention_loss" in line for line in lines if "train/loss" in line] == [
        True,
        True,
        False,
        False,
    ]


def test_the_learning_rate_follows_our_schedule(raw_config, tmp_path):
    course = {"joined": [[0.5, {"linear": [0, 1]}], [1.0, {"steps": {0: 0.5}}]]}
    settings = raw(raw_config, loss={"weights": {"ce": 1.0}}, lr_scheduler_type=course)
    _, lines, _ = trained(settings, tmp_path / "a")
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    assert rates == pytest.approx([0.05 * f for f in (0.0, 0.5, 0.5, 0.5)])


def test_terms_have_their_own_temperatures_and_top_k_its_course(raw_config, tmp_path):
    loss = {
        "weights": {"kd": 0.5, "reverse_kl": 0.5},
        "temperature": {"kd": {"linear": [4, 2]}, "reverse_kl": 1},
        "top_k": {"linear": [8, 4]},
    }
    settings = raw(raw_config, loss=loss)
    start, end = (objective_of(parse(settings)).at(at).formula for at in (0.0, 1.0))
    assert (
        start == "loss = 0.5·T²·KL(teacher ‖ student; T=4, top-8 + tail) + 0.5·T²·KL(student ‖ teacher; T=1)"
    )
    assert "T=2, top-4 + tail" in end
    _, lines, _ = trained(settings, tmp_path / "a")
    assert [
        (line["train/temperature"], line["train/kd_temperature"], line["train/reverse_kl_temperature"])
        for line in lines
        if "train/loss" in line
    ][1] == (3.5, 3.5, 1.0)


def test_samples_teach_and_the_evaluation_takes_their_expectation(raw_config, tmp_path):
    evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4}
    losses = {}
    for name, samples in (("sampled", 16), ("whole", None)):
        settings = raw(raw_config, loss={"weights": {"kd": 1.0}, "samples": samples}, **evaluated)
        _, lines, _ = trained(settings, tmp_path / name)
        losses[name] = [line["eval/kd_loss"] for line in lines if "eval/kd_loss" in line]
        assert ("from 16 samples" in objective_of(parse(settings)).at(0).formula) == (name == "sampled")
    assert losses["sampled"][0] == pytest.approx(losses["whole"][0], rel=1e-6)
    assert losses["sampled"][-1] < losses["sampled"][0]


def test_bfloat16_autocast_and_compiled_rows_train(raw_config, narrow, tmp_path):
    settings = {**raw(raw_config, narrow, loss={"compile": True}), "precision": "bfloat16"}
    config = parse(settings)
    train(config, StudentFolder(tmp_path / "a"), **pieces(config))
    first, *_, last = [
        line["train/loss"] for line in read_metrics(StudentFolder(tmp_path / "a")) if "train/loss" in line
    ]
    assert last < first


def test_layers_that_are_not_there_are_refused_before_training(raw_config, tmp_path):
    with pytest.raises(Exception, match="the student has layers 0 to 1, the teacher 0 to 3"):
        trained(raw(raw_config, loss={"features": {"layers": [[0, 7]]}}), tmp_path / "a")
    assert not (tmp_path / "a" / "final_model").exists()


class Waits(TorchDispatchMode):
    """Counts what waits for a device: whose result's size, or value, the CPU must know."""

    NAMES = ("nonzero", "_local_scalar_dense", "unique_consecutive", "_unique2", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        where = [frame.name for frame in traceback.extract_stack() if "kdlib/" in frame.filename]
        if function.__name__.split(".")[0] in self.NAMES and where:
            self.seen.append((function.__name__, where[-1]))
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_with_every_term_waits_for_no_device(raw_config, narrow, tmp_path):
    """Rows and kept tokens are found while the batch is made; on the way to the loss nothing asks a tensor.

    (On a CPU the backward pass of the chunked losses looks at one number, to spare a copy of the head.)
    """
    run, _, _ = trained(raw(raw_config, narrow, max_steps=1), tmp_path)
    rows = [run.train_dataset[i] for i in range(3)]
    batch = run.data_collator(rows)
    with Waits() as waits:
        run.compute_loss(run.model, batch, num_items_in_batch=torch.tensor(len(batch[FOUND]["positions"])))
    assert waits.seen == []
    with Waits() as waits:  # without what the collator found, it is asked for: the counter counts
        run.compute_loss(run.model, {**batch, FOUND: None}, num_items_in_batch=torch.tensor(9))
    assert len(waits.seen) > 3


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[5, 6, -100, 7], [1, -100, -100, -100], [1, 2, 3, 4]]),
        torch.tensor([3, -100, 0]),
        torch.full((2, 3), -100),
    ],
)
def test_what_the_collator_finds_is_what_the_labels_say(labels):
    plain, found = kept(labels), kept(labels, found_in(labels))
    for name in ("positions", "targets", "rows"):
        assert torch.equal(getattr(plain, name), getattr(found, name))
    assert sum(found.counts) == len(plain.targets)
