"""What is timed is timed several times, and has its spread."""

import time

import pytest
import torch

from kdlib import hardware
from kdlib.hardware import middle_half, repeated


def test_one_slow_answer_of_a_busy_machine_moves_neither_the_median_nor_hides():
    found = middle_half([48000.0, 47000.0, 1455.0, 49000.0, 48500.0])
    assert found["value"] == 48000.0
    assert found["low"] < 26000
    assert middle_half([3.0]) == {"value": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.parametrize(("took", "times"), [(0.0, 5), (60.0, 3)])
def test_a_timing_is_repeated_less_often_where_it_is_slow(monkeypatch, took, times):
    calls: list[int] = []
    monkeypatch.setattr(hardware, "seconds_of", lambda action, device: (action(), took)[1])
    assert repeated(lambda: calls.append(1), torch.device("cpu")) == [took] * times
    assert len(calls) == times + 1  # the first is not counted


def test_it_takes_as_long_as_it_takes():
    assert min(repeated(lambda: time.sleep(0.01), torch.device("cpu"))) >= 0.01
