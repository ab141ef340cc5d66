"""Which rows to hold out or to sample so that every class keeps its share; of numbers alone.  Imports no
torch.
"""

import random
from collections import Counter
from collections.abc import Sequence

Classes = Sequence[int]  # of each row
EXACT = 100  # groups of which every sum is looked at


def apportioned(sizes: Sequence[int], total: int, *, spare: int = 0) -> list[int]:
    """`total` divided among classes in proportion to their sizes, by largest remainder.

    Args:
        spare: so many of each class are not to be given away.

    Returns:
        For each class a count: one or more where `total` is enough for all of them, `size - spare` at most.
    """
    most = [max(size - spare, 0) for size in sizes]
    least = [min(limit, 1) for limit in most]
    if sum(least) > total:
        least = [0] * len(sizes)
    ideal = [total * size / max(sum(sizes), 1) for size in sizes]
    counts = [min(max(int(share), low), high) for share, low, high in zip(ideal, least, most, strict=True)]
    for _ in range(min(total, sum(most)) - sum(counts)):
        counts[
            max((i for i in range(len(sizes)) if counts[i] < most[i]), key=lambda i: ideal[i] - counts[i])
        ] += 1
    for _ in range(sum(counts) - total):
        counts[
            max((i for i in range(len(sizes)) if counts[i] > least[i]), key=lambda i: counts[i] - ideal[i])
        ] -= 1
    return counts


def sample(classes: Classes, total: int, *, seed: int) -> list[int]:
    """The numbers of `total` rows, rising, that keep the classes' proportions; all where there are no
    more.
    """
    rows = _by_class(classes)
    counts = apportioned([len(each) for each in rows], min(total, len(classes)))
    return sorted(
        row for number, each in enumerate(rows) for row in _drawn(each, counts[number], seed, number)
    )


def held_out(
    classes: Classes, total: int, *, seed: int, spare: int, groups: Sequence[str] | None = None
) -> list[int]:
    """The numbers of some `total` rows to be held out, rising, that keep the classes' proportions.

    Args:
        total: raised to one of each class.
        spare: so many rows (or groups) of each class stay, for training and for what is held out later.
        groups: of each row; then whole groups are held out, whose rows come nearest to each class's count.
    """
    rows = _by_class(classes)
    total = max(total, sum(len(each) > spare for each in rows))
    counts = apportioned([len(each) for each in rows], total, spare=0 if groups else spare)
    if groups is None:
        return sorted(
            row for number, each in enumerate(rows) for row in _drawn(each, counts[number], seed, number)
        )
    out: set[str] = set()
    # a group may hold rows of several classes
    for number, each in sorted(enumerate(rows), key=lambda pair: len(pair[1])):
        left = [groups[row] for row in each if groups[row] not in out]
        wanted = counts[number] - (len(each) - len(left))
        out |= _groups_nearest(left, wanted, seed, number, spare) if wanted > 0 else set()
    return [row for row, group in enumerate(groups) if group in out]


def _by_class(classes: Classes) -> list[list[int]]:
    """The numbers of each class's rows; the classes as they come first, so that their names and order
    change no split.
    """
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(classes):
        rows.setdefault(number, []).append(row)
    return list(rows.values())


def _drawn(rows: Sequence[int], count: int, seed: int, number: int) -> list[int]:
    """A generator for each class: what is drawn of one does not depend on how many rows another has."""
    return random.Random(f"{seed} {number}").sample(rows, count)


def _groups_nearest(groups: Sequence[str], count: int, seed: int, number: int, spare: int) -> set[str]:
    """The groups, one or more, whose sizes sum nearest to `count`, with `spare` of them left; none where
    there are too few.

    Of many groups most are taken as they come while they fit, and the rest is made up from the last hundred.
    """
    sizes, taken = Counter(groups), []
    names = sorted(sizes)
    random.Random(f"{seed} {number}").shuffle(names)
    most = len(names) - spare
    while len(names) > EXACT:
        if sizes[names[-1]] < count and len(taken) < most - 1:
            taken.append(names[-1])
            count -= sizes[names[-1]]
        names.pop()
    reached: dict[int, tuple[str, ...]] = {0: ()}  # sum of sizes -> the first groups found that have it
    for name in names:
        for total, chosen in list(reached.items()):
            if len(taken) + len(chosen) < most and total < count and total + sizes[name] not in reached:
                reached[total + sizes[name]] = (*chosen, name)
    if not taken:
        del reached[0]
    return {
        *taken,
        *(reached[min(reached, key=lambda total: (abs(total - count), total))] if reached else ()),
    }
