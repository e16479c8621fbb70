"""`Part`, one committed part in its storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage import KeptReads, Storage
from lmprobe_zarr.store.format import Level, PartInfo
from lmprobe_zarr.store.parts.array_files import ArrayFiles
from lmprobe_zarr.store.parts.stored_array import StoredArray

__all__ = ["PART_BYTES", "Part", "part_bytes_within"]

# What a part holds at most unless the caller says otherwise, in bytes of activations before compression.
PART_BYTES: Final = 2**30
# A part is evicted as a whole, so a cache with a limit makes no part larger than this fraction of the limit.
PARTS_IN_LIMIT: Final = 50


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part.

    Parameters
    ----------
    storage : Storage
        The place of its root.
    path : str
        Key of its folder, below the root.
    info : PartInfo
    document_nbytes : int
        Bytes of its document.
    rank : int
        Which of several roots that are read as one it is in. A part in a higher root wins, whenever it was written.
    noted : bool
        Whether it is noted when the part is read: not in a root that is read only.
    kept : KeptReads, optional
        What is kept on this machine of its files; None where they are always read from their place.
    """

    storage: Storage
    path: str
    info: PartInfo
    document_nbytes: int = 0
    rank: int = 0
    noted: bool = False
    kept: KeptReads | None = None

    @property
    def order(self) -> tuple[int, str]:
        """A key that sorts after those of all parts over which this one wins."""
        return self.rank, self.info.name

    def sizes(self) -> dict[str, int]:
        """Length of every file but its document, by its key below the part.

        Raises
        ------
        CorruptPartError, PartGoneError
            A table of chunks is missing or damaged.
        """
        found = {name: int(entry[0]) for name, entry in self.info.files.items()}
        for key in self.info.tables or ():
            found |= {f"{key}/{name}": nbytes for name, nbytes in self.files_of(key).file_sizes().items()}
        return found

    def files_of(self, key: str) -> ArrayFiles:
        """The files of one of its arrays, given by its key."""
        return self.array_of(key).where

    def array_of(self, key: str) -> StoredArray:
        """One of its arrays, given by its key."""
        level, _, name = key.partition("/")
        return self.array("tokens" if level == "tokens" else "prompts", name)

    def array(self, level: Level, name: str) -> StoredArray:
        """One of its arrays."""
        path = f"{level}/{name}"
        tables = None if self.info.tables is None else self.info.tables.get(path)
        return StoredArray(self.storage, f"{self.path}/{path}", self.info.arrays[path], self.info.files, self.noted, tables, self.kept)


def part_bytes_within(part_bytes: int, limit: int | None) -> int:
    """How many bytes a part may hold: as many as given, and of a cache with a limit at most a fiftieth of that.

    Raises
    ------
    InvalidArgumentError
        `part_bytes` is no positive integer.
    """
    if isinstance(part_bytes, bool) or not isinstance(part_bytes, int) or part_bytes < 1:
        raise InvalidArgumentError(f"part_bytes={part_bytes!r} is no size of a part: give bytes, at least 1")
    return min(part_bytes, max(1, limit // PARTS_IN_LIMIT)) if limit else part_bytes
