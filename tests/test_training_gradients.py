"""Each term's gradient on its own: as plain autograd makes it, and without a trace in the training."""

import pytest
import torch
from conftest import tiny_model
from test_training_features import SGD as OF_FEATURES
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.losses.objective import Objective
from kdlib.losses.signals import kept
from kdlib.models.heads import head_form
from kdlib.models.teacher import LiveTeacher, signal_of
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import constant
from kdlib.training.gradients import gradient_figures, shares, term_gradients
from kdlib.training.run import train

SGD = {**OF_FEATURES, "per_device_train_batch_size": 4}


def test_each_terms_gradient_is_that_of_plain_autograd():
    student, teacher = tiny_model(layers=2, seed=1).double(), LiveTeacher(tiny_model().double(), 300)
    ids = torch.randint(300, (3, 11), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens, parameters = kept(ids), list(student.parameters())
    at = Objective({"kd": constant(0.7), "ce": constant(0.3)}, constant(2.0)).at(0)
    signal = signal_of(student, batch, tokens, vocabulary=300, form=head_form(student))
    terms = shares(signal, teacher(batch, tokens), tokens.targets, at=at, chunk=7)
    found = term_gradients(terms, parameters)
    logits, theirs = (tokens.select(model(**batch).logits) for model in (student, teacher.model))
    log_p, log_q = (theirs / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    terms = {
        "kd": 0.7 * 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "ce": 0.3 * torch.nn.functional.cross_entropy(logits, tokens.targets),
    }
    flat = {}
    for name, term in terms.items():
        by_hand = torch.autograd.grad(term, parameters, retain_graph=True)
        torch.testing.assert_close(found[name], list(by_hand), rtol=1e-9, atol=1e-12)
        flat[name] = torch.cat([grad.flatten() for grad in by_hand])
    figures = gradient_figures(found)
    assert list(figures) == ["kd_grad_norm", "ce_grad_norm", "kd_ce_grad_cosine"]
    cosine = torch.nn.functional.cosine_similarity(flat["kd"], flat["ce"], dim=0)
    assert list(figures.values()) == pytest.approx(
        [flat["kd"].norm().item(), flat["ce"].norm().item(), cosine.item()], rel=1e-9
    )
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_each_terms_gradient_is_taken_as_in_float32(dtype, monkeypatch):
    """The check that sums were combined as the ledger does was made in autocast's dtype, and failed."""
    monkeypatch.setattr("kdlib.hardware.bf16_instructions", lambda: ("avx512_bf16",))
    student, teacher = tiny_model(layers=2, seed=1), LiveTeacher(tiny_model(), 300)
    ids = torch.randint(300, (3, 11), generator=torch.Generator().manual_seed(0))
    batch, found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, []
    tokens, at = kept(ids), Objective({"kd": constant(0.7), "ce": constant(0.3)}, constant(2.0)).at(0)
    for enabled, scale in ((False, 1.0), (True, 1.0), (True, 2.0**14)):
        with torch.autocast("cpu", dtype, enabled=enabled):
            signal = signal_of(student, batch, tokens, vocabulary=300, form=head_form(student))
            terms = shares(signal, teacher(batch, tokens), tokens.targets, at=at, chunk=7)
            scaled = ((name, scale * term) for name, term in terms)
            found.append(gradient_figures(term_gradients(scaled, list(student.parameters())), scale))
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=0.05)


def test_the_cosine_says_whether_terms_pull_the_same_way():
    one = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]
    opposite, across = [-2 * part for part in one], [torch.tensor([[2.0, -1.0]]), torch.tensor([0.0])]
    figures = gradient_figures(
        {
            "kd": one,
            "ce": one,
            "hidden": opposite,
            "attention": across,
            "relational": [0 * part for part in one],
        }
    )
    cosines = {name: value for name, value in figures.items() if name.endswith("cosine")}
    assert figures["kd_grad_norm"] == pytest.approx(14**0.5)
    assert figures["relational_grad_norm"] == 0
    assert cosines == pytest.approx(
        {
            "kd_ce_grad_cosine": 1,
            "kd_hidden_grad_cosine": -1,
            "ce_hidden_grad_cosine": -1,
            "kd_attention_grad_cosine": 0,
            "ce_attention_grad_cosine": 0,
            "hidden_attention_grad_cosine": 0,
        },
        abs=1e-6,
    )  # and none with a gradient of 0


def trained(raw_config, folder, every, **training):
    """A training with dropout in float64, and its untrained parameters."""
    config = parse(
        {
            **raw_config,
            "training": {**raw_config["training"], **SGD, **training},
            "diagnostics": {"grad_norms_every": every},
        }
    )
    parts = pieces(config, dtype=torch.float64)
    for layer in parts["student"].model.layers:
        layer.self_attn.attention_dropout = 0.2
    before = torch.nn.utils.parameters_to_vector(parts["student"].parameters()).detach().clone()
    return train(config, StudentFolder(folder), **parts), before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_measuring_leaves_no_trace_in_the_training(raw_config, tmp_path, accumulation):
    plain, _ = trained(raw_config, tmp_path / "plain", None, gradient_accumulation_steps=accumulation)
    measured, _ = trained(raw_config, tmp_path / "measured", 2, gradient_accumulation_steps=accumulation)
    for one, other in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(one, other)
    table = metrics.training_table(StudentFolder(tmp_path / "measured"))
    assert table["kd_grad_norm"].notna().tolist() == [False, True, False, True]
    assert table["kd_ce_grad_cosine"].abs().max() <= 1
    assert metrics.terms_in(table) == ["kd", "ce"]
    clock = ["tokens_per_s", "memory_gib", "time"]
    same = table.drop(columns=[*clock, "kd_grad_norm", "ce_grad_norm", "kd_ce_grad_cosine"])
    assert same.equals(metrics.training_table(StudentFolder(tmp_path / "plain")).drop(columns=clock))


def test_the_terms_gradients_add_up_to_the_steps(raw_config, tmp_path):
    """With the dropout of the step: |kd|^2 + |ce|^2 + 2 cos |kd| |ce| is the square of the step's own
    gradient norm.
    """
    run, before = trained(raw_config, tmp_path, 1, max_steps=1)
    line = run.state.log_history[0]
    kd, ce, cosine = (line[name] for name in ("kd_grad_norm", "ce_grad_norm", "kd_ce_grad_cosine"))
    moved = (
        torch.nn.utils.parameters_to_vector(run.model.parameters()).detach() - before
    ).norm().item() / 0.05
    # RMSNorm computes in float32
    assert (kd**2 + ce**2 + 2 * cosine * kd * ce) ** 0.5 == pytest.approx(moved, rel=1e-6)
