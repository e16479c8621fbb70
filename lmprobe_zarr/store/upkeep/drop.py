"""Drops variables: every part that holds them is written again without them. Everything else looks as before."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from lmprobe_zarr.batch import LayerSpec, choose_layers
from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import LEVELS, GroupInfo
from lmprobe_zarr.store.parts import Catalog, Listing, Part
from lmprobe_zarr.store.upkeep.removal import check_removable, remove_part
from lmprobe_zarr.store.upkeep.rewrite import write_again

__all__ = ["drop_from", "drop_variables"]


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of a part: variables `dropped` are removed from it, in all its layers but `kept`."""

    part: Part
    dropped: frozenset[str]
    kept: frozenset[int]

    @property
    def others(self) -> frozenset[str]:
        return frozenset(self.part.info.activations) - self.dropped


def _change(part: Part, names: Collection[str], layers: Collection[int] | None) -> _Change | None:
    info = part.info
    held = [key for key in info.activations if key.partition("/")[2] in names]
    if layers is not None:
        held = [key for key in held if info.arrays[key].layered] if set(layers) & set(info.layers) else []
    if not held:
        return None
    return _Change(part, frozenset(held), frozenset(info.layers).difference(layers) if layers is not None else frozenset())


def drop_variables(
    storage: Storage, group: GroupInfo, listing: Listing, names: Collection[str], layers: Collection[int] | None, *, durable: bool
) -> int:
    """Take variables out of every part of a group, physically; returns how many parts held any.

    A part that is left without activations and without a column of the user's is removed whole where none of its prompts is in a part that
    stays. Otherwise it stays with its columns, so that the order and the texts of the others stay. If this is interrupted, a second call
    completes it.

    Parameters
    ----------
    storage, group, listing
    names : collection of str
        Variables, of whatever level.
    layers : collection of int, optional
        Only these layers of them.
    durable : bool
        Flush what is written again before it is committed.
    """
    replaced = listing.replaced
    changes = [change for part in listing.parts if (change := _change(part, names, layers)) is not None]
    check_removable(storage, [change.part for change in changes])
    # Replaced parts are removed whole, and first: they must not become visible again when the part that replaces them is removed.
    for change in changes:
        if change.part.info.name in replaced:
            remove_part(storage, change.part)
    todo = [change for change in changes if change.part.info.name not in replaced]
    emptied = _emptied(todo, [part for part in listing.parts if part.info.name not in replaced])
    for change in todo:
        if change.part.path in emptied:
            for other in listing.parts:
                if other.info.name in change.part.info.replaces:
                    remove_part(storage, other)
        else:
            _write(storage, group, change, durable=durable)
        remove_part(storage, change.part)
    return len(changes)


def _emptied(changes: list[_Change], shown: list[Part]) -> set[str]:
    """Keys of the parts that are removed whole."""
    candidates = {c.part.path: c.part for c in changes if not c.others and not c.kept and not c.part.info.own_columns}
    staying = {row.tobytes() for part in shown if part.path not in candidates for row in part.info.digests}
    while True:
        kept = [path for path, part in candidates.items() if any(row.tobytes() in staying for row in part.info.digests)]
        if not kept:
            return set(candidates)
        for path in kept:
            staying.update(row.tobytes() for row in candidates.pop(path).info.digests)


def _write(storage: Storage, group: GroupInfo, change: _Change, *, durable: bool) -> None:
    """Write one part, or two where some variables keep fewer layers than others."""
    part, info = change.part, change.part.info
    rows = np.arange(len(info.digests))
    if not change.kept:
        write_again(storage, group, part, rows, durable=durable, without=change.dropped)
        return
    if not any(info.arrays[key].layered for key in change.others):
        write_again(storage, group, part, rows, durable=durable, layers=change.kept)
        return
    # The first repeats values of the part and sorts right behind it; the second replaces the part and sorts behind both.
    columns = {"prompts/text", "prompts/prompt_length", *info.own_columns}
    first = write_again(storage, group, part, rows, durable=durable, without=change.others | columns, layers=change.kept, replaces=False)
    write_again(storage, group, part, rows, durable=durable, without=change.dropped, after=first.name)


def drop_from(catalog: Catalog, group: GroupInfo, variables: Iterable[str], layers: LayerSpec | None) -> int:
    """Take variables, or some layers of them, out of every part of a group in one root; returns how many parts held any.

    Raises
    ------
    InvalidArgumentError
        A variable is not stored; nothing is dropped.
    LayerOutOfRangeError
    """
    names = set(variables)
    view = catalog.view(group)
    held = sorted({name for level in LEVELS for name in view.variables(level)})
    if absent := sorted(names - set(held)):
        near = nearest(absent[0], held)
        raise InvalidArgumentError(f"{absent[0]!r} is not stored in {view.where}{near}, which holds {', '.join(held) or 'none'}")
    chosen = None
    if layers is not None:
        chosen = choose_layers(view.all_layers(), layers, where=view.where, num_layers=group.num_layers)
    concerned = 0
    while True:
        listing = catalog.listing(group)
        count = drop_variables(catalog.storage, group, listing, names, chosen, durable=catalog.durable)
        for part in listing.parts if count else ():
            catalog.forget(part.path)
        concerned += count
        # Another process may have merged parts that held them meanwhile, so look again; a merge that ends after this look undoes itself.
        if not count:
            return concerned
