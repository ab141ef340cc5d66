"""pass@k: the chance that of k programs a model writes for a problem at least one passes its tests."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from kdlib.metrics.bootstrap import Bootstrap, interval, over
from kdlib.metrics.names import SHARE, Range


def pass_at_k(samples: int, passed: Sequence[int], k: int) -> np.ndarray:
    """Of each problem the unbiased estimate 1 − C(n − c, k) / C(n, k), which is 0 where none passed.

    Taking 1 − (1 − c/n)^k instead is too low: the k programs are drawn without replacement.

    Args:
        samples: n, programs written for each problem.
        passed: [P] c, how many of them passed.

    Raises:
        ValueError: k is more than n.

    Reference: Chen et al. 2021, section 2.1, https://arxiv.org/abs/2107.03374
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k}: found {samples} samples of each problem, needs {k} or more; write more")
    return np.array([1 - comb(samples - count, k) / comb(samples, k) for count in passed])


def compared(
    samples: int,
    passed: Mapping[str, Sequence[int]],
    ks: Sequence[int],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every model's pass@k with its interval, and each one's difference to those before it.

    What is drawn again are problems, the same for all models; how a model's answers vary on one problem is
    part of that, as far as its samples show it.

    Args:
        passed: model → [P] as in `pass_at_k`, on the same problems.

    Returns:
        {"models": {name: {"pass@1": {value, low, high}}}, "differences": [{model, against, metric, value,
        low, high}], "interval": in words}.
    """
    problems = len(next(iter(passed.values())))
    draws, figures = Bootstrap(problems, resamples, seed), {}
    for name, counts in passed.items():
        each = np.column_stack([pass_at_k(samples, counts, k) for k in ks])
        figures[name] = (each.mean(0), draws.sums(each) / problems)

    def entries(value: np.ndarray, drawn: np.ndarray, within: Range) -> dict[str, dict[str, float]]:
        return {
            f"pass@{k}": interval(value[place], drawn[:, place], problems, within)
            for place, k in enumerate(ks)
        }

    differences = []
    for b, a in combinations(figures, 2):
        value, drawn = (ours - theirs for ours, theirs in zip(figures[a], figures[b], strict=True))
        for metric, entry in entries(value, drawn, SHARE.of_differences).items():
            differences.append({"model": a, "against": b, "metric": metric, **entry})
    return {
        "models": {name: entries(*pair, SHARE) for name, pair in figures.items()},
        "differences": differences,
        "interval": over(problems, "problems"),
    }
