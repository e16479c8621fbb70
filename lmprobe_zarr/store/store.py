"""`Store`: the groups and parts below one root, its lazy views, and the door through which parts get in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr import config
from lmprobe_zarr.batch import LayerSpec, TokenBatch, keys_of
from lmprobe_zarr.display import Html, card, escape, section, table, visible
from lmprobe_zarr.errors import (
    CorruptPartError,
    InvalidArgumentError,
    InvalidTypeError,
    LmprobeZarrError,
    ModelNotStoredError,
    ReadOnlyError,
    UnreachableError,
)
from lmprobe_zarr.log import warn
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.storage import Storage, open_storage, run_all
from lmprobe_zarr.store.choice import ambiguous, choose_group, named_model
from lmprobe_zarr.store.contents import GroupContents, describe_view
from lmprobe_zarr.store.datasets import choose_layers, to_dataset
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    GROUP_NAME,
    LEVELS,
    PART_NAME,
    STAMPS,
    GroupInfo,
    Level,
    Provenance,
    new_part_name,
    parse_group,
    parse_part,
    validate_column_names,
)
from lmprobe_zarr.store.parts import FrozenStorage, Listing, Part, PartWriter, View, as_column, list_names, open_view, write_group
from lmprobe_zarr.store.roots import Mode, open_root, options_for
from lmprobe_zarr.store.upkeep import (
    CompactPlan,
    CopySummary,
    Entry,
    GcSummary,
    PublishSummary,
    RepairSummary,
    Selection,
    VerifySummary,
    check_files,
    copy_group,
    delete_prompts,
    describe_entries,
    drop_variables,
    merge_run,
    plan_gc,
    plan_runs,
    publish_groups,
    remove_garbage,
    repair_store,
    scan_store,
    stamp_parts,
    total_nbytes,
    verify_stores,
)
from lmprobe_zarr.typing import Array, Ints

__all__ = ["LIMIT_SHARE", "Place", "Store", "open_store"]
Chunks = Literal["auto"] | int | Mapping[str, Any] | None

PART_BYTES: Final = 2**30
PUBLISHED_PART_BYTES: Final = 2**33
# A part is evicted as a whole: no larger share of a cache's limit than this one.
LIMIT_SHARE: Final = 50
# How many groups a notebook shows with all that they hold.
SHOWN_GROUPS: Final = 20


def open_store(
    url: Place = None,
    mode: Mode | None = None,
    *,
    storage_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    durable: bool = True,
) -> Store:
    """A store of activations. Nothing is written by opening one.

    Parameters
    ----------
    url : str, path, Store, or a sequence of these, optional
        A folder, or a URL that fsspec knows (``s3://bucket/prefix``, ``memory://…``; of web addresses, published copies). None is the
        default store: that of `set_cache_backend` or ``$LMPROBE_CACHE_BACKEND``, else ``$LMPROBE_CACHE_DIR/.zarr``. The cache's settings
        rule it.
        Several are read as one, where a later one wins over those before it, whenever it was written; only the last is written to.
    mode : {"a", "r"}, optional
        ``"a"`` reads and adds, and makes the store at the first write; ``"r"`` never writes anything. By default ``"r"`` for web addresses
        and published copies, which cannot be written, else ``"a"``. Of several it is that of the last: the others are never written to,
        whatever is said here.
    storage_options : mapping or sequence of mappings, optional
        Passed to the fsspec file system, for example ``{"anon": True}`` or ``{"key": …, "secret": …, "endpoint_url": …}``. Of several
        places, one mapping is for all that are URLs, and a sequence has one, or None, for each.
    durable : bool
        Flush every part to the medium before it becomes visible (local folders).

    Returns
    -------
    Store

    Raises
    ------
    StoreNotFoundError
        There is no store: with ``mode="r"``, or in any place but the last.
    NotAStoreError
        A file, another zarr store, or a folder with other things in it.
    CorruptPartError
        The parts of a store lie there, and the document of its root is missing or damaged.
    UnsupportedVersionError
        A store of a newer format version.
    InvalidArgumentError
        No place, one that is named twice, or another number of options than places.
    ReadOnlyError
        ``mode="a"`` for a web address or a published copy.
    AccessDeniedError, UnreachableError
        A place, which the message names, refuses or does not answer.
    """
    if mode not in ("a", "r", None):
        raise InvalidArgumentError(f"mode={mode!r} is unknown: use 'a' to read and add, 'r' to read only")
    given = config.cache_backend() if url is None else url
    places = list(given) if isinstance(given, (list, tuple)) else [given]
    options = options_for(places, storage_options)
    roots = [root for place, one in zip(places, options, strict=True) for root in _roots_of(place, one, durable, is_default=url is None)]
    named = [storage.url for storage, _, _ in roots]
    if len(set(named)) < len(named):
        raise InvalidArgumentError(f"a place is named twice among {', '.join(named)}: name each once, the one to write to last")
    opened: Store | None = None
    for number, (storage, allowed, flushed) in enumerate(roots, start=1):
        # Only the last is written to, and a store that is read-only stays so, whatever is wanted of it.
        wanted: Mode | None = "r" if number < len(roots) or allowed == "r" else mode
        storage, own = open_root(storage, wanted)
        opened = Store(storage, mode=own, durable=flushed, is_default=url is None, below=opened)
    if opened is None:
        raise InvalidArgumentError("the list of places is empty: give at least one folder or URL")
    return opened


def _roots_of(place: Any, options: Mapping[str, Any] | None, durable: bool, *, is_default: bool) -> list[tuple[Storage, Mode, bool]]:
    """What a caller named, as roots from the first to the last: where each lies, what is allowed there, and whether it is flushed."""
    if isinstance(place, Store):
        return [(one.storage, one.mode, one.durable) for one in place.stack]
    if is_default and place is None:
        return [(open_storage(config.default_root(), options), "a", durable)]
    storage = open_storage(place, options)
    # Where no store lies, a cache's place is one as lmprobe means it: its own entries lie there, and ours inside .zarr.
    if is_default and not storage.url.endswith(".zarr") and not storage.is_file("zarr.json"):
        storage = open_storage(f"{os.fspath(place).rstrip('/')}/.zarr", options)
    return [(storage, "a", durable)]


class Store:
    """Activations below one root. Made by `open_store`; picklable, and usable from many threads.

    Parameters
    ----------
    storage : Storage
        The place.
    mode : {"a", "r"}
        ``"r"`` never writes.
    durable : bool
        Flush before commit.
    is_default : bool
        Whether this is the store that is used where none is named, which the cache's settings rule.
    below : Store, optional
        What is read as well, and never written: its values show where this store has none.

    Notes
    -----
    What looks, sees what lies below too: groups, views, datasets. What writes, weighs or removes knows this store's own root alone.
    """

    def __init__(
        self, storage: Storage, *, mode: Mode = "a", durable: bool = True, is_default: bool = False, below: Store | None = None
    ) -> None:
        self.storage, self.mode, self.durable, self.is_default, self.below = storage, mode, durable, is_default, below
        # Documents of parts and groups never change once they are there, so each is read once.
        self._parts: dict[str, Part] = {}
        self._groups: dict[str, GroupInfo] = {}
        self._damaged: dict[str, CorruptPartError] = {}
        self._stamped: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.storage, self.mode, self.durable, self.is_default, self.below)

    @property
    def is_published(self) -> bool:
        """Whether this is a published copy, which never changes."""
        return isinstance(self.storage, FrozenStorage)

    @property
    def url(self) -> str:
        """Where the store lies: what is written goes there."""
        return self.storage.url

    @property
    def stack(self) -> tuple[Store, ...]:
        """Everything that is read as one, from the lowest store to this one."""
        return (self,) if self.below is None else (*self.below.stack, self)

    @property
    def own(self) -> Store:
        """The store without what lies below it; both know the same parts."""
        if self.below is None:
            return self
        alone = Store(self.storage, mode=self.mode, durable=self.durable, is_default=self.is_default)
        alone._parts, alone._groups, alone._damaged, alone._stamped = self._parts, self._groups, self._damaged, self._stamped
        return alone

    @property
    def where(self) -> str:
        """Every place that is read, as they are named in messages."""
        return " and ".join(store.url for store in self.stack)

    # -------------------------------------------------------------------------------------------------------- looking

    def groups(self, *, whole: bool = True) -> dict[str, GroupInfo]:
        """All groups by name: one per model and provenance.

        Parameters
        ----------
        whole : bool
            Whether a damaged group is an error; see `view`.

        Returns
        -------
        dict of str to GroupInfo
            By name.
        """
        if self.below is not None:
            return dict(sorted({**self.below.groups(whole=whole), **self.own.groups(whole=whole)}.items()))
        names = [name for name in self.storage.list("") if not name.startswith(".") and name != "zarr.json"]
        new = [name for name in names if name not in self._groups and (whole or name not in self._damaged)]
        run_all([partial(self._read_group, name, whole) for name in new], local=self.storage.is_local)
        return {name: info for name in names if (info := self._groups.get(name)) is not None}

    def _read_group(self, name: str, whole: bool) -> None:
        try:
            self._parse_group(name)
        except CorruptPartError as error:
            if whole:
                raise
            error.part = name
            self.set_aside(error)

    def _parse_group(self, name: str) -> None:
        where = f"{self.url}/{name}"
        ours = GROUP_NAME.fullmatch(name) is not None
        data = self._read_document(name, ours)
        if data is None:
            if ours and any(self.storage.is_file(f"{name}/{part}/zarr.json") for part in self.storage.list(name)):
                raise CorruptPartError(f"{where} holds parts, but its own zarr.json is gone: restore it, or delete the folder")
            return
        try:
            info = parse_group(data, where)
        except CorruptPartError:
            if ours:
                raise
            return  # somebody else's group beside ours
        if info.name != name:
            raise CorruptPartError(f"{where}/zarr.json is that of {info.name}: it was changed, or the folder renamed or copied")
        self._groups[name] = info

    def _read_document(self, path: str, ours: bool) -> bytes | None:
        """The ``zarr.json`` of a folder, None where there is none; that of a folder without a name of `ours` need not be readable."""
        try:
            return self.storage.read(f"{path}/zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if isinstance(error, UnreachableError):
                raise
            if not ours:
                return None  # somebody else's, such as the lost+found of a disk
            if isinstance(error, LmprobeZarrError):
                raise
            what = "is a folder: delete it"
            if not isinstance(error, IsADirectoryError):
                what = f"cannot be read ({error.strerror}): delete it, or mend the disk"
            raise CorruptPartError(f"{self.url}/{path}/zarr.json {what}") from error

    def models(self) -> list[str]:
        """Names of all models of which anything is stored, sorted."""
        return sorted({info.model for name, info in self.groups().items() if self.holds_parts(name)})

    def holds_parts(self, group: str) -> bool:
        """Whether a group has any committed part: one whose parts have all been evicted is as good as none.

        Parameters
        ----------
        group : str
            Its name.

        Returns
        -------
        bool
        """
        names: list[str] = []
        # Looked at again where there are new ones: what replaced a part that has just gone was committed before that.
        while new := [name for name in self._part_names(group) if name not in names]:
            if any(self._is_committed(f"{group}/{name}") for name in new):
                return True
            names += new
        return self.below is not None and self.below.holds_parts(group)

    def _is_committed(self, path: str) -> bool:
        if self.storage.is_local:
            return self.storage.is_file(f"{path}/zarr.json")
        # Where each look is a request, the document is read at once: whoever asks wants it next.
        try:
            return path in self._parts or self._read_part(path, whole=True) is not None
        except CorruptPartError:
            return True  # for a view to name

    def matching(
        self, model: str | None = None, provenance: Provenance | None = None, group: str | None = None, *, whole: bool = True
    ) -> list[GroupInfo]:
        """Groups in which no field that is given differs.

        Parameters
        ----------
        model : str, optional
            Name of the model.
        provenance : mapping, optional
            Fields that must be equal.
        group : str, optional
            Name of the group itself.
        whole : bool
            Whether what is damaged is an error; see `view`.

        Returns
        -------
        list of GroupInfo
            Empty where none matches.
        """
        return list(filter(choose_group(model, provenance, group), self.groups(whole=whole).values()))

    def find_group(self, model: str | None = None, *, provenance: Provenance | None = None, group: str | None = None) -> GroupInfo:
        """The one group that is meant.

        Parameters
        ----------
        model : str, optional
            Name of the model; may be left out where the store holds one group only.
        provenance : mapping, optional
            Fields that must be equal, for example ``{"revision": "…"}``.
        group : str, optional
            Name of the group itself.

        Returns
        -------
        GroupInfo

        Raises
        ------
        ModelNotStoredError
            No group matches; says what is there.
        AmbiguousProvenanceError
            Several match; names the fields in which they differ.
        """
        found = [info for info in self.matching(model, provenance, group) if self.holds_parts(info.name)]
        if len(found) == 1:
            return found[0]
        if not found:
            if model is not None and model in self.models() and group is None:
                known = [dict(info.provenance) for info in self.matching(model)]
                raise ModelNotStoredError(
                    f"{model!r} is in {self.where}, but not with provenance {dict(provenance or {})!r}: there is {known!r}"
                )
            if model is None and group is None and not provenance:
                raise ModelNotStoredError(f"{self.where} holds nothing yet: extract something into it first")
            there = named_model(self.models() if group is None else self.groups()) or "nothing yet"
            asked = f"group {group!r}" if group is not None else f"model {model!r}"
            raise ModelNotStoredError(f"{asked} is not in {self.where}, which holds {there}: check the name, or extract it first")
        raise ambiguous(found, self.where)

    def view(self, info: GroupInfo, *, whole: bool = True) -> View:
        """All committed parts of a group as they are now.

        Parameters
        ----------
        info : GroupInfo
        whole : bool
            Whether a damaged part is an error. Otherwise it is left out and told, once, as a `CacheWarning`: for callers that can do
            without it, because other parts or the model serve them.

        Returns
        -------
        View
            A snapshot: what is committed later is not in it.

        Raises
        ------
        CorruptPartError
            A part's document is damaged.
        """
        parts, notes = self._parts_and_notes(info, whole=whole)
        return open_view(self.storage, info, parts, notes)

    def _parts_and_notes(self, info: GroupInfo, *, whole: bool) -> tuple[list[Part], list[Part]]:
        """What a group has in everything that is read, in its order."""
        parts, notes = self._own_parts_and_notes(info, whole=whole)
        if self.below is None:
            return parts, notes
        rank = len(self.stack) - 1
        lower, lower_notes = self.below._parts_and_notes(info, whole=whole)
        return (
            [*lower, *(replace(part, rank=rank) for part in parts)],
            [*lower_notes, *(replace(note, rank=rank) for note in notes)],
        )

    def _own_parts_and_notes(self, info: GroupInfo, *, whole: bool) -> tuple[list[Part], list[Part]]:
        # One list tells whether there are annotations at all: where a list is a request, most groups need only one.
        names = self.storage.list(info.name)
        notes = self.list_parts(f"{info.name}/{ANNOTATIONS}", whole=whole) if ANNOTATIONS in names else []
        return self.list_parts(info.name, whole=whole, listed=names), notes

    def list_parts(self, folder: str, *, whole: bool = True, listed: Sequence[str] | None = None) -> list[Part]:
        """Committed parts of a group's folder in this store's own root, or annotations of its folder for them, replaced ones too, in the
        order of their names.

        What was just `listed` there is not listed again.

        Parameters
        ----------
        folder : str
            Key of the folder.
        whole : bool
            Whether what is damaged is an error; see `view`.
        listed : sequence of str, optional
            Names that were just listed there, which are not listed again.

        Returns
        -------
        list of Part
        """
        paths = [f"{folder}/{name}" for name in self._part_names(folder, listed)]
        # Apart from what the store remembers, which other threads forget as they remove things.
        held = {path: part for path in paths if (part := self._parts.get(path)) is not None}
        if self.storage.is_local:
            # Known ones may have been evicted since. Elsewhere that takes a request each, and a read from such a part raises PartGoneError.
            for path in list(held):
                if not self.storage.is_file(f"{path}/zarr.json"):
                    self.forget(path)
                    del held[path]

        def read(path: str) -> None:
            if (part := self._read_part(path, whole)) is not None:
                held[path] = part

        while True:
            absent = [path for path in paths if path not in held and path not in self._damaged]
            if self.storage.is_local:
                # Parsing holds the interpreter's lock: threads would only get into each other's way.
                for path in absent:
                    read(path)
            else:
                run_all([partial(read, path) for path in absent], local=False)
            if all(path in held or path in self._damaged for path in absent):
                break
            # Some have no commit. They may be unfinished; or they have been replaced and removed since they were listed, and what replaced
            # them was committed before that, but was not in the list.
            again = [f"{folder}/{name}" for name in self._part_names(folder)]
            if set(again) <= set(paths):
                break
            paths = sorted({*paths, *again})
        there = set(paths)
        for path in [*self._parts]:  # parts come and go, and a process that stays would remember them all
            if path not in there and path.rpartition("/")[0] == folder:
                self.forget(path)
        if whole and (damaged := next((self._damaged[path] for path in paths if path in self._damaged), None)):
            raise damaged
        return [held[path] for path in paths if path in held and path not in self._damaged]

    def _part_names(self, folder: str, listed: Sequence[str] | None = None) -> list[str]:
        found = self.storage.list(folder) if listed is None else listed
        return [name for name in found if name not in ("zarr.json", ANNOTATIONS) and not name.startswith(".")]

    def _read_part(self, path: str, whole: bool) -> Part | None:
        try:
            data = self._read_document(path, PART_NAME.fullmatch(path.rpartition("/")[2]) is not None)
            if data is None:
                return None  # being written, or left behind by a writer that was killed: not committed, so not there
            info = parse_part(data, f"{self.url}/{path}")
            folder = f"{info.group}/{ANNOTATIONS}" if info.kind == "annotation" else info.group
            if path != f"{folder}/{info.name}":
                raise CorruptPartError(
                    f"{self.url}/{path} is the {info.kind} {info.name!r} of {info.group!r}: it was renamed, moved or copied"
                )
        except CorruptPartError as error:
            if whole:
                raise
            error.root, error.part = self.url, path
            self.set_aside(error)
            return None
        part = self._parts[path] = Part(self.storage, path, info, len(data))
        return part

    def set_aside(self, error: CorruptPartError) -> None:
        """Leave a damaged part out of views that need not be whole, and say so.

        Parameters
        ----------
        error : CorruptPartError
            Names the part.
        """
        if error.part is None:
            raise error
        if self.below is not None and error.root in [store.url for store in self.below.stack]:
            self.below.set_aside(error)
        elif error.part not in self._damaged:
            self._damaged[error.part] = error
            warn(f"{str(error).splitlines()[0]}\ngoing on without it")

    def forget(self, path: str) -> None:
        """Forget what is remembered of a part that has gone.

        Parameters
        ----------
        path : str
            Key of the part.
        """
        self._parts.pop(path, None)
        self._stamped.pop(path, None)
        self._damaged.pop(path, None)

    def drop_empty_group(self, info: GroupInfo) -> None:
        """Remove a group's own document where nothing else is left of the group.

        Parameters
        ----------
        info : GroupInfo
            The group.
        """
        left = [name for name in self.storage.list(info.name) if name not in ("zarr.json", STAMPS)]
        if not left:
            self.storage.remove([f"{info.name}/zarr.json"])
            self._groups.pop(info.name, None)

    def forget_all(self) -> None:
        """Forget what is remembered of parts and groups: the next look reads them again."""
        self._parts.clear()
        self._groups.clear()
        if self.below is not None:
            self.below.forget_all()

    def mark_used(self, parts: Iterable[Part]) -> None:
        """Note that parts of this store's own are being used, for eviction; never where it is read-only, and never an error.

        Parameters
        ----------
        parts : iterable of Part
            Those of other roots are left out.
        """
        if self.mode == "a":
            stamp_parts(self.storage, (part for part in parts if part.storage is self.storage), self._stamped)

    def entries(self, info: GroupInfo) -> list[Entry]:
        """All parts and annotations of a group in this store's own root, with their sizes and last use.

        Only metadata are read, and requests grow with the parts.

        Parameters
        ----------
        info : GroupInfo
            The group.

        Returns
        -------
        list of Entry
        """
        stamps = {name: entry.modified for name, entry in self.storage.scan(f"{info.name}/{STAMPS}").items()}
        parts, notes = self._own_parts_and_notes(info, whole=False)
        return describe_entries([*parts, *notes], group=info.name, stamps=stamps)

    def dataset(
        self,
        model: str | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        chunks: Chunks = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> xr.Dataset:
        """What is stored per prompt, lazily.

        Parameters
        ----------
        model : str, optional
            Name of the model; may be left out where the store holds one only.
        prompts : iterable of str or sequence of int, optional
            Texts, hashes or token ids: exactly these, in this order, repeats included. None gives all, in the store's order.
        layers : "all", "middle", "last", int, sequence of int or slice, optional
            Which layers, shown in ascending order; None gives all that are stored, a slice or a word those of its layers that are.
        chunks : mapping, int or "auto", optional
            As in `xarray.open_dataset`: None is lazy without Dask, ``{}`` is Dask with one layer and one stored chunk at a time.
        provenance, group : optional
            Choose between several groups of one model.

        Returns
        -------
        xarray.Dataset
            ``<site>_<pooling>(layer, prompt, hidden)`` and coordinates ``prompt, layer, n_tokens, prompt_length, text, …``
            along ``prompt``. What is absent reads as NaN.

        Raises
        ------
        ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError
        """
        return self._dataset("prompts", model, prompts, layers, chunks, provenance, group)

    def tokens(
        self,
        model: str | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        chunks: Chunks = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> xr.Dataset:
        """What is stored per token, lazily; the same arguments as `dataset`.

        Parameters
        ----------
        model, prompts, layers, chunks, provenance, group
            As for `dataset`.

        Returns
        -------
        xarray.Dataset
            ``<site>(layer, token, hidden)``, the tokens of all prompts end to end, with an index over ``prompt`` and
            ``position``: ``tokens.resid.sel(layer=16, prompt=h)`` are the tokens of one prompt.
        """
        return self._dataset("tokens", model, prompts, layers, chunks, provenance, group)

    def _dataset(
        self,
        level: Level,
        model: str | None,
        prompts: Iterable[Any] | None,
        layers: LayerSpec | None,
        chunks: Chunks,
        provenance: Provenance | None,
        group: str | None,
    ) -> xr.Dataset:
        info = self.find_group(model, provenance=provenance, group=group)
        data = to_dataset(self.view(info), level, prompts=prompts, layers=layers)
        if chunks is None:
            return data
        hints = [v.encoding.get("preferred_chunks", {}) for v in data.data_vars.values()]
        preferred = {dim: size for hint in hints for dim, size in hint.items() if dim in data.sizes}
        return data.chunk(preferred if chunks == {} else chunks)

    def datatree(self) -> xr.DataTree:
        """Everything, lazily: ``/<group>/prompts`` and ``/<group>/tokens``."""
        nodes: dict[str, xr.Dataset] = {}
        for name, info in self.groups().items():
            view = self.view(info)
            for level in LEVELS:
                if view.variables(level) or level == "prompts":
                    nodes[f"/{name}/{level}"] = to_dataset(view, level)
        return xr.DataTree.from_dict(nodes)

    def coverage(
        self,
        model: str | None = None,
        prompts: Iterable[Any] | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> xr.DataArray:
        """What is stored: True for every variable, prompt and layer that some part holds.

        Parameters
        ----------
        model, prompts, provenance, group
            As for `dataset`.

        Returns
        -------
        xarray.DataArray of bool, dims (variable, prompt, layer)
            Activations of both levels. A variable without a layer axis is the same along ``layer``. No values are read.
        """
        view = self.view(self.find_group(model, provenance=provenance, group=group))
        rows = np.arange(len(view)) if prompts is None else view.select(prompts)
        layers = tuple(sorted({*view.layers("prompts"), *view.layers("tokens")}))
        names = [(level, name) for level in LEVELS for name in view.variables(level)]
        there = [np.broadcast_to(view.covers(level, name, rows, layers).T, (len(rows), len(layers))) for level, name in names]
        return xr.DataArray(
            np.array(there, bool).reshape(len(names), len(rows), len(layers)),
            dims=("variable", "prompt", "layer"),
            coords={"variable": [name for _, name in names], "prompt": view.hashes[rows], "layer": list(layers)},
            name="coverage",
        )

    # -------------------------------------------------------------------------------------------------------- writing

    def check_writable(self) -> None:
        """Raise `ReadOnlyError` where this store may not be written to."""
        if self.is_published:
            raise ReadOnlyError(f"{self.url} is a published copy, which never changes: write to the store that it was made from")
        if self.mode == "r":
            raise ReadOnlyError(f"{self.url} was opened with mode='r': open it with mode='a' to write")
        if not self.storage.may_write():
            raise ReadOnlyError(f"{self.url} cannot be written: check permissions, or give another place")

    def new_part(
        self, info: GroupInfo, *, kind: str = "part", compressed: bool = True, recorded: Mapping[str, Any] | None = None
    ) -> PartWriter:
        """A writer for one part of a group. The group is made where it is new; the part shows after its commit.

        Parameters
        ----------
        info : GroupInfo
            The group.
        kind : {"part", "annotation"}
            An annotation holds columns alone.
        compressed : bool
            False stores raw values, which still end in a checksum.
        recorded : mapping, optional
            Versions, device: told, never asked for.

        Returns
        -------
        PartWriter

        Raises
        ------
        ReadOnlyError, NoSpaceError
        """
        self.check_writable()
        write_group(self.storage, info, durable=self.durable)
        self._groups[info.name] = info
        older = [name for folder in (info.name, f"{info.name}/{ANNOTATIONS}") for name in self.storage.list(folder)]
        # Only names of parts: anything else that lies there would hide how far the clock of others had come.
        name = new_part_name(max((n for n in older if PART_NAME.fullmatch(n)), default=""))
        return PartWriter(self.storage, info, name, kind=kind, compressed=compressed, durable=self.durable, recorded=recorded)

    def write(self, info: GroupInfo, batch: TokenBatch, *, kind: str = "part", compressed: bool = True) -> str:
        """Write one batch as one part; returns its name.

        Parameters
        ----------
        info : GroupInfo
            The group.
        batch : TokenBatch
            Prompts that differ.
        kind : {"part", "annotation"}
            An annotation holds columns alone.
        compressed : bool
            False stores raw values, which still end in a checksum.

        Returns
        -------
        str
            Name of the part.

        Raises
        ------
        PromptCollisionError
            A stored prompt has the hash of a given one but another text.
        ReadOnlyError, NoSpaceError, InvalidArgumentError
            Nothing becomes visible.
        """
        self.check_writable()
        if info.name in self.groups(whole=False):
            self.view(info, whole=False).find(batch.sha256)
        writer = self.new_part(info, kind=kind, compressed=compressed)
        try:
            writer.append(batch)
            return writer.commit().name
        except BaseException:
            with suppress(OSError):  # what cannot be removed is garbage, and the first failure is the one to tell
                writer.abort()
            raise

    def annotate(
        self,
        model: str | None,
        columns: Mapping[str, Mapping[Any, Any]],
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> None:
        """Add per-prompt columns, or new values of them, to what is stored.

        Parameters
        ----------
        model : str
            Name of the model.
        columns : mapping of str to mapping
            Column to ``{text or hash: value}``; a column may leave prompts out.
        provenance, group : optional
            Choose between several groups of one model.

        Raises
        ------
        MissingPromptsError
            A prompt is not stored; nothing is written.
        InvalidArgumentError
            A column's name or values cannot be stored.
        """
        self.check_writable()
        for name, values in columns.items() if isinstance(columns, Mapping) else [("columns", columns)]:
            if not isinstance(values, Mapping):
                raise InvalidTypeError(f"{name!r} is a {type(values).__name__}: give {{column: {{text or hash: value}}}}")
        validate_column_names(columns)
        info = self.find_group(model, provenance=provenance, group=group)
        view = self.view(info)
        by_row: dict[str, tuple[Ints, list[Any]]] = {}
        for name, values in columns.items():
            if not values:
                raise InvalidArgumentError(f"column {name!r} has no values: give {{text or hash: value}}")
            rows = view.select(list(values))
            if len(set(rows.tolist())) != len(rows):
                raise InvalidArgumentError(f"column {name!r} names a prompt twice, by its text and by its hash")
            by_row[name] = rows, list(values.values())
        self.write_columns(view, by_row)

    def write_columns(self, view: View, columns: Mapping[str, tuple[Ints, Sequence[Any]]]) -> None:
        """Write columns as annotations, those of the same prompts together.

        Parameters
        ----------
        view : View
            The group as it is.
        columns : mapping of str to (ndarray of int, sequence)
            For each column the prompts of the view, none twice, and their values.
        """
        together: dict[tuple[int, ...], dict[str, Array]] = {}
        for name, (rows, values) in columns.items():
            order = np.argsort(rows, kind="stable")
            column = as_column(name, values)[order]
            together.setdefault(tuple(rows[order].tolist()), {})[name] = column
        batches = [
            TokenBatch(sha256=[view.digests[row].tobytes().hex() for row in rows], prompt_columns=named) for rows, named in together.items()
        ]
        for batch in batches:
            self.write(view.group, batch, kind="annotation")

    # ----------------------------------------------------------------------------------------------------------- removing

    def delete(
        self,
        model: str | None,
        prompts: Iterable[Any],
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> int:
        """Delete prompts with everything that is stored of them: values, texts, columns. Physically gone when this returns.

        Every part that holds one of them is written again without it, and its old files are removed. Views that are open raise
        `PartGoneError`. Not covered: parts that another process is writing at the moment, copies elsewhere, and old versions of objects
        where a bucket keeps them.

        Parameters
        ----------
        model : str
            Name of the model.
        prompts : iterable of str or sequence of int
            Texts, hashes or token ids.
        provenance, group : optional
            Choose between several groups of one model.

        Returns
        -------
        int
            Parts and annotations that held any of them.

        Raises
        ------
        MissingPromptsError
            A prompt is not stored; nothing is deleted.
        ReadOnlyError
            This store is read-only; or what lies below it holds a prompt too, which would go on to show. Nothing is deleted.
        ModelNotStoredError, AmbiguousProvenanceError, NoSpaceError
        """
        self.check_writable()
        info = self.find_group(model, provenance=provenance, group=group)
        parts = [*self.list_parts(info.name), *self.list_parts(f"{info.name}/{ANNOTATIONS}")]
        lower = [] if self.below is None else self.below._parts_and_notes(info, whole=True)[0]
        # Replaced parts too: what a deletion that was interrupted has only hidden so far is still there.
        shown = [replace(part, info=replace(part.info, replaces=())) for part in (*lower, *parts)]
        held = open_view(self.storage, info, shown, [])
        rows = held.select(prompts)
        digests = [held.digests[row].tobytes().hex() for row in rows]
        for store in () if self.below is None else self.below.stack:
            alone = store.own
            if info.name not in alone.groups():
                continue
            staying = np.flatnonzero(alone.view(info).find(digests) >= 0)
            if len(staying):
                raise ReadOnlyError(
                    f"{len(staying)} of {len(rows)} prompts lie in {store.url} (first {held.hashes[rows[staying[0]]]}), which is only read "
                    f"here, so nothing was deleted: delete them there, with open_store({store.url!r})"
                )
        concerned = 0
        while True:
            parts = [*self.list_parts(info.name), *self.list_parts(f"{info.name}/{ANNOTATIONS}")]
            count = delete_prompts(self.storage, info, parts, digests, durable=self.durable)
            for part in parts if count else ():
                self.forget(part.path)
            concerned += count
            # Somebody may have merged parts that held them meanwhile; a merge that ends after this look takes itself back.
            if not count:
                return concerned

    # ------------------------------------------------------------------------------------------------------------ upkeep

    def listing(self, info: GroupInfo, *, whole: bool = True) -> Listing:
        """What lies in a group's folder of this store's own root now; for `whole` see `view`.

        Parameters
        ----------
        info : GroupInfo
            The group.
        whole : bool
            Whether what is damaged is an error; see `view`.

        Returns
        -------
        Listing
        """
        names = list_names(self.storage, info.name)
        parts = self.list_parts(info.name, whole=whole)
        notes = self.list_parts(f"{info.name}/{ANNOTATIONS}", whole=whole)
        return Listing(parts=tuple(parts), annotations=tuple(notes), names=names)

    def _meant(self, model: str | None, provenance: Provenance | None, group: str | None) -> list[GroupInfo]:
        """All groups of this store's own root that match; where none does, the error that says so."""
        own = self.own
        found = [info for info in own.matching(model, provenance, group) if own.holds_parts(info.name)]
        if not found and (model is not None or provenance or group is not None):
            own.find_group(model, provenance=provenance, group=group)
        return found

    def compact(
        self,
        model: str | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        part_bytes: int | None = None,
        min_parts: int = 2,
        dry_run: bool = False,
        progress: bool = True,
    ) -> CompactPlan:
        """Merge small parts into larger ones. What the store shows is exactly the same before and after.

        Only neighbours that hold the same variables, layers and dtypes become one, and only where that provably changes nothing; see
        `compaction.plan_runs`. The old parts are hidden at once and stay for views that are open, until `gc`. Others may read and write
        meanwhile: what they commit keeps its place. Stopped at any moment, the store shows what it showed, and a second call completes it.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match.
        part_bytes : int, optional
            The most that a merged part holds, uncompressed: 1 GiB, and in a cache with a limit at most a fiftieth of that. Parts of more
            than half of it stay as they are.
        min_parts : int
            Fewer neighbours than this stay as they are.
        dry_run : bool
            Only say what would be merged.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        CompactPlan
            What was merged.

        Raises
        ------
        ModelNotStoredError, ReadOnlyError, NoSpaceError, CorruptPartError
        """
        self.check_writable()
        most = self._part_bytes(part_bytes)
        if isinstance(min_parts, bool) or not isinstance(min_parts, int) or min_parts < 2:
            raise InvalidArgumentError(f"min_parts={min_parts!r} is no number of parts to merge: give at least 2")
        found = [(info, self.listing(info)) for info in self._meant(model, provenance, group)]
        planned = [(info, listing, plan_runs(info, listing, part_bytes=most, min_parts=min_parts)) for info, listing in found]
        shown = sum(part.info.name not in one.hidden for _, one in found for part in (*one.parts, *one.annotations))
        runs = tuple(run for _, _, runs in planned for run in runs)
        if dry_run:
            return CompactPlan(url=self.url, parts=shown, runs=runs)
        done, left = [], []
        total = sum(run.nbytes for run in runs)
        with progress_bar(total, description="compact", unit="B", enabled=progress and bool(runs)) as advance:
            for info, listing, group_runs in planned:
                known = set(listing.names)
                for run in group_runs:
                    merged, stayed = merge_run(self.storage, info, run, partial(self.listing, info), durable=self.durable, known=known)
                    done += merged
                    left += stayed
                    advance(run.nbytes)
        return CompactPlan(url=self.url, parts=shown, runs=tuple(done), left=tuple(left))

    def _part_bytes(self, given: int | None, default: int = PART_BYTES) -> int:
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise InvalidArgumentError(f"part_bytes={given!r} is no size of a part: give bytes, at least 1")
        most = default if given is None else given
        limit = config.cache_limit() if self.is_default else None
        return min(most, max(1, limit // LIMIT_SHARE)) if limit else most

    def gc(self, *, max_age: float = 86400.0, dry_run: bool = False) -> GcSummary:
        """Remove what nobody needs any more: parts that others replaced, and what killed writers left.

        Parameters
        ----------
        max_age : float
            Seconds. A replaced part goes when it was replaced longer ago than this, so that views which were open then can go on; what a
            writer left without a commit, when nothing was written to it for so long. A writer that pauses for longer loses its part: give
            no age below that of your longest run.
        dry_run : bool
            Only say what would go.

        Returns
        -------
        GcSummary
            What went.

        Raises
        ------
        InvalidArgumentError, ReadOnlyError
        """
        if isinstance(max_age, bool) or not isinstance(max_age, (int, float)) or not max_age >= 0:
            raise InvalidArgumentError(f"max_age={max_age!r} is no age: give seconds, at least 0")
        self.check_writable()
        groups = [(info, self.listing(info, whole=False)) for info in self.own.groups(whole=False).values()]
        summary = plan_gc(self.storage, groups, max_age=float(max_age))
        if not dry_run:
            remove_garbage(self.storage, summary)
            for part in summary.replaced:
                self.forget(part.path)
        return summary

    def verify(
        self,
        model: str | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        full: bool = True,
        progress: bool = True,
    ) -> VerifySummary:
        """Compare what lies in the store with what was committed. Writes nothing.

        Of every part and annotation, replaced ones too: its document with the digest in it, and all other files with the table that the
        part was committed with; the documents of groups and root; of a published copy whether its root agrees with what is below it. What
        lies below this store is verified too. lmprobe's own entries beside a store are not ours.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match. One whose document is damaged is looked at in any case.
        full : bool
            Read every file and compare its checksum: that also finds files of equal length that were exchanged with one another. Otherwise
            only documents are read, and the sizes of all other files asked for, with one list per part.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        VerifySummary
            True where nothing is wrong. Also says which values are not finite and which rows are blank; that is no damage.

        Raises
        ------
        ModelNotStoredError
        AccessDeniedError, UnreachableError
            The place refuses or does not answer, which says nothing of what lies there.
        """
        began = time.perf_counter()
        scans = [scan_store(store.storage, choose_group(model, provenance, group)) for store in self.stack]
        if not any(scan.groups for scan in scans) and (model is not None or provenance or group is not None):
            self.find_group(model, provenance=provenance, group=group)
        total = sum(scan.nbytes for scan in scans)
        with progress_bar(total, description="verify", unit="B", enabled=progress) as advance:
            return verify_stores(self.where, scans, full=full, began=began, advance=advance)

    def repair(
        self,
        model: str | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        dry_run: bool = False,
        progress: bool = True,
    ) -> RepairSummary:
        """Take out what a full `verify` finds broken, keep what is whole, and list the prompts to extract again.

        Values go to the prompt and the layer: a part is written again without the prompts that lie in a broken chunk, in that variable and
        layer only; all its other values, its texts and columns stay, and so does the order of the prompts. A broken column of yours goes
        for all prompts of its part. Documents that are known from elsewhere (root, group, arrays) are written again as they were. A part
        whose own document is damaged goes altogether, since nothing says any more what its files should be. Where a part goes that was
        merged from others, and these are still there, they show again.

        What goes is invisible before its bytes go. Stopped at any moment, the store shows nothing wrong; call again. Files that are there
        and cannot be read are left, and so is what is not ours. Of several stores that are read as one the last alone is repaired.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match.
        dry_run : bool
            Only say what would be done.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        RepairSummary
            Its `lost` say what to extract again: ``for one in summary.lost: lz.extract(model, one.prompts, store=store, **one.arguments)``.

        Raises
        ------
        ReadOnlyError
            Also of published copies, which never change.
        ModelNotStoredError, AccessDeniedError, UnreachableError, NoSpaceError
        """
        self.check_writable()
        own = self.own
        scan = scan_store(own.storage, choose_group(model, provenance, group))
        if not scan.groups and (model is not None or provenance or group is not None):
            own.find_group(model, provenance=provenance, group=group)
        with progress_bar(scan.nbytes, description="verify", unit="B", enabled=progress) as advance:
            scan = check_files(scan, full=True, advance=advance)
        summary = repair_store(scan, durable=self.durable, dry_run=dry_run)
        if not dry_run:
            self._parts.clear()
            self._groups.clear()
            self._damaged.clear()
        return summary

    def publish(
        self,
        url: str | os.PathLike[str],
        *,
        model: str | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        part_bytes: int = PUBLISHED_PART_BYTES,
        text: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        card: str | bool | None = None,
        progress: bool = True,
    ) -> PublishSummary:
        """Write a compacted copy to another place, for others to read: also over plain HTTP, from a server that lists nothing.

        The copy shows what this store shows, in its order, and never changes: it opens for reading only. Its root is written last and
        names all that is in it, so nothing can be seen before it is whole. One that was interrupted is completed by calling again. Only one
        may publish to a place at a time.

        Parameters
        ----------
        url : str or path
            A new or empty place.
        model, provenance, group : optional
            Which groups; all that match. With `prompts` or `layers` just one.
        prompts : iterable of str or sequence of int, optional
            Only these, in the store's order.
        layers : "all", "middle", "last", int, sequence of int or slice, optional
            Only these.
        part_bytes : int
            The most that a part holds, uncompressed.
        text : bool
            Whether the prompts' texts are published. Their sha256 always is, and so are the columns of your own.
        storage_options : mapping, optional
            Passed to the fsspec file system.
        overwrite : bool
            Replace a copy that was published there before. Who has that one open gets `PartGoneError`.
        card : str or bool, optional
            The text of ``README.md``; None makes one, False writes none.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        PublishSummary

        Raises
        ------
        InvalidArgumentError, NotAStoreError
            Something else lies there; or this is several stores that are read as one.
        ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError, NoSpaceError, CorruptPartError
        """
        if self.below is not None:
            raise InvalidArgumentError(
                f"{self.where} are read as one here, and a copy is made of one store: open and publish each of them alone"
            )
        most = self._part_bytes(part_bytes)
        if prompts is None and layers is None:
            chosen = [Selection(group=info, listing=self.listing(info)) for info in self._meant(model, provenance, group)]
            if not chosen:
                raise ModelNotStoredError(f"{self.url} holds nothing yet: extract something into it first")
        else:
            chosen = [self._selection(self.find_group(model, provenance=provenance, group=group), prompts, layers)]
        target = open_storage(url, storage_options)
        with progress_bar(total_nbytes(chosen), description="publish", unit="B", enabled=progress) as advance:
            return publish_groups(
                self.storage,
                target,
                chosen,
                part_bytes=most,
                text=text,
                card=card,
                overwrite=overwrite,
                durable=self.durable,
                advance=advance,
            )

    def _selection(self, info: GroupInfo, prompts: Iterable[Any] | None, layers: LayerSpec | None) -> Selection:
        view = self.own.view(info)
        keys = None if prompts is None else keys_of(view.digests[view.select(prompts)])
        held = tuple(sorted({*view.layers("prompts"), *view.layers("tokens")}))
        return Selection(
            group=info, listing=self.listing(info), keys=keys, layers=None if layers is None else choose_layers(view, held, layers)
        )

    def copy_to(
        self,
        target: Store | str | os.PathLike[str],
        *,
        model: str | None = None,
        prompts: Iterable[Any] | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> CopySummary:
        """Push what another store lacks into it, by prompt, variable and layer.

        Parts of which it has nothing go over as they are, under their own names; of others, what is missing is written anew. Columns of
        prompts that it has already are left as they are there; annotations go over. An interrupted copy is completed by calling again.
        Of several stores that are read as one the last alone is copied, so its target may be one of those below it.

        Parameters
        ----------
        target : Store, path or URL
            A store that can be written to; made where there is none.
        model, provenance, group : optional
            Which groups; all that match. With `prompts` just one.
        prompts : iterable of str or sequence of int, optional
            Only these.
        storage_options : mapping, optional
            Passed to the fsspec file system.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        CopySummary
            What went over.

        Raises
        ------
        ReadOnlyError, NoSpaceError, MissingPromptsError, ModelNotStoredError, AmbiguousProvenanceError, CorruptPartError
        """
        other = target if isinstance(target, Store) else open_store(target, "a", storage_options=storage_options, durable=self.durable)
        other.check_writable()
        if other.url == self.url:
            raise InvalidArgumentError(f"{self.url} cannot be copied into itself: give another place")
        if prompts is None:
            chosen = [Selection(group=info, listing=self.listing(info)) for info in self._meant(model, provenance, group)]
        else:
            chosen = [self._selection(self.own.find_group(model, provenance=provenance, group=group), prompts, None)]
        total = CopySummary(url=other.url)
        with progress_bar(total_nbytes(chosen), description="copy", unit="B", enabled=progress) as advance:
            for one in chosen:
                total += copy_group(
                    self.storage,
                    other.storage,
                    one.group,
                    one.listing,
                    other.listing(one.group),
                    one.keys,
                    other.new_part,
                    durable=other.durable,
                    advance=advance,
                )
        return total

    def drop(
        self,
        model: str | None,
        variables: Iterable[str],
        *,
        layers: LayerSpec | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> int:
        """Give variables up and free their space; everything else is shown as before. ``drop(model, ["resid"])`` frees the tokens and keeps
        the pooled vectors.

        Every part that holds one of them is written again without it, and its old files are removed. Views that are open raise
        `PartGoneError`. How many tokens prompts have, and their ids, stay. A part that is left without anything goes, and with it prompts
        that nothing else holds. Of several stores that are read as one the last alone gives them up, and what lies below goes on to show.

        Parameters
        ----------
        model : str
            Name of the model.
        variables : iterable of str
            Names, as in `dataset` and `tokens`.
        layers : "all", "middle", "last", int, sequence of int or slice, optional
            Only these layers of them; None drops them altogether.
        provenance, group : optional
            Choose between several groups of one model.

        Returns
        -------
        int
            Parts that held any of them.

        Raises
        ------
        InvalidArgumentError
            A variable is not stored; nothing is dropped.
        ModelNotStoredError, AmbiguousProvenanceError, LayerOutOfRangeError, ReadOnlyError, NoSpaceError
        """
        self.check_writable()
        if isinstance(variables, str):
            raise InvalidTypeError(f"variables is one text: give a list, as [{variables!r}]")
        names = set(variables)
        own = self.own
        info = own.find_group(model, provenance=provenance, group=group)
        view = own.view(info)
        held = sorted({name for level in LEVELS for name in view.variables(level)})
        if absent := sorted(names - set(held)):
            raise InvalidArgumentError(f"{absent[0]!r} is not stored in {view.where}, which holds {', '.join(held) or 'none'}")
        every = tuple(sorted({*view.layers("prompts"), *view.layers("tokens")}))
        chosen = None if layers is None else choose_layers(view, every, layers)
        concerned = 0
        while True:
            listing = self.listing(info)
            count = drop_variables(self.storage, info, listing, names, chosen, durable=self.durable)
            for part in listing.parts if count else ():
                self.forget(part.path)
            concerned += count
            if not count:  # as in `delete`
                return concerned

    # ------------------------------------------------------------------------------------------------------- printing

    def _contents(self) -> tuple[list[GroupContents], list[str]]:
        """What every group holds, and what is to be said of those that cannot be read; no error, since whoever debugs one prints this."""
        try:
            found = [describe_view(self.view(info, whole=False)) for info in self.groups(whole=False).values()]
            return found, [str(error).splitlines()[0] for store in self.stack for error in store._damaged.values()]
        except LmprobeZarrError as error:
            return [], [str(error)]

    def __repr__(self) -> str:
        over = "" if self.below is None else f", over {self.below.where}"
        lines = [f"<lmprobe_zarr.Store {self.url!r}, mode {self.mode!r}{over}>"]
        contents, damage = self._contents()
        for one in contents:
            lines.append(f"  {visible(one.group.model)}: {one.summary}")
            held = [f"{variable.name} ({variable.level})" for variable in one.variables]
            lines.append(f"    {', '.join(held) or 'nothing yet'}  [{one.group.name}]")
        lines += [f"  damaged: {visible(one)}" for one in damage]
        return "\n".join(lines if len(lines) > 1 else [*lines, "  empty"])

    def _repr_html_(self) -> str:
        contents, damage = self._contents()
        over = "" if self.below is None else f", over {self.below.where}"
        shown = [one.to_html(opened=len(contents) == 1) for one in contents[:SHOWN_GROUPS]]
        if rest := contents[SHOWN_GROUPS:]:
            shown.append(section(f"{len(rest)} more groups", table(("model", "holds"), [(one.group.model, one.summary) for one in rest])))
        told = [section("Damaged", Html("<br>".join(map(escape, damage))), opened=True, note=f"({len(damage)})")] if damage else []
        return str(card("lmprobe_zarr.Store", f"{self.url}, mode {self.mode!r}{over}", *(shown or [Html("empty")]), *told))


def _reopen(storage: Storage, mode: Mode, durable: bool, is_default: bool, below: Store | None) -> Store:
    return Store(storage, mode=mode, durable=durable, is_default=is_default, below=below)


Root = str | os.PathLike[str] | Store
Place = Root | Sequence[Root] | None
