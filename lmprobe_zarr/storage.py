"""A place that holds files by key: a local folder, or anything that fsspec opens. What the bytes mean is not known here.

What is promised, and where:

* ``write`` makes a file whole or raises; readers may see it half written, so it is only used for what no commit names yet.
* ``commit`` makes a file appear whole, at once and for good: on a local folder by temporary file, fsync and rename, on an
  object store by one put, which object stores make atomic.
* ``remove`` takes single files away, and folders only where that leaves them empty: what somebody else put there stays.
* Nothing is written by opening a place.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from lmprobe_zarr.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    InvalidTypeError,
    NoSpaceError,
    NotAStoreError,
    ReadOnlyError,
    UnreachableError,
)

__all__ = ["Buffer", "Entry", "FsspecStorage", "LocalStorage", "Storage", "open_storage"]

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a folder: its size in bytes and when it was last written, in seconds since 1970 (None where the place does not tell)."""

    is_file: bool
    nbytes: int
    modified: float | None


class Storage(ABC):
    """Files by key, ``/`` between folders. Picklable, and usable from many threads."""

    url: str
    is_local: bool

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""

    @abstractmethod
    def read_view(self, key: str) -> Buffer:
        """All bytes of a file, valid until this thread's next call of ``read_view``."""

    @abstractmethod
    def write(self, key: str, data: Buffer, *, durable: bool) -> None:
        """Write a file and the folders above it; with `durable`, flushed to the medium where the place knows what that is."""

    @abstractmethod
    def commit(self, key: str, data: Buffer, *, durable: bool) -> None:
        """Make a file appear whole or not at all; with `durable`, it and the names of its folder survive a power cut."""

    @abstractmethod
    def list(self, key: str) -> list[str]:
        """Names directly below a folder, sorted; none where it does not exist."""

    @abstractmethod
    def scan(self, key: str) -> dict[str, Entry]:
        """What lies directly below a folder, by name, sorted, in as few requests as the place allows; nothing where it does not exist."""

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; those that are gone already do not matter. Folders that this leaves empty go too, up to the root."""

    @abstractmethod
    def touch(self, key: str) -> None:
        """Make an empty file, or make an existing one look freshly written; the folders above it too."""

    @abstractmethod
    def remove_tree(self, key: str) -> None:
        """Remove a folder and all below it; nothing where it does not exist."""

    @abstractmethod
    def is_file(self, key: str) -> bool:
        """Whether a file of that key exists."""

    def free_bytes(self) -> int | None:
        """Bytes that may still be written; None where the place has no such limit or does not tell."""
        return None

    def may_write(self) -> bool:
        """False where it is known without trying that nothing can be written."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class LocalStorage(Storage):
    """A folder of this machine.

    Parameters
    ----------
    path : path
        The folder; it need not exist.
    """

    is_local = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            # Not resolved: a link to a moved disk stays a link. Only made absolute, so that chdir does not move a store.
            self.root = os.path.abspath(os.path.expanduser(os.fspath(path)))
        except ValueError as error:
            raise InvalidArgumentError(f"{path!r} cannot be a path: {error}") from error
        if "\0" in self.root:
            raise InvalidArgumentError(f"{path!r} cannot be a path: it holds a NUL")
        self.url = self.root
        self._buffers = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.root,)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def read(self, key: str) -> bytes:
        with Path(self._path(key)).open("rb") as file:
            return file.read()

    def read_view(self, key: str) -> Buffer:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            buffer: bytearray = getattr(self._buffers, "buffer", bytearray())
            if len(buffer) < size:
                # A buffer kept per thread saves the page faults of a fresh allocation for every chunk.
                buffer = self._buffers.buffer = bytearray(size + 4096)
            view, filled = memoryview(buffer)[:size], 0
            while filled < size:
                count = os.preadv(descriptor, [view[filled:]], filled)
                if not count:
                    break
                filled += count
            return view[:filled]
        finally:
            os.close(descriptor)

    def write(self, key: str, data: Buffer, *, durable: bool) -> None:
        path = self._path(key)
        with self._writing(path):
            self._write(path, data, durable)

    def commit(self, key: str, data: Buffer, *, durable: bool) -> None:
        path = self._path(key)
        folder, name = os.path.split(path)
        staged = f"{folder}/.{name}.{secrets.token_hex(6)}.partial"
        with self._writing(path):
            try:
                self._write(staged, data, durable)
                if durable:
                    _sync_folders(folder)
                os.replace(staged, path)
            except BaseException:
                Path(staged).unlink(missing_ok=True)
                raise
            if durable:
                _sync_folder(folder)
                _sync_folder(os.path.dirname(folder))
            # xarray names the Dask arrays of xr.open_dataset by path and this time: without it, those of two moments would mix.
            # Best effort: what stands here is committed, whatever becomes of this.
            with suppress(OSError):
                os.utime(self.root)

    @staticmethod
    def _write(path: str, data: Buffer, durable: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise NoSpaceError(f"no space left for {path}: what was committed is whole; free some space and run again") from error
            if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
                raise ReadOnlyError(f"{path} cannot be written ({error.strerror}): check permissions, or give another place") from error
            if isinstance(error, (NotADirectoryError, FileExistsError)):
                raise NotAStoreError(f"a file stands where {path} needs a folder: give another place for the store") from error
            raise

    def list(self, key: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def scan(self, key: str) -> dict[str, Entry]:
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._path(key)) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # gone since it was listed
                    status = entry.stat()
                    found[entry.name] = Entry(stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime)
        return dict(sorted(found.items()))

    def remove(self, keys: Iterable[str]) -> None:
        folders = set()
        for key in keys:
            path = self._path(key)
            with self._writing(path), suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            folders.add(os.path.dirname(path))
        # The deepest first; what is not empty stays.
        while folders:
            folder = max(folders, key=len)
            folders.remove(folder)
            if len(folder) > len(self.root):
                with suppress(OSError):
                    os.rmdir(folder)
                    folders.add(os.path.dirname(folder))

    def touch(self, key: str) -> None:
        path = self._path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            self.write(key, b"", durable=False)

    def remove_tree(self, key: str) -> None:
        path = Path(self._path(key))
        with self._writing(str(path)):
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)

    def is_file(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._existing()).free

    def may_write(self) -> bool:
        place = self._existing()
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)

    def _existing(self) -> Path:
        """The root, or the nearest folder above it that exists."""
        path = Path(self.root)
        while not path.exists():
            path = path.parent
        return path


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(path: str) -> None:
    """Flush the names in a folder and in all below it."""
    for folder, _, _ in os.walk(path):
        _sync_folder(folder)


class FsspecStorage(Storage):
    """A prefix of any fsspec file system.

    Parameters
    ----------
    filesystem : fsspec.AbstractFileSystem
        The file system.
    root : str
        The prefix in it, without protocol.
    url : str
        How it was named; shown in messages.
    """

    is_local = False

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        if "memory" in self.filesystem.protocol:
            return _same_process, (os.getpid(), self.filesystem, self.root, self.url)
        return FsspecStorage, (self.filesystem, self.root, self.url)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    @contextmanager
    def talking(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Errors of the place as ours; that there is no such file is told as it is."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except PermissionError as error:
            if writing:
                raise ReadOnlyError(f"{self.url}/{key} cannot be written: check permissions, or open with mode='r'") from error
            raise AccessDeniedError(
                f"{self.url}/{key} cannot be read: check the credentials, and what they allow (storage_options= gives others)"
            ) from error
        except Exception as error:
            if not _is_network(error):
                raise
            raise UnreachableError(
                f"{self.url} does not answer ({type(error).__name__}): check the URL, the endpoint and the network"
            ) from error

    def read(self, key: str) -> bytes:
        with self.talking(key):
            data: bytes = self.filesystem.cat_file(self._path(key))
            return data

    def read_view(self, key: str) -> Buffer:
        return self.read(key)

    def write(self, key: str, data: Buffer, *, durable: bool) -> None:
        with self.talking(key, writing=True):
            self.filesystem.pipe_file(self._path(key), bytes(data))

    def commit(self, key: str, data: Buffer, *, durable: bool) -> None:
        self.write(key, data, durable=durable)

    def list(self, key: str) -> list[str]:
        return list(self.scan(key))

    def scan(self, key: str) -> dict[str, Entry]:
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            with self.talking(key):
                entries = self.filesystem.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            if name and str(entry["name"]).rstrip("/") != path.rstrip("/"):
                found[name] = Entry(entry["type"] == "file", int(entry.get("size") or 0), _modified(entry))
        return dict(sorted(found.items()))

    def remove(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        if not paths:
            return
        with self.talking("", writing=True):
            try:
                self.filesystem.rm(paths)
            except FileNotFoundError:
                for path in paths:
                    with suppress(FileNotFoundError):
                        self.filesystem.rm_file(path)
        if "memory" in self.filesystem.protocol:
            # Object stores have no folders; this one keeps them, and would go on to list them.
            for folder in sorted({path.rpartition("/")[0] for path in paths}, key=len, reverse=True):
                self._remove_empty_folders(folder)

    def _remove_empty_folders(self, folder: str) -> None:
        while len(folder) > len(self.root):
            try:
                if self.filesystem.ls(folder):
                    return
                self.filesystem.rmdir(folder)
            except OSError:
                return
            folder = folder.rpartition("/")[0]

    def touch(self, key: str) -> None:
        self.write(key, b"", durable=False)

    def remove_tree(self, key: str) -> None:
        with self.talking(key, writing=True):
            try:
                self.filesystem.rm(self._path(key), recursive=True)
            except FileNotFoundError:
                return

    def is_file(self, key: str) -> bool:
        with self.talking(key):
            return bool(self.filesystem.isfile(self._path(key)))


def _modified(entry: Mapping[str, Any]) -> float | None:
    """When a file was last written, however its file system calls that."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value: Any = entry.get(name)
        if isinstance(value, (int, float)):
            return float(value)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
        if isinstance(value, str):
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return None


def _is_network(error: BaseException) -> bool:
    """Whether an error of some client library means that its server cannot be reached."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = {"ConnectionError", "TimeoutError", "ClientConnectionError", "EndpointConnectionError", "HTTPClientError", "NoCredentialsError"}
    return bool(names & told)


def _same_process(pid: int, filesystem: Any, root: str, url: str) -> FsspecStorage:
    if pid != os.getpid():
        raise InvalidArgumentError(f"{url} lies in the memory of one process and cannot be read by another: use threads, or a folder")
    return FsspecStorage(filesystem, root, url)


def open_storage(url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The place behind a path or URL. Writes nothing and sends nothing.

    Parameters
    ----------
    url : str or path
        A folder, or any URL that fsspec knows (``memory://…``, ``s3://…``, ``https://…``, chained ones too).
    storage_options : mapping, optional
        Passed to the fsspec file system.

    Raises
    ------
    InvalidTypeError
        `url` is neither text nor path.
    InvalidArgumentError
        fsspec does not know the protocol, or a path is not possible.
    """
    if isinstance(url, Storage):
        return url
    if not isinstance(url, (str, os.PathLike)):
        raise InvalidTypeError(f"a store is opened by a path or a URL, not by {type(url).__name__}")
    place = os.fspath(url)
    if not place:
        raise InvalidArgumentError("the path of the store is empty: give a folder or a URL")
    for protocol in ("file://", "local://"):
        place = place.removeprefix(protocol)
    if "://" not in place and "::" not in place:
        if storage_options:
            raise InvalidArgumentError(f"storage_options are for URLs, and {place!r} is a local path: leave them out")
        return LocalStorage(place)
    try:
        filesystem, root = fsspec.core.url_to_fs(place, **(storage_options or {}))
    except (ValueError, ImportError) as error:
        raise InvalidArgumentError(f"{place.split('://')[0]}:// cannot be opened: {error}") from error
    return FsspecStorage(filesystem, root, place)
