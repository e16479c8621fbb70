"""Parts copied into another store: only what it lacks. Reads both stores, writes to the target, deletes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import keys_of
from lmprobe_zarr.display import count_of, format_bytes, progress_bar
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError
from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import ANNOTATIONS, LEVELS, GroupInfo, Level, is_intact, is_variable, replacement_name
from lmprobe_zarr.store.parts import Catalog, Listing, Part, PartWriter, View, note_commit, open_view, part_nbytes, write_group
from lmprobe_zarr.store.upkeep.publish import Selection, total_nbytes
from lmprobe_zarr.store.upkeep.rewrite import NewPart, new_writer, visible_pieces, write_rows
from lmprobe_zarr.store.upkeep.tombstones import hidden_in, rows_over, write_tombstone
from lmprobe_zarr.typing import Buffer, Ints, Mask

__all__ = ["CopySummary", "check_copy", "copy_group", "copy_selections"]
Keys = npt.NDArray[np.uint64]

_MARK = "copied_from"
_SHARDS_AT_A_TIME: Final = 2


class MakeWriter(Protocol):
    """Makes the writer of a new part of a group at the target."""

    def __call__(self, info: GroupInfo, /, *, kind: str, compressed: bool, recorded: dict[str, Any]) -> PartWriter: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySummary:
    """What was copied. Prints well.

    Parameters
    ----------
    url : str
        Where to.
    copied : int
        Parts and annotations that were copied whole.
    rewritten : int
        Parts and annotations that were written for what was missing of others.
    there : int
        Parts and annotations of which nothing was missing.
    nbytes : int
        About how many bytes were copied, uncompressed.
    """

    url: str
    copied: int = 0
    rewritten: int = 0
    there: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        text = f"{self.url}: {count_of(self.copied, 'part')} copied, {self.rewritten} written for what was missing, "
        text += format_bytes(self.nbytes)
        return f"{text}; {self.there} {'was' if self.there == 1 else 'were'} there"

    def __add__(self, other: CopySummary) -> CopySummary:
        return CopySummary(
            url=self.url,
            copied=self.copied + other.copied,
            rewritten=self.rewritten + other.rewritten,
            there=self.there + other.there,
            nbytes=self.nbytes + other.nbytes,
        )


def copy_group(
    source: Storage,
    target: Storage,
    group: GroupInfo,
    here: Listing,
    there: Listing,
    keys: Keys | None,
    make_writer: MakeWriter,
    *,
    durable: bool,
    advance: Callable[[int], None],
) -> CopySummary:
    """Copy what the target lacks of a group.

    A part of which the target has nothing is copied byte by byte under its own name, so it keeps its rank. Of other parts, only what is
    missing is written, as new parts: whole prompts with their columns, or the missing variables and layers of prompts that are there.
    Parts that were copied before are recognised by name, so an interrupted copy continues where it stopped.

    Parameters
    ----------
    source, target : Storage
    group : GroupInfo
    here, there : Listing
        The parts of the group in both.
    keys : ndarray of uint64, optional
        Only these prompts.
    make_writer : callable
        Makes the writer of a new part at the target.
    durable : bool
        Flush every file.
    advance : callable
        Called with the number of bytes that were dealt with, uncompressed.
    """
    view = open_view(source, group, here.parts, here.annotations)
    mine = {part.info.name for part in view.parts}
    held = {part.info.name for part in (*there.parts, *there.annotations)}
    others = open_view(target, group, [part for part in there.parts if part.info.name not in mine - there.replaced], [])
    known = np.concatenate([keys_of(others.digests), *(keys_of(part.info.digests) for part in view.parts if part.info.name in held)])
    total = CopySummary(url=target.url)
    later: list[Part] = []
    tombstones = [note for note in view.annotations if note.info.is_tombstone]
    hidden = {part.path: hidden_in(part.info, [note for note in tombstones if note.order > part.order]) for part in view.parts}
    for part in view.parts:
        if part.info.name in held:
            total += CopySummary(url=target.url, there=1)
        elif keys is None and not (held & set(part.info.replaces)) and all(m.all() for m in _lacking(others, part).values()):
            if hidden[part.path]:
                _copy_visible(source, target, group, part, visible_pieces(part, tombstones, _shown(view, part)) or [], durable=durable)
            else:
                _copy_part(source, target, group, part, durable=durable)
            known = np.concatenate([known, keys_of(part.info.digests)])
            total += CopySummary(url=target.url, copied=1, nbytes=part_nbytes(part))
        else:
            later.append(part)
            continue
        advance(part_nbytes(part))
    for part in later:
        columns = {key for key, _ in hidden[part.path]} & set(part.info.own_columns)
        total += _write_missing(source, target, group, view, others, part, keys, known, make_writer, columns)
        advance(part_nbytes(part))
    copied_notes = {note.info.recorded.get(_MARK) for note in there.annotations}
    for note in view.annotations:
        rows = np.arange(len(note.info.digests)) if keys is None else np.flatnonzero(np.isin(keys_of(note.info.digests), keys))
        if note.info.is_tombstone:
            _hide_copies(target, group, note, [part for part in view.parts if part.info.name in held], others, durable=durable)
            continue
        if note.info.name in held | copied_notes or not len(rows):
            total += CopySummary(url=target.url, there=1)
        elif keys is None:
            _copy_part(source, target, group, note, durable=durable)
            total += CopySummary(url=target.url, copied=1, nbytes=part_nbytes(note))
        else:
            _rewrite(source, group, note, rows, (), None, make_writer)
            total += CopySummary(url=target.url, rewritten=1)
        advance(part_nbytes(note))
    return total


def _variables(part: Part) -> Iterator[tuple[Level, str, tuple[int, ...]]]:
    """Level, name and layers of every variable of a part; no layers where it has none."""
    for level in LEVELS:
        for name, array in part.info.variables(level).items():
            if is_variable(name, array):
                yield level, name, part.info.layers if array.layered else ()


def _lacking(others: View, part: Part) -> dict[str, Mask]:
    """What of a part a view does not hold: for each variable (layer, prompt), one layer where it has none."""
    rows = others.find([row.tobytes().hex() for row in part.info.digests])
    found: dict[str, Mask] = {"": (rows < 0)[None]}
    for level, name, layers in _variables(part):
        lacks = np.ones((max(1, len(layers)), len(rows)), bool)
        lacks[:, rows >= 0] = ~others.covers(level, name, rows[rows >= 0], layers)
        found[f"{level}/{name}"] = lacks
    return found


def _wins(view: View, part: Part, level: Level, name: str, layers: tuple[int, ...]) -> Mask:
    """Where the view takes its values from this part; shapes as in `_lacking`."""
    member = view.members[[other.path for other in view.parts].index(part.path)]
    array = view.source(level, name, member, layers)
    place = [stored.path.removesuffix(f"/{level}/{name}") for stored in array.arrays].index(part.path)
    wins = np.asarray((array.source == place)[array.classes] if layers else array.source[:1] == place, bool)
    return wins & (member >= 0)


def _shown(view: View, part: Part) -> Mask:
    """Which prompts of a part are in the view: not those of which tombstones hide everything."""
    return np.asarray(view.members[[other.path for other in view.parts].index(part.path)] >= 0)


def _hide_copies(target: Storage, group: GroupInfo, tombstone: Part, copied: Sequence[Part], others: View, *, durable: bool) -> None:
    """Hide at the target what was copied there before it was replaced here; never what the target holds of its own."""
    info = tombstone.info
    rows = rows_over(info, info.removed, [part for part in copied if part.order < tombstone.order])
    rows = rows[others.find([info.digests[row].tobytes().hex() for row in rows]) < 0] if len(rows) else rows
    names = target.list(f"{group.name}/{ANNOTATIONS}")
    if len(rows) and not any(name.startswith(f"{info.name}.") for name in names):
        write_tombstone(target, group, info, rows, info.removed, durable=durable, replaces=False)


def _write_missing(
    source: Storage,
    target: Storage,
    group: GroupInfo,
    view: View,
    others: View,
    part: Part,
    keys: Keys | None,
    known: Keys,
    make_writer: MakeWriter,
    hidden: Collection[str],
) -> CopySummary:
    """Write what is missing of a part: prompts that lack the same become one new part. Columns in `hidden` are left out."""
    own = keys_of(part.info.digests)
    wanted = _shown(view, part) if keys is None else _shown(view, part) & np.isin(own, keys)
    lacking = _lacking(others, part)
    is_new = lacking.pop("")[0] & ~np.isin(own, known)
    names = list(lacking)
    for level, name, layers in _variables(part):
        lacking[f"{level}/{name}"] &= _wins(view, part, level, name, layers)
    depth = max([len(part.info.layers), 1])
    pattern = np.zeros((len(own), len(names), depth), bool)
    for i, name in enumerate(names):
        pattern[:, i, : len(lacking[name])] = lacking[name].T
    written = 0
    columns = {f"prompts/{n}" for n, a in part.info.variables("prompts").items() if not is_variable(n, a)}
    flat = np.concatenate([is_new[:, None], pattern.reshape(len(own), -1)], axis=1)
    kinds, codes = np.unique(flat, axis=0, return_inverse=True)
    for k, kind in enumerate(kinds):
        rows = np.flatnonzero((codes.reshape(-1) == k) & wanted)
        cube = kind[1:].reshape(len(names), depth)
        new = bool(kind[0])
        if not len(rows) or not kind.any():
            continue
        # Variables that lack the same layers are written together.
        sets: dict[tuple[int, ...] | None, list[str]] = {}
        for name, missing in zip(names, cube, strict=True):
            layered = part.info.arrays[name].layered
            if missing.any():
                sets.setdefault(tuple(part.info.layers[i] for i in np.flatnonzero(missing)) if layered else None, []).append(name)
        if None in sets and len(sets) > 1:
            sets[next(key for key in sets if key is not None)] += sets.pop(None)
        for some, keep in sets.items() or ([(None, [])] if new else []):
            without = set(names) - set(keep) | (set(hidden) if new else columns)
            _rewrite(source, group, part, rows, without, some, make_writer)
            written += 1
    if not written:
        return CopySummary(url=target.url, there=1)
    return CopySummary(url=target.url, rewritten=written, nbytes=part_nbytes(part) * int(wanted.sum()) // len(own))


def _rewrite(
    source: Storage,
    group: GroupInfo,
    part: Part,
    rows: Ints,
    without: Collection[str],
    layers: tuple[int, ...] | None,
    make_writer: MakeWriter,
) -> None:
    recorded = {**part.info.recorded, _MARK: part.info.name}
    writer = make_writer(group, kind=part.info.kind, compressed=part.info.compressed, recorded=recorded)
    write_rows(writer, source, part, rows, without=without, layers=layers)


def _copy_part(source: Storage, target: Storage, group: GroupInfo, part: Part, *, durable: bool) -> None:
    """All files of a part, checked against its table on the way; its commit last.

    Another process may be copying the same part, and may have committed it before this one is through. So each file is written whole or not
    at all.
    """
    write_group(target, group, durable=durable)
    if target.is_file(f"{part.path}/zarr.json"):
        return

    def copy(name: str, check: Callable[[Buffer], bool]) -> None:
        data = source.read(f"{part.path}/{name}")
        if not check(data):
            raise CorruptPartError.of(source.url, part.path, f"{name} of part {part.path!r} of {source.url} is damaged: it was not copied")
        target.commit(f"{part.path}/{name}", data, durable=durable)

    jobs = [partial(copy, name, partial(is_intact, name, entry=entry)) for name, entry in part.info.files.items()]
    shards: list[Callable[[], None]] = []
    for key, array in ((key, part.files_of(key)) for key in part.info.tables or ()):
        chunks = [partial(copy, f"{key}/{file}", partial(array.is_intact, file)) for file in array.info.file_names()]
        (shards if array.info.shard_blocks else jobs).extend(chunks)
    pace = (source if target.is_local else target).pace
    run_all(jobs, pace)
    # Each is held in memory, and may have hundreds of MiB.
    for each in range(0, len(shards), _SHARDS_AT_A_TIME):
        run_all(shards[each : each + _SHARDS_AT_A_TIME], pace)
    target.commit(f"{part.path}/zarr.json", source.read(f"{part.path}/zarr.json"), durable=durable, replace=False)
    note_commit(target, group.name, part.info.name)


def _copy_visible(source: Storage, target: Storage, group: GroupInfo, part: Part, pieces: Sequence[NewPart], *, durable: bool) -> None:
    """What is not hidden of a part, in its place in the order."""
    write_group(target, group, durable=durable)
    name = part.info.name
    for piece in pieces:
        writer = new_writer(target, group, [part.info], replacement_name(name), durable=durable, recorded={_MARK: part.info.name})
        name = writer.name
        write_rows(writer, source, part, piece.rows, without=piece.without, layers=piece.layers)


def check_copy(source: Catalog, target: Catalog) -> None:
    """Raise where the target cannot be written to, or is the source itself."""
    target.check_writable()
    if target.url == source.url:
        raise InvalidArgumentError(f"{source.url} cannot be copied into itself: give another place")


def copy_selections(source: Catalog, target: Catalog, selections: Sequence[Selection], *, progress: bool) -> CopySummary:
    """Copy what the target lacks of what was selected from one root; see `copy_group`."""
    total = CopySummary(url=target.url)
    with progress_bar(total_nbytes(selections), description="copy", unit="B", enabled=progress) as advance:
        for chosen in selections:
            total += copy_group(
                source.storage,
                target.storage,
                chosen.group,
                chosen.listing,
                target.listing(chosen.group),
                chosen.keys,
                target.new_part,
                durable=target.durable,
                advance=advance,
            )
    return total
