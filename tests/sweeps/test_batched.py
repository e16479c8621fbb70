"""Sweeps whose fits are solved in bulk give the scores of sweeps that fit one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LabelError

pytest.importorskip("torch")

from lmprobe_zarr.probes import batched, bulk_logistic, fit

pytestmark = pytest.mark.model
N, HIDDEN, LAYERS = 90, 12, 3


@pytest.fixture(scope="module")
def array() -> xr.DataArray:
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2
    x = rng.standard_normal((LAYERS, N, HIDDEN)) + 0.5 * np.arange(LAYERS)[:, None, None] * y[:, None] * np.eye(HIDDEN)[0]
    coords = {
        "layer": np.arange(LAYERS),
        "prompt": [lz.prompt_hash(f"prompt {i}") for i in range(N)],
        "label": ("prompt", y),
        "other": ("prompt", rng.integers(0, 2, N)),
        "third": ("prompt", rng.integers(0, 3, N)),
        "number": ("prompt", rng.standard_normal(N)),
    }
    return xr.DataArray(x.astype("float32"), dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


def same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Every variable but times, and every attribute but what names the solver."""
    assert found.attrs["solver"] == "batched"
    for name in expected.data_vars:
        if name != "fit_seconds":
            xr.testing.assert_allclose(found[name].drop_attrs(), expected[name].drop_attrs(), atol=1e-6)
    assert {key: value for key, value in found.attrs.items() if key not in ("solver", "device")} == dict(expected.attrs)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {"probes": ["ridge", "mass_mean", "svm"], "labels": "label", "predictions": True},
        {"probes": "ridge", "labels": "third", "strengths": (0.1, 10.0), "repeats": 2},
        {"probes": ["ridge", "mass_mean"], "labels": ["label", "other"], "seeds": 2},
        {"probes": "ridge", "labels": "label", "strengths": (0.1, 1000.0), "choose": "strength", "inner_cv": 3},
        {"probes": ["ridge", "mass_mean"], "labels": "label", "choose": ["layer", "probe"], "inner_cv": 3},
        {"probes": "ridge", "labels": "label", "controls": ["shuffled_labels", "layer_0", "random_direction", "majority"], "seeds": [3, 4]},
        {"probes": "ridge", "labels": "label", "controls": {"shuffled_labels": 4}, "strengths": (0.1, 10.0)},
        {"probes": "ridge", "labels": "label", "controls": {"shuffled_labels": 3}, "strengths": (0.1, 10.0), "choose": "strength"},
        {"probes": "ridge", "labels": "label", "controls": "shuffled_labels", "strengths": (0.1, 10.0), "choose": "strength"},
        {"probes": "ridge_regression", "labels": "number", "task": "regression", "strengths": (0.1, 10.0)},
    ],
    ids=lambda options: ", ".join(sorted(set(options) - {"labels"})),
)
def test_exact_probes_have_the_same_scores_whatever_is_asked_for(
    array: xr.DataArray, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lz.sweep(array, **options)
    same(lz.sweep(array, solver="batched", **options), expected)
    # As on a GPU.
    monkeypatch.setattr(fit, "_RIDGES_BY_GRAM", False)
    same(lz.sweep(array, solver="batched", **options), expected)


def test_logistic_regression_has_the_scores_of_its_optimum(array: xr.DataArray) -> None:
    found = lz.sweep(array, "label", strengths=(0.1, 1, 10), predictions=True, metrics=["accuracy", "auroc", "log_loss"], solver="batched")
    for strength in (0.1, 1, 10):
        converged = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-10, max_iter=500)
        expected = lz.sweep(
            array.astype("float64"), "label", {"logistic_regression": make_pipeline(StandardScaler(), converged)}, predictions=True,
            metrics=["accuracy", "auroc", "log_loss"],
        )  # fmt: skip
        at = found.sel(strength=strength)
        np.testing.assert_allclose(at.score, expected.score, atol=2e-3)
        # No decision is that close to zero here, so there are no ties.
        assert float(np.abs(expected.score).min()) > 2e-3 or strength != 1
        np.testing.assert_array_equal(at.accuracy, expected.accuracy)
        np.testing.assert_allclose(at.log_loss, expected.log_loss, atol=1e-4)
    assert found.converged.all()


def test_a_fold_of_one_class_is_refused_as_ever(array: xr.DataArray) -> None:
    folds = [(np.arange(0, 40), np.arange(40, 90)), (np.arange(20, 90), np.arange(0, 20))]
    for solver in ("scikit-learn", "batched"):
        with pytest.raises(LabelError, match="fold 0 trains on 40 prompts that all are 0"):
            lz.sweep(array, np.repeat([0, 1], N // 2), cv=folds, solver=solver)


def test_what_the_batch_cannot_solve_is_fitted_one_by_one(array: xr.DataArray, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lz.sweep(array, "label", "ridge")
    monkeypatch.setattr(fit, "_RIDGES_BY_GRAM", False)
    # A penalty that float64 cannot add to the largest eigenvalue.
    monkeypatch.setattr(batched, "_LEAST_PENALTY", 1.0)
    same(lz.sweep(array, "label", "ridge", solver="batched"), expected)


@pytest.mark.long
def test_every_scheduler_gives_the_same_bits(array: xr.DataArray) -> None:
    scores = [
        lz.sweep(array, "label", strengths=(0.1, 10), solver="batched", scheduler=scheduler, n_workers=workers, predictions=True)
        for scheduler, workers in (("threads", 2), ("synchronous", None), ("processes", 2))
    ]
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0].score, other.score)


def test_an_interrupted_sweep_of_the_other_solver_is_refused(array: xr.DataArray, tmp_path: Path) -> None:
    lz.sweep(array, "label", "ridge", out=tmp_path / "scores")
    with pytest.raises(InvalidArgumentError, match="solver"):
        lz.sweep(array, "label", "ridge", out=tmp_path / "scores", solver="batched")
    first = lz.sweep(array, "label", "ridge", out=tmp_path / "bulk", solver="batched")
    again = lz.sweep(array, "label", "ridge", out=tmp_path / "bulk", solver="batched")
    np.testing.assert_array_equal(first.accuracy, again.accuracy)


def test_fits_that_do_not_converge_are_counted(array: xr.DataArray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_logistic, "_MOST_ITERATIONS", 2)
    with pytest.warns(ConvergenceWarning):
        found = lz.sweep(array, "label", strengths=[0.001], solver="batched")
    assert not found.converged.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "newton"}, "solver='newton' is unknown: use 'scikit-learn' or 'batched'"),
        ({"solver": None}, "solver=None is unknown"),
        ({"device": "cpu"}, "device='cpu' is where solver='batched' solves"),
        ({"solver": "batched", "probes": ["svm", LogisticRegression()]}, "the probes are 'svm', LogisticRegression: give one of these"),
        ({"solver": "batched", "preprocessing": "standard"}, "solver='batched' standardises by itself"),
        ({"solver": "batched", "device": "cuda:99"}, "device='cuda:99' cannot be used here: there is cpu"),
        ({"solver": "batched", "device": "somewhere"}, "device='somewhere' cannot be used here"),
    ],
)
def test_what_cannot_be_solved_in_bulk_is_refused_before_anything_is_read(array: xr.DataArray, options: dict[str, Any], words: str) -> None:
    for call in (lz.sweep, lz.plan_sweep):
        with pytest.raises(InvalidArgumentError, match=words.replace("(", r"\(")):
            call(array, "label", **options)
