import re

import pytest

from kdlib.schedulers import (
    curriculum_conflicts,
    curriculum_disorder,
    exponential,
    from_spec,
    idle,
    normal,
    sampled,
    with_curriculum,
)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (2, {0: 2, 0.5: 2, 1: 2}),
        ("1e-4", {0: 1e-4, 1: 1e-4}),  # PyYAML gives 1e-4 as a string
        ({"linear": [4, 1]}, {0: 4, 0.5: 2.5, 1: 1, 2: 1}),
        ({"cosine": [4, 0]}, {0: 4, 0.5: 2, 1: 0}),
        ({"exponential": [4, 1]}, {0: 4, 0.25: 4 / 2**0.5, 0.5: 2, 1: 1}),
        ({"exponential": ["1e-4", 1]}, {0: 1e-4, 0.25: 1e-3, 0.5: 1e-2, 0.75: 0.1, 1: 1}),
        ({"steps": {0: 1.0, 0.5: 0.2}}, {0: 1, 0.49: 1, 0.5: 0.2, 1: 0.2}),
        ({"piecewise": {0: 1.0, 0.3: 0.5, 1: 0.1}}, {0: 1, 0.15: 0.75, 0.3: 0.5, 0.65: 0.3, 1: 0.1}),
        # flat after the last, in whatever order
        ({"piecewise": {0.5: 4, 0: 2}}, {0: 2, 0.25: 3, 0.5: 4, 0.7: 4, 1: 4}),
        ({"piecewise": {0: 3}}, {0: 3, 1: 3}),
        ({"joined": [[0.5, {"linear": [0, 1]}], [1.0, 7]]}, {0: 0, 0.25: 0.5, 0.5: 7, 1: 7}),
        (
            {"joined": [[0.2, 0], [1.0, {"piecewise": {0: 0, 0.5: 1}}]]},
            {0: 0, 0.2: 0, 0.4: 0.5, 0.6: 1, 1: 1},
        ),
    ],
)
def test_a_schedule_gives_the_values_written_down(spec, values):
    schedule = from_spec(spec)
    for fraction, value in values.items():
        assert schedule(fraction) == pytest.approx(value)


@pytest.mark.parametrize(
    "spec",
    [
        2.0,
        {"linear": [4, 1]},
        {"cosine": [4, 1]},
        {"exponential": [4, 1]},
        {"steps": {0: 4, 0.5: 1}},
        {"piecewise": {0: 4, 0.3: 2, 0.9: 1}},
        {"joined": [[0.5, {"linear": [4, 2]}], [1.0, {"exponential": [2, 1]}]]},
    ],
)
def test_before_the_start_and_after_the_end_a_schedule_stands_still(spec):
    schedule = from_spec(spec)
    assert (schedule(-0.5), schedule(1.5)) == (schedule(0.0), schedule(1.0))


def test_both_ends_of_an_exponential_are_exact_and_no_pair_overflows():
    schedule = exponential(1e300, 0.1)
    assert (schedule(0.0), schedule(1.0)) == (1e300, 0.1)
    assert exponential(1e300, 1e-300)(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "spec",
    [
        True,
        "warm",
        float("nan"),
        {"linear": [1]},
        {"linear": 3},
        {"slope": [1, 2]},
        {"linear": [0, 1], "cosine": [0, 1]},
        {"linear": "41"},
        {"linear": {0: 4, 1: 1}},
        {"linear": [True, 1]},
        {"exponential": [4, 0]},
        {"exponential": [-4, 1]},
        {"exponential": [float("nan"), 1]},
        {"steps": {0.5: 1}},
        {"steps": 3},
        {"steps": {}},
        {"steps": {0: 1, 50: 2}},
        {"piecewise": {0.1: 1, 1: 2}},
        {"piecewise": {0: 1, -0.5: 2}},
        {"piecewise": [[0, 1]]},
        {"piecewise": {0: "low"}},
        {"joined": [[0.5, 1]]},
        {"joined": [[0.6, 1], [0.3, 1], [1, 1]]},
        {"joined": [[float("nan"), 1], [1, 1]]},
        {"joined": [1]},
        None,
    ],
)
def test_what_is_no_schedule_is_refused(spec):
    with pytest.raises(ValueError, match="a schedule is|does not fit"):
        from_spec(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"exponential": [4, 0]}, "both ends must be above 0, found 4 and 0"),
        ({"steps": {0.5: 1}}, "add `0: <first value>`"),
        ({"piecewise": {0: 1, 30: 0.5}}, "lie from 0 to 1"),
        ({"joined": [[0.5, 1]]}, "the last at 1; found [0.5]"),
        ({"cosine": [1, 2, 3]}, "two numbers are needed"),
        ({"joined": [[1.0, {"linear": [1, "x"]}]]}, "linear: [1, 'x'] does not fit"),
    ],
)
def test_a_refusal_says_what_is_needed(spec, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        from_spec(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "2",
        {"linear": [4, "1e-1"]},
        {"steps": {"0": 1, "0.5": 2}},
        {"piecewise": {0: 1, "1": 2}},
        {"joined": [[0.5, {"steps": {0: "1"}}], [1, 7]]},
    ],
)
def test_a_normal_spec_has_floats_only_and_the_same_values(spec):
    plain = normal(spec)
    assert normal(plain) == plain
    assert not any(isinstance(leaf, (int, str)) for leaf in leaves(plain))
    assert sampled(plain) == sampled(spec)


def leaves(spec):
    if isinstance(spec, dict):
        spec = [
            part
            for shape, inner in spec.items()
            for part in ([inner] if isinstance(shape, str) else [shape, inner])
        ]
    return [leaf for part in spec for leaf in leaves(part)] if isinstance(spec, list) else [spec]


@pytest.mark.parametrize(
    ("spec", "lowest"),
    [
        ({"steps": {0: 1, 0.505: -1, 0.506: 1}}, -1),
        ({"piecewise": {0: 1, 0.505: -1, 0.506: 1}}, -1),
        ({"joined": [[0.4011, {"linear": [0, -1]}], [1.0, 1]]}, -1),
        ({"joined": [[0.5, 1], [1.0, {"steps": {0: 1, 0.001: -1, 0.002: 1}}]]}, -1),
    ],
)
def test_a_value_between_two_per_cents_of_training_is_judged_too(spec, lowest):
    assert min(sampled(spec)) == pytest.approx(lowest, abs=1e-6)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="every value must be finite"):
        sampled({"piecewise": {0: 1, 1: float("inf")}})


THEN_HIDDEN = [
    {"until": 0.3, "weights": {"hidden": 0}},
    {"until": 1.0, "weights": {"hidden": 0.5}, "ramp": 0.1},
]


def weight_of(weights, curriculum, term):
    return from_spec(with_curriculum(weights, curriculum)[term])


def test_a_term_comes_in_by_a_ramp_and_is_exactly_zero_before():
    hidden = weight_of({"kd": 0.7}, THEN_HIDDEN, "hidden")
    assert [hidden(i / 1000) for i in range(301)] == [0.0] * 301  # exactly, so that the term is not computed
    assert hidden(0.35) == pytest.approx(0.25)
    assert [hidden(0.4), hidden(0.7), hidden(1.0)] == [0.5, 0.5, 0.5]


def test_the_schedule_is_one_that_a_config_could_hold():
    assert with_curriculum({"kd": 0.7}, THEN_HIDDEN) == {
        "kd": 0.7,
        "hidden": {"joined": [[0.3, 0.0], [0.4, {"linear": [0.0, 0.5]}], [1.0, 0.5]]},
    }


def test_without_phases_the_weights_stay_as_they_are():
    weights = {"kd": {"linear": [1, 0.5]}, "ce": 0.3}
    assert with_curriculum(weights, []) == weights


def test_a_term_that_no_phase_names_keeps_its_schedule():
    assert with_curriculum({"kd": {"linear": [1, 0.5]}}, THEN_HIDDEN)["kd"] == {"linear": [1, 0.5]}


def test_a_phase_that_does_not_name_a_term_gives_it_its_usual_weight():
    kd = weight_of(
        {"kd": 0.7, "ce": 1.0}, [{"until": 0.5, "weights": {"kd": 0.1}}, {"until": 1.0, "weights": {}}], "kd"
    )
    assert [kd(0.0), kd(0.49), kd(0.5), kd(1.0)] == [0.1, 0.1, 0.7, 0.7]


def test_a_ramp_moves_back_to_the_usual_weight_too():
    kd = weight_of(
        {"kd": 0.7, "ce": 1.0}, [{"until": 0.5, "weights": {"kd": 0.1}}, {"until": 1.0, "ramp": 0.2}], "kd"
    )
    assert [kd(0.5), kd(0.6), kd(0.7), kd(1.0)] == pytest.approx([0.1, 0.4, 0.7, 0.7])


def test_in_the_first_phase_the_terms_that_it_names_come_from_zero():
    phases = [
        {"until": 0.5, "weights": {"kd": 0.8}, "ramp": 0.25},
        {"until": 1.0, "weights": {"ce": 0.4}, "ramp": 0.5},
    ]
    kd, ce = (weight_of({"ce": 0.2}, phases, term) for term in ("kd", "ce"))
    assert [kd(0.0), kd(0.125), kd(0.25), kd(0.49)] == pytest.approx([0.0, 0.4, 0.8, 0.8])
    assert [ce(0.0), ce(0.49), ce(0.75), ce(1.0)] == pytest.approx([0.2, 0.2, 0.3, 0.4])
    # not named: back to 0, along the ramp
    assert [kd(0.5), kd(0.75), kd(1.0)] == pytest.approx([0.8, 0.4, 0.0])


def test_a_ramp_starts_where_the_schedule_of_the_phase_before_ended():
    phases = [
        {"until": 0.5, "weights": {"kd": {"cosine": [0, 1]}}},
        {"until": 1.0, "weights": {"kd": 0.5}, "ramp": 0.5},
    ]
    kd = weight_of({"ce": 1.0}, phases, "kd")
    assert [kd(0.0), kd(0.25), kd(0.5), kd(0.75), kd(1.0)] == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])


def test_a_ramp_as_long_as_its_phase_fits_whatever_the_rounding():
    phases = [
        {"until": 0.1, "weights": {"kd": 0.0}},
        {"until": 0.3, "weights": {"kd": 1.0}, "ramp": 0.2},
        {"until": 1.0},
    ]
    assert 0.1 + 0.2 > 0.3
    assert curriculum_disorder(phases) == []
    assert with_curriculum({"kd": 1.0}, phases)["kd"] == {
        "joined": [[0.1, 0.0], [0.3, {"linear": [0.0, 1.0]}], [1.0, 1.0]]
    }


def test_one_phase_alone_is_its_weight():
    assert with_curriculum({"ce": 1.0}, [{"until": 1.0, "weights": {"kd": 0.5}}]) == {"ce": 1.0, "kd": 0.5}


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
    faults = curriculum_disorder(phases)
    assert len(faults) == len(said)
    assert all(fault.startswith(start) for fault, start in zip(faults, said, strict=True))


def test_two_schedules_for_one_weight_are_a_conflict():
    (fault,) = curriculum_conflicts({"hidden": {"linear": [0, 1]}, "kd": {"linear": [1, 2]}}, THEN_HIDDEN)
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
