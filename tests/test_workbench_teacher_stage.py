"""A teacher without a head is trained first, in a run of its own: once, again where something of it
changes, and it can be stopped.
"""

import subprocess
import sys

import pytest
from made_classifiers import LABELS, classification, classifier, source
from made_log import read_metrics, stands

from kdlib.config.run import Config, parse
from kdlib.errors import RunError, Stopped
from kdlib.models.loading import load_config
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.workbench import teacher_stage

LONG = {"max_steps": 4000, "eval_strategy": "no", "save_steps": 4000, "logging_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("stage")
    classifier(place / "body", "bert", labels=["one", "two"], seed=3)
    source(place, 160)
    return place


@pytest.fixture(autouse=True)
def within(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a trained teacher is named from here


def config(place, *overrides, **training) -> Config:
    raw = {
        **classification(str(place / "body"), "teacher"),
        "student": {"from": "teacher", "layers": 1},
        "data": {"source": str(place / "texts.jsonl"), "validation": 0.25, "max_length": 32, "split_seed": 0},
        "teacher_stage": {"training": {"max_steps": 4, "learning_rate": 3e-3, "use_cpu": True, **training}},
    }
    return parse(raw, overrides)


def asking(settings: Config, tmp_path, name="run") -> Run:
    return runs.create(tmp_path / "runs", name, settings)


def test_a_teacher_is_trained_once_and_used_again(place, tmp_path, capsys):
    first = config(place)
    made = teacher_stage.taught(first, asking(first, tmp_path))
    assert made.teacher_stage is None
    assert made.teacher.model.startswith("runs/teacher_body_")
    assert "is trained for the task first" in capsys.readouterr().out
    # nothing that the teacher's weights depend on
    other = config(place, "seed=5", "loss.temperature=4", "student.layers=2")
    again = teacher_stage.taught(other, asking(other, tmp_path, "other"))
    assert again.teacher.model == made.teacher.model
    assert "the teacher was trained before" in capsys.readouterr().out
    assert teacher_stage.resolved(other, tmp_path / "runs").teacher.model == made.teacher.model

    run = teacher_stage.run_of(other, tmp_path / "runs")
    assert run.status["state"] == "done"
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:  # before its last word
        stands(run, "running", pid=killed.pid)
    (run.checkpoints / "checkpoint-8").mkdir(parents=True)
    assert run.status["state"] == "died"
    teacher_stage.taught(other, asking(other, tmp_path, "third"))
    assert run.status["state"] == "done"
    assert not run.checkpoints.exists()


@pytest.mark.parametrize(
    "change",
    [
        "teacher_stage.training.learning_rate=1e-3",
        "teacher_stage.seed=1",
        "data.max_length=16",
        "data.split_seed=1",
    ],
)
def test_whatever_its_weights_depend_on_makes_another_teacher(place, tmp_path, change):
    places = {teacher_stage.run_of(each, tmp_path).name for each in (config(place), config(place, change))}
    assert len(places) == 2


def test_whoever_is_told_of_it_makes_no_other_teacher(place, tmp_path):
    told = config(place, "trackers.entity=team")
    assert teacher_stage.own_config(told).trackers.entity == "team"
    assert teacher_stage.run_of(told, tmp_path) == teacher_stage.run_of(config(place), tmp_path)


def test_its_rows_are_those_of_its_students_whatever_their_seed(place, tmp_path):
    plain = parse(
        {**config(place).as_dict(), "data": {**config(place).data.as_dict(), "split_seed": None}}, ["seed=7"]
    )
    assert teacher_stage.own_config(plain).data.split_seed == 7
    assert teacher_stage.own_config(plain).seed == 0


def test_a_stop_of_the_run_that_needs_it_keeps_a_checkpoint_from_which_it_goes_on(place, tmp_path):
    settings = config(place, **LONG)
    run = asking(settings, tmp_path)
    (run.path / "STOP").touch()
    with pytest.raises(Stopped, match="stopped at step 1 with a checkpoint"):
        teacher_stage.taught(settings, run)
    own = teacher_stage.run_of(settings, tmp_path / "runs")
    assert own.status["state"] == "stopped"
    assert not (run.path / "STOP").exists()
    assert not own.is_trained
    assert (own.checkpoints / "checkpoint-1").exists()
    (own.path / "STOP").touch()  # of its own counts too
    with pytest.raises(Stopped, match="stopped at step 2 with"):
        teacher_stage.taught(settings, run)
    assert [line["train/step"] for line in read_metrics(own)] == [1, 2]


def test_a_teacher_that_learned_from_other_rows_is_not_used(place, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = parse(
        {**config(place).as_dict(), "data": {**config(place).data.as_dict(), "source": source(folder, 160)}}
    )
    run = asking(settings, tmp_path)
    teacher_stage.taught(settings, run)
    source(folder, 200)  # more rows in the same file
    with pytest.raises(
        RunError, match=r"was trained on other rows than .*texts.jsonl has now.*delete runs/teacher_body"
    ):
        teacher_stage.taught(settings, run)


@pytest.mark.parametrize("labels", [["good", "bad", "tools"], ["good", "bad"]])
def test_a_model_that_knows_other_classes_learns_those_of_the_data(place, tmp_path, labels):
    other = classifier(tmp_path / "other", "bert", labels=labels, seed=4)
    settings = parse({**config(place).as_dict(), "teacher": {"model": other}})
    made = teacher_stage.taught(settings, asking(settings, tmp_path))
    assert sorted(load_config(made.teacher.model).id2label.values()) == sorted(LABELS)
