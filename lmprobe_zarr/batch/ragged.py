"""Arithmetic on ragged rows: lengths, offsets, and runs of consecutive rows. Pure numpy; knows no prompt and no file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.typing import Ints

__all__ = ["as_slice", "concat_ranges", "offsets_of", "positions_of"]


def offsets_of(lengths: npt.ArrayLike) -> Ints:
    """Start of every row, followed by the end of the last one: shape (len(lengths) + 1,)."""
    counts = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def concat_ranges(starts: npt.ArrayLike, lengths: npt.ArrayLike) -> Ints:
    """``range(start, start + length)`` of every row, end to end."""
    first, counts = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    offsets = offsets_of(counts)
    return np.repeat(first - offsets[:-1], counts) + np.arange(offsets[-1])


def positions_of(lengths: npt.ArrayLike) -> Ints:
    """``0 … length − 1`` of every row, end to end."""
    counts = np.asarray(lengths, np.int64)
    return concat_ranges(np.zeros(len(counts), np.int64), counts)


def as_slice(rows: Ints) -> slice | Ints:
    """The same rows as a slice where they are consecutive and ascending, otherwise unchanged."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
