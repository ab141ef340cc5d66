"""Near duplicates among answers: MinHash finds the candidates, and the shared shingles decide.

Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900; LSH by `datasketch`.
"""

import re
from collections.abc import Sequence

from kdlib.errors import ConfigError

TOKENS = re.compile(r"\w+|[^\w\s]")
SHINGLE = 5  # tokens
PERMUTATIONS = 128


def shingles(text: str) -> frozenset[str]:
    """Runs of five tokens, without regard to case and white space; of a shorter text all of it."""
    tokens = TOKENS.findall(text.lower())
    return frozenset(" ".join(tokens[at : at + SHINGLE]) for at in range(max(len(tokens) - SHINGLE + 1, 1)))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of shingles that two texts have in common (Jaccard's index), from 0 to 1."""
    return len(one & other) / len(one | other)


def earlier_alike(texts: Sequence[str], threshold: float) -> list[int | None]:
    """For each text the first kept one that it is as like as the threshold; None where there is none.

    Only texts without such a one are compared with, so that a chain of small changes is cut.  LSH misses few
    pairs at the threshold, and hardly any above it.
    """
    near_all, minhash = _lsh(threshold)
    kept: dict[int, frozenset[str]] = {}
    found: list[int | None] = []
    for number, text in enumerate(texts):
        own = shingles(text)
        sketch = minhash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in sorted(own)])
        alike = [other for other in near_all.query(sketch) if similarity(own, kept[other]) >= threshold]
        found.append(min(alike, default=None))
        if not alike:
            kept[number] = own
            near_all.insert(number, sketch)
    return found


def _lsh(threshold: float):
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ConfigError(
            "filters.near_duplicates needs datasketch, which is not installed; run: pip install "
            "'kdlib[generate]', or set it to null"
        ) from None
    # a lower one finds nearly all candidates; what they share is counted afterwards
    return MinHashLSH(threshold=0.9 * threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8)), MinHash
