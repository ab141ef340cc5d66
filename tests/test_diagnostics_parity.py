"""The self-test passes where all is well, and names each of five planted errors by the line that it
belongs to.
"""

import copy
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.data.batches import collate
from kdlib.diagnostics import parity
from kdlib.errors import ConfigError, NonFiniteLoss
from kdlib.losses import features
from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import Objective
from kdlib.losses.signals import IGNORED, LinearSignal
from kdlib.losses.terms import SoftTargets, log_probs
from kdlib.models.loading import load_model
from kdlib.models.teacher import PROJECTIONS, LiveTeacher
from kdlib.training.trainer import DistillationTrainer
from kdlib.workbench import cli_checks

FEATURES = {"kd": 0.5, "ce": 0.2, "hidden": 0.3, "attention": 0.2, "relational": 0.1, "contrastive": 0.1}
PADDED = {"packing": False, "max_length": 24}


CHUNKS, ACCUMULATION, PADDING = (
    "10 logits at a time = all at once",
    "1 batch of 3 rows = 3 of 1",
    "rows padded together = each row alone",
)
EVALUATION, TEACHER = "training = evaluation", "student = teacher"


def table(raw, parts=None, **part):
    config = parse(raw)
    return parity.parity(config, **{**(parts or pieces(config)), **part})


def failed(raw, parts=None) -> list[str]:
    """Which comparisons failed, by the beginning of what they compare."""
    found = table(raw, parts)
    return list(
        dict.fromkeys(re.split("[:,]", line)[0] for line in found[found["result"] == "fail"]["compared"])
    )


CONFIGS = {
    "kd and ce": {},
    "top k": {"top_k": 8},
    "samples": {"samples": 8, "weights": {"kd": 1.0}},
    "ce alone": {"weights": {"ce": 1.0}},
    "features": {"weights": FEATURES},
    "curriculum": {
        "weights": {"kd": 1.0},
        "temperature": 4,
        "curriculum": [
            {"until": 0.3, "weights": {"hidden": 0}},
            {"until": 1, "weights": {"hidden": 0.5}, "ramp": 0.1},
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "float32") for name in CONFIGS), ("kd and ce", "bfloat16"), ("features", "bfloat16")],
)
def test_a_sound_config_passes(raw_config, name, precision):
    loss = CONFIGS[name]
    raw = {**raw_config, "loss": {**raw_config["loss"], **loss}, "precision": precision}
    found = table(raw)
    assert set(found["result"]) == {"pass"}, found.to_string()
    assert len(found) == 2 + 6 * (2 if "curriculum" in loss else 1)


def test_rows_of_own_lengths_and_projections_pass(raw_config, narrow):
    raw = {**raw_config, "loss": {"weights": FEATURES, "chunk": 5}, "data": {**raw_config["data"], **PADDED}}
    assert set(table(raw, student=load_model(narrow))["result"]) == {"pass"}


def micro_batch_count(monkeypatch):
    right = DistillationTrainer.compute_loss

    def wrong(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return right(self, model, inputs, return_outputs, (inputs["labels"] != IGNORED).sum())

    monkeypatch.setattr(DistillationTrainer, "compute_loss", wrong)


def lost_row(monkeypatch):
    right = Workspace.sums

    def sums(self, *arguments):
        arithmetic = right(self, *arguments)

        def wrong(products, others, targets, *rest):
            found = arithmetic(products[:-1], others[:-1], targets[:-1], *rest)
            products[-1].zero_()
            return found

        return wrong

    monkeypatch.setattr(Workspace, "sums", sums)


def collate_by(wrong, monkeypatch):
    def trainer(**options):
        return DistillationTrainer(
            **{**options, "data_collator": partial(wrong, pad_id=options["tokenizer"].pad_token_id)}
        )

    monkeypatch.setattr(parity, "DistillationTrainer", trainer)


def trained_padding(monkeypatch):
    def wrong(rows, *, pad_id):
        batch = collate(rows, pad_id=pad_id)
        return {**batch, "labels": batch["labels"].where(batch["attention_mask"] == 1, batch["input_ids"])}

    collate_by(wrong, monkeypatch)


def padding_attended_to(monkeypatch):
    def wrong(rows, *, pad_id):
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        ids = [[pad_id] * m + row["input_ids"] for m, row in zip(missing, rows, strict=True)]
        labels = [[IGNORED] * (m + 1) + row["input_ids"][1:] for m, row in zip(missing, rows, strict=True)]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(rows), longest, dtype=int),
            "labels": torch.tensor(labels),
        }

    collate_by(wrong, monkeypatch)


def other_weights_in_evaluation(monkeypatch):
    right = Objective.at

    def wrong(self, fraction, *, sampled=True):
        at = right(self, fraction, sampled=sampled)
        return at if sampled else replace(at, weights=dict.fromkeys(at.weights, 1.0))

    monkeypatch.setattr(Objective, "at", wrong)


def temperature_on_one_side(monkeypatch):
    def wrong(self, student_logits, teacher_logits, targets, temperature):
        return temperature**2 * self.divergence(
            log_probs(student_logits, temperature), log_probs(teacher_logits)
        )

    monkeypatch.setattr(SoftTargets, "__call__", wrong)


def head_cut_one_row_late(monkeypatch):
    right = LiveTeacher.__call__

    def wrong(self, *arguments, **options):
        signal = right(self, *arguments, **options)
        if isinstance(signal, LinearSignal):
            return replace(signal, weight=signal.weight.roll(1, 0))
        return replace(signal, values=signal.values.roll(1, 1))

    monkeypatch.setattr(LiveTeacher, "__call__", wrong)


PLANTED = [
    (micro_batch_count, [ACCUMULATION]),
    (trained_padding, [PADDING]),
    (padding_attended_to, [PADDING]),
    (other_weights_in_evaluation, [EVALUATION]),
    (temperature_on_one_side, [TEACHER]),
    (head_cut_one_row_late, [TEACHER]),
]


@pytest.mark.parametrize(("plant", "lines"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_planted_error_fails_the_line_that_it_belongs_to_and_no_other(
    raw_config, monkeypatch, plant, lines, precision
):
    plant(monkeypatch)
    assert failed({**raw_config, "precision": precision}) == lines


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_lost_at_the_end_of_a_chunk_fails_the_line_on_chunks_first(raw_config, monkeypatch, precision):
    lost_row(monkeypatch)
    assert failed({**raw_config, "precision": precision})[0] == CHUNKS


def test_features_compared_across_rows_fail_where_rows_are_put_together(raw_config, monkeypatch):
    right = features._row_by_row
    monkeypatch.setattr(
        features,
        "_row_by_row",
        lambda student, teacher, rows: right(student, teacher, [len(student)]),
    )
    assert PADDING in failed({**raw_config, "loss": {"weights": FEATURES}})


def test_an_error_in_a_later_phase_is_found_there(raw_config, monkeypatch):
    right = features.hidden_distance
    monkeypatch.setattr(
        "kdlib.losses.features.hidden_distance", lambda s, t, **how: right(s, t, **how) + 0.01
    )
    found = table({**raw_config, "loss": {"weights": {"kd": 1.0}, **CONFIGS["curriculum"]}})
    assert list(found[found["result"] == "fail"]["compared"]) == [
        "student = teacher: 0 in every divergence, nats, at 40 % of training"
    ]


def test_fractions_are_the_start_and_where_a_term_silent_there_weighs_most(raw_config):
    phases = [
        {"until": 0.2, "weights": {}},
        {"until": 0.6, "weights": {"hidden": {"linear": [0, 1]}, "attention": 0.5}},
        {"until": 1, "weights": {"ce": 0, "reverse_kl": 1}},
    ]
    loss = {"weights": {"kd": 1.0, "ce": 0.3}, "curriculum": phases}
    assert parity.tested_fractions(parse({**raw_config, "loss": loss})) == [0.0, pytest.approx(0.6), 0.6]
    assert parity.tested_fractions(parse(raw_config)) == [0.0]


def test_rows_are_cut_to_different_lengths():
    rows = [{"input_ids": list(range(100))} for _ in range(6)]
    assert [len(row["input_ids"]) for row in parity.shortened(rows)] == [21, 42, 64]
    assert [
        len(row["input_ids"]) for row in parity.shortened([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])
    ] == [2, 3]


def test_what_is_not_finite_in_the_evaluation_alone_is_named(raw_config):
    raw = {**raw_config, "loss": {"weights": {"ce": 1.0}}}
    parts = pieces(parse(raw))
    parts["teacher"].model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(NonFiniteLoss, match="kl_to_teacher = nan .*the teacher is not finite"):
        table(raw, parts)


def test_dropout_is_off_in_the_self_test_and_on_again_after_it(raw_config, monkeypatch):
    parts = pieces(parse(raw_config))
    for layer in parts["student"].model.layers:
        layer.self_attn.attention_dropout = 0.5
    parts["student"].model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.25))
    assert failed(raw_config, parts) == []
    assert [layer.self_attn.attention_dropout for layer in parts["student"].model.layers] == [0.5, 0.5]
    assert parts["student"].model.layers[0].mlp.act_fn[1].p == 0.25
    monkeypatch.setattr(parity, "without_dropout", nullcontext)
    assert {ACCUMULATION, EVALUATION} <= set(failed(raw_config, parts))


def test_everything_is_left_as_it_was(raw_config, narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    narrow = load_model(narrow)
    parts = {**pieces(parse(raw_config)), "student": narrow}
    narrow.lm_head.train()
    before = (
        copy.deepcopy(narrow.state_dict()),
        [part.training for part in narrow.modules()],
        set(Path(tmp_path).rglob("*")),
    )
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert failed({**raw_config, "loss": {"weights": FEATURES}}, parts) == []
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert not hasattr(narrow, PROJECTIONS)
    after = narrow.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before[0].items())
    assert len(after) == len(before[0])
    assert [part.training for part in narrow.modules()] == before[1]
    assert narrow.config._attn_implementation == parts["teacher"].model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in narrow.parameters())
    assert set(Path(tmp_path).rglob("*")) == before[2]


def test_kd_selftest_prints_the_table_and_ends_with_1_where_a_check_fails(
    config_file, monkeypatch, tmp_path, capsys
):
    cli_checks.selftest(str(config_file))
    assert "training = evaluation" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    micro_batch_count(monkeypatch)
    with pytest.raises(typer.Exit) as caught:
        cli_checks.selftest(str(config_file), override=["loss.temperature=3"])
    assert caught.value.exit_code == 1
    assert "fail" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        cli_checks.selftest(str(config_file), override=["loss.temprature=3"])
