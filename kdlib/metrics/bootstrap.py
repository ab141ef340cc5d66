"""How sure a figure is, from the units it was measured on: a paired bootstrap, and tests of who is right."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdlib.metrics.names import UNBOUNDED, Range

AT_ONCE = 1_000_000  # numbers of draws held at a time
FEW = 25  # rows on which only one of two is right: with fewer McNemar's test is made exactly
FEW_UNITS = 20  # below which an interval is rough, however it is made
Z2 = 1.959964**2  # the normal's 97.5 % point, squared


@dataclass(frozen=True)
class Bootstrap:
    """Units drawn again with replacement; the same draws whenever it is asked, hence paired between models.

    Items that resemble each other, as the paragraphs of one page, tell less than as many that do not: with
    `groups`, what each item belongs to, whole groups are drawn (the cluster bootstrap, Field and Welsh 2007,
    https://doi.org/10.1111/j.1467-9868.2007.00593.x).
    """

    items: int
    resamples: int = 2000
    seed: int = 0
    groups: Sequence[str] | np.ndarray | None = None

    @property
    def units(self) -> int:
        """How many are drawn: items, or their groups."""
        return self.items if self.groups is None else len(self._names_and_places[0])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[N, K] figures of each item to their [resamples, K] sums over each draw."""
        held = values
        if self.groups is not None:
            held = np.zeros((self.units, values.shape[1]))
            np.add.at(held, self._names_and_places[1], values)
        return np.concatenate([times @ held for times in self.draws()])

    def draws(self) -> Iterator[np.ndarray]:
        """[some, units] how many times each unit is drawn, some draws at a time."""
        generator, uniform = np.random.default_rng(self.seed), np.full(self.units, 1 / self.units)
        step = max(AT_ONCE // self.units, 1)
        for start in range(0, self.resamples, step):
            size = min(step, self.resamples - start)
            yield generator.multinomial(self.units, uniform, size=size).astype(float)

    @cached_property
    def _names_and_places(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(np.asarray(self.groups), return_inverse=True)


def interval(
    value: float, resampled: np.ndarray, units: int | None, within: Range = UNBOUNDED
) -> dict[str, float]:
    """A figure with its 95 % interval, which holds for few units too: more than 93 % at eight.

    On each side the wider of Student's t and of the skewness-adjusted t, n - 1 degrees of freedom, with the
    bootstrap's standard error · √(n / (n - 1)): on the logit's scale for what lies between two bounds, on the
    logarithm's above one.  (The bootstrap's percentiles cover 80, 88 and 92 % at 4, 8 and 16 units.  Of units
    as skewed as a lognormal of σ = 1 this covers 92 % at 8, and 88 % where they can be negative too.)

    Reference: Johnson 1978, https://doi.org/10.1080/01621459.1978.10480051; both beside the bootstrap's, and
    the correction by n / (n - 1), in Hesterberg 2015, https://arxiv.org/abs/1411.5279

    Args:
        resampled: what it is on each draw of units; draws on which it is not defined are nan, and left out.
        units: how many were drawn; None for what is certain.  One unit tells nothing: all that can be.
        within: what it can be.  A share that is the same in all draws, as where all units are right, is not
            taken for certain: its bound is Wilson's (1927), z² / (n + z²) away.
    """
    value, drawn = float(value), resampled[~np.isnan(resampled)]
    if units is None or not len(drawn):
        return {"value": value, "low": value, "high": value}
    if units == 1:
        return {"value": value, "low": within.low, "high": within.high}
    if within.share and np.ptp(drawn) < 1e-9 * within.share:
        bounds = [value + sign * within.share * Z2 / (units + Z2) for sign in (-1, 1)]
    else:
        from scipy.special import stdtrit  # takes a while, and not every process compares

        t, away = float(stdtrit(units - 1, 0.975)), drawn - drawn.mean()
        spread = max(float(drawn.std()), 1e-300)
        skewed = float(((away / spread) ** 3).mean()) / 6 * (1 + 2 * t**2)
        error = spread * math.sqrt(units / (units - 1))
        bounds = [_moved(value, error * by, within) for by in (min(skewed, 0) - t, max(skewed, 0) + t)]
    low, high = np.clip(bounds, within.low, within.high)
    return {"value": value, "low": float(low), "high": float(high)}


def _moved(value: float, by: float, within: Range) -> float:
    """A figure moved by so much, in its own units, on the scale that its range has."""
    above, below = value - within.low, within.high - value
    if not math.isfinite(within.low) or above <= 0 or below <= 0:
        return value + by
    if not math.isfinite(within.high):
        return within.low + above * math.exp(min(by / above, 300.0))
    odds = above / below * math.exp(np.clip(by * (1 / above + 1 / below), -300, 300))
    return within.low + (within.high - within.low) * odds / (1 + odds)


def over(units: int, what: str) -> str:
    """How an interval was made, in words, which say so where the units are few."""
    few = f", which are few: below {FEW_UNITS} it is rough" if 1 < units < FEW_UNITS else ""
    none = ", of which no interval can be told" * (units == 1)
    what = what.removesuffix("s") if units == 1 and " " not in what else what
    return f"95 %, paired bootstrap over {units:,} {what}{few}{none}"


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


def permutation(advantage: np.ndarray, groups: Sequence[str]) -> dict[str, float | str]:
    """The same where items of a group stand or fall together: whose answers are whose is permuted by group.

    Between equals each group's sum may as well have the other sign; of all 2^groups signs, equally likely,
    the share whose sum is as far from zero as the one found.  Exact: the sums' distribution is made up group
    by group.  With each item a group of its own it is the exact McNemar's test.  Two-sided.

    Args:
        advantage: [N] right of one model minus right of the other: 1, 0 or -1.

    Reference: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses; for
        clusters Winkler et al. 2015, https://doi.org/10.1016/j.neuroimage.2015.05.092
    """
    names, belongs = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.abs(np.bincount(belongs, weights=advantage).round().astype(int))
    most, found = int(sums.sum()), abs(int(np.sum(advantage)))
    chances = np.zeros(2 * most + 1)  # of a sum of -most to most
    chances[most] = 1.0
    for size in sums[sums > 0]:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    p_value = chances[np.abs(np.arange(-most, most + 1)) >= found].sum()
    return {"p_value": min(float(p_value), 1.0), "test": f"exact permutation over {len(names)} groups"}
