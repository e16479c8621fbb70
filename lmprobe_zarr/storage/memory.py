"""`MemoryStorage`, files in the memory of this process: one lock for all its threads, and no other process can read them."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage.remote import FsspecStorage

__all__ = ["MemoryStorage"]

_memory_lock: Final = threading.RLock()


class MemoryStorage(FsspecStorage):
    """A prefix of the memory of this process, which its threads share.

    fsspec's memory file system is one dictionary, and not safe for threads: a listing fails where another thread removes a file meanwhile.
    So every call holds one lock.
    """

    is_slow = False

    def version(self, key: str) -> Hashable | None:
        with _memory_lock:
            try:
                info = self.filesystem.info(self._path(key))
            except OSError:
                return None
        return info.get("size"), info.get("modified") or info.get("created")

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_same_process, (os.getpid(), self.filesystem, self.root, self.url)

    def check_reach(self) -> None:
        raise _unreachable(self.url)

    @contextmanager
    def translating_errors(self, key: str, *, writing: bool = False, listing: bool = False) -> Iterator[None]:
        with _memory_lock, super().translating_errors(key, writing=writing, listing=listing):
            yield

    def remove(self, keys: Iterable[str]) -> None:
        listed = list(keys)
        super().remove(listed)
        # Unlike object stores, fsspec's memory keeps empty folders and lists them.
        self.remove_folders({key.rpartition("/")[0] for key in listed})

    def _remove_empty(self, folder: str) -> None:
        with _memory_lock:
            super()._remove_empty(folder)


def _unreachable(url: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{url} lies in the memory of one process and cannot be read by another: use threads, or a folder")


def _in_same_process(pid: int, filesystem: Any, root: str, url: str) -> FsspecStorage:
    """Unpickle a storage, in the process that pickled it only."""
    if pid != os.getpid():
        raise _unreachable(url)
    return MemoryStorage(filesystem, root, url)
