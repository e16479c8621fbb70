"""The short form of parametrized tests, in `make test` and on a second interpreter."""

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


def test_every_value_of_every_parameter_is_among_them_where_there_is_room() -> None:
    pairs = [(place, kind) for place in ("local", "memory", "s3") for kind in "abcdefg"]
    values = [frozenset({("place", place), ("kind", kind)}) for place, kind in pairs]
    for most in (1, 3, 7, 9, 20):
        kept, _ = few_of(pairs, ["t"] * len(pairs), [most] * len(pairs), values)
        assert len(kept) == most
        assert kept[0] == pairs[0]
        assert len({place for place, _ in kept}) == min(most, 3)
        assert len({kind for _, kind in kept}) == min(most, 7)


def test_a_limit_of_all_keeps_all() -> None:
    assert few_of("abc", "ttt", [3] * 3, [frozenset("x")] * 3) == (["a", "b", "c"], [])
