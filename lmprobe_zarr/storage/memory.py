"""TODO: lmprobe_zarr/storage/memory.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from lmprobe_zarr.errors import (
    InvalidArgumentError,
)
from lmprobe_zarr.storage.remote import FsspecStorage

__all__ = ["MemoryStorage"]


_memory_lock: Final = threading.RLock()


class MemoryStorage(FsspecStorage):
    """A prefix of the memory of this process, which its threads share.

    fsspec's file system of that name is one dictionary for all, made for one thread: what lists it stumbles over what another one
    removes meanwhile. So all that is said to it is said under one lock.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_process, (os.getpid(), self.filesystem, self.root, self.url)

    def check_reach(self) -> None:
        _same_process(0, self.filesystem, self.root, self.url)

    @contextmanager
    def talking(self, key: str, *, writing: bool = False, listing: bool = False) -> Iterator[None]:
        with _memory_lock, super().talking(key, writing=writing, listing=listing):
            yield

    def remove(self, keys: Iterable[str]) -> None:
        listed = list(keys)
        super().remove(listed)
        # Object stores have no folders; this one keeps them, and would go on to list them.
        self.remove_folders({key.rpartition("/")[0] for key in listed})

    def _remove_empty(self, folder: str) -> None:
        with _memory_lock:
            super()._remove_empty(folder)


def _same_process(pid: int, filesystem: Any, root: str, url: str) -> FsspecStorage:
    if pid != os.getpid():
        raise InvalidArgumentError(f"{url} lies in the memory of one process and cannot be read by another: use threads, or a folder")
    return MemoryStorage(filesystem, root, url)
