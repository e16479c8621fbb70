"""Eviction: the parts of a store as entries, and which of them are removed, least recently used first.

A part becomes invisible before its bytes are removed: its commit is removed first. Only files that its commit names are removed, so what
somebody else put beside them stays. Decisions are made by pure functions over `EvictionEntry` records; other functions carry them out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmprobe_zarr.display import format_bytes
from lmprobe_zarr.log import LOGGER_NAME
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import STAMPS, GroupInfo
from lmprobe_zarr.store.parts import Catalog, Part, committed_at
from lmprobe_zarr.store.upkeep.removal import lies_within, remove_part

__all__ = ["EvictPlan", "EvictionEntry", "describe_entries", "list_entries", "plan_evict", "remove_entries"]

logger = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionEntry:
    """One committed part, as eviction sees it.

    Parameters
    ----------
    part : Part
        The part, and where it is stored.
    group : str
        Folder of its group.
    nbytes : int
        Bytes of all its files.
    committed, used : float
        When it was committed and last used, in seconds since 1970.
    replaced : bool
        Whether another part has replaced it.
    """

    part: Part
    group: str
    nbytes: int
    committed: float
    used: float
    replaced: bool = False

    @property
    def is_annotation(self) -> bool:
        """Whether it only holds columns."""
        return self.part.info.kind == "annotation"

    @property
    def touched(self) -> float:
        """When it was last committed or used."""
        return max(self.committed, self.used)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictPlan:
    """What is removed, and what is left then.

    Parameters
    ----------
    entries : tuple of EvictionEntry
        What is removed, in this order.
    freed, kept, limit : int
        Bytes.
    protected : int
        Bytes of what is kept only because it was committed or used a moment ago.
    """

    entries: tuple[EvictionEntry, ...]
    freed: int
    kept: int
    limit: int
    protected: int

    @property
    def fits(self) -> bool:
        """Whether what is left is within the limit."""
        return self.kept <= self.limit

    def __str__(self) -> str:
        text = f"{len(self.entries)} entries evicted, {format_bytes(self.freed)} freed; {format_bytes(self.kept)} kept"
        text += f", limit {format_bytes(self.limit)}"
        if not self.fits:
            text += f": {format_bytes(self.protected)} were committed or used a moment ago and stay (min_age)"
        return text


def describe_entries(parts: Sequence[Part], *, group: str, stamps: Mapping[str, float | None]) -> list[EvictionEntry]:
    """The parts and annotations of one group as entries.

    Parameters
    ----------
    parts : sequence of Part
    group : str
        Folder of the group.
    stamps : mapping of str to float
        Last use by name of the part, where there is a stamp.
    """
    replaced = {name for part in parts for name in part.info.replaces}
    entries = []
    for part in parts:
        name = part.info.name
        size = part.document_nbytes + sum(int(entry[0]) for entry in part.info.files.values())
        used = stamps.get(name) or 0.0
        committed = committed_at(part.info)
        entries.append(EvictionEntry(part=part, group=group, nbytes=size, committed=committed, used=used, replaced=name in replaced))
    return entries


def plan_evict(entries: Sequence[EvictionEntry], limit: int, *, min_age: float = 0.0, now: float | None = None) -> EvictPlan:
    """Which parts are removed so that the rest is within a limit; pure.

    First those that others have replaced, then the least recently used, until the rest fits. Nothing that was committed or used less than
    `min_age` seconds ago is removed, nor a part whose removal would make one that it replaces visible again. Annotations are removed with
    the last part of their group.

    Parameters
    ----------
    entries : sequence of EvictionEntry
        Everything in the store.
    limit : int
        Bytes.
    min_age : float
        Seconds.
    now : float, optional
        Seconds since 1970; by default the present.
    """
    moment = time.time() if now is None else now
    total = sum(entry.nbytes for entry in entries)
    left = {entry.part.path: entry for entry in entries}
    chosen: list[EvictionEntry] = []

    def age(entry: EvictionEntry) -> float:
        # What was touched in the future, because a clock has been set back, was touched now.
        return max(0.0, moment - entry.touched)

    def take(entry: EvictionEntry) -> None:
        nonlocal total
        chosen.append(entry)
        total -= entry.nbytes
        del left[entry.part.path]

    def rank(entry: EvictionEntry) -> tuple[bool, int, float, str]:
        # Of replaced parts, those first that replace the fewest others themselves: the rest must wait for them, whenever they were used.
        name, n_replaces = entry.part.info.name, len(entry.part.info.replaces) if entry.replaced else 0
        return not entry.replaced, n_replaces, entry.touched, name

    order = sorted((entry for entry in entries if not entry.is_annotation), key=rank)
    for entry in order:
        if total <= limit:
            break
        still = {(other.group, other.part.info.name) for other in left.values()}
        uncovers = any((entry.group, name) in still for name in entry.part.info.replaces)
        if age(entry) < min_age or uncovers:
            continue
        take(entry)
    holding = {entry.group for entry in left.values() if not entry.is_annotation}
    emptied = {entry.group for entry in chosen}
    for entry in [entry for entry in left.values() if entry.is_annotation and entry.group not in holding]:
        # An eviction that was interrupted leaves annotations without a part, which would become visible again with the next one.
        if entry.group in emptied or (total > limit and age(entry) >= min_age):
            take(entry)
    protected = sum(entry.nbytes for entry in left.values() if age(entry) < min_age)
    freed = sum(entry.nbytes for entry in chosen)
    return EvictPlan(entries=tuple(chosen), freed=freed, kept=total, limit=limit, protected=protected)


def remove_entries(storage: Storage, entries: Iterable[EvictionEntry], *, min_age: float = 0.0) -> list[EvictionEntry]:
    """Remove parts, each invisible before its bytes are removed; returns those that were removed.

    A part whose commit is younger than `min_age` by the clock of the place itself stays, whatever its writer's clock was.
    """
    gone = []
    for entry in entries:
        if not lies_within(storage, entry.part):
            logger.warning("%s/%s lies behind a link that leads out of the store, and stays", storage.url, entry.part.path)
            continue
        if min_age > 0:
            commit = storage.scan(entry.part.path).get("zarr.json")
            if commit is not None and commit.modified is not None and time.time() - commit.modified < min_age:
                continue
        remove_part(storage, entry.part)
        gone.append(entry)
        logger.debug("removed part %s of %s: %d bytes", entry.part.info.name, entry.group, entry.nbytes)
    return gone


def list_entries(catalog: Catalog, group: GroupInfo) -> list[EvictionEntry]:
    """All parts and annotations of a group in one root, with their sizes and last use. Damaged ones are left out, with a warning."""
    stamps = {name: entry.modified for name, entry in catalog.storage.scan(f"{group.name}/{STAMPS}").items()}
    parts, notes = catalog.parts_and_annotations(group, whole=False)
    return describe_entries([*parts, *notes], group=group.name, stamps=stamps)
