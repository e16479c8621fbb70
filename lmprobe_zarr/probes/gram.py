"""Ridge on all folds of one layer from shared Gram matrices; equal to scikit-learn's separate fits. Never where labels or folds come from.

A ridge fit needs only sums over its training rows: of the rows, of their outer products, and of their products with the labels. The sums
of a training fold are those of all rows less those of the test fold. So all folds together read every row once or twice, where separate
fits read it once per fold, and every further strength costs only a factorisation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmprobe_zarr.probes.controls import Trial
from lmprobe_zarr.probes.folds import Fold
from lmprobe_zarr.probes.labels import Labels
from lmprobe_zarr.probes.metrics import Outcome
from lmprobe_zarr.probes.task import FitPlan
from lmprobe_zarr.typing import Array

__all__ = ["FoldGrams", "Solved", "gram_worthwhile"]

#: A unit whose variance over the training rows is below this share of its variance over all rows counts as constant there.
_CONSTANT: Final = 1e-5
_DEFAULT_ALPHA: Final = 1.0


@dataclass(frozen=True, slots=True)
class Solved:
    """The predictions of one fit for its test rows, and its seconds, including its share of the sums."""

    outcome: Outcome
    seconds: float


def gram_worthwhile(plan: FitPlan, trial: Trial, matrix: Array, n_strengths: int) -> bool:
    """Whether `FoldGrams` gives the fits of a trial, and faster than scikit-learn.

    The trial must be an ordinary ridge on folds that train on all rows but the test rows. With fewer training rows than hidden units
    scikit-learn is faster, because it solves for one coefficient per row.
    """
    if trial.probe not in ("ridge", "ridge_regression") or plan.preprocessing is not None or plan.inner or trial.shuffled:
        return False
    n = len(plan.labels[0].rows)
    fewest = min(len(train) for train, _ in plan.folds)
    if matrix.ndim != 2 or matrix.shape[1] < 2 or fewest < matrix.shape[1] * (1 if n_strengths == 1 else 0.5) or len(plan.folds) < 2:
        return False
    return all(len(train) + len(test) == n for train, test in plan.folds)


class FoldGrams:
    """Sums over the rows of one layer, by fold.

    Parameters
    ----------
    matrix : ndarray of float, shape (prompt, hidden)
    folds : sequence of (train, test)
        Together each pair holds all of `rows`.
    rows : ndarray of int
    """

    def __init__(self, matrix: Array, folds: Sequence[Fold], rows: Array) -> None:
        started = time.perf_counter()
        self._folds, self._matrix = folds, matrix
        dtype = matrix.dtype.type
        every = np.array_equal(rows, np.arange(len(matrix)))  # the usual case, in which nothing is copied
        used = matrix if every else matrix[rows]
        # Centred and scaled by all rows first: for a unit far from zero, sums of raw squares would lose the significant digits.
        mean = used.mean(axis=0, dtype=np.float64)
        self._centred = matrix - mean.astype(dtype)
        self._flat = np.ptp(used, axis=0) == 0
        used = self._centred if every else self._centred[rows]
        scale = np.sqrt(np.einsum("nd,nd->d", used, used, dtype=np.float64) / len(rows))
        del used
        scale[self._flat] = 1
        self._centred /= scale.astype(dtype)
        self._centred[:, self._flat] = 0
        used = self._centred if every else self._centred[rows]
        self._total = used.T @ used
        self._sum = used.sum(axis=0, dtype=np.float64)
        self._rows = rows
        self.seconds = time.perf_counter() - started

    def solve(self, fold: int, labels: Labels, strengths: Sequence[float | None]) -> list[Solved] | None:
        """One fit per strength. None where the training rows lack a class, or a unit is constant in them: scikit-learn handles these."""
        started = time.perf_counter()
        train, test = self._folds[fold]
        classes = labels.classes
        if classes is not None and len(np.unique(labels.values[train])) < len(classes):
            return None
        rows = self._centred[test]
        n = len(train)
        mean = (self._sum - rows.sum(axis=0, dtype=np.float64)) / n
        gram = rows.T @ rows
        np.subtract(self._total, gram, out=gram)
        variance = np.diagonal(gram) / n - mean**2
        if ((variance < _CONSTANT) & ~self._flat).any():
            return None
        deviation = np.sqrt(np.where(self._flat, 1, variance))
        targets = _targets(labels, train)
        centre = targets.mean(axis=0)
        spread = np.zeros((len(self._centred), targets.shape[1]), self._centred.dtype)
        spread[train] = targets - centre
        product = (self._centred.T @ spread).astype(np.float64) / deviation[:, None]
        dtype = gram.dtype.type
        gram -= np.outer((mean * np.sqrt(n)).astype(dtype), (mean * np.sqrt(n)).astype(dtype))
        inverse = (1 / deviation).astype(dtype)
        gram *= inverse[:, None]
        gram *= inverse
        shared = (time.perf_counter() - started + self.seconds / len(self._folds)) / len(strengths)
        return [self._solve_at(labels, test, rows, gram, product, mean, deviation, centre, strength, shared) for strength in strengths]

    def _solve_at(
        self,
        labels: Labels,
        test: Array,
        rows: Array,
        gram: Array,
        product: Array,
        mean: Array,
        deviation: Array,
        centre: Array,
        strength: float | None,
        shared: float,
    ) -> Solved:
        from scipy.linalg import cho_factor, cho_solve

        started = time.perf_counter()
        penalised = gram.copy()
        penalised[np.diag_indices(len(gram))] += gram.dtype.type(_DEFAULT_ALPHA if strength is None else strength)
        coef = cho_solve(cho_factor(penalised, overwrite_a=True, check_finite=False), product.astype(gram.dtype), check_finite=False)
        coef = coef.astype(np.float64) / deviation[:, None]
        seconds = time.perf_counter() - started + shared
        predicted = np.asarray(rows @ coef.astype(rows.dtype), np.float64) + (centre - mean @ coef)
        true = labels.values[test]
        if labels.classes is None:
            return Solved(Outcome(true, predicted[:, 0]), seconds)
        codes = np.searchsorted(labels.classes, true)
        if len(labels.classes) == 2:
            return Solved(Outcome(codes, (predicted[:, 0] > 0).astype(int), 2, predicted[:, 0]), seconds)
        return Solved(Outcome(codes, predicted.argmax(axis=1), len(labels.classes), predicted), seconds)


def _targets(labels: Labels, train: Array) -> Array:
    """The targets of the regression, float64, shape (row, column): the values, or ±1 for the second of two classes or for each of more."""
    values = labels.values[train]
    if labels.classes is None:
        return np.asarray(values, np.float64)[:, None]
    wanted = labels.classes[1:] if len(labels.classes) == 2 else labels.classes
    return np.where(values[:, None] == wanted, 1.0, -1.0)
