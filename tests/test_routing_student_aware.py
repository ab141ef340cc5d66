"""A teacher's router learns from the student, the same however a step is cut; its experts never do."""

from functools import partial

import pytest
import torch
from conftest import other_tokens
from made_experts import folder_of_experts, model_with_experts
from safetensors.torch import load_file
from test_routing_experts import batch
from test_training_resume import At, Killed, dies, same
from test_training_spans import SGD, padded
from tiny_training import pieces, trainer_of

from kdlib.config.run import parse
from kdlib.errors import ConfigError, RunError
from kdlib.losses.buffers import Workspace
from kdlib.losses.signals import DenseSignal, kept
from kdlib.models.teacher import LiveTeacher
from kdlib.routing.experts import routers_of
from kdlib.routing.student_aware import FILE, StudentAware, trained_router
from kdlib.runs.files import StudentFolder
from kdlib.runs.log import training_table
from kdlib.training.run import train

SETTINGS = {"learning_rate": 0.01, "balance": 0.0, "anchor": 0.0}


def fed(model, *, times: int = 1, dense: bool = False, **settings) -> StudentAware:
    """A router that has been told what a student says of a batch, `times` over, and has not moved yet."""
    routing, given = StudentAware(model, **{**SETTINGS, **settings}), batch()
    teacher, tokens = LiveTeacher(model, 300, routing=routing), kept(given["labels"])
    teacher.form = None if dense else teacher.form
    generator = torch.Generator().manual_seed(5)
    student = DenseSignal(torch.randn(len(tokens.targets), 300, generator=generator, dtype=model.dtype))
    ask, count = partial(teacher.ask, given, tokens, teaches=True), torch.tensor(len(tokens.targets))
    for _ in range(times):
        how = {"temperatures": {"kd": 2.0}, "count": count, "workspace": Workspace(5)}
        routing.feed(ask, student, tokens.targets, **how)
    return routing


def moved(routing: StudentAware) -> float:
    routing.step(lambda each: each)
    return routing.figures(lambda each: each)["router_drift"]


def test_the_feedback_is_the_gradient_of_the_kl_that_the_student_pays():
    model = model_with_experts().double()
    routing, given = fed(model), batch()
    tokens, whole = kept(given["labels"]), routing.weights
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(len(tokens.targets), 300, generator=generator, dtype=torch.float64) / 2

    def kl() -> float:
        teacher = LiveTeacher(model, 300, routing=routing)
        logs = teacher(given, tokens, teaches=True).logits().div(2).log_softmax(-1)
        return 4 * float((logs.exp() * (logs - student.log_softmax(-1))).sum(-1).mean())

    for name, weight in whole.items():
        towards = torch.randn_like(weight)
        towards, values = towards / towards.norm(), []
        for step in (1e-3, -2e-3, 1e-3):  # the router's softmax is made in float32
            with torch.no_grad():
                weight += step * towards
            values.append(kl())
        slope = float((routing.gradients[name] * towards).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=5e-3, abs=1e-6)
    for name, gradient in fed(model, dense=True).gradients.items():
        torch.testing.assert_close(gradient, routing.gradients[name])


def test_where_all_experts_are_equal_only_the_balance_term_has_a_gradient():
    model = model_with_experts().double()
    for layer in model.model.layers:
        for weights in layer.mlp.experts.parameters():
            weights.data.copy_(weights.data[:1].expand_as(weights))
    assert max(float(each.abs().max()) for each in fed(model).gradients.values()) < 1e-12
    balanced = fed(model, balance=1.0)
    balanced.step(lambda each: each)  # from here on it knows the load
    again = fed(model, balance=1.0)
    again.loads = balanced.loads
    ask = LiveTeacher(model, 300, routing=again)
    given, tokens = batch(), kept(batch()["labels"])
    again.feed(
        partial(ask.ask, given, tokens, teaches=True),
        DenseSignal(torch.zeros(len(tokens.targets), 300, dtype=torch.float64)),
        tokens.targets,
        temperatures={"kd": 2.0},
        count=torch.tensor(len(tokens.targets)),
        workspace=Workspace(5),
    )
    assert max(float(each.abs().max()) for each in again.gradients.values()) > 1e-4


def test_a_balance_term_evens_the_load_and_an_anchor_holds_the_router():
    model = model_with_experts()

    def busiest(routing: StudentAware) -> float:
        for _ in range(30):
            given, tokens = batch(), kept(batch()["labels"])
            teacher = LiveTeacher(model, 300, routing=routing)
            student = DenseSignal(teacher(given, tokens, teaches=True).logits())  # it follows: no feedback
            ask, count = partial(teacher.ask, given, tokens, teaches=True), torch.tensor(len(tokens.targets))
            how = {"temperatures": {}, "count": count, "workspace": Workspace(5)}
            routing.feed(ask, student, tokens.targets, **how)
            routing.step(lambda each: each)
        return routing.figures(lambda each: each)["expert_max_load"]

    free, even = (busiest(StudentAware(model, **{**SETTINGS, "balance": b})) for b in (0.0, 1.0))
    assert even < free - 0.05
    loose, held = (fed(model, anchor=anchor) for anchor in (0.0, 1e6))
    for routing in (loose, held):
        moved(routing)
    for name, weight in held.weights.items():  # pulled straight back
        own = held.gradients[name]  # begun anew
        assert not own.any()
        assert weight.shape == loose.weights[name].shape
    drifts = [fed(model, anchor=anchor) for anchor in (0.0, 1e6)]
    for _ in range(10):
        for routing in drifts:
            refed = fed(model)
            routing.gradients = refed.gradients
            routing.step(lambda each: each)
    free_drift, held_drift = (routing.figures(lambda each: each)["router_drift"] for routing in drifts)
    assert held_drift < free_drift / 2


@pytest.fixture
def raw(raw_config, teacher_folder, tmp_path):
    """Rows of many lengths; a Mixtral teaches a dense student, and its router learns."""
    teacher = {"model": folder_of_experts(teacher_folder, tmp_path / "moe")}
    aware = {"student_aware": {"learning_rate": 0.01, "balance": 0.5, "anchor": 0.1}}
    return {
        **raw_config,
        "teacher": {**teacher, "experts": aware},
        "student": {"from": str(teacher_folder)},
        "data": {**raw_config["data"], "packing": False, "max_length": 24},
        "loss": {"weights": {"kd": 0.7, "ce": 0.3}},
        "early_stopping": None,
    }


def trained(raw, folder, *, collated=None, dense=False, **training) -> tuple[torch.Tensor, torch.Tensor]:
    """The change that three steps make to the student, and to the teacher's router, in float64."""
    size = {"per_device_train_batch_size": 8, **training}
    config = parse({**raw, "training": {**raw["training"], **SGD, **size}})
    parts = pieces(config)
    student, teacher = parts["student"], parts["teacher"]
    teacher.model.set_experts_implementation("eager")  # grouped products take no float64
    for model in (student, teacher.model):
        model.double()
    before = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    trainer_of(config, folder, parts, collated=collated, dense=dense).train()
    own = teacher.routing._own()
    router = [(weight - own[name]).flatten() for name, weight in teacher.routing.weights.items()]
    return torch.nn.utils.parameters_to_vector(student.parameters()).detach() - before, torch.cat(router)


VARIANTS = {
    "batch 8 x accumulation 1 = 2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padded further = padded to the longest": {"collated": padded},
    "dense = chunked": {"dense": True},
}


def test_the_step_is_the_same_however_it_is_cut(raw, tmp_path):
    student, router = trained(raw, tmp_path / "one")
    assert student.norm() > 0.01
    assert router.norm() > 0.01
    for name, variant in VARIANTS.items():
        other, other_router = trained(raw, tmp_path / name.replace(" ", "_"), **variant)
        # a Mixtral's router makes its softmax in float32
        assert (other - student).norm() <= 1e-6 * student.norm(), name
        assert (other_router - router).norm() <= 1e-5 * router.norm(), name


def full(raw, folder, **options):
    config = parse({**raw, "training": {**raw["training"], "save_steps": 2, "save_strategy": "steps"}})
    made = pieces(config)
    train(config, StudentFolder(folder), **made, **options)
    return made["teacher"]


def test_a_training_killed_goes_on_to_the_bit_with_its_router(raw, tmp_path):
    teacher = full(raw, tmp_path / "whole")
    deed = At(3, dies)
    with pytest.raises(Killed):
        full(raw, tmp_path / "killed", callbacks=[deed])
    again = full(raw, tmp_path / "killed")
    same(tmp_path / "whole", tmp_path / "killed")
    for name, weight in teacher.routing.weights.items():
        assert torch.equal(weight, again.routing.weights[name])
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "killed" / FILE).read_bytes()


def test_the_trained_router_lies_beside_the_student_by_the_teachers_own_names(raw, tmp_path):
    teacher = full(raw, tmp_path / "run")
    found, own = trained_router(tmp_path / "run"), dict(teacher.model.named_parameters())
    assert sorted(found) == sorted(f"{name}.weight" for name in routers_of(teacher.model))
    for name, weight in found.items():
        assert weight.shape == own[name].shape
        assert not torch.equal(weight, own[name])
    student = load_file(tmp_path / "run" / "final_model" / "model.safetensors")
    assert not [name for name in student if "router" in name or "gate.weight" in name]
    assert training_table(StudentFolder(tmp_path / "run"))["router_drift"].iloc[-1] > 0
    with pytest.raises(RunError, match=r"found no router\.safetensors"):
        trained_router(tmp_path)


def test_a_router_of_another_teacher_is_not_gone_on_with(tmp_path):
    one, other = (StudentAware(model_with_experts(layers=n), **SETTINGS) for n in (1, 2))
    one.save(tmp_path)
    with pytest.raises(RunError, match="go on with the teacher that this run began with"):
        other.load(tmp_path)


def test_a_router_learns_across_tokenizers(raw, tmp_path):
    config = {
        **raw,
        "student": {"from": other_tokens(tmp_path / "other")},
        "loss": {"weights": {"span_kl": 1.0, "ce": 0.2}},
    }
    teacher = full(config, tmp_path / "run")
    assert teacher.routing.figures(lambda each: each)["router_drift"] > 1e-4


def test_a_student_aware_router_and_fsdp_do_not_go_together(raw):
    with pytest.raises(ConfigError, match="a student-aware router lies whole on each rank"):
        parse({**raw, "training": {**raw["training"], "fsdp": "full_shard"}})
