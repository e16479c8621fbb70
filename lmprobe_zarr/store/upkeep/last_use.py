"""When a part was last used: a small file per part, whose time eviction reads. Best effort."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Final

from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import STAMPS
from lmprobe_zarr.store.parts import Catalog, Part

__all__ = ["mark_used", "stamp_parts"]
# A stamp on a remote place is a request; one that is younger than this is not renewed. Shorter than the shortest age that protects there.
REMOTE_STAMP_SECONDS: Final = 300.0


def stamp_parts(storage: Storage, parts: Iterable[Part], known: dict[str, float]) -> None:
    """Note that parts are being used; best effort, since a stamp that is lost only makes a part look older.

    Parameters
    ----------
    storage : Storage
    parts : iterable of Part
    known : dict of str to float
        When this process last stamped each part; brought up to date.
    """
    now = time.monotonic()
    patience = 0.0 if storage.is_local else REMOTE_STAMP_SECONDS
    due = [part for part in parts if part.path not in known or now - known[part.path] >= patience]

    def stamp(part: Part) -> None:
        with suppress(OSError):
            storage.touch(f"{part.info.group}/{STAMPS}/{part.info.name}")

    if storage.is_local:
        for part in due:
            stamp(part)
    else:
        run_all([partial(stamp, part) for part in due], storage.pace)
    known.update({part.path: now for part in due})


def mark_used(catalog: Catalog, parts: Iterable[Part]) -> None:
    """Note that parts of one root are being used; those of other roots are left out, and nothing is noted where the root is read-only."""
    if catalog.mode == "a":
        stamp_parts(catalog.storage, (part for part in parts if part.storage is catalog.storage), catalog.last_used)
