"""`FsspecStorage`, a prefix of any file system that fsspec opens, with errors of its client as errors of this package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, Final

from fsspec.implementations.cached import CachingFileSystem

from lmprobe_zarr.errors import AccessDeniedError, LmprobeZarrError, ReadOnlyError, StoreNotFoundError, UnreachableError
from lmprobe_zarr.storage.base import REMOTE_THREADS, FileInfo, Storage, check_same
from lmprobe_zarr.storage.client_errors import as_our_error, is_passing, response_code, without_secrets
from lmprobe_zarr.storage.threads import run_all
from lmprobe_zarr.typing import Buffer

__all__ = ["FsspecStorage", "modified_at"]

# Seconds between the tries of a request that is refused in a way that passes, and after how long a client's own tries are enough.
_WAITS: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0)
_TRIED_SECONDS: Final = 5.0
_PUT_ATTEMPTS: Final = 6  # at a conditional put while other writers try the same


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
    is_slow = True

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.keeps_copies = issubclass(type(filesystem), CachingFileSystem)
        self.root = root.rstrip("/")
        shown = without_secrets(url)
        self.url = shown if shown.endswith("://") else shown.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.filesystem, self.root, self.url)

    def is_same_place(self, other: Storage) -> bool:
        # fsspec returns one client for equal options, so another client has other credentials, or another endpoint.
        return isinstance(other, FsspecStorage) and self.filesystem is other.filesystem and self.root == other.root

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    @contextmanager
    def translating_errors(self, key: str, *, writing: bool = False, listing: bool = False) -> Iterator[None]:
        """Raise errors of the client as errors of this package; a missing file stays FileNotFoundError."""
        try:
            yield
        except LmprobeZarrError:
            raise
        except Exception as error:
            translated = as_our_error(error, self.url, key, writing=writing, listing=listing)
            if translated is None:
                raise
            if isinstance(translated, AccessDeniedError):
                # fsspec would return this same client again, which looks for credentials only once.
                self.filesystem.clear_instance_cache()
            raise translated from error

    def call(
        self, function: Callable[..., Any], *args: Any, key: str = "", writing: bool = False, listing: bool = False, **kwargs: Any
    ) -> Any:
        """What a method of the file system returns, called again while the server refuses in a way that passes.

        Errors are those of `translating_errors`. A client that has tried for long on its own is not called again.
        """
        for wait in (*_WAITS, None):
            began = time.monotonic()
            try:
                with self.translating_errors(key, writing=writing, listing=listing):
                    return function(*args, **kwargs)
            except UnreachableError as error:
                cause = error.__cause__
                if wait is None or not is_passing(cause) or self._was_repeated(cause, time.monotonic() - began):
                    raise
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _was_repeated(self, error: BaseException | None, seconds: float) -> bool:
        """Whether the client has repeated a request on its own that failed after so many seconds."""
        return seconds > _TRIED_SECONDS

    def read(self, key: str) -> bytes:
        data: bytes = self.call(self.filesystem.cat_file, self._path(key), key=key)
        return data

    def read_current(self, key: str) -> bytes:
        filesystem = self.filesystem
        while issubclass(type(filesystem), CachingFileSystem):
            filesystem = filesystem.fs
        data: bytes = self.call(filesystem.cat_file, self._path(key), key=key)
        return data

    def read_view(self, key: str) -> Buffer:
        return self.read(key)

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        whole = b"".join(data) if isinstance(data, tuple) else bytes(data)
        self.call(self.filesystem.pipe_file, self._path(key), whole, key=key, writing=True)

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        if replace or not self._put_if_absent(key, data):
            self.write(key, data, durable=durable)

    def _put_if_absent(self, key: str, data: Buffer) -> bool:
        """Make a file unless it exists; False where the place has no conditional put and the file does not exist: nothing was written."""
        for attempt in range(_PUT_ATTEMPTS):
            try:
                self.call(self.filesystem.pipe_file, self._path(key), bytes(data), key=key, writing=True, mode="create")
                return True
            except FileExistsError:
                break
            except (NotImplementedError, ValueError, TypeError):  # this file system has no such mode
                return self._exists_with(key, data)
            except OSError as error:
                code, status = response_code(error)
                if status == 409:  # another conditional put is under way
                    time.sleep(0.1 * 2**attempt)
                    continue
                if status == 501 or code == "NotImplemented":
                    return self._exists_with(key, data)
                if status != 412:
                    raise
                break
        check_same(self, key, data)
        return True

    def _exists_with(self, key: str, data: Buffer) -> bool:
        """Whether a file exists; raises where it does with other bytes."""
        exists = self.is_file(key)
        if exists:
            check_same(self, key, data)
        return exists

    def list(self, key: str) -> list[str]:
        return list(self.scan(key))

    def scan(self, key: str) -> dict[str, FileInfo]:
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            entries = self.call(self.filesystem.ls, path, key=key, listing=True, detail=True)
        except StoreNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            if name and str(entry["name"]).rstrip("/") != path.rstrip("/"):
                found[name] = FileInfo(entry["type"] == "file", int(entry.get("size") or 0), modified_at(entry))
        return dict(sorted(found.items()))

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        if not self.url.startswith(("http://", "https://")):
            return super().sizes(key, names)
        # Web servers list nothing: the size of each file is a request of its own.
        listed = list(names)
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            return {name: size for name, size in zip(listed, pool.map(partial(self._size, key), listed), strict=True) if size is not None}

    def _size(self, key: str, name: str) -> int | None:
        try:
            size = self.call(self.filesystem.info, self._path(f"{key}/{name}"), key=f"{key}/{name}").get("size")
            # A server need not send the size; then the whole file is read.
            return len(self.read(f"{key}/{name}")) if size is None else int(size)
        except FileNotFoundError:
            return None

    def remove(self, keys: Iterable[str]) -> None:
        run_all([partial(self._remove_file, self._path(key)) for key in keys], local=False)

    def _remove_file(self, path: str) -> None:
        # Never rm(): it takes [ ] * ? in a name for a pattern, and removes every file that fits it.
        with suppress(FileNotFoundError):
            try:
                self.call(self.filesystem.rm_file, path, writing=True)
            except NotImplementedError as error:
                raise ReadOnlyError(f"{self.url} cannot be cleared of {path!r}: its file system removes no single files") from error

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
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            found = self.call(self.filesystem.find, path, key=key, writing=True, withdirs=True, detail=True)
        except StoreNotFoundError:
            raise
        except FileNotFoundError:
            return
        files = [name for name, entry in found.items() if entry.get("type") != "directory"]
        run_all([partial(self._remove_file, name) for name in files], local=False)
        # Object stores have no folders to remove, and say so in their own ways.
        folders = {path, *(name for name, entry in found.items() if entry.get("type") == "directory")}
        for folder in sorted(folders, key=len, reverse=True):
            with suppress(OSError, NotImplementedError, ValueError):
                self.filesystem.rmdir(folder)

    def is_file(self, key: str) -> bool:
        # Not isfile(), which returns False on every error.
        path = self._path(key)
        self.filesystem.invalidate_cache(path)
        try:
            return bool(self.call(self.filesystem.info, path, key=key)["type"] == "file")
        except StoreNotFoundError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            return False


def modified_at(entry: Mapping[str, Any]) -> float | None:
    """When a file was last written, in seconds since 1970, under whichever name its file system gives that; None where it does not."""
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
