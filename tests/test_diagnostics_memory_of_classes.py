"""The forecast of a classification: models with the data's classes, rows as both models read them, and a
peak that real steps reach.
"""

import pytest
import torch
from made_classifiers import LABELS, classification, classifier
from test_diagnostics_memory import parsed, plan_of
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPConfig

from kdlib.config.run import load
from kdlib.diagnostics.fake_step import Allocations, FakeStep
from kdlib.diagnostics.forecast import advised, as_text
from kdlib.diagnostics.memory import forecast
from kdlib.errors import ModelError
from kdlib.losses.buffers import Workspace
from kdlib.models.classifier import load_classifier
from kdlib.models.loading import parameters
from kdlib.runs.folder import project_root
from kdlib.training.plan import training_arguments, workspace_of


@pytest.fixture(scope="module")
def raws(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("pairs")
    teacher = classifier(folder / "teacher")
    made = {
        f"llama to {kind}": classification(teacher, classifier(folder / kind, kind, tokens=280))
        for kind in ("bert", "gpt2")
    }
    own = {**classification(teacher, "teacher"), "student": {"from": "teacher", "layers": 1}}
    return made | {"llama to its own layer": own}


@pytest.mark.parametrize("pair", ["llama to bert", "llama to gpt2", "llama to its own layer"])
def test_parameters_are_those_of_the_real_classifiers_and_every_moment_has_a_peak(raws, pair):
    config = parsed(raws[pair])
    found = forecast(config, vocabulary=3)
    assert found.parameters["teacher"] == parameters(load_classifier(config.teacher.model, LABELS))
    if config.student.source != "teacher":
        assert found.parameters["student"] == parameters(
            load_classifier(config.student.source, LABELS, untrained=True)
        )
    assert found.moments["optimizer step"]["gradients"] == 4 * found.parameters["student"]
    assert set(found.moments) == {
        "student's forward",
        "teacher's forward",
        "loss",
        "backward",
        "optimizer step",
        "evaluation",
    }
    assert found.chunk is None
    assert not found.compiled
    assert any("data.max_length (32) tokens" in note for note in found.notes)


def test_the_shipped_preset_is_forecast_without_its_data():
    assert forecast(load(project_root() / "configs" / "stdlib_sections.yaml")).peak > 0


@pytest.mark.parametrize("pair", ["llama to bert", "llama to gpt2", "llama to its own layer"])
def test_a_step_without_data_holds_what_the_same_step_holds_with_data(raws, pair):
    plan, held = plan_of(parsed(raws[pair]), 3), []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[])):
        with mode:
            step = FakeStep(plan, dtype=torch.float32, workspace=Workspace(64))
            batch = step.batch(4)
            with Allocations() as watch:
                watch.hold([*step.student.parameters(), *step.teacher.parameters()])
                step.train(batch, step.objectives[0], count=4, phase=watch.phase)
        held.append(
            {
                name: sum(block.bytes for block in watch.held(watch.peak(*span)))
                for name, span in watch.spans.items()
            }
        )
    assert held[0] == pytest.approx(held[1], rel=0.02)


def test_each_model_reads_rows_of_its_own_where_the_student_is_not_made_from_the_teacher(raws):
    made = {
        name: FakeStep(plan_of(parsed(raws[name]), 3), dtype=torch.float32, workspace=Workspace(64)).batch(4)
        for name in ("llama to bert", "llama to its own layer")
    }
    both = made["llama to bert"]
    assert both["input_ids"].shape == both["teacher_input_ids"].shape == (4, 32)
    assert both["input_ids"].max() < 280
    assert both["attention_mask"].sum() == 4 * 32 - 1
    assert both["labels"].shape == (4,)
    assert "teacher_input_ids" not in made["llama to its own layer"]


def test_the_number_of_classes_is_the_datas_else_the_configs_else_the_teachers_and_said(raws):
    raw = raws["llama to bert"]
    assert plan_of(parsed(raw), 7).student.num_labels == 7
    named = plan_of(parsed({**raw, "data": {**raw["data"], "labels": ["a", "b", "c", "d"]}}))
    assert named.vocabulary == named.teacher.num_labels == 4
    guessed = plan_of(parsed(raw))
    assert guessed.vocabulary == 3
    assert "the data was not read, so the teacher's 3 classes are taken" in guessed.notes[0]


def test_a_longer_row_and_a_larger_batch_take_more(raws):
    raw = raws["llama to bert"]
    peaks = [
        forecast(parsed(raw, **changes), vocabulary=3).peak_in_training
        for changes in ({}, {"data__max_length": 64}, {"training__per_device_train_batch_size": 32})
    ]
    assert peaks[0] < min(peaks[1:])


def test_bfloat16_is_forecast_and_said_in_words(raws):
    said = as_text(
        advised(parsed(raws["llama to bert"], precision="bfloat16"), forecast, vocabulary=3, rows=48)
    )
    assert "bfloat16 on cpu; all logits at once" in said
    assert "note: each row is taken to have" in said


def test_a_model_that_classifies_nothing_is_refused(raws, tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="clip model, which is no classifier of texts"):
        plan_of(parsed(raws["llama to bert"], teacher__model=str(tmp_path)))


def test_a_long_training_of_few_classes_is_not_worth_compiling(raws):
    config = parsed(raws["llama to bert"], training__max_steps=100_000)
    assert not workspace_of(config, training_arguments(config, "unused"), 48, 14).compiled
