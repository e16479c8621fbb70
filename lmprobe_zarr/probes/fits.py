"""Fits: one layer at a time, all folds of some probes, and their scores.

Holds the plan that all tasks share, the body of every task, and what a process is set to while it fits. Never how tasks are
spread, a store or a plot: what is fitted is the array that is given.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.probes.classifiers import converged, fit_in_place, make_probe
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.probes.metrics import accuracy, auroc, class_scores

__all__ = ["Fit", "NotFiniteError", "Plan", "fit_layer", "fits_running"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What all tasks share; shipped once to each worker."""

    #: The whole lazy array, dims (layer, prompt, hidden) in any order; None where tasks are handed values.
    activations: xr.Variable | None
    labels: Array
    folds: tuple[Fold, ...]
    layers: tuple[str, ...]
    probes: tuple[tuple[str, Any], ...]
    random_state: int


@dataclass(frozen=True, slots=True)
class Fit:
    """The scores of one probe on one layer and fold, each given by its place in the plan."""

    layer: int
    probe: int
    fold: int
    accuracy: float
    auroc: float
    nan_reason: str
    seconds: float
    converged: bool


class NotFiniteError(Exception):
    """NaN or infinity in some rows of a layer. Never reaches the caller: it becomes an error that names layer and prompts."""

    def __init__(self, layer: int, rows: list[int]) -> None:
        super().__init__(layer, rows)
        self.layer, self.rows = layer, rows


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


def fit_layer(plan: Plan, layer: int, values: Any, probes: tuple[int, ...]) -> list[Fit]:
    """All folds of some probes on one layer; the body of every task.

    Parameters
    ----------
    plan : Plan
    layer : int
        Its place in the plan.
    values : array of real numbers, shape (prompt, hidden), or None
        None where the task reads its layer itself, from ``plan.activations``.
    probes : tuple of int
        Their places in the plan.

    Raises
    ------
    NotFiniteError
        The layer holds NaN or infinity.
    """
    if values is None:
        assert plan.activations is not None  # noqa: S101  (for mypy: the plan holds what no task is handed)
        # Sliced here, not by the caller: xarray caches what a lazy slice has read in the slice, and the graph would keep it.
        sliced = plan.activations.isel(layer=layer, missing_dims="ignore")
        # Read before it is turned: a lazy transpose reads point by point.
        values = sliced.values if sliced.dims[0] == "prompt" else sliced.values.T
    matrix = _computable(values)
    del values
    _check_finite(layer, matrix)
    with fits_running():
        return [_fit_fold(plan, layer, probe, fold, matrix) for probe in probes for fold in range(len(plan.folds))]


def _computable(values: Any) -> Array:
    """The layer in the float type that is fitted, rows contiguous: float64 as it is, all others that fit in float32."""
    values = np.asarray(values)
    wide = values.dtype.itemsize > {"f": 4, "i": 2, "u": 2}.get(values.dtype.kind, values.dtype.itemsize)
    return np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32)


def _check_finite(layer: int, matrix: Array) -> None:
    # Row sums in float64 show any NaN or infinity without a second matrix of truth values; float64 may overflow, so each is looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = np.flatnonzero(~np.isfinite(matrix.sum(axis=1, dtype=np.float64)))
    bad = [int(row) for row in suspicious if not np.isfinite(matrix[row]).all()]
    if bad:
        raise NotFiniteError(layer, bad)


def _fit_seed(plan: Plan, layer: int, probe: int, fold: int) -> int:
    words = f"{plan.random_state}\0{plan.layers[layer]}\0{plan.probes[probe][0]}\0{fold}"
    return int.from_bytes(hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:4], "little")


def _fit_fold(plan: Plan, layer: int, probe: int, fold: int, matrix: Array) -> Fit:
    import sklearn

    train, test = plan.folds[fold]
    given = plan.probes[probe][1]
    estimator = make_probe(given, _fit_seed(plan, layer, probe, fold))
    # The layer was checked once; each estimator would check each fold several times more.
    with sklearn.config_context(assume_finite=True):
        rows = matrix[train]
        started = time.perf_counter()
        estimator = fit_in_place(given, estimator, rows, plan.labels[train])
        seconds = time.perf_counter() - started
        del rows
        rows = matrix[test]
        share = accuracy(estimator.predict(rows), plan.labels[test])
        area, reason = auroc(
            class_scores(estimator, rows), plan.labels[test], getattr(estimator, "classes_", np.unique(plan.labels[train]))
        )
    return Fit(layer, probe, fold, share, area, reason, seconds, converged(estimator))
