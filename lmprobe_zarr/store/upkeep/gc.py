"""Garbage collection: parts that others replaced long ago, and what killed writers left. Plans on records, then removes.

Only files, and unfinished uploads of files, with names that our writer makes are ever removed, and only below folders with names that it
makes. Ages come from the storage's
own times; what has no time stays.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.display import count_of, format_bytes
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, PartGoneError
from lmprobe_zarr.storage import FileInfo, Storage, StrayUpload
from lmprobe_zarr.store.format import ANNOTATIONS, BLOCK_TABLE, CHUNK_TABLE, COMMITS, LEVELS, PART_NAME, STAMPS, GroupInfo
from lmprobe_zarr.store.parts import Catalog, Listing, Part
from lmprobe_zarr.store.upkeep.removal import lies_within, remove_part
from lmprobe_zarr.store.upkeep.tombstones import drop_useless

__all__ = ["PARTIAL", "GcSummary", "Leftover", "collect_garbage", "find_leftover", "plan_gc", "remove_garbage"]

_CHUNK: Final = re.compile(r"c(?:\.\d+)+")
_FILE: Final = rf"zarr\.json|{CHUNK_TABLE}|{BLOCK_TABLE}|{_CHUNK.pattern}"
PARTIAL: Final = re.compile(rf"\.(?:{_FILE})\.[0-9a-f]{{12}}\.partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A part's folder without a commit, or single files.

    Parameters
    ----------
    folder : str
        Key of the part's folder; empty where it is none.
    files : tuple of str
        Keys of what is ours in it.
    folders : tuple of str
        Keys of the folders in it, and its own.
    nbytes : int
        Their bytes.
    """

    folder: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GcSummary:
    """What a collection of garbage would remove, or has removed. Prints well.

    Parameters
    ----------
    url : str
        The store.
    replaced : tuple of Part
        Parts and annotations that others replaced.
    unfinished : tuple of Leftover
        What killed writers left.
    partials, stamps : tuple of str
        Keys of staged documents that were never committed, and of signs of use and of commits of parts that are gone.
    freed : int
        Bytes.
    young : int
        Replaced and unfinished parts that stay because they, or what replaced them, are not old enough.
    uploads : tuple of StrayUpload
        Uploads to an object store that killed writers began and never finished. What they hold is not counted as freed.
    max_age : float
        Seconds; what is younger stays.
    """

    url: str
    replaced: tuple[Part, ...]
    unfinished: tuple[Leftover, ...]
    partials: tuple[str, ...]
    stamps: tuple[str, ...]
    freed: int
    young: int
    uploads: tuple[StrayUpload, ...] = ()
    max_age: float = 0.0

    def __str__(self) -> str:
        text = f"{self.url}: {count_of(len(self.replaced), 'replaced part')}, {count_of(len(self.unfinished), 'unfinished part')}"
        text += f" and {count_of(len(self.partials) + len(self.stamps), 'single file')}, {format_bytes(self.freed)}"
        if self.uploads:
            text += f"; and {count_of(len(self.uploads), 'unfinished upload')}"
        if self.young:
            are = "is" if self.young == 1 else "are"
            text += (
                f"; {count_of(self.young, 'part')} {are} too young to go: younger than {self.max_age:g} seconds (max_age={self.max_age:g})"
            )
        return text


def plan_gc(storage: Storage, groups: Iterable[tuple[GroupInfo, Listing]], *, max_age: float) -> GcSummary:
    """What would be removed. Reads names, sizes and times only.

    A replaced part is removed when a visible part with all its files replaces it, and the first commit that replaced it is older than
    `max_age`. Every part that it had replaced itself must be replaced by such a part too, or it would become visible again.

    Parameters
    ----------
    storage : Storage
    groups : iterable of (GroupInfo, Listing)
        All parts that can be read; damaged ones left out.
    max_age : float
        Seconds.
    """
    # With an age of 0 everything is removed, even what has a time in the future: a clock may have been set back.
    before = time.time() - max_age if max_age else math.inf
    planned_groups = list(groups)
    found = [_plan_group(storage, group, listing, before) for group, listing in planned_groups]
    root = tuple(_old_partials("", storage.scan(""), before))
    return GcSummary(
        url=storage.url,
        replaced=tuple(part for planned in found for part in planned.replaced),
        unfinished=tuple(left for planned in found for left in planned.unfinished),
        partials=(*root, *(key for planned in found for key in planned.partials)),
        stamps=tuple(key for planned in found for key in planned.stamps),
        freed=sum(planned.freed for planned in found),
        young=sum(planned.young for planned in found),
        uploads=tuple(_old_uploads(storage, [group.name for group, _ in planned_groups], before)),
        max_age=max_age,
    )


def _plan_group(storage: Storage, group: GroupInfo, listing: Listing, before: float) -> GcSummary:
    replaced, young = _replaced(storage, listing, before)
    committed = {part.info.name for part in (*listing.parts, *listing.annotations)}
    unfinished: list[Leftover] = []
    partials: list[str] = []
    freed = sum(part.info.files_nbytes + part.document_nbytes for part in replaced)
    signs = {folder: storage.scan(f"{group.name}/{folder}") for folder in (COMMITS, STAMPS)}
    was_committed = {name for found in signs.values() for name in found}
    for folder in (group.name, f"{group.name}/{ANNOTATIONS}"):
        entries = storage.scan(folder)
        partials += _old_partials(folder, entries, before)
        for name, entry in entries.items():
            if entry.is_file or name in committed or not PART_NAME.fullmatch(name) or storage.is_file(f"{folder}/{name}/zarr.json"):
                continue
            if name in was_committed:
                continue  # its commit was deleted by something else: `repair` tells what is lost
            if storage.leads_out(f"{folder}/{name}"):
                continue
            left, newest = find_leftover(storage, f"{folder}/{name}", entry)
            if newest is None or newest > before:
                young += 1
            else:
                unfinished.append(left)
                freed += left.nbytes
    named = {name for folder in (group.name, f"{group.name}/{ANNOTATIONS}") for name in storage.list(folder)}
    stamps = [
        f"{group.name}/{folder}/{name}"
        for folder, found in signs.items()
        for name, entry in found.items()
        if PART_NAME.fullmatch(name) and name not in named and entry.modified is not None and entry.modified <= before
    ]
    return GcSummary(
        url=storage.url,
        replaced=tuple(replaced),
        unfinished=tuple(unfinished),
        partials=tuple(partials),
        stamps=tuple(stamps),
        freed=freed,
        young=young,
    )


def _replaced(storage: Storage, listing: Listing, before: float) -> tuple[list[Part], int]:
    """Replaced parts that may be removed, in the order of their names; and how many are too young."""
    every = {part.info.name: part for part in (*listing.parts, *listing.annotations)}
    replaced = listing.replaced
    keepers = {name: part for name, part in every.items() if name not in replaced and part.info.replaces}
    sound = [part for part in keepers.values() if _all_there(storage, part)]
    covered = {name for part in sound for name in part.info.replaces}
    since: dict[str, float] = {}
    for part in every.values():
        if part.info.replaces and (moment := _commit_time(storage, part)) is not None:
            for name in part.info.replaces:
                since[name] = min(moment, since.get(name, moment))
    chosen, young = [], 0
    for name in sorted(replaced & every.keys()):
        part = every[name]
        if name not in covered or not {other for other in part.info.replaces if other in every} <= covered:
            continue
        if name in since and since[name] <= before and lies_within(storage, part):
            chosen.append(part)
        else:
            young += 1
    return chosen, young


def _commit_time(storage: Storage, part: Part) -> float | None:
    entry = storage.scan(part.path).get("zarr.json")
    return None if entry is None else entry.modified


def _all_there(storage: Storage, part: Part) -> bool:
    """Whether every file that a part's commit names is there with its length."""
    try:
        sizes = part.sizes()
    except (CorruptPartError, PartGoneError):
        return False
    return storage.sizes(part.path, sizes) == sizes


def _old_partials(folder: str, entries: dict[str, FileInfo], before: float) -> Iterator[str]:
    for name, entry in entries.items():
        if entry.is_file and PARTIAL.fullmatch(name) and entry.modified is not None and entry.modified <= before:
            yield f"{folder}/{name}" if folder else name


def _old_uploads(storage: Storage, groups: Iterable[str], before: float) -> Iterator[StrayUpload]:
    folders = {folder for group in groups for folder in (group, f"{group}/{ANNOTATIONS}")}
    for upload in storage.stray_uploads("") if folders else ():
        *above, name = upload.key.split("/")
        in_part = any("/".join(above[:n]) in folders and PART_NAME.fullmatch(above[n]) for n in range(1, len(above)))
        if in_part and _CHUNK.fullmatch(name) and upload.began is not None and upload.began <= before:
            yield upload


def find_leftover(storage: Storage, folder: str, entry: FileInfo) -> tuple[Leftover, float | None]:
    """What is ours in a part's folder, and when anything in it was last written; None where a file has no time."""
    files: list[str] = []
    folders = [folder]
    times: list[float | None] = [] if entry.modified is None else [entry.modified]
    nbytes = 0

    def take(key: str, found: dict[str, FileInfo], pattern: re.Pattern[str]) -> None:
        nonlocal nbytes
        for name, info in found.items():
            # Folders of object stores have no time of their own.
            times.extend([info.modified] if info.is_file or info.modified is not None else [])
            if info.is_file and pattern.fullmatch(name):
                files.append(f"{key}/{name}")
                nbytes += info.nbytes

    top = storage.scan(folder)
    take(folder, top, PARTIAL)
    for level in (f"{folder}/{name}" for name, info in top.items() if not info.is_file and name in LEVELS):
        if storage.leads_out(level):
            continue
        arrays = storage.scan(level)
        take(level, arrays, re.compile(rf"zarr\.json|{PARTIAL.pattern}"))
        inner = [f"{level}/{name}" for name, info in arrays.items() if not info.is_file and not storage.leads_out(f"{level}/{name}")]
        for array in inner:
            take(array, storage.scan(array), re.compile(rf"{_FILE}|{PARTIAL.pattern}"))
        folders += [level, *inner]
    known = [moment for moment in times if moment is not None]
    newest = max(known, default=0.0) if len(known) == len(times) else None
    return Leftover(folder=folder, files=tuple(files), folders=tuple(folders), nbytes=nbytes), newest


def remove_garbage(storage: Storage, summary: GcSummary) -> None:
    """Remove what a plan names; a folder that has been committed meanwhile stays."""
    # Parts that replace others last, so that nothing becomes visible again wherever this stops.
    for part in sorted(summary.replaced, key=lambda part: len(part.info.replaces)):
        remove_part(storage, part)
    empty = {f"{part.path}/{name}".rpartition("/")[0] for part in summary.replaced for name in part.info.file_names()}
    empty |= {folder for part in summary.replaced for folder in (part.path, *(f"{part.path}/{level}" for level in LEVELS))}
    for left in summary.unfinished:
        if storage.is_file(f"{left.folder}/zarr.json"):
            continue
        storage.remove(left.files)
        empty |= set(left.folders)
    storage.remove_folders(empty)
    storage.remove([*summary.partials, *summary.stamps])
    storage.abort_uploads(summary.uploads)


def collect_garbage(catalog: Catalog, *, max_age: float, dry_run: bool) -> GcSummary:
    """Remove the garbage of one root; with `dry_run` only plan it.

    Raises
    ------
    InvalidArgumentError
        `max_age` is no number of seconds.
    ReadOnlyError
    """
    if isinstance(max_age, bool) or not isinstance(max_age, (int, float)) or not max_age >= 0:
        raise InvalidArgumentError(f"max_age={max_age!r} is no age: give seconds, at least 0")
    catalog.check_writable()
    groups = [(info, catalog.listing(info, whole=False)) for info in catalog.groups(whole=False).values()]
    summary = plan_gc(catalog.storage, groups, max_age=float(max_age))
    if not dry_run:
        remove_garbage(catalog.storage, summary)
        for part in summary.replaced:
            catalog.forget(part.path)
        for info, _ in groups:
            drop_useless(catalog, info)
    return summary
