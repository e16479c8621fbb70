"""Chunks of slow places that were read in part, and tables of chunks and blocks, kept for the next reads of the same process.

The least recently read goes first. What is kept is kept as it is stored, under its key and its checksum, so what is found is never out of
date. Whole chunks of activations are not kept, because a pass over a layer reads each once.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Final

from lmprobe_zarr import config
from lmprobe_zarr.typing import Buffer

__all__ = ["is_wanted_whole", "kept_chunk", "kept_table"]

#: Bytes of tables that are kept: those of half a terabyte of activations.
_TABLE_BYTES: Final = 2**26
#: Chunks of which it is remembered that some blocks were read.
_TOUCHED: Final = 2**14


class _KeptChunks:
    """Bodies of chunks by key, up to a number of bytes together; usable from many threads, which share one fetch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bodies: OrderedDict[Hashable, Buffer] = OrderedDict()
        self._pending: dict[Hashable, Future[Buffer]] = {}
        self._nbytes = 0
        self._touched: OrderedDict[Hashable, None] = OrderedDict()

    def is_wanted(self, key: Hashable) -> bool:
        with self._lock:
            if key in self._bodies or key in self._pending or key in self._touched:
                return True
            self._touched[key] = None
            if len(self._touched) > _TOUCHED:
                self._touched.popitem(last=False)
            return False

    def get(self, key: Hashable, fetch: Callable[[], Buffer], most: int) -> Buffer:
        with self._lock:
            if key in self._bodies:
                self._bodies.move_to_end(key)
                return self._bodies[key]
            pending = self._pending.get(key)
            if pending is None:
                own = self._pending[key] = Future()
        if pending is not None:
            return pending.result()
        try:
            body = fetch()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            if len(body) <= most:
                self._bodies[key] = body
                self._nbytes += len(body)
            while self._nbytes > most:
                self._nbytes -= len(self._bodies.popitem(last=False)[1])
        own.set_result(body)
        return body


@functools.cache
def _kept(pid: int, what: str) -> _KeptChunks:  # noqa: ARG001 — a lock that another thread holds at a fork is held in the child for ever
    return _KeptChunks()


def kept_chunk(key: Hashable, fetch: Callable[[], Buffer]) -> Buffer:
    """A chunk's body, kept from an earlier read or else fetched; `fetch` must return bytes of their own that it has checked."""
    most = config.kept_chunk_bytes()
    return _kept(os.getpid(), "chunks").get(key, fetch, most) if most else fetch()


def is_wanted_whole(key: Hashable) -> bool:
    """Whether a chunk is kept, or was asked about before: who reads of it again is likely to go on, and one request brings all of it."""
    return bool(config.kept_chunk_bytes()) and _kept(os.getpid(), "chunks").is_wanted(key)


def kept_table(key: Hashable, fetch: Callable[[], Buffer]) -> Buffer:
    """A table's bytes, kept from an earlier read or else fetched; `fetch` must return bytes of their own that it has checked."""
    return _kept(os.getpid(), "tables").get(key, fetch, _TABLE_BYTES)
