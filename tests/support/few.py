"""A short form of parametrized tests: of each some parameter sets, with as many values of every parameter among them as there can be."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence, Set
from typing import TypeVar

T = TypeVar("T")


def few_of(
    items: Iterable[T], keys: Sequence[Hashable], most: Sequence[int | None], values: Sequence[Set[Hashable]] | None = None
) -> tuple[list[T], list[T]]:
    """Items to keep and items to leave out, both in order.

    Of those with one key the first is kept, and then again and again the one with the most values that none of those kept has; of equal
    ones the one that lies farthest from those kept.

    Parameters
    ----------
    items : iterable
    keys : sequence of hashable
        Of every item: which test it is a parameter set of.
    most : sequence of int or None
        Of every item: how many of its test are kept; with None they all are.
    values : sequence of set, optional
        Of every item: the values of its parameters, such as pairs of a name and a value.
    """
    listed = list(items)
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    kept: set[int] = set()
    for mine in places.values():
        limit = most[mine[0]]
        if limit is None or limit >= len(mine):
            kept |= set(mine)
        else:
            kept |= {mine[i] for i in _choose([values[place] if values is not None else frozenset() for place in mine], limit)}
    return [item for i, item in enumerate(listed) if i in kept], [item for i, item in enumerate(listed) if i not in kept]


def _choose(values: Sequence[Set[Hashable]], limit: int) -> list[int]:
    chosen = [0]
    seen = set(values[0])
    while len(chosen) < limit:
        rest = (i for i in range(len(values)) if i not in chosen)
        best = max(rest, key=lambda i: (len(values[i] - seen), min(abs(i - other) for other in chosen), -i))
        chosen.append(best)
        seen |= values[best]
    return chosen
