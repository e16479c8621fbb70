"""Where a cache is: its store, the model of a call in that store, and lmprobe's own entries beside it.

Shared by the calls that describe the cache and those that remove from it. Never reads activations.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprobe_zarr import config
from lmprobe_zarr.bridges import LegacyCache, beside
from lmprobe_zarr.errors import InvalidArgumentError, StoreNotFoundError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.store import Mode, Place, Store, open_store
from lmprobe_zarr.store.format import GroupInfo, Provenance

__all__ = ["CachedModel", "lmprobe_entries", "open_cache", "place_name"]


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


@dataclass(frozen=True, slots=True)
class CachedModel:
    """The model of a call: its name in a store; for a local folder also the digest of its weights, because many folders share a name."""

    name: str
    provenance: Provenance

    @staticmethod
    def of(model: str) -> CachedModel:
        path = Path(model).expanduser()
        with suppress(OSError, ValueError):
            if (path / "config.json").is_file():
                known = extraction.identify(model, memory=config.weights_memory()).provenance
                return CachedModel(extraction.model_name(model), {k: v for k, v in known.items() if k == "weights"})
            if path.is_absolute():
                return CachedModel(path.name, {})  # the folder was removed; its groups have its name
        return CachedModel(model, {})

    def groups(self, store: Store) -> list[GroupInfo]:
        """The groups of this model in a store."""
        return store.matching(self.name, self.provenance, whole=False)


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
