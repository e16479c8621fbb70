"""float16 numbers copied into float32 arrays, faster than numpy's own cast. Numpy only."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from lmprobe_zarr.typing import Array, Ints

__all__ = ["copy_rows", "widen"]

#: Numbers that are converted together: 128 KiB that are read and 256 KiB that are written stay in the cache of one core.
_BLOCK: Final = 2**16
#: Below this a single cast costs less than the steps of `_widen_block`.
_FEW: Final = 2**12
#: The sign and the ten bits of the fraction and the five of the exponent, after the shift by 13 bits.
_KEPT: Final = np.int32(-0x70002000)
#: float32 counts its exponents from 127, float16 from 15.
_REBIAS: Final = np.float32(2.0**112)
_NOT_FINITE: Final = 0x7C00
_SMALLEST: Final = np.array([1], np.int32).view(np.float32)


def widen(values: Array, target: Array) -> None:
    """Copy float16 values into a float32 array of the same shape.

    Parameters
    ----------
    values : ndarray of float16
    target : ndarray of float32
        Every value is exact there; NaN and infinity stay what they are.
    """
    # Some libraries make the processor take float32 numbers below the normal range for 0. After the shift small numbers are there.
    flushed = not (_SMALLEST * _REBIAS)[0]
    if values.size < _FEW or flushed or not (values.flags.c_contiguous and target.flags.c_contiguous):
        np.copyto(target, values)
        return
    flat, out = values.reshape(-1), target.reshape(-1)
    room = np.empty(min(_BLOCK, len(flat)), np.uint16)
    for start in range(0, len(flat), _BLOCK):
        _widen_block(flat[start : start + _BLOCK], out[start : start + _BLOCK], room)


def _widen_block(values: Array, target: Array, room: Array) -> None:
    bits = values.view(np.uint16)
    if np.bitwise_and(bits, 0x7FFF, out=room[: len(bits)]).max() >= _NOT_FINITE:
        np.copyto(target, values)
        return
    words = target.view(np.int32)
    np.copyto(words, bits.view(np.int16))
    np.left_shift(words, 13, out=words)
    np.bitwise_and(words, _KEPT, out=words)
    np.multiply(target, _REBIAS, out=target)


def copy_rows(values: Array, out: Array, rows: slice | Ints, columns: tuple[Any, ...]) -> None:
    """``out[rows] = values[:, *columns]``, where the target may be wider than the values.

    Parameters
    ----------
    values : ndarray, shape (row, …)
    out : ndarray, shape (row, …)
    rows : slice of step 1, or ndarray of int
    columns : tuple
        Index of the axes after the first; empty for everything.
    """
    if values.dtype != np.float16 or out.dtype != np.float32 or columns:
        out[rows] = values[(slice(None), *columns)]
    elif isinstance(rows, slice):
        widen(values, out[rows])
    else:
        size = max(1, _BLOCK // max(1, values[0].size)) if len(values) else 1
        for start in range(0, len(values), size):
            some = values[start : start + size]
            wide = np.empty(some.shape, np.float32)
            widen(some, wide)
            out[rows[start : start + size]] = wide
