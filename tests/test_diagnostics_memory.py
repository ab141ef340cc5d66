import json
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_model
from made_experts import model_with_experts
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig, MixtralForCausalLM

from kdlib.config import run as configs
from kdlib.diagnostics.forecast import at_layers
from kdlib.diagnostics.memory import Breakdown, forecast
from kdlib.errors import ModelError
from kdlib.losses.buffers import FakeWorkspace
from kdlib.models.loading import load_model, parameters
from kdlib.students.depth import shallower
from kdlib.students.student import outline
from kdlib.tasks.base import task_of
from kdlib.tokens.vocabulary import trained_tokenizer
from kdlib.training.plan import training_arguments


def parsed(raw: dict, **overrides):
    return configs.parse(raw, {name.replace("__", "."): value for name, value in overrides.items()})


def plan_of(config, vocabulary: int | None = None):
    return outline(config, task_of(config), vocabulary)


def part(found, moment: str, name: str) -> int:
    return found.moments[moment].get(name, 0)


@pytest.fixture(scope="module")
def raw(teacher_folder) -> dict:
    """A tiny experiment; its text is never read."""
    return {
        "teacher": {"model": str(teacher_folder)},
        "student": {"from": "teacher", "layers": 2},
        "data": {"source": "none.jsonl", "max_length": 16},
        "loss": {"weights": {"kd": 0.7, "ce": 0.3}},
        "precision": "float32",
        "training": {"max_steps": 12, "per_device_train_batch_size": 4, "use_cpu": True},
    }


@pytest.fixture(scope="module")
def plain(raw):
    return forecast(parsed(raw, training__eval_strategy="steps", training__eval_steps=4))


def breakdown(config) -> Breakdown:
    """Models counted, no step made."""
    args, workspace = (
        training_arguments(config, Path("unused")),
        FakeWorkspace(64, compiled=False, kind="cpu"),
    )
    return Breakdown(plan_of(config), args, "cpu", torch.float32, workspace, dense=False)


def test_the_peak_is_the_sum_of_its_parts_at_the_highest_moment(plain):
    found = plain
    assert set(found.moments) == {
        "student's forward",
        "teacher's forward",
        "loss",
        "backward",
        "optimizer step",
        "evaluation",
    }
    assert (
        found.peak
        == sum(found.moments[found.moment].values())
        == max(sum(parts.values()) for parts in found.moments.values())
    )
    assert found.as_dict()["verdict"] == found.verdict == "fits"
    assert json.loads(json.dumps(found.as_dict()))["peak"] == found.peak


def test_parameters_gradients_and_optimizer_are_those_of_the_real_models(raw, plain, teacher_folder):
    found, student, teacher = (
        plain,
        shallower(load_model(str(teacher_folder)), [0, 3]),
        load_model(str(teacher_folder)),
    )
    count = sum(p.numel() for p in student.parameters())  # tied: the head is the embedding
    assert found.parameters == {"student": count, "teacher": sum(p.numel() for p in teacher.parameters())}
    step = found.moments["optimizer step"]
    assert (step["gradients"], step["optimizer state"]) == (4 * count, 8 * count)
    buffers = sum(b.numel() * b.element_size() for b in student.buffers())
    assert step["student's parameters"] == 4 * count + buffers


@pytest.mark.parametrize(
    ("optim", "each"), [("sgd", 0), ("adamw_torch", 8), ("lion_32bit", 4), ("adamw_torch_8bit", 2)]
)
def test_the_optimizers_state_follows_from_its_name(raw, optim, each):
    found = breakdown(parsed(raw, training__optim=optim))
    assert found.optimizer_state() == each * parameters(found.student)
    assert not found.notes


def test_an_optimizer_that_is_not_known_is_assumed_and_said(raw):
    found = breakdown(parsed(raw, training__optim="galore_adamw"))
    assert found.optimizer_state() == 8 * parameters(found.student)
    assert "galore_adamw" in found.notes[0]
    assert "assumed" in found.notes[0]


def test_activations_without_data_are_the_tensors_that_the_real_model_saves(raw, plain):
    """By two independent ways: storages seen in the fake step, and autograd's own list of what it saved."""
    config = parsed(raw)
    student, batch = (
        shallower(load_model(config.teacher.model), [0, 3]).train(),
        {"input_ids": torch.ones(4, 16, dtype=torch.long)},
    )
    own, saved = {p.untyped_storage()._cdata for p in student.parameters()}, {}
    own |= {b.untyped_storage()._cdata for b in student.buffers()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.is_floating_point():
            saved[storage._cdata] = storage  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = student.base_model(**batch, attention_mask=torch.ones(4, 16), use_cache=False)
    real = sum(storage.nbytes() for storage in saved.values())
    found = part(plain, "loss", "activations")
    assert found == pytest.approx(real, rel=0.08)  # the fake step also holds what the loss is given, [60, 32]
    assert output[0].requires_grad


def test_a_few_layers_tell_what_many_hold(raw, tmp_path, monkeypatch):
    tiny_model(vocabulary=320, layers=7).save_pretrained(tmp_path / "deep")
    raw = {**raw, "teacher": {"model": str(tmp_path / "deep")}, "student": {"from": "teacher", "layers": 5}}
    from_few = forecast(parsed(raw))
    monkeypatch.setattr(Breakdown, "layers_tried", lambda self: (self.plan.layers, self.plan.layers))
    from_all = forecast(parsed(raw))
    few, every = (
        {name: sum(parts.values()) - parts["framework"] for name, parts in found.moments.items()}
        for found in (from_few, from_all)
    )
    assert few == pytest.approx(every, rel=1e-3)


def test_checkpointing_needs_fewer_activations_and_a_double_batch_twice_as_many(raw, plain):
    checkpointed, double = (
        forecast(parsed(raw, **{f"training__{name}": value}))
        for name, value in (("activation_checkpointing", True), ("per_device_train_batch_size", 8))
    )
    held = part(plain, "loss", "activations")
    assert part(checkpointed, "loss", "activations") < held / 2
    assert part(double, "loss", "activations") == pytest.approx(2 * held, rel=0.02)  # but for rotary tables


def test_gradients_that_accumulate_are_there_from_the_start(raw, plain):
    found = forecast(parsed(raw, training__gradient_accumulation_steps=2))
    assert part(found, "student's forward", "gradients") == 4 * found.parameters["student"]
    assert part(plain, "student's forward", "gradients") == 0


def test_attention_terms_cost_maps_and_dense_logits_cost_the_vocabulary(raw, plain):
    eager, dense = (
        forecast(parsed(raw, loss__weights={"kd": 1.0, "attention": 1.0})),
        forecast(parsed(raw), dense=True),
    )
    maps = 2 * 4 * 4 * 16 * 16 * 4  # layers, rows, heads, T, T, bytes
    assert part(eager, "loss", "activations") > part(plain, "loss", "activations") + maps
    assert dense.chunk is None
    # the student's, the teacher's, and what the terms make of them
    assert part(dense, "loss", "logits") > 6 * 60 * 300 * 4


def test_projections_are_trained_and_so_are_counted(raw, plain, tmp_path):
    narrow = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    narrow.save_pretrained(tmp_path / "narrow")
    own = {**raw, "student": {"from": str(tmp_path / "narrow")}}
    without, with_them = (
        forecast(parsed(own, loss__weights=weights)) for weights in ({"kd": 1.0}, {"kd": 1.0, "hidden": 1.0})
    )
    # one for each pair of layers
    assert with_them.parameters["student"] == without.parameters["student"] + 2 * 16 * 32


def test_half_precision_halves_the_teacher(raw, plain):
    half = forecast(parsed(raw, precision="bfloat16"))
    assert part(half, "loss", "teacher's weights") == pytest.approx(
        part(plain, "loss", "teacher's weights") / 2, rel=0.01
    )
    assert part(half, "loss", "cast weights") > 0


def test_shards_and_copies_are_counted_per_rank(raw, plain):
    size, whole = 4 * plain.parameters["student"], plain.moments
    shared = {
        fsdp: forecast(parsed(raw, training__fsdp=fsdp, training__eval_strategy="epoch"), devices=2)
        for fsdp in (None, True)
    }
    copied, sharded = (shared[fsdp].moments for fsdp in (None, True))
    assert copied["backward"] == {**whole["backward"], "gradient buckets": size}  # buffers have no gradient
    buffers = whole["backward"]["student's parameters"] - size
    for name in whole:
        assert sharded[name]["teacher's weights"] == pytest.approx(
            whole[name]["teacher's weights"] / 2, rel=0.01
        )
        assert sharded[name]["student's parameters"] == size // 2 + buffers
        assert sharded[name]["optimizer state"] == size  # half of twice that
        assert sharded[name]["framework"] == whole[name]["framework"]
    assert sharded["optimizer step"]["gradients"] == size // 2
    # the tied head, from the student's embedding to its gradient; the teacher's beside it for the losses
    gathered = {name: parts.get("gathered weights", 0) for name, parts in sharded.items()}
    layer, tail = 4 * (3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32), 4 * (320 * 32 + 32)
    assert size == 2 * layer + tail
    assert (
        gathered["teacher's forward"] == 2 * tail + 2 * layer
    )  # a layer as it comes, and copied out of that
    assert (gathered["loss"], gathered["optimizer step"]) == (tail + 4 * 320 * 32, 0)


def test_only_ranks_on_cpus_hold_what_gloo_copies(raw):
    config = parsed(raw, training__fsdp=True)
    on = {kind: forecast(config, device=kind, devices=2).moments for kind in ("cpu", "cuda")}
    assert any("gloo's copies" in parts for parts in on["cpu"].values())
    assert not any("gloo's copies" in parts for parts in on["cuda"].values())


def test_a_few_layers_tell_what_ranks_hold_of_many(raw, tmp_path, monkeypatch):
    tiny_model(vocabulary=320, layers=7).save_pretrained(tmp_path / "deep")
    raw = {**raw, "teacher": {"model": str(tmp_path / "deep")}, "student": {"from": "teacher", "layers": 5}}
    config = parsed(raw, training__fsdp=True)
    from_few = forecast(config, devices=2)
    monkeypatch.setattr(Breakdown, "layers_tried", lambda self: (self.plan.layers, self.plan.layers))
    from_all = forecast(config, devices=2)
    few, every = (
        {name: sum(parts.values()) - parts["framework"] for name, parts in found.moments.items()}
        for found in (from_few, from_all)
    )
    assert few == pytest.approx(every, rel=0.02)


def test_a_rank_holds_less_the_more_is_sharded(raw, tmp_path):
    config = parsed(large_config(raw, tmp_path / "7b"), precision="bfloat16")
    two, four = (forecast(config, memory=80, device="cuda", devices=ranks) for ranks in (2, 4))
    assert two.peak == two.layouts["DDP"] > two.layouts["FSDP"] > two.layouts["FSDP, offloaded"]
    assert four.layouts["FSDP"] < two.layouts["FSDP"]
    teacher = 2 * two.parameters["teacher"]
    assert two.layouts["FSDP"] - two.layouts["FSDP, offloaded"] == pytest.approx(teacher / 2, rel=0.01)
    assert forecast(config, memory=80, device="cuda").layouts == {}
    kept = parsed(config.as_dict(), training__fsdp=True, teacher__offload=True)
    assert forecast(kept, memory=80, device="cuda", devices=2).peak == two.layouts["FSDP, offloaded"]


def large_config(raw: dict, folder, **changes) -> dict:
    """A teacher of 7B parameters of which nothing is there but its config."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ).save_pretrained(folder)
    return {**raw, "teacher": {"model": str(folder)}, **changes}


def test_a_teacher_of_7b_is_forecast_from_its_config_alone(raw, tmp_path):
    found = forecast(
        parsed(large_config(raw, tmp_path / "7b"), data__max_length=512), memory=24, device="cuda"
    )
    assert found.parameters["teacher"] == 6_738_415_616
    assert found.verdict == "does not fit"
    assert any("no tokenizer" in note for note in found.notes)


def test_experts_and_untied_heads_are_counted(raw, tmp_path):
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(tmp_path / "moe")
    found = forecast(parsed({**raw, "teacher": {"model": str(tmp_path / "moe")}}))
    assert found.parameters["teacher"] == sum(p.numel() for p in model.parameters())
    assert found.parameters["student"] == sum(p.numel() for p in shallower(model, [0, 3]).parameters())


def test_a_router_that_learns_keeps_what_the_teacher_had_inside(raw, teacher_folder, tmp_path):
    """More layers of it, more is kept for its backward pass; asked in any other way, one layer's is."""

    def activations(layers: int, experts: object) -> int:
        folder = tmp_path / f"moe-{layers}"
        if not folder.exists():
            model_with_experts(layers=layers).save_pretrained(folder)
            AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
        teacher = {"model": str(folder), "experts": experts}
        config = parsed({**raw, "teacher": teacher, "student": {"from": str(teacher_folder)}})
        moments = forecast(config, device="cpu").moments
        return max(parts.get("teacher's activations", 0) for parts in moments.values())

    aware = {"student_aware": {}}
    (two, four), (plain, plain_four) = ([activations(n, how) for n in (2, 4)] for how in (aware, "topk"))
    assert two > 1.5 * plain
    assert four - two > 0.5 * two
    assert plain_four == pytest.approx(plain, rel=0.05)
    assert plain < activations(2, "all") < two


def test_a_config_of_no_language_model_is_refused_with_its_path(raw, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="odd"):
        forecast(parsed({**raw, "teacher": {"model": str(tmp_path / "odd")}}))


def test_a_quantity_follows_its_own_models_layers():
    assert at_layers((15, 30), "backward", 3.0, 4.0, (2, 2), (3, 3)) == 16
    assert at_layers((15, 30), "teacher's forward", 3.0, 4.0, (2, 2), (3, 3)) == 31
    assert at_layers((2, 30), "backward", 3.0, 3.5, (2, 2), (2, 3)) == 3.5


SPANS = {"span_kl": 0.3, "projected_kl": 0.2, "alm": 0.2, "uld": 0.2, "ce": 0.3}


def test_a_teacher_with_its_own_tokens_has_logits_of_its_own_size(raw, tmp_path):
    trained_tokenizer(sentences(60), 270).save_pretrained(tmp_path / "tokenizer")
    student = {**raw["student"], "tokenizer": str(tmp_path / "tokenizer")}
    found = forecast(parsed({**raw, "student": student, "loss": {"weights": SPANS}}, loss__chunk=64))
    assert found.parameters["student"] < forecast(parsed(raw)).parameters["student"]
    tokens, logits = 4 * 15, part(found, "loss", "logits")  # of both, each in float32
    assert tokens * (270 + 300) * 4 <= logits <= 8 * 64 * (270 + 300) * 4
    assert any("each token is taken to be a span" in each for each in found.notes)
