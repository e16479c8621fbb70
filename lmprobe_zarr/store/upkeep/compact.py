"""Merges many small parts into few large ones, and leaves the view exactly as it is. Plans on records first, then writes; deletes nothing.

The order of parts and annotations decides what a view shows. A merged part sorts right after the last part that it replaces, so merging
moves the others behind everything in between. Parts are merged only where this provably changes nothing; see `plan_runs`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import decode_role_names, keys_of
from lmprobe_zarr.display import count_of, format_bytes, progress_bar
from lmprobe_zarr.errors import InvalidArgumentError, PartGoneError
from lmprobe_zarr.log import LOGGER_NAME
from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import COLUMN, MADE_BY_WRITER, PART_VERSION, STAMPS, ArrayInfo, GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import Catalog, Listing, Part, open_view, part_nbytes, read_batches
from lmprobe_zarr.store.upkeep.removal import remove_part
from lmprobe_zarr.store.upkeep.rewrite import new_writer
from lmprobe_zarr.typing import Mask

__all__ = ["CompactPlan", "MergeRun", "check_min_parts", "compact_groups", "merge_run", "plan_runs", "shape_key"]

logger = logging.getLogger(LOGGER_NAME)

# Texts and columns are held in memory until their part is committed. A run that would hold more is halved.
COLUMN_BYTES: Final = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRun:
    """Parts, or annotations, that are merged into one.

    Parameters
    ----------
    group : str
        Folder of their group.
    parts : tuple of Part
        In the order of their names.
    nbytes : int
        About how many bytes the new part holds uncompressed.
    """

    group: str
    parts: tuple[Part, ...]
    nbytes: int

    def halves(self) -> list[MergeRun]:
        """The run as two runs; a half with a single part is left out."""
        middle = len(self.parts) // 2
        pieces = [self.parts[:middle], self.parts[middle:]]
        return [MergeRun(group=self.group, parts=p, nbytes=sum(map(part_nbytes, p))) for p in pieces if len(p) > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactPlan:
    """What a compaction would merge, or has merged. Prints well.

    Parameters
    ----------
    url : str
        The store.
    parts : int
        Visible parts and annotations before.
    runs : tuple of MergeRun
        Each is merged into one part. A run of one part is written again in the newest format.
    left : tuple of MergeRun
        Planned runs that were not merged, because another process changed them meanwhile.
    """

    url: str
    parts: int
    runs: tuple[MergeRun, ...]
    left: tuple[MergeRun, ...] = field(default=())

    @property
    def parts_after(self) -> int:
        """Visible parts and annotations afterwards."""
        return self.parts - sum(len(run.parts) - 1 for run in self.runs)

    @property
    def nbytes(self) -> int:
        """About how many bytes are written again, uncompressed."""
        return sum(run.nbytes for run in self.runs)

    def __str__(self) -> str:
        become = "becomes" if self.parts == 1 else "become"
        text = f"{self.url}: {count_of(self.parts, 'part')} {become} {self.parts_after}, {format_bytes(self.nbytes)} written again"
        upgraded = sum(len(run.parts) == 1 for run in self.runs)
        if upgraded:
            text += f"; {upgraded} of them only change their format"
        if self.left:
            text += f"; {len(self.left)} runs were changed by another process meanwhile and stay as they are"
        return text


def shape_key(info: PartInfo) -> tuple[Any, ...]:
    """What parts must have in common to be merged: kind, layers, and the name, dimensions, dtypes and row shape of every array."""
    arrays = frozenset(
        (key, a.dims, a.dtype, a.row_shape, a.attributes.get("stored_dtype"), _described(a.attributes.get(COLUMN)), _names_roles(a))
        for key, a in info.arrays.items()
    )
    compressed = frozenset(a.shuffle is not None for a in info.arrays.values())
    return info.kind, info.layers, info.n_tokens is None, arrays, compressed


def _names_roles(info: ArrayInfo) -> bool:
    """Whether an array says which roles its codes mean. Which these are may differ: a merged part has codes for all."""
    return info.dims == ("token",) and decode_role_names(info.attributes) is not None


def _described(column: object) -> str:
    """What an array says of its column, without what differs from part to part: how many values are missing, and the text for them."""
    each = {key: value for key, value in column.items() if key not in ("missing", "missing_text")} if isinstance(column, dict) else {}
    return json.dumps(each, sort_keys=True)


def plan_runs(group: GroupInfo, listing: Listing, *, part_bytes: int, min_parts: int = 2) -> list[MergeRun]:
    """The runs of parts and annotations of a group that can be merged; pure.

    A run of **parts** consists of neighbours of equal shape (`shape_key`). Each part holds every variable and layer of its prompts, so the
    last part that holds a prompt replaces the others for it. The merged part holds the union of the prompts, in the order in which they
    first appear. A run ends

    * before a part of another shape: it could replace values of the first part and be replaced by the second, and its prompts would come
      before those of the first;
    * before an annotation that shares a column and a prompt with the run so far: the merged part would override it; or before a tombstone
      that shares a prompt;
    * where parts of the run disagree on a prompt's number of tokens, and the last agrees with the parts before the run: tokens that the
      disagreement made invalid would be valid again;
    * where the name of an unfinished part sorts in between, because its contents are unknown;
    * at a part larger than half of `part_bytes`, and where the sum would exceed `part_bytes`.

    A run of **annotations** has equal columns. Parts and other annotations may sort in between, unless they share a column and a prompt
    with the run before them.

    Parameters
    ----------
    group : GroupInfo
    listing : Listing
    part_bytes : int
        The largest size of a merged part, uncompressed.
    min_parts : int
        Runs of fewer parts are not merged.
    """
    replaced = listing.replaced
    parts = [part for part in listing.parts if part.info.name not in replaced]
    notes = [part for part in listing.annotations if part.info.name not in replaced]
    timeline = _Timeline(parts, notes)
    found = [*_part_runs(timeline, parts, notes, listing.unfinished, part_bytes), *_note_runs(timeline, parts, notes, listing.unfinished)]
    runs = [MergeRun(group=group.name, parts=tuple(run), nbytes=sum(map(part_nbytes, run))) for run in found]
    return [run for run in runs if len(run.parts) >= max(2, min_parts)]


class _Timeline:
    """The prompts of each part and annotation, numbered over all of them."""

    def __init__(self, parts: Sequence[Part], notes: Sequence[Part]) -> None:
        every = [*parts, *notes]
        keys = np.concatenate([np.zeros(0, np.uint64), *(keys_of(part.info.digests) for part in every)])
        codes, uniques = pd.factorize(keys)
        self.n = len(uniques)
        bounds = np.cumsum([0, *(len(part.info.digests) for part in every)])
        self.rows = {part.path: codes[a:b] for part, a, b in zip(every, bounds[:-1], bounds[1:], strict=True)}

    def clash(self, held: Mask, columns: frozenset[str], part: Part) -> bool:
        """Whether a part has one of some columns, and one of the prompts in `held`; a tombstone may hide anything of them."""
        return (part.info.is_tombstone or bool(columns & _columns(part))) and bool(held[self.rows[part.path]].any())


def _columns(part: Part) -> frozenset[str]:
    return frozenset(key for key, a in part.info.arrays.items() if len(a.dims) == 1 and key.startswith("prompts/")) - MADE_BY_WRITER


def _part_runs(
    timeline: _Timeline, parts: Sequence[Part], notes: Sequence[Part], unfinished: Sequence[str], part_bytes: int
) -> Iterator[list[Part]]:
    counts = np.zeros(timeline.n, np.int64)  # tokens of each prompt by the parts so far
    before, changed, held = counts.copy(), np.zeros(timeline.n, bool), np.zeros(timeline.n, bool)
    run: list[Part] = []
    size = 0
    for part in parts:
        nbytes, rows, info = part_nbytes(part), timeline.rows[part.path], part.info
        if run:
            low, high = run[-1].info.name, info.name
            between = [note for note in notes if low < note.info.name < high] if notes else []
            columns = _columns(run[0])
            fits = shape_key(info) == shape_key(run[0].info) and size + nbytes <= part_bytes
            fits = fits and not any(low < name < high for name in unfinished)
            fits = fits and not any(timeline.clash(held, columns, note) for note in between)
            if fits and info.n_tokens is not None:
                differ = held[rows] & (counts[rows] != info.n_tokens)
                fits = not ((differ | changed[rows]) & (info.n_tokens == before[rows])).any()
                changed[rows] |= differ
            if not fits:
                yield run
                run, size = [], 0
        if not run:
            before = counts.copy()
            changed[:] = held[:] = False
        if info.n_tokens is not None:
            counts[rows] = info.n_tokens
        if nbytes > part_bytes // 2:
            if run:
                yield run
            run, size = [], 0
            continue
        run.append(part)
        held[rows] = True
        size += nbytes
    if run:
        yield run


def _note_runs(timeline: _Timeline, parts: Sequence[Part], notes: Sequence[Part], unfinished: Sequence[str]) -> Iterator[list[Part]]:
    open_runs: dict[tuple[Any, ...], tuple[list[Part], Mask]] = {}
    every: list[tuple[str, Part | None]] = [(part.info.name, part) for part in (*parts, *notes)]
    for _, part in sorted([*every, *((name, None) for name in unfinished)], key=lambda item: item[0]) if notes else ():
        mine = None if part is None or part.info.kind != "annotation" or part.info.is_tombstone else shape_key(part.info)
        for key, (run, held) in list(open_runs.items()):
            if key != mine and (part is None or timeline.clash(held, _columns(run[0]), part)):
                del open_runs[key]
                yield run
        if part is not None and mine is not None:
            run, held = open_runs.setdefault(mine, ([], np.zeros(timeline.n, bool)))
            run.append(part)
            held[timeline.rows[part.path]] = True
    for run, _ in open_runs.values():
        yield run


def merge_run(
    storage: Storage,
    group: GroupInfo,
    run: MergeRun,
    list_parts: Callable[[], Listing],
    *,
    durable: bool,
    known: set[str],
    shards: bool = False,
) -> tuple[list[MergeRun], list[MergeRun]]:
    """Write a run as one part that replaces it; returns the merged runs and those that were not merged.

    A run is not merged if another process has meanwhile replaced or removed one of its parts, or begun a part whose name sorts within the
    run. This is checked right before the commit and again right after it; then the commit is undone.

    Parameters
    ----------
    storage, group, run
    list_parts : callable
        Lists the parts of the group as they are now.
    durable : bool
        Flush what is written before it is committed.
    known : set of str
        All names in the group's folder when the run was planned; that of the new part is added.
    shards : bool
        Write many chunks of a layer to one file.
    """
    infos = [part.info for part in run.parts]
    there = list_parts().names
    replaced = (name for info in infos for name in info.replaces if name in there)
    replaces = tuple(dict.fromkeys([*(info.name for info in infos), *replaced]))
    writer = new_writer(storage, group, infos, replacement_name(infos[-1].name), durable=durable, replaces=replaces, shards=shards)
    known.add(writer.name)
    info, too_large = None, False
    with suppress(PartGoneError), writer:
        view = open_view(storage, group, run.parts, [])
        for batch in read_batches(view, np.arange(len(view))):
            writer.append(batch)
            if too_large := writer.held_nbytes > COLUMN_BYTES and len(run.parts) > 1:
                break
        if not too_large and _unchanged(storage, run, list_parts(), known):
            info = writer.commit()
    if too_large:
        results = [merge_run(storage, group, half, list_parts, durable=durable, known=known, shards=shards) for half in run.halves()]
        return [merged for done, _ in results for merged in done], [half for _, left in results for half in left]
    if info is None:
        return [], [run]
    if not _unchanged(storage, run, list_parts(), known | {info.name}, besides=info.name):
        remove_part(storage, Part(storage, writer.path, info))
        return [], [run]
    _carry_stamp(storage, run, info)
    logger.debug("merged %d parts of %s into %s", len(run.parts), group.model, info.name)
    return [run], []


def _unchanged(storage: Storage, run: MergeRun, listing: Listing, known: set[str], besides: str = "") -> bool:
    """Whether all parts of a run are still stored and visible, and no new name sorts within it."""
    mine = {part.info.name for part in run.parts}
    low, high = run.parts[0].info.name, run.parts[-1].info.name
    if any(low < name < high for name in listing.names - known):
        return False
    others = [part for part in (*listing.parts, *listing.annotations) if part.info.name != besides]
    if not mine <= {part.info.name for part in others} or any(mine & set(part.info.replaces) for part in others):
        return False
    there = [False] * len(run.parts)

    def check(i: int, part: Part) -> None:
        there[i] = storage.is_file(f"{part.path}/zarr.json")

    run_all([partial(check, i, part) for i, part in enumerate(run.parts)], storage.pace)
    return all(there)


def _carry_stamp(storage: Storage, run: MergeRun, info: PartInfo) -> None:
    """Mark the merged part as used if a part of the run was; errors are ignored."""
    with suppress(OSError):
        if {part.info.name for part in run.parts} & set(storage.list(f"{run.group}/{STAMPS}")):
            storage.touch(f"{run.group}/{STAMPS}/{info.name}")


def check_min_parts(min_parts: int) -> None:
    """Raise where `min_parts` is not a number of parts that can be merged."""
    if isinstance(min_parts, bool) or not isinstance(min_parts, int) or min_parts < 2:
        raise InvalidArgumentError(f"min_parts={min_parts!r} is no number of parts to merge: give at least 2")


def _upgrades(group: GroupInfo, listing: Listing, runs: Sequence[MergeRun]) -> list[MergeRun]:
    """A run for each visible part of an older format that no run merges."""
    merged = {part.path for run in runs for part in run.parts}
    every = (part for part in (*listing.parts, *listing.annotations) if part.info.name not in listing.replaced)
    old = [part for part in every if part.path not in merged and part.info.version < PART_VERSION]
    return [MergeRun(group=group.name, parts=(part,), nbytes=part_nbytes(part)) for part in old]


def compact_groups(
    catalog: Catalog,
    groups: Sequence[GroupInfo],
    *,
    part_bytes: int,
    min_parts: int,
    shards: bool,
    upgrade: bool,
    dry_run: bool,
    progress: bool,
) -> CompactPlan:
    """Merge the small parts of some groups of one root; with `dry_run` only plan it.

    Parameters
    ----------
    catalog, groups
    part_bytes, min_parts : int
        See `plan_runs`.
    shards : bool
        Write many chunks of a layer to one file.
    upgrade : bool
        Write every part of an older format again, whether it is merged or not.
    dry_run : bool
        Only report what would be merged.
    progress : bool
        Show a progress bar.
    """
    found = [(info, catalog.listing(info)) for info in groups]
    planned = [(info, listing, plan_runs(info, listing, part_bytes=part_bytes, min_parts=min_parts)) for info, listing in found]
    if upgrade:
        planned = [(info, listing, [*runs, *_upgrades(info, listing, runs)]) for info, listing, runs in planned]
    visible = sum(part.info.name not in listing.replaced for _, listing in found for part in (*listing.parts, *listing.annotations))
    runs = tuple(run for _, _, runs in planned for run in runs)
    if dry_run:
        return CompactPlan(url=catalog.url, parts=visible, runs=runs)
    done, left = [], []
    total = sum(run.nbytes for run in runs)
    with progress_bar(total, description="compact", unit="B", enabled=progress and bool(runs)) as advance:
        for info, listing, group_runs in planned:
            known = set(listing.names)
            for run in group_runs:
                list_parts = partial(catalog.listing, info)
                merged, stayed = merge_run(catalog.storage, info, run, list_parts, durable=catalog.durable, known=known, shards=shards)
                done += merged
                left += stayed
                advance(run.nbytes)
    return CompactPlan(url=catalog.url, parts=visible, runs=tuple(done), left=tuple(left))
