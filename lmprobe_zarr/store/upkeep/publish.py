"""A compacted, frozen copy of a store's visible contents at another place. Its root lists all parts and is written last.

Nothing of the copy is visible before its root is written. Parts carry a mark by which the next publication recognises and removes what an
interrupted one left; nothing else at that place is ever removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import LayerSpec, choose_layers, keys_of
from lmprobe_zarr.display import count_of, format_bytes, progress_bar
from lmprobe_zarr.errors import InvalidArgumentError, ModelNotStoredError, NotAStoreError
from lmprobe_zarr.pages import PUBLISHED, generator
from lmprobe_zarr.storage import HubDraft, HubStorage, Storage, open_storage
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    GROUP_NAME,
    PART_NAME,
    PUBLISHED_MARK,
    GroupInfo,
    PartInfo,
    Published,
    parse_group,
    parse_part,
    parse_root,
    published_document,
    replacement_name,
)
from lmprobe_zarr.store.parts import Catalog, Listing, Part, View, open_view, part_nbytes, read_batches
from lmprobe_zarr.store.upkeep.card import CardGroup, write_card
from lmprobe_zarr.store.upkeep.compact import COLUMN_BYTES, MergeRun, plan_runs
from lmprobe_zarr.store.upkeep.gc import PARTIAL, plan_gc, remove_garbage
from lmprobe_zarr.store.upkeep.removal import remove_part
from lmprobe_zarr.store.upkeep.rewrite import NewPart, new_writer, visible_pieces, write_rows
from lmprobe_zarr.typing import Ints

__all__ = ["PublishSummary", "Selection", "publish_groups", "publish_to", "select_from", "total_nbytes"]

CARD: Final = "README.md"
PAGE: Final = "index.html"
#: The head of a page says within so many bytes what wrote it.
_HEAD_BYTES: Final = 1024
#: Writes the page of a copy from its views, one for each group, and its URL.
CopyPage = Callable[[Sequence[View], str], str]
#: Temporary files at the root that a killed writer left.
_DRAFT: Final = re.compile(rf"\.(?:zarr\.json|{re.escape(CARD)}|{re.escape(PAGE)})\.[0-9a-f]{{12}}\.partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What of a group is published.

    Parameters
    ----------
    group : GroupInfo
    listing : Listing
        All parts of the group.
    keys : ndarray of uint64, optional
        The first 16 digits of the prompts, as numbers; None for all.
    layers : container of int, optional
        None for all.
    """

    group: GroupInfo
    listing: Listing
    keys: npt.NDArray[np.uint64] | None = None
    layers: Container[int] | None = None

    def rows(self, digests: npt.NDArray[np.uint8]) -> Ints:
        """Which of these prompts are selected."""
        return np.arange(len(digests)) if self.keys is None else np.flatnonzero(np.isin(keys_of(digests), self.keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSummary:
    """What was published. Prints well.

    Parameters
    ----------
    url : str
        Where.
    groups, parts, annotations : int
        Groups, parts with activations in them, and annotations, which hold columns only.
    prompts : int
        Prompts of all groups.
    nbytes : int
        Bytes as stored.
    """

    url: str
    groups: int
    parts: int
    prompts: int
    nbytes: int
    annotations: int = 0

    def __str__(self) -> str:
        held = count_of(self.parts, "part") + (f", {count_of(self.annotations, 'annotation')}" if self.annotations else "")
        return f"{self.url}: {count_of(self.prompts, 'prompt')} in {held}, {format_bytes(self.nbytes)}, published"


@dataclass
class _Copy:
    """What has been written at the target so far."""

    groups: dict[str, GroupInfo] = field(default_factory=dict)
    parts: dict[str, PartInfo] = field(default_factory=dict)

    @property
    def published(self) -> Published:
        names = {name: [key.removeprefix(f"{name}/") for key in self.parts if key.startswith(f"{name}/")] for name in self.groups}
        return Published(groups={name: tuple(keys) for name, keys in names.items()})


def publish_groups(
    source: Storage,
    target: Storage,
    selections: Sequence[Selection],
    *,
    part_bytes: int,
    text: bool,
    card: str | bool | None,
    overwrite: bool,
    shards: bool,
    durable: bool,
    advance: Callable[[int], None],
    licence: str | None = None,
    page: CopyPage | None = None,
) -> PublishSummary:
    """Write the copy, then its card and its page, then its root.

    Parameters
    ----------
    source, target : Storage
    selections : sequence of Selection
        One for each group.
    part_bytes : int
        Bytes of activations in one part, uncompressed.
    text : bool
        Whether the prompts' texts are published too.
    card : str or bool, optional
        The text of the card; None makes one, False leaves it out.
    overwrite : bool
        Whether a copy that is already published there is replaced.
    shards : bool
        Write many chunks of a layer to one file.
    durable : bool
        Flush every file.
    advance : callable
        Called with the number of bytes that were copied, uncompressed.
    licence : str, optional
        For the card.
    page : callable, optional
        Writes the page of the copy; None leaves it out.

    Raises
    ------
    InvalidArgumentError
        Something is published there already, or the place holds a store that is written to.
    NotAStoreError
        The place holds other files.
    """
    for selection in selections:
        if not selection.listing.parts or (selection.keys is not None and not len(selection.keys)):
            raise InvalidArgumentError(f"there is nothing of {selection.group.model!r} to publish: choose prompts that are stored")
    there = _prepare(target, overwrite=overwrite, page=page is not None)
    copy = _Copy()
    for selection in selections:
        group = selection.group
        copy.groups[group.name] = group
        target.commit(f"{group.name}/zarr.json", group.to_document(), durable=durable)
        view = open_view(source, group, selection.listing.parts, selection.listing.annotations)
        shown = {part.path: member >= 0 for part, member in zip(view.parts, view.members, strict=False)}
        tombstones = [note for note in view.annotations if note.info.is_tombstone]
        write = partial(_write, source, target, selection, part_bytes=part_bytes, text=text, shards=shards, durable=durable)
        for run in _runs(selection, part_bytes):
            pieces = {part.path: visible_pieces(part, tombstones, shown[part.path]) for part in run.parts if part.path in shown}
            if not any(found is not None for found in pieces.values()):
                copy.parts |= dict(write(run.parts, run.parts[-1].info.name))
            else:
                # What a tombstone hides is left out, so the copy needs none.
                for part in run.parts:
                    name = part.info.name
                    for piece in pieces[part.path] or [NewPart(rows=np.arange(len(part.info.digests)), without=frozenset(), layers=None)]:
                        for key, info in write([part], name, piece):
                            copy.parts[key], name = info, info.name
            advance(run.nbytes)
    views = [_view_of(target, selection.group, copy) for selection in selections]
    described = [CardGroup.of(view, sum(part.info.files_nbytes for part in (*view.parts, *view.annotations))) for view in views]
    if card is None or isinstance(card, str):
        target.commit(CARD, (card or write_card(described, target.url, text=text, licence=licence)).encode(), durable=durable)
    if page is not None:
        target.commit(PAGE, page(views, target.url).encode(), durable=durable)
    target.commit("zarr.json", published_document(copy.published, copy.groups, copy.parts), durable=durable)
    if there.old is not None:
        _remove_old(target, there.old, copy)
    if there.has_page and page is None:
        target.remove([PAGE])  # that of an earlier copy
    nbytes = sum(info.files_nbytes for info in copy.parts.values())
    prompts = sum(group.prompts for group in described)
    notes = sum(info.kind == "annotation" for info in copy.parts.values())
    parts = len(copy.parts) - notes
    return PublishSummary(url=target.url, groups=len(copy.groups), parts=parts, annotations=notes, prompts=prompts, nbytes=nbytes)


def _runs(selection: Selection, part_bytes: int) -> Iterator[MergeRun]:
    """All that is visible of a group, as runs that become one part each, in the order of the names of parts and annotations."""
    listing, replaced = selection.listing, selection.listing.replaced
    still = Listing(parts=listing.parts, annotations=listing.annotations, names=frozenset())  # what is unfinished will not be published
    runs = {run.parts[-1].path: run for run in plan_runs(selection.group, still, part_bytes=part_bytes)}
    inside = {part.path for run in runs.values() for part in run.parts}
    for part in sorted((*listing.parts, *listing.annotations), key=lambda part: part.info.name):
        if part.path in runs:
            yield runs[part.path]
        elif part.path not in inside and part.info.name not in replaced and not part.info.is_tombstone:
            yield MergeRun(group=selection.group.name, parts=(part,), nbytes=part_nbytes(part))


def _write(
    source: Storage,
    target: Storage,
    selection: Selection,
    parts: Sequence[Part],
    name: str,
    piece: NewPart | None = None,
    *,
    part_bytes: int,
    text: bool,
    shards: bool,
    durable: bool,
) -> Iterator[tuple[str, PartInfo]]:
    """Write the parts of a run as one behind a name, or as several where they are too large; yields their keys and records.

    With `piece` only that of them.
    """
    infos = [part.info for part in parts]
    view = open_view(source, selection.group, parts, [])
    rows, layers, without = selection.rows(view.digests), selection.layers, frozenset(() if text else ("prompts/text",))
    if piece is not None:
        rows, without = np.intersect1d(rows, piece.rows), without | piece.without
        if piece.layers is not None:
            layers = piece.layers if layers is None else frozenset(layer for layer in piece.layers if layer in layers)
    if not len(rows) or (piece is not None and piece.layers is not None and not layers):
        return
    if len(parts) == 1 and part_nbytes(parts[0]) <= part_bytes:
        writer = new_writer(
            target,
            selection.group,
            infos,
            replacement_name(name),
            durable=durable,
            recorded={PUBLISHED_MARK: True},
            alone=True,
            shards=shards,
        )
        yield writer.path, write_rows(writer, source, parts[0], rows, without=without, layers=layers)
        return
    batches = read_batches(view, rows, layers=layers, without=without)
    batch = next(batches, None)
    while batch is not None:
        # Each part sorts right behind the one before, and all of them at the place of the run.
        name = replacement_name(name)
        recorded = {PUBLISHED_MARK: True}
        with new_writer(target, selection.group, infos, name, durable=durable, recorded=recorded, alone=True, shards=shards) as writer:
            while batch is not None:
                writer.append(batch)
                batch = next(batches, None)
                if batch is not None and (writer.nbytes + batch.nbytes > part_bytes or writer.held_nbytes > COLUMN_BYTES):
                    break
            info = writer.commit()
        yield writer.path, info


def _view_of(target: Storage, group: GroupInfo, copy: _Copy) -> View:
    mine = [Part(target, key, info) for key, info in copy.parts.items() if info.group == group.name]
    return open_view(target, group, [p for p in mine if p.info.kind == "part"], [p for p in mine if p.info.kind == "annotation"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """What lies at the place of a copy before it is written.

    Parameters
    ----------
    old : Published, optional
        The copy that is published there.
    groups : list of str
    left : list of Part
        Parts that an interrupted publication left.
    has_page : bool
        Whether there is a page that a publication wrote.
    """

    old: Published | None
    groups: list[str]
    left: list[Part]
    has_page: bool


def _check_free(target: Storage, *, overwrite: bool, page: bool) -> _There:
    """Check that a copy, with or without a page, may be written there."""
    names = [name for name in target.list("") if not _DRAFT.fullmatch(name)]
    groups = [name for name in names if GROUP_NAME.fullmatch(name)]
    has_page = PAGE in names and generator(PUBLISHED).encode() in target.read_current(PAGE)[:_HEAD_BYTES]
    try:
        old = parse_root(target.read_current("zarr.json"), target.url)
    except (FileNotFoundError, NotADirectoryError):
        old = None
        known = {*groups, *([CARD] if groups or overwrite else []), *([PAGE] if has_page else [])}
        strange = [name for name in names if name not in known]
        if strange or target.is_file(""):
            what = repr(strange[0]) if strange else "a file"
            raise NotAStoreError(f"{target.url} holds other things ({what}): give a new or empty place to publish to") from None
    else:
        if old is None:
            raise InvalidArgumentError(f"{target.url} is a store that grows, not a published copy: give another place to publish to")
        if not overwrite:
            raise InvalidArgumentError(f"{target.url} is published already: give another place, or overwrite=True")
        if page and PAGE in names and not has_page:
            raise InvalidArgumentError(f"{target.url} holds an {PAGE} of somebody else: move it away, or publish with page=False")
    kept = {f"{group}/{key}" for group, keys in (old.groups if old else {}).items() for key in keys}
    left = [part for group in groups for part in _committed(target, group) if part.path not in kept]
    foreign = next((part for part in left if PUBLISHED_MARK not in part.info.recorded), None)
    if foreign is not None:
        raise NotAStoreError(f"{target.url} holds parts of a store ({foreign.path!r}): give a new or empty place to publish to")
    return _There(old=old, groups=groups, left=left, has_page=has_page)


def _prepare(target: Storage, *, overwrite: bool, page: bool) -> _There:
    """Check that a copy may be written there, and remove what an interrupted publication left."""
    there = _check_free(target, overwrite=overwrite, page=page)
    for part in there.left:
        remove_part(target, part)
    target.remove([name for name in target.list("") if _DRAFT.fullmatch(name)])
    for group in there.groups:
        # Where not even the group's document was committed, its temporary file may have been left.
        target.remove([f"{group}/{name}" for name in target.list(group) if PARTIAL.fullmatch(name)])
        with suppress(FileNotFoundError):
            info = parse_group(target.read(f"{group}/zarr.json"), f"{target.url}/{group}")
            remove_garbage(target, plan_gc(target, [(info, Listing(parts=(), annotations=(), names=frozenset()))], max_age=0.0))
    return there


def _committed(target: Storage, group: str) -> Iterator[Part]:
    for folder in (group, f"{group}/{ANNOTATIONS}"):
        for name in target.list(folder):
            if PART_NAME.fullmatch(name):
                with suppress(FileNotFoundError):
                    path = f"{folder}/{name}"
                    yield Part(target, path, parse_part(target.read(f"{path}/zarr.json"), f"{target.url}/{path}"))


def _remove_old(target: Storage, old: Published, copy: _Copy) -> None:
    """Remove what only an earlier copy held: its root has been replaced, so nobody opens it any more."""
    for group, keys in old.groups.items():
        for key in keys:
            path = f"{group}/{key}"
            with suppress(FileNotFoundError):
                if path not in copy.parts:
                    remove_part(target, Part(target, path, parse_part(target.read(f"{path}/zarr.json"), f"{target.url}/{path}")))
        if group not in copy.groups:
            target.remove([f"{group}/zarr.json"])


def total_nbytes(selections: Sequence[Selection]) -> int:
    """Bytes that will be copied, uncompressed."""
    listings = [selection.listing for selection in selections]
    every = [(listing, part) for listing in listings for part in (*listing.parts, *listing.annotations)]
    return sum(part_nbytes(part) for listing, part in every if part.info.name not in listing.replaced)


def select_from(
    catalog: Catalog, groups: Sequence[GroupInfo], prompts: Iterable[Any] | None = None, layers: LayerSpec | None = None
) -> list[Selection]:
    """Select what is copied of some groups of one root: everything, or only some prompts and layers.

    Raises
    ------
    MissingPromptsError, LayerOutOfRangeError
    """
    chosen = []
    for info in groups:
        keys, wanted = None, None
        if prompts is not None or layers is not None:
            view = catalog.view(info)
            keys = None if prompts is None else keys_of(view.digests[view.select(prompts)])
            if layers is not None:
                wanted = choose_layers(view.all_layers(), layers, where=view.where, num_layers=info.num_layers)
        chosen.append(Selection(group=info, listing=catalog.listing(info), keys=keys, layers=wanted))
    return chosen


def publish_to(
    catalog: Catalog,
    url: str | os.PathLike[str],
    selections: Sequence[Selection],
    *,
    part_bytes: int,
    text: bool,
    card: str | bool | None,
    overwrite: bool,
    shards: bool,
    storage_options: Mapping[str, Any] | None,
    progress: bool,
    licence: str | None = None,
    private: bool | None = None,
    page: CopyPage | None = None,
) -> PublishSummary:
    """Open the target, and write a copy of what was selected from one root; for the arguments see `publish_groups`.

    Raises
    ------
    ModelNotStoredError
        Nothing was selected.
    """
    if not selections:
        raise ModelNotStoredError(f"{catalog.url} holds nothing yet: extract something into it first")
    target = open_storage(url, storage_options)
    write = partial(
        publish_groups,
        catalog.storage,
        selections=selections,
        part_bytes=part_bytes,
        text=text,
        card=card,
        overwrite=overwrite,
        shards=shards,
        durable=catalog.durable,
        licence=licence,
        page=page,
    )
    if isinstance(target, HubStorage):
        return _publish_to_hub(target, selections, write, overwrite=overwrite, page=page is not None, private=private, progress=progress)
    if private is not None:
        raise InvalidArgumentError(
            f"private= is for repositories of the Hugging Face Hub, and {target.url} is another place: who may read is set there"
        )
    with progress_bar(total_nbytes(selections), description="publish", unit="B", enabled=progress) as advance:
        return write(target, advance=advance)


def _publish_to_hub(
    target: HubStorage,
    selections: Sequence[Selection],
    write: Callable[..., PublishSummary],
    *,
    overwrite: bool,
    page: bool,
    private: bool | None,
    progress: bool,
) -> PublishSummary:
    """Write the copy to a temporary folder, and that to a repository of the Hub; its last commit brings the root and removes old parts."""
    target.make_repo(private)
    there = _check_free(target, overwrite=overwrite, page=page)

    def is_old(key: str) -> bool:
        return GROUP_NAME.fullmatch(key.partition("/")[0]) is not None or (key == PAGE and there.has_page)

    with HubDraft(target) as draft:
        with progress_bar(total_nbytes(selections), description="publish", unit="B", enabled=progress) as advance:
            summary = write(draft, advance=advance)
        with progress_bar(summary.nbytes, description="upload", unit="B", enabled=progress) as advance:
            draft.upload((CARD, PAGE, "zarr.json"), is_old, advance)
    return summary
