"""Where a cache is: its store, and lmprobe's own entries beside it.

Shared by the calls that describe the cache and those that remove from it. Never reads activations.
"""

from __future__ import annotations

from typing import Any

from lmprobe_zarr import config
from lmprobe_zarr.bridges import LegacyCache, beside
from lmprobe_zarr.errors import InvalidArgumentError, StoreNotFoundError
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.store import Mode, Place, Store, open_store

__all__ = ["lmprobe_entries", "open_cache", "place_name"]


def open_cache(place: Place, mode: Mode) -> Store | None:
    """The store at a place; None if there is none yet."""
    if isinstance(place, Store):
        return place
    try:
        opened = open_store(place, "r")
    except StoreNotFoundError:
        # Nothing has been written yet, but stores below may hold something to read.
        opened = open_store(place)
        return None if opened.below is None else opened
    # A backend that is read-only stays so, whatever mode is requested.
    return opened if mode == "r" else open_store(place, mode)


def place_name(place: Place) -> str:
    """The name of a place, whether or not it holds a store."""
    given: Any = config.cache_backend() if place is None else place
    last = given[-1] if isinstance(given, (list, tuple)) else given
    if last is None:
        return config.default_name()
    if isinstance(last, Store):
        return last.url
    return open_storage(last).url if place is not None else str(last)


def lmprobe_entries(place: Place, legacy: str) -> LegacyCache | None:
    """Lmprobe's own entries around the cache; None if the call names a place."""
    if legacy not in ("auto", "never"):
        raise InvalidArgumentError(f"legacy={legacy!r} is unknown: use 'auto' or 'never'")
    return None if legacy == "never" or place is not None else beside(open_store(None, "a"))
