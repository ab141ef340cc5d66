"""A gate over the teacher's states: its values by hand, the step's invariants with SGD, and what is kept."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import other_tokens
from made_experts import KINDS as EXPERTS, folder_of_experts, model_with_experts
from made_log import read_metrics
from safetensors.torch import load_file
from test_routing_experts import batch
from test_training_features import SGD
from test_training_spans import backwards, padded
from tiny_training import pieces
from transformers import TrainerCallback

from kdlib.config.run import parse
from kdlib.diagnostics.context import Context
from kdlib.diagnostics.memory import forecast
from kdlib.diagnostics.model_checks import terms_are_of_a_size
from kdlib.diagnostics.parity import parity
from kdlib.errors import ConfigError, NonFiniteLoss
from kdlib.losses.features import RouteAt, hidden_distance
from kdlib.losses.signals import kept
from kdlib.models import hooks as captures
from kdlib.models.teacher import GATE
from kdlib.routing.experts import routers_of
from kdlib.routing.gates import Gate, gaps
from kdlib.runs.files import StudentFolder
from kdlib.training.plan import objective_of
from kdlib.training.run import train

WEIGHTS = {"ce": 0.2, "hidden": 0.5, "route_balance": 0.1, "route_entropy": 0.05}
ROUTE = {"top_k": {"linear": [1, 3]}, "temperature": {"linear": [0.5, 0.2]}}
TERMS = ("ce", "hidden", "route_balance", "route_entropy")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def made() -> tuple[Gate, torch.Tensor, torch.Tensor]:
    """A gate that has learned something, states of 9 tokens, and 4 sources."""
    torch.manual_seed(4)
    gate = Gate([0, 2], [0, 1, 2, 5], 6, 6).double()
    for parameter in gate.parameters():
        parameter.data += drawn(*parameter.shape)
    gate.usual += drawn(2, 4).abs()
    return gate, drawn(9, 2, 6).requires_grad_(), drawn(9, 4, 6)


@pytest.mark.parametrize("normalise", [True, False])
def test_gaps_are_the_hidden_distances_of_every_pair(normalise):
    torch.manual_seed(1)
    student, sources = drawn(5, 2, 8).requires_grad_(), 1e3 + drawn(5, 3, 8)
    found = gaps(student, sources, normalise=normalise)
    for ours in range(2):
        for theirs in range(3):
            pair = student[:, ours], sources[:, theirs]
            torch.testing.assert_close(
                found[:, ours, theirs], hidden_distance(*pair, normalise=normalise), rtol=1e-9, atol=1e-12
            )
    assert gaps(sources, sources, normalise=normalise).diagonal(dim1=1, dim2=2).max() < 1e-12
    assert gaps(student[:0], sources[:0]).shape == (0, 2, 3)
    sources = drawn(5, 3, 8)
    assert torch.autograd.gradcheck(lambda states: gaps(states, sources, normalise=normalise), student)


def test_gaps_in_float32_do_not_round_where_all_states_share_a_large_part():
    """As a language model's do: a few of its dimensions are a thousand times the others, at every layer."""
    torch.manual_seed(2)
    large = torch.zeros(64)
    large[3] = 3000.0
    student, sources = torch.randn(4, 1, 64) + large, torch.randn(4, 3, 64) + large
    exact = gaps(student.double(), sources.double(), normalise=False)
    torch.testing.assert_close(gaps(student, sources, normalise=False).double(), exact, rtol=1e-4, atol=0)


def test_a_token_is_held_against_its_k_sources_by_the_gates_shares(made):
    gate, student, sources = made
    gate.eval()
    for k in (1, 3, 4):
        at = RouteAt(k, temperature=0.7, noise=5.0)
        found = gate(student, sources, at, normalise=True)
        expected = torch.zeros(9, dtype=torch.float64)
        for layer in range(2):
            for token in range(9):
                gap = [hidden_distance(student[token, layer], each) for each in sources[token]]
                direction = torch.nn.functional.normalize(student[token, layer], dim=0)
                logits = torch.stack(
                    [
                        gate.weight[layer, s] @ direction
                        + gate.bias[layer, s]
                        - gate.scale[layer, 0] * (gap[s] - gate.usual[layer, s])
                        for s in range(4)
                    ]
                )
                best = logits.argsort(descending=True)[:k]
                shares = (logits[best] / 0.7).softmax(0)
                expected[token] += sum(w * gap[s] for w, s in zip(shares, best, strict=True)).detach() / 2
        torch.testing.assert_close(found["hidden"], expected)


def test_the_student_learns_as_from_a_fixed_map_and_the_gate_from_all_sources(made):
    """No way for the student to be sent elsewhere; a gate that gives one source learns which."""
    gate, student, sources = made
    at = RouteAt(1, temperature=0.7)
    values = gate(student, sources, at, normalise=True)["hidden"]
    own = torch.autograd.grad(values.sum(), [student, *gate.parameters()], retain_graph=True)
    apart = gaps(student, sources)
    nearer = apart.detach() - gate.usual
    logits = gate._logits(student.detach(), nearer)
    fixed = apart.gather(-1, logits.argmax(-1, keepdim=True)).mean(1).sum()
    torch.testing.assert_close(own[0], torch.autograd.grad(fixed, student)[0])
    paid = ((logits / 0.7).softmax(-1) * nearer).sum(-1).mean(1).sum()
    expected = torch.autograd.grad(paid, list(gate.parameters()))
    for found, wanted in zip(own[1:], expected, strict=True):
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 0


def test_balance_is_one_and_entropy_that_of_a_guess_where_nothing_is_known(made):
    gate, student, sources = made
    for parameter in gate.parameters():
        parameter.data.zero_()
    found = gate(student, sources, RouteAt(2), normalise=True)
    torch.testing.assert_close(found["route_balance"], torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(found["route_entropy"], torch.full((9,), 4.0).double().log())
    gate.load.copy_(torch.tensor([1.0, 0, 0, 0]))
    gate.bias.data[:, 0] = 30.0  # all to one that has all the load
    found = gate(student, sources, RouteAt(2), normalise=True)
    torch.testing.assert_close(found["route_balance"], torch.full((9,), 4.0).double())
    assert found["route_entropy"].max() < 1e-9


def test_the_load_of_a_step_is_that_of_all_its_micro_batches_and_evaluation_adds_nothing(made):
    gate, student, sources = made
    at = RouteAt(2)
    usual = gate.usual.clone()
    for part in (slice(0, 3), slice(3, 3), slice(3, 9)):
        gate(student[part], sources[part], at, normalise=True)
        gate.count()
        gate(student[part], sources[part], at, normalise=True)  # asked once more, and not counted
    gate.eval()
    gate(student, sources, at, normalise=True)
    assert torch.equal(gate.usual, usual)
    gate.settle(lambda counts: counts)
    torch.testing.assert_close(gate.usual, gaps(student, sources).mean(0).detach())
    nearer = gaps(student, sources).detach() - usual
    chosen = gate._logits(student.detach(), nearer).topk(2).indices
    shares = torch.stack([(chosen == s).any(-1).double().mean(0) / 2 for s in range(4)], -1)
    torch.testing.assert_close(gate.load, shares)
    before = gate.load.clone()
    gate.settle(lambda counts: counts)  # a step in which nothing was routed
    assert torch.equal(gate.load, before)


def test_noise_explores_in_training_alone_and_the_same_after_the_same_numbers(made):
    gate, student, sources = made
    ask = partial(gate, student, sources, RouteAt(1, noise=3.0), normalise=True)
    torch.manual_seed(8)
    one, other = ask(), ask()
    torch.manual_seed(8)
    again = ask()
    assert torch.equal(one["hidden"], again["hidden"])
    assert not torch.equal(one["hidden"], other["hidden"])
    assert torch.equal(one["route_balance"], other["route_balance"])
    gate.eval()
    assert torch.equal(ask()["hidden"], ask()["hidden"])


def raw(raw_config, student=None, *, route=ROUTE, weights=WEIGHTS, loss=None, **training) -> dict:
    changed = {
        **raw_config,
        "loss": {"weights": weights, "features": {"layers": {"route": route}}, **(loss or {})},
        "training": {**raw_config["training"], **SGD, **training},
    }
    changed["data"] = {**raw_config["data"], "packing": False, "max_length": 24}  # rows of many lengths
    return {**changed, "student": {"from": student}} if student else changed


def trained(settings, folder, *, collated=None, **options):
    """The trainer, its log lines, and the parameters with the gate's as one vector."""
    config = parse(settings)
    parts = pieces(config, dtype=torch.float64)
    if collated:
        prepared = parts["prepared"]
        parts["prepared"] = replace(prepared, collate=partial(collated, prepared.collate))
    run = train(config, StudentFolder(folder), **parts, **options)
    state = run.model.state_dict()
    everything = torch.cat([state[name].flatten() for name in sorted(state)])
    return run, read_metrics(StudentFolder(folder)), everything


def series(lines, name: str) -> list[float]:
    return [line[f"train/{name}"] for line in lines if f"train/{name}" in line]


VARIANTS = {
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "padded further": {"collated": padded},
    "rows the other way round": {"collated": backwards},
    "gradient checkpointing": {"activation_checkpointing": True},
    "dense": {"dense": True},
    "gradient norms asked for": {"asked": True},
}


@pytest.mark.parametrize("kind", ["teacher's sizes", "projected", "other tokens"])
def test_the_step_is_the_same(raw_config, narrow, tmp_path, kind):
    student = {"projected": narrow, "other tokens": other_tokens(tmp_path / "other")}.get(kind)
    loss = {} if kind == "other tokens" else {"features": {"layers": {"route": ROUTE}, "normalise": False}}
    _, lines, one = trained(raw(raw_config, student, loss=loss), tmp_path / "one")
    assert len(set(series(lines, "route_entropy_loss"))) == 4
    for name, variant in VARIANTS.items():
        how = dict(variant)
        options = {key: how.pop(key) for key in ("collated", "dense") if key in how}
        settings = raw(raw_config, student, loss=loss, **{k: v for k, v in how.items() if k != "asked"})
        if "asked" in how:
            settings["diagnostics"] = {"grad_norms_every": 1}
        _, other_lines, other = trained(settings, tmp_path / name.replace(" ", "_"), **options)
        assert (other - one).norm() <= 1e-8 * one.norm(), name
        for term in TERMS:
            figures = [series(each, f"{term}_loss") for each in (lines, other_lines)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-6), (name, term)
            assert len(figures[0]) == 4
    assert series(other_lines, "hidden_grad_norm")[0] > 0
    assert series(other_lines, "route_balance_grad_norm") == [0.0] * 4  # the gate's own, not the student's


@pytest.mark.parametrize("other_sizes", [False, True], ids=["teacher's sizes", "projected"])
def test_a_gate_with_one_source_is_the_fixed_map(raw_config, narrow, tmp_path, other_sizes):
    student, route = narrow if other_sizes else None, {"top_k": 1, "student_layers": [1], "sources": [2]}
    finals = []
    for layers in ({"route": route}, [[1, 2]]):
        settings = raw(raw_config, student, weights={"ce": 0.2, "hidden": 0.5})
        settings["loss"]["features"] = {"layers": layers}
        trained(settings, folder := tmp_path / str(len(finals)))
        finals.append(load_file(folder / "final_model" / "model.safetensors"))
    for name, weight in finals[0].items():
        torch.testing.assert_close(weight, finals[1][name], rtol=1e-12, atol=1e-14)


def test_a_routed_training_resumes_to_the_bit_and_its_gate_stays_out_of_the_student(
    raw_config, narrow, tmp_path
):
    settings = raw(raw_config, narrow, route={**ROUTE, "noise": 0.5}, save_strategy="steps", save_steps=2)
    run, lines, whole = trained(settings, tmp_path / "whole")
    broken = tmp_path / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(broken / "checkpoint-2")
    _, _, resumed = trained(settings, tmp_path / "broken")
    assert torch.equal(resumed, whole)
    half, end = (
        load_file(folder / "model.safetensors")
        for folder in (broken / "checkpoint-2", tmp_path / "whole" / "checkpoints" / "checkpoint-4")
    )
    for part in ("weight", "bias", "scale", "load", "usual", "projections.0.weight"):
        assert not torch.equal(half[f"{GATE}.{part}"], end[f"{GATE}.{part}"]), part
    for name in ("best_model", "final_model"):
        assert not [key for key in load_file(tmp_path / "whole" / name / "model.safetensors") if GATE in key]
    torch.testing.assert_close(run.gate.load.sum(-1), torch.ones(2, dtype=torch.float64))


def test_weight_0_is_the_term_removed(raw_config, tmp_path):
    without = {"ce": 0.2, "hidden": 0.5, "route_balance": 0.0, "route_entropy": 0.0}
    _, lines, one = trained(raw(raw_config, weights=without), tmp_path / "one")
    assert not [key for line in lines for key in line if "route" in key]
    usual = {"ce": 0.2, "hidden": 0.5}
    _, lines, other = trained(raw(raw_config, weights=usual), tmp_path / "two")
    assert series(lines, "route_balance_weight") == [0.01] * 4
    assert series(lines, "route_entropy_weight") == [0.001] * 4
    assert series(lines, "gate_top_k") == [1, 2, 2, 2]  # from 1 to 3
    assert series(lines, "gate_temperature") == pytest.approx([0.5, 0.425, 0.35, 0.275])
    assert not torch.equal(one, other)


def test_outside_its_phase_nothing_is_routed_and_no_layer_looked_into(raw_config, tmp_path, monkeypatch):
    asked, captured_layers = [], captures.captured_layers

    def watched(model, numbers, *, hidden, attention):
        asked.append((tuple(numbers), hidden))
        return captured_layers(model, numbers, hidden=hidden, attention=attention)

    for place in ("teacher", "hooks"):
        monkeypatch.setattr(f"kdlib.models.{place}.captured_layers", watched)
    phases = [{"until": 0.5, "weights": {"hidden": 0}}, {"until": 1.0, "weights": {"hidden": 0.5}}]
    settings = raw(raw_config, weights={"kd": 1.0}, loss={"curriculum": phases}, eval_on_start=False)
    run, lines, _ = trained(settings, tmp_path / "a")
    named = [[key for key in line if "route" in key] for line in lines if "train/loss" in line]
    assert [bool(keys) for keys in named] == [False, False, True, True]
    assert not any(hidden for _, hidden in asked[:4])  # two steps of both models
    looked = {numbers for numbers, hidden in asked if hidden}
    assert looked == {(0, 1), (0, 1, 2, 3)}
    formulas = [run.objective.at(fraction).formula for fraction in (0.0, 1.0)]
    assert "hidden" not in formulas[0]
    assert "0.5·hidden(routed, top-3 by a gate at T=0.2, normalised) + 0.01·route_balance" in formulas[1]


def test_an_evaluation_is_that_of_training_without_noise(raw_config, tmp_path):
    settings = raw(raw_config, route={"top_k": 2, "noise": 2.0}, learning_rate=0.0, max_steps=1)
    settings["training"] |= {"per_device_train_batch_size": 200, "per_device_eval_batch_size": 7}
    config = parse(settings)
    parts = pieces(config)
    parts["prepared"] = replace(parts["prepared"], train=parts["prepared"].validation)
    run = train(config, StudentFolder(tmp_path / "run"), **parts, stop_after=1)
    run.gate.usual.zero_()  # as the step saw it
    run.gate.load.fill_(0.25)
    held_out, learned = run.evaluate(), run.state.log_history[0]
    for name in ("ce", "route_balance", "route_entropy"):
        assert held_out[f"eval_{name}_loss"] == pytest.approx(learned[f"{name}_loss"], rel=1e-5)
    assert held_out["eval_hidden_loss"] != pytest.approx(learned["hidden_loss"], rel=1e-3)
    assert run.evaluate()["eval_hidden_loss"] == held_out["eval_hidden_loss"]


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ({"top_k": 5}, "found 5, but there are 4 sources"),
        ({"top_k": {"linear": [1, 3]}, "sources": [0, 1]}, "found 3, but there are 2 sources"),
        ({"top_k": 1, "sources": [4]}, "route.sources: found 4, the teacher has layers 0 to 3"),
        ({"top_k": 1, "student_layers": [2]}, "student_layers: found 2, the student has layers 0 to 1"),
    ],
)
def test_more_than_there_is_is_refused_before_training(raw_config, tmp_path, route, message):
    with pytest.raises(ConfigError, match=message):
        trained(raw(raw_config, route=route), tmp_path / "a")
    assert not (tmp_path / "a" / "final_model").exists()


@pytest.mark.parametrize(
    ("loss", "faults"),
    [
        (
            {"route": {"topk": 2, "top_k": 2.5, "noise": -1, "temperature": 0, "sources": []}},
            [
                "route.topk: unknown key; did you mean 'top_k'?",
                "top_k: found 2.5",
                "noise: found -1",
                "found 0;",
            ]
            + ["sources: found []; it is all, or a list of different layer numbers"],
        ),
        ({"route": {"student_layers": "alll"}}, ["student_layers: found 'alll'; it is all, last, or a list"]),
        ({"route": {}, "last": 2}, ["layers.last: unknown key"]),
    ],
)
def test_all_faults_of_a_route_come_at_once(raw_config, loss, faults):
    settings = {**raw_config, "loss": {"weights": {"hidden": 1.0}, "features": {"layers": loss}}}
    with pytest.raises(ConfigError) as found:
        parse(settings)
    for fault in faults:
        assert fault.replace("found 0;", "found 0; usual") in str(found.value)


def test_a_gate_goes_with_the_hidden_term_and_its_terms_with_a_gate(raw_config):
    routed = {"features": {"layers": {"route": {}}}}
    for loss, fault in (
        ({"weights": {"kd": 1.0}, **routed}, "route is for the hidden term, which has no weight"),
        (
            {"weights": {"hidden": 1.0, "route_balance": 0.1}},
            "route_balance has a weight, but there is no gate",
        ),
    ):
        with pytest.raises(ConfigError, match=fault):
            parse({**raw_config, "loss": loss})
    config = parse({**raw_config, "loss": {"weights": {"hidden": 1.0}, **routed}})
    assert parse(config.as_dict()) == config
    assert set(objective_of(config).weights) == {"hidden", "route_balance", "route_entropy"}
    assert set(objective_of(config, {"ce": 1.0}).weights) == {"ce"}  # the baseline


def test_the_self_test_holds_with_a_gate_and_leaves_none(raw_config, narrow):
    for student in (None, narrow):
        config = parse(raw(raw_config, student, route={**ROUTE, "noise": 1.0}))
        parts = pieces(config)
        found = parity(config, **parts)
        assert set(found["result"]) <= {"pass", "left out"}, found
        assert not hasattr(parts["student"], GATE)


def test_the_doctor_weighs_a_routed_term_and_leaves_the_gates_own_alone(raw_config, narrow):
    weights = {"ce": 1.0, "hidden": 1.0, "route_balance": 1e-5, "route_entropy": 1e-5}
    assert not list(terms_are_of_a_size(Context(parse(raw(raw_config, narrow, weights=weights)))))
    (found,) = terms_are_of_a_size(
        Context(parse(raw(raw_config, narrow, weights={**weights, "hidden": 1e-4})))
    )
    assert found.where == "loss.weights.hidden"


def test_a_gate_that_breaks_is_named(raw_config, tmp_path):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.distillation_gate.bias.data[0, 1] = torch.nan

    config = parse(raw(raw_config))
    with pytest.raises(NonFiniteLoss, match="distillation_gate.bias"):
        train(config, StudentFolder(tmp_path), **pieces(config), callbacks=[Breaks()])


def test_the_forecast_counts_the_gate(raw_config):
    """Its parameters, gradients and optimizer state, in float32."""
    found = []
    for layers in ({"route": {"sources": [1, 3]}}, [[0, 1], [1, 3]]):
        settings = raw(raw_config, weights={"ce": 0.2, "hidden": 0.5}, optim="adamw_torch")
        settings["loss"]["features"] = {"layers": layers}
        found.append(forecast(parse(settings), rows=100).moments["optimizer step"])
    gate = Gate([0, 1], [1, 3], 32, 32)
    size = 4 * sum(each.numel() for each in gate.parameters())
    part = {name: found[0][name] - found[1][name] for name in found[0]}
    buffers = 4 * sum(each.numel() for each in gate.buffers())
    assert part["student's parameters"] == size + buffers
    assert (part["gradients"], part["optimizer state"]) == (size, 2 * size)


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_is_a_source_as_if_it_alone_had_spoken(kind):
    """Of one expert asked alone by every token, with the weight of all: what the layer gives then."""
    model, given = model_with_experts(kind), batch()
    tokens, (*_, name) = kept(given["labels"]), routers_of(model)
    experts = f"{name.rpartition('.')[0]}.experts"
    with captures.captured_sources(model, [0, experts]) as states:
        model(given["input_ids"], attention_mask=given["attention_mask"])
    layer, *alone = states(tokens.select)
    assert [each.shape for each in (layer, *alone)] == [(len(tokens.targets), 32)] * 5
    *_, router = routers_of(model).values()
    for number, expected in enumerate(alone):

        def only(module, args, answer, number=number):
            logits, weights, chosen = answer
            return logits, weights.sum(-1, keepdim=True), torch.full_like(chosen[:, :1], number)

        hook = router.register_forward_hook(only)
        with captures.captured_layers(model, [1], hidden=True, attention=False) as captured:
            model(given["input_ids"], attention_mask=given["attention_mask"])
        hook.remove()
        torch.testing.assert_close(tokens.select(captured.hidden[1]), expected, rtol=1e-4, atol=1e-4)


def test_experts_are_sources_of_a_training_and_a_dense_teacher_has_none(raw_config, teacher_folder, tmp_path):
    features = {"layers": {"route": {"top_k": 3, "experts": True}}}
    raw = {**raw_config, "loss": {"weights": {"ce": 0.2, "hidden": 0.5}, "features": features}}
    raw["training"] = {**raw_config["training"], **SGD, "max_steps": 2}
    dense = parse({**raw, "student": {"from": str(teacher_folder)}})
    with pytest.raises(ConfigError, match="found true, but the teacher has none"):
        train(dense, StudentFolder(tmp_path / "dense"), **pieces(dense))
    config = parse(
        {
            **raw,
            "teacher": {
                "model": folder_of_experts(teacher_folder, tmp_path / "moe"),
                "experts": {"augment": 2},
            },
            "student": {"from": str(teacher_folder)},
        }
    )
    made = pieces(config)
    train(config, StudentFolder(tmp_path / "run"), **made)
    gate = getattr(made["student"], GATE)
    assert gate.load.shape == (4, 2 + 4)
    assert gate.load.sum(-1).tolist() == pytest.approx([1.0] * 4)
    assert all(
        line["train/hidden_loss"] > 0
        for line in read_metrics(StudentFolder(tmp_path / "run"))
        if "train/hidden_loss" in line
    )
    many = {"layers": {"route": {"top_k": 7, "experts": True}}}
    config = parse({**config.as_dict(), "loss": {**raw["loss"], "features": many}})
    with pytest.raises(ConfigError, match="there are 6 sources, its layers and experts"):
        train(config, StudentFolder(tmp_path / "many"), **pieces(config))
    with pytest.raises(ConfigError, match="asks them one by one"):
        parse({**config.as_dict(), "training": {**raw["training"], "fsdp": "full_shard"}})
