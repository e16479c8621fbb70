"""Probes from sums: the same coefficients as the fit in memory, whatever portions the rows come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from lmprobe_zarr.probes import coefficients, make_probe
from lmprobe_zarr.probes import sufficient as sums

N, HIDDEN = 600, 20


def rows(n_classes: int, dtype: str = "float64") -> tuple[Any, Any]:
    """Correlated, heavy-tailed, far off zero, of very different sizes, some units constant, one only within a class."""
    rng = np.random.default_rng(n_classes)
    x = rng.standard_t(4, size=(N, HIDDEN)) @ rng.normal(size=(HIDDEN, HIDDEN)) + 30 * rng.normal(size=HIDDEN)
    y = rng.integers(0, n_classes, N)
    x[:, 0] += 3 * y
    x[:, 3] *= 1e4
    x[:, 7] = 2.5
    x[:, 8] += 1e3
    x[y == 0, 9] = 1.5
    return x.astype(dtype), y


def counted(x: Any, y: Any, cells: Any, portions: int = 1, order: int = 4, unit: Any = None) -> sums.ClassSums:
    unit = sums.unit_of(x[:64]) if unit is None else unit
    total = None
    for part in np.array_split(np.random.default_rng(portions).permutation(len(x)), portions):
        class_sums = sums.empty_sums(unit, int(cells.max()) + 1, int(y.max()) + 1, order)
        class_sums.add(x[part], cells[part], y[part])
        total = class_sums if total is None else sums.merge_sums(total, class_sums)
    assert total is not None
    return total


def near(mine: Any, true: Any, tolerance: float) -> None:
    assert mine.shape == true.shape
    assert np.abs(mine - true).max() <= tolerance * np.abs(true).max()


@pytest.mark.parametrize("name", sums.EXACT)
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_a_probe_from_sums_is_the_named_probe_fitted_in_memory(name: str, n_classes: int, dtype: str, tolerance: float) -> None:
    x, y = rows(n_classes, dtype)
    class_sums = counted(x, y, np.zeros(N, int), portions=5, order=sums.order_of([name]))
    solution = sums.solve(name, class_sums)
    fitted = make_probe(name).fit(x, y)
    coef, _ = coefficients(fitted)
    near(solution.coef, coef[:, 0], tolerance)
    scores = x.astype("float64") @ solution.coef.T + solution.intercept
    near(scores, fitted.decision_function(x).reshape(scores.shape), tolerance)


@pytest.mark.parametrize("name", sums.EXACT)
def test_cells_add_up_to_the_training_sets_of_folds(name: str) -> None:
    x, y = rows(3)
    cells = np.random.default_rng(1).integers(0, 4, N)
    class_sums = counted(x, y, cells, portions=3)
    for left_out in range(4):
        solution = sums.solve(name, class_sums.union([cell for cell in range(4) if cell != left_out]))
        coef, intercept = coefficients(make_probe(name).fit(x[cells != left_out], y[cells != left_out]))
        near(solution.coef, coef[:, 0], 1e-9)
        near(solution.intercept, intercept, 1e-7)


def test_portions_and_their_order_make_no_difference() -> None:
    x, y = rows(2)
    cells = np.arange(N) % 3
    whole, many = counted(x, y, cells), counted(x, y, cells, portions=40)
    assert (whole.counts == many.counts).all()
    for name in ("sums", "squares", "low", "high", "mixed"):
        np.testing.assert_allclose(getattr(many, name), getattr(whole, name), rtol=1e-9, atol=1e-6)
    for name in ("products", "fourth"):
        np.testing.assert_allclose(np.triu(getattr(many, name)), np.triu(getattr(whole, name)), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", sums.EXACT)
def test_the_unit_makes_no_difference_to_what_is_solved(name: str) -> None:
    x, y = rows(2)
    near_by = sums.solve(name, counted(x, y, np.zeros(N, int)))
    rough = sums.Unit(x.mean(axis=0) + 2 * x.std(axis=0), np.maximum(3 * x.std(axis=0), 1e-3))
    near(sums.solve(name, counted(x, y, np.zeros(N, int), unit=rough)).coef, near_by.coef, 1e-8)


@pytest.mark.parametrize("name", sums.EXACT)
def test_a_class_without_rows_is_not_learned(name: str) -> None:
    x, y = rows(3)
    cells = (y == 1).astype(int)
    solution = sums.solve(name, counted(x, y, cells, order=sums.order_of([name])).union([0]))
    assert solution.classes.tolist() == [0, 2]
    coef, _ = coefficients(make_probe(name).fit(x[y != 1], y[y != 1]))
    near(solution.coef, coef[:, 0], 1e-9)


def test_products_are_summed_in_place() -> None:
    x, others = np.random.default_rng(0).normal(size=(2, 50, 7))
    square, mixed = np.ones((2, 7, 7))
    sums._add_product(square, x)
    sums._add_product(mixed, x, others)
    np.testing.assert_allclose(np.triu(square), np.triu(1 + x.T @ x))
    np.testing.assert_allclose(mixed, 1 + x.T @ others)


@pytest.mark.parametrize(
    ("order", "values"),
    [
        (1, 3 * 2 * (4 * 9 + 1)),
        (2, 3 * 2 * (4 * 9 + 1) + 3 * 9 * 9),
        (4, 3 * 2 * (4 * 9 + 1) + 3 * 3 * 2 * 9 * 9),
    ],
)
def test_only_the_sums_that_are_needed_take_memory(order: int, values: int) -> None:
    # 3 cells, 2 classes, 9 hidden units: per cell and class a count and four vectors; then one matrix per cell, or three per class.
    class_sums = sums.empty_sums(sums.Unit(np.zeros(9), np.ones(9)), 3, 2, order)
    arrays = [getattr(class_sums, name) for name in (*sums._SUMMED, *sums._LEAST)]
    assert sum(array.nbytes for array in arrays if array is not None) == 8 * values


def test_the_scaling_is_that_of_the_standard_scaler() -> None:
    x, y = rows(2)
    mean, scale = sums.scaling_of(counted(x, y, np.zeros(N, int), order=1))
    scaler = StandardScaler().fit(x)
    np.testing.assert_allclose(mean, scaler.mean_)
    np.testing.assert_allclose(scale, scaler.scale_)


def test_a_single_hidden_unit_is_solved() -> None:
    x, y = rows(2)
    for name in sums.EXACT:
        coef, _ = coefficients(make_probe(name).fit(x[:, :1], y))
        near(sums.solve(name, counted(x[:, :1], y, np.zeros(N, int))).coef, coef[:, 0], 1e-9)
