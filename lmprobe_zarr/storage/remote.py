"""`FsspecStorage`, a prefix of any file system that fsspec opens, with errors of its client as errors of this package."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, Final

from fsspec.implementations.cached import CachingFileSystem

from lmprobe_zarr.errors import AccessDeniedError, LmprobeZarrError, ReadOnlyError, StoreNotFoundError, UnreachableError
from lmprobe_zarr.storage.base import FileInfo, Storage, check_same
from lmprobe_zarr.storage.client_errors import as_our_error, is_passing, is_throttling, response_code, without_secrets
from lmprobe_zarr.storage.pace import REMOTE_REQUESTS, Pace, remote_pace
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.storage.ranges import REMOTE_GAP, Answer, Run, cut, joined
from lmprobe_zarr.storage.threads import run_all
from lmprobe_zarr.typing import Buffer

__all__ = ["FsspecStorage", "modified_at"]

# Seconds between the tries of a request that is refused in a way that passes, and after how long a client's own tries are enough.
_WAITS: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0)
_TRIED_SECONDS: Final = 5.0
# For how long a request is repeated that is refused because there are too many, while the server answers others.
_THROTTLED_SECONDS: Final = 60.0
_PUT_ATTEMPTS: Final = 6  # at a conditional put while other writers try the same
_LARGE_BYTES: Final = 2**26  # for longer runs the file's size is looked up first: clients may take memory for what is requested
_BITE_BYTES: Final = 2**20

_LOGGER: Final = logging.getLogger("lmprobe_zarr.storage")
_without_ranges: Final[set[str]] = set()  # places of which it was logged that they send whole files
_lock: Final = threading.Lock()


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
    # Whether the client is known to return ranges, and not whole files in their place.
    sends_ranges = True
    # More are of no use to clients in Python, which are bound by the interpreter then.
    most_requests = REMOTE_REQUESTS

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

    @property
    def server(self) -> str:
        # As s3fs, gcsfs, adlfs and clients of one host name it. A caching file system hands on what it wraps has.
        names = ("endpoint_url", "_endpoint", "account_name", "host", "port")
        found = [str(getattr(self.filesystem, name, None) or "") for name in names]
        options = getattr(self.filesystem, "client_kwargs", None)
        found.append(str(options.get("endpoint_url") or "") if isinstance(options, Mapping) else "")
        return without_secrets(" ".join(found))

    @property
    def pace(self) -> Pace:
        return remote_pace(self.filesystem, self.most_requests)

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

        Errors are those of `translating_errors`. A client that has tried for long on its own is not called again, unless the server refused
        because there are too many requests, and has answered others since.
        """
        pace, began = self.pace, time.monotonic()
        waits = iter(_WAITS)
        # A request that waits to be repeated keeps its turn: so fewer are under way.
        with pace.turn():
            while True:
                sent, answers = time.monotonic(), pace.answers
                try:
                    with self.translating_errors(key, writing=writing, listing=listing):
                        answer = function(*args, **kwargs)
                except UnreachableError as error:
                    cause, now = error.__cause__, time.monotonic()
                    wait, is_throttled = next(waits, None), is_throttling(cause)
                    if is_throttled:
                        pace.refused(sent)
                    if not (is_throttled and pace.answers > answers and now - began < _THROTTLED_SECONDS) and (
                        wait is None or not is_passing(cause) or self._was_repeated(cause, now - sent)
                    ):
                        raise
                else:
                    pace.answered(time.monotonic() - sent)
                    return answer
                # Not all at the same moment again.
                time.sleep((_WAITS[-1] if wait is None else wait) * random.uniform(0.5, 1.0))

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

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        runs = joined(ranges, REMOTE_GAP)
        answers: dict[Run, Answer] = {}
        if self.keeps_copies and runs:
            answers = self.call(self._read_copy, key, runs, key=key)
            return cut(ranges, runs, answers)

        def read(run: Run) -> None:
            answers[run] = self._read_run(key, run)

        rest = runs
        if not self.sends_ranges and runs:
            read(runs[0])
            rest = runs[1:]
            if answers[runs[0]].is_whole:
                return cut(ranges, runs, dict.fromkeys(runs, answers[runs[0]]))
        run_all([partial(read, run) for run in rest], self.pace)
        return cut(ranges, runs, answers)

    def _read_copy(self, key: str, runs: Sequence[Run]) -> dict[Run, Answer]:
        """Runs of a file that a caching file system keeps; it fetches the file, or its blocks, when they are read from an opened file."""
        answers = {}
        with self.filesystem.open(self._path(key), "rb") as file:
            size = file.seek(0, 2)
            for run in runs:
                file.seek(min(run.start, size))
                left, pieces = min(run.stop, size) - run.start, list[bytes]()
                while left > 0 and (piece := file.read(min(left, _BITE_BYTES))):
                    pieces.append(piece)
                    left -= len(piece)
                answers[run] = Answer(run.start, b"".join(pieces))
        return answers

    def _read_run(self, key: str, run: Run) -> Answer:
        try:
            answer = self._request(key, run)
        except Exception as error:
            if response_code(error)[1] != 416:
                raise
            # The range begins behind the end of the file, or the server takes no ranges.
            if (self._length(key) or 0) <= run.start:
                return Answer(run.start, b"")
            answer = None
        if answer is None:
            answer = Answer(0, self.read(key), is_whole=True)
        if answer.is_whole and len(answer.data) > run.nbytes:
            self._log_whole()
        return answer

    def _request(self, key: str, run: Run) -> Answer | None:
        """What the client returns for a run; None where it is no use, and the file has to be read whole."""
        stop = run.stop
        if run.nbytes > _LARGE_BYTES and (size := self._length(key)) is not None:
            stop = min(stop, size)
            if stop <= run.start:
                return Answer(run.start, b"")
        data: bytes = self.call(self.filesystem.cat_file, self._path(key), key=key, start=run.start, end=stop)
        return Answer(0, data, is_whole=True) if len(data) > run.nbytes else Answer(run.start, data)

    @property
    def sends_whole_files(self) -> bool:  # type: ignore[override]
        return self.url in _without_ranges

    def _log_whole(self) -> None:
        with _lock:
            is_new = self.url not in _without_ranges
            _without_ranges.add(self.url)
        if is_new:
            _LOGGER.warning("%s sends whole files where ranges are requested: every read of some rows transfers whole files", self.url)

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        whole = b"".join(data) if isinstance(data, tuple) else bytes(data)
        self.call(self.filesystem.pipe_file, self._path(key), whole, key=key, writing=True, **self._about(key))

    def _about(self, key: str) -> dict[str, Any]:
        """What the client is told of a file that it writes."""
        return {}

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _OpenedPieces(self, key)

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        if replace or not self._put_if_absent(key, data):
            self.write(key, data, durable=durable)

    def _put_if_absent(self, key: str, data: Buffer) -> bool:
        """Make a file unless it exists; False where the place has no conditional put and the file does not exist: nothing was written."""
        for attempt in range(_PUT_ATTEMPTS):
            try:
                self._create(key, data)
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

    def _create(self, key: str, data: Buffer) -> None:
        """Make a file that does not exist; FileExistsError, or the client's own error, where it does."""
        self.call(self.filesystem.pipe_file, self._path(key), bytes(data), key=key, writing=True, mode="create")

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
        found: dict[str, int] = {}

        def look_up(name: str) -> None:
            with suppress(FileNotFoundError):
                size = self._length(f"{key}/{name}")
                # A server need not send the size; then the whole file is read.
                found[name] = len(self.read(f"{key}/{name}")) if size is None else size

        run_all([partial(look_up, name) for name in listed], self.pace)
        return {name: found[name] for name in listed if name in found}

    def _length(self, key: str) -> int | None:
        size = self.call(self.filesystem.info, self._path(key), key=key).get("size")
        return None if size is None else int(size)

    def remove(self, keys: Iterable[str]) -> None:
        run_all([partial(self._remove_file, self._path(key)) for key in keys], self.pace)

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
        run_all([partial(self._remove_file, name) for name in files], self.pace)
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


class _OpenedPieces(PieceWriter):
    """A file of a file system that is written through its own opened file."""

    def __init__(self, storage: FsspecStorage, key: str) -> None:
        super().__init__(f"{storage.url}/{key}")
        self._storage, self._key = storage, key
        self._file: Any = None

    def _opened(self) -> Any:
        if self._file is None:
            try:
                self._file = self._storage.filesystem.open(self._storage._path(self._key), "wb")
            except NotImplementedError as error:
                raise ReadOnlyError(f"{self.name} cannot be written piece by piece: its file system opens no files for writing") from error
        return self._file

    def _append(self, view: memoryview) -> None:
        with self._storage.translating_errors(self._key, writing=True):
            self._opened().write(view)

    def _close(self) -> None:
        with self._storage.translating_errors(self._key, writing=True):
            self._opened().close()

    def _abort(self) -> None:
        if self._file is None:
            return
        with self._storage.translating_errors(self._key, writing=True):
            # By whatever its kind of file is given up; closed, it would become whole, even where that is done as it is collected.
            with suppress(Exception):
                self._file.discard()
            try:
                self._file.closed = True
            except AttributeError:
                self._file.close()
        self._storage.remove([self._key])


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
