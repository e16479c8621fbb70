"""Directions of linear probes, in the units of the activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import make_probe

N, HIDDEN = 400, 12
Y = np.arange(N) % 2
TRUE = np.random.default_rng(7).normal(size=HIDDEN)


def activations(dtype: str = "float64") -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(2, N, HIDDEN)) * np.linspace(0.5, 3, HIDDEN) + 5
    values[1] += np.outer(Y, 3 * TRUE)
    coords: dict[str, Any] = {"layer": [2, 6], "prompt": [lz.prompt_hash(str(i)) for i in range(N)], "label": ("prompt", Y), "model": "m"}
    return xr.DataArray(values.astype(dtype), dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


@pytest.mark.few(9)
@pytest.mark.parametrize("options", [{}, {"preprocessing": "standard+pca:6"}, {"preprocessing": "per_layer"}, {"strength": 0.5}])
@pytest.mark.parametrize("probe", ["logistic_regression", "ridge", "svm", "lda", "mass_mean", "mass_mean_cov", "sgd"])
def test_coefficients_on_raw_activations_are_the_decision_function(probe: str, options: dict[str, Any]) -> None:
    if "strength" in options and probe in ("lda", "mass_mean", "mass_mean_cov"):
        return
    given = activations()
    found = lz.fit_directions(given, "label", probe, **options)
    assert found.coef.dims == ("layer", "hidden")
    decision = (given * found.coef).sum("hidden") + found.intercept
    assert ((decision.sel(layer=6) > 0) == Y).mean() > 0.9
    if not options:
        for layer in given.layer:
            x = given.sel(layer=layer).values
            expected = make_probe(probe).fit(x, Y).decision_function(x)
            np.testing.assert_allclose(decision.sel(layer=layer), expected, atol=1e-9 * np.abs(expected).max())


def test_a_known_direction_is_recovered() -> None:
    found = lz.fit_directions(activations(), "label", "mass_mean").coef.sel(layer=6).values
    assert found @ TRUE / np.linalg.norm(found) / np.linalg.norm(TRUE) > 0.99


def test_several_classes_have_a_direction_each_and_values_one() -> None:
    y = np.array(["a", "b", "c"])[np.arange(N) % 3]
    found = lz.fit_directions(activations(), y, "ridge")
    assert found.coef.dims == ("layer", "class", "hidden")
    assert found["class"].values.tolist() == ["a", "b", "c"]
    slope = np.linspace(-1, 1, HIDDEN)
    given = activations()
    values = lz.fit_directions(given, given.values[0] @ slope + 2, task="regression")
    np.testing.assert_allclose(values.coef.sel(layer=2), slope, atol=0.02)
    assert "Ridge(" in values.attrs["estimator"]


def test_lazy_arrays_and_missing_labels(tmp_path: Any) -> None:
    given = activations("float32")
    expected = lz.fit_directions(given, "label", "ridge")
    store = lz.open_store(tmp_path / "acts")
    layers = dict(zip(given.layer.values.tolist(), given.values, strict=True))
    lz.write_activations(store, model="m", prompts=[str(i) for i in range(N)], pooled={"resid_mean": layers}, coords={"label": Y.tolist()})
    for lazy in (store.dataset("m").resid_mean, given.chunk(prompt=100)):
        np.testing.assert_array_equal(lz.fit_directions(lazy, "label", "ridge").coef, expected.coef)
    labels = np.where(np.arange(N) < 10, np.nan, Y)
    dropped = lz.fit_directions(given, labels, "ridge", missing="drop")
    np.testing.assert_array_equal(dropped.coef, lz.fit_directions(given[:, 10:], "label", "ridge").coef)
    with pytest.raises(LabelError, match="miss 10 of 400 prompts"):
        lz.fit_directions(given, labels, "ridge")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("label", "mlp"), InvalidArgumentError, "not linear"),
        (("label", "rigde"), InvalidArgumentError, "no probe named 'rigde'"),
        ((["label", "other"], "ridge"), InvalidArgumentError, "several sets of labels"),
    ],
)
def test_probes_without_a_direction_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    given = activations().assign_coords(other=("prompt", Y))
    with pytest.raises(error, match=message):
        lz.fit_directions(given, *arguments)


def test_activations_that_cannot_be_fitted_are_named() -> None:
    spoilt = activations()
    spoilt[1, 3, 0] = np.inf
    with pytest.raises(
        InvalidArgumentError, match=f"layer 6 of 'resid_mean' is NaN or infinite for 1 of 400 prompts .{lz.prompt_hash('3')}"
    ):
        lz.fit_directions(spoilt, "label")
    with pytest.raises(InvalidTypeError, match="not Dataset: give ds"):
        lz.fit_directions(activations().to_dataset(), "label")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="a named probe that has one"):
        lz.fit_directions(activations(), "label", "lda", strength=1.0)
