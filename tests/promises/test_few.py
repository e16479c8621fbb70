"""The short form of parametrized tests that a second interpreter runs."""

from __future__ import annotations

import pytest
from few import few_of


@pytest.mark.parametrize(
    ("count", "most", "kept"),
    [(1, 3, [0]), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (10, 3, [0, 4, 9]), (10, 2, [0, 9]), (10, 1, [0]), (4, 4, [0, 1, 2, 3]), (0, 3, [])],
)
def test_sets_from_the_first_to_the_last(count: int, most: int, kept: list[int]) -> None:
    assert few_of(range(count), ["a"] * count, [most] * count) == (kept, [i for i in range(count) if i not in kept])


def test_each_test_by_itself_in_the_order_of_the_items() -> None:
    items = ["a0", "b0", "a1", "b1", "a2", "c0", "a3"]
    keys = [item[0] for item in items]
    assert few_of(items, keys, [2] * 7) == (["a0", "b0", "b1", "c0", "a3"], ["a1", "a2"])
    assert few_of(items, keys, [None if key == "a" else 1 for key in keys]) == (["a0", "b0", "a1", "a2", "c0", "a3"], ["b1"])
