"""Statistics of rows: ``norm_scale`` is measured after what is subtracted, and is matched with batches by layer, variable and model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.streaming import statistics

Array = npt.NDArray[Any]


def tokens(values: Array, name: str = "resid", model: str = "acme/toy") -> xr.DataArray:
    """Layers 2, 4, 7, … of a model, shape (layer, token, hidden)."""
    layers = [2, 4, 7][: len(values)]
    return xr.DataArray(values, dims=("layer", "token", "hidden"), coords={"layer": layers, "model": model}, name=name)


def mixed(n: int = 300, hidden: int = 24) -> Array:
    """Layers with a mean at zero, a long mean, and a few huge rows."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, n, hidden))
    values[1] = 0.3 * values[1] + 40
    values[2, :: n // 4] *= 1000
    return values.astype("f4")


def size(batches: Any) -> Array:
    """The mean norm of all rows in units of √hidden, of each layer."""
    rows = np.concatenate([batch.astype("f8") for batch in batches], axis=-2)
    return np.asarray(np.linalg.norm(rows, axis=-1).mean(-1) / np.sqrt(rows.shape[-1]))


def test_rows_have_a_norm_of_the_root_of_hidden_with_and_without_the_mean() -> None:
    toks = tokens(mixed())
    stats = toks.lz.statistics()
    for layer in (2, 4, 7, [7, 2]):
        for mean in (None, stats.mean_value, stats.mean_value.astype("f4")):
            found = size(toks.lz.batches(layer=layer, mean=mean, scale=stats.norm_scale))
            np.testing.assert_allclose(found, 1, rtol=1e-4)
    number = float(stats.norm_scale.sel(layer=4))
    np.testing.assert_allclose(size(toks.lz.batches(layer=4, mean=stats.mean_value, scale=number)), 1, rtol=1e-4)
    np.testing.assert_allclose(size(toks.lz.batches(layer=4, scale=2 * stats.norm_scale)), 0.5, rtol=1e-4)


def test_norms_about_the_mean_hold_where_few_rows_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_KEPT_VALUES", 500 * 24)
    monkeypatch.setattr(statistics, "_cache_sized_slices", lambda flat: (slice(i, i + 100) for i in range(0, len(flat), 100)))
    values = mixed(20_000)
    values[0] += np.linspace(-1, 1, 20_000)[:, None]  # a store that is sorted
    found = tokens(values).lz.statistics().norm_scale.values
    wide = values.astype("f8")
    expected = np.linalg.norm(wide - wide.mean(1, keepdims=True), axis=-1).mean(-1) / np.sqrt(24)
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_statistics_of_another_layer_are_an_error_that_names_it() -> None:
    toks = tokens(mixed())
    other, several = toks.lz.statistics(layer=4), toks.lz.statistics(layer=[4, 7])
    for name, value in (("mean", other.mean_value), ("scale", other.norm_scale), ("scale", other.std_value)):
        with pytest.raises(InvalidArgumentError, match=rf"{name} is of layers \[4\], and lacks some of the layers \[2\].*\[2\] too"):
            toks.lz.batches(layer=2, **{name: value})
        with pytest.raises(InvalidArgumentError, match=r"\[2, 7\] too"):
            toks.lz.batches(**{name: value})
    with pytest.raises(InvalidArgumentError, match=r"of layers \[4, 7\].*\[2\] too"):
        toks.lz.batches(layer=[2, 4], mean=several.mean_value, scale=several.norm_scale)
    with pytest.raises(InvalidArgumentError, match="of layers"):
        toks.sel(layer=2).lz.batches(scale=other.norm_scale)
    with pytest.raises(InvalidArgumentError, match="without labels"):
        toks.lz.batches(mean=toks.lz.statistics().mean_value.drop_vars("layer"))


def test_statistics_in_another_order_of_layers_are_aligned() -> None:
    toks = tokens(mixed())
    stats = toks.lz.statistics(layer=[7, 2, 4])
    wide = toks.values.astype("f8")
    for layer, places in ((None, [0, 1, 2]), ([4, 2], [1, 0])):
        batches = toks.lz.batches(layer=layer, mean=stats.mean_value, scale=stats.std_value, shuffle=False, batch_tokens=1000)
        (found,) = list(batches)
        expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
        np.testing.assert_allclose(found, expected[places], rtol=1e-3, atol=1e-4)


def test_statistics_of_another_variable_model_or_mean_are_an_error() -> None:
    toks = tokens(mixed())
    stats = toks.lz.statistics()
    with pytest.raises(InvalidArgumentError, match="mean is of variable 'resid', and the batches are of 'mlp'"):
        tokens(mixed(), "mlp").lz.batches(mean=stats.mean_value)
    with pytest.raises(InvalidArgumentError, match="scale is of model 'acme/toy', and the batches are of 'acme/other'"):
        tokens(mixed(), model="acme/other").lz.batches(scale=stats.norm_scale)
    with pytest.raises(InvalidArgumentError, match="measured about their mean_value"):
        toks.lz.batches(layer=4, mean=0.0, scale=stats.norm_scale)
    with pytest.raises(InvalidTypeError, match=r"stats\.mean_value"):
        toks.lz.batches(mean=stats)


def test_kept_statistics_scale_as_those_that_were_just_measured(tmp_path: Any) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    rows = {layer: list(mixed(40)[place].reshape(8, 5, 24)) for place, layer in enumerate((2, 4, 7))}
    lz.write_activations(store, model="acme/toy", prompts=[f"t{i}" for i in range(8)], activations={"resid": rows})
    toks = store.tokens()
    for _ in range(2):
        stats = toks.lz.statistics(layer=4, keep=tmp_path / "statistics.safetensors")
        np.testing.assert_allclose(size(toks.lz.batches(layer=4, scale=stats.norm_scale)), 1, rtol=1e-4)
        np.testing.assert_allclose(size(toks.lz.batches(layer=4, mean=stats.mean_value, scale=stats.norm_scale)), 1, rtol=1e-4)
