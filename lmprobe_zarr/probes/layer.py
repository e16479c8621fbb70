"""One layer as a matrix to fit: how it is read, in which dtype it is computed, which rows are finite.

The one place that decides these for sweeps, transfer, token streams and `Probe`. Also holds the settings of a process while it fits.
Never a probe, a label or a scheduler.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.typing import Array

__all__ = ["as_fit_dtype", "fits_running", "not_finite_rows", "read_layer"]


@functools.lru_cache(maxsize=1)
def _libraries(modules: int) -> Any:  # noqa: ARG001 — libraries come with modules, so they are looked for again when there are more
    """What sets the threads of the libraries that this process has loaded; looking for them takes 5 ms."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


class _FitsRunning:
    """Settings of the whole process while any fit runs in it: one BLAS thread, no ConvergenceWarning.

    Both are process-wide. If each thread set and restored them by itself, one could restore the setting of another and leave BLAS at
    one thread for good. So the first thread that enters sets them and the last that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from sklearn.exceptions import ConvergenceWarning

        libraries = _libraries(len(sys.modules))
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore.enter_context(libraries.limit(limits=1, user_api="blas"))
                self._restore.enter_context(warnings.catch_warnings())
                # Callers count fits that did not converge and warn once.
                warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            # OpenMP's limit belongs to the thread that sets it.
            with libraries.limit(limits=1, user_api="openmp"):
                yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore.close()


fits_running = _FitsRunning()


def read_layer(whole: xr.Variable, layer: int) -> Any:
    """One layer of a lazy variable, shape (prompt, hidden), dtype as it is stored."""
    # Sliced here, not by the caller: xarray caches the values in the slice, and a task graph would keep them in memory.
    sliced = whole.isel(layer=layer, missing_dims="ignore")
    # Read before the transpose: a lazy transpose reads point by point.
    return sliced.values if sliced.dims[0] == "prompt" else sliced.values.T


def as_fit_dtype(values: Any) -> Array:
    """The layer in the dtype that it is fitted in, rows contiguous.

    float32 where it holds every value exactly (floats of at most 32 bits, integers of at most 16); else float64.
    """
    values = np.asarray(values)
    wide = values.dtype.itemsize > {"f": 4, "i": 2, "u": 2}.get(values.dtype.kind, values.dtype.itemsize)
    return np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32)


def not_finite_rows(matrix: Array, rows: Array | None = None) -> list[int]:
    """The rows that hold NaN or infinity, ascending.

    Parameters
    ----------
    matrix : ndarray of real numbers, shape (row, hidden)
    rows : ndarray of int, optional
        Only these rows; None for all.
    """
    # Row sums in float64 find any NaN or infinity without a matrix of booleans. A sum may overflow, so suspicious rows are checked again.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = np.flatnonzero(~np.isfinite(matrix.sum(axis=1, dtype=np.float64)))
    checked = suspicious if rows is None else np.intersect1d(suspicious, rows)
    return [int(row) for row in checked if not np.isfinite(matrix[row].astype(np.float64)).all()]
