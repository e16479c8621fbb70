"""Linear probes from sufficient statistics: sums that one pass over the rows collects, and the probes that are solved from them.

Ridge, linear discriminant analysis and mass-mean depend on their rows only through sums: counts, sums and products of hidden units by
class, and for Ledoit and Wolf's shrinkage sums of fourth powers. Sums of disjoint sets of rows can be added. So rows may come in any
order and in blocks of any size, from any number of workers, and the sums of every training set of a cross-validation are those of a few
cells. Pure numpy and scipy; never reads, and knows no prompt, fold or scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.typing import Array, Floats

__all__ = [
    "EXACT",
    "ClassSums",
    "Solution",
    "Unit",
    "empty_sums",
    "merge_sums",
    "order_of",
    "scaling_of",
    "solve",
    "unit_of",
]

#: The covariance is shrunk by at least this much, as by `MassMeanClassifier`.
_LEAST_SHRINKAGE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Unit:
    """The units of all sums: ``(activation − origin) / scale`` is about 0 ± 1, so that sums of its powers lose no digits.

    Parameters
    ----------
    origin, scale : ndarray of float64, shape (hidden,)
        About the mean and the standard deviation. Any values give the same solutions; the closer they are, the smaller the rounding error.
    """

    origin: Floats
    scale: Floats

    def apply(self, rows: Array) -> Floats:
        """Rows in these units: float64, a copy."""
        out = rows.astype(np.float64)
        out -= self.origin
        out /= self.scale
        return np.asarray(out)


def unit_of(rows: Array) -> Unit:
    """Mean and standard deviation of some rows, shape (row, hidden), as a unit; hidden units that do not vary get a scale of 1."""
    wide = rows.astype(np.float64)
    scale = wide.std(axis=0)
    scale[(scale == 0) | ~np.isfinite(scale)] = 1
    origin = wide.mean(axis=0)
    origin[~np.isfinite(origin)] = 0
    return Unit(origin, scale)


@dataclass(frozen=True, slots=True)
class ClassSums:
    """Sums over rows for every cell (a set of rows that are always trained on together) and class.

    Parameters
    ----------
    unit : Unit
        That of all sums.
    counts : ndarray of int64, shape (cell, class)
    sums, squares, low, high : ndarray of float64, shape (cell, class, hidden)
        Sum, sum of squares, least and largest value of each hidden unit.
    products : ndarray of float64, shape (cell, class or 1, hidden, hidden), or None
        Σ x xᵀ, the upper triangle only; one matrix for all classes together where no probe needs one for each.
    mixed, fourth : ndarray of float64, shape (cell, class, hidden, hidden), or None
        Σ x² xᵀ, and Σ x² (x²)ᵀ with the upper triangle only, for Ledoit and Wolf's formula.
    """

    unit: Unit
    counts: npt.NDArray[np.int64]
    sums: Floats
    squares: Floats
    low: Floats
    high: Floats
    products: Floats | None = None
    mixed: Floats | None = None
    fourth: Floats | None = None

    def copy(self) -> ClassSums:
        """The same numbers in memory of their own."""
        arrays = {name: getattr(self, name) for name in (*_SUMMED, *_LEAST)}
        copies: dict[str, Any] = {name: None if array is None else array.copy() for name, array in arrays.items()}
        return replace(self, **copies)

    def add(self, rows: Array, cells: Array, classes: Array) -> None:
        """Count more rows, in place.

        Parameters
        ----------
        rows : ndarray of real numbers, shape (row, hidden)
        cells, classes : ndarray of int, shape (row,)
            The cell and the class of each row.
        """
        n_classes = self.counts.shape[1]
        keys = cells.astype(np.int64) * n_classes + classes
        order = np.argsort(keys, kind="stable")
        found, starts = np.unique(keys[order], return_index=True)
        for key, picked in zip(found, np.split(order, starts[1:]), strict=True):
            cell, label = divmod(int(key), n_classes)
            x = self.unit.apply(rows[picked])
            self.counts[cell, label] += len(x)
            self.sums[cell, label] += x.sum(axis=0)
            self.squares[cell, label] += np.einsum("nd,nd->d", x, x)
            np.minimum(self.low[cell, label], x.min(axis=0), out=self.low[cell, label])
            np.maximum(self.high[cell, label], x.max(axis=0), out=self.high[cell, label])
            if self.products is not None:
                _add_product(self.products[cell, label if self.products.shape[1] > 1 else 0], x)
            if self.mixed is not None and self.fourth is not None:
                squared = x**2
                _add_product(self.fourth[cell, label], squared)
                _add_product(self.mixed[cell, label], squared, x)

    def union(self, cells: Iterable[int]) -> ClassSums:
        """The sums over some cells, as those of a single cell."""
        chosen = list(cells)
        added = {name: getattr(self, name) for name in _SUMMED}
        summed: dict[str, Any] = {name: None if array is None else _sum_of(array, chosen) for name, array in added.items()}
        return replace(self, **summed, low=self.low[chosen].min(axis=0, keepdims=True), high=self.high[chosen].max(axis=0, keepdims=True))

    def of_classes(self, classes: Array) -> ClassSums:
        """The sums over the rows of some classes only; products that are kept for all classes together stay as they are."""
        arrays = {name: getattr(self, name) for name in (*_SUMMED, *_LEAST)}
        n_classes = self.counts.shape[1]
        return replace(self, **{name: a[:, classes] for name, a in arrays.items() if a is not None and a.shape[1] == n_classes})


_SUMMED: Final = ("counts", "sums", "squares", "products", "mixed", "fourth")
_LEAST: Final = ("low", "high")


def _sum_of(array: Array, cells: list[int]) -> Array:
    # Cell by cell: array[cells].sum(axis=0) would first copy all of them.
    total: Array = array[cells[0]][None].copy()
    for cell in cells[1:]:
        total += array[cell]
    return total


def _add_product(total: Array, rows: Array, others: Array | None = None) -> None:
    """``total += rowsᵀ others`` in place; without others ``rowsᵀ rows``, of which only the upper triangle is computed."""
    from scipy.linalg.blas import dgemm, dsyrk

    # BLAS is column-major, so it gets transposes, which share the memory; its lower triangle is our upper one.
    if others is None:
        out = dsyrk(1.0, rows.T, beta=1.0, c=total.T, overwrite_c=1, lower=1)
    else:
        out = dgemm(1.0, others.T, rows.T, trans_b=1, beta=1.0, c=total.T, overwrite_c=1)
    if not np.shares_memory(out, total):
        total[...] = out.T


def order_of(probes: Iterable[str]) -> int:
    """Which sums some probes of `EXACT` need: 1 for sums, 2 also for products, 4 also for fourth powers."""
    return max(EXACT[name].order for name in probes)


def empty_sums(unit: Unit, n_cells: int, n_classes: int, order: int) -> ClassSums:
    """Sums over no rows.

    Parameters
    ----------
    unit : Unit
    n_cells, n_classes : int
    order : {1, 2, 4}
        See `order_of`.
    """
    hidden = len(unit.origin)
    shape = (n_cells, n_classes, hidden)
    apart = n_classes if order > 2 else 1
    return ClassSums(
        unit=unit,
        counts=np.zeros((n_cells, n_classes), np.int64),
        sums=np.zeros(shape),
        squares=np.zeros(shape),
        low=np.full(shape, np.inf),
        high=np.full(shape, -np.inf),
        products=np.zeros((n_cells, apart, hidden, hidden)) if order >= 2 else None,
        mixed=np.zeros((*shape, hidden)) if order > 2 else None,
        fourth=np.zeros((*shape, hidden)) if order > 2 else None,
    )


def merge_sums(first: ClassSums, second: ClassSums) -> ClassSums:
    """The sums over the rows of both, in the memory of the first; both are in one unit."""
    for name in _SUMMED:
        mine, theirs = getattr(first, name), getattr(second, name)
        if mine is not None:
            mine += theirs
    np.minimum(first.low, second.low, out=first.low)
    np.maximum(first.high, second.high, out=first.high)
    return first


# -- what is solved from them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Solution:
    """A linear probe in the units of the activations: ``activations @ coef.T + intercept`` is its decision function.

    Parameters
    ----------
    coef : ndarray of float64, shape (1 or class, hidden)
        One for two classes, pointing to the second.
    intercept : ndarray of float64, shape (1 or class,)
    classes : ndarray of int, shape (class,)
        The numbers of the classes that there were rows of.
    """

    coef: Floats
    intercept: Floats
    classes: Array


@dataclass(frozen=True, slots=True)
class _Exact:
    order: int
    solve: Callable[[ClassSums], tuple[Floats, Floats]]


def scaling_of(class_sums: ClassSums) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each hidden unit over the rows of one cell, in the units of the activations; 1 if it does not vary."""
    rows = _Rows(class_sums)
    variance = class_sums.squares[0].sum(axis=0) / rows.n - rows.mean**2
    scale = np.where(rows.constant() | (variance <= 0), 1.0, np.sqrt(np.maximum(variance, 0)) * rows.unit.scale)
    return rows.raw_mean(rows.mean), scale


def solve(probe: str, class_sums: ClassSums) -> Solution:
    """The probe that :func:`~lmprobe_zarr.probes.make_probe` makes under that name, fitted on the rows that were counted.

    Parameters
    ----------
    probe : str
        One of `EXACT`.
    class_sums : ClassSums
        Of a single cell, with rows of at least two classes; classes without rows are left out of the solution.
    """
    classes = np.flatnonzero(class_sums.counts[0])
    if len(classes) < class_sums.counts.shape[1]:
        class_sums = class_sums.of_classes(classes)
    coef, intercept = EXACT[probe].solve(class_sums)
    return Solution(coef, intercept, classes)


class _Rows:
    """Means, deviations and covariances of the rows of one cell, in their unit."""

    def __init__(self, class_sums: ClassSums) -> None:
        self._class_sums = class_sums
        self.unit = class_sums.unit
        self.counts = class_sums.counts[0]
        self.n = int(self.counts.sum())
        self.sums = class_sums.sums[0]
        self.mean = self.sums.sum(axis=0) / self.n
        self.means = self.sums / self.counts[:, None]
        self.low, self.high = class_sums.low[0], class_sums.high[0]

    def product(self, label: int | None = None) -> Floats:
        """Σ x xᵀ of one class or of all, both triangles; memory of its own."""
        products = self._class_sums.products
        assert products is not None  # noqa: S101  (the order that the probe asks for)
        if label is None:
            return _whole(products[0].sum(axis=0) if products.shape[1] > 1 else products[0, 0])
        return _whole(products[0, label])

    def scatter(self, label: int | None = None) -> Floats:
        """Σ (x − mean)(x − mean)ᵀ of one class or of all; memory of its own."""
        n, mean = (self.n, self.mean) if label is None else (int(self.counts[label]), self.means[label])
        scatter = self.product(label)
        scatter -= n * np.outer(mean, mean)
        constant = self.constant(label)
        scatter[constant] = 0
        scatter[:, constant] = 0
        return scatter

    def constant(self, label: int | None = None) -> npt.NDArray[np.bool_]:
        """Which hidden units have the same value in every row; by comparison, because their variance has rounding errors."""
        low, high = (self.low.min(axis=0), self.high.max(axis=0)) if label is None else (self.low[label], self.high[label])
        return np.asarray(low == high)

    def deviation(self, scatter: Floats, label: int | None = None) -> Floats:
        """Standard deviation of each hidden unit, as in `StandardScaler`: 1, in the units of the activations, where it does not vary."""
        variance = np.diag(scatter) / (self.n if label is None else self.counts[label])
        return np.asarray(np.where(variance > 0, np.sqrt(np.maximum(variance, 0)), 1 / self.unit.scale))

    def fourth_power(self, label: int, weights: Floats) -> float:
        """Σ (Σⱼ wⱼ (xⱼ − meanⱼ)²)² over the rows of one class about their mean."""
        class_sums = self._class_sums
        assert class_sums.fourth is not None and class_sums.mixed is not None and class_sums.products is not None  # noqa: S101, PT018
        weighted = weights * self.means[label]
        constant = float(weighted @ self.means[label])
        fourth, mixed, product = class_sums.fourth[0, label], class_sums.mixed[0, label], class_sums.products[0, label]
        total = _quadratic(fourth, weights) - 4 * float(weights @ mixed @ weighted) + 4 * _quadratic(product, weighted)
        total += 2 * constant * float(weights @ np.diag(product)) - 4 * constant * float(weighted @ self.sums[label])
        return total + int(self.counts[label]) * constant**2

    def raw(self, coef: Floats) -> Floats:
        """Coefficients for the activations, from those for rows in their unit."""
        return np.asarray(coef / self.unit.scale)

    def raw_mean(self, mean: Floats) -> Floats:
        """A mean in the units of the activations."""
        return np.asarray(self.unit.origin + self.unit.scale * mean)


def _whole(triangle: Floats) -> Floats:
    """Both triangles of a symmetric matrix of which the upper one is given."""
    whole = np.triu(triangle)
    whole += np.triu(triangle, 1).T
    return np.asarray(whole)


def _quadratic(triangle: Floats, vector: Floats) -> float:
    """vᵀ M v of a symmetric matrix of which the upper triangle is given."""
    upper = np.triu(triangle)
    return 2 * float(vector @ upper @ vector) - float(vector**2 @ np.diag(upper))


def _solve_positive(matrix: Floats, right: Floats) -> Floats:
    """``matrix⁻¹ right`` for a symmetric matrix, which may be overwritten; the solution of least norm where there are several."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq

    try:
        return np.asarray(cho_solve(cho_factor(matrix), right))
    except LinAlgError:
        return np.asarray(lstsq(matrix, right)[0])


def _ridge(class_sums: ClassSums) -> tuple[Floats, Floats]:
    rows = _Rows(class_sums)
    scatter = rows.scatter()
    scale = rows.deviation(scatter)
    n, counts = rows.n, rows.counts
    # Products with labels that are 1 for the class and −1 for the others, of deviations from the mean in standard deviations.
    wanted = [1] if len(counts) == 2 else range(len(counts))
    right = np.stack([2 * rows.sums[k] - n * rows.mean - (2 * counts[k] - n) * rows.mean for k in wanted], axis=1)
    right[rows.constant()] = 0
    right /= scale[:, None]
    scatter /= scale
    scatter /= scale[:, None]
    scatter[np.diag_indices_from(scatter)] += 1.0  # alpha
    coef = rows.raw(_solve_positive(scatter, right).T / scale)
    offsets = np.array([(2 * counts[k] - n) / n for k in wanted])
    return coef, offsets - coef @ rows.raw_mean(rows.mean)


def _lda(class_sums: ClassSums) -> tuple[Floats, Floats]:
    rows = _Rows(class_sums)
    hidden = len(rows.mean)
    priors = rows.counts / rows.n
    covariance = np.zeros((hidden, hidden))
    for label, count in enumerate(rows.counts):
        # As scikit-learn shrinks it: of the class alone, every hidden unit in its standard deviations.
        scatter = rows.scatter(label)
        scale = rows.deviation(scatter, label)
        scatter /= scale
        scatter /= scale[:, None]
        scatter /= count
        weights = np.where(np.diag(scatter) > 0, scale**-2, 0)
        amount, mu = _shrinkage(scatter, rows.fourth_power(label, weights) / count, int(count))
        scatter *= 1 - amount
        scatter[np.diag_indices(hidden)] += amount * mu
        scatter *= priors[label] * scale
        scatter *= scale[:, None]
        covariance += scatter
    if len(rows.counts) == 2:
        coef = rows.raw(_solve_positive(covariance, rows.means[1] - rows.means[0]))[None]
        middle = rows.raw_mean(rows.means.mean(axis=0))
        return coef, -(coef @ middle) + np.log(priors[1] / priors[0])
    # With one score per class the origin matters: without it, all scores would differ from scikit-learn's by a common term.
    absolute = rows.means + rows.unit.origin / rows.unit.scale
    coef = rows.raw(_solve_positive(covariance, absolute.T).T)
    return coef, -0.5 * np.einsum("kd,kd->k", coef, rows.raw_mean(rows.means)) + np.log(priors)


def _shrinkage(covariance: Floats, fourth: float, n: int) -> tuple[float, float]:
    """Ledoit and Wolf's shrinkage, and the mean variance to shrink to.

    Parameters
    ----------
    covariance : ndarray of float64, shape (hidden, hidden)
    fourth : float
        Mean of the squared squared norm of the rows about their mean.
    n : int
        Rows.
    """
    hidden = len(covariance)
    mu = float(np.trace(covariance)) / hidden
    if hidden == 1:
        return 0.0, mu
    squared = float(np.einsum("ij,ij->", covariance, covariance))
    spread = (squared - hidden * mu**2) / hidden
    noise = min((fourth - squared) / (hidden * n), spread)
    return (0.0 if noise == 0 else noise / spread), mu


def _mass_mean(class_sums: ClassSums) -> tuple[Floats, Floats]:
    rows = _Rows(class_sums)
    means = rows.raw_mean(rows.means)
    if len(means) > 2:
        return means, -0.5 * np.einsum("kd,kd->k", means, means)
    coef = (rows.unit.scale * (rows.means[1] - rows.means[0]))[None]
    return coef, -0.5 * coef @ (means[0] + means[1])


def _mass_mean_cov(class_sums: ClassSums) -> tuple[Floats, Floats]:
    rows = _Rows(class_sums)
    hidden = len(rows.mean)
    total = rows.scatter()
    scale = rows.deviation(total)
    varies = np.where(np.diag(total) > 0, scale**-2, 0)
    means = (rows.means - rows.mean) / scale
    directions = means[1:] - means[:1] if len(means) == 2 else means
    product = np.zeros((hidden, hidden))
    fourth = 0.0
    for label in range(len(means)):
        product += rows.scatter(label)
        fourth += rows.fourth_power(label, varies)
    product /= scale
    product /= scale[:, None]
    product /= rows.n
    coef = _shrunk_inverse_times(product, fourth / rows.n, rows.n, directions)
    intercept = -0.5 * coef @ (means[0] + means[1]) if len(means) == 2 else -0.5 * np.einsum("kd,kd->k", means, coef)
    raw = rows.raw(coef / scale)
    return raw, intercept - raw @ rows.raw_mean(rows.mean)


def _shrunk_inverse_times(covariance: Floats, fourth: float, n: int, directions: Floats) -> Floats:
    """As `MassMeanClassifier` has it, from the covariance instead of the rows."""
    hidden = len(covariance)
    variance = float(np.trace(covariance)) / hidden
    if not variance:
        return directions.copy()
    squared = float(np.einsum("ij,ij->", covariance, covariance))
    spread = (squared - hidden * variance**2) / hidden
    noise = (fourth - squared) / (n * hidden)
    amount = 1.0 if spread <= 0 else min(1.0, max(noise / spread, _LEAST_SHRINKAGE))
    if amount == 1:
        return np.asarray(directions / variance)
    covariance *= 1 - amount
    covariance[np.diag_indices(hidden)] += amount * variance
    return _solve_positive(covariance, directions.T).T


#: The named probes that can be solved exactly from sums.
EXACT: Final[dict[str, _Exact]] = {
    "ridge": _Exact(2, _ridge),
    "lda": _Exact(4, _lda),
    "mass_mean": _Exact(1, _mass_mean),
    "mass_mean_cov": _Exact(4, _mass_mean_cov),
}
