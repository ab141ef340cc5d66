import pytest

from kdlib.curriculum import conflicts, disorder, idle, resolved
from kdlib.schedulers import from_spec

THEN_HIDDEN = [
    {"until": 0.3, "weights": {"hidden": 0}},
    {"until": 1.0, "weights": {"hidden": 0.5}, "ramp": 0.1},
]


def course(weights, curriculum, term):
    return from_spec(resolved(weights, curriculum)[term])


def test_a_term_comes_in_by_a_ramp_and_is_exactly_zero_before():
    hidden = course({"kd": 0.7}, THEN_HIDDEN, "hidden")
    assert [hidden(i / 1000) for i in range(301)] == [0.0] * 301  # exactly, so that the term is not computed
    assert hidden(0.35) == pytest.approx(0.25)
    assert [hidden(0.4), hidden(0.7), hidden(1.0)] == [0.5, 0.5, 0.5]


def test_the_schedule_is_one_that_a_config_could_hold():
    assert resolved({"kd": 0.7}, THEN_HIDDEN) == {
        "kd": 0.7,
        "hidden": {"joined": [[0.3, 0.0], [0.4, {"linear": [0.0, 0.5]}], [1.0, 0.5]]},
    }


def test_without_phases_the_weights_stay_as_they_are():
    weights = {"kd": {"linear": [1, 0.5]}, "ce": 0.3}
    assert resolved(weights, []) == weights


def test_a_term_that_no_phase_names_keeps_its_schedule():
    assert resolved({"kd": {"linear": [1, 0.5]}}, THEN_HIDDEN)["kd"] == {"linear": [1, 0.5]}


def test_a_phase_that_does_not_name_a_term_gives_it_its_usual_weight():
    kd = course(
        {"kd": 0.7, "ce": 1.0}, [{"until": 0.5, "weights": {"kd": 0.1}}, {"until": 1.0, "weights": {}}], "kd"
    )
    assert [kd(0.0), kd(0.49), kd(0.5), kd(1.0)] == [0.1, 0.1, 0.7, 0.7]


def test_a_ramp_moves_back_to_the_usual_weight_too():
    kd = course(
        {"kd": 0.7, "ce": 1.0}, [{"until": 0.5, "weights": {"kd": 0.1}}, {"until": 1.0, "ramp": 0.2}], "kd"
    )
    assert [kd(0.5), kd(0.6), kd(0.7), kd(1.0)] == pytest.approx([0.1, 0.4, 0.7, 0.7])


def test_in_the_first_phase_the_terms_that_it_names_come_from_zero():
    phases = [
        {"until": 0.5, "weights": {"kd": 0.8}, "ramp": 0.25},
        {"until": 1.0, "weights": {"ce": 0.4}, "ramp": 0.5},
    ]
    kd, ce = (course({"ce": 0.2}, phases, term) for term in ("kd", "ce"))
    assert [kd(0.0), kd(0.125), kd(0.25), kd(0.49)] == pytest.approx([0.0, 0.4, 0.8, 0.8])
    assert [ce(0.0), ce(0.49), ce(0.75), ce(1.0)] == pytest.approx([0.2, 0.2, 0.3, 0.4])
    # not named: back to 0, along the ramp
    assert [kd(0.5), kd(0.75), kd(1.0)] == pytest.approx([0.8, 0.4, 0.0])


def test_a_ramp_starts_where_the_schedule_of_the_phase_before_ended():
    phases = [
        {"until": 0.5, "weights": {"kd": {"cosine": [0, 1]}}},
        {"until": 1.0, "weights": {"kd": 0.5}, "ramp": 0.5},
    ]
    kd = course({"ce": 1.0}, phases, "kd")
    assert [kd(0.0), kd(0.25), kd(0.5), kd(0.75), kd(1.0)] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])


def test_a_ramp_as_long_as_its_phase_fits_whatever_the_rounding():
    phases = [
        {"until": 0.1, "weights": {"kd": 0.0}},
        {"until": 0.3, "weights": {"kd": 1.0}, "ramp": 0.2},
        {"until": 1.0},
    ]
    assert 0.1 + 0.2 > 0.3
    assert disorder(phases) == []
    assert resolved({"kd": 1.0}, phases)["kd"] == {
        "joined": [[0.1, 0.0], [0.3, {"linear": [0.0, 1.0]}], [1.0, 1.0]]
    }


def test_one_phase_alone_is_its_weight():
    assert resolved({"ce": 1.0}, [{"until": 1.0, "weights": {"kd": 0.5}}]) == {"ce": 1.0, "kd": 0.5}


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], ["there is no phase"]),
        ([{"until": 0.5}], ["the last phase ends at 0.5, needs to end at 1"]),
        ([{"until": 0.6}, {"until": 0.6}, {"until": 1.0}], ["phase 2 ends at 0.6, needs an end after 0.6"]),
        (
            [{"until": 0.3, "ramp": 0.4}, {"until": 1.0}],
            ["phase 1 has a ramp of 0.4, needs one no longer than itself, 0.3"],
        ),
        (
            [{"until": 0.6, "ramp": 0.7}, {"until": 0.5}],
            ["phase 1 has a ramp", "phase 2 ends at 0.5", "the last phase ends at 0.5"],
        ),
    ],
)
def test_phases_that_do_not_follow_each_other_are_named_all_at_once(phases, said):
    faults = disorder(phases)
    assert len(faults) == len(said)
    assert all(fault.startswith(start) for fault, start in zip(faults, said, strict=True))


def test_two_courses_for_one_weight_are_a_conflict():
    (fault,) = conflicts({"hidden": {"linear": [0, 1]}, "kd": {"linear": [1, 2]}}, THEN_HIDDEN)
    assert fault.startswith(
        "hidden: found {'linear': [0, 1]}, but the curriculum sets it too (phase 1, 2); write a number"
    )


@pytest.mark.parametrize(
    ("weights", "phases", "said"),
    [
        ({"kd": 0.0}, THEN_HIDDEN, "all weights are 0 at 0 % of training, in phase 1 (kd, hidden)"),
        (
            {},
            [{"until": 0.5, "weights": {"kd": 1}}, {"until": 1.0, "weights": {"ce": 0}}],
            "all weights are 0 at 50 % of training, in phase 2 (kd, ce)",
        ),
        (
            {},
            [{"until": 1.0, "weights": {"kd": 1.0}, "ramp": 0.5}],
            "all weights are 0 at 0 % of training, in phase 1 (kd)",
        ),
        (
            {},
            [{"until": 0.5, "weights": {"kd": 1}}, {"until": 1.0, "weights": {"kd": {"linear": [1, 0]}}}],
            "all weights are 0 at 100 % of training, in phase 2 (kd)",
        ),
        ({"kd": 0}, [], "all weights are 0 (kd)"),
        ({}, [], "all weights are 0 (no term is given)"),
        ({"kd": {"steps": {0: 1, 0.505: 0, 0.506: 1}}}, [], "all weights are 0 at 50.5 % of training (kd)"),
    ],
)
def test_a_moment_without_any_weight_is_named_with_its_phase_and_terms(weights, phases, said):
    (fault,) = idle(weights, phases)
    assert fault.startswith(said + ", so nothing would be learned")


def test_where_one_term_takes_over_from_the_other_no_moment_is_idle():
    assert idle({}, [{"until": 0.5, "weights": {"kd": 1}}, {"until": 1.0, "weights": {"ce": 1}}]) == []
    assert idle({"ce": 0.3}, THEN_HIDDEN) == []
