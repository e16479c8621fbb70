"""Foreign files, opened for reading only. They are read by ranges, several at a time; links that lead out of their folder are not followed.

Nothing here writes. The module of each format knows what the bytes mean.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from lmprobe_zarr.errors import CorruptFileError, InvalidArgumentError, LmprobeZarrError
from lmprobe_zarr.storage import FsspecStorage, LocalStorage, Storage, open_storage, read_at
from lmprobe_zarr.typing import Buffer

__all__ = ["Files", "Listed", "LocalFiles", "RemoteFiles", "Want", "map_files", "open_files"]

FETCHED_BYTES: Final = 2**26  # of one remote file at a time, before they are copied to where they are wanted
LOCAL_THREADS: Final = 4
REMOTE_THREADS: Final = 32
LOCAL_WINDOW: Final = 64
REMOTE_WINDOW: Final = 128

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Want:
    """A buffer to fill from a file, starting at byte `start` of the file."""

    start: int
    buffer: memoryview

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + self.buffer.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A name in a folder. `outside` marks a link that leads out of the root, which is never followed."""

    name: str
    is_folder: bool = False
    size: int | None = None
    outside: bool = False


class Files(ABC):
    """Files below one folder or prefix, by key, ``/`` between folders. Usable from many threads."""

    url: str
    is_local: bool
    head_bytes: int

    @abstractmethod
    def list(self, key: str) -> list[Listed]:
        """The files and folders directly in a folder, by name; empty if it does not exist."""

    @abstractmethod
    def head(self, key: str) -> tuple[bytes, int | None]:
        """The first `head_bytes` of a file, or all of a shorter one, and its length if that is known.

        Raises
        ------
        FileNotFoundError
            It does not exist.
        CorruptFileError
            It is not a regular file, or a link that leads out of the root.
        """

    @abstractmethod
    def fill(self, key: str, wants: Sequence[Want]) -> None:
        """Fill buffers from a file, which is opened once.

        Raises
        ------
        FileNotFoundError
            It does not exist.
        CorruptFileError
            It ends before a buffer is full; or as for `head`.
        """

    def leads_out(self, folder: str) -> bool:
        """Whether a folder is reached by a link that leads out of the root."""
        return False

    def is_locked(self, key: str) -> bool | None:
        """Whether a process holds a file locked; None where that cannot be known."""
        return None

    def read(self, key: str, *, at_most: int) -> bytes:
        """A whole small file.

        Raises
        ------
        FileNotFoundError
            It does not exist.
        CorruptFileError
            It has more than `at_most` bytes; or as for `head`.
        """
        data, size = self.head(key)
        if (len(data) if size is None else size) > at_most:
            raise CorruptFileError(f"{self.url}/{key} has more than {at_most} bytes, which is too large for this kind of file")
        if size is not None and len(data) < size:
            rest = bytearray(size - len(data))
            self.fill(key, [Want(len(data), memoryview(rest))])
            data += bytes(rest)
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class LocalFiles(Files):
    """A folder of this machine.

    Parameters
    ----------
    root : str
        Absolute path.
    """

    is_local = True
    head_bytes = 2**14

    def __init__(self, root: str) -> None:
        self.root = self.url = root
        self._real = os.path.realpath(root)
        self._inside: dict[str, bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFiles, (self.root,)

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(f"{self._real}{os.sep}")

    def list(self, key: str) -> list[Listed]:
        path = f"{self.root}/{key}" if key else self.root
        if key and not self._folder_is_inside(key):
            return []
        try:
            with os.scandir(path) as found:
                listed = [self._listed(entry) for entry in found]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(listed, key=lambda entry: entry.name)

    def _listed(self, entry: os.DirEntry[str]) -> Listed:
        outside = entry.is_symlink() and not self._is_inside(entry.path)
        return Listed(name=entry.name, is_folder=not outside and entry.is_dir(), outside=outside)

    def _folder_is_inside(self, folder: str) -> bool:
        if folder not in self._inside:
            self._inside[folder] = self._is_inside(f"{self.root}/{folder}")
        return self._inside[folder]

    def leads_out(self, folder: str) -> bool:
        return not self._folder_is_inside(folder)

    def _open(self, key: str) -> int:
        path = f"{self.root}/{key}"
        # Without O_NONBLOCK, opening a named pipe would block for ever.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        if not self._folder_is_inside(key.rpartition("/")[0]):
            raise CorruptFileError(f"{path} is reached by a link that leads out of {self.root}: it is not followed")
        try:
            return os.open(path, flags | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        if not self._is_inside(path):
            raise CorruptFileError(f"{path} is a link that leads out of {self.root}: it is not followed")
        return os.open(path, flags)

    def _size(self, descriptor: int, key: str) -> int:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFileError(f"{self.root}/{key} is not a regular file")
        return status.st_size

    def is_locked(self, key: str) -> bool | None:
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return None
        try:
            descriptor = self._open(key)
        except FileNotFoundError:
            return False
        except (OSError, CorruptFileError):
            return None
        try:
            # Shared, and given up at once: a writer that comes for it meanwhile waits no longer than that.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # some network file systems keep no locks
            return None
        else:
            return False
        finally:
            os.close(descriptor)

    def head(self, key: str) -> tuple[bytes, int | None]:
        descriptor = self._open(key)
        try:
            size = self._size(descriptor, key)
            return os.pread(descriptor, min(size, self.head_bytes), 0), size
        finally:
            os.close(descriptor)

    def fill(self, key: str, wants: Sequence[Want]) -> None:
        descriptor = self._open(key)
        try:
            self._size(descriptor, key)
            for want in wants:
                filled = 0
                while filled < want.buffer.nbytes:
                    count = read_at(descriptor, [want.buffer[filled:]], want.start + filled)
                    if not count:
                        raise CorruptFileError(f"{self.root}/{key} ends before byte {want.stop}: it was cut off")
                    filled += count
        finally:
            os.close(descriptor)


class RemoteFiles(Files):
    """A prefix of any fsspec file system.

    Parameters
    ----------
    storage : FsspecStorage
        Where the files are.
    """

    is_local = False
    head_bytes = 2**16

    def __init__(self, storage: FsspecStorage) -> None:
        self.storage, self.url = storage, storage.url

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFiles, (self.storage,)

    def list(self, key: str) -> list[Listed]:
        found = self.storage.scan(key)
        return [
            Listed(name=name, is_folder=not entry.is_file, size=entry.nbytes if entry.is_file else None) for name, entry in found.items()
        ]

    def head(self, key: str) -> tuple[bytes, int | None]:
        return bytes(self._ranges(key, [(0, self.head_bytes)])[0]), None

    def _ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Buffer]:
        try:
            return self.storage.read_ranges(key, ranges)
        except (LmprobeZarrError, FileNotFoundError, IsADirectoryError):
            raise
        except OSError as error:
            raise CorruptFileError(f"{self.url}/{key} cannot be read: {error}") from error

    def read(self, key: str, *, at_most: int) -> bytes:
        data = bytes(self._ranges(key, [(0, at_most + 1)])[0])
        if len(data) > at_most:
            raise CorruptFileError(f"{self.url}/{key} has more than {at_most} bytes, which is too large for this kind of file")
        return data

    def fill(self, key: str, wants: Sequence[Want]) -> None:
        for some in _in_groups(wants):
            for want, data in zip(some, self._ranges(key, [(want.start, want.stop) for want in some]), strict=True):
                if len(data) < want.buffer.nbytes:
                    raise CorruptFileError(f"{self.url}/{key} ends before byte {want.stop}: it was cut off")
                want.buffer[:] = data


def _in_groups(wants: Sequence[Want]) -> Iterator[list[Want]]:
    """Buffers in the order of the file, as many at a time as are fetched before any is filled."""
    group: list[Want] = []
    nbytes = 0
    for want in sorted(wants, key=lambda want: want.start):
        if group and nbytes + want.buffer.nbytes > FETCHED_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(want)
        nbytes += want.buffer.nbytes
    if group:
        yield group


def open_files(url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None) -> Files:
    """The files below a path or URL. Sends no request.

    Parameters
    ----------
    url : str, path or Storage
        A folder, or any URL that fsspec knows.
    storage_options : mapping, optional
        Passed to the fsspec file system.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        It is not a path or URL, or is a file.
    """
    storage = open_storage(url, storage_options)
    if isinstance(storage, LocalStorage):
        if storage is not url and Path(storage.root).is_file():
            raise InvalidArgumentError(f"{storage.root} is a file: give the folder that holds it")
        return LocalFiles(storage.root)
    if isinstance(storage, FsspecStorage):
        return RemoteFiles(storage)
    raise InvalidArgumentError(f"{storage!r} cannot be read by ranges: give a path or a URL")


def open_source(url: str | os.PathLike[str] | Storage, storage_options: Mapping[str, Any] | None = None) -> Files:
    """As `open_files`, for what is to be read.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As `open_files`; or a local folder does not exist.
    """
    files = open_files(url, storage_options)
    if isinstance(files, LocalFiles) and not Path(files.url).is_dir():
        raise InvalidArgumentError(f"the folder {files.url} does not exist: check the path")
    return files


def map_files(function: Callable[[Item], Result], items: Iterable[Item], *, local: bool) -> Iterator[Result]:
    """``map`` on threads, in order, with a bounded number of results waiting. `function` must not call `map_files` itself."""
    pool, window = _pool(os.getpid(), local), LOCAL_WINDOW if local else REMOTE_WINDOW
    waiting: deque[Future[Result]] = deque()
    source = iter(items)
    try:
        first = list(itertools.islice(source, 2))
        if len(first) == 1:
            yield function(first[0])
            return
        for item in itertools.chain(first, source):
            waiting.append(pool.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


@functools.cache
def _pool(pid: int, local: bool) -> ThreadPoolExecutor:  # noqa: ARG001 — threads do not survive a fork: one pool per process
    return ThreadPoolExecutor(LOCAL_THREADS if local else REMOTE_THREADS, thread_name_prefix="lmprobe-zarr-files")
