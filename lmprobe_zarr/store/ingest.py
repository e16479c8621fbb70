"""`Ingest`: writes batches from any source as committed parts, on a thread of its own. Knows no model and no file format.

The source goes on computing while parts are encoded and written; the queue between them is bounded, so memory is too.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from lmprobe_zarr.batch import SCALARS, Precision, TokenBatch, digests_of, keys_of, store_as
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.log import LOGGER_NAME
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import BUFFER_BYTES, PART_BYTES, CallOrder, PartWriter, shape_of
from lmprobe_zarr.store.store import Store

__all__ = ["PART_SECONDS", "Ingest"]

logger = logging.getLogger(LOGGER_NAME)

PART_SECONDS: Final = 60.0
QUEUED_BATCHES: Final = 2
POLL_SECONDS: Final = 0.1
# Columns and texts are kept in memory until the commit, activations are not.
COLUMN_BYTES: Final = 2**28
OPEN_PARTS: Final = 64
# A few numbers per prompt or token, which are no activations: always stored as they are.
EXACT: Final = (*SCALARS, "perplexity")


@dataclass(frozen=True, slots=True)
class _MadeHere:
    """Batches that the thread of an `Ingest` makes; `taken` is set after the last of them."""

    batches: Iterator[TokenBatch]
    taken: threading.Event = field(default_factory=threading.Event)


@dataclass
class Ingest:
    """Writes the batches that are put into it as parts of one group.

    Batches may differ in their variables, layers, dtypes and columns: each kind goes into a part of its own. Use it as a context: leaving
    it commits what is whole, also when the source was interrupted or failed; only a failure of the writing itself discards the parts that
    were open.

    Parameters
    ----------
    store : Store
        The store to write to.
    group : GroupInfo
        The group to write to.
    part_bytes : int
        A part holds at most this many bytes of activations, uncompressed (one prompt's, where these alone are more) …
    part_seconds : float
        … and is committed once it is this many seconds old: what an interruption can cost at most.
    precision : Precision
        The precision of stored activations; all other values stay as they are.
    compressed, shards : bool
        See `PartWriter`.
    recorded : mapping
        Noted in every part.
    order : CallOrder, optional
        The order of all prompts of the call, where it is known before they are put. By default it is that in which they are put.

    Attributes
    ----------
    parts : list of str
        Names of the parts committed so far.
    prompts, nbytes : int
        Different prompts in them, and bytes of activations before compression.
    not_finite, blank : int
        Values in them that are infinite or NaN, and rows, one for each layer, that hold nothing but zeros.
    """

    store: Store
    group: GroupInfo
    part_bytes: int = PART_BYTES
    part_seconds: float = PART_SECONDS
    precision: Precision = field(default_factory=Precision)
    compressed: bool = True
    shards: bool = False
    recorded: Mapping[str, Any] = field(default_factory=dict)
    order: CallOrder | None = None
    parts: list[str] = field(default_factory=list, init=False)
    nbytes: int = field(default=0, init=False)
    not_finite: int = field(default=0, init=False)
    blank: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._queue: queue.Queue[TokenBatch | _MadeHere | threading.Event] = queue.Queue(QUEUED_BATCHES)
        self._made_here: _MadeHere | None = None
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._open: dict[Hashable, _OpenPart] = {}
        self._committed: set[int] = set()
        self._overflowed: set[str] = set()
        self._call = uuid.uuid4().hex[:16]
        self._places: dict[int, int] = {}
        self._thread = threading.Thread(target=self._work, name="lmprobe-zarr-ingest", daemon=True)

    @property
    def prompts(self) -> int:
        """Different prompts committed so far."""
        return len(self._committed)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, batch: TokenBatch) -> None:
        """Hand over a batch; waits while the writing is behind.

        Raises
        ------
        NoSpaceError, ReadOnlyError, InvalidArgumentError
            The error with which writing failed; no more batches are taken. `InvalidArgumentError` also outside of the context.
        """
        self._queued(batch)

    def put_all(self, batches: Iterator[TokenBatch]) -> None:
        """Hand over batches that are made on the thread that writes them, when their turn comes.

        Waits until the batches of the call before have been taken, so those of at most two calls are held: the ones that are being written,
        and the ones that the caller prepares.

        Raises
        ------
        NoSpaceError, ReadOnlyError, InvalidArgumentError
            As `put`; also the error with which a batch could not be made.
        """
        while self._made_here is not None and not self._made_here.taken.wait(POLL_SECONDS):
            self._check()
        made = _MadeHere(batches)
        self._queued(made)
        self._made_here = made

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing.is_set() or not self._thread.is_alive():
            raise InvalidArgumentError("batches are taken inside of the context only: with Ingest(…) as ingest: ingest.put(batch)")

    def _queued(self, given: TokenBatch | _MadeHere | threading.Event) -> None:
        while True:
            self._check()
            with suppress(queue.Full):
                self._queue.put(given, timeout=POLL_SECONDS)
                return

    def flush(self) -> None:
        """Commit everything that was put so far; returns when it is committed.

        Raises
        ------
        NoSpaceError, ReadOnlyError, InvalidArgumentError
            As `put`.
        """
        done = threading.Event()
        self._queued(done)
        while not done.wait(POLL_SECONDS):
            self._check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # An event, not a sentinel in the queue: setting it never waits, so a second Ctrl-C cannot interrupt it.
        self._closing.set()
        self._thread.join()
        if self._error is not None and self._error is not error:
            raise self._error from error

    def _work(self) -> None:
        try:
            while True:
                closing = self._closing.is_set()
                try:
                    given = self._queue.get(timeout=0.001 if closing else POLL_SECONDS)
                except queue.Empty:
                    if closing:
                        break
                    self._commit_old()
                    continue
                if isinstance(given, threading.Event):
                    self._commit_all()
                    given.set()
                    continue
                for batch in given.batches if isinstance(given, _MadeHere) else (given,):
                    self._take(batch)
                    self._commit_old()
                if isinstance(given, _MadeHere):
                    given.taken.set()
            self._commit_all()
        except BaseException as failure:  # noqa: BLE001 — raised again by the thread that puts, or leaves
            self._error = failure
            # They were never visible: files that stay are garbage, and the first failure is the one to raise.
            for part in self._open.values():
                with suppress(Exception):
                    part.writer.abort()

    def _take(self, batch: TokenBatch) -> None:
        if self.order is None:
            for key in keys_of(digests_of(batch.sha256)).tolist():
                self._places.setdefault(key, len(self._places))
        for piece in _split_batch(batch, self.part_bytes):
            stored = self._rounded(piece)
            key = shape_of(stored)
            if key in self._open and self._open[key].writer.nbytes + stored.nbytes > self.part_bytes:
                self._commit(key)
            if key not in self._open:
                if len(self._open) == OPEN_PARTS:
                    self._commit(min(self._open, key=lambda k: self._open[k].opened))
                writer = self.store.new_part(self.group, compressed=self.compressed, recorded=self.recorded, shards=self.shards)
                self._open[key] = _OpenPart(writer, time.monotonic())
            writer = self._open[key].writer
            writer.append(stored)
            if writer.nbytes >= self.part_bytes or writer.held_nbytes >= COLUMN_BYTES:
                self._commit(key)
        # Each open part fills chunks of its own; together these hold no more than one part may.
        while len(self._open) > 1 and sum(part.writer.waiting_nbytes for part in self._open.values()) > BUFFER_BYTES:
            self._commit(max(self._open, key=lambda k: self._open[k].writer.waiting_nbytes))

    def _commit_old(self) -> None:
        now = time.monotonic()
        for key in [key for key, part in self._open.items() if now - part.opened >= self.part_seconds]:
            self._commit(key)

    def _commit_all(self) -> None:
        for key in list(self._open):
            self._commit(key)

    def _commit(self, key: Hashable) -> None:
        writer = self._open[key].writer
        writer.order = self.order or CallOrder(
            self._call, np.fromiter(self._places, np.uint64, len(self._places)), np.arange(len(self._places), dtype=np.int64)
        )
        info = writer.commit()
        del self._open[key]
        self.parts.append(info.name)
        self.nbytes += writer.nbytes
        for odd in (info.odd or {}).values():
            self.not_finite, self.blank = self.not_finite + odd[0], self.blank + odd[1]
        self._committed.update(np.ascontiguousarray(info.digests[:, :8]).view(np.uint64).reshape(-1).tolist())
        logger.debug("committed part %s of %s: %d prompts, %d bytes", info.name, self.group.model, len(writer), writer.nbytes)

    def _rounded(self, batch: TokenBatch) -> TokenBatch:
        """The batch as it is stored."""
        if self.precision.changes_nothing:
            return batch
        stored_dtype = dict(batch.stored_dtype)
        levels = []
        for values in (batch.tokens, batch.prompts):
            arrays = {}
            for name, array in values.items():
                if name in EXACT or array.dtype.kind != "f":
                    arrays[name] = array
                    continue
                source = batch.stored_dtype.get(name, array.dtype.name)
                wide = name in self._overflowed
                arrays[name], stored_dtype[name], overflowed = store_as(name, array, self.precision, source_dtype=source, wide=wide)
                if overflowed and not wide:
                    self._overflowed.add(name)
                    logger.warning(
                        "%s of %s goes beyond 65504, where float16 ends: its parts are stored with bfloat16's precision from here on",
                        name, self.group.model,
                    )  # fmt: skip
            levels.append(arrays)
        return replace(batch, tokens=levels[0], prompts=levels[1], stored_dtype=stored_dtype)


@dataclass(frozen=True, slots=True)
class _OpenPart:
    writer: PartWriter
    opened: float


def _split_batch(batch: TokenBatch, most: int) -> Iterator[TokenBatch]:
    """A batch as batches of at most `most` bytes each; a prompt that is larger is a batch of its own."""
    if batch.nbytes <= most:
        yield batch
        return
    n = len(batch.sha256)
    tokens = sum(array.nbytes for array in batch.tokens.values())
    weights = np.full(n, (batch.nbytes - tokens) / n)
    if batch.n_tokens is not None and tokens:
        weights += np.asarray(batch.n_tokens) * (tokens / np.sum(batch.n_tokens))
    start, held = 0, 0.0
    for row, weight in enumerate(weights.tolist()):
        if row > start and held + weight > most:
            yield batch.take(start, row)
            start, held = row, 0.0
        held += weight
    yield batch.take(start, n)
