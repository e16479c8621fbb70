"""Prompts deleted: every part that holds one is written again without it, or removed whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmprobe_zarr.batch import HASH_DIGITS
from lmprobe_zarr.errors import ReadOnlyError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import ANNOTATIONS, GroupInfo
from lmprobe_zarr.store.parts import Catalog, Part, open_view
from lmprobe_zarr.store.upkeep.removal import check_removable, remove_part
from lmprobe_zarr.store.upkeep.rewrite import write_again

__all__ = ["delete_from", "delete_prompts"]


def delete_prompts(storage: Storage, group: GroupInfo, parts: Sequence[Part], digests: Iterable[str], *, durable: bool) -> int:
    """Take prompts out of every part and annotation of a group, physically; returns how many parts held any.

    A part that holds other prompts too is written again without the deleted ones. Its commit replaces the old part, whose bytes are removed
    afterwards. If this is interrupted, a second call completes it.

    Parameters
    ----------
    storage : Storage
    group : GroupInfo
    parts : sequence of Part
        All parts and annotations of the group, replaced ones too.
    digests : iterable of str
        Whole digests of the prompts.
    durable : bool
        Flush what is written again before it is committed.
    """
    # By their hashes, which no two prompts of a group share: a part may know no more of a prompt than that.
    unwanted = {bytes.fromhex(digest[:HASH_DIGITS]) for digest in digests}
    replaced = {name for part in parts for name in part.info.replaces}
    concerned = 0
    check_removable(storage, [p for p in parts if any(row[: HASH_DIGITS // 2].tobytes() in unwanted for row in p.info.digests)])
    # Replaced parts are removed whole, and first: they must not become visible again when the part that replaces them is removed.
    for part in sorted(parts, key=lambda p: p.info.name not in replaced):
        keep = np.array([row[: HASH_DIGITS // 2].tobytes() not in unwanted for row in part.info.digests])
        if keep.all():
            continue
        concerned += 1
        if part.info.name in replaced:
            remove_part(storage, part)
            continue
        if keep.any():
            write_again(storage, group, part, np.flatnonzero(keep), durable=durable)
        else:
            for other in (p for p in parts if p.info.name in part.info.replaces):
                remove_part(storage, other)
        remove_part(storage, part)
    return concerned


def delete_from(catalog: Catalog, group: GroupInfo, prompts: Iterable[Any], *, below: Sequence[Catalog] = ()) -> int:
    """Delete prompts from every part of a group in one root, physically; returns how many parts held any.

    Parameters
    ----------
    catalog : Catalog
        The root.
    group : GroupInfo
    prompts : iterable of str or sequence of int
        Texts, hashes or token ids.
    below : sequence of Catalog
        Roots that are read together with this one, and never written to.

    Raises
    ------
    MissingPromptsError
        A prompt is not stored; nothing is deleted.
    ReadOnlyError
        A root below holds a prompt, which would stay visible; nothing is deleted.
    """
    lower = [part for other in below for part in other.parts_and_annotations(group)[0]]
    # Replaced parts too: those that an interrupted deletion has replaced but not removed still hold the prompts.
    parts = [replace(part, info=replace(part.info, replaces=())) for part in (*lower, *_all_parts(catalog, group))]
    held = open_view(catalog.storage, group, parts, [])
    rows = held.select(prompts)
    digests = [held.digests[row].tobytes().hex() for row in rows]
    for other in below:
        if group.name not in other.groups():
            continue
        staying = np.flatnonzero(other.view(group).find(digests) >= 0)
        if len(staying):
            raise ReadOnlyError(
                f"{len(staying)} of {len(rows)} prompts are stored in {other.url} (first {held.hashes[rows[staying[0]]]}), which is only "
                f"read here, so nothing was deleted: delete them there, with open_store({other.url!r})"
            )
    concerned = 0
    while True:
        parts = _all_parts(catalog, group)
        count = delete_prompts(catalog.storage, group, parts, digests, durable=catalog.durable)
        for part in parts if count else ():
            catalog.forget(part.path)
        concerned += count
        # Another process may have merged parts that held them meanwhile, so look again; a merge that ends after this look undoes itself.
        if not count:
            return concerned


def _all_parts(catalog: Catalog, group: GroupInfo) -> list[Part]:
    """Parts and annotations of a group, replaced ones too. Always lists both folders, so that no new part is missed."""
    return [*catalog.list_parts(group.name), *catalog.list_parts(f"{group.name}/{ANNOTATIONS}")]
