"""Whether a model is as often right as it is sure: reliability bins and the expected calibration error."""

from itertools import pairwise
from typing import Any

import numpy as np

# of equal width from 0 to 1, each without its lower edge and with its upper one, as in the reference below
BINS = 15


def bin_of(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[N] the bin, 0 to `bins` - 1, that each confidence falls into."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """How sure and how right a model is, bin by bin; what is None belongs to a bin that nothing falls into.

    Args:
        confidence: [N] the probability of the answer given.
        right: [N] whether that answer is right.
    """
    place, edges, found = bin_of(confidence, bins), np.linspace(0, 1, bins + 1).tolist(), []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = place == number
        count = int(inside.sum())
        sure, known = (float(each[inside].mean()) if count else None for each in (confidence, right))
        found.append({"low": low, "high": high, "count": count, "confidence": sure, "accuracy": known})
    return found


def calibration_gaps(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[N, bins] right minus confidence, in the column of the item's bin and 0 elsewhere.

    The expected calibration error is |their sums over items|, summed and divided by N: how far accuracy is
    from confidence within a bin, on average, 0 (as right as it is sure) to 1.  Of few items it is too high
    rather than too low, as chance parts the two in every bin.

    Reference: Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3
    """
    return np.equal.outer(bin_of(confidence, bins), np.arange(bins)) * (right - confidence)[:, None]
