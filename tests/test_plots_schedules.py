import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tiny_training import pieces
from transformers.optimization import get_scheduler

from kdlib.config.run import parse
from kdlib.plots.schedules import (
    DECAYS,
    SHAPES,
    Design,
    Phase,
    curves,
    design_of,
    pasted,
    rate_schedule,
    schedules_figure,
)
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import from_spec
from kdlib.training import run as training
from kdlib.training.plan import training_arguments
from kdlib.workbench.explorers import ScheduleDesigner

WEIGHTS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def designs(draw):
    """Sound ones: phases that rise, ramps that fit, and a term that is never off."""
    ends = [*sorted(draw(st.sets(st.integers(1, 19), max_size=3))), 20]
    phases = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        weights = {"kd": draw(WEIGHTS), "ce": draw(st.sampled_from([0.2, 0.8])), "hidden": draw(WEIGHTS)}
        phases.append(Phase(end / 20, weights, draw(st.integers(0, end - start)) / 20 if number else 0.0))
    hot, cold = (draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.3])) for _ in range(2))
    shape = draw(st.sampled_from(SHAPES))
    return Design(
        draw(st.sampled_from([6e-4, 1e-3, 5e-5])),
        draw(st.sampled_from([0.0, 0.03, 0.1, 0.5])),
        draw(st.sampled_from(DECAYS)),
        draw(st.sampled_from([0.0, 0.1, 1.0])),
        (hot, cold),
        shape,
        tuple(phases),
    )


def rate(design: Design, done: float) -> float:
    """What the sliders promise, written out."""
    if done < design.warm_up:
        return design.learning_rate * done / design.warm_up
    rest = (done - design.warm_up) / (1 - design.warm_up)
    fall = {"constant": 0.0, "linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest)}[design.decay]
    return design.learning_rate * (1 - (1 - design.last) * fall)


def weight(design: Design, term: str, done: float) -> float:
    start = before = None
    for phase in design.phases:
        now = phase.weights[term]
        if done < phase.until or phase.until == 1:
            climbed = min((done - start) / phase.ramp, 1) if start is not None and phase.ramp else 1
            return now if before is None else before + (now - before) * climbed
        start, before = phase.until, now
    raise AssertionError


def temperature(design: Design, done: float) -> float:
    start, end = design.temperature
    share = {
        "constant": 0,
        "linear": done,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * done),
        "exponential": None,
    }[design.shape]
    return start ** (1 - done) * end**done if share is None else start + (end - start) * share


def beside_corners(design: Design, table: pd.DataFrame) -> pd.DataFrame:
    corners = np.array([design.warm_up, *(phase.until for phase in design.phases)])
    return table[[np.abs(corners - done).min() > 1e-6 or done == 1 for done in table["fraction"]]]


@given(design=designs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_the_yaml_gives_exactly_the_curves_that_the_sliders_promise(raw_config, design):
    made = pasted(parse(raw_config), design.yaml())
    table = beside_corners(design, curves(made, 100))
    assert len(table) > 90
    for done, line in zip(table["fraction"], table.to_dict("records"), strict=True):
        assert line["learning_rate"] == pytest.approx(rate(design, done), abs=1e-12)
        for term in design.phases[0].weights:
            assert line.get(f"{term}_weight", 0.0) == pytest.approx(weight(design, term, done), abs=1e-9)
        assert line.get("temperature", temperature(design, done)) == pytest.approx(temperature(design, done))


@given(design=designs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_the_designer_starts_from_what_it_wrote(raw_config, design):
    made = pasted(parse(raw_config), design.yaml())
    again, notes = design_of(made, 100)
    assert notes == []
    twice = pasted(parse(raw_config), again.yaml())
    pd.testing.assert_frame_equal(curves(twice, 100), curves(made, 100), check_like=True)


def test_a_training_plans_the_schedules_that_were_designed(raw_config, tmp_path):
    phases = (Phase(0.5, {"kd": 1.0, "ce": 0.2}), Phase(1.0, {"kd": 0.3, "ce": 0.7}, 0.25))
    design = Design(2e-3, 0.25, "cosine", 0.1, (4.0, 1.0), "linear", phases)
    config = pasted(parse(raw_config), design.yaml())
    folder = StudentFolder(tmp_path / "dry_run")
    training.train(config, folder, label="tiny", stop_after=1, **pieces(config))
    plan = metrics.plan_table(folder)
    assert len(plan) == 12
    assert schedules_figure(plan).axes[1].get_title(loc="left") == "Weights: kd 1 → 0.3, ce 0.2 → 0.7"
    for step, line in zip(plan["step"], plan.to_dict("records"), strict=True):
        done = (step - 1) / 12
        assert line["learning_rate"] == pytest.approx(rate(design, done))
        assert (line["kd_weight"], line["ce_weight"]) == pytest.approx(
            (weight(design, "kd", done), weight(design, "ce", done))
        )
        assert line["temperature"] == pytest.approx(temperature(design, done))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warm_up", [0, 0.1, 7, 20])
def test_the_trainer_s_own_schedules_in_our_words(raw_config, name, warm_up):
    raw_config["training"] |= {"lr_scheduler_type": name, "warmup_steps": warm_up, "max_steps": 20}
    args = training_arguments(parse(raw_config), "unused")
    scheduler = get_scheduler(
        name, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), args.get_warmup_steps(20), 20
    )
    ours = from_spec(ours if (ours := rate_schedule(parse(raw_config), 20)) is not None else 1.0)
    assert [ours(step / 20) for step in range(20)] == pytest.approx(
        [scheduler.lr_lambdas[0](step) for step in range(20)]
    )


def test_a_schedule_without_words_of_ours_is_taken_from_the_plan(raw_config):
    raw_config["training"] |= {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2}
    config, plan = parse(raw_config), pd.DataFrame({"step": [1, 7, 12], "learning_rate": [0.0, 1e-3, 5e-4]})
    assert rate_schedule(config, 12) is None
    assert "learning_rate" not in curves(config, 12)
    table = curves(config, 12, plan)
    assert np.interp(0.25, table["fraction"], table["learning_rate"]) == pytest.approx(5e-4)
    assert "a schedule of the Trainer's own" in schedules_figure(curves(config, 12)).axes[0].get_title(
        loc="left"
    )
    design, notes = design_of(config, 12)
    assert (design.warm_up, design.decay) == (0.1, "cosine")
    assert notes == [
        "training.lr_scheduler_type is inverse_sqrt; the designer starts from a warm-up and a cosine"
    ]


def test_what_the_designer_cannot_hold_is_said(raw_config):
    raw_config["loss"] = {
        "weights": {"kd": {"linear": [1, 0.5]}, "ce": 0.5},
        "temperature": {"kd": 3, "reverse_kl": 1},
    }
    design, notes = design_of(parse(raw_config), 12)
    assert [note.split(" is ")[0] for note in notes] == ["loss.weights.kd", "loss.temperature"]
    assert (design.phases[0].weights, design.temperature) == ({"kd": 1.0, "ce": 0.5}, (3.0, 3.0))


def test_what_stood_beside_the_old_schedule_does_not_clash_with_the_new(raw_config):
    raw_config["training"] |= {
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "warmup_steps": 3,
    }
    design, _ = design_of(parse(raw_config), 12)
    assert pasted(parse(raw_config), design.yaml()).training["warmup_steps"] == 0


def test_titles_tell_the_turns(raw_config):
    phases = (
        Phase(0.5, {"kd": 1.0, "ce": 0.2, "hidden": 0.0}),
        Phase(0.8, {"kd": 0.3, "ce": 0.2, "hidden": 0.5}, 0.1),
        Phase(1.0, {"kd": 0.3, "ce": 0.2, "hidden": 0.0}),
    )
    design = Design(1e-3, 0.1, "cosine", 0.0, (4.0, 1.0), "linear", phases)
    made = pasted(parse(raw_config), design.yaml())
    titles = [
        axes.get_title(loc="left") for axes in schedules_figure(curves(made, 12), (0.5, 0.8, 1.0), 12).axes
    ]
    assert titles == [
        "The learning rate peaks at 1.0e-03 and ends at 0.0e+00",
        "Weights: kd 1 → 0.3, ce 0.2, hidden 0 → 0.5 → 0",
        "Temperature: 4 → 1",
    ]


def test_sliders_change_picture_and_yaml_and_faults_are_shown(raw_config):
    designer = ScheduleDesigner(parse(raw_config), 12)
    for control, value in (
        (designer.warm_up, 0.3),
        (designer.shape, "linear"),
        (designer.cold, 1.0),
        (designer.count, 3),
        (designer.phases[1].weights["hidden"], 0.5),
        (designer.phases[1].ramp, 0.1),
    ):
        picture, text = designer.picture.value, designer.yaml.value
        control.value = value
        assert designer.fault.value == ""
        assert designer.yaml.value != text
        assert designer.picture.value != picture or control is designer.shape or control is designer.count
    assert "hidden: 0.5" in designer.yaml.value
    picture = designer.picture.value
    designer.phases[0].until.value = 0.9
    assert "phase 2 ends at 0.5, needs an end after 0.9" in designer.fault.value
    assert designer.picture.value == picture
    designer.phases[0].until.value = 0.25
    assert designer.fault.value == ""
    designer.learning_rate.value = 0.5
    assert "learning_rate: 0.5" in designer.yaml.value


def test_the_designer_begins_with_the_run_s_own_schedules(raw_config):
    raw_config["loss"]["curriculum"] = [
        {"until": 0.4, "weights": {"kd": 1.0}},
        {"until": 1.0, "weights": {"kd": 0.2}, "ramp": 0.2},
    ]
    raw_config["training"] |= {"lr_scheduler_type": "cosine", "warmup_steps": 3}
    config = parse(raw_config)
    designer = ScheduleDesigner(config, 12)
    made = pasted(config, designer.design().yaml())
    pd.testing.assert_frame_equal(curves(made, 12), curves(config, 12))
    assert SimpleNamespace(count=designer.count.value, shown=len(designer.row.children)) == SimpleNamespace(
        count=2, shown=2
    )
