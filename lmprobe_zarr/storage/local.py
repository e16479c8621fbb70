"""`LocalStorage`, a folder of this machine: files appear by rename, and errors of the system become errors of this package."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from lmprobe_zarr.errors import (
    AccessDeniedError,
    InvalidArgumentError,
    LmprobeZarrError,
    NoSpaceError,
    NotAStoreError,
    ReadOnlyError,
    UnreachableError,
)
from lmprobe_zarr.storage.aligned import empty_aligned
from lmprobe_zarr.storage.base import FileInfo, Storage, check_same
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.ranges import LOCAL_GAP, Answer, cut, joined
from lmprobe_zarr.typing import Buffer

__all__ = ["LocalStorage", "read_at"]

# Errors of the medium or the file itself. All others, such as those of a network, say nothing of the bytes.
_DAMAGE: Final = {errno.EIO, errno.EBADMSG, errno.ENXIO, errno.ENODATA, errno.EISDIR, errno.EINVAL, getattr(errno, "EUCLEAN", errno.EIO)}
_ABSENT: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}  # gone, below a file, or a link to nowhere
# As file systems answer that do not flush folders, or files, on request: CIFS before Linux 4.17, FUSE, WSL.
_NOT_FLUSHED: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EROFS}
_NO_LINKS: Final = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EINVAL, errno.EXDEV}
_KEPT_BUFFER: Final = 2**24  # bytes; what is longer, as a file with many chunks, is given back, or every thread would go on to hold as much
_CREATE_ATTEMPTS: Final = 100  # at a file whose folder others may remove while it is empty


class LocalStorage(Storage):
    """A folder of this machine.

    Parameters
    ----------
    path : path
        The folder; it need not exist.
    """

    is_local = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Not resolved: a link to a moved disk stays a link. Only made absolute, so that chdir does not move a store.
        self.root = os.path.abspath(path)
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
            # Read until the end, not only the length asked for: the file may grow meanwhile.
            while piece := os.read(descriptor, max(os.fstat(descriptor).st_size, 1)):
                pieces.append(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except OSError as error:
            _raise_reading_error(error, self._path(key))
        finally:
            os.close(descriptor)

    def version(self, key: str) -> Hashable | None:
        try:
            status = os.stat(self._path(key))
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _open(self, key: str) -> int:
        path = self._path(key)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:  # not the file's fault
                raise UnreachableError(f"{path} cannot be opened now ({error.strerror}): close files, or raise `ulimit -n`") from error
            _raise_reading_error(error, path)

    def read_view(self, key: str) -> Buffer:
        descriptor = self._open(key)
        try:
            size = os.fstat(descriptor).st_size
            buffer: memoryview = getattr(self._buffers, "buffer", memoryview(b""))
            if size > _KEPT_BUFFER:
                buffer = empty_aligned((size + 4096,), np.dtype(np.uint8)).data
            elif len(buffer) < size:
                # A buffer kept per thread saves the page faults of a fresh allocation for every chunk.
                buffer = self._buffers.buffer = empty_aligned((size + 4096,), np.dtype(np.uint8)).data
            view = buffer[:size]
            return view[: _fill(descriptor, view, 0)]
        except OSError as error:
            _raise_reading_error(error, self._path(key))
        finally:
            os.close(descriptor)

    def read_into(self, key: str, target: memoryview, tail: memoryview) -> int:
        descriptor = self._open(key)
        try:
            expected = len(target) + len(tail)
            # Ask for one byte more than expected: no second call is needed to know that the file ends there.
            if read_at(descriptor, [target, tail, memoryview(bytearray(1))], 0) == expected:
                return expected
            if os.fstat(descriptor).st_size != expected:
                return os.fstat(descriptor).st_size
        except OSError as error:
            _raise_reading_error(error, self._path(key))
        finally:
            os.close(descriptor)
        return super().read_into(key, target, tail)  # the system may return fewer bytes than it was asked for

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        runs = joined(ranges, LOCAL_GAP)
        if not runs:
            return [b""] * len(ranges)
        descriptor = self._open(key)
        try:
            size = os.fstat(descriptor).st_size
            lengths = [max(min(run.stop, size) - run.start, 0) for run in runs]
            # One buffer for all: the system gives memory in large pages then, and 256 blocks are read in a third of the time.
            rest, answers = memoryview(bytearray(sum(lengths))), {}
            for run, length in zip(runs, lengths, strict=True):
                answers[run] = Answer(run.start, rest[: _fill(descriptor, rest[:length], run.start)])
                rest = rest[length:]
        except OSError as error:
            _raise_reading_error(error, self._path(key))
        finally:
            os.close(descriptor)
        return cut(ranges, runs, answers)

    def fill_ranges(self, key: str, ranges: Sequence[tuple[int, int]], target: memoryview) -> int:
        descriptor, place = self._open(key), 0
        try:
            for start, stop in ranges:
                found = _fill(descriptor, target[place : place + stop - start], start)
                place += found
                if found < stop - start:
                    break
        except OSError as error:
            _raise_reading_error(error, self._path(key))
        finally:
            os.close(descriptor)
        return place

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        path = self._path(key)
        with self._writing(path):
            self._write(path, data, durable)

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _LocalPieces(self, self._path(key), durable)

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
                    check_same(self, key, data)
                    return
            except BaseException:
                Path(staged).unlink(missing_ok=True)
                raise
            if durable:
                _sync_folder(folder)
                _sync_folder(os.path.dirname(folder))
            # xarray names the Dask arrays of xr.open_dataset by path and modification time: without this, arrays opened before and after
            # a commit would share a name. Best effort: the file is committed whether it succeeds or not.
            with suppress(OSError):
                os.utime(self.root)

    def _begin(self, path: str, view: Buffer) -> None:
        """Make a file of a path, with the first of its bytes."""
        with self._writing(path):
            self._write(path, view, durable=False)

    def _discard(self, path: str) -> None:
        """Remove a file that this storage has made, and the folders that become empty."""
        with self._writing(path):
            Path(path).unlink(missing_ok=True)
            self._remove_empty({os.path.dirname(path)})

    @staticmethod
    def _write(path: str, data: Buffer | tuple[Buffer, ...], durable: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                descriptor = os.open(path, flags, 0o666)
                break
            except FileNotFoundError:
                # Another process may remove the folder again while it is empty. mkdir raises FileExistsError where that happens between
                # its own two steps (where a file is in the way, open() raises NotADirectoryError).
                if attempt == _CREATE_ATTEMPTS - 1:
                    raise
                with suppress(FileNotFoundError, FileExistsError):
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            for piece in data if isinstance(data, tuple) else (data,):
                _write_all(descriptor, memoryview(piece))
            if durable:
                _flush(descriptor)
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
            if isinstance(error, (FileNotFoundError, IsADirectoryError)) or error.errno is None:
                raise
            if error.errno in {errno.ENAMETOOLONG, errno.EILSEQ}:
                raise InvalidArgumentError(f"{path} is no possible name there ({error.strerror}): give another place") from error
            raise UnreachableError(
                f"{path} cannot be written ({error.strerror}): check the disk or its server, or give another place\n"
                "what was committed is whole"
            ) from error

    def list(self, key: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(key)))
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            _raise_reading_error(error, self._path(key), "listed")

    def scan(self, key: str) -> dict[str, FileInfo]:
        found = {}
        try:
            with os.scandir(self._path(key)) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except OSError as error:
                        if error.errno in _ABSENT:  # gone since it was listed, or a link to nowhere
                            continue
                        raise
                    found[entry.name] = FileInfo(stat.S_ISREG(status.st_mode), status.st_size, status.st_mtime)
        except OSError as error:
            if error.errno not in _ABSENT:
                _raise_reading_error(error, self._path(key), "listed")
        return dict(sorted(found.items()))

    def remove(self, keys: Iterable[str]) -> None:
        folders: set[str] = set()
        for key in keys:
            path = self._path(key)
            if (folder := os.path.dirname(path)) not in folders and self.leads_out(key.rpartition("/")[0]):
                raise ReadOnlyError(f"{folder} is reached by a link that leads out of {self.root}: nothing is removed there")
            # A folder in place of a file was not made by this package, and stays.
            with self._writing(path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                os.unlink(path)
            folders.add(folder)
        self._remove_empty(folders)

    def remove_folders(self, keys: Iterable[str]) -> None:
        self._remove_empty({self._path(key) for key in keys if not self.leads_out(key)})

    def _remove_empty(self, folders: set[str]) -> None:
        # The deepest first, then those above; rmdir fails for a folder that is not empty, which then stays.
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
        # Not isfile(), which returns False on every error.
        try:
            return stat.S_ISREG(os.stat(self._path(key)).st_mode)
        except OSError as error:
            if error.errno in _ABSENT | {errno.ENAMETOOLONG}:
                return False
            _raise_reading_error(error, self._path(key))

    def scratch_folder(self) -> str | None:
        return str(self._existing())

    def free_bytes(self) -> int | None:
        # Some network file systems answer 0, or nothing, though they can be written to. A disk that is full refuses the first write.
        try:
            return shutil.disk_usage(self._existing()).free or None
        except OSError:
            return None

    def may_write(self) -> bool:
        place = self._existing()
        if not place.is_dir():
            return False
        if os.access(place, os.W_OK | os.X_OK):
            return True
        # access() looks at the mode bits, which are not what decides on file systems with access lists, such as NFSv4: try.
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".lmprobe-", suffix=".partial", dir=place))
        except OSError:
            return False
        return True

    def _existing(self) -> Path:
        """The root, or the nearest folder above it that exists."""
        path = Path(self.root)
        while not os.path.exists(path):
            path = path.parent
        return path


class _LocalPieces(PieceWriter):
    """A local file that is opened for each piece: hundreds of writers would reach the limit of open files."""

    def __init__(self, storage: LocalStorage, path: str, durable: bool) -> None:
        super().__init__(path)
        self._storage, self._durable = storage, durable

    def _append(self, view: memoryview) -> None:
        if not self.nbytes:
            self._storage._begin(self.name, view)
            return
        with self._storage._writing(self.name):
            descriptor = os.open(self.name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.lseek(descriptor, self.nbytes, os.SEEK_SET)
                _write_all(descriptor, view)
            finally:
                os.close(descriptor)

    def _close(self) -> None:
        if not self.nbytes:
            self._storage._begin(self.name, b"")
        with self._storage._writing(self.name):
            descriptor = os.open(self.name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                if self._durable:
                    _flush(descriptor)
                size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        if size != self.nbytes:
            raise UnreachableError(f"{self.name} has {size} bytes after {self.nbytes} were written: something else writes there; try again")

    def _abort(self) -> None:
        self._storage._discard(self.name)


def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill buffers in turn from a file's byte `offset` on, in one call; returns how many bytes came, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, offset)
    data = memoryview(os.pread(descriptor, sum(len(buffer) for buffer in buffers), offset))
    filled = 0
    for buffer in buffers:
        some = data[filled : filled + len(buffer)]
        buffer[: len(some)] = some
        filled += len(some)
    return filled


def _fill(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill a buffer from a file's byte `offset` on; returns how many bytes the file has there, at most those that fit."""
    filled = 0
    while filled < len(target):
        count = read_at(descriptor, [target[filled:]], offset + filled)
        if not count:
            break
        filled += count
    return filled


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _raise_reading_error(error: OSError, path: str, what: str = "read") -> NoReturn:
    """Raise the system's own error for what is missing or damaged, and one of ours for every other that says nothing of the bytes."""
    if isinstance(error, LmprobeZarrError) or error.errno is None or error.errno in _ABSENT | _DAMAGE:
        raise error
    if error.errno == errno.ENAMETOOLONG:
        raise FileNotFoundError(error.errno, error.strerror, path) from error
    if isinstance(error, PermissionError):
        raise AccessDeniedError(f"{path} cannot be {what} ({error.strerror}): check its permissions") from error
    raise UnreachableError(f"{path} cannot be {what} now ({error.strerror}): check the disk or its server, and try again") from error


def _link(staged: str, path: str) -> bool:
    """Rename a file unless one of the new name exists; returns whether it was renamed."""
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links.
        if os.path.exists(path):
            return False
        os.replace(staged, path)
        return True
    os.unlink(staged)
    return True


def _sync_folder(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # a folder that may be written to and not listed
        return
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Flush a file or folder to the medium, where its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED:
            raise


def _sync_folders(path: str) -> None:
    """Flush the names in a folder and in all folders below it."""
    for folder, _, _ in os.walk(path):
        _sync_folder(folder)
