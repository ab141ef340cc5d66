import re

import pytest

from kdlib.schedulers import exponential, from_spec, normal, sampled


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
