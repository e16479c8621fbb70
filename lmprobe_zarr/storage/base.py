"""`Storage`, what every place promises, and `FileInfo`, a file's entry in a listing.

A storage holds files by key. It does not know what their bytes mean. What is promised, and where:

* ``write`` makes a file whole or raises. Readers may see it half written, so it is only used for files that no commit names yet.
* ``open_pieces`` writes a file as ``write`` does, piece by piece: it is whole once it is closed. Object stores show it only then.
* ``commit`` makes a file appear whole, at once and for good: on a local folder by temporary file, fsync and rename, on an
  object store by one put, which object stores make atomic. With ``replace=False`` it never replaces another writer's file. Local folders,
  S3, Google and Azure decide that in one step. Elsewhere the file is looked for first, and the random digits in a part's name keep two
  writers apart.
* ``remove`` removes single files, and folders only where that leaves them empty: files of others stay. A file behind a link that points
  outside the place is read like any other, and never removed.
* Opening a place writes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from lmprobe_zarr.errors import AlreadyCommittedError
from lmprobe_zarr.storage.pace import Pace, local_pace
from lmprobe_zarr.storage.pieces import PieceWriter, StrayUpload
from lmprobe_zarr.typing import Buffer

__all__ = ["FileInfo", "Storage", "check_same", "media_type"]


def media_type(key: str) -> str | None:
    """What an object store is told of a file's content, where browsers need it: they save a page without it instead of showing it."""
    return "text/html; charset=utf-8" if key.endswith(".html") else None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file's or folder's entry in a listing.

    Parameters
    ----------
    is_file : bool
        False for a folder.
    nbytes : int
        Size in bytes; without meaning for a folder.
    modified : float, optional
        When it was last written, in seconds since 1970; None where the place does not say.
    """

    is_file: bool
    nbytes: int
    modified: float | None


class Storage(ABC):
    """Files by key, ``/`` between folders. Picklable, and usable from many threads."""

    url: str
    is_local: bool
    # Whether reading a file takes so long that it is worth keeping what was read.
    is_slow: bool = False
    # Whether the place was seen to send whole files where ranges were requested.
    sends_whole_files: bool = False
    # Whether `read` may answer from copies that are not compared with the place itself, as fsspec's caching file systems do.
    keeps_copies: bool = False

    @property
    def server(self) -> str:
        """Which server or account the files are on, where the URL does not say it; never a secret."""
        return ""

    @property
    def pace(self) -> Pace:
        """How many requests are sent at a time."""
        return local_pace()

    def check_reach(self) -> None:
        """Raise `InvalidArgumentError` where no other process can read these files."""
        return

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""

    def is_same_place(self, other: Storage) -> bool:
        """Whether another storage is of the same place, and reaches it in the same way."""
        return type(self) is type(other) and self.url == other.url

    def read_current(self, key: str) -> bytes:
        """All bytes of a file that may have been replaced since it was read before: never those of a copy that a cache keeps."""
        return self.read(key)

    def version(self, key: str) -> Hashable | None:
        """What changes when a file is replaced; None where there is no file, or where finding out would cost a request."""
        return None

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
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        """Several ranges of one file, neighbours in one request and the others at the same time.

        Nothing is requested where no range has a byte. Memory is taken for bytes that the file has, whatever the ranges say.

        Parameters
        ----------
        key : str
        ranges : sequence of (int, int)
            Start and stop in bytes, in any order; they may touch, overlap, and reach beyond the end of the file.

        Returns
        -------
        list of Buffer
            One for each range, with stop - start bytes, or fewer where the file ends earlier: compare the length. They share memory.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        InvalidArgumentError
            A range begins before the file, or ends before it begins.
        """

    def fill_ranges(self, key: str, ranges: Sequence[tuple[int, int]], target: memoryview) -> int:
        """Fill `target` with several ranges of one file, end to end; returns how many bytes, fewer where the file ends earlier.

        What a reader calls again and again, with the same memory as target: new memory costs more than the copy.
        """
        place = 0
        for data in self.read_ranges(key, ranges):
            target[place : place + len(data)] = data
            place += len(data)
        return place

    @abstractmethod
    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        """Write a file, given whole or in pieces, and the folders above it.

        With `durable`, it is flushed to the medium where the place knows what that is.
        """

    @abstractmethod
    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        """A file that is written piece by piece, as with `write`. Nothing is written before the first piece.

        Hundreds may be open at the same time: a local one holds no file open between two pieces. On S3 each holds up to 16 MiB in memory.
        """

    def stray_uploads(self, key: str) -> list[StrayUpload]:
        """Uploads below a folder that were never finished, of this or any other writer; none where the place has none or does not say."""
        return []

    def abort_uploads(self, uploads: Iterable[StrayUpload]) -> None:
        """Abort uploads that `stray_uploads` has returned; one that was finished meanwhile is no error, and its file stays."""
        return

    @abstractmethod
    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        """Make a file appear whole or not at all; with `durable`, it and the names of its folder survive a power cut.

        Without `replace`, an existing file stays and `AlreadyCommittedError` is raised, unless it holds the same bytes: the answer to a
        put may be lost and the put repeated.
        """

    def start_listing(self) -> Future[list[str]] | None:
        """The first keys of all files, about 1,000, while the caller goes on: a hint of what to request next, and no promise.

        None where that would be no single request. The result may be an error, which says nothing.
        """
        return None

    @abstractmethod
    def list(self, key: str) -> list[str]:
        """Names directly below a folder, sorted; none where it does not exist."""

    @abstractmethod
    def scan(self, key: str) -> dict[str, FileInfo]:
        """Files and folders directly below a folder, sorted by name, in as few requests as possible; none where it does not exist."""

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        """Size in bytes of each of the named files below a folder that exists, in as few requests as the place allows."""
        wanted = set(names)
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in wanted}:
            prefix = f"{folder}/" if folder else ""
            entries = self.scan(f"{key}/{folder}" if folder else key)
            found |= {f"{prefix}{name}": entry.nbytes for name, entry in entries.items() if entry.is_file and f"{prefix}{name}" in wanted}
        return found

    @abstractmethod
    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; a missing file is no error. Folders that become empty are removed too, up to the root."""

    @abstractmethod
    def remove_folders(self, keys: Iterable[str]) -> None:
        """Remove empty folders; others stay, and a missing folder is no error."""

    @abstractmethod
    def touch(self, key: str) -> None:
        """Make an empty file and the folders above it, or set the modification time of an existing file to now."""

    @abstractmethod
    def remove_tree(self, key: str) -> None:
        """Remove a folder and everything below it; a missing folder is no error."""

    @abstractmethod
    def is_file(self, key: str) -> bool:
        """Whether a file of that key exists."""

    def leads_out(self, key: str) -> bool:
        """Whether a folder is reached by a link that points outside the place: such files are never removed."""
        return False

    def scratch_folder(self) -> str | None:
        """A local folder on the same medium for files that are never seen; None for the system's folder of temporary files."""
        return None

    def free_bytes(self) -> int | None:
        """Bytes that may still be written; None where the place has no limit or does not say."""
        return None

    def may_write(self) -> bool:
        """False where it is known without trying that nothing can be written."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_same(storage: Storage, key: str, data: Buffer) -> None:
    """Raise `AlreadyCommittedError` where an existing file does not hold the bytes that were to be committed."""
    if storage.read(key) != data:
        raise AlreadyCommittedError(f"{storage.url}/{key} was committed by another writer: nothing was replaced; write again")
