"""Rows held out or sampled: proportions kept, nothing lost, the same for the same seed."""

import random
from collections import Counter

from hypothesis import given, settings, strategies as st

from kdlib.data.classification import apportioned, held_out, sample

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def test_the_largest_remainders_get_what_is_left_over():
    assert apportioned([47, 16, 158, 81, 20], 32) == [5, 1, 16, 8, 2]  # 4.67, 1.59, 15.70, 8.05, 1.99
    assert apportioned([50, 50], 4) == [2, 2]


def test_a_small_class_gets_one_where_that_fits_and_none_where_it_does_not():
    assert apportioned([1000, 1000, 1], 10) == [5, 4, 1]
    assert apportioned([5, 4, 3], 2) == [1, 1, 0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=SIZES, total=st.integers(0, 500), spare=st.integers(0, 2))
def test_what_is_apportioned_adds_up_and_leaves_what_is_spared(sizes, total, spare):
    counts = apportioned(sizes, total, spare=spare)
    room = [max(size - spare, 0) for size in sizes]
    assert sum(counts) == min(total, sum(room))
    assert all(0 <= count <= limit for count, limit in zip(counts, room, strict=True))
    if total >= len(sizes):
        assert all(count >= 1 for count, limit in zip(counts, room, strict=True) if limit)


def test_a_sample_keeps_proportions_and_comes_again_with_its_seed():
    classes = [0] * 600 + [1] * 300 + [2] * 100
    rows = sample(classes, 100, seed=3)
    assert Counter(classes[row] for row in rows) == {0: 60, 1: 30, 2: 10}
    assert rows == sorted(set(rows)) == sample(classes, 100, seed=3) != sample(classes, 100, seed=4)
    assert sample(classes, 5000, seed=3) == list(range(1000))


def test_what_is_drawn_of_a_class_does_not_depend_on_the_others():
    first = [row for row in held_out([0] * 50 + [1] * 50, 10, seed=0, spare=1) if row < 50]
    assert first == [row for row in held_out([0] * 50 + [1] * 150, 20, seed=0, spare=1) if row < 50]


def test_every_class_with_a_row_to_spare_is_held_out_once_at_least():
    classes = [0] * 100 + [1, 1, 2, 2, 3]
    out = held_out(classes, 2, seed=0, spare=1)
    assert Counter(classes[row] for row in out) == {0: 1, 1: 1, 2: 1}  # of the last there is one, which stays


def test_groups_are_held_out_whole_and_come_near_the_share():
    classes, groups = [], []
    for number in range(3):
        for group, size in enumerate((40, 25, 15, 12, 8)):
            classes += [number] * size
            groups += [f"{number}.{group}"] * size
    out = held_out(classes, 60, seed=0, spare=2, groups=groups)
    held = {groups[row] for row in out}
    assert len(out) == sum(group in held for group in groups)
    assert Counter(classes[row] for row in out) == {0: 20, 1: 20, 2: 20}  # 12 + 8
    assert out == held_out(classes, 60, seed=0, spare=2, groups=groups)


def test_a_class_in_one_group_alone_is_not_held_out():
    assert held_out([0, 0, 1, 1], 2, seed=0, spare=1, groups=["a", "a", "b", "c"]) in ([2], [3])


def test_groups_with_rows_of_several_classes_are_no_more_than_the_share():
    """Two hundred patients with visits of all ten kinds each: a fifth of the rows is about a fifth of the
    patients.
    """
    classes = [number % 10 for number in range(2000)]
    groups = [f"patient {number // 10}" for number in range(2000)]
    out = held_out(classes, 400, seed=0, spare=1, groups=groups)
    assert 380 <= len(out) <= 440
    assert {groups[row] for row in out}.isdisjoint(groups[row] for row in set(range(2000)).difference(out))


def test_many_groups_are_divided_in_a_moment_and_come_near_the_share():
    generator = random.Random(0)
    groups = [f"author {generator.randrange(20_000)}" for _ in range(100_000)]
    classes = [int(group.split()[1]) % 3 for group in groups]
    out = held_out(classes, 20_000, seed=1, spare=1, groups=groups)
    assert abs(len(out) - 20_000) < 30
