"""`ObjectStorage`, what stores of objects by Google and Azure have in common: no folders, one request for each verb.

Each of their clients sends several requests where one will do, and reads parts of a name as a URL, a version or a pattern.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from lmprobe_zarr.storage.base import FileInfo
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.storage.threads import run_all
from lmprobe_zarr.typing import Buffer

__all__ = ["ObjectStorage"]


class ObjectStorage(FsspecStorage):
    """A prefix of a bucket. A folder is the beginning of names up to a slash, and is gone with the last of them."""

    @abstractmethod
    def _entries(self, key: str, *, deep: bool) -> Iterator[tuple[str, FileInfo]]:
        """Names below a folder, from its slash on, in no order: with `deep` the files of all folders, else folders without their files."""

    @abstractmethod
    def _delete(self, key: str) -> None:
        """Remove an object; FileNotFoundError where there is none."""

    @abstractmethod
    def _put(self, key: str, data: Buffer, *, if_absent: bool) -> None:
        """Write an object in one step; FileExistsError where it has to be absent and is not."""

    def object_of(self, key: str) -> tuple[str, str]:
        bucket, _, name = self._path(key).partition("/")
        return bucket, name

    def _folder(self, key: str) -> tuple[str, str]:
        bucket, name = self.object_of(key)
        return bucket, f"{name}/" if name else ""

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        self._put(key, b"".join(data) if isinstance(data, tuple) else data, if_absent=False)

    def _create(self, key: str, data: Buffer) -> None:
        self._put(key, data, if_absent=True)

    def scan(self, key: str) -> dict[str, FileInfo]:
        # Consoles in which one makes folders store an empty object under the folder's own name.
        return dict(sorted((name, entry) for name, entry in self._entries(key, deep=False) if name))

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        wanted = set(names)
        return {name: entry.nbytes for name, entry in self._entries(key, deep=True) if name in wanted}

    def remove(self, keys: Iterable[str]) -> None:
        run_all([partial(self._remove_object, key) for key in keys], self.pace)

    def _remove_object(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._delete(key)

    def remove_folders(self, keys: Iterable[str]) -> None:
        return

    def remove_tree(self, key: str) -> None:
        found = {f"{key}/{name}" if key else name: entry.is_file for name, entry in self._entries(key, deep=True)}
        self.remove(name for name, is_file in found.items() if is_file)
        # Accounts with a hierarchy keep folders, and remove empty ones alone.
        for folder in sorted((name for name, is_file in found.items() if not is_file), key=len, reverse=True):
            self.remove([folder])
