"""float16 numbers copied into float32 arrays, faster than numpy's own cast. Numpy only."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np

from lmprobe_zarr.typing import Array, Ints

__all__ = ["copy_rows", "widen"]

#: Numbers that are converted together: 256 KiB that are read and 512 KiB that are written stay in the cache of a core.
_BLOCK: Final = 2**17
#: The most that torch converts without threads of its own, which would wait for one another on the threads that read.
_TORCH_BLOCK: Final = 2**15
#: Below this a single cast costs less than the steps of `_widen_block`.
_FEW: Final = 2**12
#: The sign, the exponent and the fraction, after the shift by 13 bits.
_KEPT: Final = np.int32(-0x70002000)
#: float32 counts its exponents from 127, float16 from 15.
_REBIAS: Final = np.float32(2.0**112)
#: The first bits of infinity, without and with the sign; those of NaN are larger.
_INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00
_SMALLEST: Final = np.array([1], np.int32).view(np.float32)


def widen(values: Array, target: Array) -> None:
    """Copy float16 values into a float32 array of the same shape.

    Parameters
    ----------
    values : ndarray of float16
    target : ndarray of float32
        Every value is exact there; NaN and infinity stay what they are.
    """
    if values.size < _FEW or not (values.flags.c_contiguous and target.flags.c_contiguous):
        np.copyto(target, values)
        return
    flat, out = values.reshape(-1), target.reshape(-1)
    torch: Any = sys.modules.get("torch")  # never imported for this
    if torch is not None and values.flags.writeable:
        source, sink = torch.from_numpy(flat), torch.from_numpy(out)
        for start in range(0, len(flat), _TORCH_BLOCK):
            sink[start : start + _TORCH_BLOCK].copy_(source[start : start + _TORCH_BLOCK])
    # Some libraries make the processor take float32 numbers below the normal range for 0. After the shift small numbers are there.
    elif (_SMALLEST * _REBIAS)[0]:
        for start in range(0, len(flat), _BLOCK):
            _widen_block(flat[start : start + _BLOCK], out[start : start + _BLOCK])
    else:
        np.copyto(out, flat)


def _widen_block(values: Array, target: Array) -> None:
    signed = values.view(np.int16)
    if signed.max() >= _INFINITY or values.view(np.uint16).max() >= _MINUS_INFINITY:
        np.copyto(target, values)
        return
    words = target.view(np.int32)
    np.copyto(words, signed)
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
