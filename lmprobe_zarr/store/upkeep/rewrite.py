"""Parts written again: what a new part takes over from the old ones, and a part without some of its prompts, variables or layers.

Never removes a part: the old one stays until the caller removes it.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import COLUMN, GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import NO_LAYER, Cell, Part, PartWriter, committed_at, merged_order, open_view, read_batches
from lmprobe_zarr.store.upkeep.tombstones import hidden_in, write_tombstone
from lmprobe_zarr.typing import Ints, Mask

__all__ = ["NewPart", "new_writer", "split_part", "visible_pieces", "write_again", "write_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPart:
    """A new part with some of what a part holds: some prompts, without some arrays, and only some layers (None for all)."""

    rows: Ints
    without: frozenset[str]
    layers: frozenset[int] | None


def split_part(
    info: PartInfo, lost: Mapping[Cell, Ints], *, columns: Collection[str] = (), made: Collection[str] = (), rows: Ints | None = None
) -> tuple[NewPart | None, tuple[NewPart, ...]]:
    """How a part is written again without some of its values: as one part that holds its prompts in their order, and parts for the rest.

    Parameters
    ----------
    info : PartInfo
    lost : mapping of Cell to ndarray of int
        Prompts of the part whose value of a variable and layer is left out.
    columns, made : collection of str
        Columns that are left out; and those that the writer makes again.
    rows : ndarray of int, optional
        Prompts that are written; by default all.

    Returns
    -------
    NewPart or None
        None where nothing is left that could stand for the part.
    tuple of NewPart
    """
    every = np.arange(len(info.digests)) if rows is None else rows
    variables, own, affected = set(info.activations), set(info.own_columns), {key for key, _ in lost}
    # Layers that keep the same prompts of the same variables are written to one part.
    kept: dict[tuple[str, bytes], set[int]] = {}
    for key in sorted(affected):
        for layer in info.layers if info.arrays[key].layered else (NO_LAYER,):
            stays = np.setdiff1d(every, lost.get((key, layer), np.zeros(0, np.int64)))
            if len(stays):
                kept.setdefault((key, stays.tobytes()), set()).add(layer)
    together: dict[tuple[bytes, frozenset[int]], set[str]] = {}
    for (key, which), layers in kept.items():
        together.setdefault((which, frozenset(layers)), set()).add(key)
    described = {"prompts/text", "prompts/prompt_length"} | own
    others = tuple(
        NewPart(
            rows=np.frombuffer(which, np.int64),
            without=frozenset((variables - keys) | described | set(columns) | set(made)),
            layers=None if NO_LAYER in layers else layers,
        )
        for (which, layers), keys in together.items()
    )
    if len(every) and (variables - affected or others or (({"prompts/text"} | own) & set(info.arrays)) - set(columns)):
        return NewPart(rows=every, without=frozenset(affected | set(columns) | set(made)), layers=None), others
    return None, ()


def visible_pieces(part: Part, tombstones: Iterable[Part], shown: Mask) -> list[NewPart] | None:
    """How a part is written again without what tombstones hide of it; None where they hide nothing.

    Parameters
    ----------
    part : Part
    tombstones : iterable of Part
        Those of its group.
    shown : ndarray of bool, shape (prompt,)
        Which of its prompts are in the view at all.
    """
    info = part.info
    hidden = hidden_in(info, [note for note in tombstones if note.order > part.order])
    if not hidden:
        return None
    rows = np.flatnonzero(shown)
    cells = {cell: gone for cell, gone in hidden.items() if cell[0] in info.activations}
    columns = {key: gone for (key, _), gone in hidden.items() if key in info.own_columns}
    main, others = split_part(info, cells, columns=columns, rows=rows)
    pieces = [*([] if main is None else [main]), *others]
    everything = frozenset({*info.activations, *info.own_columns, "prompts/text", "prompts/prompt_length"})
    for key, gone in columns.items():
        stays = np.setdiff1d(rows, gone)
        if len(stays):
            pieces.append(NewPart(rows=stays, without=everything - {key}, layers=None))
    return pieces


def new_writer(
    storage: Storage,
    group: GroupInfo,
    infos: Sequence[PartInfo],
    name: str,
    *,
    durable: bool,
    replaces: tuple[str, ...] = (),
    recorded: Mapping[str, Any] | None = None,
    alone: bool = False,
    shards: bool | None = None,
) -> PartWriter:
    """A writer for a part that is made from others of one kind and shape.

    Parameters
    ----------
    storage, group
        Where the new part goes.
    infos : sequence of PartInfo
        The parts that it is made from, at least one.
    name : str
        The new part's name.
    durable, replaces, alone
        As for `store.parts.PartWriter`.
    shards : bool, optional
        Likewise; by default as the old parts are written.
    recorded : mapping, optional
        Recorded in addition to what all of the old parts record alike, and to when the last of them was written.
    """
    first = infos[0].recorded
    alike = {key: value for key, value in first.items() if all(info.recorded.get(key) == value for info in infos)}
    last = max(infos, key=committed_at).recorded
    written = {"written": last["written"]} if "written" in last else {}
    # Where only some of the values are an extraction's, no extraction gives all of them again.
    written |= {mark: info.recorded[mark] for info in infos for mark in ("imported_from", "written_by") if mark in info.recorded}
    return PartWriter(
        storage,
        group,
        name,
        kind=infos[0].kind,
        compressed=infos[0].compressed,
        durable=durable,
        replaces=replaces,
        recorded={**alike, **written, **(recorded or {})},
        alone=alone,
        order=merged_order(infos),
        shards=any(info.has_shards for info in infos) if shards is None else shards,
        bare_texts=_bare_texts(infos),
    )


def _bare_texts(infos: Sequence[PartInfo]) -> set[str]:
    """Columns of texts of which no part says so: early writers did not."""
    texts = [(key, COLUMN in array.attributes) for info in infos for key, array in info.own_columns.items() if array.dtype == "string"]
    return {key for key, _ in texts} - {key for key, is_told in texts if is_told}


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
    replaces: bool = True,
) -> PartInfo:
    """Write a new part with only some of what a part holds.

    Parameters
    ----------
    storage, group, part
    rows : ndarray of int
        Numbers of the prompts to write.
    durable : bool
        Flush it before it is committed.
    without, layers
        Arrays to leave out, and layers to keep; see `store.parts.read_batches`.
    after : str
        Name of the part that the new one sorts right behind; by default that of the old one.
    name : str
        The new part's own name, if it is known already.
    replaces : bool
        Whether the new part replaces the old one.
    """
    info = part.info
    if info.is_tombstone:
        return write_tombstone(storage, group, info, rows, info.removed, durable=durable, replaces=replaces, after=after)
    old = (info.name, *info.replaces) if replaces else ()
    writer = new_writer(storage, group, [info], name or replacement_name(after or info.name), durable=durable, replaces=old)
    return write_rows(writer, storage, part, rows, without=without, layers=layers)


def write_rows(
    writer: PartWriter, source: Storage, part: Part, rows: Ints, *, without: Collection[str] = (), layers: Container[int] | None = None
) -> PartInfo:
    """Write some prompts of a part with a new writer, and commit it; after an error nothing of the new part is left.

    Parameters
    ----------
    writer : PartWriter
        Of the same group; it may write to another place.
    source : Storage
        Where the part is stored.
    part, rows, without, layers
        See `write_again`.
    """
    writer.order = merged_order([part.info])
    moved = frozenset(movable(writer, part, rows, layers)) - frozenset(without)
    with writer:
        for batch in read_batches(open_view(source, writer.group, [part], []), rows, without=moved.union(without), layers=layers):
            writer.append(batch)
        for key in sorted(moved):
            writer.adopt(part.array_of(key), part.info.layers, odd_of(part.info, key))
        return writer.commit()


def movable(writer: PartWriter, part: Part, rows: Ints, layers: Container[int] | None) -> Iterable[str]:
    """Variables of which a new part takes over whole chunks as they are: those of a part of format 2 whose prompts all stay in their order.

    Not from a local disk to another place or back, since their chunks have other sizes; and not where nobody counted odd values.
    """
    info = part.info
    is_whole = layers is None and len(rows) == len(info.digests) and np.array_equal(rows, np.arange(len(rows)))
    alike = part.storage.is_local == writer.storage.is_local
    return info.tables if info.tables and info.odd is not None and is_whole and alike and writer.version == info.version else ()


def odd_of(info: PartInfo, key: str) -> tuple[int, int]:
    """What a part that has counted says of the odd values of a variable."""
    not_finite, blank = (info.odd or {}).get(key, (0, 0))
    return int(not_finite), int(blank)
