"""Of how many samples of few units the 95 % interval holds what it is an interval of.  A simulation."""

import os

import numpy as np
import pytest

from kdlib.metrics.bootstrap import Bootstrap, interval
from kdlib.metrics.names import POSITIVE, SHARE, UNBOUNDED

TRIALS, RESAMPLES = 4000, 1000  # with UNITS=all other counts of units too: four minutes
# of units: [trials, units] sums of a figure, those it is divided by, and the truth; and what it can be


def equal(figures, truth, within):
    return figures, np.ones_like(figures), truth, within


def shares(generator, size, share, likeness):
    """Of rows that are right, in documents of 5 to 80 rows of which some are easier."""
    rows = generator.integers(5, 80, size)
    easy = generator.beta(share * likeness, (1 - share) * likeness, size)
    return generator.binomial(rows, easy).astype(float), rows.astype(float), share, SHARE


def ratios(generator, size, within, truth):
    """Of tokens of documents, some of which are twenty times as long as others."""
    tokens = generator.lognormal(3, 1, size).round() + 1
    return tokens * generator.normal(truth, 1, size), tokens, truth, within


POPULATIONS = {
    "normal": lambda g, size: equal(g.normal(3, 1, size), 3, POSITIVE),
    "normal differences": lambda g, size: equal(g.normal(0, 1, size), 0, UNBOUNDED),
    "lognormal": lambda g, size: equal(g.lognormal(0, 0.5, size), np.exp(0.125), POSITIVE),
    "lognormal differences": lambda g, size: equal(g.lognormal(0, 0.5, size), np.exp(0.125), UNBOUNDED),
    "exponential": lambda g, size: equal(g.exponential(1, size), 1, POSITIVE),
    "ratio": lambda g, size: ratios(g, size, POSITIVE, 3),
    "ratio differences": lambda g, size: ratios(g, size, UNBOUNDED, 0),
    "share 0.7": lambda g, size: shares(g, size, 0.7, 10),
    "share 0.95": lambda g, size: shares(g, size, 0.95, 10),
    "single rows": lambda g, size: equal((g.random(size) < 0.9).astype(float), 0.9, SHARE),
}


def covered(population, units, trials=TRIALS):
    figures, size, truth, within = POPULATIONS[population](np.random.default_rng(7), (trials, units))
    drawn = Bootstrap(units, RESAMPLES).sums(np.concatenate([figures, size]).T)
    resampled, values = drawn[:, :trials] / drawn[:, trials:], figures.sum(1) / size.sum(1)
    pairs = zip(values, resampled.T, strict=True)
    found = [interval(value, draws, units, within) for value, draws in pairs]
    return np.mean([each["low"] <= truth <= each["high"] for each in found])


LEAST = {"lognormal differences": 0.925}  # skewed as no difference of two models should be


@pytest.mark.slow
@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("units", [4, 8, 16, 30] if os.environ.get("UNITS") == "all" else [8])
def test_an_interval_of_few_units_holds_the_truth_as_often_as_it_says(population, units):
    assert covered(population, units) >= LEAST.get(population, 0.93)


def test_an_interval_of_eight_units_holds_the_truth():
    assert covered("normal", 8, trials=400) >= 0.93
