"""`Part`, one committed part in its storage."""

from __future__ import annotations

from dataclasses import dataclass

from lmprobe_zarr.storage import Storage
from lmprobe_zarr.store.format import Level, PartInfo
from lmprobe_zarr.store.parts.stored_array import StoredArray

__all__ = ["Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part and where it lies.

    Parameters
    ----------
    storage : Storage
        The place of its root.
    path : str
        Its key below that.
    info : PartInfo
    document_nbytes : int
        Bytes of its document.
    rank : int
        Which of several roots that are read as one it lies in; what lies in a higher one wins, whenever it was written.
    """

    storage: Storage
    path: str
    info: PartInfo
    document_nbytes: int = 0
    rank: int = 0

    @property
    def order(self) -> tuple[int, str]:
        """Sorts after everything that it wins over."""
        return self.rank, self.info.name

    def array(self, level: Level, name: str) -> StoredArray:
        """One of its arrays."""
        path = f"{level}/{name}"
        return StoredArray(self.storage, f"{self.path}/{path}", self.info.arrays[path], self.info.files)
