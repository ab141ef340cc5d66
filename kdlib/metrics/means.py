"""Means over units that were drawn independently, with intervals: of a held-out figure, of its change."""

import numpy as np


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
