"""Removes parts from the cache: the least recently used ones, or all. A remote cache is emptied only if the call names its place."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Final

import numpy as np

from lmprobe_zarr import config
from lmprobe_zarr.cache.info import ClearSummary
from lmprobe_zarr.cache.place import lmprobe_entries, open_cache, place_name
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.storage import ReadCache
from lmprobe_zarr.store import Model, Place, Store
from lmprobe_zarr.store.upkeep import EvictionEntry, EvictPlan, plan_evict, remove_entries

__all__ = ["MIN_AGE", "clear_cache", "clear_read_cache", "evict", "why_nothing_to_evict"]

# Seconds for which a part is kept after its commit or last use, in a place that others may be using.
MIN_AGE: Final = 600.0


def _may_remove(place: Place, opened: Store) -> None:
    """Raise if the store cannot be written to, or is remote and not named by the call."""
    if place is None and not opened.storage.is_local:
        raise InvalidArgumentError(f"the cache {opened.url} is remote, and others may use it: name it in the call to delete anything there")
    opened.check_writable()


def _check_age(min_age: float | None, opened: Store) -> float:
    if min_age is None:
        return 0.0 if opened.url == config.default_name() else MIN_AGE
    if isinstance(min_age, bool) or not isinstance(min_age, (int, float, np.number)) or not 0 <= min_age < float("inf"):
        raise InvalidArgumentError(f"min_age={min_age!r} is not an age: give seconds, at least 0")
    return float(min_age)


def evict(
    url: Place = None,
    *,
    max_gb: float | None = None,
    min_age: float | None = None,
    dry_run: bool = False,
    annotations: bool = False,
    given: bool | None = None,
) -> EvictPlan | None:
    """Remove the least recently used parts until the cache is within its limit.

    Only what a model gives again is removed. Annotations stay, and the columns of a removed part stay as an annotation: they are there
    again with their prompts, once these have been extracted again. Values that a removed part had replaced stay hidden.
    A part becomes invisible before its bytes are removed; open views that still need it raise `PartGoneError`.

    Parameters
    ----------
    url : path, URL or Store, or a sequence of these, optional
        Another place than the cache. Of several, parts are removed from the last only. A remote place is evicted only if it is named here.
    max_gb : float, optional
        The limit in GB of 1024³ bytes; by default that of `set_cache_limit` or ``$LMPROBE_CACHE_MAX_GB``, for the cache only.
    min_age : float, optional
        Seconds for which a part is kept after its commit or last use; by default 0 in the local default root, 600 elsewhere.
    dry_run : bool
        Only return the plan.
    annotations : bool
        Remove columns too: those of a part with the part, and annotations with the last part of their group.
    given : bool, optional
        Whether parts are removed that were imported or written by `write_activations`, which no run of a model gives again. By default they
        stay in the cache, and are removed from a place that the call names.

    Returns
    -------
    EvictPlan or None
        What was removed; None if there is no limit, no store, or the cache is remote and not named.

    Raises
    ------
    InvalidArgumentError
        A place is named without `max_gb`, or a number is negative.
    ReadOnlyError
    """
    log = cache_logger()
    limit = config.cache_limit() if url is None else None
    if max_gb is not None:
        limit = config.bytes_of("max_gb", max_gb)
    elif url is not None:
        raise InvalidArgumentError(f"there is no limit for {place_name(url)}: give max_gb=, the size to bring it down to in GB")
    elif not limit:
        # There is no limit, or it is 0, which stops storing but does not empty the cache.
        log.info("[cache] evict: %s", _no_limit(limit))
        return None
    opened = open_cache(url, "a")
    if opened is None:
        return None
    below, opened = opened.catalogs[:-1], opened.own
    if url is None and not opened.storage.is_local:
        log.warning("[cache] evict: the cache %s is remote, and is evicted only when the call names it", opened.url)
        return None
    _may_remove(url, opened)
    began = time.perf_counter()
    age = _check_age(min_age, opened)
    gone: list[EvictionEntry] = []
    while True:
        entries = [entry for info in opened.groups(whole=False).values() for entry in opened.entries(info)]
        # A part behind a link takes no space here, and may belong to somebody else.
        entries = [entry for entry in entries if not opened.storage.leads_out(entry.part.path)]
        plan = plan_evict(entries, limit or 0, min_age=age, annotations=annotations, given=url is not None if given is None else given)
        if dry_run:
            return replace(plan, dry_run=True)
        some, written = remove_entries(opened.catalog, plan.entries, min_age=age, columns=not annotations, below=below)
        gone += some
        # What was written to keep columns, and to keep hidden what was replaced, takes space itself.
        stayed = sum(entry.nbytes for entry in plan.entries) - sum(entry.nbytes for entry in some)
        kept = plan.kept + stayed + written
        if not written or kept <= plan.limit or not some:
            break
    freed = sum(entry.nbytes for entry in gone)
    plan = replace(plan, entries=tuple(gone), freed=freed, kept=kept, protected=plan.protected + stayed)
    log.log(30 if not plan.fits else 20, "[cache] evict: %s, %.2f s", plan, time.perf_counter() - began)
    return plan


def _no_limit(limit: int | None) -> str:
    """Why nothing is evicted where there is no size to bring the cache down to."""
    if limit == 0:
        return "the limit is 0, which stores nothing more and keeps what is stored; give max_gb=0 to remove it"
    return "no limit is set: give max_gb=, or set LMPROBE_CACHE_MAX_GB"


def why_nothing_to_evict(*, max_gb: float | None = None) -> str:
    """Why `evict` of the cache, without a place, returned None."""
    if max_gb is None and not config.cache_limit():
        return _no_limit(config.cache_limit())
    opened = open_cache(None, "a")
    if opened is None:
        return f"there is no cache yet at {place_name(None)}"
    return f"the cache {opened.own.url} is remote, and is evicted only when the call names it"


def check_is_stored(opened: Store, model: Model) -> None:
    """Raise `ModelNotStoredError`, which names the nearest model, where a store holds other models only."""
    if opened.models():
        opened.find_group(model)


def clear_cache(model: Model | None = None, *, url: Place = None, legacy: bool = False) -> ClearSummary:
    """Delete all cached activations, annotations and columns. This cannot be undone.

    Parameters
    ----------
    model : str or path, optional
        Only those of this model: its name in the store, its hub id or its folder.
    url : path, URL or Store, or a sequence of these, optional
        Another place than the cache. Of several, only the last is cleared. A remote place is cleared only if it is named here.
    legacy : bool
        Whether lmprobe's own entries beside the store are deleted too; if not, the log says that they remain.

    Returns
    -------
    ClearSummary
        The number of deleted entries: parts and annotations, and with `legacy` lmprobe's prompts. It prints what they were.

    Raises
    ------
    InvalidArgumentError
        The cache is remote and the call does not name it.
    ReadOnlyError
    """
    log = cache_logger()
    opened = open_cache(url, "a")
    summary = ClearSummary()
    if opened is not None:
        opened = opened.own
        _may_remove(url, opened)
        for info in opened.matching(model, whole=False):
            gone, _ = remove_entries(opened.catalog, opened.entries(info), columns=False, hide=False)
            opened.drop_empty_group(info)
            summary = summary.joined(ClearSummary.of(gone))
    old = lmprobe_entries(url, "auto")
    if old is not None and legacy:
        if not old.storage.is_local:
            raise InvalidArgumentError(
                f"lmprobe's own entries in {old.storage.url} are remote, and others may use them: delete them there yourself"
            )
        summary = summary.joined(ClearSummary(legacy=old.clear(model)))
    elif old is not None and (left := sum(held.prompts for held in old.models(model))):
        log.info("[cache] clear: %d entries of lmprobe's own remain in %s; legacy=True deletes them too", left, old.storage.url)
    log.info("[cache] clear: %s deleted in %s", summary, place_name(url))
    return summary


def clear_read_cache(folder: str | os.PathLike[str] | None = None) -> int:
    """Remove what is kept on this machine of what was read of remote stores, see `open_store`. It is read from its place again.

    Parameters
    ----------
    folder : str or path, optional
        By default ``$LMPROBE_READ_CACHE_DIR``, else ``.lmprobe-zarr/reads`` in ``$LMPROBE_CACHE_DIR``. Other files in it stay.

    Returns
    -------
    int
        Bytes that were freed.

    Raises
    ------
    InvalidArgumentError
        `folder` is no folder of this machine, or none is known.
    """
    cache = ReadCache(config.read_cache_folder(folder), 0)
    gone = cache.clear()
    cache_logger().info("[cache] clear: %d bytes of reads deleted in %s", gone.nbytes, cache.folder)
    return gone.nbytes
