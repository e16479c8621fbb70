"""`empty_aligned`: arrays that begin at a page of memory, into which the system copies a file at full speed. Knows no storage.

Processors of AMD from Zen 3 on copy a file into memory at a tenth of their speed where the target begins 1 to 31 bytes after a page, since
the source begins at one. What ``malloc`` returns for a large array begins 16 bytes after a page. Elsewhere the place makes no difference.
"""

from __future__ import annotations

import math
import mmap
from typing import Any, Final

import numpy as np

from lmprobe_zarr.typing import Array

__all__ = ["empty_aligned"]

#: Smaller arrays are not worth it: they fit into the first cache, and come from another part of the heap.
_SMALL: Final = 2**16


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """As `numpy.empty`, beginning at a page where the array is large; an array of objects is an ordinary one."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _SMALL or dtype.hasobject:
        return np.empty(shape, dtype)
    room = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    begin = -room.__array_interface__["data"][0] % mmap.PAGESIZE
    return room[begin : begin + nbytes].view(dtype).reshape(shape)
