"""A short form of parametrized tests: of each, some parameter sets that lie evenly between the first and the last."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def few_of(items: Iterable[T], keys: Sequence[Hashable], most: int) -> tuple[list[T], list[T]]:
    """Items to keep and items to leave out, both in order: of those with one key at most `most`, the first and the last among them.

    Parameters
    ----------
    items : iterable
    keys : sequence of hashable
        Of every item: which test it is a parameter set of.
    most : int
        At least 1; with 1 it is the first.
    """
    count: dict[Hashable, int] = {}
    for key in keys:
        count[key] = count.get(key, 0) + 1
    seen: dict[Hashable, int] = dict.fromkeys(count, 0)
    kept: list[T] = []
    left: list[T] = []
    for item, key in zip(items, keys, strict=True):
        number, seen[key] = seen[key], seen[key] + 1
        last, spans = count[key] - 1, max(1, most - 1)
        chosen = {round(i * last / spans) for i in range(most)}
        (kept if number in chosen else left).append(item)
    return kept, left
