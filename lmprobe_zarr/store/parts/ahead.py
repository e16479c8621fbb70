"""`Ahead`: lists and documents of a root that are requested together, before the steps of a call ask for them one after the other.

Where each request takes a tenth of a second, opening a group step by step takes most of a second: its root, the groups, their documents,
the parts, theirs. What is requested ahead is used by the thread that did so, until its call ends, and never afterwards. Decides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Final

from lmprobe_zarr.storage import Storage, run_all
from lmprobe_zarr.store.format import ANNOTATIONS, GROUP_NAME, PART_NAME

__all__ = ["Ahead", "keys_of_hint"]

_MOST: Final = 400  # documents: more take so long that a round less is no gain


class Ahead:
    """The verbs `list` and `read` of a storage, with what was requested ahead. Usable from many threads.

    Parameters
    ----------
    storage : Storage
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lists: dict[str, list[str]] = {}
        self._documents: dict[str, bytes] = {}
        self._thread: int | None = None

    @contextmanager
    def of(self, keys: Sequence[str]) -> Iterator[None]:
        """Until the end of the block, use what a single round of requests has found of the documents with these keys and their folders."""
        groups = sorted({key.partition("/")[0] for key in keys})
        noted = [group for group in groups if any(key.startswith(f"{group}/{ANNOTATIONS}/") for key in keys)]
        # Which groups the call needs is not known yet, only that it needs their documents: no more is requested where there are several.
        is_single = len(groups) == 1
        folders = ["", *groups, *(f"{group}/{ANNOTATIONS}" for group in noted)] if is_single else [""]
        documents = [key for key in keys if is_single or key.count("/") == 1]
        jobs = [partial(self._list, folder) for folder in folders] + [partial(self._read, key) for key in documents[:_MOST]]
        run_all(jobs, self._storage.pace)
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._lists.clear()
            self._documents.clear()

    def _list(self, folder: str) -> None:
        try:
            self._lists[folder] = self._storage.list(folder)
        except Exception:  # noqa: BLE001 — whoever needs it requests it again, and gets the error
            return

    def _read(self, key: str) -> None:
        try:
            self._documents[key] = self._storage.read(key)
        except Exception:  # noqa: BLE001
            return

    def list(self, folder: str) -> list[str]:
        """As `Storage.list`."""
        found = self._lists.get(folder) if self._thread == threading.get_ident() else None
        return self._storage.list(folder) if found is None else found

    def read(self, key: str) -> bytes:
        """As `Storage.read`, of documents, which never change."""
        found = self._documents.get(key)
        return self._storage.read(key) if found is None else found


def keys_of_hint(hint: Future[list[str]]) -> list[str]:
    """The keys of documents of groups and parts among those that a list has found; none where it has failed."""
    try:
        listed = hint.result()
    except Exception:  # noqa: BLE001 — it was a hint
        return []
    found = []
    for key in listed:
        pieces = key.split("/")
        names = [name for name in pieces[1:-1] if name != ANNOTATIONS]
        if pieces[-1] == "zarr.json" and GROUP_NAME.fullmatch(pieces[0]) and len(names) < 2 and all(map(PART_NAME.fullmatch, names)):
            found.append(key)
    return found
