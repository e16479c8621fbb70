"""`Catalog`: the groups and parts of one root, each document read once; and the union of several roots.

Decides nothing about upkeep and reads no activations. Code that needs only one root takes a `Catalog`, not a `Store`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError, ReadOnlyError, UnreachableError
from lmprobe_zarr.log import warn
from lmprobe_zarr.storage import ReadCache, Storage, run_all
from lmprobe_zarr.store.format import (
    ANNOTATIONS,
    COMMITS,
    GROUP_NAME,
    PART_NAME,
    STAMPS,
    FilesTable,
    GroupInfo,
    check_table,
    new_part_name,
    parse_group,
    parse_part,
)
from lmprobe_zarr.store.parts.ahead import Ahead, keys_of_hint
from lmprobe_zarr.store.parts.commits import find_lost
from lmprobe_zarr.store.parts.frozen import FrozenStorage
from lmprobe_zarr.store.parts.listing import Listing, list_names
from lmprobe_zarr.store.parts.part import Part
from lmprobe_zarr.store.parts.salvage import NO_LAYER, salvage
from lmprobe_zarr.store.parts.view import View, open_view
from lmprobe_zarr.store.parts.writer import PartWriter, write_group

__all__ = ["Catalog", "Mode", "any_holds_parts", "groups_of", "open_union", "requesting_ahead", "urls_of", "visible_parts"]

Mode = Literal["a", "r"]


class Catalog:
    """The groups and parts of one root. Picklable, and usable from many threads.

    Parameters
    ----------
    storage : Storage
        The place of the root.
    mode : {"a", "r"}
        ``"r"`` never writes.
    durable : bool
        Flush every part to the medium before its commit.
    rank : int
        Which of several roots that are read as one this is; a higher one wins, see `Part`.
    reads : ReadCache, optional
        Keeps on this machine what is read of arrays; not used where the place is as near.

    Attributes
    ----------
    notes_uses : bool
        Whether a reading is noted as a use of the part: not in a root that was opened as read-only, nor in a published copy.
    last_used : dict of str to float
        When this process last noted the use of each part, by its key, in seconds of `time.monotonic`.
    """

    def __init__(self, storage: Storage, *, mode: Mode = "a", durable: bool = True, rank: int = 0, reads: ReadCache | None = None) -> None:
        self.storage, self.mode, self.durable, self.rank = storage, mode, durable, rank
        self.reads = reads if storage.is_slow else None
        #: What a single list has found when the root was opened, see `Storage.start_listing`.
        self.hint: Future[list[str]] | None = None
        self._ahead = Ahead(storage)
        self.notes_uses = mode == "a" and not self.is_published
        self.last_used: dict[str, float] = {}
        # Documents of parts and groups never change once they are written, so each is read once.
        self._parts: dict[str, Part] = {}
        self._groups: dict[str, GroupInfo] = {}
        self._damaged: dict[str, CorruptPartError] = {}
        self._versions: dict[str, Hashable] = {}
        self._noted: set[str] = set()
        self._stand_ins: dict[str, Part | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.storage, self.mode, self.durable, self.rank, self.reads)

    @property
    def url(self) -> str:
        """Where the root is."""
        return self.storage.url

    @property
    def is_published(self) -> bool:
        """Whether this is a published copy, which never changes."""
        return isinstance(self.storage, FrozenStorage)

    @property
    def damage(self) -> tuple[CorruptPartError, ...]:
        """Errors of the damaged parts and groups that are left out, see `set_aside`."""
        return tuple(self._damaged.values())

    @contextmanager
    def requesting_ahead(self) -> Iterator[None]:
        """For one call: the lists and documents that it is going to ask for are requested together, at its beginning.

        The first call does so, since later ones know the documents. It sees what is there while it runs, as any other.
        """
        hint, self.hint = self.hint, None
        if isinstance(self.storage, FrozenStorage):
            keys = self.storage.keys() if self.storage.is_slow and not self._groups else []
        else:
            keys = [] if hint is None or self._groups else keys_of_hint(hint)
        if not keys:
            yield
            return
        with self._ahead.of(keys):
            yield

    def note_once(self, what: str) -> bool:
        """Whether something is noted for the first time."""
        is_new = what not in self._noted
        self._noted.add(what)
        return is_new

    # --------------------------------------------------------------------------------------------------------- groups

    def groups(self, *, whole: bool = True) -> dict[str, GroupInfo]:
        """All groups by name, sorted.

        Parameters
        ----------
        whole : bool
            Whether a damaged group is an error. Otherwise it is left out, with a warning.
        """
        names = [name for name in self._ahead.list("") if not name.startswith(".") and name != "zarr.json"]
        new = [name for name in names if name not in self._groups and (whole or name not in self._damaged)]
        run_all([partial(self._read_group, name, whole) for name in new], self.storage.pace)
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
        self._versions[name] = self.storage.version(f"{name}/zarr.json")
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
            return  # a zarr group of another program, beside ours
        if info.name != name:
            raise CorruptPartError(f"{where}/zarr.json is that of {info.name}: it was changed, or the folder renamed or copied")
        self._groups[name] = info

    def _read_document(self, path: str, ours: bool) -> bytes | None:
        """The ``zarr.json`` of a folder, None where there is none.

        `ours` is whether the folder has a name that only this package gives; the document of any other folder need not be readable.
        """
        try:
            return self._ahead.read(f"{path}/zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if isinstance(error, UnreachableError):
                raise
            if not ours:
                return None  # not ours, such as the lost+found of a disk
            if isinstance(error, LmprobeZarrError):
                raise
            what = "is a folder: delete it"
            if not isinstance(error, IsADirectoryError):
                what = f"cannot be read ({error.strerror}): delete it, or mend the disk"
            raise CorruptPartError(f"{self.url}/{path}/zarr.json {what}") from error

    def holds_parts(self, group: str) -> bool:
        """Whether a group, given by its name, has any committed part. One whose parts have all been evicted counts as absent."""
        names: list[str] = []
        # List again until nothing new is found: a part that replaces another is committed before the other is removed.
        while True:
            listed = self.storage.list(group) if names else self._ahead.list(group)
            new = [name for name in self._part_names(group, listed) if name not in names]
            if not new:
                return bool(find_lost(self.storage, [f"{group}/{name}" for name in names]))  # the view that is opened next names it
            if any(self._is_committed(f"{group}/{name}") for name in new):
                return ANNOTATIONS not in listed or self._shows_any(group)
            names += new

    def _shows_any(self, group: str) -> bool:
        """Whether anything of a group with committed parts is shown: an annotation may have replaced them, and tombstones hide them."""
        info = self._groups.get(group)
        if info is None:
            return True
        try:
            parts, notes = self.parts_and_annotations(info)
        except CorruptPartError:
            return True  # the view that is opened next names the damage
        replaced = {name for part in (*parts, *notes) for name in part.info.replaces}
        shown = any(part.info.name not in replaced for part in parts)
        return shown and (not any(note.info.is_tombstone for note in notes) or len(open_view(self.storage, info, parts, notes)) > 0)

    def _is_committed(self, path: str) -> bool:
        if self.storage.is_local:
            return self.storage.is_file(f"{path}/zarr.json")
        # On other storages every check is a request, so the document is read at once: the caller needs it next.
        try:
            return path in self._parts or self._read_part(path, whole=True) is not None
        except CorruptPartError:
            return True  # the view that is opened next names the damage

    def drop_empty_group(self, info: GroupInfo) -> None:
        """Remove a group's own document where nothing else is left of the group."""
        left = [name for name in self.storage.list(info.name) if name not in ("zarr.json", COMMITS, STAMPS)]
        if not left:
            self.storage.remove([f"{info.name}/zarr.json"])
            self._groups.pop(info.name, None)

    # ---------------------------------------------------------------------------------------------------------- parts

    def list_parts(self, folder: str, *, whole: bool = True, listed: Sequence[str] | None = None, tables: bool = True) -> list[Part]:
        """Committed parts of a group's folder, or annotations of its folder for them, replaced ones too, in the order of their names.

        Parameters
        ----------
        folder : str
            Key of the folder.
        whole : bool
            Whether what is damaged is an error. Otherwise it is left out, with a warning.
        listed : sequence of str, optional
            Names that were just listed there, which are not listed again.
        tables : bool
            Whether tables of files are checked now, as is needed to copy or remove files. Otherwise each is checked when a chunk of its
            part is first read.
        """
        paths = [f"{folder}/{name}" for name in self._part_names(folder, listed)]
        # A copy, since other threads remove parts from the catalog as they remove them from the storage.
        held = {path: part for path in paths if (part := self._parts.get(path)) is not None}
        if self.storage.is_local:
            # Known parts may have been evicted since. On other storages each check would be a request; there, a read from an evicted
            # part raises PartGoneError.
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
                # Parsing holds the interpreter's lock: threads would only slow each other down.
                for path in absent:
                    read(path)
            else:
                run_all([partial(read, path) for path in absent], self.storage.pace)
            if all(path in held or path in self._damaged for path in absent):
                break
            # Some have no commit. They may be unfinished. Or they were replaced and removed since they were listed; then the parts that
            # replaced them were committed before that, but are not in the list.
            again = [f"{folder}/{name}" for name in self._part_names(folder)]
            if set(again) <= set(paths):
                self._check_lost([path for path in absent if path not in held and path not in self._damaged], whole)
                break
            paths = sorted({*paths, *again})
        there = set(paths)
        for path in [*self._parts]:  # or a long-running process would remember every part there ever was
            if path not in there and path.rpartition("/")[0] == folder:
                self.forget(path)
        for path in paths if tables else ():
            if path in held and path not in self._damaged:
                try:
                    check_table(held[path].info.files)
                except CorruptPartError as error:
                    if whole:
                        raise
                    self.set_aside(error)
        if whole and (damaged := next((self._damaged[path] for path in paths if path in self._damaged), None)):
            raise damaged
        return [held[path] for path in paths if path in held and path not in self._damaged]

    def _check_lost(self, paths: list[str], whole: bool) -> None:
        """Treat as damaged what had a commit, among folders of one group without one."""
        for path in find_lost(self.storage, paths):
            why = "this copy names it: it was published again since it was opened, or the file was deleted"
            why = why if self.is_published else "the part was committed: something else than this package deleted it"
            error = CorruptPartError.of(self.url, path, f"{self.url}/{path}/zarr.json is missing, though {why}")
            if whole:
                raise error
            self.set_aside(error)

    def _part_names(self, folder: str, listed: Sequence[str] | None = None) -> list[str]:
        found = self.storage.list(folder) if listed is None else listed
        return [name for name in found if name not in ("zarr.json", ANNOTATIONS) and not name.startswith(".")]

    def _read_part(self, path: str, whole: bool) -> Part | None:
        self._versions[path] = self.storage.version(f"{path}/zarr.json")
        try:
            data = self._read_document(path, PART_NAME.fullmatch(path.rpartition("/")[2]) is not None)
            if data is None:
                return None  # being written, or left by a writer that was killed: not committed, so ignored
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
        if isinstance(info.files, FilesTable):
            info.files.name_part(self.url, path)
        # A part's files are those that its document gives lengths and checksums of, so another document is another part.
        kept = None if self.reads is None else self.reads.reads_of(self.url, self.storage.server, path, data)
        part = self._parts[path] = Part(self.storage, path, info, len(data), self.rank, self.notes_uses, kept)
        return part

    def parts_and_annotations(self, info: GroupInfo, *, whole: bool = True, tables: bool = False) -> tuple[list[Part], list[Part]]:
        """Committed parts and annotations of a group, replaced ones too; `whole` and `tables` as in `list_parts`."""
        # The list of the group's folder says whether it has annotations. Most have none, and then this one list, or request, is enough.
        names = self._ahead.list(info.name)
        notes: list[Part] = []
        if ANNOTATIONS in names:
            folder = f"{info.name}/{ANNOTATIONS}"
            notes = self.list_parts(folder, whole=whole, listed=self._ahead.list(folder), tables=tables)
        return self.list_parts(info.name, whole=whole, listed=names, tables=tables), notes

    def listing(self, info: GroupInfo, *, whole: bool = True) -> Listing:
        """Everything in a group's folder now, unfinished parts too; `whole` as in `list_parts`."""
        names = list_names(self.storage, info.name)
        parts = self.list_parts(info.name, whole=whole)
        notes = self.list_parts(f"{info.name}/{ANNOTATIONS}", whole=whole)
        return Listing(parts=tuple(parts), annotations=tuple(notes), names=names)

    def view(self, info: GroupInfo, *, whole: bool = True) -> View:
        """The union of a group's parts in this root; `whole` as in `list_parts`."""
        return open_union([self], info, whole=whole)

    def stand_ins(self, info: GroupInfo) -> list[Part]:
        """Tombstones in memory for damaged parts of a group that are left out: what they had replaced must not serve in their stead."""
        found = []
        for path in [path for path in self._damaged if path.startswith(f"{info.name}/")]:
            if path not in self._stand_ins:
                self._stand_ins[path] = self._stand_in(path)
            part = self._stand_ins[path]
            if part is not None:
                found.append(part)
        return found

    def _stand_in(self, path: str) -> Part | None:
        known = self._parts.get(path)
        if known is not None:
            info = known.info
            removed = {key: info.layers if array.layered else None for key, array in info.activations.items()}
            if set(info.replaces) & set(self.storage.list(path.partition("/")[0])):
                return None  # the parts that it was merged from hold the same, and serve
        else:
            salvaged = salvage(self.storage, path)
            if salvaged is None:
                return None
            info, removed = salvaged.info, dict(salvaged.info.removed)
            for key, layer in salvaged.cells:
                removed[key] = None if layer == NO_LAYER else tuple(sorted({*(removed.get(key) or ()), layer}))
        if not removed:
            return None
        info = replace(info, kind="annotation", arrays={}, files={}, layers=(), replaces=(), removed=removed)
        return Part(self.storage, path, info, rank=self.rank)

    # ------------------------------------------------------------------------------------------- damaged and gone parts

    def set_aside(self, error: CorruptPartError) -> None:
        """Leave a damaged part or group out of everything that is read with ``whole=False``, and warn about it once.

        Parameters
        ----------
        error : CorruptPartError
            Names the part; where it names none, it is raised.
        """
        if error.part is None:
            raise error
        if error.part not in self._damaged:
            self._damaged[error.part] = error
            warn(f"{str(error).splitlines()[0]}\ngoing on without it")

    def forget(self, path: str) -> None:
        """Forget a part that was removed, given by its key."""
        self._parts.pop(path, None)
        self._versions.pop(path, None)
        self.last_used.pop(path, None)
        self._damaged.pop(path, None)
        self._stand_ins.pop(path, None)

    def adopt(self, other: Catalog) -> None:
        """Take over the documents that another catalog of the same root has read, except those that were replaced since."""
        for known, own in ((other._parts, self._parts), (other._groups, self._groups)):
            for path, document in list(known.items()):
                version = self.storage.version(f"{path}/zarr.json")
                if version == other._versions.get(path):
                    own[path] = document  # type: ignore[assignment]
                    self._versions[path] = version

    def forget_all(self, *, damaged: bool = False) -> None:
        """Forget all parts and groups, so that they are read again; with `damaged` also what was found damaged."""
        self._parts.clear()
        self._groups.clear()
        if damaged:
            self._damaged.clear()
            self._stand_ins.clear()

    # -------------------------------------------------------------------------------------------------------- writing

    def check_writable(self) -> None:
        """Raise `ReadOnlyError` where this root may not be written to."""
        if self.is_published:
            raise ReadOnlyError(f"{self.url} is a published copy, which never changes: write to the store that it was made from")
        if self.mode == "r":
            raise ReadOnlyError(f"{self.url} was opened with mode='r': open it with mode='a' to write")
        if not self.storage.may_write():
            raise ReadOnlyError(f"{self.url} cannot be written: check permissions, or give another place")

    def new_part(
        self,
        info: GroupInfo,
        *,
        kind: str = "part",
        compressed: bool = True,
        recorded: Mapping[str, Any] | None = None,
        shards: bool = False,
    ) -> PartWriter:
        """A writer for one part of a group, which is made where it is new; see `Store.new_part`."""
        self.check_writable()
        write_group(self.storage, info, durable=self.durable)
        self._groups[info.name] = info
        older = [name for folder in (info.name, f"{info.name}/{ANNOTATIONS}") for name in self.storage.list(folder)]
        # The new name sorts after all others. Only names of parts count: any other could sort so late that the names no longer say how far
        # the clocks of other writers have come.
        name = new_part_name(max((n for n in older if PART_NAME.fullmatch(n)), default=""))
        return PartWriter(
            self.storage, info, name, kind=kind, compressed=compressed, durable=self.durable, recorded=recorded, shards=shards
        )


def _reopen(storage: Storage, mode: Mode, durable: bool, rank: int, reads: ReadCache | None) -> Catalog:
    return Catalog(storage, mode=mode, durable=durable, rank=rank, reads=reads)


# ------------------------------------------------------------------------------------------- several roots, lowest rank first


def urls_of(catalogs: Sequence[Catalog]) -> str:
    """The URLs of several roots, for messages."""
    return " and ".join(catalog.url for catalog in catalogs)


def groups_of(catalogs: Sequence[Catalog], *, whole: bool = True) -> dict[str, GroupInfo]:
    """The groups of several roots together, by name, sorted; `whole` as in `Catalog.groups`."""
    found = {name: info for catalog in catalogs for name, info in catalog.groups(whole=whole).items()}
    return dict(sorted(found.items()))


def any_holds_parts(catalogs: Sequence[Catalog], group: str) -> bool:
    """Whether any of several roots holds a committed part of a group, given by its name."""
    return any(catalog.holds_parts(group) for catalog in reversed(catalogs))


@contextmanager
def requesting_ahead(catalogs: Sequence[Catalog]) -> Iterator[None]:
    """`Catalog.requesting_ahead` of several roots."""
    with ExitStack() as stack:
        for catalog in catalogs:
            stack.enter_context(catalog.requesting_ahead())
        yield


def visible_parts(catalog: Catalog, info: GroupInfo) -> list[Part]:
    """Committed parts of a group in one root, without those that others replaced; damaged ones are left out, with a warning."""
    if info.name not in catalog.groups(whole=False):
        return []
    parts, notes = catalog.parts_and_annotations(info, whole=False)
    replaced = {name for part in (*parts, *notes) for name in part.info.replaces}
    return [part for part in parts if part.info.name not in replaced]


def open_union(catalogs: Sequence[Catalog], info: GroupInfo, *, whole: bool = True) -> View:
    """The union of a group's parts in several roots; `whole` as in `Catalog.list_parts`."""
    found = [catalog.parts_and_annotations(info, whole=whole) for catalog in reversed(catalogs)][::-1]
    parts = [part for parts, _ in found for part in parts]
    notes = [note for _, notes in found for note in notes]
    if not whole:
        notes += [part for catalog in catalogs for part in catalog.stand_ins(info)]
    return open_view(catalogs[-1].storage, info, parts, notes, in_call_order=True)
