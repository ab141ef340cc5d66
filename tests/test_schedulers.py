import pytest

from kdlib.schedulers import from_spec


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (2, {0: 2, 0.5: 2, 1: 2}),
        ("1e-4", {0: 1e-4, 1: 1e-4}),  # PyYAML gives 1e-4 as a string
        ({"linear": [4, 1]}, {0: 4, 0.5: 2.5, 1: 1, 2: 1}),
        ({"cosine": [4, 0]}, {0: 4, 0.5: 2, 1: 0}),
        ({"steps": {0: 1.0, 0.5: 0.2}}, {0: 1, 0.49: 1, 0.5: 0.2, 1: 0.2}),
        ({"joined": [[0.5, {"linear": [0, 1]}], [1.0, 7]]}, {0: 0, 0.25: 0.5, 0.5: 7, 1: 7}),
    ],
)
def test_a_schedule_gives_the_values_written_down(spec, values):
    schedule = from_spec(spec)
    for fraction, value in values.items():
        assert schedule(fraction) == pytest.approx(value)


@pytest.mark.parametrize(
    "spec",
    [True, "warm", float("nan"), {"linear": [1]}, {"linear": 3}, {"slope": [1, 2]}, {"linear": [0, 1], "cosine": [0, 1]},
     {"steps": {0.5: 1}}, {"steps": 3}, {"joined": [[0.5, 1]]}, {"joined": [[0.6, 1], [0.3, 1], [1, 1]]}, None],
)
def test_what_is_no_schedule_is_refused(spec):
    with pytest.raises(ValueError, match="a schedule is|does not fit|need a value|must end"):
        from_spec(spec)
