"""Places that hold files by key: a folder, S3, Google, Azure, the Hub, memory, and what else fsspec opens; and `run_all`, for many at once.

Never what the bytes mean: no format, no chunk, no prompt. What every place promises stands in ``base``. Other rooms import from this face.
"""

from lmprobe_zarr.storage.address import local_path
from lmprobe_zarr.storage.aligned import empty_aligned
from lmprobe_zarr.storage.base import FileInfo, Storage
from lmprobe_zarr.storage.hub import HubDraft, HubStorage
from lmprobe_zarr.storage.local import LocalStorage, read_at
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.storage.pace import Pace, local_pace
from lmprobe_zarr.storage.pieces import PieceWriter, StrayUpload
from lmprobe_zarr.storage.read_cache import KeptReads, ReadCache, ReadCacheSize
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.storage.threads import run_all

__all__ = [
    "FileInfo",
    "FsspecStorage",
    "HubDraft",
    "HubStorage",
    "KeptReads",
    "LocalStorage",
    "Pace",
    "PieceWriter",
    "ReadCache",
    "ReadCacheSize",
    "Storage",
    "StrayUpload",
    "empty_aligned",
    "local_pace",
    "local_path",
    "open_storage",
    "read_at",
    "run_all",
]
