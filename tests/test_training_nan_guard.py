"""A value that is not finite is named by whose it is, which term, row and position, and never reaches a
checkpoint.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from kdlib.config.run import parse
from kdlib.data.batches import collate
from kdlib.errors import NonFiniteLoss, RunError
from kdlib.losses import objective
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import Weighted
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.models.teacher import LiveTeacher
from kdlib.runs.files import StudentFolder
from kdlib.students.depth import shallower
from kdlib.training.nan_report import put_aside, report_of
from kdlib.training.nan_search import Origin
from kdlib.training.plan import objective_of, training_arguments
from kdlib.training.trainer import DistillationTrainer

NAN = float("nan")
RARE, ROW, POSITION = 299, 11, 5  # a token that occurs once: in step 3, its second micro-batch
PLACE = {"micro_batch": 1, "row_of_micro_batch": 1, "row": 3, "row_of_data": ROW, "position": POSITION}
TRAINING = {
    "optim": "sgd",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "max_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
}


class At(TrainerCallback):
    """Does something to the trainer before a step, counted from 1; or after the optimizer made it."""

    def __init__(self, step, plant, *, after=False):
        self.step, self.plant, self.after = step, plant, after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and not self.after:
            self.plant()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and self.after:
            self.plant()


@pytest.fixture
def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 20, (16,), generator=generator)
    ids = [torch.randint(RARE, (n,), generator=generator).tolist() for n in lengths]
    ids[ROW][POSITION] = RARE
    return Dataset.from_dict({"input_ids": ids})


@pytest.fixture
def tiny(raw_config, rows, tmp_path):
    """Makes a trainer of these rows, two steps before each checkpoint."""

    def make(*, collator=collate, tied=True, **training) -> DistillationTrainer:
        config = parse({**raw_config, "training": {**raw_config["training"], **TRAINING, **training}})
        tokenizer, student = (
            load_tokenizer(config.teacher.model),
            shallower(load_model(config.teacher.model), [0, 3]),
        )
        if not tied:
            student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
            student.config.tie_word_embeddings = False
        return DistillationTrainer(
            model=student,
            args=training_arguments(config, tmp_path / "checkpoints"),
            train_dataset=rows,
            eval_dataset=rows,
            tokenizer=tokenizer,
            data_collator=partial(collator, pad_id=tokenizer.pad_token_id),
            teacher=LiveTeacher(load_model(config.teacher.model), len(tokenizer)),
            vocabulary=len(tokenizer),
            objective=objective_of(config),
            workspace=Workspace(7),
            folder=StudentFolder(tmp_path),
        )

    return make


def stopped(run, folder, match: str) -> dict:
    """The report of a training that must stop in step 3, with its checkpoint of step 2 finite and alone."""
    with pytest.raises(NonFiniteLoss, match=match) as stop:
        run.train()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(folder / "checkpoints" / "checkpoint-2" / "model.safetensors").values()
    )
    report = json.loads((folder / "nan_report" / "report.json").read_text())
    assert (report["step"], report["stage"], report["last_checkpoint"]) == (
        3,
        "training",
        "checkpoints/checkpoint-2",
    )
    assert report["learning_rate"] == 0.01
    assert len(report["grad_norms_before"]) == 2
    assert report["grad_norm_before"] == pytest.approx(report["last_log"]["grad_norm"])
    batch, wanted = (
        load_file(folder / "nan_report" / "batch.safetensors"),
        collate(run.train_dataset.select(range(8, 12)), pad_id=0),
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        name: tensor.tolist() for name, tensor in wanted.items()
    }
    assert report["suggestions"][0] in str(stop.value)
    return report


def part(report: dict, *names: str) -> list:
    return [report[name] for name in names]


@torch.no_grad()
def spoil(weight, *index) -> None:
    weight[index] = NAN


@pytest.mark.parametrize(("who", "terms"), [("teacher", ["kd"]), ("student", ["ce", "kd"])])
def test_one_weight(tiny, tmp_path, who, terms):
    run = tiny()
    model = run.teacher.model if who == "teacher" else run.model
    name = "model.layers.1.mlp.gate_proj"
    run.add_callback(At(3, lambda: spoil(model.get_submodule(name).weight, 3, 7)))
    report = stopped(
        run,
        tmp_path,
        f"step 3: kd = nan at .*: the {who} is not finite: {name} is the first module .*weight \\(1 values",
    )
    assert part(report, "who", "term", "module", "parameter") == [who, "kd", name, f"{name}.weight"]
    # it spoils every token from the first on
    assert part(report, "micro_batch", "row", "row_of_data", "position") == [0, 0, 8, 0]
    assert report["tensors"] == {f"{name}.weight": {"values": 1, "first": [3, 7]}}
    assert sorted(report["terms"]) == terms
    assert report["suggestions"][0].startswith(
        {"teacher": "the teacher's own weights", "student": "an update made"}[who]
    )


@pytest.mark.parametrize("tied", [True, False], ids=["a row of the head too", "of the embedding alone"])
def test_one_row_of_the_students_embedding(tiny, tmp_path, tied):
    run = tiny(tied=tied)
    run.add_callback(At(3, lambda: spoil(run.model.model.embed_tokens.weight, RARE)))
    report = stopped(run, tmp_path, "the student is not finite: model.embed_tokens is the first module")
    assert part(report, "who", "module", "parameter") == [
        "student",
        "model.embed_tokens",
        "model.embed_tokens.weight",
    ]
    assert {name: report[name] for name in PLACE} == PLACE
    assert report["tensors"]["model.embed_tokens.weight"] == {"values": 32, "first": [RARE, 0]}
    token = run.tokenizer.decode([RARE])
    assert f"⟦{token}⟧" in report["text"]
    assert report["text"].startswith(run.tokenizer.decode(run.train_dataset[ROW]["input_ids"][:POSITION]))


def test_one_loss_term_at_one_token(tiny, tmp_path, monkeypatch):
    honest = objective.cross_entropy

    def spoilt(student_logits, teacher_logits, targets, temperature=1.0):
        # whose gradient is finite
        return honest(student_logits, teacher_logits, targets).masked_fill(targets == RARE, NAN)

    run = tiny()
    run.add_callback(At(3, lambda: monkeypatch.setattr(objective, "cross_entropy", spoilt)))
    report = stopped(
        run,
        tmp_path,
        "step 3: ce = nan at 1 of .* tokens: teacher and student are finite, the term is not; first at row 3",
    )
    assert part(report, "who", "term", "module", "parameter") == ["loss", "ce", None, None]
    assert {name: report[name] for name in PLACE} == PLACE
    assert report["terms"] == {"ce": {"value": "nan", "tokens": 1}}


@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_the_gradient_of_one_parameter(tiny, tmp_path, clipping):
    run, name = tiny(max_grad_norm=clipping), "model.layers.0.self_attn.v_proj.weight"
    weight = run.model.get_parameter(name)
    run.add_callback(At(3, lambda: weight.register_hook(lambda gradient: gradient * NAN)))
    report = stopped(
        run,
        tmp_path,
        f"step 3: the loss is finite .*, but not the gradient of {name} \\({weight.numel()} values",
    )
    assert part(report, "who", "parameter", "term", "row", "position") == ["gradient", name, None, None, None]
    assert list(report["tensors"]) == [name]
    assert ("clipping is off" in report["suggestions"][0]) == (clipping == 0)


def test_a_teacher_that_overflows_in_float16_is_to_be_asked_in_bfloat16(tiny, tmp_path):
    run = tiny()
    run.teacher.model.half()
    down = run.teacher.model.model.layers[2].mlp.down_proj
    run.add_callback(At(3, lambda: down.weight.data.mul_(1e4)))
    report = stopped(
        run,
        tmp_path,
        "the teacher is not finite: model.layers.2.mlp.down_proj is the first .*; its weights are",
    )
    assert report["precision"] == {"student": "float32", "teacher": "float16", "autocast": "off"}
    assert "precision: bfloat16" in report["suggestions"][0]


def test_weights_that_an_update_made_infinite_reach_no_checkpoint(tiny, tmp_path):
    run = tiny()
    run.add_callback(At(4, lambda: spoil(run.model.model.norm.weight, 0), after=True))
    with pytest.raises(
        NonFiniteLoss, match=r"step 4: .* the student is not finite: .*model.norm.weight \(1 values"
    ):
        run.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_what_is_finite_when_asked_once_more_is_not_blamed_on_anyone(tiny, tmp_path):
    run = tiny()
    run.add_callback(
        At(
            3,
            lambda: setattr(
                run.guard, "end", lambda loss, count: type(run.guard).end(run.guard, loss * NAN, count)
            ),
        )
    )
    report = stopped(run, tmp_path, "asked once more, it is")
    assert part(report, "who", "term", "row") == ["nobody", None, None]


def test_dropout_falls_as_it_fell(tiny):
    run = tiny()
    run.guard.begin(batch := collate(run.train_dataset.select(range(2)), pad_id=0), 0)
    first = torch.rand(3)
    with run.guard.micro_batches[0].replayed():
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(torch.rand(3), first)
    assert run.guard.micro_batches[0].inputs is batch  # no copy


def test_a_step_without_a_kept_token_stops_with_its_rows(tiny, rows):
    masked = [row["input_ids"] for row in rows.select(range(8, 12))]

    def collator(batch, pad_id):
        made = collate(batch, pad_id=pad_id)
        made["labels"][torch.tensor([row["input_ids"] in masked for row in batch])] = -100
        return made

    with pytest.raises(
        RunError,
        match=r"step 3: no row has a token that counts: .* in rows \[8, 9, 10, 11\] of the training data",
    ):
        tiny(collator=collator).train()


def test_an_evaluation_leaves_a_report_too(tiny, tmp_path, monkeypatch):
    spoilt = Weighted(
        lambda s, t, targets, temperature: torch.zeros(len(targets)).masked_fill(targets == RARE, NAN)
    )
    monkeypatch.setitem(objective.EVAL_TERMS, "kl_to_teacher", spoilt)
    with pytest.raises(
        NonFiniteLoss,
        match=r"step 4: on held-out text kl_to_teacher = nan at 1 of .* tokens: teacher and student",
    ):
        tiny(eval_strategy="steps", eval_steps=4).train()
    report = json.loads((tmp_path / "nan_report" / "report.json").read_text())
    assert part(report, "stage", "term", "row_of_data", "position") == [
        "evaluation",
        "kl_to_teacher",
        ROW,
        POSITION,
    ]


STATE = {
    "stage": "training",
    "step": 9,
    "precision": {"student": "float32", "teacher": "float32", "autocast": "off"},
    "loss": 2.5,
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "grad_norms_before": [1.0, 1.1, 0.9],
    "last_log": {},
    "last_checkpoint": None,
}


@pytest.mark.parametrize(
    ("origin", "state", "words"),
    [
        (
            Origin("student"),
            {"precision": {"student": "float32", "autocast": "float16"}},
            ["float16 ends at 65504", "too large"],
        ),
        (
            Origin("student", tensors={"w": {"values": 1, "first": [0]}}),
            {},
            ["an update made w not finite: go on from the last checkpoint"],
        ),
        (
            Origin("student", tensors={"w": {"values": 1, "first": [0]}}),
            {"grad_norms_before": []},
            ["no step was made yet, so w came so"],
        ),
        (
            Origin("student"),
            {"grad_norms_before": [1.0, 1.0, 3.0, 40.0]},
            ["too large to compute with", "grew from 1 to 40 in the 4 steps"],
        ),
        (Origin("teacher", module="m"), {}, ["its outputs in float32 are not"]),
        (
            Origin("gradient", tensors={"w": {"values": 3, "first": [0]}}),
            {"max_grad_norm": 0.0},
            ["gradient of w is not: lower.*clipping is off"],
        ),
        (Origin("nobody"), {}, ["loss.compile: false"]),
    ],
)
def test_advice_follows_from_what_was_seen(origin, state, words):
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}], pad_id=0)
    batch["labels"][1] = -100
    report = report_of(origin, {**STATE, **state}, [batch], None, None)
    found = report["suggestions"]
    assert len(found) == len(words) + 1
    for advice, expected in zip(found, words, strict=False):
        assert re.search(expected, advice)
    assert found[-1].startswith("in rows [1] of the batch every label is masked")


RANKED = """
import os, sys
sys.path.insert(0, {tests!r})
import tiny_training, torch
from pathlib import Path
from kdlib.config import run as config
from kdlib.losses import objective
from kdlib.training import run as training
from kdlib.runs.files import StudentFolder
honest = objective.cross_entropy
def spoilt(student_logits, teacher_logits, targets, temperature=1.0):
    return honest(student_logits, teacher_logits, targets) + float("nan")
if os.environ["RANK"] == "1":
    objective.cross_entropy = spoilt
settings = config.load(sys.argv[2])
training.train(settings, StudentFolder(Path(sys.argv[1])), **tiny_training.pieces(settings))
"""


def test_two_ranks_stop_together_and_the_one_at_fault_reports(raw_config, tmp_path):
    """gloo on the CPU; the gradient is finite, so that only rank 1 sees the fault.  Gradients by term
    hang no rank either.
    """
    (tmp_path / "ranked.py").write_text(RANKED.format(tests=str(Path(__file__).parent)))
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**raw_config, "diagnostics": {"grad_norms_every": 1}})
    )
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617")
    command = [
        sys.executable,
        *torchrun,
        *(str(tmp_path / name) for name in ("ranked.py", "run", "tiny.yaml")),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("NonFiniteLoss: step 1: ce = nan") == 2, done.stderr
    report = json.loads((tmp_path / "run" / "nan_report" / "report.json").read_text())
    assert part(report, "who", "term", "rank", "step") == ["loss", "ce", 1, 1]


def test_the_report_of_an_earlier_try_is_kept_beside(tmp_path):
    folder = StudentFolder(tmp_path)
    put_aside(folder)
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        (tmp_path / "nan_report").mkdir()
        (tmp_path / "nan_report" / "report.json").write_text(text)
        put_aside(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["nan_report_before"]
    assert (tmp_path / "nan_report_before" / "report.json").read_text() == "second"
