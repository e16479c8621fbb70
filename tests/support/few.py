"""A short form of parametrized tests: of each, some parameter sets that lie evenly between the first and the last."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def few_of(items: Iterable[T], keys: Sequence[Hashable], most: Sequence[int | None]) -> tuple[list[T], list[T]]:
    """Items to keep and items to leave out, both in order: of those with one key some, the first and the last among them.

    Parameters
    ----------
    items : iterable
    keys : sequence of hashable
        Of every item: which test it is a parameter set of.
    most : sequence of int or None
        Of every item: how many of its test are kept; with 1 it is the first, with None they all are.
    """
    count: dict[Hashable, int] = {}
    for key in keys:
        count[key] = count.get(key, 0) + 1
    seen: dict[Hashable, int] = dict.fromkeys(count, 0)
    kept: list[T] = []
    left: list[T] = []
    for item, key, limit in zip(items, keys, most, strict=True):
        number, seen[key] = seen[key], seen[key] + 1
        last = count[key] - 1
        chosen = None if limit is None else {round(i * last / max(1, limit - 1)) for i in range(limit)}
        (kept if chosen is None or number in chosen else left).append(item)
    return kept, left
