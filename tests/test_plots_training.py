"""A training's files become one picture."""

import math
import os
import time

import numpy as np
import pandas as pd
import pytest
from made_log import logged, logged_run, stands

from kdlib.config.run import parse
from kdlib.plots import training as plots
from kdlib.plots.axes import png
from kdlib.plots.comparison import learning_curves
from kdlib.plots.training_panels import Panel, View, one
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, append_metrics
from kdlib.runs.processes import held
from kdlib.runs.progress import headline, held_out_line, progress, where_line


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return logged_run(raw_config, tmp_path)


def titles(run, view=None, others=()) -> dict[str, str]:
    return {
        name: axes.get_title(loc="left")
        for name, axes in panels(plots.dashboard(progress(run), view, others)).items()
    }


def panels(figure) -> dict:
    return {axes.get_label(): axes for axes in figure.axes}


def lines(figure, panel) -> dict:
    return {line.get_label(): line.get_xydata() for line in panels(figure)[panel].lines}


def test_the_picture_says_what_it_shows(run):
    said = titles(run)
    assert said["values"] == "The kd loss falls from 2.08 to 0.479 nats per token (p = 0.03)"
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
    whole = lines(plots.dashboard(progress(run)), "weights")["kd_weight planned"][:, 0]
    assert (whole.min(), whole.max()) == (1, 10)  # nothing is planned before the first step


def test_where_nothing_is_finite_or_shown_the_picture_is_drawn_all_the_same(run):
    append_metrics(run, logged(11, kd_loss=0.0, grad_norm=math.nan))
    assert png(plots.dashboard(progress(run), View(terms=(), steps=(10.5, 12))))
    assert png(plots.dashboard(progress(run), View(terms=("kd",), steps=(10.5, 12))))


@pytest.mark.parametrize("state", ["failed", "died"])
def test_a_run_that_failed_or_died_says_so_and_why(run, state):
    later = time.time() + 1
    stands(run, state, "02_train: OutOfMemoryError")
    os.utime(run.metrics, (later - 100, later - 100))
    now = progress(run)
    assert headline(now) == f"first  ·  {state}"
    assert now.message == "02_train: OutOfMemoryError"
    assert "OutOfMemoryError" in plots.dashboard(now).texts[2].get_text()


def test_a_training_that_noted_no_state_is_stopped_unless_a_process_works_on_it_or_it_came_to_its_end(run):
    stands(run, "created")
    assert headline(progress(run)) == "first  ·  stopped"
    assert "left" not in where_line(progress(run))
    with held(run.path):
        assert headline(progress(run)) == "first  ·  training"
    run.history.write_text("[]")
    assert headline(progress(run)) == "first  ·  trained"


def test_a_panel_of_a_logged_figure_is_one_line(run, monkeypatch):
    append_metrics(run, logged(11, gpu_watts=250.0))
    panel = Panel("gpu_watts", one("The GPU takes {most:.0f} W at most"), 0.5, "W")
    monkeypatch.setattr(plots, "PANELS", (*plots.PANELS, panel))
    assert titles(run)["gpu_watts"] == "The GPU takes 250 W at most"
    assert lines(plots.dashboard(progress(run)), "gpu_watts")["gpu_watts"][-1].tolist() == [11, 250]


def test_learning_curves_without_an_evaluation_say_so():
    figure = learning_curves({"distilled": pd.DataFrame(), "baseline": pd.DataFrame()})
    assert "Nothing was measured on held-out rows while training" in figure.texts[0].get_text()


def test_a_teacher_with_experts_has_a_panel_of_who_speaks(raw_config, tmp_path, run):
    assert "experts" not in titles(run)
    other = runs.create(tmp_path / "runs", "experts", parse(raw_config))
    for step in range(1, 6):
        spoke = {"expert_entropy": math.log(1 + step / 2), "expert_max_load": 2.0, "expert_coverage": 0.75}
        append_metrics(other, logged(step, **spoke))
    found = titles(other)["experts"]
    assert found.startswith("3.5 experts speak to a token (exp of the entropy), the busiest 2.00 × its share")
    assert found.endswith("75% taught")
    drawn = lines(plots.dashboard(progress(other)), "experts")
    assert drawn["speaking"][:, 1] == pytest.approx([1.5, 2, 2.5, 3, 3.5])
    assert drawn["busiest"][:, 1] == pytest.approx([2] * 5)
