"""The cells of 02_train and 03_compare on runs that measure little, and the report of each."""

import pytest
from made_runs import run_cells

from kdlib.config.run import parse
from kdlib.reports import run as reports
from kdlib.reports.summary import summary
from kdlib.runs import folder as runs
from kdlib.runs.progress import progress
from kdlib.workbench import session

ONCE = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("evaluated", [{}, pytest.param(ONCE, marks=pytest.mark.slow)], ids=["never", "once"])
def test_a_run_that_measures_little_and_continues_no_text_goes_through_all_cells(
    raw_config, tmp_path, evaluated, monkeypatch
):
    training = raw_config["training"]
    del training["eval_strategy"], training["eval_steps"]
    training |= {"max_steps": 2, **evaluated}
    raw_config["compare"] |= {"continuations": 0}
    run = runs.create(tmp_path / "runs", "run", parse(raw_config))
    session.Workbench(run).setup()
    assert run.status["state"] == "created"
    seen, train = [], session.training.train
    monkeypatch.setattr(
        session.training,
        "train",
        lambda *given, **all: (seen.append(summary(run).state), train(*given, **all)),
    )
    run_cells("02_train", run)
    assert seen == ["running", "running"]  # both students
    shown = reports.render(run, tmp_path / "reports").read_text()
    assert (run.status["state"], progress(run).state, summary(run).state) == ("trained",) * 3
    assert "This report is partial: the run is trained and not compared." in shown
    run_cells("03_compare", run)
    assert run.status["state"] == "done"
    assert run.comparison["prompts"] == []
    assert "cannot be read whole" not in reports.render(run, tmp_path / "reports").read_text()
