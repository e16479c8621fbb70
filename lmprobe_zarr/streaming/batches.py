"""`Batches`: the iterable of shuffled batches, which can be resumed and split between DataLoader workers. Never imports torch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, NumberRangeError
from lmprobe_zarr.streaming.memory import ReusedMemory, copy_cast
from lmprobe_zarr.streaming.order import Blocks, Order, ReadingPlan, count_steps, plan_reading
from lmprobe_zarr.streaming.read_ahead import ReadAhead
from lmprobe_zarr.streaming.rows import LabelColumn
from lmprobe_zarr.streaming.source import RowSource
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Batches", "cast_batch"]


class Batches:
    """Batches of activations for training. Every iteration gives the same batches.

    Made by ``toks.lz.batches``, which documents the options. Iterating gives arrays of shape (batch, hidden), or (layer, batch,
    hidden) for several layers; with labels, pairs of that and a dict of arrays of shape (batch,). All epochs come one after the other.
    """

    def __init__(
        self,
        source: RowSource,
        blocks: Blocks,
        order: Order,
        *,
        epochs: int | None,
        labels: Mapping[str, LabelColumn] | None,
        dtype: np.dtype[Any],
        mean: Array | None,
        scale: Array | None,
        prefetch: bool,
        start_step: int,
    ) -> None:
        self.source, self.blocks, self.order, self.epochs, self.labels = source, blocks, order, epochs, labels
        self.dtype, self.mean, self.scale, self.prefetch = dtype, mean, scale, prefetch
        #: Batches in one epoch, the same for all trainers.
        self.steps_per_epoch = count_steps(blocks.total, order)
        self._start = self._given = 0
        self._start_at(start_step)

    def __getstate__(self) -> dict[str, Any]:
        # One bit per row travels to another process.
        kept = self.blocks.kept
        bits = None if kept is None else np.packbits(kept)
        return {**self.__dict__, "blocks": Blocks(self.blocks.offsets, self.blocks.rows), "kept": bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        bits = state.pop("kept")
        self.__dict__.update(state)
        if bits is not None:
            self.blocks = replace(self.blocks, kept=np.unpackbits(bits, count=self.source.n_rows).astype(bool))

    def __repr__(self) -> str:
        rows = f"{self.blocks.total} rows of {self.source.row_shape} in layers {list(self.source.labels)}"
        return f"{type(self).__name__}({rows}, {self.steps_per_epoch} batches per epoch, epochs={self.epochs}, start_step={self._start})"

    def __len__(self) -> int:
        """Batches that an iteration gives."""
        if self.epochs is None:
            raise InvalidTypeError("epochs=None goes on for ever and has no length: see steps_per_epoch")
        return max(0, self.epochs * self.steps_per_epoch - self._start)

    # ---------------------------------------------------------------------------------------------------------- resuming

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The state that `load_state_dict` takes: plain numbers and texts.

        Parameters
        ----------
        step : int, optional
            Batches given so far, over all epochs, including those before `start_step`. None for the batches that the last iteration of
            this object gave. A DataLoader with workers iterates copies of this object, so count the batches yourself there.

        Returns
        -------
        dict
            For `json.dump` or `torch.save`.
        """
        # The repr of `Order` is part of kept states: its name and fields must not change.
        decides = (self.blocks.total, self.order, self.epochs, self.source.fingerprint())
        kept = b"" if self.blocks.kept is None else np.packbits(self.blocks.kept).tobytes()
        plan = hashlib.sha256(repr(decides).encode() + kept).hexdigest()[:32]
        return {"step": self._given if step is None else step, "plan": plan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` was taken: iterating gives the batches that would have followed.

        Parameters
        ----------
        state : dict
            From `state_dict`.

        Raises
        ------
        InvalidArgumentError
            The state belongs to other options or other data: parts were added, merged or removed since.
        """
        if not isinstance(state, Mapping) or set(state) != {"step", "plan"}:
            raise InvalidArgumentError("this is no state of batches: give the value that state_dict() returned")
        if state["plan"] != self.state_dict()["plan"]:
            raise InvalidArgumentError(
                "this state belongs to other batches: use the options that it was made with, over the same parts (adding or merging parts "
                "changes the order)"
            )
        self._start_at(state["step"])

    def _start_at(self, step: Any) -> None:
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise InvalidTypeError(f"start_step={step!r} is no whole number: give the number of batches to leave out")
        if step < 0 or (self.epochs is not None and step > self.epochs * self.steps_per_epoch):
            end = "" if self.epochs is None else f", and at most {self.epochs * self.steps_per_epoch}, all of its batches"
            raise InvalidArgumentError(f"start_step={step!r} is out of range: give at least 0{end}")
        self._start = self._given = int(step)

    # --------------------------------------------------------------------------------------------------------- iterating

    def __iter__(self) -> Iterator[Any]:
        worker, workers = _worker()
        step = self._given = self._start
        # Workers take turns from `step` on, so that a DataLoader returns the batches in order.
        turn = (worker + step) % workers
        epoch = step // self.steps_per_epoch
        reused = ReusedMemory()
        while self.epochs is None or epoch < self.epochs:
            before = epoch * self.steps_per_epoch
            reader = (turn - before) % workers
            done = max(0, -(-(step - before - reader) // workers))  # this reader's batches before the first one to give
            plan = plan_reading(self.blocks, self.order, epoch, reader, workers)
            for number, batch in enumerate(self._batches(plan, done, reused), done):
                self._given = before + reader + number * workers + 1
                yield batch
            epoch += 1

    def _batches(self, plan: ReadingPlan, first: int, reused: ReusedMemory) -> Iterator[Any]:
        steps = len(plan.bounds) - 1
        if first >= steps:
            return
        begin = plan.window_at(first)
        skip, step = int(plan.bounds[first] - plan.starts[begin]), first
        held: list[tuple[Ints, Array]] = []  # the rows of a batch that begins in one window and ends in another
        with ReadAhead(self.source, plan, begin) as ahead:
            while step < steps and (window := ahead.next()) is not None:
                rows, values = window
                del window
                place, skip = skip, 0
                while step < steps and place < len(rows):
                    size = int(plan.bounds[step + 1] - plan.bounds[step]) - sum(len(some) for some, _ in held)
                    held.append((rows[place : place + size], values[:, place : place + size]))
                    place += size
                    if place > len(rows):
                        break
                    # With this batch the consumer gives up the last array of the previous window. Only then is the next window read.
                    yield self._finish(*_joined(held), reused)
                    held, step = [], step + 1
                    if self.prefetch:
                        ahead.start()
                held = [(some, part.copy()) for some, part in held]  # copies, so that this window can be freed
                del rows, values

    def _finish(self, rows: Ints, batch: Array, reused: ReusedMemory) -> Any:
        values = self._convert(self._normalize(batch, reused), reused)
        values = values[0] if self.source.single else values
        if self.labels is None:
            return values
        return values, {name: self._label(column.take(rows)) for name, column in self.labels.items()}

    def _convert(self, batch: Array, reused: ReusedMemory) -> Any:
        return cast_batch(batch, self.dtype, reused)

    def _label(self, values: Array) -> Any:
        return values

    def _normalize(self, batch: Array, reused: ReusedMemory) -> Array:
        """(x − mean) / scale, in float32 at least; the batch itself without mean and scale."""
        if self.mean is None and self.scale is None:
            return batch
        wide = reused.empty(batch.shape, np.result_type(batch.dtype, np.float32))
        copy_cast(wide, batch)
        if self.mean is not None:
            wide -= self.mean
        if self.scale is not None:
            wide /= self.scale
        return wide


def cast_batch(batch: Array, dtype: np.dtype[Any], reused: ReusedMemory) -> Array:
    """A batch in another dtype, in reused memory; the batch itself if it has that dtype.

    Raises
    ------
    NumberRangeError
        A value is too large for float16.
    """
    if batch.dtype == dtype:
        return batch
    cast = reused.empty(batch.shape, dtype)
    copy_cast(cast, batch)
    if dtype == np.float16 and np.isinf(cast).any() and np.isinf(cast).sum() > np.isinf(batch).sum():
        raise NumberRangeError("a value is too large for float16, which ends at 65504: give dtype='float32', or a scale")
    return cast


def _joined(pieces: list[tuple[Ints, Array]]) -> tuple[Ints, Array]:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([rows for rows, _ in pieces]), np.concatenate([values for _, values in pieces], axis=1)


def _worker() -> tuple[int, int]:
    """The number of this DataLoader worker, and how many there are; (0, 1) outside a DataLoader."""
    data = sys.modules.get("torch.utils.data")  # where it is not imported, there are no workers
    info = None if data is None else data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
