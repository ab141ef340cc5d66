"""A training's files become one picture that follows them: sampled without losing a spike, drawn again
only where something is new.
"""

import base64
import io
import json
import math
import os
import time

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.plots import training as plots
from kdlib.plots.axes import png
from kdlib.plots.training_panels import View
from kdlib.reports.scorecard import Line
from kdlib.runs import folder as runs, log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import PARENT, Run
from kdlib.runs.log import Tail, append_metrics, thinned
from kdlib.runs.progress import headline, held_out_line, progress, where_line
from kdlib.workbench import dashboard
from kdlib.workbench.runner import execute


def logged(step, *, steps=20, **changes):
    terms = {"kd": 4 / step, "ce": 2.0}
    figures = {
        "loss": 0.7 * terms["kd"] + 0.3 * terms["ce"],
        "kd_loss": terms["kd"],
        "kd_weight": 0.7,
        "ce_loss": 2.0,
        "ce_weight": 0.3,
        "temperature": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 1.0 + step,
        "tokens_per_s": 100.0,
        "memory_gib": 1.0,
        **changes,
    }
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1.8e9 + 2 * step))
    return {
        "train/step": step,
        "train/epoch": step / steps,
        **{f"train/{name}": value for name, value in figures.items()},
        "time": moment,
    }


def evaluated(step, **changes):
    figures = {"loss": 2.0, "kl_to_teacher": 3 / step, "perplexity": 50.0 - step, "agreement": 0.4, **changes}
    return {
        "train/step": step,
        "train/epoch": step / 20,
        **{f"eval/{name}": value for name, value in figures.items()},
    }


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    raw_config["training"]["max_steps"] = 20
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    for step in range(1, 11):
        append_metrics(run, logged(step))
        if step % 5 == 0:
            append_metrics(run, evaluated(step))
    runs.write_json(
        run.plan,
        [
            {"step": step, "learning_rate": 1e-4, "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
            for step in (1, 10, 20)
        ],
    )
    return run


def titles(run, view=None, others=()) -> dict[str, str]:
    return {
        name: axes.get_title(loc="left")
        for name, axes in panels(plots.dashboard(progress(run), view, others)).items()
    }


def panels(figure) -> dict:
    return {axes.get_label(): axes for axes in figure.axes}


def lines(figure, panel) -> dict:
    return {line.get_label(): line.get_xydata() for line in panels(figure)[panel].lines}


def test_a_planted_spike_survives_sampling_in_every_curve():
    curves = np.random.default_rng(0).normal(size=(3, 100_000))
    spikes = {0: (4_321, 50.0), 1: (77_777, -60.0), 2: (99_998, 70.0)}
    for curve, (position, value) in spikes.items():
        curves[curve, position] = value
    kept = thinned(curves)
    assert len(kept) < 1100
    assert {0, 99_999, 4_321, 77_777, 99_998} <= set(kept)
    assert (np.diff(kept) > 0).all()


def test_short_curves_are_drawn_whole_and_an_empty_one_too():
    assert thinned(np.arange(1000.0)).tolist() == list(range(1000))
    assert len(thinned(np.array([]))) == 0


def test_sampling_keeps_where_values_end_to_be_finite():
    curve = np.ones(10_000)
    curve[5_000:5_500], curve[7_000] = np.nan, np.inf
    assert {5_000, 5_500, 7_000, 7_001} <= set(thinned(curve))


def test_a_tail_read_in_pieces_is_the_file_read_at_once(run):
    whole = run.metrics.read_bytes()
    piecewise = StudentFolder(run.path / "piecewise")
    piecewise.path.mkdir()
    tail = Tail(piecewise)
    assert not tail.read()
    for start in range(0, len(whole), 97):  # lines are torn nearly everywhere
        with piecewise.metrics.open("ab") as file:
            file.write(whole[start : start + 97])
        tail.read()
    at_once = Tail(run)
    assert tail.train.equals(at_once.train)
    assert tail.evaluation.equals(at_once.evaluation)
    assert tail.figures == at_once.figures > 100
    assert not tail.read()


def test_a_torn_line_waits_for_its_rest(run):
    tail, line = Tail(run), json.dumps(logged(11))
    with run.metrics.open("a") as file:
        file.write(line[:40])
    assert not tail.read()
    with run.metrics.open("a") as file:
        file.write(line[40:] + "\n")
    assert tail.read()
    assert tail.train["step"].tolist() == list(range(1, 12))


def test_a_file_cut_for_a_training_that_goes_on_is_read_anew(run):
    tail = Tail(run)
    metrics.cut_metrics(run, 6)
    assert tail.read()
    assert tail.train["step"].tolist() == [1, 2, 3, 4, 5, 6]
    metrics.cut_metrics(run, 4)
    for step in range(5, 30):  # longer than before when it is looked at again
        append_metrics(run, logged(step, kd_loss=9.0))
    assert tail.read()
    assert tail.train["kd_loss"].tolist()[3:5] == [1.0, 9.0]


def test_a_line_that_is_no_json_is_named_as_such(run):
    tail = Tail(run)
    with run.metrics.open("a") as file:
        file.write("{oops}\n")
    with pytest.raises(RunError, match=r"metrics.jsonl: found a line that is no JSON .*delete it"):
        tail.read()


def test_the_picture_says_what_it_shows(run):
    said = titles(run)
    assert said["values"] == "The kd loss fell from 4.00 to 0.40 nats per token in 10 steps"
    assert said["shares"].startswith("kd makes up 58% of what the optimizer sees")
    assert said["total"] == "At step 10 the held-out loss is 2.19 × the training loss before it"
    assert said["grad_norm"] == "The gradient norm has a median of 6.5 and is 11 at most (step 10)"
    assert list(said) == [
        "values",
        "shares",
        "total",
        "weights",
        "temperature",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
        "memory_gib",
    ]
    now = progress(run)
    assert headline(now) == "first  ·  training"
    assert where_line(now) == "step 10 of 20  ·  20 s left"
    assert (
        held_out_line(now)
        == "held-out: perplexity 40 (best 40 at step 10)  ·  KL to teacher 0.3  ·  top-1 agreement 0.4"
    )


def test_shares_are_stacked_to_the_loss(run):
    figure = plots.run_figures(run, None)["dashboard"]
    areas = [area for area in figure.axes[1].collections if area.get_paths()]
    top = max(area.get_paths()[0].vertices[:, 1].max() for area in areas)
    assert top == pytest.approx(Tail(run).train["loss"].max())


def test_nan_and_infinite_values_leave_crosses_and_a_gap(run):
    append_metrics(run, logged(11, kd_loss=math.nan, loss=math.nan))
    append_metrics(run, logged(12, grad_norm=math.inf))
    figure = plots.dashboard(progress(run), View(smoothing=0))
    assert lines(figure, "values")["kd_loss broken"][:, 0].tolist() == [11]
    assert lines(figure, "grad_norm")["grad_norm broken"][:, 0].tolist() == [12]
    assert np.isnan(lines(figure, "values")["kd_loss"][10, 1])
    assert png(figure)


def test_a_term_that_comes_later_is_planned_at_first_and_has_no_line_where_it_was_not_active(
    raw_config, tmp_path
):
    raw_config["loss"]["curriculum"] = [
        {"until": 0.5, "weights": {"hidden": 0}},
        {"until": 1.0, "weights": {"hidden": 0.5}},
    ]
    run = runs.create(tmp_path / "runs", "phases", parse(raw_config))
    runs.write_json(
        run.plan,
        [
            {"step": 1, "kd_weight": 0.7, "ce_weight": 0.3, "hidden_weight": 0.0},
            {"step": 20, "hidden_weight": 0.5},
        ],
    )
    for step in range(1, 13):
        append_metrics(run, logged(step, **({"hidden_loss": 0.5, "hidden_weight": 0.5} if step > 10 else {})))
    figure = plots.dashboard(progress(run), View(smoothing=0))
    assert progress(run).terms == ["kd", "ce", "hidden"]
    assert np.isfinite(lines(figure, "values")["hidden_loss"][:, 1]).sum() == 2
    assert lines(figure, "weights")["hidden_weight"][:, 1].tolist() == [0.0] * 10 + [0.5] * 2
    assert titles(run)["weights"].startswith("Phase 2 of 2 (hidden 0.5); weights now: kd 0.7")


def test_a_view_chooses_terms_scale_steps_and_smoothing(run):
    figure = plots.dashboard(progress(run), View(terms=("ce",), log=False, steps=(3, 7), smoothing=0.5))
    shown = lines(figure, "values")
    assert set(shown) == {"ce_loss", "ce_loss smoothed"}
    assert shown["ce_loss"][:, 0].tolist() == [3, 4, 5, 6, 7]
    axes = panels(figure)["values"]
    assert axes.get_yscale() == "linear"
    assert axes.get_xlim() == (3, 7)
    axes = panels(plots.dashboard(progress(run)))["values"]
    assert axes.get_yscale() == "log"
    assert axes.get_xlim() == (0, 10)  # half of the training, as long as it has not come further


def test_other_trainings_are_drawn_dashed_behind(run):
    run.baseline.path.mkdir()
    for step in range(1, 6):
        append_metrics(run.baseline, logged(step))
    figure = plots.dashboard(progress(run), others=[progress(run, run.baseline)])
    assert len(lines(figure, "values")["first, baseline ce_loss"]) == 5
    assert "first, baseline" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "first, baseline ce_loss" not in lines(plots.dashboard(progress(run)), "values")


def test_the_plan_is_drawn_as_far_as_the_steps_shown(run):
    figure = plots.dashboard(progress(run), View(steps=(3, 7)))
    assert lines(figure, "learning_rate")["learning_rate planned"].tolist() == [[3, 1e-4], [7, 1e-4]]
    assert lines(figure, "weights")["kd_weight planned"][:, 0].tolist() == [3, 7]


def test_where_nothing_is_finite_or_shown_the_picture_is_drawn_all_the_same(run):
    append_metrics(run, logged(11, kd_loss=0.0, grad_norm=math.nan))
    assert png(plots.dashboard(progress(run), View(terms=(), steps=(10.5, 12))))
    assert png(plots.dashboard(progress(run), View(terms=("kd",), steps=(10.5, 12))))


def test_before_anything_is_logged_the_picture_says_so(raw_config, tmp_path):
    run = runs.create(tmp_path / "runs", "empty", parse(raw_config))
    picture = dashboard.LiveRun(run, View())
    assert picture.words[0] == "empty  ·  nothing logged yet"
    assert Image.open(io.BytesIO(picture.png())).size[0] == 800
    assert dashboard.card_html(picture.scorecard()) == ""


@pytest.mark.parametrize("state", ["failed", "died"])
def test_a_run_that_failed_or_died_says_so_and_why(run, state):
    later = time.time() + 1
    run.set_status(state, "02_train: OutOfMemoryError")
    os.utime(run.metrics, (later - 100, later - 100))
    now = progress(run)
    assert headline(now) == f"first  ·  {state}"
    assert now.message == "02_train: OutOfMemoryError"
    assert "OutOfMemoryError" in plots.dashboard(now).texts[2].get_text()


def test_a_training_by_hand_that_is_quiet_is_said_to_be_and_one_that_ended_is_trained(run):
    os.utime(run.metrics, (time.time() - 300,) * 2)
    assert headline(progress(run)) == "first  ·  no news for 5 min"
    run.history.write_text("[]")
    assert headline(progress(run)) == "first  ·  trained"


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
    run.set_status("done")
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
    card = dashboard.card_html(
        [Line("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "1", passed=False)]
    )
    assert "<script" not in card
    assert "<img" not in card
    assert "&lt;script&gt;" in card


def test_a_run_that_is_not_there_is_named(run):
    with pytest.raises(RunError, match="did you mean 'first'"):
        dashboard.watch(str(run.path.parent / "frist"))


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
