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

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.errors import (
    AlreadyCommittedError,
)
from lmprobe_zarr.typing import Buffer

__all__ = ["REMOTE_THREADS", "Entry", "Storage"]

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


def check_same(storage: Storage, key: str, data: Buffer) -> None:
    """Raise where a file that is there already does not hold what was to be committed."""
    if storage.read(key) != data:
        raise AlreadyCommittedError(f"{storage.url}/{key} was committed by another writer: nothing was replaced; write again")
