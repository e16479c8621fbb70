"""Batches from any source to committed parts, on a thread of its own. Knows no model and no file format.

The source goes on computing while parts are encoded and written; the queue between them is bounded, so memory is too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.schema import GroupInfo
from lmprobe_zarr.store import Store
from lmprobe_zarr.writer import PartWriter

__all__ = ["PART_BYTES", "PART_SECONDS", "Ingest"]

PART_BYTES: Final = 2**30
PART_SECONDS: Final = 60.0
QUEUED_BATCHES: Final = 2
POLL_SECONDS: Final = 0.1
# Columns and texts are kept in memory until the commit, activations are not.
COLUMN_BYTES: Final = 2**28


@dataclass
class Ingest:
    """Writes the batches that are put into it as parts of one group.

    Use it as a context: leaving it commits what is whole, also when the source was interrupted or failed; only a failure of
    the writing itself discards the part that was open.

    Parameters
    ----------
    store : Store
        Where to.
    group : GroupInfo
        Which group.
    part_bytes : int
        A part is committed once it holds this many bytes of activations, uncompressed, …
    part_seconds : float
        … or once it is this many seconds old: what an interruption can cost at most.
    compressed : bool
        See `writer.PartWriter`.
    recorded : mapping
        Noted in every part.
    """

    store: Store
    group: GroupInfo
    part_bytes: int = PART_BYTES
    part_seconds: float = PART_SECONDS
    compressed: bool = True
    recorded: Mapping[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list, init=False)
    prompts: int = field(default=0, init=False)
    nbytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._queue: queue.Queue[TokenBatch] = queue.Queue(QUEUED_BATCHES)
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._writer: PartWriter | None = None
        self._opened = 0.0
        self._thread = threading.Thread(target=self._work, name="lmprobe-zarr-ingest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, batch: TokenBatch) -> None:
        """Hand over a batch; waits while the writing is behind.

        Raises
        ------
        NoSpaceError, ReadOnlyError, InvalidArgumentError
            What the writing has failed with; nothing more is taken. Or: this is used outside of its context.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._closing.is_set() or not self._thread.is_alive():
                raise InvalidArgumentError("batches are taken inside of the context only: with Ingest(…) as ingest: ingest.put(batch)")
            try:
                self._queue.put(batch, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # An event, not a last word in the queue: it never waits, so a second Ctrl-C cannot come in between.
        self._closing.set()
        self._thread.join()
        if self._error is not None and self._error is not error:
            raise self._error from error

    def _work(self) -> None:
        try:
            while True:
                closing = self._closing.is_set()
                try:
                    self._take(self._queue.get(timeout=0.001 if closing else POLL_SECONDS))
                except queue.Empty:
                    if closing:
                        break
                if self._writer is not None and time.monotonic() - self._opened >= self.part_seconds:
                    self._commit()
            self._commit()
        except BaseException as failure:  # noqa: BLE001 — raised again by the thread that puts, or leaves
            self._error = failure
            # It was never visible: what cannot be removed is garbage, and the first failure is the one to tell.
            with suppress(Exception):
                if self._writer is not None:
                    self._writer.abort()

    def _take(self, batch: TokenBatch) -> None:
        if self._writer is None:
            self._writer = self.store.new_part(self.group, compressed=self.compressed, recorded=self.recorded)
            self._opened = time.monotonic()
        self._writer.append(batch)
        if self._writer.nbytes >= self.part_bytes or self._writer.held_nbytes >= COLUMN_BYTES:
            self._commit()

    def _commit(self) -> None:
        if self._writer is None:
            return
        self.parts.append(self._writer.commit().name)
        self.prompts += len(self._writer)
        self.nbytes += self._writer.nbytes
        self._writer = None
