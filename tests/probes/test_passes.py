"""Logistic regression from passes over the rows, against scikit-learn's in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lmprobe_zarr.probes import passes
from lmprobe_zarr.probes.passes import PassDescent, Point, Seen, leading_directions, look
from lmprobe_zarr.typing import Array, Floats


def fit(rows: Floats, codes: Array, penalty: float, n_classes: int = 2) -> PassDescent:
    width = 1 if n_classes == 2 else n_classes
    descent = PassDescent(len(rows), width, rows.shape[1], penalty, leading_directions(rows))
    while not descent.ended:
        point = Point(descent.coef, descent.intercept, np.arange(n_classes))
        # In two pieces, whose sums are added.
        descent.enter(look(rows[::2], codes[::2], point) + look(rows[1::2], codes[1::2], point))
    return descent


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_coefficients_are_those_of_scikit_learn(penalty: float, n_classes: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((400, 30)) * (1 + np.arange(30)) ** -0.7) @ np.linalg.qr(rng.standard_normal((30, 30)))[0]
    rows = (rows - rows.mean(0)) / rows.std(0)
    codes = (rows @ rng.standard_normal((30, n_classes)) + 4 * rng.standard_normal((400, n_classes))).argmax(axis=1)
    expected = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-10, max_iter=500).fit(rows, codes)
    found = fit(rows, codes, penalty, n_classes)
    assert found.converged
    assert found.passes < 80
    largest = max(1.0, float(np.abs(expected.coef_).max()))
    np.testing.assert_allclose(found.coef, expected.coef_, atol=1e-4 * largest)
    np.testing.assert_allclose(found.intercept, expected.intercept_ - (n_classes > 2) * expected.intercept_.mean(), atol=1e-3)


def test_sums_are_those_of_a_loop_over_rows() -> None:
    rng = np.random.default_rng(1)
    rows, codes = rng.standard_normal((7, 3)), np.array([0, 2, 2, 0, 0, 2, 0])
    for point in (
        Point(rng.standard_normal((1, 3)), np.array([0.3]), np.array([0, 2])),
        Point(rng.standard_normal((3, 3)), np.array([0.3, 0, -1]), np.array([0, 1, 2])),
    ):
        loss, gradient, slope = 0.0, np.zeros_like(point.coef), np.zeros(len(point.coef))
        for row, code in zip(rows, codes, strict=True):
            scores = point.coef @ row + point.intercept
            if len(scores) == 1:
                scores = np.array([0, scores[0]])
            chances = np.exp(scores) / np.exp(scores).sum()
            hit = (point.classes == code).astype(float)
            loss -= np.log(chances @ hit)
            wrong = (chances - hit)[-len(slope) :]
            gradient += wrong[:, None] * row
            slope += wrong
        seen = look(rows, codes, point)
        assert seen.loss == pytest.approx(loss)
        np.testing.assert_allclose(seen.gradient, gradient)
        np.testing.assert_allclose(seen.slope, slope)


def test_a_fit_that_gets_no_further_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows, codes = rng.standard_normal((50, 20)), rng.integers(0, 2, 50)
    monkeypatch.setattr(passes, "_MOST_PASSES", 4)
    found = fit(rows, codes, 0.01)
    assert found.ended
    assert not found.converged
    assert found.passes == 4


def test_a_loss_that_is_not_finite_is_a_problem() -> None:
    descent = PassDescent(10, 1, 2, 1.0, leading_directions(np.random.default_rng(0).standard_normal((10, 2))))
    nothing: Any = np.full((1, 2), np.nan)
    descent.enter(Seen(np.nan, nothing, nothing[:, 0], nothing[:, 0]))
    assert descent.ended
    assert descent.problem == "the loss is not finite"
