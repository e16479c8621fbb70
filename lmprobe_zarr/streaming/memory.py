"""Memory that is used again once nobody holds an array in it. Knows no rows and no store.

Fresh memory of many megabytes costs more than what is written to it: the system hands it over page by page, each filled with zeros.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.typing import Array

__all__ = ["Reused", "copy_cast"]

_MOST: Final = 3  # the one that is being made, the one that is looked at, and one that waits


class Reused:
    """Arrays in memory of earlier ones of which nothing is held any more, no view and no tensor either. For one thread."""

    def __init__(self) -> None:
        self._held: list[bytearray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array whose values are not set, as of `numpy.empty`."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        free = next((memory for memory in self._held if len(memory) >= nbytes and _is_free(memory)), None)
        if free is None:
            free = bytearray(max(nbytes, 1))
            if len(self._held) == _MOST:
                del self._held[0]  # whoever holds it keeps it
            self._held.append(free)
        return np.frombuffer(free, dtype, math.prod(shape)).reshape(shape)


def _is_free(memory: bytearray) -> bool:
    """Whether no array lies in it: Python refuses to change the length of bytes that anybody has a buffer of, as every array has."""
    try:
        memory.append(memory.pop())
    except BufferError:
        return False
    return True


def copy_cast(target: Array, values: Array) -> None:
    """Copy values into an array of another dtype: with torch where it has been imported, which is several times as fast for float16.

    Parameters
    ----------
    target, values : ndarray of one shape
        What is too large for `target` becomes infinite.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and values.dtype == np.float16 and target.dtype == np.float32 and values.flags.writeable:
        torch.from_numpy(target).copy_(torch.from_numpy(values))
        return
    with np.errstate(over="ignore"):
        np.copyto(target, values, casting="unsafe")
