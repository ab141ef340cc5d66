"""Runs made before the library was rebuilt still open: tests/data/old_run, made by commit bf1882a.

`done` is a whole run, without models; `stopped` the same training, stopped at step 6 of 12 with a checkpoint.
Both have one tiny teacher, and paths relative to that folder.  explorers.json was shortened to five digits.
"""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from made_runs import RAW

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.plots.training_panels import View
from kdlib.reports import index, run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.log import eval_table, training_table
from kdlib.sources import documents as sources
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.trials import Base
from kdlib.workbench import dashboard, session, teacher_stage

FIGURES = ("loss", "kd_loss", "ce_loss", "kd_weight", "temperature", "learning_rate", "grad_norm")
OLD = Path(__file__).parent / "data" / "old_run"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the old runs, from where their relative paths hold."""
    place = shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(place)
    for metrics in place.rglob("metrics.jsonl"):
        os.utime(metrics, (0, 0))  # a checkout of this minute would be a training of this minute
    return place / "runs"


def test_a_run_of_before_has_its_report_and_its_line_in_the_index(folder, tmp_path):
    page = reports.render(runs.open_run(folder, "done"), tmp_path / "reports").read_text()
    for section in ("scorecard", "training", "comparison", "samples", "explorers", "formula"):
        assert f'<section id="{section}">' in page
    assert 'class="state done"' in page
    listed = index.render_index(folder, tmp_path / "reports").read_text()
    assert "compared (step 12 of 12)" in listed
    assert "training, step 6 of 12" in listed


@pytest.mark.parametrize(("name", "said"), [("done", "done"), ("stopped", "stopped")])
def test_a_run_of_before_is_watched(folder, name, said):
    board = dashboard.watch(str(folder / name))
    assert board.live.words[0] == f"{name}  ·  {said}"
    assert board.live.png().startswith(b"\x89PNG")
    assert len(board.live.scorecard()) == 11
    board.live.view = View(log=False)
    assert board.live.png()


def test_a_training_that_was_stopped_before_goes_on_as_if_it_never_had_been(folder, capsys, monkeypatch):
    def shuffled(documents, config, *, seed):  # as it was split then; now documents keep the source's order
        split = documents["train"].train_test_split(test_size=6, seed=seed)
        return DatasetDict(train=split["train"], validation=split["test"])

    monkeypatch.setattr(sources, "split_documents", shuffled)
    bench = session.open_run("tiny.yaml", str(folder / "stopped"))
    bench.train()
    resumed, whole = Run(folder / "stopped"), Run(folder / "done")
    assert resumed.is_trained
    found, expected = training_table(resumed), training_table(whole)
    assert list(found.columns) == list(expected.columns)
    assert found["step"].tolist() == expected["step"].tolist()
    for name in {*FIGURES} & set(found.columns):
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-4), name
    assert eval_table(resumed)["step"].tolist() == eval_table(whole)["step"].tolist()
    # since then rows are held out of as many documents as there can be, so its held-out figures are others
    assert "other rows than stopped began with" in capsys.readouterr().out


def test_a_run_of_before_goes_on_with_its_own_settings_only(folder):
    assert (
        session.open_run("tiny.yaml", str(folder / "stopped"), {"loss.temperature": 2}).run.name == "stopped"
    )
    with pytest.raises(RunError, match=r"other settings.*\n  loss.temperature: 2.0 -> 3.0"):
        session.open_run("tiny.yaml", str(folder / "stopped"), {"loss.temperature": 3})


def test_a_teachers_stage_and_a_sweeps_trials_have_the_names_that_they_had(tmp_path):
    """As 8364f67 made them: another name would train anew what is there."""
    stage = {"training": {"max_steps": 4}}
    rows = {"source": "rows", "text": "text", "label": "label"}
    classes = {"task": "sequence-classification", "data": rows, "teacher_stage": stage, "baseline": None}
    config = parse({**RAW, **classes, "loss": {"weights": {"kd": 1.0}}, "training": {"max_steps": 6}})
    assert teacher_stage.run_of(config, tmp_path).name == "teacher_a-teacher_ed14fe26"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RAW))
    for changes in ({}, {"trackers.entity": "team", "launch.processes": 2}):
        settings = SweepConfig(base="base.yaml", grid={"seed": [0]}, overrides=changes)
        assert Base(settings, "sweep", tmp_path).trial({"seed": 0}).run == "sweep_ddaa4110"
