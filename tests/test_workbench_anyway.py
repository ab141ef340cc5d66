"""What the doctor calls critical ends a run before it trains, unless somebody says `anyway`."""

import contextlib

import pytest
from made_runs import made_run

from kdlib.errors import RunError
from kdlib.reports import run as reports
from kdlib.runs.verdict import refuse_unsound
from kdlib.workbench import runner, session

HOT = {
    "severity": "critical",
    "where": "training.learning_rate",
    "what": "a peak of 1.0e+03",
    "why": "above it a training diverges",
    "fix": "try 0.008",
}
MILD = {**HOT, "severity": "warning"}


class NoKernels:
    """Stands for Kernels: nothing is started."""

    @contextlib.contextmanager
    def taken(self, *, another):
        yield None


@pytest.fixture
def run(tmp_path):
    return made_run(tmp_path / "runs", "first", state="created", steps=0, kl=None)


@pytest.fixture
def executed(run, monkeypatch):
    """The notebooks that were run; 00_setup leaves what the doctor found."""
    done = []

    def execute(notebook, output, parameters, kernel):
        done.append(notebook.stem)
        if notebook.stem == "00_setup":
            run.add_to_manifest(doctor=[HOT, MILD])

    monkeypatch.setattr(runner, "execute", execute)
    return done


def run_all(run):
    return runner.run_notebooks(run, {}, NoKernels(), lambda run: run.path)


def test_a_run_ends_after_its_setup_and_says_what_to_do(run, executed):
    with pytest.raises(
        RunError, match=r"critical finding stopped this run before it trains:\n  training.lear"
    ):
        run_all(run)
    assert executed == ["00_setup"]
    assert run.status["state"] == "failed"
    for words in (
        "try 0.008",
        "--resume first --anyway",
        "bench.train(anyway=True)",
        "kd doctor CONFIG --fix",
    ):
        assert words in run.status["message"]
    with pytest.raises(RunError, match="stopped this run before it trains"):
        run_all(run)  # resumed
    assert executed == ["00_setup"]
    run.add_to_manifest(anyway=True)
    run_all(run)
    assert executed == list(runner.NOTEBOOKS)


def test_what_is_not_critical_stops_nothing():
    refuse_unsound({})
    refuse_unsound({"doctor": []})
    refuse_unsound({"doctor": [MILD]})
    refuse_unsound({"doctor": [HOT], "anyway": True})


def test_a_notebook_trains_anyway_by_a_parameter(run, monkeypatch):
    run.add_to_manifest(doctor=[HOT])
    bench, trained = session.Workbench(run), []
    monkeypatch.setattr(bench, "_train", lambda folder, label, **options: trained.append(label))
    for train in (bench.train, bench.train_baseline):
        with pytest.raises(RunError, match="stopped this run before it trains"):
            train()
    bench.train(anyway=True)
    bench.train_baseline()
    assert trained == ["kd", "baseline"]
    assert run.manifest["anyway"] is True


def test_what_was_trained_anyway_is_said_at_the_head_of_its_report(tmp_path):
    run = made_run(tmp_path / "runs", "first", doctor=[HOT, MILD], anyway=True)
    page = reports.render(run, tmp_path / "reports").read_text()
    assert page.index("The doctor spoke against this training") < page.index(">Summary</h2>")
    assert "To do: try 0.008" in page
    assert "checks fail, the first of them: the doctor had no objection" in page
