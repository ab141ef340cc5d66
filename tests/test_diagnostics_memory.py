import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from kdlib.config import run as configs
from kdlib.diagnostics import remedies
from kdlib.diagnostics.allocations import Allocations
from kdlib.diagnostics.charges import GIB, Charges, RehearsedWorkspace, spread
from kdlib.diagnostics.fake_step import Rehearsal, at_layers, outline
from kdlib.diagnostics.measurement import measured, measured_peak
from kdlib.diagnostics.memory import forecast, verdict
from kdlib.errors import ModelError
from kdlib.losses.buffers import Workspace
from kdlib.models.loading import load_model, parameters
from kdlib.models.student import shallower
from kdlib.runs.folder import project_root
from kdlib.training.plan import training_arguments
from kdlib.workbench import cli


def parsed(raw: dict, **overrides):
    return configs.parse(raw, {name.replace("__", "."): value for name, value in overrides.items()})


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


def charges(config) -> Charges:
    """Models counted, nothing rehearsed."""
    return Charges(
        outline(config),
        training_arguments(config, Path("unused")),
        "cpu",
        torch.float32,
        RehearsedWorkspace(64, compiled=False, kind="cpu"),
        dense=False,
    )


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
    found = charges(parsed(raw, training__optim=optim))
    assert found.optimizer_state() == each * parameters(found.student)
    assert not found.notes


def test_an_optimizer_that_is_not_known_is_assumed_and_said(raw):
    found = charges(parsed(raw, training__optim="galore_adamw"))
    assert found.optimizer_state() == 8 * parameters(found.student)
    assert "galore_adamw" in found.notes[0]
    assert "assumed" in found.notes[0]


def test_activations_without_data_are_the_tensors_that_the_real_model_saves(raw, plain):
    """By two independent ways: storages seen in the rehearsal, and autograd's own list of what it saved."""
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
    assert found == pytest.approx(real, rel=0.08)  # the rehearsal also holds what the loss is given, [60, 32]
    assert output[0].requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__activation_checkpointing": True},
        {"loss__weights": {"kd": 1.0, "attention": 0.5}},
        {"loss__weights": {"hidden": 1.0, "relational": 0.5}},
        {"data__packing": False},
    ],
)
def test_a_rehearsal_without_data_holds_what_the_same_step_holds_with_data(raw, changes):
    plan, peaks, flops = outline(parsed(raw, **changes)), [], []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad()):
        with mode:
            with Allocations():
                rehearsal = Rehearsal(plan, dtype=torch.float32, workspace=Workspace(64))
            batch = rehearsal.batch(4)
            with Allocations() as watch:
                watch.hold(
                    [
                        *rehearsal.student.parameters(),
                        *rehearsal.student.buffers(),
                        *rehearsal.teacher.parameters(),
                    ]
                )
                rehearsal.train(batch, rehearsal.objectives[-1], count=60, phase=watch.phase)
            peaks.append(
                [sum(block.bytes for block in watch.held(watch.peak(*span))) for span in watch.spans.values()]
            )
            flops.append(watch.flops)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
    assert flops[0] == flops[1]


def test_a_few_layers_tell_what_many_hold(raw, tmp_path):
    tiny_model(vocabulary=320, layers=7).save_pretrained(tmp_path / "deep")
    raw = {**raw, "teacher": {"model": str(tmp_path / "deep")}, "student": {"from": "teacher", "layers": 5}}
    from_few, from_all = forecast(parsed(raw)), forecast(parsed(raw), every_layer=True)
    few, every = (
        {name: sum(parts.values()) - parts["framework"] for name, parts in found.moments.items()}
        for found in (from_few, from_all)
    )
    assert few == pytest.approx(every, rel=1e-3)
    assert from_few.flops == pytest.approx(from_all.flops)


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
    assert found.flops == 2 * plain.flops


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


def test_shards_and_copies_are_counted_per_device(raw, plain):
    size = 4 * plain.parameters["student"]
    parts = {"student's parameters": size, "gradients": size, "optimizer state": 2 * size, "activations": 10}
    assert spread(parts, charges(parsed(raw)), 2) == {**parts, "gradient buckets": size}  # DDP's
    shards = spread(parts, charges(parsed(raw, training__fsdp="full_shard")), 2)
    assert [shards[name] for name in parts] == [size // 2, size // 2, size, 10]
    assert shards["gathered weights"] > 0


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


def test_remedies_lower_the_peak_and_keep_the_effective_batch(raw):
    config = parsed(raw, data__max_length=128, training__per_device_train_batch_size=8)
    found = forecast(config)
    tried = [changes for _, changes in remedies.single_changes(config, found)]
    assert len(tried) == 7  # checkpointing, three smaller batches, chunks, bfloat16, half as long rows
    for changes in (tried[0], tried[1], tried[-1]):
        changed = configs.parse(config.as_dict(), changes)
        assert forecast(changed).peak < found.peak
        assert (
            changed.training["per_device_train_batch_size"]
            * changed.training.get("gradient_accumulation_steps", 1)
            == 8
        )


class Fixed:
    """A forecast of this peak."""

    def __init__(self, peak):
        self.peak, self.moment, self.chunk, self.precision = peak, "backward", 64, "bfloat16"


def test_the_cheapest_remedies_that_suffice_are_named(raw):
    peaks = {True: 50, False: 200}
    config = parsed(raw, data__max_length=128)

    def forecaster(changed):
        return Fixed(peaks[bool(changed.training.get("activation_checkpointing"))])

    named = remedies.remedies(config, Fixed(200), 100, forecaster)
    assert [remedy.overrides for remedy in named] == ["-o training.activation_checkpointing=true"]
    (least,) = remedies.remedies(config, Fixed(200), 10, forecaster)
    assert least.peak == 50  # all together, and still too much
    assert remedies.remedies(config, Fixed(200), 300, forecaster) == []


def test_cards_are_judged_each_with_its_cheapest_change(raw):
    config = parsed(raw, data__max_length=128)
    lines = remedies.cards(
        config,
        Fixed(20 * GIB),
        lambda changed: Fixed((9 if changed.training.get("activation_checkpointing") else 19) * GIB),
        sizes=(8, 12, 24),
    )
    assert [line["verdict"] for line in lines] == ["does not fit", "does not fit", "fits"]
    assert lines[0]["remedy"].peak == 9 * GIB  # at least
    assert lines[1]["remedy"].changes == {"training.activation_checkpointing": True}
    assert lines[2]["remedy"] is None


def test_the_command_says_what_is_held_when_and_whether_it_fits(config_file, capsys):
    cli.app(["forecast", str(config_file), "--memory", "16"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "optimizer state" in said
    assert "16.00 GiB: fits" in said
    assert "time: measure it with --measure" in said


def test_a_model_that_is_not_there_is_named_without_a_traceback(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kd", "forecast", str(config_file), "-o", "teacher.model=./nowhere"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said


def test_a_config_of_no_language_model_is_refused_with_its_path(raw, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="odd"):
        forecast(parsed({**raw, "teacher": {"model": str(tmp_path / "odd")}}))


def test_a_verdict_leaves_room_for_the_forecasts_error():
    assert [verdict(100, memory) for memory in (116, 110, 99)] == ["fits", "tight", "does not fit"]


def test_compiled_arithmetic_is_charged_and_not_run():
    workspace = RehearsedWorkspace(64, compiled=True, kind="cpu")
    products = torch.zeros(64, 10)
    sums = workspace.rows([None], None, None)(
        products, None, torch.zeros(50, dtype=torch.long), None, torch.ones(1)
    )
    assert sums.tolist() == [0.0]


def test_time_is_that_of_a_few_real_steps_and_follows_for_the_run(config_file):
    config = configs.load(
        config_file, ["training.eval_strategy=steps", "training.eval_steps=4", "training.eval_on_start=true"]
    )
    took = measured(config)
    assert took.step_s > 0
    assert took.steps == 12
    assert took.evaluations == 4  # at the start and every 4 of 12 steps
    assert took.seconds == pytest.approx(12 * took.step_s + 4 * took.evaluation_s)


def test_a_quantity_follows_its_own_models_layers():
    assert at_layers((15, 30), "backward", 3.0, 4.0, (2, 2), (3, 3)) == 16
    assert at_layers((15, 30), "teacher's forward", 3.0, 4.0, (2, 2), (3, 3)) == 31
    assert at_layers((2, 30), "backward", 3.0, 3.5, (2, 2), (2, 3)) == 3.5


@pytest.mark.slow
@pytest.mark.parametrize(("dense", "checkpointing"), [(False, False), (True, True)])
def test_the_peak_of_a_real_training_is_within_15_percent(dense, checkpointing):
    config = configs.load(
        project_root() / "configs" / "quickstart.yaml",
        {
            "student.layers": 10,
            "training.activation_checkpointing": checkpointing,
            "loss.compile": False,
            "training.eval_strategy": "no",
        },
    )
    ahead, found = forecast(config, dense=dense), measured_peak(config, dense=dense)
    print(f"forecast {ahead.peak_in_training / GIB:.2f} GiB, measured {found / GIB:.2f}")
    assert ahead.peak_in_training == pytest.approx(found, rel=0.15)
