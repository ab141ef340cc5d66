import copy

import pytest
import torch

from kdlib.config.run import load, parse
from kdlib.config.task_rules import RULES
from kdlib.errors import ConfigError, ModelError
from kdlib.metrics.names import MEASURES
from kdlib.models.loading import device_of

CLASSES = {
    "task": "sequence-classification",
    "teacher": {"model": "t"},
    "student": {"from": "s"},
    "data": {"source": "d", "label": "topic"},
    "loss": {"weights": {"kd": 0.7, "ce": 0.3}, "temperature": 3},
    "training": {"max_steps": 4},
}


def changed(raw=CLASSES, **changes):
    made = copy.deepcopy(raw)
    for path, value in changes.items():
        *above, last = path.split("__")
        inner = made
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return made


def test_each_task_has_a_usual_metric_of_its_own():
    assert parse(CLASSES).training["metric_for_best_model"] == "eval_accuracy"
    assert (
        parse(changed(task="causal-lm", data={"source": "d"})).training["metric_for_best_model"]
        == "eval_perplexity"
    )
    assert {name for rules in RULES.values() for name in (*rules.best_by, *rules.held)} == set(MEASURES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"loss__weights": {"kd": 1, "hidden": 0.5}},
            "loss.weights.hidden: it compares the models token by token",
        ),
        (
            {"baseline": {"weights": {"attention": 1.0}}},
            "baseline.weights.attention: it compares the models token by token",
        ),
        (
            {"training__metric_for_best_model": "perplexity"},
            "training.metric_for_best_model: found 'perplexity'; it is one of accuracy",
        ),
        ({"data__packing": False}, "data.packing: found False, which sequence-classification does not read"),
        (
            {"data__choices": "options"},
            "data.choices: found 'options', which sequence-classification does not read",
        ),
        ({"data__validation": 1.5}, "data.validation: found 1.5; it is a share of the rows between 0 and 1"),
        ({"data__test": True}, "data.test: found True; it is a share of the rows between 0 and 1"),
        (
            {"early_stopping": {"patience": 2}},
            "early_stopping: needs evaluations to judge by; set training.eval_strategy: epoch",
        ),
        (
            {"early_stopping": {"patience": 0}, "training__eval_strategy": "epoch"},
            "early_stopping.patience: found 0",
        ),
        (
            {"teacher_stage": {"training": {"max_stepz": 4}}},
            "teacher_stage.training.max_stepz: TrainingArguments has no such name",
        ),
        (
            {"teacher_stage": {"training": {"max_steps": 4}, "early_stopping": {"patience": 1}}},
            "teacher_stage.early_stopping: needs",
        ),
        ({"device": "gpu"}, "device: found 'gpu'"),
    ],
)
def test_what_does_not_go_with_a_classification_is_refused_with_its_path(changes, words):
    with pytest.raises(ConfigError) as error:
        parse(changed(**changes))
    assert f"\n  {words}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data__label": "topic"},
            (
                "data.label: found 'topic', which causal-lm does not read; leave it out, or set task: "
                "sequence-classif"
            ),
        ),
        (
            {"data__text": ["title", "content"]},
            "data.text: found ['title', 'content']; causal-lm reads one column",
        ),
        (
            {"teacher_stage": {"training": {"metric_for_best_model": "eval_kl_to_teacher"}}},
            "teacher_stage.training.metric_for_best_model: found 'eval_kl_to_teacher'; it is one of perp",
        ),
        (
            {"teacher": None, "teacher_stage": {"training": {"max_steps": 4}}},
            "teacher_stage: trains the teacher first, and there is none (teacher: null)",
        ),
    ],
)
def test_settings_that_a_language_model_would_pass_over_in_silence_are_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        parse(changed(changed(task="causal-lm", data={"source": "d"}), **changes))
    assert f"\n  {words}" in str(error.value)


def test_a_config_of_each_task_survives_being_written_and_read():
    for raw in (
        CLASSES,
        changed(task="causal-lm", data={"source": "d"}),
        changed(task="question-answering", data={"source": "d"}),
    ):
        config = parse(raw)
        assert parse(config.as_dict()) == config


def test_smoke_keeps_rows_of_each_class_and_shortens_the_teachers_stage():
    full, small = load("configs/stdlib_sections.yaml"), load("configs/stdlib_sections.yaml", smoke=True)
    assert full.teacher_stage.training.get("max_steps") is None
    assert small.teacher_stage.training["max_steps"] == 4
    assert (small.data.max_train_rows, small.data.max_eval_rows, small.data.max_length) == (256, 64, 32)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what a machine without one says")
def test_a_device_that_is_not_there_is_named():
    for config in (parse(CLASSES), parse(changed(device="cpu"))):
        assert device_of(config.wanted_device).type == "cpu"
    with pytest.raises(ModelError, match=r"device: found cuda, but this machine has cpu; write cpu, or auto"):
        device_of(parse(changed(device="cuda")).wanted_device)
