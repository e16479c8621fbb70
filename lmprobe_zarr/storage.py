"""A place that holds files by key: a local folder, or anything that fsspec opens. What the bytes mean is not known here.

What is promised, and where:

* ``write`` makes a file whole or raises; readers may see it half written, so it is only used for what no commit names yet.
* ``commit`` makes a file appear whole, at once and for good: on a local folder by temporary file, fsync and rename, on an
  object store by one put, which object stores make atomic. With ``replace=False`` it never takes another writer's place: local folders
  and S3 decide that themselves, in one step; elsewhere a look goes before, and it is the random tail of a part's name that keeps two
  writers apart.
* ``remove`` takes single files away, and folders only where that leaves them empty: what somebody else put there stays. What is reached by
  a link that leads out of the place is read like anything else, and never removed.
* Nothing is written by opening a place.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from lmprobe_zarr.errors import (
    AccessDeniedError,
    AlreadyCommittedError,
    InvalidArgumentError,
    InvalidTypeError,
    LmprobeZarrError,
    NoSpaceError,
    NotAStoreError,
    ReadOnlyError,
    StoreNotFoundError,
    UnreachableError,
)

__all__ = ["REMOTE_THREADS", "Buffer", "Entry", "FsspecStorage", "LocalStorage", "MemoryStorage", "S3Storage", "Storage", "open_storage"]

Buffer = bytes | memoryview

_TRIES: Final = 100  # of making a file in a folder that others remove while it is empty
REMOTE_THREADS: Final = 32  # that read from and write to a remote place at the same time


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

    def check_reach(self) -> None:
        """Raise `InvalidArgumentError` where no other process can read what lies here."""
        return

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""

    @abstractmethod
    def read_view(self, key: str) -> Buffer:
        """All bytes of a file, valid until this thread's next call of ``read_view``."""

    def read_into(self, key: str, target: memoryview, tail: memoryview) -> int:
        """Fill `target` and then `tail` with a file from its beginning; returns the file's length, whether it fits or not."""
        data = memoryview(self.read_view(key))
        if len(data) == len(target) + len(tail):
            target[:], tail[:] = data[: len(target)], data[len(target) :]
        return len(data)

    @abstractmethod
    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        """Write a file, given whole or in pieces, and the folders above it.

        With `durable`, it is flushed to the medium where the place knows what that is.
        """

    @abstractmethod
    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        """Make a file appear whole or not at all; with `durable`, it and the names of its folder survive a power cut.

        Without `replace`, a file that is there stays: `AlreadyCommittedError`, unless it holds these very bytes, as it does where the
        answer to a put was lost and the put tried again.
        """

    @abstractmethod
    def list(self, key: str) -> list[str]:
        """Names directly below a folder, sorted; none where it does not exist."""

    @abstractmethod
    def scan(self, key: str) -> dict[str, Entry]:
        """What lies directly below a folder, by name, sorted, in as few requests as the place allows; nothing where it does not exist."""

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of some files, by their names below a folder, that are there; in as few requests as the place allows."""
        wanted = set(names)
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in wanted}:
            prefix = f"{folder}/" if folder else ""
            entries = self.scan(f"{key}/{folder}" if folder else key)
            found |= {f"{prefix}{name}": entry.nbytes for name, entry in entries.items() if entry.is_file and f"{prefix}{name}" in wanted}
        return found

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; those that are gone already do not matter. Folders that this leaves empty go too, up to the root."""

    @abstractmethod
    def remove_folders(self, keys: Iterable[str]) -> None:
        """Remove folders in which nothing is left; any other stays, and one that is not there is no error."""

    @abstractmethod
    def touch(self, key: str) -> None:
        """Make an empty file, or make an existing one look freshly written; the folders above it too."""

    @abstractmethod
    def remove_tree(self, key: str) -> None:
        """Remove a folder and all below it; nothing where it does not exist."""

    @abstractmethod
    def is_file(self, key: str) -> bool:
        """Whether a file of that key exists."""

    def leads_out(self, key: str) -> bool:
        """Whether a folder is reached by a link that leads out of the place: what lies there is another's, and is not removed."""
        return False

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

    def leads_out(self, key: str) -> bool:
        real, root = os.path.realpath(self._path(key)), os.path.realpath(self.root)
        return real != root and not real.startswith(f"{root.rstrip(os.sep)}{os.sep}")

    def read(self, key: str) -> bytes:
        descriptor = self._open(key)
        try:
            pieces = []
            # As many bytes as there should be, until there are none: a file may be written to meanwhile.
            while piece := os.read(descriptor, max(os.fstat(descriptor).st_size, 1)):
                pieces.append(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            os.close(descriptor)

    def _open(self, key: str) -> int:
        path = self._path(key)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise AccessDeniedError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:  # which says nothing of the file
                raise UnreachableError(f"{path} cannot be opened now ({error.strerror}): close files, or raise `ulimit -n`") from error
            raise

    def read_view(self, key: str) -> Buffer:
        descriptor = self._open(key)
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

    def read_into(self, key: str, target: memoryview, tail: memoryview) -> int:
        descriptor = self._open(key)
        try:
            expected = len(target) + len(tail)
            # One byte more is asked for than there should be: no other call is needed to learn the length.
            if os.preadv(descriptor, [target, tail, bytearray(1)], 0) == expected:
                return expected
            if os.fstat(descriptor).st_size != expected:
                return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        return super().read_into(key, target, tail)  # the system may give less than it was asked for

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        path = self._path(key)
        with self._writing(path):
            self._write(path, data, durable)

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        path = self._path(key)
        folder, name = os.path.split(path)
        staged = f"{folder}/.{name}.{secrets.token_hex(6)}.partial"
        with self._writing(path):
            try:
                self._write(staged, data, durable)
                if durable:
                    _sync_folders(folder)
                if replace:
                    os.replace(staged, path)
                elif not _link(staged, path):
                    Path(staged).unlink()
                    _check_same(self, key, data)
                    return
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
    def _write(path: str, data: Buffer | tuple[Buffer, ...], durable: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        for attempt in range(_TRIES):
            try:
                descriptor = os.open(path, flags, 0o666)
                break
            except FileNotFoundError:
                # Somebody who removes things may take the folder again, as long as it is empty; mkdir says FileExistsError where that
                # happens between its own two steps (a file in the way has open() say NotADirectoryError).
                if attempt == _TRIES - 1:
                    raise
                with suppress(FileNotFoundError, FileExistsError):
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            for piece in data if isinstance(data, tuple) else (data,):
                view = memoryview(piece)
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
        except LmprobeZarrError:
            raise
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
        except PermissionError as error:
            raise AccessDeniedError(f"{self._path(key)} cannot be listed ({error.strerror}): check its permissions") from error

    def scan(self, key: str) -> dict[str, Entry]:
        found = {}
        try:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._path(key)) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except OSError as error:
                        if error.errno in {errno.ENOENT, errno.ELOOP}:  # gone since it was listed, or a link to nowhere
                            continue
                        raise
                    found[entry.name] = Entry(stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime)
        except PermissionError as error:
            raise AccessDeniedError(f"{self._path(key)} cannot be listed ({error.strerror}): check its permissions") from error
        return dict(sorted(found.items()))

    def remove(self, keys: Iterable[str]) -> None:
        folders: set[str] = set()
        for key in keys:
            path = self._path(key)
            if (folder := os.path.dirname(path)) not in folders and self.leads_out(key.rpartition("/")[0]):
                raise ReadOnlyError(f"{folder} is reached by a link that leads out of {self.root}: nothing is removed there")
            # A folder where a file of ours should be is somebody else's.
            with self._writing(path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                os.unlink(path)
            folders.add(folder)
        self._remove_empty(folders)

    def remove_folders(self, keys: Iterable[str]) -> None:
        self._remove_empty({self._path(key) for key in keys if not self.leads_out(key)})

    def _remove_empty(self, folders: set[str]) -> None:
        # The deepest first, and then those above; what is not empty stays.
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
            elif path.exists() and not self.leads_out(key):
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


def _link(staged: str, path: str) -> bool:
    """Give a file its name unless there is one of that name; returns whether that was done."""
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise
        # A file system without hard links.
        if os.path.exists(path):
            return False
        os.replace(staged, path)
        return True
    os.unlink(staged)
    return True


def _check_same(storage: Storage, key: str, data: Buffer) -> None:
    """Raise where a file that is there already does not hold what was to be committed."""
    if storage.read(key) != data:
        raise AlreadyCommittedError(f"{storage.url}/{key} was committed by another writer: nothing was replaced; write again")


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
        The file system; it alone knows credentials.
    root : str
        The prefix in it, without protocol.
    url : str
        How it was named; shown in messages, without what may be a secret.
    """

    is_local = False

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.url = _without_secrets(url).rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filesystem, self.root, self.url)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    @contextmanager
    def talking(self, key: str, *, writing: bool = False, listing: bool = False) -> Iterator[None]:
        """Errors of the place as ours; that there is no such file is told as it is."""
        try:
            yield
        except LmprobeZarrError:
            raise
        except Exception as error:
            told = _told(error, self.url, key, writing=writing, listing=listing)
            if told is None:
                raise
            if isinstance(told, AccessDeniedError):
                # fsspec would hand out this very client again, which has looked for credentials already and does not look again.
                self.filesystem.clear_instance_cache()
            raise told from error

    def read(self, key: str) -> bytes:
        with self.talking(key):
            data: bytes = self.filesystem.cat_file(self._path(key))
            return data

    def read_view(self, key: str) -> Buffer:
        return self.read(key)

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        with self.talking(key, writing=True):
            self.filesystem.pipe_file(self._path(key), b"".join(data) if isinstance(data, tuple) else bytes(data))

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        if replace or not self._create(key, data):
            self.write(key, data, durable=durable)

    def _create(self, key: str, data: Buffer) -> bool:
        """Make a file on condition that there is none; False where the place knows no such condition and there is none."""
        for attempt in range(_CONFLICTS):
            try:
                with self.talking(key, writing=True):
                    self.filesystem.pipe_file(self._path(key), bytes(data), mode="create")
                return True
            except FileExistsError:
                break
            except (NotImplementedError, ValueError, TypeError):  # no such mode there
                return self._looked(key, data)
            except OSError as error:
                code, status = _answer(error)
                if status == 409:  # another put on condition is under way
                    time.sleep(0.1 * 2**attempt)
                    continue
                if status == 501 or code == "NotImplemented":
                    return self._looked(key, data)
                if status != 412:
                    raise
                break
        _check_same(self, key, data)
        return True

    def _looked(self, key: str, data: Buffer) -> bool:
        there = self.is_file(key)
        if there:
            _check_same(self, key, data)
        return there

    def list(self, key: str) -> list[str]:
        return list(self.scan(key))

    def scan(self, key: str) -> dict[str, Entry]:
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            with self.talking(key, listing=True):
                entries = self.filesystem.ls(path, detail=True)
        except StoreNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            if name and str(entry["name"]).rstrip("/") != path.rstrip("/"):
                found[name] = Entry(entry["type"] == "file", int(entry.get("size") or 0), _modified(entry))
        return dict(sorted(found.items()))

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        if not self.url.startswith(("http://", "https://")):
            return super().sizes(key, names)
        # Web servers list nothing: each is asked for its size.
        listed = list(names)
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            return {name: size for name, size in zip(listed, pool.map(partial(self._size, key), listed), strict=True) if size is not None}

    def _size(self, key: str, name: str) -> int | None:
        try:
            with self.talking(f"{key}/{name}"):
                size = self.filesystem.info(self._path(f"{key}/{name}")).get("size")
                # A server need not tell it ahead; then the file itself does.
                return len(self.filesystem.cat_file(self._path(f"{key}/{name}"))) if size is None else int(size)
        except FileNotFoundError:
            return None

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

    def remove_folders(self, keys: Iterable[str]) -> None:
        for key in sorted(keys, key=len, reverse=True):
            self._remove_empty(self._path(key))

    def _remove_empty(self, folder: str) -> None:
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
        # Not isfile(), which takes every error for a no.
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            with self.talking(key):
                return bool(self.filesystem.info(path)["type"] == "file")
        except StoreNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            return False


_memory_lock: Final = threading.RLock()


class MemoryStorage(FsspecStorage):
    """A prefix of the memory of this process, which its threads share.

    fsspec's file system of that name is one dictionary for all, made for one thread: what lists it stumbles over what another one
    removes meanwhile. So all that is said to it is said under one lock.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_process, (os.getpid(), self.filesystem, self.root, self.url)

    def check_reach(self) -> None:
        _same_process(0, self.filesystem, self.root, self.url)

    @contextmanager
    def talking(self, key: str, *, writing: bool = False, listing: bool = False) -> Iterator[None]:
        with _memory_lock, super().talking(key, writing=writing, listing=listing):
            yield

    def remove(self, keys: Iterable[str]) -> None:
        listed = list(keys)
        super().remove(listed)
        # Object stores have no folders; this one keeps them, and would go on to list them.
        self.remove_folders({key.rpartition("/")[0] for key in listed})

    def _remove_empty(self, folder: str) -> None:
        with _memory_lock:
            super()._remove_empty(folder)


class S3Storage(FsspecStorage):
    """A prefix of a bucket, in one request where fsspec's own verbs take several.

    Those ask for a file's size before they read it, list a folder to learn that a file is none, list the folder above to learn that one is
    empty, and do not tell which objects could not be deleted.
    """

    def _object(self, key: str) -> dict[str, str]:
        bucket, name, _ = self.filesystem.split_path(self._path(key))
        return {"Bucket": bucket, "Key": name}

    def is_file(self, key: str) -> bool:
        where = self._object(key)
        if not where["Key"]:
            return False
        try:
            with self.talking(key):
                self.filesystem.call_s3("head_object", **where)
        except StoreNotFoundError:
            raise
        except FileNotFoundError:
            return False
        return True

    def scan(self, key: str) -> dict[str, Entry]:
        bucket, prefix = self._folder(key)
        found = {}
        for page in self._pages(key, Bucket=bucket, Prefix=prefix, Delimiter="/"):
            for folder in page.get("CommonPrefixes", ()):
                found[folder["Prefix"].rstrip("/").rsplit("/", 1)[-1]] = Entry(False, 0, None)
            for entry in page.get("Contents", ()):
                # Some servers, and people who make folders by hand, leave an empty object of the folder's own name.
                if name := entry["Key"].removeprefix(prefix):
                    found[name] = Entry(True, int(entry["Size"]), _modified(entry))
        return dict(sorted(found.items()))

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        wanted = set(names)
        bucket, prefix = self._folder(key)
        pages = self._pages(key, Bucket=bucket, Prefix=prefix)  # all that lies below, whatever folders it is in
        found = {entry["Key"].removeprefix(prefix): int(entry["Size"]) for page in pages for entry in page.get("Contents", ())}
        return {name: size for name, size in found.items() if name in wanted}

    def _folder(self, key: str) -> tuple[str, str]:
        where = self._object(key)
        return where["Bucket"], f"{where['Key']}/" if where["Key"] else ""

    def _pages(self, key: str, **request: str) -> Iterator[dict[str, Any]]:
        while True:
            with self.talking(key, listing=True):
                page = self.filesystem.call_s3("list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def remove(self, keys: Iterable[str]) -> None:
        self._delete([self._object(key) for key in keys])

    def remove_folders(self, keys: Iterable[str]) -> None:
        # Some servers keep folders and go on to list the empty ones, but remove them at a deletion of their name. It is a slash at the
        # end that makes it one: where there are no folders, it is the name of nothing.
        folders = [self._folder(key) for key in sorted(keys, key=len, reverse=True)]
        self._delete([{"Bucket": bucket, "Key": name} for bucket, name in folders if name])

    def remove_tree(self, key: str) -> None:
        bucket, prefix = self._folder(key)
        pages = self._pages(key, Bucket=bucket, Prefix=prefix)
        self._delete([{"Bucket": bucket, "Key": entry["Key"]} for page in pages for entry in page.get("Contents", ())])

    def _delete(self, objects: list[dict[str, str]]) -> None:
        for start in range(0, len(objects), _DELETED_AT_ONCE):
            some = objects[start : start + _DELETED_AT_ONCE]
            request = {"Objects": [{"Key": one["Key"]} for one in some], "Quiet": True}
            with self.talking("", writing=True):
                answer = self.filesystem.call_s3("delete_objects", Bucket=some[0]["Bucket"], Delete=request)
            # The request as a whole succeeds even where none of it was allowed.
            for failed in answer.get("Errors", ()):
                if failed.get("Code") not in _NOT_THERE:
                    what = f"{self.url} cannot be cleared of {failed.get('Key')!r} ({failed.get('Code')})"
                    raise ReadOnlyError(f"{what}: check that these credentials may delete")


_CONFLICTS: Final = 6  # tries of a put on condition while others try the same
_DELETED_AT_ONCE: Final = 1000  # objects, the most that S3 takes
_NOT_THERE: Final = {"NoSuchKey", "NoSuchVersion"}
_EXPIRED: Final = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN_KEY: Final = {"InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch"}
_ELSEWHERE: Final = {"301", "307", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_NO_CREDENTIALS: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "ConfigNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "SSOTokenLoadError", "InvalidConfigError",
}  # fmt: skip
_NETWORK: Final = {"ConnectionError", "TimeoutError", "ClientConnectionError", "HTTPClientError", "FSTimeoutError"}
_CUT_SHORT: Final = {"ClientPayloadError", "IncompleteRead", "ResponseParserError", "ResponseStreamingError"}


def _answer(error: BaseException) -> tuple[str, int]:
    """Code and status of the answer that the error of a client of S3 or of the web stems from; nothing and 0 for other errors."""
    for one in (error, error.__cause__):
        if one is not None and "ClientResponseError" in {kind.__name__ for kind in type(one).__mro__}:
            return "", int(getattr(one, "status", 0))
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return "", 0


def _told(error: Exception, url: str, key: str, *, writing: bool, listing: bool) -> Exception | None:
    """The error of ours that an error of a file system's client comes to; None where it is to be told as it is."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code, status = _answer(error)
    where = f"{url}/{key}" if key else url
    if code == "NoSuchBucket":
        return StoreNotFoundError(f"{url} names a bucket that is not there: check its name, and the endpoint")
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return None
    if code in _EXPIRED:
        return AccessDeniedError(f"{where} was refused ({code}): the token has expired or is not valid; fetch new credentials, open again")
    if code in _UNKNOWN_KEY:
        return AccessDeniedError(
            f"{where} was refused ({code}): check key and secret, in storage_options= or, without it, the AWS_* variables and profile"
        )
    if code == "RequestTimeTooSkewed":
        return AccessDeniedError(f"{where} was refused ({code}): set this machine's clock")
    if code in _ELSEWHERE:
        return UnreachableError(f"{where} was refused ({code}): check the bucket's region, storage_options={{'client_kwargs': …}}")
    if names & _NO_CREDENTIALS:
        return AccessDeniedError(
            f"{url} needs credentials ({type(error).__name__}): give storage_options=, or set the AWS_* variables or a profile\n"
            "a place that is open to everyone is opened with storage_options={'anon': True}"
        )
    if isinstance(error, PermissionError):
        if writing:
            return ReadOnlyError(f"{where} cannot be written: check permissions, or open with mode='r'")
        if listing:
            return AccessDeniedError(
                f"{where} cannot be listed: ask for the permission to list it, or for a published copy, which needs none"
            )
        return AccessDeniedError(
            f"{where} cannot be read: check the credentials, and what they allow (storage_options= gives others)"
            + ("\nS3 answers so, too, for what is not there, to those who may not list" if status == 403 else "")
        )
    if status in (401, 403) and "ClientResponseError" in names:
        return AccessDeniedError(
            f"{where} cannot be read (status {status}): check the address, or give credentials, as in "
            "storage_options={'client_kwargs': {'headers': {'Authorization': …}}}"
        )
    if code == "InvalidBucketName" or "ParamValidationError" in names:
        return InvalidArgumentError(f"{url} is no possible place: check the name of the bucket")
    if code == "SlowDown" or (status >= 500 and status != 501):
        return UnreachableError(
            f"{where} is overloaded or broken, again and again (status {status}{code and f', {code}'}): wait, and try again"
        )
    if names & _CUT_SHORT:
        return UnreachableError(f"{where} came cut short, again and again ({type(error).__name__}): check the network, and try again")
    if names & _NETWORK:
        return UnreachableError(f"{url} does not answer ({type(error).__name__}): check the URL, the endpoint and the network")
    return None


def _without_secrets(url: str) -> str:
    """A URL as it may be shown: without user and password, and without what signs an address of the web."""
    shown = re.sub(r"(://)[^/@\s]+@", r"\1…@", url)
    return re.sub(r"(https?://[^?\s]*)\?.*", r"\1?…", shown)


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


def _same_process(pid: int, filesystem: Any, root: str, url: str) -> FsspecStorage:
    if pid != os.getpid():
        raise InvalidArgumentError(f"{url} lies in the memory of one process and cannot be read by another: use threads, or a folder")
    return MemoryStorage(filesystem, root, url)


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
        filesystem, root = fsspec.core.url_to_fs(place, **_with_defaults(place, storage_options or {}))
    except (ValueError, ImportError, TypeError, OSError) as error:
        raise InvalidArgumentError(f"{place.split('://')[0]}:// cannot be opened: {_without_secrets(str(error))}") from error
    # By its class: file systems that cache others pass on every attribute of theirs.
    kind = type(filesystem)
    if hasattr(kind, "call_s3"):
        return S3Storage(filesystem, root, place)
    return (MemoryStorage if issubclass(kind, MemoryFileSystem) else FsspecStorage)(filesystem, root, place)


def _with_defaults(place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller says, and for S3 what it takes to read in few requests, many at a time, where the caller does not say otherwise."""
    before, _, last = place.rpartition("::")
    protocol = last.split("://")[0]
    if protocol not in ("s3", "s3a"):
        return dict(options)
    given = dict(options.get(protocol, {})) if before else dict(options)
    # s3fs asks for the size of a file before it reads it, unless it is to read one range at a time: a chunk is one range.
    # What it remembers of folders others make untrue; and its own retries multiply with botocore's.
    filled = {"max_concurrency": 1, "use_listings_cache": False, **given}
    filled["config_kwargs"] = {
        "max_pool_connections": REMOTE_THREADS,
        "retries": {"mode": "standard", "total_max_attempts": 3},
        **(given.get("config_kwargs") or {}),
    }
    return {**options, protocol: filled} if before else filled
