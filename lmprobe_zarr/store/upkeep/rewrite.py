"""A part written again without some of its prompts, variables or layers; the old part stays until its caller removes it."""

from __future__ import annotations

from collections.abc import Collection, Container

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import Part, PartWriter, open_view, read_batches
from lmprobe_zarr.typing import Ints

__all__ = ["write_again", "write_rows"]


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
        Its prompts to write.
    durable : bool
        Flush it before it is committed.
    without, layers
        What is left out, and what is kept; see `store.parts.read_batches`.
    after : str
        Name that the new part sorts right behind; by default that of the old one.
    name : str
        The new part's own name, where it is known already.
    replaces : bool
        Whether the new part replaces the old one.
    """
    info = part.info
    writer = PartWriter(
        storage,
        group,
        name or replacement_name(after or info.name),
        kind=info.kind,
        compressed=info.compressed,
        durable=durable,
        replaces=(info.name, *info.replaces) if replaces else (),
        recorded=info.recorded,
    )
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
    with writer:
        for batch in read_batches(open_view(source, writer.group, [part], []), rows, without=without, layers=layers):
            writer.append(batch)
        return writer.commit()
