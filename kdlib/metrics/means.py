"""Means over units that were drawn independently, with intervals: of a held-out figure, of its change."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdlib.metrics.names import UNBOUNDED, Range


def ratio_of_sums(values: np.ndarray, counts: np.ndarray, *, level: float = 0.95) -> dict[str, float]:
    """Σ values / Σ counts, with a t interval over units of unequal size.

    The standard error is the ratio estimator's (Cochran 1977, Sampling Techniques, 3rd ed., section 6.5): of
    the deviations values − ratio · counts, with U − 1 degrees of freedom.

    Args:
        values: [U] each unit's sum, or the difference of two sums over the same items.
        counts: [U] its items.

    Returns:
        {"value", "low", "high"}; of a single unit, which tells nothing of others, the interval is infinite.
    """
    from scipy.stats import t  # takes a second, and not every process asks

    values, counts = values[counts > 0], counts[counts > 0]
    units, total = len(values), counts.sum()
    if units == 0:
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    ratio = values.sum() / total
    if units == 1:
        return {"value": float(ratio), "low": -np.inf, "high": np.inf}
    deviations = values - ratio * counts
    error = np.sqrt(units / (units - 1) * np.square(deviations).sum()) / total
    half = t.ppf(0.5 + level / 2, units - 1) * error
    return {"value": float(ratio), "low": float(ratio - half), "high": float(ratio + half)}


def averaged(seeds: Sequence[Mapping[str, float]], within: Range = UNBOUNDED) -> dict[str, Any]:
    """value, low, high of several trainings as their mean with Student's 95 % interval, n and the values.

    One training keeps its own interval; so does what is the same in all, as a teacher that was trained once.
    The interval is cut to what the figure can be, `within`, which takes nothing from its coverage.
    """
    values, low, high = [each["value"] for each in seeds], seeds[0]["low"], seeds[0]["high"]
    mean, count = statistics.fmean(values), len(values)
    if max(values) > min(values):
        from scipy.special import stdtrit  # takes a third of a second

        spread = stdtrit(count - 1, 0.975) * statistics.stdev(values) / math.sqrt(count)
        low, high = max(mean - spread, within.low), min(mean + spread, within.high)
    return {"value": mean, "low": low, "high": high, "n": count, "values": values}
