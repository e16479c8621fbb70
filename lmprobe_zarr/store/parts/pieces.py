"""Rows of chunks and their places in an output array, read several at a time. Knows no prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from lmprobe_zarr.batch import copy_rows, fill_value
from lmprobe_zarr.storage import local_pace, run_all
from lmprobe_zarr.store.parts.columns import decode_column
from lmprobe_zarr.store.parts.stored_array import Rows, StoredArray
from lmprobe_zarr.typing import Array

__all__ = ["Piece", "read_pieces"]

#: Reads of a local disk that together take less work are done by the caller's thread: another one takes some 50 microseconds to start.
_ALONE: Final = 2**18


class Piece(NamedTuple):
    """Rows of one chunk and their place in the output: ``out[target] = chunk[rows]``, where `out` is of one layer.

    Rows shorter than `row_shape` are filled up.

    `column` is the dtype in which a column of the user's is shown; None for any other array, whose values are taken as they are stored.
    The output may have a wider dtype: each chunk is converted by the thread that reads it, while it is in the cache.
    """

    array: StoredArray
    layer: int
    block: int
    rows: Rows
    out: Array
    target: Rows
    row_shape: tuple[int, ...]
    column: np.dtype[Any] | None = None


def read_pieces(pieces: Sequence[Piece], columns: tuple[Any, ...]) -> None:
    """Read chunks into arrays, several at a time where they are large enough.

    Parameters
    ----------
    pieces : sequence of Piece
        What to read; no two write the same rows.
    columns : tuple
        Index of the axes after the first; empty for everything.

    Raises
    ------
    CorruptPartError, PartGoneError
        See `StoredArray.read_chunk`; the first one found.
    """
    local = all(piece.array.storage.is_local or piece.array.keeps_chunk(piece.layer, piece.block) for piece in pieces)
    if len(pieces) == 1 or (local and sum(piece.array.work_of(piece.rows) for piece in pieces) < _ALONE):
        for piece in pieces:
            _read_piece(piece, columns)
    else:
        remote = (piece.array.storage.pace for piece in pieces if not piece.array.storage.is_local)
        run_all([functools.partial(_read_piece, piece, columns) for piece in pieces], local_pace() if local else next(remote))


def _read_piece(piece: Piece, columns: tuple[Any, ...]) -> None:
    chunk_rows, out = piece.array.info.rows_per_chunk, piece.out
    if isinstance(piece.rows, slice) and isinstance(piece.target, slice) and not columns:
        target = out[piece.target]
        whole = piece.rows.start == 0 and piece.rows.stop == chunk_rows
        if (
            whole
            and target.shape[1:] == piece.array.row_shape
            and target.dtype == piece.array.dtype
            and target.flags.c_contiguous
            and target.dtype != object
            and target.dtype.kind not in "mM"
        ):
            piece.array.read_chunk(piece.layer, piece.block, target)
            return
    chunk = piece.array.read_rows(piece.layer, piece.block, piece.rows)
    if piece.column is not None:
        try:
            chunk = decode_column(chunk, piece.array.info, piece.column)
        except ValueError as error:
            raise piece.array.corrupt(piece.array.info.chunk_key(piece.layer, piece.block), f"cannot be decoded ({error})") from error
    if piece.array.row_shape != piece.row_shape:
        filled = np.full((len(chunk), *piece.row_shape), fill_value(chunk.dtype), chunk.dtype)
        filled[(slice(None), *map(slice, piece.array.row_shape))] = chunk
        chunk = filled
    copy_rows(chunk, out, piece.target, columns)
