"""Notes which parts are read, so that eviction takes the least recently used first.

Best effort: never an error, and never on a read-only store.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from lmprobe_zarr.errors import LmprobeZarrError
from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import STAMPS

__all__ = ["PATIENCE", "note_uses", "stamp_noted"]

#: Seconds for which a stamp is not renewed: on a remote place each one is a request. Shorter than the age that protects parts there.
PATIENCE: Final = 300.0


@dataclass(slots=True)
class _Use:
    storage: Storage
    stamped: float
    used: float


# What this process has read, by the URL of the root and the key of the part's folder.
_uses: dict[tuple[str, str], _Use] = {}


def note_uses(parts: Iterable[tuple[Storage, str]]) -> None:
    """Note that parts were read just now; each is stamped at most once in five minutes.

    Parameters
    ----------
    parts : iterable of (Storage, str)
        The storage of each, and the key of its folder.
    """
    now = time.monotonic()
    due: list[_Use] = []
    keys: list[str] = []
    for storage, path in parts:
        use = _uses.get((storage.url, path))
        if use is None:
            use = _uses[storage.url, path] = _Use(storage, -PATIENCE, now)
        use.used = now
        if use.stamped == -PATIENCE or now - use.stamped >= PATIENCE:
            use.stamped = now
            due.append(use)
            keys.append(path)
    if due:
        _stamp(due, keys)


def stamp_noted(storage: Storage, paths: Container[str], *, group: str) -> None:
    """Stamp parts of one group that were read since they were stamped last, for an eviction that is about to look.

    Parameters
    ----------
    storage : Storage
    paths : container of str
        Keys of the group's parts that are there; others are forgotten.
    group : str
        Its folder.
    """
    now = time.monotonic()
    due: list[_Use] = []
    keys: list[str] = []
    for (url, path), use in list(_uses.items()):
        if url != storage.url or path.partition("/")[0] != group:
            continue
        if path not in paths:
            _uses.pop((url, path), None)
        elif use.used > use.stamped:
            use.stamped = now
            due.append(use)
            keys.append(path)
    _stamp(due, keys)


def _stamp(uses: list[_Use], paths: list[str]) -> None:
    def touch(storage: Storage, path: str) -> None:
        with suppress(OSError, LmprobeZarrError):
            group, name = path.partition("/")[0], path.rpartition("/")[2]
            storage.touch(f"{group}/{STAMPS}/{name}")

    jobs = [partial(touch, use.storage, path) for use, path in zip(uses, paths, strict=True)]
    if jobs and all(use.storage.is_local for use in uses):
        for job in jobs:
            job()
    elif jobs:
        run_all(jobs, next(use.storage.pace for use in uses if not use.storage.is_local))
