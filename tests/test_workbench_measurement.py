"""A few real steps: what they take, in a process of their own, and that a forecast comes near."""

import pytest
from made_classifiers import classification, classifier, source

from kdlib.config import run as configs
from kdlib.diagnostics.forecast import GIB
from kdlib.diagnostics.memory import forecast
from kdlib.runs.folder import project_root
from kdlib.students.student import tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.workbench.measurement import filled, measured, measured_here, measured_peak


def test_time_is_that_of_a_few_real_steps_and_follows_for_the_run(config_file):
    config = configs.load(
        config_file, ["training.eval_strategy=steps", "training.eval_steps=4", "training.eval_on_start=true"]
    )
    took = measured(config)
    assert took.step_s > 0
    assert took.steps == 12
    assert took.evaluations == 4  # at the start and every 4 of 12 steps
    assert took.seconds == pytest.approx(12 * took.step_s + 4 * took.evaluation_s)


def test_memory_is_measured_on_rows_as_long_as_the_config_allows(tmp_path):
    teacher, student = classifier(tmp_path / "llama"), classifier(tmp_path / "bert", "bert", tokens=280)
    raw = classification(teacher, student)
    config = configs.parse(raw, {"data.source": source(tmp_path)})
    prepared = tasks.prepare(config, tokenizer_of(config))
    rows = [filled(prepared.train, 32)[i] for i in (0, 1)]
    batch = prepared.collate(rows)
    assert batch["input_ids"].shape == batch["teacher_input_ids"].shape == (2, 32)
    assert [row["label"] for row in rows] == prepared.train["label"][:2]
    assert measured_here(config, memory=True, dense=False)["bytes"] >= 0


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
