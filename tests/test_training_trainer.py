"""The step's invariants, with SGD: AdamW would hide a wrong factor."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from made_log import read_metrics
from safetensors.torch import load_file
from tiny_training import comparable, pieces
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from kdlib.config.run import parse
from kdlib.data.batches import collate
from kdlib.errors import NonFiniteLoss, RunError
from kdlib.losses import objective
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import Weighted
from kdlib.losses.signals import Form, kept
from kdlib.runs.checkpoints import last_whole
from kdlib.runs.files import StudentFolder
from kdlib.runs.log import eval_table, training_table
from kdlib.training import callbacks
from kdlib.training.plan import extent, objective_of, training_arguments
from kdlib.training.run import train
from kdlib.training.trainer import DistillationTrainer

SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
}
SCRIPT = Path(__file__).parent / "tiny_training.py"


@pytest.fixture
def rows() -> Dataset:
    """24 rows of very different lengths, so that a mean of means shows."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (24,), generator=generator)
    return Dataset.from_dict(
        {"input_ids": [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]}
    )


def trained(
    raw_config,
    rows,
    folder,
    *,
    dtype=torch.float64,
    collator=None,
    dense=False,
    weights=None,
    chunk=7,
    **training,
):
    """The change that three SGD steps make to the student's parameters, as one vector; and the first step's
    log.

    In float32 the change is rounded to the parameters' own last digits, so there the parameters themselves
    are returned.
    """
    config = parse({**raw_config, "training": {**raw_config["training"], **SGD, **training}})
    parts = pieces(config, dtype=dtype)
    student, tokenizer = parts["student"], parts["tokenizer"]
    before = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    run = DistillationTrainer(
        model=student,
        args=training_arguments(config, folder / "checkpoints"),
        train_dataset=rows,
        tokenizer=tokenizer,
        data_collator=collator or partial(collate, pad_id=tokenizer.pad_token_id),
        objective=objective_of(config, weights),
        teacher=parts["teacher"],
        vocabulary=len(tokenizer),
        workspace=Workspace(chunk),
        folder=StudentFolder(folder),
        dense=dense,
    )
    run.train()
    after = torch.nn.utils.parameters_to_vector(student.parameters()).detach()
    # SGD moved: an unmoved student would be equal too
    assert (after - before).norm() > 0.01 or weights == {"kd": 1.0}
    return after - before if dtype is torch.float64 else after, run.state.log_history[0]


def padded(batch_rows, length: int = 32):
    batch = collate(batch_rows, pad_id=0)
    missing = length - batch["input_ids"].shape[1]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.functional.pad(values, (0, missing), value=fill[name])
        for name, values in batch.items()
    }


VARIANTS = {
    "batch 8 x accumulation 1 = 1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "batch 8 x accumulation 1 = 2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padded to 32 = padded to the longest": {"collator": padded},
    "dense = chunked": {"dense": True},
    "chunks of 5 = chunks of 7": {"chunk": 5},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
def test_the_step_is_the_same(raw_config, rows, tmp_path, variant, dtype, tolerance):
    whole = {"per_device_train_batch_size": 8}
    one, log = trained(raw_config, rows, tmp_path / "one", dtype=dtype, **whole)
    other, other_log = trained(raw_config, rows, tmp_path / "other", dtype=dtype, **{**whole, **variant})
    assert (other - one).norm() <= tolerance * one.norm()
    assert other_log["loss"] == pytest.approx(log["loss"], rel=1e-6)


def test_rows_permuted_within_the_step_change_nothing(raw_config, rows, tmp_path):
    order = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    permuted = rows.select([start + i for start in (0, 8, 16) for i in (3, 1, 7, 0, 6, 2, 5, 4)])
    one, _ = trained(raw_config, rows, tmp_path / "one", **order)
    other, _ = trained(raw_config, permuted, tmp_path / "other", **order)
    assert (other - one).norm() <= 1e-12 * one.norm()


def test_a_step_is_the_one_written_out_by_hand(raw_config, rows, tmp_path):
    """One SGD step against plain torch: full logits, mean over kept tokens, the teacher's softened
    distribution.
    """
    change, log = trained(
        raw_config,
        rows,
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
    )
    parts = pieces(parse(raw_config), dtype=torch.float64)
    batch = collate([rows[i] for i in range(8)], pad_id=0)
    tokens = kept(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student = parts["student"].train()
    s = tokens.select(student(**inputs).logits)[:, :300]
    t = tokens.select(parts["teacher"].model(**inputs).logits)[:, :300]
    p, log_q = (t / 2).softmax(-1), (s / 2).log_softmax(-1)
    kd = 4 * (p * (p.log() - log_q)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(s, tokens.targets)
    (0.7 * kd + 0.3 * ce).backward()
    by_hand = -0.05 * torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert (change - by_hand).norm() <= 1e-12 * by_hand.norm()
    assert log["kd_loss"] == pytest.approx(kd.item(), rel=1e-6)
    assert log["ce_loss"] == pytest.approx(ce.item(), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(raw_config, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("test_training_trainer.pieces", partial(pieces, layers=range(4)))
    change, log = trained(raw_config, rows, tmp_path, weights={"kd": 1.0}, per_device_train_batch_size=8)
    assert abs(log["kd_loss"]) < 1e-6
    assert change.norm() < 1e-12


def test_a_weight_of_zero_is_a_term_removed(raw_config, rows, tmp_path):
    one, log = trained(
        raw_config, rows, tmp_path / "one", weights={"kd": 0.0, "ce": 0.3}, per_device_train_batch_size=8
    )
    other, _ = trained(
        raw_config, rows, tmp_path / "other", weights={"ce": 0.3}, per_device_train_batch_size=8
    )
    assert "kd_loss" not in log
    assert torch.equal(one, other)


def test_a_model_that_gets_no_token_count_is_refused(raw_config, rows, tmp_path):
    class Narrow(type(tiny_model())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, logits_to_keep=0):
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
            )

    config = parse({**raw_config, "training": {**raw_config["training"], **SGD}})
    run = DistillationTrainer(
        model=Narrow(tiny_model().config),
        args=training_arguments(config, tmp_path),
        train_dataset=rows,
        data_collator=partial(collate, pad_id=0),
        objective=objective_of(config, {"ce": 1}),
        teacher=None,
        vocabulary=300,
        folder=StudentFolder(tmp_path),
    )
    with pytest.raises(RunError, match="takes \\*\\*kwargs, and Narrow's does not"):
        run.train()


def test_terms_that_do_not_sum_to_the_loss_stop_the_run(raw_config, rows, tmp_path, monkeypatch):
    honest = DistillationTrainer.compute_loss
    monkeypatch.setattr(
        DistillationTrainer, "compute_loss", lambda self, *a, **k: honest(self, *a, **k) * 1.001
    )
    with pytest.raises(
        RunError,
        match="step 1: the terms sum to .*: no usual mistake with one term explains it: the loss is 1.001 x",
    ):
        trained(raw_config, rows, tmp_path)


def test_a_step_that_is_not_finite_stops_the_run_before_it_is_made(raw_config, rows, tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=r"(?s)step 2: the loss is finite .*, but not the gradient of .*clipping is off"
    ):
        trained(raw_config, rows, tmp_path, learning_rate=1e30, dtype=torch.float32)


def full_training(raw_config, folder: Path, **training) -> DistillationTrainer:
    config = parse({**raw_config, "training": {**raw_config["training"], **training}})
    return train(config, StudentFolder(folder), **pieces(config))


def test_a_training_leaves_its_files(raw_config, tmp_path):
    run = full_training(raw_config, tmp_path / "run")
    folder = StudentFolder(tmp_path / "run")
    lines = read_metrics(folder)
    assert [line["train/step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8, 10, 12]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["train/step"] for line in evaluations] == [4, 8, 12]
    for line in lines:
        side = "train" if "train/loss" in line else "eval"
        terms = sum(line[f"{side}/{term}_loss"] * line[f"{side}/{term}_weight"] for term in ("kd", "ce"))
        assert terms == pytest.approx(line[f"{side}/loss"], rel=1e-5)
    assert evaluations[-1]["eval/kl_to_teacher"] < evaluations[0]["eval/kl_to_teacher"]
    assert evaluations[-1]["eval/min_loss"] == min(line["eval/loss"] for line in evaluations)
    assert {p.name for p in folder.checkpoints.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    assert json.loads(folder.history.read_text())[-1]["train/step"] == 12
    batch = collate([run.train_dataset[0]], pad_id=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = run.model.eval()(**inputs).logits
    for name in ("best_model", "final_model"):  # the last evaluation was the best
        loaded = AutoModelForCausalLM.from_pretrained(folder.path / name).eval()
        torch.testing.assert_close(loaded(**inputs).logits, ours, rtol=0, atol=0)
        assert len(AutoTokenizer.from_pretrained(folder.path / name)) == 300


def test_under_a_curriculum_the_least_loss_is_that_of_the_best_evaluation_not_of_the_least_weighted(
    raw_config, tmp_path
):
    raw_config["loss"]["weights"] = {"kd": {"linear": [0.01, 1.0]}, "ce": {"linear": [0.01, 1.0]}}
    full_training(raw_config, tmp_path, metric_for_best_model="eval_kl_to_teacher", eval_on_start=True)
    lines = eval_table(StudentFolder(tmp_path))
    assert lines["loss"].idxmin() == 0  # weighted least
    for last in lines.index:
        best = lines["kl_to_teacher"][: last + 1].idxmin()
        assert lines["min_loss"][last] == lines["loss"][best]
    assert best > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_waiting_for_rows_is_in_the_pace_and_evaluation_is_not(
    raw_config, tmp_path, accumulation, monkeypatch
):
    config = parse(raw_config, {"training.gradient_accumulation_steps": accumulation})
    parts, clock = pieces(config), [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow(rows):
        clock[0] += 0.5
        return collate(rows, pad_id=0)

    parts["prepared"] = replace(parts["prepared"], collate=slow)
    trainer = train(config, StudentFolder(tmp_path), **parts)
    pace, durations = training_table(StudentFolder(tmp_path))["tokens_per_s"], trainer.throughput.durations
    assert pace[1:].tolist() == [4 * 15 / 0.5] * 5
    assert durations == [0.5 * (accumulation + 1), *[0.5 * accumulation] * 11]  # one is fetched ahead


def test_evaluation_measures_what_training_minimises(raw_config, tmp_path):
    """On the same rows at the same moment the training loss and the evaluation loss are one number."""
    config = parse(
        {
            **raw_config,
            "training": {**raw_config["training"], **SGD, "max_steps": 1, "per_device_train_batch_size": 64},
        }
    )
    parts = pieces(config)
    parts["prepared"] = replace(parts["prepared"], train=parts["prepared"].validation)
    parts["student"].eval()
    run = train(config, StudentFolder(tmp_path / "a"), **parts, stop_after=1)
    again = pieces(config)
    again["prepared"] = parts["prepared"]
    unmoved = parse(
        {**raw_config, "training": {**raw_config["training"], **SGD, "max_steps": 1, "learning_rate": 0.0}}
    )
    fresh = train(unmoved, StudentFolder(tmp_path / "b"), **again, stop_after=1)
    assert fresh.evaluate()["eval_loss"] == pytest.approx(run.state.log_history[0]["loss"], rel=1e-6)


def test_chunks_that_make_other_logits_than_the_model_are_let_go_aloud(
    raw_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("kdlib.training.trainer.head_form", lambda model: Form(scale=2.0))
    trainer = full_training(raw_config, tmp_path, max_steps=1, eval_steps=1)
    assert capsys.readouterr().out.count("logits made by the chunk are not the model's own") == 1
    assert trainer.form is None


@pytest.mark.parametrize(
    "loss",
    [{"divergence": "reverse_kl"}, {"divergence": {"generalized_jsd": {"beta": 0.3}}}, {"top_k": 64}],
    ids=["reverse", "jsd", "top-64"],
)
def test_other_divergences_bring_the_student_nearer_too(raw_config, tmp_path, loss):
    # ce would pull elsewhere: this teacher knows nothing of the text
    kd_alone = {**raw_config["loss"], "weights": {"kd": 1.0}}
    full_training(
        {**raw_config, "loss": {**kd_alone, **loss}}, tmp_path / "run", eval_on_start=True, learning_rate=1e-2
    )
    distance = [
        line["eval/kl_to_teacher"]
        for line in read_metrics(StudentFolder(tmp_path / "run"))
        if "eval/loss" in line
    ]
    assert distance[-1] < 0.9 * distance[0]


def test_bfloat16_trains_like_float32(raw_config, tmp_path):
    runs = {}
    for precision in ("float32", "bfloat16"):
        full_training({**raw_config, "precision": precision}, tmp_path / precision)
        runs[precision] = [
            line["eval/kl_to_teacher"]
            for line in read_metrics(StudentFolder(tmp_path / precision))
            if "eval/loss" in line
        ]
        stored = load_file(tmp_path / precision / "final_model" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert runs["bfloat16"] == pytest.approx(runs["float32"], rel=0.02)
    assert runs["bfloat16"] != runs["float32"]


def test_the_objective_moves_with_training(raw_config, tmp_path):
    raw = {
        **raw_config,
        "loss": {
            "temperature": {"linear": [4, 1]},
            "weights": {"kd": {"steps": {0: 0.0, 0.5: 1.0}}, "ce": 1.0},
        },
    }
    full_training(raw, tmp_path / "run", logging_steps=1)
    lines = [line for line in read_metrics(StudentFolder(tmp_path / "run")) if "train/loss" in line]
    assert ["train/kd_loss" in line for line in lines] == [False] * 6 + [True] * 6
    assert lines[0]["train/temperature"] == 4
    assert lines[6]["train/temperature"] == pytest.approx(2.5)


def test_a_stop_file_leaves_a_checkpoint_and_the_way_on(raw_config, tmp_path):
    whole = full_training(raw_config, tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    with pytest.raises(RunError, match="stopped at step 1 with a checkpoint"):
        full_training(raw_config, tmp_path / "run")
    assert last_whole(StudentFolder(tmp_path / "run"))[0].name == "checkpoint-1"
    resumed = full_training(raw_config, tmp_path / "run")
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_stop_after_a_better_evaluation_keeps_its_own_checkpoint(raw_config, tmp_path, monkeypatch):
    folder = StudentFolder(tmp_path / "run")
    honest = DistillationTrainer.evaluate

    def evaluate_and_ask_to_stop(self, *args, **options):
        if self.state.global_step == 4:
            (folder.path / "STOP").touch()
        return honest(self, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "evaluate", evaluate_and_ask_to_stop)
    with pytest.raises(RunError, match="stopped at step 5 with a checkpoint"):
        full_training(raw_config, folder.path)
    assert last_whole(folder)[0].name == "checkpoint-5"


def test_checkpoints_by_epoch_are_resumed_with_the_same_lines(raw_config, tmp_path):
    training = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_steps": 7,
        "max_steps": -1,
        "num_train_epochs": 2,
    }
    training["per_device_train_batch_size"] = 16
    full_training(raw_config, tmp_path / "whole", **training)
    first, _ = last_whole(StudentFolder(tmp_path / "whole"))
    os.rename(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / first.name)
    (tmp_path / "cut" / "history.json").unlink()
    whole = comparable(tmp_path / "cut")
    full_training(raw_config, tmp_path / "cut", **training)
    for one, other in zip(whole, comparable(tmp_path / "cut"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_an_evaluation_that_is_not_finite_stops_the_run(raw_config, tmp_path, monkeypatch):
    monkeypatch.setitem(
        objective.EVAL_TERMS,
        "kl_to_teacher",
        Weighted(lambda s, t, targets, temperature: targets * float("nan")),
    )
    with pytest.raises(NonFiniteLoss, match="step 4: on held-out text kl_to_teacher = nan"):
        full_training(raw_config, tmp_path / "run")


@pytest.mark.parametrize(("metric", "greater"), [("agreement", True), ("eval_kl_to_teacher", False)])
def test_the_best_model_is_the_best_by_its_metric(raw_config, tmp_path, metric, greater):
    config = parse({**raw_config, "training": {**raw_config["training"], "metric_for_best_model": metric}})
    assert training_arguments(config, tmp_path).greater_is_better is greater


def test_a_cpu_with_bfloat16_and_no_gpu_is_used_as_it_is(raw_config, tmp_path, monkeypatch):
    """TrainingArguments refuses bf16 on a CPU unless told to use it: the config need not say so."""
    monkeypatch.setattr("kdlib.hardware.bf16_instructions", lambda: ("avx512_bf16",))
    monkeypatch.setattr("torch.accelerator.is_available", lambda *args: False)
    training = {name: value for name, value in raw_config["training"].items() if name != "use_cpu"}
    args = training_arguments(parse({**raw_config, "precision": "auto", "training": training}), tmp_path)
    assert args.bf16
    assert args.use_cpu


def test_a_full_disk_is_refused_before_the_first_step(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "kdlib.training.callbacks.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(RunError, match="GiB free, but models and checkpoints of this run need"):
        full_training(raw_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk small enough to fill")
@pytest.mark.parametrize("size", ["500k", "2m"], ids=["full at the best model", "full at a checkpoint"])
def test_a_disk_that_fills_up_in_the_middle_says_so_and_keeps_the_metrics(
    raw_config, tmp_path, monkeypatch, size
):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=True)
    try:
        # it would refuse before the first step
        monkeypatch.setattr("kdlib.training.run.check_disk", lambda *args, **options: None)
        with pytest.raises(RunError, match="cannot write .*; free some space, then go on with --resume"):
            full_training(raw_config, small / "run", save_total_limit=30, save_steps=1)
        assert [line["train/step"] for line in read_metrics(StudentFolder(small / "run"))][0] >= 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again_without_doubled_lines(raw_config, tmp_path):
    folder = StudentFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.metrics.write_text(
        '{"train/step": 0, "eval/loss": 1.0}\n{"train/step": 2, "train/loss": 1.0}\n{"train/st'
    )
    full_training(raw_config, folder.path, eval_on_start=True)
    assert [line["train/step"] for line in read_metrics(folder) if "eval/loss" in line] == [0, 4, 8, 12]


def test_a_run_killed_after_its_last_step_makes_no_step_more(raw_config, tmp_path):
    whole = full_training(raw_config, tmp_path / "run")
    (tmp_path / "run" / "history.json").unlink()
    again = full_training(raw_config, tmp_path / "run")
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4}, None, (10, 2)),
        # every third step, as the Trainer rounds
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 0.25}, None, (10, 3)),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}, None, (10, 3)),
        (
            {"max_steps": 10, "eval_strategy": "epoch"},
            16,
            (10, 3),
        ),  # 4 steps a pass: the last pass is cut short
        ({"max_steps": 10, "eval_strategy": "no"}, 16, (10, 0)),
        ({"num_train_epochs": 2, "eval_strategy": "epoch"}, 17, (10, 2)),
        ({"num_train_epochs": 2, "eval_strategy": "epoch", "dataloader_drop_last": True}, 17, (8, 2)),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 3, "eval_strategy": "no"}, 17, (2, 0)),
        ({"num_train_epochs": 1, "eval_strategy": "no"}, None, (None, None)),
    ],
)
def test_steps_and_evaluations_are_counted_as_the_trainer_counts_them(tmp_path, changes, rows, expected):
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, **changes)
    found = extent(args, rows)
    assert (found.steps, found.evaluations) == expected
    if rows:
        assert counted_by_the_trainer(args, rows) == expected


def counted_by_the_trainer(args: TrainingArguments, rows: int) -> tuple[int, int]:
    """Optimizer steps and evaluations of transformers' own Trainer on a model of one number."""
    data = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(rows)]
    counted = []

    class Counted(Trainer):
        def evaluate(self, *arguments, **options):
            counted.append(self.state.global_step)
            return {"eval_loss": 0.0}

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, labels):
            return {"loss": ((self.weight * x - labels) ** 2).mean()}

    trainer = Counted(Line(), args, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return trainer.state.global_step, len(counted)
