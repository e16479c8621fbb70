"""Memory that is used again once no array in it exists any more. Knows no rows and no store.

Allocating many megabytes takes longer than writing to them, because the system hands memory over page by page, each filled with zeros.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import widen
from lmprobe_zarr.typing import Array

__all__ = ["ReusedMemory", "copy_cast"]

# The batch that is made, the batch that the consumer uses, and a spare.
_MOST_BUFFERS: Final = 3


class ReusedMemory:
    """Arrays in the memory of earlier ones, once neither a view nor a tensor of those exists any more. For use by one thread."""

    def __init__(self) -> None:
        self._held: list[bytearray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array whose values are not set, as from `numpy.empty`."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        free = next((memory for memory in self._held if len(memory) >= nbytes and _is_free(memory)), None)
        if free is None:
            free = bytearray(max(nbytes, 1))
            if len(self._held) == _MOST_BUFFERS:
                del self._held[0]  # arrays in it keep it alive
            self._held.append(free)
        return np.frombuffer(free, dtype, math.prod(shape)).reshape(shape)


def _is_free(memory: bytearray) -> bool:
    """Whether no array uses it. Python refuses to resize a bytearray while anything exports its buffer, and every array in it does."""
    try:
        memory.append(memory.pop())
    except BufferError:
        return False
    return True


def copy_cast(target: Array, values: Array) -> None:
    """Copy values into an array of another dtype.

    Parameters
    ----------
    target, values : ndarray of one shape
        Values too large for the dtype of `target` become infinite.
    """
    if values.dtype == np.float16 and target.dtype == np.float32:
        widen(values, target)
        return
    with np.errstate(over="ignore"):
        np.copyto(target, values, casting="unsafe")
