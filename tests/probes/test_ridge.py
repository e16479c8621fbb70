"""Ridge and regressions are those of scikit-learn in float64, in every call that fits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Lasso, LinearRegression, Ridge, RidgeClassifier
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVR

import lmprobe_zarr as lz
from lmprobe_zarr.probes import evaluate_regression
from lmprobe_zarr.probes.metrics import Outcome, measure_outcome, parse_metrics
from lmprobe_zarr.probes.ridge import needs_float64

Array = npt.NDArray[Any]
STRENGTHS = (1e-12, 1e-4, 1.0, 1e12)


def activations(rows: Array, **columns: Any) -> xr.DataArray:
    coords = {"layer": [0], "prompt": [f"p{i}" for i in range(len(rows))], **{name: ("prompt", values) for name, values in columns.items()}}
    return xr.DataArray(rows[None], dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


def matrices(n: int, hidden: int) -> Iterator[tuple[str, Array, Array]]:
    """Name, rows and classes of matrices of every kind of rank and size."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    x = rng.normal(size=(n, hidden))
    x[:, 0] += y
    yield "plain", x, y
    yield "three classes", x, rng.integers(0, 3, n)
    yield "much in common", np.sqrt(0.95) * rng.normal(size=(n, 1)) * rng.choice([-1, 1], hidden) + np.sqrt(0.05) * x, y
    yield "of size 300 with an offset of 1e4", 300 * x + 1e4, y
    odd = x.copy()
    odd[:, 3], odd[:, 4], odd[:, 5] = 7, 0, odd[:, 6]
    yield "constant and equal units", odd, y
    yield "rows twice", np.concatenate([x[: n // 2]] * 2), np.concatenate([y[: n // 2]] * 2)


@pytest.mark.few(1)
@pytest.mark.parametrize("shape", [(50, 120), (120, 40), (60, 60)], ids=str)
def test_directions_and_probes_are_ridges_of_float64_for_every_rank_and_strength(shape: tuple[int, int]) -> None:
    for name, rows, y in matrices(*shape):
        x = rows.astype("f4")
        wide = x.astype("f8")
        for alpha in STRENGTHS:
            expected = make_pipeline(StandardScaler(), RidgeClassifier(alpha=alpha, solver="svd")).fit(wide, y).decision_function(wide)
            size = np.abs(expected).max()
            found = lz.fit_directions(activations(x, y=y), "y", "ridge", strength=alpha).isel(layer=0)
            scores = wide @ found.coef.values.T + found.intercept.values
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-7 * size, err_msg=f"{name}, {alpha}")
            probe = lz.Probe(classifier="ridge", classifier_kwargs={"alpha": alpha}).fit_from_activations(x, y)
            np.testing.assert_allclose(probe.decision_function(x), expected, rtol=0, atol=1e-7 * size, err_msg=f"{name}, {alpha}")


def test_weights_of_classes_and_rows_and_other_options_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(80, 30)) + 5).astype("f4")
    y = (rng.random(80) < 0.2).astype(int)
    weights = rng.random(80) + 0.1
    for options in (
        {"class_weight": "balanced"},
        {"class_weight": {0: 1.0, 1: 7.0}},
        {"fit_intercept": False},
        {"solver": "lsqr", "tol": 1e-12},
    ):
        for sample_weight in (None, weights):
            probe = lz.Probe(classifier="ridge", classifier_kwargs=options)
            probe.fit_from_activations(x, y, sample_weight=sample_weight)
            plain = make_pipeline(StandardScaler(), RidgeClassifier(**{"solver": "svd", **options}))
            plain.fit(x.astype("f8"), y, ridgeclassifier__sample_weight=sample_weight)
            np.testing.assert_allclose(probe.decision_function(x), plain.decision_function(x.astype("f8")), atol=1e-6)
            np.testing.assert_array_equal(probe.classes_, plain.classes_)


def targets(base: Array) -> dict[str, Array]:
    return {
        "small beside 1e9": 1e9 + np.round(base * 2**10) / 2**10,
        "seconds": 1.7e9 + np.round(base * 3600),
        "whole numbers": np.round(base * 1e6).astype("i8") + 10**12,
        "1e-9": base * 1e-9,
        "1e-40": base * 1e-40,
        "1e-200": base * 1e-200,
        "1e200": base * 1e200,
        "float16": base.astype("f2"),
    }


REGRESSORS = {
    "ridge_regression": make_pipeline(StandardScaler(), Ridge(solver="svd")),
    "lasso": make_pipeline(StandardScaler(), Lasso(alpha=0.1, max_iter=10_000)),
    "svr": make_pipeline(
        StandardScaler(), LinearSVR(loss="squared_epsilon_insensitive", dual=False, epsilon=0.1, tol=1e-3, max_iter=10_000)
    ),
    "own ridge": make_pipeline(StandardScaler(), Ridge(alpha=2)),
    "least squares": LinearRegression(),
    "neighbours": KNeighborsRegressor(3),
    "majority": DummyRegressor(),
}


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")  # residuals of scipy, which nobody uses
@pytest.mark.parametrize("name", targets(np.ones(1)))
def test_a_regression_scores_as_in_float64_whatever_the_size_of_its_targets(name: str) -> None:
    rng = np.random.default_rng(2)
    x = (3 * rng.normal(size=(150, 20)) + 100).astype("f4")
    y = targets((x - 100) @ rng.normal(size=20) / 8 + 0.3 * rng.normal(size=150))[name]
    places = np.arange(150)
    folds = [(places[places % 3 != fold], places[places % 3 == fold]) for fold in range(3)]
    own = {probe: estimator for probe, estimator in REGRESSORS.items() if " " in probe or probe == "neighbours"}
    probes = {"ridge_regression": "ridge_regression", "lasso": "lasso", "svr": "svr", **own}
    scores = lz.sweep(activations(x, y=y), "y", probes, folds, task="regression", controls="majority", predictions=True).isel(layer=0)
    assert "nan_reasons" not in scores.r2.attrs
    wide, exact = x.astype("f8"), y.astype("f8")
    for probe, estimator in REGRESSORS.items():
        for fold, (train, test) in enumerate(folds):
            # Fitted where no number is large or small, which float64 represents without loss here.
            size = np.abs(exact[train] - exact[train].mean()).max()
            unit = size * ((exact[train] - exact[train].mean()) / size).std()
            relative = (exact - exact[train].mean()) / unit
            predicted = estimator.fit(wide[train], relative[train]).predict(wide[test])
            at = {"probe": probe, "fold": fold}
            assert float(scores.r2.sel(at)) == pytest.approx(r2_score(relative[test], predicted), abs=1e-5), probe
            assert float(scores.mae.sel(at)) / unit == pytest.approx(mean_absolute_error(relative[test], predicted), abs=1e-5), probe
    found = lz.Probe(task="regression").fit_from_activations(x, y).score_from_activations(x, y)
    relative = (exact - exact.mean()) / unit
    assert found == pytest.approx(REGRESSORS["ridge_regression"].fit(wide, relative).score(wide, relative), abs=1e-6)
    intervals = lz.confidence_intervals(scores.expand_dims("layer"), n_resamples=30)
    assert np.isfinite(intervals.r2_lower if "r2_lower" in intervals else intervals.r2).all()


def test_targets_that_float32_holds_are_fitted_in_float32() -> None:
    rng = np.random.default_rng(0)
    for values, expected in ((rng.normal(size=50), False), (2000 + rng.integers(0, 20, 50), False), (1e9 + rng.normal(size=50), True)):
        assert needs_float64(values) is expected
    for scale in (1e-9, 1e-40, 1e20):
        assert needs_float64(rng.normal(size=50) * scale)


def test_r2_of_a_resample_of_equal_targets_is_undefined_and_not_huge() -> None:
    (metric,) = parse_metrics("r2", "regression")
    true = np.array([0.1, 0.1, 0.1, 0.7])
    outcome = Outcome(true, np.array([0.2, 0.0, 0.1, 0.6]))
    found = measure_outcome(metric, outcome, np.array([[3.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]))
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx(r2_score(true, outcome.predicted))


def test_predictions_that_are_not_finite_have_no_score_and_the_reason() -> None:
    class Broken(LinearRegression):  # type: ignore[misc]
        def predict(self, X: Any) -> Array:  # noqa: N803
            found = super().predict(X)
            found[0] = np.inf
            return np.asarray(found)

    rng = np.random.default_rng(0)
    array = activations(rng.normal(size=(30, 3)), y=rng.normal(size=30))
    scores = lz.sweep(array, "y", {"broken": Broken(), "ridge_regression": "ridge_regression"}, 3, task="regression")
    assert np.isnan(scores.r2.sel(probe="broken")).all()
    assert "broken: the estimator's scores are not finite" in scores.r2.attrs["nan_reasons"]
    assert np.isfinite(scores.r2.sel(probe="ridge_regression")).all()


def test_an_evaluation_of_huge_and_tiny_targets_is_that_of_usual_ones() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=20)
    predicted = true + 0.1 * rng.normal(size=20)
    for scale in (2.0**-600, 2.0**600):
        assert evaluate_regression(predicted * scale, true * scale)["r2"] == pytest.approx(r2_score(true, predicted), rel=1e-12)
