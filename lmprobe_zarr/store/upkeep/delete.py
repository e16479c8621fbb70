"""TODO: lmprobe_zarr/store/upkeep/delete.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import Part
from lmprobe_zarr.store.upkeep.removal import check_removable, remove_part
from lmprobe_zarr.store.upkeep.rewrite import write_again

__all__ = ["delete_prompts"]


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
