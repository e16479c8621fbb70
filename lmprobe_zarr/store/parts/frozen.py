"""`FrozenStorage`, the storage of a published copy, which holds exactly what its root lists. Refuses every write."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NoReturn

from lmprobe_zarr.errors import ReadOnlyError
from lmprobe_zarr.storage import FileInfo, Pace, PieceWriter, Storage
from lmprobe_zarr.store.format import Published
from lmprobe_zarr.typing import Buffer

__all__ = ["FrozenStorage"]


class FrozenStorage(Storage):
    """A storage whose root lists everything in it, so that listing it makes no request.

    Parameters
    ----------
    inner : Storage
        The storage of the copy.
    published : Published
        The record of its root.
    """

    def __init__(self, inner: Storage, published: Published) -> None:
        self.inner, self.published = inner, published
        self.url, self.is_local, self.is_slow = inner.url, inner.is_local, inner.is_slow
        self._folders: dict[str, set[str]] = {"": {"zarr.json"}}
        for group, keys in published.groups.items():
            for key in ("zarr.json", *keys):
                pieces = f"{group}/{key}".split("/")
                for i, piece in enumerate(pieces):
                    self._folders.setdefault("/".join(pieces[:i]), set()).add(piece)

    def keys(self) -> list[str]:
        """Keys of the documents of its groups and parts."""
        parts = [f"{group}/{key}/zarr.json" for group, keys in self.published.groups.items() for key in keys]
        return [*(f"{group}/zarr.json" for group in self.published.groups), *parts]

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenStorage, (self.inner, self.published)

    @property
    def server(self) -> str:
        return self.inner.server

    @property
    def pace(self) -> Pace:
        return self.inner.pace

    def check_reach(self) -> None:
        self.inner.check_reach()

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def is_same_place(self, other: Storage) -> bool:
        return isinstance(other, FrozenStorage) and self.inner.is_same_place(other.inner)

    def read_current(self, key: str) -> bytes:
        return self.inner.read_current(key)

    def version(self, key: str) -> Hashable | None:
        return self.inner.version(key)

    def read_view(self, key: str) -> Buffer:
        return self.inner.read_view(key)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        return self.inner.read_ranges(key, ranges)

    def fill_ranges(self, key: str, ranges: Sequence[tuple[int, int]], target: memoryview) -> int:
        return self.inner.fill_ranges(key, ranges, target)

    @property
    def sends_whole_files(self) -> bool:  # type: ignore[override]
        return self.inner.sends_whole_files

    def list(self, key: str) -> list[str]:
        return sorted(self._folders.get(key, ()))

    def scan(self, key: str) -> dict[str, FileInfo]:
        return {name: FileInfo(name == "zarr.json", 0, None) for name in self.list(key)}

    def sizes(self, key: str, names: Iterable[str]) -> dict[str, int]:
        return self.inner.sizes(key, names)

    def is_file(self, key: str) -> bool:
        return self.inner.is_file(key)

    def may_write(self) -> bool:
        return False

    def _refuse(self) -> NoReturn:
        raise ReadOnlyError(f"{self.url} is a published copy, which never changes: write to the store that it was made from")

    def write(self, key: str, data: Buffer | tuple[Buffer, ...], *, durable: bool) -> None:
        self._refuse()

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        self._refuse()

    def commit(self, key: str, data: Buffer, *, durable: bool, replace: bool = True) -> None:
        self._refuse()

    def remove(self, keys: Iterable[str]) -> None:
        self._refuse()

    def remove_folders(self, keys: Iterable[str]) -> None:
        self._refuse()

    def touch(self, key: str) -> None:
        self._refuse()

    def remove_tree(self, key: str) -> None:
        self._refuse()
