"""Types that many rooms share: arrays by their dtype, and protocols of what callers give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Buffer", "Floats", "Ints", "Mask"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Buffer = bytes | memoryview
