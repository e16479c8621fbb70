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
from lmprobe_zarr.schema import GroupInfo
from lmprobe_zarr.store import Store
from lmprobe_zarr.writer import PartWriter

__all__ = ["PART_BYTES", "PART_SECONDS", "Ingest"]

PART_BYTES: Final = 2**30
PART_SECONDS: Final = 60.0
QUEUED_BATCHES: Final = 2
_END: Final = object()


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
        self._queue: queue.Queue[Any] = queue.Queue(QUEUED_BATCHES)
        self._error: BaseException | None = None
        self._writer: PartWriter | None = None
        self._thread = threading.Thread(target=self._work, name="lmprobe-zarr-ingest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, batch: TokenBatch) -> None:
        """Hand over a batch; waits while the writing is behind.

        Raises
        ------
        NoSpaceError, ReadOnlyError, InvalidArgumentError
            What the writing has failed with; nothing more is taken.
        """
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(batch, timeout=0.2)
                return
            except queue.Full:
                continue

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(_END)
        self._thread.join()
        if self._error is not None and self._error is not error:
            raise self._error from error

    def _work(self) -> None:
        opened = time.monotonic()
        while (batch := self._queue.get()) is not _END:
            if self._error is not None:
                continue  # keep taking, so that nobody waits for ever
            try:
                if self._writer is None:
                    self._writer, opened = (
                        self.store.new_part(self.group, compressed=self.compressed, recorded=self.recorded),
                        time.monotonic(),
                    )
                self._writer.append(batch)
                if self._writer.nbytes >= self.part_bytes or time.monotonic() - opened >= self.part_seconds:
                    self._commit()
            except BaseException as failure:  # noqa: BLE001 — raised again by the thread that puts
                self._fail(failure)
        if self._error is None:
            try:
                self._commit()
            except BaseException as failure:  # noqa: BLE001 — as above
                self._fail(failure)

    def _commit(self) -> None:
        if self._writer is None:
            return
        self.parts.append(self._writer.commit().name)
        self.prompts += len(self._writer)
        self.nbytes += self._writer.nbytes
        self._writer = None

    def _fail(self, failure: BaseException) -> None:
        self._error = failure
        if self._writer is not None:
            # It was never visible: what cannot be removed is garbage, and the first failure is the one to tell.
            with suppress(OSError):
                self._writer.abort()
            self._writer = None
