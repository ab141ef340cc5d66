"""How sure a figure is, from the items it was measured on: a paired bootstrap, and McNemar's test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

AT_ONCE = 4_000_000  # numbers of draws held at a time
FEW = 25  # rows on which only one of two is right: with fewer McNemar's test is made exactly


@dataclass(frozen=True)
class Bootstrap:
    """Items drawn again with replacement; the same draws whenever it is asked, hence paired between models.

    Items that resemble each other, as the paragraphs of one page, tell less than as many that do not: with
    `groups`, what each item belongs to, whole groups are drawn (the cluster bootstrap, Field and Welsh 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00593.x).
    """

    items: int
    resamples: int = 2000
    seed: int = 0
    groups: Sequence[str] | None = None

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[N, K] figures of each item to their [resamples, K] sums over each draw."""
        return np.concatenate([times @ values for times in self._draws()])

    @property
    def times(self) -> np.ndarray:
        """[resamples, N] how many times each item is drawn, for figures that are no sums."""
        return np.concatenate(list(self._draws()))

    def _draws(self) -> Iterator[np.ndarray]:
        """`times`, some draws at a time."""
        groups = np.arange(self.items) if self.groups is None else self.groups
        names, belongs = np.unique(groups, return_inverse=True)
        generator, uniform = np.random.default_rng(self.seed), np.full(len(names), 1 / len(names))
        step = max(AT_ONCE // self.items, 1)
        for start in range(0, self.resamples, step):
            size = min(step, self.resamples - start)
            yield generator.multinomial(len(names), uniform, size=size).astype(float)[:, belongs]


def interval(
    value: float, resampled: np.ndarray, *, centred: bool = False, share_of: int | None = None
) -> dict[str, float]:
    """A figure with its 95 % interval: the percentiles of what it is on resampled items.

    Args:
        resampled: draws on which it is not defined are nan, and left out.
        centred: move the draws' mean to the figure, which resampling by itself makes larger.
        share_of: it is a share of so many items; where it is 0 or 1 so are all draws, as if it were certain,
            and the interval is Wilson's (1927): of three of three [0.44, 1].
    """
    if share_of and value in (0, 1):
        from scipy.stats import binomtest  # as in `mcnemar`

        bounds = binomtest(round(value * share_of), share_of).proportion_ci(method="wilson")
        return {"value": float(value), "low": float(bounds.low), "high": float(bounds.high)}
    shift = value - np.nanmean(resampled) if centred else 0.0
    low, high = np.nanpercentile(resampled, [2.5, 97.5]) + shift
    return {"value": float(value), "low": float(low), "high": float(high)}


def mcnemar(only_one: int, only_other: int) -> dict[str, float | str]:
    """Whether two models, asked the same, differ in how often they are right: {"p_value": …, "test": …}.

    Only the items on which one of them alone is right tell.  Fewer than 25: the exact binomial test; else
    chi-squared with continuity correction, (|b - c| - 1)² / (b + c), one degree of freedom.  Two-sided.

    Reference: McNemar 1947; for two classifiers Dietterich 1998, https://doi.org/10.1162/089976698300017197
    """
    from scipy.stats import binomtest, chi2  # takes a second and a half, and not every process tests

    differing = only_one + only_other
    if differing < FEW:
        p_value = float(binomtest(only_one, differing).pvalue) if differing else 1.0
        return {"p_value": p_value, "test": "exact binomial"}
    statistic = max(abs(only_one - only_other) - 1, 0) ** 2 / differing
    return {"p_value": float(chi2.sf(statistic, 1)), "test": "chi-squared with continuity correction"}
