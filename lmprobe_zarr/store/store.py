"""`Store`: what users open, one root or several read as one; and `open_store`, which opens it.

A facade: every method calls functions over the `Catalog` of each root, and has no rules of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pandas as pd
import xarray as xr

from lmprobe_zarr import config
from lmprobe_zarr.batch import Column, LayerSpec, TokenBatch
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.storage import ReadCache, Storage, open_storage
from lmprobe_zarr.store.annotations import annotation_batches, check_columns, find_rows, fit_batch
from lmprobe_zarr.store.choice import GivenProvenance, choose_group, find_group, find_groups, matching_groups, stored_models
from lmprobe_zarr.store.contents import coverage_of, describe_catalogs
from lmprobe_zarr.store.copy_page import plan_copy_page
from lmprobe_zarr.store.datasets import Chunks, Dtype, chunked, to_dataset, to_datatree
from lmprobe_zarr.store.format import GroupInfo, Provenance, check_new_provenance
from lmprobe_zarr.store.named import Model
from lmprobe_zarr.store.parts import (
    PART_BYTES,
    CallOrder,
    Catalog,
    Listing,
    Mode,
    Part,
    PartWriter,
    View,
    any_holds_parts,
    groups_of,
    open_union,
    part_bytes_within,
    requesting_ahead,
    urls_of,
)
from lmprobe_zarr.store.roots import open_root, options_for
from lmprobe_zarr.store.upkeep import (
    CompactPlan,
    CopySummary,
    EvictionEntry,
    GcSummary,
    PublishSummary,
    RepairSummary,
    Selection,
    StoreScan,
    VerifySummary,
    check_copy,
    check_min_parts,
    collect_garbage,
    compact_groups,
    copy_selections,
    delete_from,
    drop_from,
    list_entries,
    mark_used,
    publish_to,
    repair_root,
    scan_store,
    select_from,
    verify_scans,
)
from lmprobe_zarr.typing import Ints

__all__ = ["Place", "Store", "open_store", "open_to_read"]

PUBLISHED_PART_BYTES: Final = 2**33
#: The storage of a root, its mode, whether it is flushed, and where its reads are kept, if it was opened so before.
_Root = tuple[Storage, Mode, bool, ReadCache | None]


def open_store(
    url: Place = None,
    mode: Mode | None = None,
    *,
    storage_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    durable: bool = True,
    cache: str | int | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> Store:
    """A store of activations. Nothing is written by opening one.

    Parameters
    ----------
    url : str, path, Store, or a sequence of these, optional
        A folder, or a URL that fsspec knows (``s3://bucket/prefix``, ``memory://…``); a web address must be that of a published copy. None
        is the default store: that of `set_cache_backend` or ``$LMPROBE_CACHE_BACKEND``, else ``$LMPROBE_CACHE_DIR/.zarr``. The cache's
        settings apply to it.
        Several are read as one. A later one wins over those before it, whenever it was written; only the last is written to.
    mode : {"a", "r"}, optional
        ``"a"`` reads and adds, and makes the store at the first write; ``"r"`` never writes anything. By default ``"r"`` for web addresses
        and published copies, which cannot be written, else ``"a"``. Of several places this is the mode of the last: the others are never
        written to.
    storage_options : mapping or sequence of mappings, optional
        Passed to the fsspec file system, for example ``{"anon": True}`` or ``{"key": …, "secret": …, "endpoint_url": …}``. For several
        places, one mapping is used for all that are URLs; a sequence has a mapping, or None, for each.
    durable : bool
        Flush every part to the medium before it becomes visible (local folders).
    cache : str or 0, optional
        Disk of this machine for what is read of arrays of remote places, with its unit: ``"64 GB"``, of 1024³ bytes. What was read once is
        then read from there, by other processes too, as long as it is among the most recently used; it is compared with the checksums of
        the store at every use. Documents are read from their place every time. 0 keeps nothing; by default ``$LMPROBE_READ_CACHE``, else 0.
    cache_folder : str or path, optional
        The folder for it; by default ``$LMPROBE_READ_CACHE_DIR``, else ``.lmprobe-zarr/reads`` in ``$LMPROBE_CACHE_DIR``. What is kept is
        as secret as the stores that were read: a folder that is made anew is its owner's alone.

    Returns
    -------
    Store

    Raises
    ------
    StoreNotFoundError
        There is no store: with ``mode="r"``, or in any place but the last.
    NotAStoreError
        The place is a file, another zarr store, or a folder that holds other things.
    CorruptPartError
        The place holds the parts of a store, and the document of its root is missing or damaged.
    UnsupportedVersionError
        A store of a newer format version.
    InvalidArgumentError
        There is no place, a place is named twice, there is another number of options than of places, or `cache` is no size.
    ReadOnlyError
        ``mode="a"`` for a web address or a published copy.
    AccessDeniedError, UnreachableError
        A place refuses access or does not answer; the message names it.
    """
    if mode not in ("a", "r", None):
        raise InvalidArgumentError(f"mode={mode!r} is unknown: use 'a' to read and add, 'r' to read only")
    return _open(url, mode, storage_options, durable, config.read_cache(cache, cache_folder), is_told=cache is not None)


def open_to_write(place: Place) -> Store:
    """As `open_store`, for a call that writes and is done: it requests nothing ahead."""
    return _open(place, None, None, True, config.read_cache(), ahead=False)


def _open(
    url: Place,
    mode: Mode | None,
    storage_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None,
    durable: bool,
    reads: ReadCache | None,
    *,
    is_told: bool = False,
    ahead: bool = True,
) -> Store:
    """See `open_store`; `is_told` is whether the call says where reads are kept, also for what was opened before."""
    given = config.cache_backend() if url is None else url
    places = list(given) if isinstance(given, (list, tuple)) else [given]
    options = zip(places, options_for(places, storage_options), strict=True)
    roots = [root for place, own_options in options for root in _roots_of(place, own_options, durable, is_default=url is None)]
    urls = [storage.url for storage, _, _, _ in roots]
    if len(set(urls)) < len(urls):
        raise InvalidArgumentError(f"a place is named twice among {', '.join(urls)}: name each once, the one to write to last")
    catalogs: list[Catalog] = []
    for rank, (storage, allowed, flushed, own_reads) in enumerate(roots):
        # Only the last is written to, and a store that is read-only stays so, whatever `mode` says.
        wanted: Mode | None = "r" if rank < len(roots) - 1 or allowed == "r" else mode
        hint = storage.start_listing() if ahead and storage.is_slow else None
        storage, root_mode = open_root(storage, wanted)
        own_reads = reads if is_told or own_reads is None else own_reads
        catalogs.append(Catalog(storage, mode=root_mode, durable=flushed, rank=rank, reads=own_reads))
        catalogs[-1].hint = hint
    if not catalogs:
        raise InvalidArgumentError("the list of places is empty: give at least one folder or URL")
    return _store_of(tuple(catalogs), is_default=url is None)


def open_to_read(url: Place, *, storage_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None) -> Store:
    """A store that nothing is written to but marks of use, where it can be written at all; errors as for `open_store` with ``mode="r"``.

    For calls that take a place and only read, so that what they read counts as used. A `Store` is returned as it is.
    """
    if isinstance(url, Store):
        return url
    opened = open_store(url, mode="r", storage_options=storage_options)
    given = url[-1] if isinstance(url, (list, tuple)) and url else url
    if not isinstance(given, Store):
        # On a remote place nobody knows whether it may be written before it is tried.
        opened.catalog.notes_uses = not opened.is_published and opened.storage.is_local and opened.storage.may_write()
    return opened


def _roots_of(place: Any, options: Mapping[str, Any] | None, durable: bool, *, is_default: bool) -> list[_Root]:
    """The roots of one place, from the lowest to the highest."""
    if isinstance(place, Store):
        return [(catalog.storage, catalog.mode, catalog.durable, catalog.reads) for catalog in place.catalogs]
    if is_default and place is None:
        return [(open_storage(config.default_root(), options), "a", durable, None)]
    storage = open_storage(place, options)
    # A cache's place that is no store is a cache of lmprobe with entries of its own: the store is the folder .zarr inside it.
    if is_default and not storage.url.endswith(".zarr") and not storage.is_file("zarr.json"):
        storage = open_storage(f"{os.fspath(place).rstrip('/')}/.zarr", options)
    return [(storage, "a", durable, None)]


class Store:
    """Activations in one root, or in several that are read as one. Made by `open_store`; picklable, and usable from many threads.

    Parameters
    ----------
    storage : Storage
        The place of its own root.
    mode : {"a", "r"}
        ``"r"`` never writes.
    durable : bool
        Flush every part to the medium before its commit.
    is_default : bool
        Whether this is the default store, to which the cache's settings apply.
    below : Store, optional
        A store that is read as well and never written to. Its values are visible where this store has none.

    Attributes
    ----------
    catalogs : tuple of Catalog
        The index of each root that is read, from the lowest to this store's own.

    Notes
    -----
    Reading methods include the stores below; `entries`, writing and upkeep act on this store's own root only.
    """

    def __init__(
        self, storage: Storage, *, mode: Mode = "a", durable: bool = True, is_default: bool = False, below: Store | None = None
    ) -> None:
        lower = () if below is None else below.catalogs
        rank = lower[-1].rank + 1 if lower else 0
        self.catalogs: tuple[Catalog, ...] = (*lower, Catalog(storage, mode=mode, durable=durable, rank=rank))
        self.is_default = is_default

    def __reduce__(self) -> tuple[Any, ...]:
        return _store_of, (self.catalogs, self.is_default)

    @property
    def catalog(self) -> Catalog:
        """The index of this store's own root, which is the one that is written to."""
        return self.catalogs[-1]

    @property
    def storage(self) -> Storage:
        """The place of this store's own root."""
        return self.catalog.storage

    @property
    def mode(self) -> Mode:
        """``"a"`` where this store may be written to, ``"r"`` where it may not."""
        return self.catalog.mode

    @property
    def durable(self) -> bool:
        """Whether every part is flushed to the medium before its commit."""
        return self.catalog.durable

    @property
    def is_published(self) -> bool:
        """Whether this is a published copy, which never changes."""
        return self.catalog.is_published

    @property
    def url(self) -> str:
        """Where the store's own root is, which is the one that is written to."""
        return self.catalog.url

    @property
    def below(self) -> Store | None:
        """The stores that are read as well and never written to; None where there are none."""
        return _store_of(self.catalogs[:-1], self.is_default) if len(self.catalogs) > 1 else None

    @property
    def stack(self) -> tuple[Store, ...]:
        """Everything that is read as one, from the lowest store to this one."""
        return (self,) if self.below is None else (*self.below.stack, self)

    @property
    def own(self) -> Store:
        """The store without those below it; both share the index of its parts."""
        return self if self.below is None else _store_of((self.catalog,), self.is_default)

    @property
    def where(self) -> str:
        """Every place that is read, for messages."""
        return urls_of(self.catalogs)

    # -------------------------------------------------------------------------------------------------------- reading

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
        return groups_of(self.catalogs, whole=whole)

    def models(self) -> list[str]:
        """Names of all models of which anything is stored, sorted."""
        return stored_models(self.catalogs)

    def holds_parts(self, group: str) -> bool:
        """Whether a group has any committed part. One whose parts have all been evicted counts as absent.

        Parameters
        ----------
        group : str
            Its name.

        Returns
        -------
        bool
        """
        return any_holds_parts(self.catalogs, group)

    def matching(
        self, model: Model | None = None, provenance: GivenProvenance = None, group: str | None = None, *, whole: bool = True
    ) -> list[GroupInfo]:
        """Groups in which no field that is given differs.

        Parameters
        ----------
        model : str or path, optional
            Name of the model, its hub id or its folder.
        provenance : mapping or "any", optional
            Fields that must be equal. ``"any"`` also takes groups of a folder's name that do not record their weights.
        group : str, optional
            Name of the group itself.
        whole : bool
            Whether what is damaged is an error; see `view`.

        Returns
        -------
        list of GroupInfo
            Empty where none matches.
        """
        return matching_groups(self.catalogs, model, provenance, group, whole=whole)

    def find_group(self, model: Model | None = None, *, provenance: GivenProvenance = None, group: str | None = None) -> GroupInfo:
        """The one group that matches.

        Parameters
        ----------
        model : str or path, optional
            Name of the model, its hub id or its folder; may be left out where the store holds one group only.
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
            No group matches; the message says what is stored.
        AmbiguousProvenanceError
            Several match; the message names the fields in which they differ.
        """
        return find_group(self.catalogs, model, provenance, group)

    def view(self, info: GroupInfo, *, whole: bool = True) -> View:
        """All committed parts of a group as they are now.

        Parameters
        ----------
        info : GroupInfo
        whole : bool
            Whether a damaged part is an error. Otherwise it is left out, with one `CacheWarning`: for callers that can do without it,
            because other parts or the model make up for it.

        Returns
        -------
        View
            A snapshot, without what is committed later.

        Raises
        ------
        CorruptPartError
            A part's document is damaged.
        """
        return open_union(self.catalogs, info, whole=whole)

    def list_parts(self, folder: str, *, whole: bool = True, listed: Sequence[str] | None = None) -> list[Part]:
        """Committed parts of a folder in this store's own root, replaced ones too, in the order of their names.

        The folder is that of a group, or the one inside it that holds its annotations.

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
        return self.catalog.list_parts(folder, whole=whole, listed=listed)

    def set_aside(self, error: CorruptPartError) -> None:
        """Leave a damaged part out of everything that is read with ``whole=False``, and warn about it once.

        Parameters
        ----------
        error : CorruptPartError
            Names the part, and its root where that is not this store's own.
        """
        root = next((catalog for catalog in self.catalogs if catalog.url == error.root), self.catalog)
        root.set_aside(error)

    def forget(self, path: str) -> None:
        """Forget a part that was removed.

        Parameters
        ----------
        path : str
            Key of the part.
        """
        self.catalog.forget(path)

    def drop_empty_group(self, info: GroupInfo) -> None:
        """Remove a group's own document where nothing else is left of the group.

        Parameters
        ----------
        info : GroupInfo
            The group.
        """
        self.catalog.drop_empty_group(info)

    def forget_all(self) -> None:
        """Forget all parts and groups, so that they are read again."""
        for catalog in self.catalogs:
            catalog.forget_all()

    def note_once(self, what: str) -> bool:
        """Whether something is noted for the first time since this store was opened.

        Parameters
        ----------
        what : str
            Any text that identifies it.

        Returns
        -------
        bool
        """
        return self.catalog.note_once(what)

    def mark_used(self, parts: Iterable[Part]) -> None:
        """Note that parts of this store's own root are being used, for eviction. Nothing is noted where it is read-only; never an error.

        Parameters
        ----------
        parts : iterable of Part
            Those of other roots are left out.
        """
        mark_used(self.catalog, parts)

    def entries(self, info: GroupInfo) -> list[EvictionEntry]:
        """All parts and annotations of a group in this store's own root, with their sizes and last use.

        Reads metadata only. The number of requests grows with that of the parts.

        Parameters
        ----------
        info : GroupInfo
            The group.

        Returns
        -------
        list of EvictionEntry
        """
        return list_entries(self.catalog, info)

    def dataset(
        self,
        model: Model | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        chunks: Chunks = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        dtype: Dtype = None,
    ) -> xr.Dataset:
        """What is stored per prompt, lazily.

        Parameters
        ----------
        model : str or path, optional
            Name of the model, its hub id or its folder; may be left out where the store holds one only.
        prompts : iterable of str or sequence of int, optional
            Texts, hashes or token ids: exactly these, in this order, repeats included. None gives all, in the store's order.
        layers : "all", "middle", "last", int, sequence of int or slice, optional
            Which layers, in ascending order. None gives all that are stored; a slice or a word gives those of its layers that are.
        chunks : mapping, int or "auto", optional
            As in `xarray.open_dataset`: None is lazy without Dask, ``{}`` is Dask with one layer and one stored chunk at a time.
            Columns and coordinates of indexes stay as they are.
        provenance, group : optional
            Choose between several groups of one model.
        dtype : "stored", optional
            None gives float16 as float32, because sums in float16 are wrong; each chunk is converted by the thread that reads it.
            ``"stored"`` gives what is stored, for moving it elsewhere.

        Returns
        -------
        xarray.Dataset
            ``<site>_<pooling>(layer, prompt, hidden)`` and coordinates ``prompt, layer, n_tokens, prompt_length, text, …``
            along ``prompt``. What is absent reads as NaN. The attribute ``stored_dtype`` of each variable names the dtype of the values
            that are stored, ``bfloat16`` too.

        Raises
        ------
        ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError
        InvalidArgumentError, InvalidTypeError
            `chunks` or `dtype` is unknown.
        """
        with requesting_ahead(self.catalogs):
            view = self.view(self.find_group(model, provenance=provenance, group=group))
        return chunked(to_dataset(view, "prompts", prompts=prompts, layers=layers, dtype=dtype), chunks)

    def tokens(
        self,
        model: Model | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        chunks: Chunks = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        dtype: Dtype = None,
    ) -> xr.Dataset:
        """What is stored per token, lazily; the same arguments as `dataset`.

        Parameters
        ----------
        model, prompts, layers, chunks, provenance, group, dtype
            As for `dataset`.

        Returns
        -------
        xarray.Dataset
            ``<site>(layer, token, hidden)``, the tokens of all prompts end to end, with an index over ``prompt`` and
            ``position``: ``tokens.resid.sel(layer=16, prompt=h)`` are the tokens of one prompt.
        """
        with requesting_ahead(self.catalogs):
            view = self.view(self.find_group(model, provenance=provenance, group=group))
        return chunked(to_dataset(view, "tokens", prompts=prompts, layers=layers, dtype=dtype), chunks)

    def datatree(
        self, model: Model | None = None, *, provenance: Provenance | None = None, group: str | None = None, dtype: Dtype = None
    ) -> xr.DataTree:
        """Everything, lazily: ``/<group>/prompts`` and ``/<group>/tokens``.

        Parameters
        ----------
        model, provenance, group : optional
            Only the groups that match; the model by its name, hub id or folder.
        dtype
            As for `dataset`.

        Returns
        -------
        xarray.DataTree

        Raises
        ------
        ModelNotStoredError
            Something was named, and no group matches.
        """
        named = model is not None or group is not None or bool(provenance)
        chosen = find_groups(self.catalogs, model, provenance, group) if named else self.groups().values()
        tree = to_datatree([self.view(info) for info in chosen], dtype=dtype)
        return tree.map_over_datasets(lambda data: chunked(data, None))

    def coverage(
        self,
        model: Model | None = None,
        prompts: Iterable[Any] | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> xr.DataArray:
        """What is stored, as truth values: True for every variable, prompt and layer that some part holds.

        Parameters
        ----------
        model, prompts, provenance, group
            As for `dataset`.

        Returns
        -------
        xarray.DataArray of bool, dims (variable, prompt, layer)
            Activations of both levels. A variable without a layer axis is the same along ``layer``. No values are read.
        """
        return coverage_of(self.view(self.find_group(model, provenance=provenance, group=group)), prompts)

    # -------------------------------------------------------------------------------------------------------- writing

    def check_writable(self) -> None:
        """Raise `ReadOnlyError` where this store may not be written to."""
        self.catalog.check_writable()

    def new_part(
        self,
        info: GroupInfo,
        *,
        kind: str = "part",
        compressed: bool = True,
        recorded: Mapping[str, Any] | None = None,
        shards: bool = False,
    ) -> PartWriter:
        """A writer for one part of a group. The group is made where it is new; the part becomes visible with its commit.

        Parameters
        ----------
        info : GroupInfo
            The group.
        kind : {"part", "annotation"}
            An annotation holds columns alone.
        compressed : bool
            False stores raw values, which still end in a checksum.
        recorded : mapping, optional
            What is noted in the part, such as versions and the device. It is never read again.
        shards : bool
            Write the chunks of a layer to few files, see `compact`.

        Returns
        -------
        PartWriter

        Raises
        ------
        ReadOnlyError, NoSpaceError
        """
        return self.catalog.new_part(info, kind=kind, compressed=compressed, recorded=recorded, shards=shards)

    def write(
        self,
        info: GroupInfo,
        batch: TokenBatch,
        *,
        kind: str = "part",
        compressed: bool = True,
        recorded: Mapping[str, Any] | None = None,
    ) -> str:
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
        recorded : mapping, optional
            As for `new_part`.

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
        check_new_provenance(info.provenance)
        if info.name in self.groups(whole=False):
            view = self.view(info, whole=False)
            view.find(batch.sha256)
            batch = fit_batch(view, batch)
        with self.new_part(info, kind=kind, compressed=compressed, recorded=recorded) as writer:
            writer.order = CallOrder.of(batch.sha256) if kind == "part" else None
            writer.append(batch)
            return writer.commit().name

    def annotate(
        self,
        model: Model | None,
        columns: Mapping[str, Mapping[Any, Any] | pd.Series[Any]] | pd.DataFrame,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> None:
        """Add per-prompt columns, or new values of them, to what is stored.

        Parameters
        ----------
        model : str or path
            Name of the model, its hub id or its folder.
        columns : mapping of str to mapping, or DataFrame
            Column to ``{text or hash: value}`` or to a Series with texts or hashes as its index; or a DataFrame with such an index. Prompts
            that are left out keep their values; a missing value (None, NaN, NA) replaces the stored one.
        provenance, group : optional
            Choose between several groups of one model.

        Raises
        ------
        MissingPromptsError
            A prompt is not stored; nothing is written.
        InvalidArgumentError
            A column's name or values cannot be stored, or are of another kind than what is stored under that name.
        """
        self.check_writable()
        columns = check_columns(columns)
        view = self.view(self.find_group(model, provenance=provenance, group=group))
        if spans := next((name for name in columns if view.pooled_by(name)), None):
            raise InvalidArgumentError(
                f"{spans!r} says which characters {next(iter(view.pooled_by(spans)))!r} is pooled over: give the column another name, or "
                "other spans with over= of extract"
            )
        self.write_columns(view, find_rows(view, columns))

    def write_columns(self, view: View, columns: Mapping[str, tuple[Ints, Sequence[Any] | Column]]) -> None:
        """Write columns as annotations, one for all columns of the same prompts.

        Parameters
        ----------
        view : View
            The group as it is.
        columns : mapping of str to (ndarray of int, sequence)
            For each column the prompts of the view, none twice, and their values.
        """
        for batch in annotation_batches(view, columns):
            self.write(view.group, batch, kind="annotation")

    # ----------------------------------------------------------------------------------------------------------- removing

    def delete(
        self,
        model: Model | None,
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
        model : str or path
            Name of the model, its hub id or its folder.
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
            This store is read-only; or a store below it holds a prompt too, which would stay visible. Nothing is deleted.
        ModelNotStoredError, AmbiguousProvenanceError, NoSpaceError
        """
        self.check_writable()
        info = self.find_group(model, provenance=provenance, group=group)
        return delete_from(self.catalog, info, prompts, below=self.catalogs[:-1])

    # ------------------------------------------------------------------------------------------------------------ upkeep

    def listing(self, info: GroupInfo, *, whole: bool = True) -> Listing:
        """Everything in a group's folder of this store's own root now, unfinished parts too.

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
        return self.catalog.listing(info, whole=whole)

    def compact(
        self,
        model: Model | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        part_bytes: int | None = None,
        min_parts: int = 2,
        shards: bool = True,
        upgrade: bool = False,
        dry_run: bool = False,
        progress: bool = True,
    ) -> CompactPlan:
        """Merge small parts into larger ones. Views show exactly the same before and after.

        Only neighbours that hold the same variables, layers and dtypes become one, and only where that provably changes nothing. The old
        parts are replaced at once, and stay for views that are open until `gc` removes them. Others may read and write meanwhile: what they
        commit keeps its place. If this is stopped at any moment, the store shows what it showed before, and a second call completes it.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match.
        part_bytes : int, optional
            The most that a merged part holds, uncompressed; by default 1 GiB. In a cache with a limit it is at most a fiftieth of the
            limit. Parts of more than half of it stay as they are.
        min_parts : int
            Fewer neighbours than this stay as they are.
        shards : bool
            Write the chunks of a layer to few files, of about 64 MiB on a local disk and 256 MiB elsewhere. False writes each chunk to a
            file of its own, which other Zarr readers read faster.
        upgrade : bool
            Also write every part of format 1 again in format 2, whether it is merged or not. Releases of this package that know only
            format 1 cannot read the store afterwards. Call it again where it was stopped.
        dry_run : bool
            Only plan: nothing is written.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        CompactPlan
            What was merged, or would be.

        Raises
        ------
        ModelNotStoredError, ReadOnlyError, NoSpaceError, CorruptPartError
        """
        self.check_writable()
        most = self._part_bytes(PART_BYTES if part_bytes is None else part_bytes)
        check_min_parts(min_parts)
        groups = find_groups((self.catalog,), model, provenance, group)
        return compact_groups(
            self.catalog, groups, part_bytes=most, min_parts=min_parts, shards=shards, upgrade=upgrade, dry_run=dry_run, progress=progress
        )

    def _part_bytes(self, part_bytes: int) -> int:
        return part_bytes_within(part_bytes, config.cache_limit() if self.is_default else None)

    def gc(self, *, max_age: float = 86400.0, dry_run: bool = False) -> GcSummary:
        """Remove what is no longer needed: replaced parts, and what killed writers left.

        Parameters
        ----------
        max_age : float
            Seconds. A replaced part is removed when it was replaced longer ago than this, so that views which were open then can go on
            reading. A part without a commit is removed when nothing was written to it for this long. A writer that pauses for longer loses
            its part: give no age below that of your longest run. An upload to an object store that was never finished is aborted when it
            was begun longer ago.
        dry_run : bool
            Only plan: nothing is removed.

        Returns
        -------
        GcSummary
            What was removed, or would be.

        Raises
        ------
        InvalidArgumentError, ReadOnlyError
        """
        return collect_garbage(self.catalog, max_age=max_age, dry_run=dry_run)

    def verify(
        self,
        model: Model | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        full: bool = True,
        progress: bool = True,
    ) -> VerifySummary:
        """Compare the files of the store with what was committed. Writes nothing.

        Every part and annotation is checked, replaced ones too: its document by the digest in it, and all other files by the table that the
        part was committed with. So are the documents of groups and root, and of a published copy whether its root agrees with the parts
        below it. Stores below this one are verified too; lmprobe's own entries beside a store are not.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match. A group whose document is damaged is checked in any case.
        full : bool
            Read every file and compare its checksum, which also finds files of equal length that were exchanged. Otherwise only documents
            are read, and only the sizes of all other files are compared, with one list per part.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        VerifySummary
            True where nothing is wrong. It also counts values that are not finite and rows that are blank, which is no damage.

        Raises
        ------
        ModelNotStoredError
        AccessDeniedError, UnreachableError
            The place refuses access or does not answer, which says nothing about the files.
        """
        began = time.perf_counter()
        scans = self._scan(self.catalogs, model, provenance, group)
        return verify_scans(self.where, scans, full=full, began=began, progress=progress)

    def _scan(self, catalogs: Sequence[Catalog], model: Model | None, provenance: Provenance | None, group: str | None) -> list[StoreScan]:
        """Which groups and parts the roots hold, read afresh; an error where some were named, and none match."""
        scans = [scan_store(catalog.storage, choose_group(model, provenance, group)) for catalog in catalogs]
        if not any(scan.groups for scan in scans) and (model is not None or provenance or group is not None):
            find_groups(catalogs, model, provenance, group)
        return scans

    def repair(
        self,
        model: Model | None = None,
        *,
        provenance: Provenance | None = None,
        group: str | None = None,
        dry_run: bool = False,
        progress: bool = True,
    ) -> RepairSummary:
        """Remove what a full `verify` finds broken, keep what is whole, and list the prompts to extract again.

        No more values are removed than need be: a part is written again without the prompts in a broken chunk, in that variable and layer
        only. All its other values, its texts and columns stay, and so does the order of the prompts. A broken column of yours is removed
        for all prompts of its part. Documents that are known from elsewhere (root, group, arrays) are written again as they were. A part
        whose own document is damaged is removed altogether, since nothing says any more what its files should be. Where that part was
        merged from others which are still there, they become visible again.

        Everything becomes invisible before its bytes are removed. If this is stopped at any moment, the store shows nothing wrong; call
        again. Files that exist and cannot be read stay, and so do files that are not the store's. Of several stores that are read as one
        only the last is repaired.

        Parameters
        ----------
        model, provenance, group : optional
            Which groups; all that match.
        dry_run : bool
            Only plan: nothing is written or removed.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        RepairSummary
            Its `lost` says what to extract again:
            ``for lost in summary.lost: lz.extract(model, lost.prompts, store=store, **lost.arguments)``.

        Raises
        ------
        ReadOnlyError
            Also of published copies, which never change.
        ModelNotStoredError, AccessDeniedError, UnreachableError, NoSpaceError
        """
        self.check_writable()
        (scan,) = self._scan((self.catalog,), model, provenance, group)
        return repair_root(self.catalog, scan, dry_run=dry_run, progress=progress)

    def publish(
        self,
        url: str | os.PathLike[str],
        *,
        model: Model | None = None,
        prompts: Iterable[Any] | None = None,
        layers: LayerSpec | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        part_bytes: int = PUBLISHED_PART_BYTES,
        text: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        card: str | bool | None = None,
        licence: str | None = None,
        private: bool | None = None,
        page: bool = True,
        scores: xr.Dataset | None = None,
        shards: bool = True,
        progress: bool = True,
    ) -> PublishSummary:
        """Write a compacted copy to another place, for others to read: also over plain HTTP, from a server that lists nothing.

        The copy shows what this store shows, in its order, and never changes: it opens for reading only. Its root is written last and
        names everything in it, so nothing is visible before the copy is whole. If this is interrupted, call it again to complete the copy.
        Only one process may publish to a place at a time.

        Parameters
        ----------
        url : str or path
            A new or empty place. ``hf://datasets/organisation/name`` is a repository of the Hugging Face Hub, which is made if it is not
            there: the copy is written to a temporary folder first, and uploaded in few commits, the last of which makes it visible.
        model, provenance, group : optional
            Which groups; all that match. With `prompts` or `layers` just one.
        prompts : iterable of str or sequence of int, optional
            Only these, in the store's order.
        layers : "all", "middle", "last", int, sequence of int or slice, optional
            Only these.
        part_bytes : int
            The most that a part holds, uncompressed.
        text : bool
            Whether the prompts' texts are published. Their sha256 always is, and so are your own columns.
        storage_options : mapping, optional
            Passed to the fsspec file system.
        overwrite : bool
            Replace a copy that was published there before. Readers that have the old copy open get `PartGoneError`.
        card : str or bool, optional
            The text of ``README.md``; None makes one, False writes none.
        licence : str, optional
            For the card, by its name on the Hugging Face Hub, such as "cc-by-4.0". None says that it is not known.
        private : bool, optional
            Of a repository of the Hub (``hf://datasets/…``) that is made: whether it is hidden from others. None leaves that to the Hub.
            True is an error where the repository is there already and open to everyone.
        page : bool
            Whether ``index.html`` is written, a page for browsers that fetches nothing: contents, coverage, the first 12 prompts with your
            columns (and their texts where `text` is true), and how to open the copy.
        scores : Dataset, optional
            From :func:`lmprobe_zarr.sweep` of a model that is published: the page draws them by layer.
        shards : bool
            Write the chunks of a layer to few files, of about 64 MiB on a local disk and 256 MiB elsewhere. False writes each chunk to a
            file of its own, which other Zarr readers read faster.
        progress : bool
            Show a bar on terminals.

        Returns
        -------
        PublishSummary

        Raises
        ------
        InvalidArgumentError, NotAStoreError
            The place holds something else, or an ``index.html`` that was not written by `publish`; these are several stores that are read
            as one; or `scores` are of another model, not of a sweep, or without a page. Nothing is written then.
        ModelNotStoredError, AmbiguousProvenanceError, MissingPromptsError, LayerOutOfRangeError, NoSpaceError, CorruptPartError
        """
        if self.below is not None:
            raise InvalidArgumentError(
                f"{self.where} are read as one here, and a copy is made of one store: open and publish each of them alone"
            )
        most = self._part_bytes(part_bytes)
        if scores is not None and not page:
            raise InvalidArgumentError("scores are drawn on the page of the copy, and page=False writes none: leave one of them out")
        chosen = self._select(prompts, layers, model, provenance, group)
        write_page = plan_copy_page([selection.group for selection in chosen], scores, text=text, licence=licence) if page else None
        return publish_to(
            self.catalog,
            url,
            chosen,
            part_bytes=most,
            text=text,
            card=card,
            overwrite=overwrite,
            shards=shards,
            storage_options=storage_options,
            progress=progress,
            licence=licence,
            private=private,
            page=write_page,
        )

    def _select(
        self, prompts: Iterable[Any] | None, layers: LayerSpec | None, model: Model | None, provenance: Provenance | None, group: str | None
    ) -> list[Selection]:
        """What a copy takes of this store's own root: all of the groups that match, or some prompts and layers of the one that matches."""
        if prompts is None and layers is None:
            return select_from(self.catalog, find_groups((self.catalog,), model, provenance, group))
        return select_from(self.catalog, [find_group((self.catalog,), model, provenance, group)], prompts, layers)

    def copy_to(
        self,
        target: Store | str | os.PathLike[str],
        *,
        model: Model | None = None,
        prompts: Iterable[Any] | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> CopySummary:
        """Copy what another store lacks into it, by prompt, variable and layer.

        Parts of which it has nothing are copied as they are, under their own names; of other parts, only what is missing is written.
        Columns of prompts that it has already stay as they are there; annotations are copied. If this is interrupted, call it again to
        complete the copy. Of several stores that are read as one only the last is copied, so the target may be one of those below it.

        Parameters
        ----------
        target : Store, path or URL
            A store that can be written to. It is made where there is none.
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
            What was copied.

        Raises
        ------
        ReadOnlyError, NoSpaceError, MissingPromptsError, ModelNotStoredError, AmbiguousProvenanceError, CorruptPartError
        """
        other = target if isinstance(target, Store) else open_store(target, "a", storage_options=storage_options, durable=self.durable)
        check_copy(self.catalog, other.catalog)
        chosen = self._select(prompts, None, model, provenance, group)
        return copy_selections(self.catalog, other.catalog, chosen, progress=progress)

    def drop(
        self,
        model: Model | None,
        variables: Iterable[str],
        *,
        layers: LayerSpec | None = None,
        provenance: Provenance | None = None,
        group: str | None = None,
    ) -> int:
        """Remove variables and free their space; everything else stays. ``drop(model, ["resid"])`` removes the tokens' activations and
        keeps the pooled vectors.

        Every part that holds one of the variables is written again without it, and its old files are removed. Views that are open raise
        `PartGoneError`. The numbers and ids of the prompts' tokens stay. A part that is left without anything is removed, and with it
        prompts that no other part holds. Of several stores that are read as one only the last is changed, and the values of those below it
        stay visible.

        Parameters
        ----------
        model : str or path
            Name of the model, its hub id or its folder.
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
        info = find_group((self.catalog,), model, provenance, group)
        return drop_from(self.catalog, info, variables, layers)

    # ------------------------------------------------------------------------------------------------------- printing

    def __repr__(self) -> str:
        return str(describe_catalogs(self.catalogs))

    def _repr_html_(self) -> str:
        return str(describe_catalogs(self.catalogs).to_html())


def _store_of(catalogs: tuple[Catalog, ...], is_default: bool) -> Store:
    """A store over catalogs that exist already, and which it shares."""
    store = Store.__new__(Store)
    store.catalogs, store.is_default = catalogs, is_default
    return store


Root = str | os.PathLike[str] | Store
Place = Root | Sequence[Root] | None
