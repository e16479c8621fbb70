"""Opening a root: what is stored there, and whether it may be written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lmprobe_zarr.errors import (
    AccessDeniedError,
    CorruptPartError,
    InvalidArgumentError,
    NotAStoreError,
    ReadOnlyError,
    StoreNotFoundError,
)
from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import GROUP_NAME, PART_NAME, PUBLISHED_MARK, Published, parse_part, parse_root
from lmprobe_zarr.store.parts import FrozenStorage

Mode = Literal["a", "r"]


def options_for(places: Sequence[Any], given: Any) -> list[Mapping[str, Any] | None]:
    """The storage options of each place."""
    if isinstance(given, (list, tuple)):
        if len(given) != len(places):
            raise InvalidArgumentError(f"storage_options has {len(given)} mappings for {len(places)} places: give one for each, or None")
        return list(given)
    if len(places) == 1:
        return [given]
    return [given if isinstance(place, str) and ("://" in place or "::" in place) else None for place in places]


def open_root(storage: Storage, mode: Mode | None) -> tuple[Storage, Mode]:
    """The storage of a root, frozen where it is a published copy, and the mode in which it is opened."""
    if isinstance(storage, FrozenStorage):
        published: Published | None = storage.published
    else:
        on_web = _is_on_web(storage)
        if mode == "a" and on_web:
            raise ReadOnlyError(f"{storage.url} is a web address, which can only be read: leave mode='a' out")
        mode = "r" if on_web else mode
        published = _check_root(storage, mode or "a")
        if published is not None:
            storage = FrozenStorage(storage, published)
        elif on_web and not storage.list(""):
            raise NotAStoreError(
                f"{storage.url} holds a store, but its server does not list folders: publish the store, and open the published copy"
            )
    if published is not None:
        if mode == "a":
            raise ReadOnlyError(f"{storage.url} is a published copy, which never changes: leave mode='a' out to read it")
        mode = "r"
    return storage, mode or "a"


def _is_on_web(storage: Storage) -> bool:
    """Whether a place is an address of a web server, which can only be read."""
    return storage.url.startswith(("http://", "https://"))


def _check_root(storage: Storage, mode: Mode) -> Published | None:
    """The record of a published copy, None for a store that grows or is new; raises where a place is none of these."""
    try:
        return _read_root(storage)
    except (StoreNotFoundError, AccessDeniedError):
        raise
    except NotAStoreError:
        _check_rootless(storage, "is damaged")
        raise
    except (FileNotFoundError, NotADirectoryError):
        pass
    except IsADirectoryError as error:
        raise NotAStoreError(f"{storage.url}/zarr.json is a folder, so this is no store of lmprobe-zarr: give another folder") from error
    if storage.is_file(""):
        raise NotAStoreError(f"{storage.url} is a file, and a store is a folder: give another path")
    names = [name for name in storage.list("") if not name.endswith(".partial")]
    if "zarr.json" in names:  # another writer has created it since it was first looked for
        return _read_root(storage)
    if names:
        _check_rootless(storage, "is missing")
        way = "give a new or empty folder" if mode == "a" else "give the folder that the store was made in"
        raise NotAStoreError(f"{storage.url} is no store of lmprobe-zarr and holds other things ({names[0]!r}): {way}")
    if mode == "r":
        make = "" if _is_on_web(storage) else ", or open it with mode='a' to make one"
        raise StoreNotFoundError(f"there is no store at {storage.url}: check the path{make}")
    return None


def _read_root(storage: Storage) -> Published | None:
    """The record of a published copy, None for a store that grows; errors are those of `parse_root`."""
    try:
        published = parse_root(storage.read("zarr.json"), storage.url)
    except NotAStoreError:
        if not storage.keeps_copies:
            raise
    else:
        # Of all documents only the root of a published copy is ever replaced: by the next publication.
        if published is None or not storage.keeps_copies:
            return published
    return parse_root(storage.read_current("zarr.json"), storage.url)


def _check_rootless(storage: Storage, what: str) -> None:
    """Raise `CorruptPartError` where a root without its document holds the parts of a store."""
    for group in storage.list(""):
        for name in storage.list(group) if GROUP_NAME.fullmatch(group) else ():
            if not PART_NAME.fullmatch(name):
                continue
            try:
                info = parse_part(storage.read(f"{group}/{name}/zarr.json"), name)
            except (FileNotFoundError, CorruptPartError):
                continue
            where = f"{storage.url}/zarr.json, the document of the root, {what}"
            if PUBLISHED_MARK not in info.recorded:
                raise CorruptPartError.of(storage.url, "", f"{where}: lmprobe-zarr repair {storage.url} writes it again")
            if what == "is damaged":
                raise CorruptPartError(f"{where}: fetch or publish this copy again")
            return  # a copy whose publication did not finish
