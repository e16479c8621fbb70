"""Eviction: the parts of a store as entries, and which of them are removed, least recently used first.

Only what a model gives again is removed: annotations stay, and a part's own columns are kept as an annotation. What a part had replaced
stays hidden, by a tombstone, where it is still stored. A part becomes invisible before its bytes are removed: its commit is removed first.
Only files that its commit names are removed, so what somebody else put beside them stays. Decisions are made by pure functions over
`EvictionEntry` records; other functions carry them out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.display import count_of, format_bytes
from lmprobe_zarr.errors import CorruptPartError, NoSpaceError, PartGoneError
from lmprobe_zarr.log import LOGGER_NAME
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import STAMPS, GroupInfo, PartInfo
from lmprobe_zarr.store.parts import Catalog, Part, committed_at, stamp_noted, visible_parts
from lmprobe_zarr.store.upkeep.removal import lies_within, remove_part
from lmprobe_zarr.store.upkeep.tombstones import BELOW, drop_useless, keep_columns, removed_of, rows_over, write_tombstone

#: Recorded in parts whose values came from somewhere else than a run of the model: imported, or written by `write_activations`.
GIVEN_MARKS: Final = ("imported_from", "written_by")

__all__ = ["GIVEN_MARKS", "EvictPlan", "EvictionEntry", "describe_entries", "list_entries", "plan_evict", "remove_entries"]

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
    def is_tombstone(self) -> bool:
        """Whether it only hides what removed parts had replaced."""
        return self.part.info.is_tombstone

    @property
    def is_given(self) -> bool:
        """Whether its values were imported or written by hand: no extraction gives them again."""
        return any(mark in self.part.info.recorded for mark in GIVEN_MARKS)

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
    columns : int
        Bytes of annotations that are kept, because no model gives them again.
    given : int
        Bytes of parts that are kept because they were imported or written by hand.
    min_age : float
        Seconds; what was committed or used later than that is kept.
    dry_run : bool
        Whether nothing was removed, and this only says what would be.
    """

    entries: tuple[EvictionEntry, ...]
    freed: int
    kept: int
    limit: int
    protected: int
    columns: int = 0
    given: int = 0
    min_age: float = 0.0
    dry_run: bool = False

    @property
    def fits(self) -> bool:
        """Whether what is left is within the limit."""
        return self.kept <= self.limit

    @property
    def prompts(self) -> int:
        """Prompts of the parts that are removed; a prompt of several groups counts in each."""
        held: dict[str, set[bytes]] = {}
        for entry in self.entries:
            if not entry.is_annotation:
                held.setdefault(entry.group, set()).update(row.tobytes() for row in entry.part.info.digests)
        return sum(map(len, held.values()))

    def __str__(self) -> str:
        parts = sum(not entry.is_annotation for entry in self.entries)
        notes = sum(entry.is_annotation and not entry.is_tombstone for entry in self.entries)
        what = f"{count_of(parts, 'part')} of {count_of(self.prompts, 'prompt')}"
        what += f" and {count_of(notes, 'annotation')}" if notes else ""
        would = "would be " if self.dry_run else ""
        done = f"{what} {would}evicted, {format_bytes(self.freed)} {would}freed" if self.entries else f"nothing {would}evicted"
        text = f"{done}; {format_bytes(self.kept)} {would}kept, "
        text += f"limit {format_bytes(self.limit)}"
        if not self.fits:
            why = [
                (self.protected, f"were committed or used less than {self.min_age:g} seconds ago (min_age={self.min_age:g})"),
                (self.columns, "are annotations, which no model gives again (annotations=True)"),
                (self.given, "were imported or written by hand (given=True)"),
            ]
            text += "; what stays: " + ", ".join(f"{format_bytes(nbytes)} {reason}" for nbytes, reason in why if nbytes)
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
        size = part.document_nbytes + part.info.files_nbytes
        used = stamps.get(name) or 0.0
        committed = committed_at(part.info)
        entries.append(EvictionEntry(part=part, group=group, nbytes=size, committed=committed, used=used, replaced=name in replaced))
    return entries


def plan_evict(
    entries: Sequence[EvictionEntry],
    limit: int,
    *,
    min_age: float = 0.0,
    now: float | None = None,
    annotations: bool = False,
    given: bool = True,
) -> EvictPlan:
    """Which parts are removed so that the rest is within a limit; pure.

    First those that others have replaced, then the least recently used, until the rest fits. Nothing that was committed or used less than
    `min_age` seconds ago is removed, nor a part whose removal would make one that it replaces visible again.

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
    annotations : bool
        Whether annotations are removed with the last part of their group. Otherwise they stay.
    given : bool
        Whether parts are removed that were imported or written by hand.
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
        if age(entry) < min_age or uncovers or (entry.is_given and not given and not entry.replaced):
            continue
        take(entry)
    holding = {entry.group for entry in left.values() if not entry.is_annotation}
    emptied = {entry.group for entry in chosen}
    for entry in [entry for entry in left.values() if entry.is_annotation and entry.group not in holding]:
        # Without a part there is nothing to hide. An eviction that was interrupted leaves annotations without a part.
        hides_nothing = entry.is_tombstone and not entry.part.info.recorded.get(BELOW)
        if (hides_nothing or (annotations and not entry.is_tombstone)) and (
            entry.group in emptied or (total > limit and age(entry) >= min_age)
        ):
            take(entry)
    young = {entry.part.path for entry in left.values() if age(entry) < min_age}
    stays = [entry for entry in left.values() if entry.part.path not in young]
    return EvictPlan(
        entries=tuple(chosen),
        freed=sum(entry.nbytes for entry in chosen),
        kept=total,
        limit=limit,
        protected=sum(entry.nbytes for entry in left.values() if entry.part.path in young),
        columns=sum(entry.nbytes for entry in stays if entry.is_annotation),
        given=sum(entry.nbytes for entry in stays if entry.is_given and not entry.is_annotation and not given),
        min_age=min_age,
    )


def remove_entries(
    catalog: Catalog,
    entries: Iterable[EvictionEntry],
    *,
    min_age: float = 0.0,
    columns: bool = True,
    hide: bool = True,
    below: Sequence[Catalog] = (),
) -> tuple[list[EvictionEntry], int]:
    """Remove parts of one root, each invisible before its bytes are removed; returns those that were removed, and bytes written.

    A part stays whose commit or last use is younger than `min_age` by the clock of the place itself, whatever its writer's clock was.

    Parameters
    ----------
    catalog : Catalog
    entries : iterable of EvictionEntry
    min_age : float
        Seconds.
    columns : bool
        Keep the user's own columns of the parts, as annotations.
    hide : bool
        Keep hidden what the parts had replaced, where it stays.
    below : sequence of Catalog
        Roots that are read together with this one.
    """
    by_group: dict[str, list[EvictionEntry]] = {}
    for entry in entries:
        by_group.setdefault(entry.group, []).append(entry)
    groups = catalog.groups(whole=False)
    gone: list[EvictionEntry] = []
    written = 0
    for name, mine in by_group.items():
        # Replaced ones first, then the earlier before the later: nothing is uncovered in between, and what goes needs no hiding.
        mine.sort(key=lambda e: (not e.replaced, len(e.part.info.replaces) if e.replaced else 0, e.is_annotation, e.part.info.name))
        info = groups.get(name)
        lower = visible_parts(catalog, info) if info is not None and hide else []
        deeper = [part for other in below for part in visible_parts(other, info)] if info is not None and hide else []
        for entry in mine:
            if not _may_go(catalog.storage, entry, min_age):
                continue
            if info is not None and not entry.replaced and not entry.is_annotation:
                kept = _keep(catalog, info, entry.part, lower, deeper, columns=columns)
                if kept is None:
                    continue
                written += kept
            remove_part(catalog.storage, entry.part)
            catalog.forget(entry.part.path)
            lower = [part for part in lower if part.path != entry.part.path]
            gone.append(entry)
            logger.debug("removed part %s of %s: %d bytes", entry.part.info.name, entry.group, entry.nbytes)
        if info is not None and hide:
            drop_useless(catalog, info, below=below)
    return gone, written


def _may_go(storage: Storage, entry: EvictionEntry, min_age: float) -> bool:
    if not lies_within(storage, entry.part):
        logger.warning("%s/%s lies behind a link that leads out of the store, and stays", storage.url, entry.part.path)
        return False
    if min_age > 0:
        commit = storage.scan(entry.part.path).get("zarr.json")
        stamp = storage.scan(f"{entry.group}/{STAMPS}").get(entry.part.info.name)
        return all(file is None or file.modified is None or time.time() - file.modified >= min_age for file in (commit, stamp))
    return True


def _keep(catalog: Catalog, group: GroupInfo, part: Part, lower: Sequence[Part], deeper: Sequence[Part], *, columns: bool) -> int | None:
    """Write what is to stay of a part that is about to be removed; returns its bytes, or None where the part has to stay itself."""
    info, storage, durable = part.info, catalog.storage, catalog.durable
    below = [other for other in lower if other.info.name < info.name]
    # What a root below holds was replaced only where it was there first.
    deeper = [other for other in deeper if other.info.name < info.name]
    over, removed = rows_over(info, removed_of(info), [*below, *deeper]), removed_of(info)
    nbytes = 0
    try:
        if columns and info.own_columns:
            nbytes += _nbytes(keep_columns(storage, group, part, durable=durable, replaces=not len(over)))
        if len(over):
            tombstone = write_tombstone(
                storage, group, info, over, removed, durable=durable, replaces=True, below=bool(len(rows_over(info, removed, deeper)))
            )
            nbytes += _nbytes(tombstone)
    except (CorruptPartError, NoSpaceError) as error:
        logger.warning("%s/%s stays: %s", storage.url, part.path, str(error).splitlines()[0])
        return None
    except PartGoneError:
        return 0  # another process has removed it
    return nbytes


def _nbytes(info: PartInfo) -> int:
    # The document holds the digest of each prompt, and an entry for each file.
    return info.files_nbytes + 64 * len(info.files) + 70 * len(info.digests) + 1000


def list_entries(catalog: Catalog, group: GroupInfo) -> list[EvictionEntry]:
    """All parts and annotations of a group in one root, with their sizes and last use. Damaged ones are left out, with a warning."""
    parts, notes = catalog.parts_and_annotations(group, whole=False, tables=True)
    if catalog.mode == "a":
        stamp_noted(catalog.storage, {part.path for part in (*parts, *notes)}, group=group.name)
    stamps = {name: entry.modified for name, entry in catalog.storage.scan(f"{group.name}/{STAMPS}").items()}
    return describe_entries([*parts, *notes], group=group.name, stamps=stamps)
