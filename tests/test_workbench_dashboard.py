"""A picture that follows its run: drawn again only where something is new."""

import base64
import io
import json
import os
import time

import nbformat
import pytest
from made_generations import asked
from made_log import logged, logged_run, stands
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.plots.training_panels import View
from kdlib.reports.html import page
from kdlib.reports.scorecard import Line
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.log import append_metrics
from kdlib.runs.processes import PARENT
from kdlib.runs.progress import headline
from kdlib.workbench import dashboard
from kdlib.workbench.runner import execute


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return logged_run(raw_config, tmp_path)


def test_before_anything_is_logged_the_picture_says_so(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "empty", parse(raw_config))
    picture = dashboard.LiveRun(run, View())
    assert picture.words[0] == "empty  ·  nothing logged yet"
    assert Image.open(io.BytesIO(picture.png())).size[0] == 800
    assert page("card.html.j2", lines=picture.scorecard()) == ""


@pytest.fixture
def board(run):
    made = dashboard.watch(run)
    made._show()
    yield made
    made.close()


def test_each_control_changes_the_picture(board):
    controls, seen = board.controls, []
    for control, value in (
        (controls.terms[0], False),
        (controls.log, False),
        (controls.smoothing, 0.3),
        (controls.steps, (50, 100)),
    ):
        before = controls.image.value
        control.value = value
        seen.append(controls.image.value != before)
    assert seen == [True] * 4
    assert board.live.view == View(terms=("ce",), smoothing=0.3, log=False, steps=(5.0, 10.0))


def test_a_dashboard_follows_its_run_and_ends_with_its_cell(run, monkeypatch):
    monkeypatch.setattr(dashboard, "PAUSE_S", 0.05)
    with dashboard.watch(run) as board:
        before, deadline = board.controls.image.value, time.monotonic() + 30
        append_metrics(run, logged(11))
        while board.controls.image.value == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        append_metrics(run, logged(12))
    assert not board.thread.is_alive()
    assert board.live.progress.step == 12
    assert headline(board.live.progress) == "first  ·  stopped"


def test_a_dashboard_ends_by_itself_when_its_run_is_over(run, monkeypatch):
    monkeypatch.setattr(dashboard, "PAUSE_S", 0.05)
    run.history.write_text("[]")
    stands(run, "done")
    board = dashboard.watch(str(run.path))
    board._ipython_display_()
    board.thread.join(timeout=30)
    assert not board.thread.is_alive()


def test_stop_leaves_a_file_while_a_training_goes_on_and_nothing_after_it(board, run):
    board.controls.stop.click()
    assert (run.path / "STOP").exists()
    assert f"--resume {run.name}" in board.controls.message.value
    (run.path / "STOP").unlink()
    board.ended.set()
    board.controls.stop.click()
    assert not (run.path / "STOP").exists()
    assert board.controls.message.value.startswith("No training")


def test_a_file_that_cannot_be_read_is_said_to_be_and_watching_goes_on(board, run):
    text = run.metrics.read_text()
    run.metrics.write_text(text + "{<oops>}\n")
    assert not board.refresh()
    assert "a line that is no JSON" in board.controls.message.value
    run.metrics.write_text(text + json.dumps(logged(11)) + "\n")
    assert board.refresh()
    assert board.live.progress.step == 11


def test_the_scorecard_is_escaped():
    card = page(
        "card.html.j2",
        lines=[Line("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "1", passed=False)],
    )
    assert "<script" not in card
    assert "<img" not in card
    assert "&lt;script&gt;" in card


def test_a_run_that_is_not_there_is_named(run):
    with pytest.raises(RunError, match="did you mean 'first'"):
        dashboard.watch(str(run.path.parent / "frist"))


def test_a_run_that_makes_rows_is_a_picture_that_follows_it(generations):
    config = generations.config(["plain 1", "plain 2"])
    run = generations.run(config)
    live = dashboard.watch(run).live
    assert live.headline == "made  ·  nothing asked yet"
    before = live.png()
    assert not live.read()
    asked(run, config)
    assert live.read()
    assert "done  ·  2 kept" in live.headline
    assert live.png() != before


@pytest.mark.slow
def test_a_headless_notebook_is_left_with_a_static_picture(run, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, PARENT, "kd")
    cells = [
        "folder = None",
        "from kdlib.workbench import dashboard",
        "with dashboard.watch(folder):\n    print('trains')",
        "dashboard.watch(folder)",
        (
            "from kdlib.plots import training as plots; from kdlib.runs import folder as "
            "runs\nplots.run_figures(runs.open_run(*runs.locate(folder)), None)['dashboard']"
        ),
    ]
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "watch.ipynb")
    execute(tmp_path / "watch.ipynb", tmp_path / "done.ipynb", {"folder": str(run.path)})
    text = (tmp_path / "done.ipynb").read_text()
    assert "widget-view" not in text
    for cell in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells[-3:]:
        pictures = [
            output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})
        ]
        assert len(pictures) == 1
        assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size[1] > 1000
