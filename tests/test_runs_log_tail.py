"""metrics.jsonl read on as it grows, and thinned without losing a spike."""

import json

import numpy as np
import pytest
from made_log import logged, logged_run

from kdlib.errors import RunError
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, append_metrics, thinned


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return logged_run(raw_config, tmp_path)


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
