"""Rows read in the order of a plan, one window ahead on a thread. Never writes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from lmprobe_zarr.streaming.order import Blocks, Order, ReadingPlan, plan_reading
from lmprobe_zarr.streaming.source import RowSource
from lmprobe_zarr.typing import Array, Ints

__all__ = ["ReadAhead", "read_all"]

# Bytes of a window where rows are read once, in their order.
_PASS_WINDOW_BYTES: Final = 64 * 2**20


class ReadAhead:
    """The windows of a plan one after the other. `start` begins to read the next one on a thread.

    Parameters
    ----------
    source : RowSource
    plan : ReadingPlan
    first : int
        The first window to read.
    """

    def __init__(self, source: RowSource, plan: ReadingPlan, first: int = 0) -> None:
        self._source, self._plan, self._number = source, plan, first
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lmprobe-zarr-ahead")
        self._coming: Future[tuple[Ints, Array]] | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Begin to read the window that `next` will return."""
        if self._coming is None and self._number < len(self._plan.cuts) - 1:
            self._coming = self._pool.submit(self._read, self._number)
            self._number += 1

    def next(self) -> tuple[Ints, Array] | None:
        """The rows of the next window and their values, shape (layer, row, …); None after the last."""
        self.start()
        coming, self._coming = self._coming, None
        return None if coming is None else coming.result()

    def _read(self, number: int) -> tuple[Ints, Array]:
        rows = self._plan.window(number)
        return rows, self._source.read(rows)


def read_all(source: RowSource, blocks: Blocks) -> Iterator[tuple[Ints, Array]]:
    """Every wanted row once, as (row numbers, values of shape (layer, row, …)). Each block is read once, one window ahead."""
    if not blocks.total:
        return
    order = Order(batch_tokens=1, buffer_tokens=max(1, _PASS_WINDOW_BYTES // source.row_nbytes), shuffle=False)
    with ReadAhead(source, plan_reading(blocks, order, 0)) as ahead:
        while (window := ahead.next()) is not None:
            ahead.start()
            yield window
