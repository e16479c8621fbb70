"""Ridge on folds of one layer, over several strengths: equal to scikit-learn's fits in float64. Never where labels or folds come from.

Products of rows and their factorisations take nearly all the time of a fit, so these are made in float32, and shared between folds and
strengths. They only propose corrections: what is wrong with a solution is computed in float64 from the rows themselves, for all folds at
once, until the solution no longer changes. Where float32 is too coarse for a penalty, the fit is solved in float64 by eigenvalues, or by
singular values, which exist whatever the rank of the rows.

Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), chapter 12, iterative refinement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmprobe_zarr.probes.metrics import Outcome
from lmprobe_zarr.typing import Array, Floats

if TYPE_CHECKING:
    # `folds` fits by way of this module.
    from lmprobe_zarr.probes.folds import Fold

__all__ = ["RidgeTarget", "Solved", "ridge_coefficients", "solve_ridge"]

_DEFAULT_ALPHA: Final = 1.0
#: Values of a block of rows in float64, so that a block stays in the processor's cache.
_BLOCK_VALUES: Final = 2**18
#: A solution is final when its error, estimated from the last two corrections, is below this share of its length.
_ENOUGH: Final = 1e-9
#: A correction of this share of the solution shows that float32 is too coarse.
_STUCK: Final = 0.1
_MOST_CORRECTIONS: Final = 8
# LAPACK solves for one column as it does for many, which takes six to eleven times as long as substitution in it alone.
_SINGLE_COLUMNS: Final = 4
#: How many factors may be in memory at a time, at least, and how many values of factors, at least.
_FEWEST_FACTORS, _FACTOR_VALUES = 5, 2**24
#: A unit whose variance over the training rows is below this share of its mean square about the common mean is measured again by itself.
_CANCELLED: Final = 1e-6
#: Eigenvalues of a matrix of products are exact to about 1e-16 of the largest. A penalty below this share of it needs singular values.
_LEAST_PENALTY: Final = 1e-10
#: Float32 has a short range: solutions for penalties above this would underflow.
_LARGEST_PENALTY: Final = 1e30


@dataclass(frozen=True, slots=True)
class RidgeTarget:
    """What is learned: classes or numbers.

    Parameters
    ----------
    values : ndarray, shape (row,)
        A label or a number for each row of the matrix.
    classes : ndarray, shape (class,), or None
        All labels, sorted; None for numbers.
    """

    values: Array
    classes: Array | None

    def columns(self) -> Floats:
        """The targets of the regression, shape (row, column): the numbers, or ±1 for the second of two classes or for each of more."""
        if self.classes is None:
            return np.asarray(self.values, np.float64)[:, None]
        wanted = self.classes[1:] if len(self.classes) == 2 else self.classes
        return np.where(np.asarray(self.values)[:, None] == wanted, 1.0, -1.0)

    def outcome(self, predicted: Floats, train: Array, test: Array) -> Outcome:
        """The predictions of the test rows, from the regression's, shape (row, column)."""
        true = self.values[test]
        if self.classes is None:
            return Outcome(true, predicted[:, 0])
        codes = np.searchsorted(self.classes, true)
        if len(self.classes) == 2:
            return Outcome(codes, (predicted[:, 0] > 0).astype(int), 2, predicted[:, 0])
        # Classes that the fold does not train on are never predicted, and have no score.
        absent = ~np.isin(self.classes, self.values[train])
        scores = np.where(absent, np.nan, predicted)
        return Outcome(codes, np.where(absent, -np.inf, predicted).argmax(axis=1), len(self.classes), scores)


@dataclass(frozen=True, slots=True)
class Solved:
    """The predictions of one fit for its test rows, its seconds with its share of what fits have in common, and whether it converged."""

    outcome: Outcome
    seconds: float
    ended: bool = True


def solve_ridge(
    matrix: Array, folds: Sequence[Fold], targets: Sequence[RidgeTarget], strengths: Sequence[float | None]
) -> list[list[list[Solved]]]:
    """Every fit by fold, strength and target.

    Each is what ``make_pipeline(StandardScaler(), Ridge(alpha=strength))``, or RidgeClassifier, gives for rows in float64.

    Parameters
    ----------
    matrix : ndarray of float32 or float64, shape (row, hidden)
        Finite in the rows that folds name.
    folds : sequence of (train, test)
    targets : sequence of RidgeTarget
    strengths : sequence of float or None
        Penalties; None is 1.
    """
    started = time.perf_counter()
    alphas = np.array([_DEFAULT_ALPHA if strength is None else strength for strength in strengths], np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        predicted = _Ridge(matrix, folds, [target.columns() for target in targets], alphas).predict()
    seconds = (time.perf_counter() - started) / (len(folds) * len(alphas) * len(targets))
    ends = np.cumsum([target.columns().shape[1] for target in targets])
    return [
        [
            [
                Solved(target.outcome(of_fold[:, place, end - target_width : end], train, test), seconds)
                for target, end, target_width in zip(targets, ends, np.diff(ends, prepend=0), strict=True)
            ]
            for place in range(len(alphas))
        ]
        for (train, test), of_fold in zip(folds, predicted, strict=True)
    ]


class _Ridge:
    """All fits of one matrix. Arrays of several fits have the axes (…, fold, strength, column)."""

    def __init__(self, matrix: Array, folds: Sequence[Fold], targets: Sequence[Floats], alphas: Floats) -> None:
        rows = np.unique(np.concatenate([side for fold in folds for side in fold]))
        # Rows outside the folds may hold NaN. The usual case, in which all rows are used, copies nothing.
        self.matrix = matrix if len(rows) == len(matrix) else matrix[rows]
        self.folds = [(np.searchsorted(rows, train), np.searchsorted(rows, test)) for train, test in folds]
        self.alphas = alphas
        #: How often each fold trains on each row, shape (row, fold).
        self.weights = np.stack([np.bincount(train, minlength=len(rows)) for train, _ in self.folds], axis=1).astype(np.float64)
        self.counts = self.weights.sum(axis=0)
        y = np.concatenate(targets, axis=1)[rows]
        self.y_centre = (self.weights.T @ y) / self.counts[:, None]
        apart = np.where(self.weights[:, :, None] > 0, y[:, None, :] - self.y_centre, 0.0)
        scale = np.abs(apart).max(axis=0)
        self.y_scale = np.where(scale > 0, scale, 1.0)
        #: Targets of the training rows about their mean, of a size near 1; shape (row, fold, 1, column).
        self.y = (apart / self.y_scale)[:, :, None, :]
        self._measure()
        self._total: tuple[Array, Floats, Array] | None = None

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        """All rows less their common mean, in float64, some at a time."""
        size = max(16, _BLOCK_VALUES // self.matrix.shape[1])
        for start in range(0, len(self.matrix), size):
            place = slice(start, start + size)
            yield place, np.subtract(self.matrix[place], self.mean, dtype=np.float64)

    def _measure(self) -> None:
        """Mean and deviation of each unit over the training rows of each fold, shape (hidden, fold), the mean less the common one."""
        self.mean = self.matrix.mean(axis=0, dtype=np.float64)
        sums, squares = (np.zeros((self.matrix.shape[1], len(self.folds))) for _ in range(2))
        wanted = (self.y * self.weights[:, :, None, None]).reshape(len(self.y), -1)
        products = np.zeros((self.matrix.shape[1], wanted.shape[1]))
        for place, rows in self._blocks():
            sums += rows.T @ self.weights[place]
            products += rows.T @ wanted[place]
            rows *= rows
            squares += rows.T @ self.weights[place]
        self.shift = sums / self.counts
        squares /= self.counts
        variance = squares - self.shift**2
        for fold, (train, _) in enumerate(self.folds):
            units = np.flatnonzero(variance[:, fold] <= _CANCELLED * squares[:, fold])
            if len(units):
                raw = self.matrix[np.ix_(train, units)]
                apart = raw - self.mean[units]
                self.shift[units, fold] = apart.mean(axis=0)
                variance[units, fold] = np.where(raw.min(axis=0) == raw.max(axis=0), 0.0, apart.var(axis=0))
        # As scikit-learn's StandardScaler decides that a unit is constant.
        eps = np.finfo(np.float64).eps
        self.flat = variance <= self.counts * eps * variance + (self.counts * (self.mean[:, None] + self.shift) * eps) ** 2
        self.deviation = np.sqrt(np.where(self.flat, 1.0, variance))
        #: Products of the standardised units with the targets, shape (hidden, fold, 1, column).
        self.products = self._standard(products.reshape(-1, *self.y.shape[1:]), wanted.sum(axis=0).reshape(self.y.shape[1:]))

    def predict(self) -> list[Floats]:
        """For each fold the predictions of its test rows, shape (row, strength, column)."""
        hidden = self.matrix.shape[1]
        fewest = min(len(train) for train, _ in self.folds)
        size = hidden if fewest >= hidden else int(self.counts.max())
        # Five factors are in memory at a time, or more if they are small: each pass over the rows serves all of them.
        at_once = max(_FEWEST_FACTORS, max(_FACTOR_VALUES, self.matrix.size) // (size * size))
        strengths = [range(start, min(start + at_once, len(self.alphas))) for start in range(0, len(self.alphas), at_once)]
        step = max(1, at_once // len(strengths[0]))
        predicted = [np.empty((len(test), len(self.alphas), self.y.shape[-1])) for _, test in self.folds]
        for start in range(0, len(self.folds), step):
            some = range(start, min(start + step, len(self.folds)))
            for chosen in strengths:
                part = _Part(self, some, self.alphas[chosen])
                found, done = part.by_units() if fewest >= hidden else part.by_rows()
                for place, fold in enumerate(some):
                    of_fold = found[self.folds[fold][1], place]
                    if not done[place].all():
                        of_fold[:, ~done[place]] = self._exactly(fold, part.alphas[~done[place]])
                    predicted[fold][:, chosen] = of_fold
        return [each * self.y_scale[fold] + self.y_centre[fold] for fold, each in enumerate(predicted)]

    def standardised(self, fold: int, dtype: Any) -> Array:
        """The training rows of a fold in standard deviations, each times the root of how often it counts."""
        train = np.flatnonzero(self.weights[:, fold])
        rows = self.matrix[train].astype(np.promote_types(dtype, self.matrix.dtype), copy=False)
        rows = rows - (self.mean + self.shift[:, fold]).astype(rows.dtype)
        rows /= self.deviation[:, fold].astype(rows.dtype)
        rows[:, self.flat[:, fold]] = 0
        weights = self.weights[train, fold]
        if (weights != 1).any():
            rows *= np.sqrt(weights)[:, None].astype(rows.dtype)
        return np.asarray(rows.astype(dtype, copy=False))

    def gram(self, fold: int) -> Array:
        """Products of the standardised units of a fold, float32, shape (hidden, hidden)."""
        if self._total is None and len(self.folds) > 1:
            n = len(self.matrix)
            if all(len(train) + len(test) == n and (self.weights[train, f] == 1).all() for f, (train, test) in enumerate(self.folds)):
                rows = self.matrix - self.mean.astype(self.matrix.dtype)
                scale = np.sqrt(np.einsum("nd,nd->d", rows, rows, dtype=np.float64) / n)
                scale[scale == 0] = 1
                rows /= scale.astype(rows.dtype)
                rows = rows.astype(np.float32, copy=False)
                self._total = rows, scale, rows.T @ rows
        if self._total is None:
            rows = self.standardised(fold, np.float32)
            return np.asarray(rows.T @ rows)
        # The sums of a training fold are those of all rows less those of its test rows.
        rows, scale, total = self._total
        tested = rows[self.folds[fold][1]]
        gram = tested.T @ tested
        np.subtract(total, gram, out=gram)
        shift = (self.shift[:, fold] / scale * np.sqrt(self.counts[fold])).astype(np.float32)
        gram -= np.outer(shift, shift)
        factor = np.where(self.flat[:, fold], 0, scale / self.deviation[:, fold]).astype(np.float32)
        gram *= factor[:, None]
        gram *= factor
        return np.asarray(gram)

    def _standard(self, products: Floats, sums: Floats) -> Floats:
        """Products of units in the standard deviations of each fold, from those of units less their common mean."""
        found = (products - self.shift[:, :, None, None] * sums) / self.deviation[:, :, None, None]
        found[self.flat] = 0
        return np.asarray(found)

    def _exactly(self, fold: int, alphas: Floats) -> Floats:
        """Predictions of the test rows of a fold, shape (row, strength, column), all in float64 and whatever the rank of its rows."""
        train = np.flatnonzero(self.weights[:, fold])
        rows = self.standardised(fold, np.float64)
        target = self.y[train, fold, 0] * np.sqrt(self.weights[train, fold])[:, None]
        found = _solve_exactly(rows, target, alphas)
        test = self.folds[fold][1]
        tested = (np.subtract(self.matrix[test], self.mean, dtype=np.float64) - self.shift[:, fold]) / self.deviation[:, fold]
        tested[:, self.flat[:, fold]] = 0
        return np.asarray((tested @ found.reshape(len(found), -1)).reshape(len(test), *found.shape[1:]))


def ridge_coefficients(rows: Floats, targets: Floats, alpha: float) -> Floats:
    """The coefficients that make ``|rows @ coef − targets|² + alpha |coef|²`` least, for any rank and penalty; without an intercept.

    Parameters
    ----------
    rows : ndarray of float64, shape (row, hidden)
    targets : ndarray of float64, shape (row, column)
        Of a size near 1.
    alpha : float
        At least 0. The solution of least norm where there are several.

    Returns
    -------
    ndarray of float64, shape (hidden, column)
    """
    wide = rows.shape[0] < rows.shape[1]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        narrow = rows.astype(np.float32)
        factors = _factorise(narrow @ narrow.T if wide else narrow.T @ narrow, np.array([alpha]))
        del narrow
        wrong = targets if wide else rows.T @ targets
        found, before = np.zeros_like(wrong), np.ones(targets.shape[1])
        for turn in range(_MOST_CORRECTIONS + 1):
            step = _solve(factors, wrong[:, None])[:, 0]
            found += step
            coef = rows.T @ found if wide else found
            off = targets - rows @ coef
            wrong = (off if wide else rows.T @ off) - alpha * found
            length = _length(found)
            change = np.divide(_length(step), length, out=np.zeros(len(length)), where=length != 0)
            if turn and (np.isfinite(length) & (change < _STUCK) & (change * np.maximum(change / before, change) <= _ENOUGH)).all():
                return coef
            if turn and not (change < _STUCK).all():
                break
            before = np.maximum(change, np.finfo(np.float64).tiny)
        return np.asarray(_solve_exactly(rows, targets, np.array([alpha]))[:, 0])


def _solve_exactly(rows: Floats, target: Floats, alphas: Floats) -> Floats:
    """Coefficients in float64, shape (hidden, strength, column), whatever the rank of the rows."""
    from scipy.linalg import eigh, svd

    wide = rows.shape[0] < rows.shape[1]
    values, vectors = eigh(rows @ rows.T if wide else rows.T @ rows, check_finite=False)
    found = np.empty((rows.shape[1], len(alphas), target.shape[1]))
    tiny = alphas <= _LEAST_PENALTY * values[-1]
    for place in np.flatnonzero(~tiny):
        alpha = alphas[place]
        damped = (np.maximum(values, 0) + alpha)[:, None]
        solve = partial(_damped, vectors, damped)
        if wide:
            dual = solve(target)
            dual += solve(target - rows @ (rows.T @ dual) - alpha * dual)
            found[:, place] = rows.T @ dual
        else:
            coef = solve(rows.T @ target)
            found[:, place] = coef + solve(rows.T @ (target - rows @ coef) - alpha * coef)
    if tiny.any():
        left, singular, right = svd(rows, full_matrices=False, check_finite=False)
        kept = singular > np.finfo(np.float64).eps * max(rows.shape) * singular[0]
        projected = left[:, kept].T @ target
        for place in np.flatnonzero(tiny):
            share = singular[kept] / (singular[kept] ** 2 + alphas[place])
            found[:, place] = right[kept].T @ (share[:, None] * projected)
    return found


def _damped(vectors: Floats, damped: Floats, right: Floats) -> Floats:
    return np.asarray(vectors @ ((vectors.T @ right) / damped))


class _Part:
    """Some folds and strengths, solved together: their factors are in memory at the same time."""

    def __init__(self, ridge: _Ridge, folds: range, alphas: Floats) -> None:
        self._ridge, self._folds, self.alphas = ridge, folds, alphas
        some = slice(folds.start, folds.stop)
        self._weights, self._y = ridge.weights[:, some], ridge.y[:, some]
        self._shift, self._deviation, self._flat = ridge.shift[:, some], ridge.deviation[:, some], ridge.flat[:, some]
        self.shape = len(folds), len(alphas), ridge.y.shape[-1]

    def by_units(self) -> tuple[Floats, Array]:
        """Predictions of all rows, shape (row, fold, strength, column), and which fits are final: from products of units."""
        factors = [_factorise(self._ridge.gram(fold), self.alphas) for fold in self._folds]
        solution = np.zeros((len(self._shift), *self.shape))
        gradient = np.broadcast_to(self._ridge.products[:, self._folds.start : self._folds.stop], solution.shape)

        def correct() -> tuple[Floats, Floats, Floats]:
            nonlocal solution, gradient
            step = np.stack([_solve(of_fold, gradient[:, place]) for place, of_fold in enumerate(factors)], axis=1)
            solution = solution + step
            predicted, products, sums = self._pass(solution)
            gradient = self._standard(products, sums) - self.alphas[:, None] * solution
            return _length(step), _length(solution), predicted

        return self._converge(correct)

    def by_rows(self) -> tuple[Floats, Array]:
        """The same from products of rows, of which there are fewer than units: with one coefficient for each row."""
        factors = []
        for fold in self._folds:
            rows = self._ridge.standardised(fold, np.float32)
            factors.append(_factorise(rows @ rows.T, self.alphas))
        trains = [np.flatnonzero(self._weights[:, place]) for place in range(len(factors))]
        roots = np.sqrt(self._weights)[:, :, None, None]
        dual = np.zeros((len(self._y), *self.shape))
        wrong = np.broadcast_to(self._y * roots, dual.shape)

        def correct() -> tuple[Floats, Floats, Floats]:
            nonlocal dual, wrong
            step = np.zeros_like(dual)
            for place, (train, of_fold) in enumerate(zip(trains, factors, strict=True)):
                step[train, place] = _solve(of_fold, wrong[train, place])
            dual = dual + step
            counted = dual * roots
            flat = counted.reshape(len(counted), -1)
            products = np.zeros((len(self._shift), flat.shape[1]))
            for block, rows in self._ridge._blocks():
                products += rows.T @ flat[block]
            predicted, _, _ = self._pass(self._standard(products.reshape(-1, *self.shape), counted.sum(axis=0)), gradient=False)
            wrong = (self._y - predicted) * roots - self.alphas[:, None] * dual
            return _length(step), _length(dual), predicted

        return self._converge(correct)

    def _converge(self, correct: Callable[[], tuple[Floats, Floats, Floats]]) -> tuple[Floats, Array]:
        """Correct until the next correction would be negligible: the predictions, and which fits got there."""
        correct()
        before = np.ones(self.shape)
        for _ in range(_MOST_CORRECTIONS):
            step, length, predicted = correct()
            change = np.divide(step, length, out=np.zeros(self.shape), where=length != 0)
            # Corrections shrink by about the same factor each time.
            rate = np.maximum(np.divide(change, before, out=np.zeros(self.shape), where=before > 0), change)
            done = np.asarray((np.isfinite(length) & (change < _STUCK) & (change * rate <= _ENOUGH)).all(axis=2))
            if (done | ~(change < _STUCK).all(axis=2)).all():
                break
            before = change
        return predicted, done

    def _pass(self, solution: Floats, *, gradient: bool = True) -> tuple[Floats, Floats, Floats]:
        """What coefficients of standardised units predict for all rows, and products of units, and sums, of what is wrong with it."""
        raw = solution / self._deviation[:, :, None, None]
        offset = np.einsum("df,dfsc->fsc", self._shift, raw)
        flat = raw.reshape(len(raw), -1)
        predicted = np.empty((len(self._y), *self.shape))
        products, sums = np.zeros(flat.shape), np.zeros(self.shape)
        for block, rows in self._ridge._blocks():
            predicted[block] = (rows @ flat).reshape(-1, *self.shape) - offset
            if gradient:
                wrong = (self._y[block] - predicted[block]) * self._weights[block, :, None, None]
                products += rows.T @ wrong.reshape(len(wrong), -1)
                sums += wrong.sum(axis=0)
        return predicted, products.reshape(-1, *self.shape), sums

    def _standard(self, products: Floats, sums: Floats) -> Floats:
        found = (products - self._shift[:, :, None, None] * sums) / self._deviation[:, :, None, None]
        found[self._flat] = 0
        return np.asarray(found)


def _length(values: Floats) -> Floats:
    """Euclidean lengths along the first axis."""
    return np.asarray(np.sqrt(np.einsum("d...,d...->...", values, values)))


def _factorise(matrix: Array, alphas: Floats) -> list[Any]:
    """The Cholesky factor in float32 with each penalty; None where there is none. The matrix is overwritten."""
    from scipy.linalg import LinAlgError, cho_factor

    found: list[Any] = []
    diagonal = np.diagonal(matrix).copy()
    for place, alpha in enumerate(alphas):
        if alpha > _LARGEST_PENALTY:
            found.append(None)
            continue
        penalised = matrix if place == len(alphas) - 1 else matrix.copy()
        np.fill_diagonal(penalised, diagonal + np.float32(alpha))
        try:
            # Symmetric, so its transpose is the same matrix in LAPACK's order of memory, which is not copied.
            found.append(cho_factor(penalised.T, overwrite_a=True, check_finite=False))
        except LinAlgError:
            found.append(None)
    return found


def _solve(factors: list[Any], right: Floats) -> Floats:
    """The solution for each strength, float64, shape (row, strength, column); NaN where there is no factor."""
    found = np.full(right.shape, np.nan)
    for place, factor in enumerate(factors):
        if factor is not None:
            # float32 has a short range, so each column is solved at a size of 1.
            size = np.abs(right[:, place]).max(axis=0)
            size = np.where(size > 0, size, 1.0)
            found[:, place] = _substitute(factor, (right[:, place] / size).astype(np.float32)) * size
    return found


def _substitute(factor: tuple[Array, bool], right: Array) -> Array:
    """The solution for a factor that `cho_factor` gives, shape (row, column), by substitution."""
    from scipy.linalg import cho_solve
    from scipy.linalg.blas import strsv

    if right.shape[1] > _SINGLE_COLUMNS:
        return np.asarray(cho_solve(factor, right, check_finite=False))
    triangle, lower = factor
    columns = []
    for column in right.T:
        # The product of a triangle and its transpose; the one that is not transposed comes first where it is the lower one.
        half = strsv(triangle, column, lower=lower, trans=not lower)
        columns.append(strsv(triangle, half, lower=lower, trans=lower, overwrite_x=True))
    return np.stack(columns, axis=1)
