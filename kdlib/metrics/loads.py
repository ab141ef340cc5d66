"""How a load is divided among experts, and whether kinds of text divide it otherwise, beyond chance.

L layers with a router, E experts in each, U independent units (documents, …), K kinds of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kdlib.metrics.bootstrap import Bootstrap, interval
from kdlib.metrics.names import Range

DRAWS = 40_000_000  # numbers that a bootstrap's draws may be made of
SHUFFLES = 200  # of the kinds within units, to see what chance alone does
UNIT = Range(0.0, 1.0)


@dataclass(frozen=True)
class Counted:
    """Sums over kept tokens, apart for each unit and kind."""

    shares: np.ndarray  # [U, K, L, E]
    entropy: np.ndarray  # [U, K, L] of a token's shares, nats
    tokens: np.ndarray  # [U, K]
    asked: np.ndarray  # [L, E] kept tokens that asked the expert

    def loads(self, by: np.ndarray | None = None) -> np.ndarray:
        """[K, L, E] mean shares of each kind; `by`, [U, K], takes the kinds of a unit in another order."""
        at = (slice(None), slice(None)) if by is None else (np.arange(len(by))[:, None], by)
        return _over(self.shares[at].sum(0), self.tokens[at].sum(0)[:, None, None])


def summary(counted: Counted) -> dict[str, Any]:
    """Of one routing: loads and entropy by layer, which experts a kept token asked, the busiest's load."""
    tokens = counted.tokens.sum()
    load = _over(counted.shares.sum((0, 1)), tokens)
    return {
        "load": rounded(load),
        "entropy": rounded(_over(counted.entropy.sum((0, 1)), tokens)),
        "coverage": float((counted.asked > 0).mean()),
        "max_load": float(load.max(-1).mean() * load.shape[-1]),
    }


def told_apart(counted: Counted, names: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """How the loads of kinds of text differ, with 95 % intervals over units; {} where there is one kind.

    Half the sum of the absolute differences (total variation): the share of the load that one kind gives to
    other experts than the other does, 0 to 1, its mean over the layers.  It is above 0 by chance alone, the
    more so the fewer tokens: `chance` is what 95 % of shuffles of the kinds within each unit stay below.
    """
    there = np.flatnonzero(counted.tokens.sum(0)).tolist()
    if len(there) < 2:
        return {}
    seen = counted.tokens.sum(1) > 0
    shares, entropy, tokens = (
        each[seen][:, there] for each in (counted.shares, counted.entropy, counted.tokens)
    )
    held = Counted(shares, entropy, tokens, counted.asked)
    loads, units, generator = held.loads(), int(seen.sum()), np.random.default_rng(seed)
    table = np.concatenate([held.shares.reshape(units, -1), held.tokens], axis=1)
    draws = Bootstrap(units, max(min(resamples, DRAWS // table.shape[1]), 100), seed).sums(table)
    sums, tokens = draws[:, : -len(there)].reshape(-1, *loads.shape), draws[:, -len(there) :]
    drawn = _over(sums, tokens[:, :, None, None])
    turns = [generator.permuted(np.tile(np.arange(len(there)), (units, 1)), axis=1) for _ in range(SHUFFLES)]
    by_chance = np.stack([held.loads(turn) for turn in turns])
    pairs = []
    for a, b in combinations(range(len(there)), 2):
        by_layer, each = _apart(loads[a], loads[b]), _apart(drawn[:, a], drawn[:, b]).mean(-1)
        chance = np.nanquantile(_apart(by_chance[:, a], by_chance[:, b]).mean(-1), 0.95)
        found = interval(by_layer.mean(), each, units, UNIT)
        pair: dict[str, Any] = {"kinds": [names[there[a]], names[there[b]]], "chance": float(chance)}
        pairs.append({**pair, **found, "by_layer": rounded(by_layer)})
    pairs.sort(key=lambda pair: -pair["value"])
    layer = int(np.argmax(pairs[0]["by_layer"]))
    return {
        "names": [names[kind] for kind in there],
        "tokens": held.tokens.sum(0).astype(int).tolist(),
        "load": rounded(loads),
        "layer": layer,
        "intervals": [
            [interval(loads[k, layer, e], drawn[:, k, layer, e], units, UNIT) for e in range(loads.shape[-1])]
            for k in range(len(there))
        ],
        "apart": pairs,
    }


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Total variation of distributions over the last axis."""
    return np.abs(a - b).sum(-1) / 2


def _over(sums: np.ndarray, counts: Any) -> np.ndarray:
    """Means; nan where there is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums / counts


def rounded(values: np.ndarray) -> list:
    """As plain data."""
    return np.round(np.asarray(values, float), 6).tolist()
