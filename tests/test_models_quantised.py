"""A quantised teacher: what is refused of it, what it has lost, and that it teaches."""

import pytest
import torch
from conftest import tiny_model
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.errors import ConfigError, ModelError
from kdlib.evaluation import quantised
from kdlib.models.heads import stated_form
from kdlib.runs.files import StudentFolder
from kdlib.tasks import base as tasks
from kdlib.tasks.base import teacher_of
from kdlib.training.run import train

INT8 = {"quantization": "torchao_int8"}


@pytest.fixture
def config(raw_config):
    return parse({**raw_config, "teacher": {**raw_config["teacher"], **INT8}})


def test_a_quantiser_that_is_not_there_is_refused_before_a_weight_is_loaded(config, monkeypatch):
    monkeypatch.setattr("kdlib.models.quantised.find_spec", lambda name: None)
    monkeypatch.setattr("kdlib.models.loading.load_weights", None)
    with pytest.raises(ModelError, match=r"needs torchao, .*: pip install 'kdlib\[torchao\]'"):
        tasks.check_made(config)


@pytest.fixture
def whole(raw_config):
    """What a training needs, with the teacher as it is."""
    return pieces(parse(raw_config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"model": "x", "quantization": "int3"}}, "teacher.quantization: found 'int3'"),
        ({"teacher": {"model": "x", **INT8}, "training": {"fsdp": True}}, "lies whole on each device"),
    ],
)
def test_what_does_not_go_with_a_quantised_teacher_is_refused(raw_config, changes, said):
    with pytest.raises(ConfigError, match=said):
        parse({**raw_config, **changes})


def test_what_a_teacher_has_lost_is_measured_against_the_whole_one(config, whole):
    prepared, coarse = whole["prepared"], tiny_model(vocabulary=320)
    said = quantised.lost_by(config, prepared, whole["teacher"])
    assert said.startswith("KL(whole ‖ quantised) 0.0000 nats")
    with torch.no_grad():
        for parameter in coarse.model.layers.parameters():
            parameter.copy_((parameter / 0.1).round() * 0.1)  # in few bits
    assert float(quantised.lost_by(config, prepared, teacher_of(coarse, prepared)).split()[3]) > 0.001


def test_where_memory_does_not_do_for_both_its_own_perplexity_is_told(config, whole, monkeypatch):
    monkeypatch.setattr(quantised, "device_memory", lambda device: (0, 0))
    monkeypatch.setattr(quantised, "load_model", None)
    said = quantised.lost_by(config, whole["prepared"], whole["teacher"])
    assert said.startswith("perplexity ")
    assert "the whole one was not asked" in said


def test_a_teacher_in_eight_bits_teaches_what_it_still_knows(config, whole, tmp_path):
    pytest.importorskip("torchao", reason="it slows every import of transformers: not in the test extra")
    made, prepared = pieces(config), whole["prepared"]

    def from_whole(model):
        """KL(whole teacher || model), nats per token."""
        return float(quantised.lost_by(config, prepared, model).split()[3])

    assert 0 < (lost := from_whole(made["teacher"])) < 0.1
    assert stated_form(made["teacher"].model) is not None  # its head is whole
    students = [
        train(config, StudentFolder(tmp_path / name), **each).student
        for name, each in (("int8", made), ("whole", whole))
    ]
    one, other = (from_whole(teacher_of(student.eval(), prepared)) for student in students)
    assert abs(one - other) <= lost
    head, inner = made["teacher"].model.lm_head, made["teacher"].model.model.layers[0].mlp.up_proj
    head.weight = torch.nn.Parameter(inner.weight.data, requires_grad=False)
    assert stated_form(made["teacher"].model) is None  # a head in few bits makes its logits itself
