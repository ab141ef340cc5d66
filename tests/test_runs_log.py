import json

import pandas as pd
import pytest

from kdlib.runs.files import StudentFolder
from kdlib.runs.log import Tail, duration, seconds_taken, time_left

MADE_AT = 1.8e9


def lines(*seconds: float) -> pd.DataFrame:
    """A line so many seconds after the training began, each."""
    times = [pd.Timestamp(MADE_AT + each, unit="s", tz="Europe/Berlin").isoformat() for each in seconds]
    return pd.DataFrame({"step": range(len(times)), "time": times})


def test_a_training_in_two_sittings_took_no_night():
    first, second = (0, 10, 20, 30), (28_830, 28_840, 28_850, 28_860)  # eight hours between
    assert seconds_taken(lines(*first, *second)) == 70
    assert seconds_taken(lines(0, 28_800, 28_810)) == 20


def test_a_long_evaluation_is_no_pause():
    train, evaluation = lines(0, 1, 2, 503, 504, 1005), lines(502, 1004)
    assert seconds_taken(train, evaluation) == 1005
    assert seconds_taken(train) < 100  # it cannot be told from a pause without its line


def test_a_minute_in_a_training_of_short_steps_is_no_pause():
    assert seconds_taken(lines(0, 0, 1, 1, 30, 31)) == 31


@pytest.mark.parametrize("train", [pd.DataFrame(), lines(3), pd.DataFrame({"step": [1, 2]})])
def test_lines_that_do_not_tell_a_time_have_none(train):
    assert seconds_taken(train) is None


def test_the_lines_of_a_file_have_their_time(tmp_path):
    folder, own = StudentFolder(tmp_path), lines(0, 60)["time"]
    rows = [
        {"train/step": 1, "train/loss": 1.0, "time": own[0]},
        {"train/step": 1, "eval/loss": 1.0, "time": own[0]},
        {"train/step": 2, "train/loss": 1.0, "time": own[1]},
    ]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail = Tail(folder)
    assert seconds_taken(tail.train, tail.evaluation) == 60


def test_what_is_left_goes_by_the_pace_of_what_is_done():
    assert time_left(30.0, 10, 5) == 15.0
    assert time_left(30.0, 0, 5) is None


@pytest.mark.parametrize(("seconds", "words"), [(45.2, "45 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_a_duration_has_the_unit_that_one_would_say(seconds, words):
    assert duration(seconds) == words
