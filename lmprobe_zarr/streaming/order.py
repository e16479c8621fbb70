"""The order in which rows are streamed for training, as values: when each block is read, and which rows each batch has.

Blocks of adjacent rows are read in random order, a few at a time, and their rows are mixed in a buffer. Every row occurs once per
epoch. All functions are pure: they read nothing and share no random generator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmprobe_zarr.batch import concat_ranges, offsets_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Ints, Mask

__all__ = ["Blocks", "Order", "ReadingPlan", "count_steps", "join_blocks", "plan_reading"]

# Each use has a random generator of its own, so that no two draw the same numbers.
_OF_BLOCKS, _OF_SHARED, _OF_WINDOWS = range(3)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows, grouped by what is read together.

    Parameters
    ----------
    offsets : ndarray of int64, shape (block + 1,)
        Where each block's rows begin in `rows`.
    rows : ndarray of int64, optional
        Row numbers, block by block; None for 0, 1, 2, …
    kept : ndarray of bool, optional
        For each row number whether it is wanted; None for all. Unwanted rows are read with their block and left out.
    """

    offsets: Ints
    rows: Ints | None = None
    kept: Mask | None = None

    @functools.cached_property
    def sizes(self) -> Ints:
        """Rows of each block, wanted or not."""
        return np.diff(self.offsets)

    @functools.cached_property
    def counts(self) -> Ints:
        """Wanted rows of each block."""
        if self.kept is None:
            return self.sizes
        kept = self.kept[: self.offsets[-1]] if self.rows is None else self.kept[self.rows]
        return np.diff(offsets_of(kept)[self.offsets])

    @functools.cached_property
    def total(self) -> int:
        """All wanted rows."""
        return int(self.counts.sum())

    def take(self, blocks: Ints) -> Ints:
        """Row numbers of some blocks, end to end."""
        places = concat_ranges(self.offsets[blocks], self.sizes[blocks])
        return places if self.rows is None else self.rows[places]


def join_blocks(pieces: Sequence[slice | Ints], kept: Mask | None = None) -> Blocks:
    """Blocks, given the rows of each, in the order of their first rows; empty blocks are left out."""
    held = sorted((p for p in pieces if (p.stop > p.start if isinstance(p, slice) else len(p))), key=_first_row)
    offsets = offsets_of([p.stop - p.start if isinstance(p, slice) else len(p) for p in held])
    if all(isinstance(p, slice) and p.start == begin for p, begin in zip(held, offsets, strict=False)):
        return Blocks(offsets, None, kept)
    return Blocks(offsets, np.concatenate([np.arange(p.start, p.stop) if isinstance(p, slice) else p for p in held]), kept)


def _first_row(piece: slice | Ints) -> int:
    return int(piece.start if isinstance(piece, slice) else piece[0])


@dataclass(frozen=True, slots=True)
class Order:
    """The options that decide the order of given blocks.

    Parameters
    ----------
    batch_tokens : int
        Rows in a batch.
    buffer_tokens : int
        About how many rows are read and mixed together: more by at most one block.
    shuffle : bool
        False keeps blocks and rows in their order.
    seed : int
        At least 0. Each seed and each epoch has another order.
    drop_last : bool
        Whether the rows that do not fill a batch are left out. Otherwise the last batches of an epoch are shorter.
    rank, world_size : int
        The number of this trainer, and how many there are. Each row belongs to one trainer, and all have the same number of batches.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        A value that is no whole number, or is out of range.
    """

    batch_tokens: int
    buffer_tokens: int
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("buffer_tokens", 1), ("seed", 0), ("rank", 0), ("world_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InvalidTypeError(f"{name}={value!r} is no whole number: give one of at least {least}")
            if value < least:
                raise InvalidArgumentError(f"{name}={value!r} is out of range: give a whole number of at least {least}")
        if self.rank >= self.world_size:
            raise InvalidArgumentError(f"rank={self.rank!r} with world_size={self.world_size!r}: ranks go from 0 to {self.world_size - 1}")


@dataclass(frozen=True, slots=True, eq=False)
class ReadingPlan:
    """What one reader reads in one epoch, window by window, and where its batches begin.

    Parameters
    ----------
    blocks : Blocks
        All blocks.
    order : Order
    epoch : int
    sequence : ndarray of int64
        Numbers of the blocks that this reader reads, in order.
    first, last : int
        How many wanted rows of the first block belong to the previous reader, and how many of the last block belong to this reader or
        an earlier one.
    cuts : ndarray of int64, shape (window + 1,)
        Where in the sequence each window begins.
    starts : ndarray of int64, shape (window + 1,)
        How many rows come before each window.
    bounds : ndarray of int64, shape (batch + 1,)
        How many rows come before each batch.
    reader : int
        The number of this reader in the epoch.
    """

    blocks: Blocks
    order: Order
    epoch: int
    sequence: Ints
    first: int
    last: int
    cuts: Ints
    starts: Ints
    bounds: Ints
    reader: int = 0

    def window_at(self, batch: int) -> int:
        """The number of the window in which a batch begins."""
        return int(np.searchsorted(self.starts, self.bounds[batch], "right")) - 1

    def window(self, number: int) -> Ints:
        """The rows of a window, in the order in which batches take them."""
        blocks = self.sequence[self.cuts[number] : self.cuts[number + 1]]
        rows = self.blocks.take(blocks)
        wanted = np.ones(len(rows), bool) if self.blocks.kept is None else self.blocks.kept[rows]
        ends = offsets_of(self.blocks.sizes[blocks])
        shared: dict[int, tuple[int, int]] = {}
        if number == 0 and self.first:
            shared[0] = self.first, int(self.blocks.counts[blocks[0]])
        if number == len(self.cuts) - 2 and self.last < self.blocks.counts[blocks[-1]]:
            shared[len(blocks) - 1] = shared.get(len(blocks) - 1, (0, 0))[0], self.last
        for place, (begin, end) in shared.items():
            mine = np.flatnonzero(wanted[ends[place] : ends[place + 1]]) + ends[place]
            if self.order.shuffle:
                mine = _generator(self.order, self.epoch, _OF_SHARED, int(blocks[place])).permutation(mine)
            wanted[mine[:begin]] = False
            wanted[mine[end:]] = False
        rows = rows if wanted.all() else rows[wanted]
        if self.order.shuffle:
            rows = _generator(self.order, self.epoch, _OF_WINDOWS, self.order.rank, self.reader, number).permutation(rows)
        return rows


def _generator(order: Order, *path: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((int(order.seed), *path)))


def count_steps(total: int, order: Order) -> int:
    """How many batches every trainer has in one epoch.

    Raises
    ------
    InvalidArgumentError
        There are too few rows for one batch per trainer.
    """
    world, size = order.world_size, order.batch_tokens
    steps = total // world // size if order.drop_last else -(-total // (world * size))
    # With batches of one row, the remaining rows cannot be dealt out evenly.
    if not steps or total // world < steps:
        what = f"{total} rows are left, which {world} trainers cannot share in equally many batches of {size}"
        raise InvalidArgumentError(f"{what}: give {'a smaller batch_tokens' if size > 1 else 'drop_last=True'}, or fewer trainers")
    return steps


def plan_reading(blocks: Blocks, order: Order, epoch: int, reader: int = 0, readers: int = 1) -> ReadingPlan:
    """What one reader reads in one epoch.

    Parameters
    ----------
    blocks : Blocks
        All rows.
    order : Order
        Includes the trainer's rank.
    epoch : int
        Each epoch has its own order.
    reader, readers : int
        The number of this reader, and how many take turns for this trainer: reader 0 gives batches 0, `readers`, 2 `readers`, … of the
        epoch. Each reads its own blocks, so the batches depend on the number of readers.

    Returns
    -------
    ReadingPlan
        A block that two readers share is read by both, but each wanted row belongs to one reader.
    """
    present = np.flatnonzero(blocks.counts)
    if order.shuffle:
        present = _generator(order, epoch, _OF_BLOCKS).permutation(present)
    reached = offsets_of(blocks.counts[present])
    steps = count_steps(blocks.total, order)
    low, high = (blocks.total * rank // order.world_size for rank in (order.rank, order.rank + 1))
    bounds = np.arange(steps + 1) * order.batch_tokens
    if not order.drop_last:
        # Each batch leaves at least one row for every later one, because all trainers have the same number of batches.
        bounds = np.minimum(bounds, high - low - np.arange(steps, -1, -1))
    shares = [len(range(number, steps, readers)) for number in range(readers)]
    begin = sum(shares[:reader])
    mine = bounds[begin : begin + shares[reader] + 1]
    low, high = low + int(mine[0]), low + int(mine[-1])
    if low == high:
        nothing = np.zeros(0, np.int64)
        return ReadingPlan(blocks, order, epoch, nothing, 0, 0, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64), reader)
    start = int(np.searchsorted(reached, low, "right")) - 1
    stop = int(np.searchsorted(reached, high, "left"))
    sequence = present[start:stop]
    # The windows have about equal sizes, because a short last one would mix few rows.
    read = offsets_of(blocks.sizes[sequence])
    windows = -(-int(read[-1]) // order.buffer_tokens)
    inner = np.searchsorted(read, np.arange(1, windows) * (read[-1] / windows), "left")
    cuts = np.unique(np.concatenate([[0], inner, [len(sequence)]])).astype(np.int64)
    starts = np.minimum(reached[start + cuts], high) - low
    starts[0] = 0
    return ReadingPlan(
        blocks=blocks,
        order=order,
        epoch=epoch,
        sequence=sequence,
        first=low - int(reached[start]),
        last=high - int(reached[stop - 1]),
        cuts=cuts,
        starts=starts,
        bounds=mine - mine[0],
        reader=reader,
    )
