"""`open_again`: the store at a place, with the documents that an earlier call of this process has read there.

A loop that writes prompt by prompt into a URL would otherwise read the documents of all earlier parts at each call. What is kept are only
documents, which never change: the parts are listed at each call, and a document that was replaced is read again.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Final

from lmprobe_zarr.store.store import Place, Store, open_to_write

__all__ = ["open_again"]

KEPT: Final = 2  # stores of which the documents are kept
_kept: OrderedDict[int, Store] = OrderedDict()
_lock = threading.Lock()


def open_again(place: Place) -> Store:
    """As `open_store`, without reading again what an earlier call has read of the same place; a `Store` is returned as it is."""
    if isinstance(place, Store):
        return place
    opened = open_to_write(place)
    with _lock:
        known = next((store for store in reversed(_kept.values()) if _same_places(store, opened)), None)
        if known is not None:
            _kept.pop(id(known))
        _kept[id(opened)] = opened
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    if known is not None:
        for catalog, older in zip(opened.catalogs, known.catalogs, strict=True):
            catalog.adopt(older)
    return opened


def _same_places(one: Store, other: Store) -> bool:
    if len(one.catalogs) != len(other.catalogs):
        return False
    return all(a.rank == b.rank and a.storage.is_same_place(b.storage) for a, b in zip(one.catalogs, other.catalogs, strict=True))


def _forget_in_child() -> None:
    """A fork may happen while another thread holds the lock, which nobody would release in the child."""
    global _lock  # noqa: PLW0603 — replaced, because a lock cannot be released by another process
    _lock = threading.Lock()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
