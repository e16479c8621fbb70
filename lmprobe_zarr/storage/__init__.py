"""Places that hold files by key: a folder, S3, memory, and whatever else fsspec opens.

Never what the bytes mean.
"""

from lmprobe_zarr.storage.base import Entry, Storage
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.open import open_storage
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.storage.threads import run_all

__all__ = ["Entry", "FsspecStorage", "LocalStorage", "Storage", "open_storage", "run_all"]
