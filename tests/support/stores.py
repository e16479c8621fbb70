"""A group, batches of activations to write, and storages that a test can change or stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import MissingPromptsError
from lmprobe_zarr.storage.base import Storage
from lmprobe_zarr.storage.pieces import PieceWriter
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store, open_store

GROUP = GroupInfo(model="acme/toy", provenance={"revision": "abc"}, num_layers=4, hidden_size=8)


class Wrapped(Storage):
    """Another storage, for tests that change some of its verbs."""

    def __init__(self, inner: Storage) -> None:
        self.inner, self.url, self.is_local = inner, inner.url, inner.is_local

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, key: str) -> bytes:
        return self.inner.read(key)

    def read_view(self, key: str) -> Any:
        return self.inner.read_view(key)

    def read_ranges(self, key: str, ranges: Any) -> Any:
        return self.inner.read_ranges(key, ranges)

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return self.inner.open_pieces(key, durable=durable)

    def stray_uploads(self, key: str) -> Any:
        return self.inner.stray_uploads(key)

    def abort_uploads(self, uploads: Any) -> None:
        self.inner.abort_uploads(uploads)

    def scan(self, key: str) -> Any:
        return self.inner.scan(key)

    def list(self, key: str) -> Any:
        return self.inner.list(key)

    def sizes(self, key: str, names: Any) -> Any:
        return self.inner.sizes(key, names)

    def is_file(self, key: str) -> bool:
        return self.inner.is_file(key)

    def may_write(self) -> bool:
        return self.inner.may_write()

    def leads_out(self, key: str) -> bool:
        return self.inner.leads_out(key)

    def touch(self, key: str) -> None:
        self.inner.touch(key)

    def write(self, key: str, data: Any, *, durable: bool) -> None:
        self.inner.write(key, data, durable=durable)

    def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
        self.inner.commit(key, data, durable=durable, replace=replace)

    def remove(self, keys: Any) -> None:
        self.inner.remove(keys)

    def remove_folders(self, keys: Any) -> None:
        self.inner.remove_folders(keys)

    def remove_tree(self, key: str) -> None:
        self.inner.remove_tree(key)


def pull_the_plug() -> None:
    raise OSError("pulled the plug")


class Stops(Wrapped):
    """A storage that stops working at the n-th call that changes anything, counted from 0.

    Parameters
    ----------
    inner : Storage
    after : int
        How many calls it still does.
    moment : {"before", "half", "after"}
        Whether the call at which it stops has had no effect, or its whole effect; or has written half of the bytes, as a machine that dies
        leaves them: of a file that is committed, beside its place.
    stop : callable
        What happens then, and at every later call.
    """

    def __init__(self, inner: Storage, after: int, *, moment: str = "before", stop: Callable[[], object] = pull_the_plug) -> None:
        super().__init__(inner)
        self.after, self.moment, self.stop = after, moment, stop
        self._lock = threading.Lock()

    def _do(self, whole: Callable[[], object], half: Callable[[], object] = lambda: None) -> None:
        with self._lock:  # several threads write at once
            self.after -= 1
            if self.after < 0:
                if self.after == -1:
                    {"before": lambda: None, "half": half, "after": whole}[self.moment]()
                self.stop()
            whole()

    def touch(self, key: str) -> None:
        self._do(partial(super().touch, key))

    def write(self, key: str, data: Any, *, durable: bool) -> None:
        half = partial(self.inner.write, key, data[: len(data) // 2], durable=False)
        self._do(partial(super().write, key, data, durable=durable), half)

    def commit(self, key: str, data: Any, *, durable: bool, replace: bool = True) -> None:
        folder, _, name = key.rpartition("/")
        staged = f"{folder}/.{name}.{'0' * 12}.partial".lstrip("/")
        half = partial(self.inner.write, staged, data[: len(data) // 2], durable=False)
        self._do(partial(super().commit, key, data, durable=durable, replace=replace), half)

    def open_pieces(self, key: str, *, durable: bool) -> PieceWriter:
        return _StopsPieces(self, super().open_pieces(key, durable=durable))

    def remove(self, keys: Any) -> None:
        for key in keys:  # each file of its own is a place to stop
            self._do(partial(super().remove, [key]))

    def remove_folders(self, keys: Any) -> None:
        self._do(partial(super().remove_folders, keys))

    def remove_tree(self, key: str) -> None:
        self._do(partial(super().remove_tree, key))


class _StopsPieces(PieceWriter):
    """A file in pieces of a storage that stops: each piece, the end of the file and its removal are calls of their own."""

    def __init__(self, storage: Stops, inner: PieceWriter) -> None:
        super().__init__(inner.name)
        self._storage, self._inner = storage, inner

    def _append(self, view: memoryview) -> None:
        self._storage._do(partial(self._inner.append, view), partial(self._inner.append, view[: len(view) // 2]))

    def _close(self) -> None:
        self._storage._do(self._inner.close)

    def _abort(self) -> None:
        self._storage._do(self._inner.abort)


def make_batch(
    texts: list[str],
    *,
    layers: tuple[int, ...] = (0, 1, 3),
    hidden: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    tokens: bool = True,
    columns: dict[str, Any] | None = None,
    n_tokens: list[int] | None = None,
) -> TokenBatch:
    """Random activations of some prompts; the arrays in it are the truth to compare with."""
    rng = np.random.default_rng(seed)
    counts = np.array(n_tokens or [1 + len(t) % 5 for t in texts])
    values: npt.NDArray[Any] = rng.standard_normal((len(layers), int(counts.sum()), hidden)).astype(dtype)
    pooled: npt.NDArray[Any] = rng.standard_normal((len(layers), len(texts), hidden)).astype(dtype)
    return TokenBatch(
        sha256=[prompt_sha256(t) for t in texts],
        text=texts,
        prompt_length=counts,
        n_tokens=counts if tokens else None,
        layers=layers,
        tokens={"resid": values} if tokens else {},
        token_columns={"token_id": rng.integers(0, 100, counts.sum())} if tokens else {},
        prompts={"resid_mean": pooled},
        prompt_columns=columns or {},
    )


def write_shared(root: Path, name: str, count: int) -> None:
    """Write so many parts, each of a prompt of one's own and one that others write too; for processes."""
    store = open_store(root)
    for i in range(count):
        store.write(GROUP, make_batch([f"{name}-{i}", f"shared-{i}"], seed=i))


def kept_tokens(store: Store) -> xr.Dataset:
    """The view of tokens, lazily; without variables where no tokens are kept, which `Store.tokens` refuses."""
    try:
        return store.tokens()
    except MissingPromptsError:
        return xr.Dataset()
