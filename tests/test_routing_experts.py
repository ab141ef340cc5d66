"""How a teacher's experts are asked while it teaches, by transformers' own classes."""

import pytest
import torch
from conftest import tiny_model
from made_experts import KINDS, MODES, OTHERS, folder_of_experts, model_with_experts
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.errors import ConfigError, ModelError
from kdlib.losses.signals import DenseSignal, LinearSignal, MeanSignal, kept, moved
from kdlib.models.teacher import LiveTeacher
from kdlib.routing.experts import AllExperts, Augmented, Routing, routers_of, watched
from kdlib.routing.student_aware import StudentAware, routing_of
from kdlib.runs.files import StudentFolder
from kdlib.runs.log import training_table
from kdlib.training.run import train


def batch(rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    labels, read = ids.clone(), torch.ones_like(ids)
    labels[0, 8:], read[0, 8:] = -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": read}


def said(model, routing=None, **how) -> torch.Tensor:
    teacher, given = LiveTeacher(model, 300, routing=routing), batch()
    return teacher(given, kept(given["labels"]), **how).logits().log_softmax(-1)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_every_router_is_found_and_what_it_gives_is_seen(kind):
    model, given = model_with_experts(kind), batch()
    with watched(model) as found:
        model(given["input_ids"])
    assert list(found) == list(routers_of(model))
    assert len(found) == 2
    for weights in found.values():
        assert weights.shape == (36, 4)
        assert ((weights > 0).sum(-1) == 2).all()
    assert not routers_of(tiny_model())


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_all_experts_are_those_of_a_model_made_to_ask_all(kind):
    model, whole = model_with_experts(kind), model_with_experts(kind, asks=4)
    whole.load_state_dict(model.state_dict())
    everyone = AllExperts(model)
    torch.testing.assert_close(said(model, everyone, teaches=True), said(whole))
    torch.testing.assert_close(said(model, everyone), said(model))  # not while it is evaluated
    assert (said(model) - said(whole)).abs().max() > 1e-3
    assert ("norm_topk_prob" in str(everyone)) == (kind in ("qwen2_moe", "olmoe"))


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_drawing_all_experts_is_asking_all(kind):
    model = model_with_experts(kind)
    drawn = Augmented(model, draws=2)
    drawn.asks = dict.fromkeys(drawn.asks, 4)
    torch.testing.assert_close(
        said(model, drawn, teaches=True), said(model, AllExperts(model), teaches=True), rtol=1e-4, atol=1e-5
    )


def test_experts_are_drawn_as_often_as_the_router_says():
    model = model_with_experts(asks=1, layers=1)
    (router,) = routers_of(model).values()
    state, drawn = torch.randn(1, 32), Augmented(model, draws=2)
    expected = torch.nn.functional.softmax(router.weight @ state[0], -1)
    router.top_k, times = 4, 20_000
    torch.manual_seed(2)
    _, weights, chosen = drawn.answer(next(iter(routers_of(model))), router(state.expand(times, -1)))
    found = chosen[:, 0].bincount(minlength=4) / times
    assert (found - expected).abs().max() < 4 * (0.25 / times) ** 0.5  # standard deviations of a share
    torch.testing.assert_close(weights, torch.ones(times, 1))  # a Mixtral's weights sum to one


def test_the_mean_of_draws_is_that_of_their_probabilities():
    torch.manual_seed(3)
    head, states = torch.randn(11, 5), torch.randn(2, 7, 5)
    draws = [LinearSignal(states[0], head), DenseSignal(states[1] @ head.T)]
    mean = MeanSignal(draws)
    expected = torch.stack([draw.logits().softmax(-1) for draw in draws]).mean(0).log()
    torch.testing.assert_close(mean.logits(), expected)
    torch.testing.assert_close(mean.cast().logits(slice(2, 5)), expected[2:5])
    torch.testing.assert_close(mean.select(torch.tensor([4, 1])).logits(), expected[[4, 1]])
    torch.testing.assert_close(moved(mean, torch.device("cpu")).logits(), expected)
    out = torch.zeros(3, 11)
    mean.write(out, slice(4, 7))
    torch.testing.assert_close(out, expected[4:7])
    assert (len(mean), mean.vocabulary, mean.dtype) == (7, 11, torch.float32)


def test_draws_are_new_in_each_step_and_the_same_from_the_same_random_numbers():
    model = model_with_experts()
    drawn, found = Augmented(model, draws=2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(said(model, drawn, teaches=True))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_use_counts_kept_tokens_alone_and_says_what_even_use_is():
    model, given = model_with_experts(), batch()
    routing = Routing(model)
    teacher = LiveTeacher(model, 300, routing=routing)
    tokens = kept(given["labels"])
    teacher(given, tokens, teaches=True)
    assert routing.use.answers == 2 * len(tokens.targets)
    figures = routing.figures(lambda each: each)
    assert 0 < figures["expert_entropy"] < torch.tensor(2.0).log()  # of two experts
    assert 1 <= figures["expert_max_load"] <= 4
    assert 0.5 <= figures["expert_coverage"] <= 1
    assert routing.figures(lambda each: each) == {}  # begun anew
    for router in routers_of(model).values():
        torch.nn.init.zeros_(router.weight)
    even = AllExperts(model)
    LiveTeacher(model, 300, routing=even)(given, tokens, teaches=True)
    expected = {"expert_entropy": torch.tensor(4.0).log().item(), "expert_max_load": 1, "expert_coverage": 1}
    assert even.figures(lambda each: each) == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_teaches_in_every_mode(raw_config, teacher_folder, tmp_path, kind, mode):
    teacher = {"model": folder_of_experts(teacher_folder, tmp_path / "moe", kind), "experts": mode}
    config = parse(
        {
            **raw_config,
            "teacher": teacher,
            "student": {"from": str(teacher_folder)},
            "loss": {"weights": {"kd": 1.0}},
            "training": {**raw_config["training"], "max_steps": 2, "logging_steps": 1},
        }
    )
    made = pieces(config)
    before = {name: each.clone() for name, each in made["teacher"].model.state_dict().items()}
    folder = StudentFolder(tmp_path / "run")
    train(config, folder, **made)
    table = training_table(folder)
    assert table["kd_loss"].notna().all()
    assert (table["expert_entropy"] > 0).all()
    assert ("router_drift" in table) == (not isinstance(mode, str) and "student_aware" in mode)
    after = made["teacher"].model.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in before.items())  # to the bit


def test_a_dense_teacher_has_no_experts_to_ask():
    assert routing_of(tiny_model(), "topk") is None
    with pytest.raises(ModelError, match="no experts to choose from"):
        routing_of(tiny_model(), "all")


def test_a_router_that_a_kernel_stands_in_for_is_told(monkeypatch):
    model = model_with_experts()
    block = type(model.model.layers[1].mlp)
    usual = block.forward

    def fused(self, states):
        return states if self is model.model.layers[1].mlp else usual(self, states)

    monkeypatch.setattr(block, "forward", fused)
    with pytest.raises(ModelError, match="is not called, as where a kernel"):
        said(model, Routing(model), teaches=True)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ("topc", "did you mean 'topk'"),
        ({"augment": 1}, "2 or more"),
        ({"student_aware": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"student_aware": {"balance": -1}}, "a number of 0 or more"),
        ({"all": 3}, "it is topk, all"),
    ],
)
def test_what_no_teacher_can_be_asked_is_refused(raw_config, experts, expected):
    with pytest.raises(ConfigError, match=expected):
        parse({**raw_config, "teacher": {**raw_config["teacher"], "experts": experts}})


def test_the_settings_of_a_student_aware_router_are_whole(raw_config):
    raw = {**raw_config, "teacher": {**raw_config["teacher"], "experts": {"student_aware": None}}}
    config = parse(raw)
    assert config.teacher.experts == {
        "student_aware": {"learning_rate": 1e-3, "balance": 0.01, "anchor": 0.1}
    }
    assert parse(config.as_dict()) == config
    assert isinstance(routing_of(model_with_experts(), config.teacher.experts), StudentAware)
    assert "experts" not in parse(raw_config).as_dict()["teacher"]  # older runs are known again
