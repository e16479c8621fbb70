"""Parts written again: what a new part takes over from the old ones, and a part without some of its prompts, variables or layers.

Never removes a part: the old one stays until the caller removes it.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import Part, PartWriter, committed_at, merged_order, open_view, read_batches
from lmprobe_zarr.store.upkeep.tombstones import write_tombstone
from lmprobe_zarr.typing import Ints

__all__ = ["new_writer", "write_again", "write_rows"]


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
    )


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
    with writer:
        for batch in read_batches(open_view(source, writer.group, [part], []), rows, without=without, layers=layers):
            writer.append(batch)
        return writer.commit()
