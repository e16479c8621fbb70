"""A part written again without some of it: the one place that opens a writer for upkeep."""

from __future__ import annotations

from collections.abc import Collection, Container
from contextlib import suppress

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GroupInfo, PartInfo, replacement_name
from lmprobe_zarr.store.parts import Part, PartWriter, open_view, read_batches
from lmprobe_zarr.typing import Ints

__all__ = ["write_again"]


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
