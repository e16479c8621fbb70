"""Ridge over folds and strengths against scikit-learn's plain fits in float64."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes.gram import RidgeTarget, solve_ridge

STRENGTHS = (1e-12, 1e-6, 0.01, 1, 100, 1e6)


def rows(n: int, hidden: int, share: float, offset: float = 0.0, *, dtype: str = "float32") -> tuple[Any, Any]:
    """Units that have `share` of their variance in common, two that are equal, and one that is constant."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(n) % 2)
    x = np.sqrt(share) * rng.normal(size=(n, 1)) * rng.choice([-1, 1], hidden) + np.sqrt(1 - share) * rng.normal(size=(n, hidden))
    x[:, 0] += 0.5 * y
    x[:, -1], x[:, -2] = 3.3, x[:, -3]
    return (x + offset).astype(dtype), y


def scores_of(solved: Any) -> Any:
    assert solved.outcome.scores is not None
    return solved.outcome.scores


def plain(x: Any, y: Any, train: Any, test: Any, alpha: float, kind: Any = RidgeClassifier) -> Any:
    fitted = make_pipeline(StandardScaler(), kind(alpha=alpha, solver="svd")).fit(x[train].astype("f8"), y[train])
    return fitted.predict(x[test].astype("f8")) if kind is Ridge else fitted.decision_function(x[test].astype("f8"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "hidden", "share", "offset", "dtype"),
    [
        (60, 150, 0.0, 0, "float32"),
        (60, 150, 0.95, 100, "float32"),
        (150, 60, 0.6, 0, "float32"),
        (150, 60, 0.999999, 50, "float32"),
        (150, 60, 0.95, 1000, "float64"),
        (150, 60, 0.3, 0, "float16"),
        (75, 60, 0.5, 0, "float32"),
    ],
)
def test_scores_are_those_of_float64_for_every_rank_and_strength(n: int, hidden: int, share: float, offset: float, dtype: str) -> None:
    x, y = rows(n, hidden, share, offset, dtype=dtype)
    folds = list(StratifiedKFold(4, shuffle=True, random_state=0).split(x, y))
    found = solve_ridge(x.astype("f4") if dtype == "float16" else x, folds, [RidgeTarget(y, np.array([0, 1]))], STRENGTHS)
    for (train, test), of_fold in zip(folds, found, strict=True):
        for alpha, (solved,) in zip(STRENGTHS, of_fold, strict=True):
            expected = plain(x, y, train, test, alpha)
            np.testing.assert_allclose(scores_of(solved), expected, rtol=0, atol=1e-7 * np.abs(expected).max())
            assert abs(roc_auc_score(y[test], scores_of(solved)) - roc_auc_score(y[test], expected)) < 1e-6
            assert abs(np.mean(solved.outcome.predicted == y[test]) - np.mean((expected > 0) == y[test])) < 1e-6


def test_repeated_rows_and_several_targets_at_once_are_those_of_single_fits() -> None:
    x, y = rows(90, 30, 0.5)
    x[60:] = x[:30]
    three, number = np.arange(90) * 7 % 3, 1.7e9 + np.arange(90) * 0.5
    train, test = np.r_[0:70, 5:15], np.arange(70, 90)  # ten rows are trained on twice
    targets = [RidgeTarget(y, np.array([0, 1])), RidgeTarget(three, np.arange(3)), RidgeTarget(number, None)]
    for train_rows in (train, train[:20]):
        ((_, one),) = (solve_ridge(x, [(train_rows, test)], targets, (0.01, 1))[0],)
        np.testing.assert_allclose(scores_of(one[0]), plain(x, y, train_rows, test, 1), atol=1e-8)
        np.testing.assert_allclose(scores_of(one[1]), plain(x, three, train_rows, test, 1), atol=1e-8)
        expected = plain(x, number, train_rows, test, 1, Ridge)
        np.testing.assert_allclose(one[2].outcome.predicted - 1.7e9, expected - 1.7e9, atol=1e-5)


def array_of(x: Any, y: Any) -> xr.DataArray:
    coords = {"layer": range(len(x)), "prompt": [f"p{i}" for i in range(x.shape[1])], "label": ("prompt", y)}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords)


@pytest.mark.few(1)
@pytest.mark.parametrize(("n", "hidden"), [(70, 100), (130, 100)])
def test_a_sweep_over_small_strengths_of_units_that_have_much_in_common_has_the_right_scores(n: int, hidden: int) -> None:
    x, y = rows(n, hidden, 0.95)
    each: list[dict[str, Any]] = [{}, {"inner_cv": 3, "choose_by": "auroc"}]
    for options in each:
        found = lz.sweep(array_of(x[None], y), "label", "ridge", strengths=(1e-6, 0.01, 1), **options)
        for fold, (train, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y)):
            for place, alpha in enumerate((1e-6, 0.01, 1) if not options else (float(found.chosen_strength.values.ravel()[fold]),)):
                area = roc_auc_score(y[test], plain(x, y, train, test, alpha))
                assert abs(found.auroc.isel(fold=fold).values.ravel()[place] - area) < 1e-6


class Fragile(LogisticRegression):  # type: ignore[misc]
    """Cannot be fitted on large values."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
        if X.mean() > 1:
            raise np.linalg.LinAlgError("Matrix is singular")
        return super().fit(X, y, sample_weight)


def test_a_fit_that_fails_is_nan_with_its_reason_and_the_sweep_goes_on() -> None:
    x = np.stack([rows(40, 5, 0.3)[0], 10 + rows(40, 5, 0.3)[0]])
    array = array_of(x, rows(40, 5, 0.3)[1])
    array[0, :, -1] = 0
    with pytest.warns(FitFailedWarning, match="5 of 20 scores are NaN.*fragile on layer 1: LinAlgError: Matrix is singular"):
        found = lz.sweep(array, "label", {"fragile": Fragile(), "ridge": "ridge"}, predictions=True)
    assert np.isnan(found.accuracy.sel(probe="fragile", layer=1)).all()
    assert found.accuracy.sel(probe="ridge").notnull().all()
    assert found.accuracy.sel(layer=0).notnull().all()
    assert json.loads(found.accuracy.attrs["nan_reasons"]) == ["fragile: the fit failed (LinAlgError: Matrix is singular)"]
    intervals = lz.confidence_intervals(found, n_resamples=20)
    assert np.isnan(intervals.accuracy.sel(probe="fragile", layer=1)).all()


def test_a_probe_that_can_never_be_fitted_is_an_error() -> None:
    x, y = rows(40, 5, 0.3)
    with warnings.catch_warnings(), pytest.raises(InvalidArgumentError, match="5 of 5 scores are NaN because their fits failed"):
        lz.sweep(array_of(10 + x[None], y), "label", {"fragile": Fragile()})
