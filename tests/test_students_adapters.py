"""A training of an adapter: what moves, what is saved, what goes on after a stop; the base as its teacher."""

import pytest
import torch
from tiny_training import comparable, pieces, trainer_of
from transformers import AutoModelForCausalLM, TrainerCallback

from kdlib.config.run import parse
from kdlib.diagnostics.memory import forecast
from kdlib.diagnostics.parity import parity
from kdlib.errors import ConfigError, ModelError, NonFiniteLoss
from kdlib.losses.signals import DenseSignal, LinearSignal, kept
from kdlib.models.adapters import is_adapted, off
from kdlib.models.loading import load_model
from kdlib.runs.files import StudentFolder
from kdlib.students.student import outline
from kdlib.tasks import base as tasks
from kdlib.tasks.base import OwnBase, task_of, untrained_student
from kdlib.training.run import train
from kdlib.workbench.tables import size_of

pytest.importorskip("peft")
OWN = {"teacher": {"from": "student"}}


@pytest.fixture
def asked(raw_config, narrow):
    """A config of a student with an adapter, and changes."""

    def make(adapter=None, student=None, **changes):
        whole = {"from": narrow, **(student or {}), "adapter": {"r": 4, **(adapter or {})}}
        return parse({**raw_config, "student": whole, **changes})

    return make


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def own_base(tmp_path_factory):
    """One training with its own base as teacher and all that can be beside: dropout, accumulation, hidden."""
    from conftest import narrow_student, sentences, tiny_experiment, tiny_model, tiny_tokenizer

    home = tmp_path_factory.mktemp("own-base")
    tiny_tokenizer(sentences(200)).save_pretrained(home / "teacher")
    tiny_model(vocabulary=320).save_pretrained(home / "teacher")
    narrow = narrow_student(home / "teacher", home / "narrow")
    raw = tiny_experiment(home / "teacher", home)
    raw |= {**OWN, "student": {"from": narrow, "adapter": {"r": 4, "lora_dropout": 0.3, "merge": True}}}
    config = parse({**raw, "baseline": None})
    made = pieces(config)
    before = {name: each.clone() for name, each in made["student"].state_dict().items()}
    trainer = train(config, StudentFolder(home / "whole"), **made)
    return config, home, before, trainer


def test_only_the_adapter_moves(own_base):
    _, _, before, trainer = own_base
    moved = {
        name for name, each in trainer.student.state_dict().items() if not torch.equal(each, before[name])
    }
    assert moved == {name for name in before if ".lora_" in name}


def test_what_is_saved_loads_as_any_model_and_says_what_the_adapter_says(own_base):
    _, home, _, trainer = own_base
    ids = torch.arange(3, 19)[None]
    loaded = AutoModelForCausalLM.from_pretrained(home / "whole" / "final_model")
    assert not is_adapted(loaded)
    with torch.no_grad():
        one, other = loaded(input_ids=ids).logits, trainer.student.eval()(input_ids=ids).logits
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_a_checkpoint_has_the_adapter_alone(own_base):
    _, home, before, _ = own_base
    size = (home / "whole/checkpoints/checkpoint-12/model.safetensors").stat().st_size
    bytes_of = sum(each.nbytes for name, each in before.items() if ".lora_" in name)
    assert bytes_of < size < 1.5 * bytes_of + 10_000


def test_a_training_stopped_and_resumed_ends_as_one_undisturbed(own_base):
    config, home, _, _ = own_base
    with pytest.raises(KeyboardInterrupt):
        train(config, StudentFolder(home / "stopped"), callbacks=[Stop()], **pieces(config))
    train(config, StudentFolder(home / "stopped"), **pieces(config))
    for model in ("best_model", "final_model"):
        one, other = (home / run / model / "model.safetensors" for run in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), model
    assert comparable(home / "whole") == comparable(home / "stopped")


def test_the_base_as_teacher_is_the_model_itself_and_says_what_it_says_alone(asked):
    config = asked(**OWN)
    made, alone = pieces(config), tasks.load_teacher(config, pieces(config)["prepared"])
    student, teacher = made["student"].train(), made["teacher"]
    assert isinstance(teacher, OwnBase)
    assert teacher.model is student
    for name, each in student.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(each, std=0.1)
    batch = made["prepared"].first_rows()
    tokens = kept(batch["labels"])
    said, expected = teacher(batch, tokens), alone(batch, tokens)
    assert isinstance(said, LinearSignal)
    assert torch.equal(said.logits(), expected.logits())
    assert student.training
    assert student.get_parameter("model.layers.0.self_attn.q_proj.lora_A.default.weight").requires_grad
    with off(student):
        form = teacher.form
    assert form is not None


@torch.no_grad()
def test_in_bfloat16_its_base_is_to_the_last_bit_what_is_loaded_so(asked):
    config = asked(precision="bfloat16", **OWN)
    prepared, ids = pieces(config)["prepared"], torch.arange(3, 19)[None]
    student, alone = untrained_student(config, prepared, None), tasks.load_teacher(config, prepared).model
    assert student.dtype is alone.dtype is torch.bfloat16
    with off(student):
        assert torch.equal(student(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_a_student_of_the_teachers_layers_may_have_an_adapter_that_is_joined(asked, tmp_path):
    config = asked({"merge": True}, {"from": "teacher", "layers": 2})
    made = pieces(config)
    train(config, StudentFolder(tmp_path), **made)
    assert load_model(str(tmp_path / "best_model")).config.num_hidden_layers == 2


def test_an_adapter_alone_is_saved_with_its_tokenizer_and_compared(asked, tmp_path, narrow):
    config = asked()
    trainer = train(config, StudentFolder(tmp_path), **pieces(config))
    saved = {path.name for path in (tmp_path / "best_model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= saved
    assert "model.safetensors" not in saved
    loaded = task_of(config).load(str(tmp_path / "final_model"), None)
    assert not is_adapted(loaded)
    assert trainer.student.peft_config["default"].base_model_name_or_path == narrow


def test_hidden_states_are_projected_beside_an_adapter_and_go_on_after_a_stop(asked, tmp_path, raw_config):
    how = {"loss": {"weights": {"kd": 0.5, "hidden": 0.5}, "features": {"layers": [[1, 3]]}}}
    config = asked(**how)
    whole = train(config, StudentFolder(tmp_path / "whole"), **pieces(config))
    with pytest.raises(KeyboardInterrupt):
        train(config, StudentFolder(tmp_path / "stopped"), callbacks=[Stop()], **pieces(config))
    again = train(config, StudentFolder(tmp_path / "stopped"), **pieces(config))
    states = [trainer.student.state_dict() for trainer in (whole, again)]
    assert any("distillation_" in name for name in states[0])
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_things_are_equal_with_an_adapter(asked, checkpointing):
    raw = asked(**OWN).as_dict()
    config = parse({**raw, "training": {**raw["training"], "activation_checkpointing": checkpointing}})
    found = parity(config, **pieces(config))
    assert set(found["result"]) == {"pass"}, found


def test_an_adapted_head_makes_all_logits_at_once_and_it_is_said(asked, tmp_path, capsys):
    training = {**asked().training, "eval_strategy": "no"}
    config = asked({"target_modules": ["q_proj", "lm_head"]}, training=training)
    made = pieces(config)
    trainer = trainer_of(config, tmp_path, made)
    batch = made["prepared"].first_rows()
    _, student, teacher = trainer.signals(trainer.model, batch, trainer.now())
    assert isinstance(student, DenseSignal)
    assert isinstance(teacher, LinearSignal)
    assert "its head has an adapter too, so its logits are made all at once" in size_of(made["student"])


def test_a_value_that_is_not_finite_is_found_in_the_adapter(asked, tmp_path):
    config = asked(**OWN)
    made = pieces(config)
    name = "model.layers.1.mlp.up_proj.lora_B.default.weight"
    with torch.no_grad():
        made["student"].get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"student.*layers.1.mlp.up_proj"):
        train(config, StudentFolder(tmp_path), **made)


def test_the_forecast_knows_what_is_trained_and_that_the_base_is_there_once(asked, raw_config, narrow):
    full = forecast(parse({**raw_config, "student": {"from": narrow}}))
    own = forecast(asked(**OWN))
    student = untrained_student(asked(), pieces(asked())["prepared"], None)
    trained = sum(each.nbytes for each in student.parameters() if each.requires_grad)
    step, whole = own.moments["optimizer step"], full.moments["optimizer step"]
    assert step["optimizer state"] == 2 * trained < whole["optimizer state"]
    assert step["gradients"] == trained
    assert (step["teacher's weights"], whole["teacher's weights"] > 0) == (0, True)


def test_names_of_no_part_are_refused_before_a_weight_is_loaded(asked, monkeypatch):
    monkeypatch.setattr("kdlib.models.loading.load_weights", None)
    config = asked({"target_modules": ["q_prj"]})
    with pytest.raises(ModelError, match="did you mean 'q_proj'"):
        tasks.check_made(config)
    assert outline(asked(), task_of(config)).blank_student().peft_config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"rank": 8}}, "student.adapter.rank: unknown key"),
        ({"adapter": {"r": 0}}, "student.adapter.r: found 0"),
        ({"adapter": {"lora_dropout": 1.0}}, "student.adapter.lora_dropout: found 1.0"),
        ({"student": {"from": "teacher", "layers": 2}}, "merge: its base is made here"),
        ({"student": {"from": "config", "shape": "100m"}}, "goes beside trained weights"),
        ({"training": {"fsdp": True, "max_steps": 2}}, "training.fsdp: a student with an adapter"),
        ({"teacher": {"from": "student", "model": "gpt2"}}, "found `model` beside `from: student`"),
        ({**OWN, "student": {"layers": 1}, "adapter": {"merge": True}}, "needed are `student.from"),
        ({"teacher": {"from": "student", "device": "cpu"}}, "teacher.device: this teacher is the student's"),
        ({"teacher": {"from": "pupil"}}, "teacher.from: found 'pupil'"),
    ],
)
def test_what_does_not_go_with_an_adapter_is_refused(asked, changes, said):
    with pytest.raises(ConfigError, match=said):
        asked(**changes)


def test_a_teacher_from_a_student_without_an_adapter_is_refused_and_the_rest_is_written_as_given(
    raw_config, narrow, asked
):
    with pytest.raises(ConfigError, match=r"teacher\.from: found student.*student\.adapter"):
        parse({**raw_config, **OWN, "student": {"from": narrow}})
    config = asked(**OWN)
    assert config.teacher.model == narrow
    assert config.as_dict()["teacher"] == {"from": "student"}
    assert parse(config.as_dict()) == config
