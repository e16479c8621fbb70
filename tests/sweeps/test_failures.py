"""A fit that fails is NaN with its reason, and ends nothing else, whatever call it is part of; ridge of a transfer is that of float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes import solve
from lmprobe_zarr.sweeps.token_results import TokenResult, as_objects, failed_result, mean_results

Array = npt.NDArray[Any]


class Fragile(LogisticRegression):  # type: ignore[misc]
    """Raises on rows of huge values."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Fragile:  # noqa: N803
        if np.abs(X).max() > 1e6:
            raise np.linalg.LinAlgError("SVD did not converge")
        super().fit(X, y, sample_weight)
        return self


def prompts(n: int = 40, hidden: int = 6, *, start: int = 0) -> xr.DataArray:
    """Two layers, the second of huge values."""
    rng = np.random.default_rng(start)
    y = np.arange(n) % 2
    x = rng.normal(size=(2, n, hidden))
    x[:, :, 0] += 2 * y
    x[1] *= 1e8
    coords = {"layer": [3, 5], "prompt": [f"p{start + i}" for i in range(n)], "label": ("prompt", y)}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


def tokens(scale: float) -> xr.DataArray:
    """Two layers of tokens, the second of values times `scale`."""
    array = prompts().rename(prompt="token")
    array = array.drop_vars("token").assign_coords(
        prompt=("token", [f"p{i}" for i in range(40)]), position=("token", np.zeros(40, int)), layer=[3, 5]
    )
    return array * xr.DataArray([1.0, scale], dims="layer")


CALLS: dict[str, Callable[[], xr.Dataset]] = {
    "sweep": lambda: lz.sweep(prompts(), "label", {"fragile": Fragile()}, 2).accuracy.to_dataset(name="accuracy"),
    "sweep_transfer": lambda: lz.sweep_transfer({"a": prompts(), "b": prompts(start=100)}, "label", {"fragile": Fragile()}, 2),
    "fit_directions": lambda: lz.fit_directions(prompts(), "label", Fragile()),
    "sweep_tokens, lda": lambda: lz.sweep_tokens(tokens(1e200), "label", "lda", 2),
    "sweep_tokens, sgd": lambda: lz.sweep_tokens(tokens(1e200), "label", ["sgd"], 2),
    "fit_tokens": lambda: lz.fit_tokens(tokens(1e200), "label", "ridge"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("call", CALLS)
def test_a_layer_that_cannot_be_fitted_is_nan_with_its_reason_and_the_others_are_kept(call: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = CALLS[call]()
    values = found["coef" if "coef" in found else "accuracy"]
    assert np.isfinite(values.sel(layer=3)).all()
    failed = [each for each in caught if issubclass(each.category, FitFailedWarning)]
    if np.isnan(values.sel(layer=5)).all():
        assert len(failed) == 1
        assert "failed" in str(values.attrs["nan_reasons"])
    else:
        # Sums are in the units of the rows themselves, so that huge ones are fitted like others.
        assert "tokens" in call
        assert np.isfinite(values.sel(layer=5)).all()
        assert not failed


@pytest.mark.few(1)
@pytest.mark.parametrize("probe", ["ridge", "lda", "mass_mean_cov"])
def test_a_solver_that_does_not_converge_on_one_layer_loses_no_other(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str, class_sums: Any) -> Any:
        if class_sums.unit.scale.max() > 1e6:
            raise np.linalg.LinAlgError("SVD did not converge in Linear Least Squares")
        return solve(name, class_sums)

    monkeypatch.setattr("lmprobe_zarr.sweeps.token_stream.solve", breaks)
    with pytest.warns(FitFailedWarning, match=r"2 of 4 scores are NaN because their fits failed .*SVD did not converge"):
        scores = lz.sweep_tokens(tokens(1.0), "label", probe, 2, predictions=True, scheduler="synchronous")
    assert np.isfinite(scores.accuracy.sel(layer=3)).all()
    assert np.isnan(scores.accuracy.sel(layer=5)).all()
    for measure in ("accuracy", "auroc"):
        assert "SVD did not converge" in str(scores[measure].attrs["nan_reasons"])
    assert (scores.predicted.sel(layer=5) == -1).all()
    with pytest.warns(FitFailedWarning, match=r"1 of 2 layers, which are NaN \(layer 5: LinAlgError: SVD"):
        found = lz.fit_tokens(tokens(1.0), "label", probe, scheduler="synchronous")
    assert np.isfinite(found.coef.sel(layer=3)).all()
    assert np.isnan(found.coef.sel(layer=5)).all()
    with pytest.raises(InvalidArgumentError, match="fits failed"):
        lz.sweep_tokens(tokens(1.0).sel(layer=[5]), "label", probe, 2, scheduler="synchronous")


def test_what_fails_everywhere_is_an_error_that_says_why() -> None:
    calls: tuple[Callable[[], xr.Dataset], ...] = (
        lambda: lz.sweep(prompts().sel(layer=[5]), "label", Fragile(), 2),
        lambda: lz.sweep_transfer({"a": prompts().sel(layer=[5]), "b": prompts(start=100).sel(layer=[5])}, "label", {"f": Fragile()}, 2),
        lambda: lz.fit_directions(prompts().sel(layer=[5]), "label", Fragile()),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="SVD did not converge"):
            call()


def test_a_transfer_of_ridge_is_that_of_float64_for_units_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    sets, wide = {}, []
    for name in ("a", "b"):
        y = rng.integers(0, 2, 80)
        x = (300 * (rng.normal(size=(80, 100)) + 0.2 * y[:, None]) + 1e4).astype("f4")
        coords = {"layer": [0], "prompt": [f"{name}{i}" for i in range(80)], "label": ("prompt", y)}
        sets[name] = xr.DataArray(x[None], dims=("layer", "prompt", "hidden"), coords=coords)
        wide.append((x.astype("f8"), y))
    scores = lz.sweep_transfer(sets, "label", "ridge", 2).isel(layer=0, probe=0)
    for i, j in ((0, 1), (1, 0)):
        plain = make_pipeline(StandardScaler(), RidgeClassifier(solver="svd")).fit(*wide[i])
        assert float(scores.auroc[i, j]) == pytest.approx(roc_auc_score(wide[j][1], plain.decision_function(wide[j][0])), abs=1e-9)
        assert float(scores.accuracy[i, j]) == pytest.approx(plain.score(*wide[j]), abs=1e-9)


@pytest.mark.parametrize("probe", ["logistic_regression", "ridge_regression", "own"])  # the first is the default, which is a ridge here
def test_directions_of_targets_far_from_zero_are_those_of_float64(probe: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype("f4")
    y = 1.7e9 + np.round(3600 * (x[:, 0] + 0.3 * rng.normal(size=60)))
    coords = {"layer": [0], "prompt": [f"p{i}" for i in range(60)], "year": ("prompt", y)}
    array = xr.DataArray(x[None], dims=("layer", "prompt", "hidden"), coords=coords)
    found = lz.fit_directions(array, "year", LinearRegression() if probe == "own" else probe, task="regression").isel(layer=0)
    plain = LinearRegression() if probe == "own" else make_pipeline(StandardScaler(), Ridge(solver="svd"))
    expected = plain.fit(x.astype("f8"), y - 1.7e9).predict(x.astype("f8"))
    predicted = x.astype("f8") @ found.coef.values + (float(found.intercept) - 1.7e9)
    np.testing.assert_allclose(predicted, expected, atol=1e-4)


def test_a_shuffle_of_tokens_that_cannot_be_fitted_is_left_out_of_their_mean() -> None:
    good = [TokenResult(share, area, "", 1.0, True) for share, area in ((0.5, 0.4), (0.7, 0.6))]
    results = as_objects([good[0], failed_result("LinAlgError: singular", 1.0), good[1]]).reshape(3, 1, 1)
    mean = mean_results(results)[0, 0]
    assert (mean.accuracy, mean.auroc, mean.reason, mean.seconds) == (pytest.approx(0.6), pytest.approx(0.5), "", 3.0)
    nothing = mean_results(as_objects([failed_result("LinAlgError: singular", 1.0)] * 2).reshape(2, 1, 1))[0, 0]
    assert np.isnan([nothing.accuracy, nothing.auroc]).all()
    assert "LinAlgError: singular" in nothing.reason
