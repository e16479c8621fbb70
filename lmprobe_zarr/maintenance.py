"""What lies in a store as entries, and how they go: least recently used first, by prompt, or as garbage.

A part becomes invisible before its bytes go: its commit is removed first. Only files that its commit names are removed, so what somebody
else put beside them stays. Decisions are made by pure functions over `Entry` records; the rest carries them out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import HASH_DIGITS
from lmprobe_zarr.chunks import run_all
from lmprobe_zarr.errors import ReadOnlyError
from lmprobe_zarr.plan import format_bytes
from lmprobe_zarr.reread import read_batches
from lmprobe_zarr.schema import GroupInfo, PartInfo, part_milliseconds, replacement_name
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.view import Part, open_view
from lmprobe_zarr.writer import PartWriter

__all__ = [
    "STAMPS",
    "Entry",
    "EvictPlan",
    "check_removable",
    "committed_at",
    "delete_prompts",
    "describe_entries",
    "lies_within",
    "plan_evict",
    "remove_entries",
    "remove_part",
    "stamp_parts",
    "write_again",
]

logger = logging.getLogger("lmprobe_zarr.cache")

Ints = npt.NDArray[np.int64]

STAMPS: Final = ".used"
END_OF_TIME: Final = 253370764800.0  # the year 9999, the last that a date can have
# A stamp on a remote place is a request; one that is younger than this is not renewed. Shorter than the shortest age that protects there.
REMOTE_STAMP_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One committed part, as eviction sees it.

    Parameters
    ----------
    part : Part
        The part, and where it lies.
    group : str
        Folder of its group.
    nbytes : int
        Bytes of all its files.
    committed, used : float
        When it was committed and last used, in seconds since 1970.
    hidden : bool
        Whether another part has replaced it.
    """

    part: Part
    group: str
    nbytes: int
    committed: float
    used: float
    hidden: bool = False

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
    """What goes, and what is left then.

    Parameters
    ----------
    entries : tuple of Entry
        What goes, in this order.
    freed, kept, limit : int
        Bytes.
    protected : int
        Bytes of what is kept only because it was committed or used a moment ago.
    """

    entries: tuple[Entry, ...]
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


def describe_entries(parts: Sequence[Part], *, group: str, stamps: Mapping[str, float | None]) -> list[Entry]:
    """The parts and annotations of one group as entries.

    Parameters
    ----------
    parts : sequence of Part
    group : str
        Folder of the group.
    stamps : mapping of str to float
        Last use by name of the part, where there is a stamp.
    """
    hidden = {name for part in parts for name in part.info.replaces}
    entries = []
    for part in parts:
        name = part.info.name
        size = part.document_nbytes + sum(int(entry[0]) for entry in part.info.files.values())
        used = stamps.get(name) or 0.0
        entries.append(Entry(part=part, group=group, nbytes=size, committed=committed_at(part.info), used=used, hidden=name in hidden))
    return entries


def committed_at(info: PartInfo) -> float:
    """When a part was committed by its writer's clock, in seconds since 1970.

    A part's name says when it was begun, or was made to sort after others; what is recorded says when it was closed.
    """
    written = str(info.recorded.get("written", ""))
    moment = part_milliseconds(info.name) / 1000
    with suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(written).timestamp()
    return min(max(moment, 0.0), END_OF_TIME)


def plan_evict(entries: Sequence[Entry], limit: int, *, min_age: float = 0.0, now: float | None = None) -> EvictPlan:
    """Which parts go so that the rest is within a limit; pure.

    First those that others have replaced, then the least recently used, until the rest fits. Nothing that was committed or used less than
    `min_age` seconds ago goes, nor what would let a part that it replaces show again. Annotations go with the last part of their group.

    Parameters
    ----------
    entries : sequence of Entry
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
    chosen: list[Entry] = []

    def age(entry: Entry) -> float:
        # What was touched in the future, because a clock has been set back, was touched now.
        return max(0.0, moment - entry.touched)

    def take(entry: Entry) -> None:
        nonlocal total
        chosen.append(entry)
        total -= entry.nbytes
        del left[entry.part.path]

    def rank(entry: Entry) -> tuple[bool, int, float, str]:
        # Of what is hidden, that first which has itself replaced the least: the rest waits for it, however lately it was used.
        name, replaced = entry.part.info.name, len(entry.part.info.replaces) if entry.hidden else 0
        return not entry.hidden, replaced, entry.touched, name

    order = sorted((entry for entry in entries if not entry.is_annotation), key=rank)
    for entry in order:
        if total <= limit:
            break
        still = {(other.group, other.part.info.name) for other in left.values()}
        shows_again = any((entry.group, name) in still for name in entry.part.info.replaces)
        if age(entry) < min_age or shows_again:
            continue
        take(entry)
    holding = {entry.group for entry in left.values() if not entry.is_annotation}
    emptied = {entry.group for entry in chosen}
    for entry in [entry for entry in left.values() if entry.is_annotation and entry.group not in holding]:
        # An eviction that was interrupted leaves annotations without a part, which would show again with the next one.
        if entry.group in emptied or (total > limit and age(entry) >= min_age):
            take(entry)
    protected = sum(entry.nbytes for entry in left.values() if age(entry) < min_age)
    freed = sum(entry.nbytes for entry in chosen)
    return EvictPlan(entries=tuple(chosen), freed=freed, kept=total, limit=limit, protected=protected)


def remove_entries(storage: Storage, entries: Iterable[Entry], *, min_age: float = 0.0) -> list[Entry]:
    """Take parts away, each invisible before its bytes go; returns those that went.

    A part whose commit is younger than `min_age` by the clock of the place itself stays, whatever its writer's clock said.
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


def lies_within(storage: Storage, part: Part) -> bool:
    """Whether all of a part lies in its place, none of it behind a link that leads out."""
    folders = {f"{part.path}/{name}".rpartition("/")[0] for name in part.info.files}
    return not any(storage.leads_out(folder) for folder in (part.path, *folders))


def check_removable(storage: Storage, parts: Iterable[Part]) -> None:
    """Raise `ReadOnlyError` where something of the parts lies behind a link that leads out of the place."""
    for part in parts:
        if not lies_within(storage, part):
            raise ReadOnlyError(
                f"{storage.url}/{part.path} lies behind a link that leads out of the store, where nothing is removed: remove the link"
            )


def remove_part(storage: Storage, part: Part) -> None:
    """Take one part away: its commit first, then the files that its commit names, and its stamp."""
    check_removable(storage, [part])
    storage.remove([f"{part.path}/zarr.json"])
    files = [f"{part.path}/{name}" for name in part.info.files]
    stamp = f"{part.info.group}/{STAMPS}/{part.info.name}"
    storage.remove([*files, stamp])


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
        run_all([partial(stamp, part) for part in due], local=False)
    known.update({part.path: now for part in due})


def delete_prompts(storage: Storage, group: GroupInfo, parts: Sequence[Part], digests: Iterable[str], *, durable: bool) -> int:
    """Take prompts out of every part and annotation of a group, physically; returns how many parts held any.

    A part that holds others too is written again without them, under the same rules as ever; the old one is hidden by that commit, and
    then its bytes go. Stopped half-way, a second call completes it.

    Parameters
    ----------
    storage : Storage
    group : GroupInfo
    parts : sequence of Part
        All parts and annotations of the group, hidden ones too.
    digests : iterable of str
        Whole digests of the prompts.
    durable : bool
        Flush what is written again before it is committed.
    """
    # By their hashes, which no two prompts of a group share: a part may know no more of a prompt than that.
    unwanted = {bytes.fromhex(digest[:HASH_DIGITS]) for digest in digests}
    hidden = {name for part in parts for name in part.info.replaces}
    concerned = 0
    check_removable(storage, [p for p in parts if any(row[: HASH_DIGITS // 2].tobytes() in unwanted for row in p.info.digests)])
    # What is hidden goes whole, and first: it must not show again when the part that hides it goes.
    for part in sorted(parts, key=lambda p: p.info.name not in hidden):
        keep = np.array([row[: HASH_DIGITS // 2].tobytes() not in unwanted for row in part.info.digests])
        if keep.all():
            continue
        concerned += 1
        if part.info.name in hidden:
            remove_part(storage, part)
            continue
        if keep.any():
            write_again(storage, group, part, np.flatnonzero(keep), durable=durable)
        else:
            for other in (p for p in parts if p.info.name in part.info.replaces):
                remove_part(storage, other)
        remove_part(storage, part)
    return concerned


def write_again(
    storage: Storage,
    group: GroupInfo,
    part: Part,
    rows: Ints,
    *,
    durable: bool,
    without: Collection[str] = (),
    layers: Container[int] | None = None,
    after: str = "",
    name: str = "",
    hides: bool = True,
) -> PartInfo:
    """A part as another one with only some of what it holds.

    Parameters
    ----------
    storage, group, part
    rows : ndarray of int
        Which of its prompts.
    durable : bool
        Flush it before it is committed.
    without, layers
        What is left out, and what is kept; see `reread.read_batches`.
    after : str
        Name that the new one sorts right behind; by default that of the part.
    name : str
        The new one's own, where it is known already.
    hides : bool
        Whether the new one replaces it.
    """
    info = part.info
    writer = PartWriter(
        storage,
        group,
        name or replacement_name(after or info.name),
        kind=info.kind,
        compressed=any(array.shuffle is not None for array in info.arrays.values()),
        durable=durable,
        replaces=(info.name, *info.replaces) if hides else (),
        recorded=info.recorded,
    )
    try:
        for batch in read_batches(open_view(storage, group, [part], []), rows, without=without, layers=layers):
            writer.append(batch)
        return writer.commit()
    except BaseException:
        with suppress(OSError):
            writer.abort()
        raise
