"""One layer as a matrix that can be fitted; what a process is set to while it fits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.typing import Array

__all__ = ["as_fit_dtype", "fits_running", "not_finite_rows", "read_layer"]


class _FitsRunning:
    """Settings of the whole process while any fit runs in it: one BLAS thread, no ConvergenceWarning.

    Both are process-wide, so tasks in several threads that each set and restored them would restore one another's: the last
    one out could leave BLAS at one thread for good. The first in sets, the last out restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore.enter_context(threadpool_limits(1, user_api="blas"))
                self._restore.enter_context(warnings.catch_warnings())
                # Counted by `converged` and said once by the caller.
                warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            # OpenMP's limit belongs to the thread that sets it.
            with threadpool_limits(1, user_api="openmp"):
                yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore.close()


fits_running = _FitsRunning()


def read_layer(whole: xr.Variable, layer: int) -> Any:
    """One layer of a lazy variable, shape (prompt, hidden), dtype as it is stored."""
    # Sliced here, not by the caller: xarray caches what a lazy slice has read in the slice, and the graph would keep it.
    sliced = whole.isel(layer=layer, missing_dims="ignore")
    # Read before it is turned: a lazy transpose reads point by point.
    return sliced.values if sliced.dims[0] == "prompt" else sliced.values.T


def as_fit_dtype(values: Any) -> Array:
    """The layer in the float type that is fitted, rows contiguous: float64 as it is, all others that fit in float32."""
    values = np.asarray(values)
    wide = values.dtype.itemsize > {"f": 4, "i": 2, "u": 2}.get(values.dtype.kind, values.dtype.itemsize)
    return np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32)


def not_finite_rows(matrix: Array, rows: Array) -> list[int]:
    """Those of `rows` that hold NaN or infinity."""
    # Row sums in float64 show any NaN or infinity without a second matrix of truth values; float64 may overflow, so each is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = np.flatnonzero(~np.isfinite(matrix.sum(axis=1, dtype=np.float64)))
    return [int(row) for row in np.intersect1d(suspicious, rows) if not np.isfinite(matrix[row]).all()]
