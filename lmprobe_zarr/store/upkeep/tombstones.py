"""Tombstones: small documents that keep hidden what a removed part had replaced, written before the part is removed.

A later part wins over earlier ones. Where it is removed, the values below it would be visible again, although somebody has replaced them.
A tombstone has the place of the removed part in the order, and wins with nothing. It is useless once no earlier part holds what it hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import TokenBatch, keys_of
from lmprobe_zarr.errors import PartGoneError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import NO_LAYER, Catalog, Cell, Part, PartWriter, open_view, read_column, visible_parts
from lmprobe_zarr.store.upkeep.removal import remove_part
from lmprobe_zarr.typing import Ints

__all__ = ["BELOW", "Removed", "drop_useless", "hidden_in", "keep_columns", "removed_of", "rows_over", "write_tombstone"]

#: By key of the variable or column: the layers, or None where it has none.
Removed = Mapping[str, tuple[int, ...] | None]
#: Recorded in a tombstone that hides values of a root below, which this root alone does not show.
BELOW = "hides_below"


def removed_of(info: PartInfo) -> dict[str, tuple[int, ...] | None]:
    """Everything that a part's removal takes away, without columns."""
    return {key: info.layers if array.layered else None for key, array in info.activations.items()}


def rows_over(info: PartInfo, removed: Removed, lower: Iterable[Part]) -> Ints:
    """The prompts of a part of which an earlier part holds what is removed, or tokens of another number, which would be valid again."""
    keys = pd.Index(keys_of(info.digests))
    over = np.zeros(len(keys), bool)
    for part in lower:
        other = part.info
        shares = any(_holds(other, key, layers) for key, layers in removed.items())
        recounts = info.n_tokens is not None and other.n_tokens is not None and any(key.startswith("tokens/") for key in removed)
        if not shares and not recounts:
            continue
        at = np.asarray(keys.get_indexer(pd.Index(keys_of(other.digests))), np.int64)
        there = at >= 0
        if not shares and info.n_tokens is not None and other.n_tokens is not None:
            there[there] = info.n_tokens[at[there]] != other.n_tokens[there]
        over[at[there]] = True
    return np.flatnonzero(over)


def _holds(info: PartInfo, key: str, layers: tuple[int, ...] | None) -> bool:
    array = info.arrays.get(key)
    return array is not None and (layers is None or not array.layered or not set(layers).isdisjoint(info.layers))


def hidden_in(info: PartInfo, tombstones: Iterable[Part]) -> dict[Cell, Ints]:
    """The prompts of a part whose value of a variable and layer, or of a column, is hidden by later tombstones."""
    keys = pd.Index(keys_of(info.digests))
    hidden: dict[Cell, list[Ints]] = {}
    for tombstone in tombstones:
        other = tombstone.info
        at = np.asarray(keys.get_indexer(pd.Index(keys_of(other.digests))), np.int64)
        rows = at[at >= 0]
        if not len(rows):
            continue
        for key, layers in other.removed.items():
            if _holds(info, key, layers):
                for layer in (NO_LAYER,) if layers is None else sorted(set(layers) & set(info.layers)):
                    hidden.setdefault((key, layer), []).append(rows)
        if info.n_tokens is not None and other.n_tokens is not None:
            recounted = rows[info.n_tokens[rows] != other.n_tokens[at >= 0]]
            for key, array in info.activations.items() if len(recounted) else ():
                if key.startswith("tokens/"):
                    for layer in info.layers if array.layered else (NO_LAYER,):
                        hidden.setdefault((key, layer), []).append(recounted)
    return {cell: np.unique(np.concatenate(rows)) for cell, rows in hidden.items()}


def write_tombstone(
    storage: Storage,
    group: GroupInfo,
    info: PartInfo,
    rows: Ints,
    removed: Removed,
    *,
    durable: bool,
    replaces: bool,
    below: bool = False,
    after: str = "",
) -> PartInfo:
    """Hide what earlier parts hold of some prompts of a part.

    Parameters
    ----------
    storage, group
    info : PartInfo
        The part that is about to be removed, or an earlier tombstone.
    rows : ndarray of int
        Which of its prompts.
    removed : mapping
        Which variables and columns, see `PartInfo.removed`.
    durable : bool
        Flush it before it is committed.
    replaces : bool
        Whether it replaces the part.
    below : bool
        Whether it hides values of a root below.
    after : str
        Name that it sorts right behind; by default the part's own.
    """
    recorded = {**({"written": info.recorded["written"]} if "written" in info.recorded else {}), **({BELOW: True} if below else {})}
    writer = PartWriter(
        storage,
        group,
        replacement_name(after or info.name),
        kind="annotation",
        durable=durable,
        replaces=(info.name, *info.replaces) if replaces else (),
        recorded=recorded,
        removed=removed,
        removed_counts=None if info.n_tokens is None else info.n_tokens[rows],
    )
    with writer:
        writer.append(TokenBatch(sha256=[info.digests[row].tobytes().hex() for row in rows]))
        return writer.commit()


def keep_columns(storage: Storage, group: GroupInfo, part: Part, *, durable: bool, replaces: bool) -> PartInfo:
    """Write the user's own columns of a part as an annotation in its place.

    Raises
    ------
    CorruptPartError, PartGoneError
        A column cannot be read; nothing is written.
    """
    info = part.info
    view, rows = open_view(storage, group, [part], []), np.arange(len(info.digests))
    names = [key.partition("/")[2] for key in info.own_columns]
    columns = {name: read_column(view, name, rows) for name in names}
    recorded = {"written": info.recorded["written"]} if "written" in info.recorded else {}
    writer = PartWriter(
        storage,
        group,
        replacement_name(info.name),
        kind="annotation",
        compressed=info.compressed,
        durable=durable,
        replaces=(info.name, *info.replaces) if replaces else (),
        recorded=recorded,
    )
    with writer:
        writer.append(TokenBatch(sha256=[row.tobytes().hex() for row in info.digests], prompt_columns=columns))
        return writer.commit()


def drop_useless(catalog: Catalog, group: GroupInfo, *, below: Sequence[Catalog] = ()) -> list[PartInfo]:
    """Remove tombstones under which no earlier part holds anything any more; returns them.

    Replaced parts that are still stored count as well, since they are visible again if the part that replaced them is lost.
    """
    parts, notes = catalog.parts_and_annotations(group, whole=False, tables=True)
    tombstones = [note for note in notes if note.info.is_tombstone]
    gone = []
    for tombstone in tombstones:
        lower = [part for part in (*parts, *notes) if part.order < tombstone.order and not part.info.is_tombstone]
        if tombstone.info.recorded.get(BELOW):
            if not below:
                continue  # what is below is unknown here
            lower += [part for other in below for part in visible_parts(other, group)]
        if not len(rows_over(tombstone.info, tombstone.info.removed, lower)):
            with suppress(PartGoneError):
                remove_part(catalog.storage, tombstone)
            catalog.forget(tombstone.path)
            gone.append(tombstone.info)
    return gone
