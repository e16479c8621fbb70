"""Batches, statistics, norms, pooling and tensors of a site of any name and width: those of the same values along `hidden`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError

COUNTS = [3, 1, 4, 2, 5]
N, WIDTH = sum(COUNTS), 7
TEXTS = list("abcde")
VALUES = (np.random.default_rng(0).standard_normal((2, N, WIDTH)) + np.arange(WIDTH)).astype("f4")


@pytest.fixture
def toks(tmp_path: Path) -> xr.Dataset:
    """`neurons` of 7 units beside `resid` of 4; `gate` in one layer of two."""
    store = lz.open_store(tmp_path / "acts", durable=False)
    split = [np.split(layer, np.cumsum(COUNTS)[:-1]) for layer in VALUES]
    resid = {layer: [array[:, :4] for array in arrays] for layer, arrays in enumerate(split)}
    lz.write_activations(store, model="m", prompts=TEXTS, activations={"neurons": dict(enumerate(split)), "resid": resid})
    lz.write_activations(store, model="m", prompts=TEXTS, activations={"gate": {1: split[1]}}, hidden_size=4)
    return store.tokens(prompts=TEXTS)


def test_batches_are_rows_of_the_site(toks: xr.Dataset) -> None:
    array, same = toks.neurons, toks.neurons.load().rename(neurons_unit="hidden")
    assert array.dims == ("layer", "token", "neurons_unit")
    choices: list[dict[str, Any]] = [{"layer": 1}, {"layer": [1, 0], "seed": 3}, {"layer": 1, "labels": "row", "skip_positions": 0}]
    for options in choices:
        batches = list(array.lz.batches(batch_tokens=4, **options))
        rows = np.concatenate([batch[0] if "labels" in options else batch for batch in batches], axis=-2)
        expected = VALUES[options["layer"]]
        if "labels" in options:
            np.testing.assert_array_equal(rows, expected[np.concatenate([batch[1]["row"] for batch in batches])])
        else:
            np.testing.assert_array_equal(np.sort(rows, axis=-2), np.sort(expected, axis=-2))
    stats, of_hidden = array.lz.statistics(), same.lz.statistics()
    assert stats.mean_value.dims == ("layer", "neurons_unit")
    np.testing.assert_allclose(stats.mean_value.values, VALUES.astype("f8").mean(1), rtol=1e-6)
    np.testing.assert_allclose(stats.std_value.values, VALUES.astype("f8").std(1), rtol=1e-6)
    np.testing.assert_array_equal(stats.norm_scale.values, of_hidden.norm_scale.values)
    shifted = np.concatenate(list(array.lz.batches(layer=1, mean=stats.mean_value, scale=stats.norm_scale)))
    assert np.linalg.norm(shifted.astype("f8"), axis=-1).mean() == pytest.approx(np.sqrt(WIDTH), rel=1e-4)
    with pytest.raises(InvalidArgumentError, match="mean"):
        array.lz.batches(layer=1, mean=toks.resid.lz.statistics().mean_value)


def test_norms_are_those_of_numpy(toks: xr.Dataset) -> None:
    norms = toks.neurons.lz.norms()
    assert norms.dims == ("layer", "token")
    np.testing.assert_allclose(norms.values, np.linalg.norm(VALUES, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(toks.lz.norms("neurons", layer=1).values, norms.values[1])


def test_pooled_and_padded_keep_the_dimension(toks: xr.Dataset) -> None:
    pooled, padded = toks.neurons.lz.pool("mean"), toks.neurons.lz.padded()
    assert pooled.dims == ("layer", "prompt", "neurons_unit")
    assert padded.dims == ("layer", "prompt", "position", "neurons_unit")
    for i, rows in enumerate(np.split(VALUES, np.cumsum(COUNTS)[:-1], axis=1)):
        np.testing.assert_allclose(pooled.values[:, i], rows.mean(1), rtol=1e-5)
        np.testing.assert_array_equal(padded.values[:, i, : COUNTS[i]], rows)
        assert np.isnan(padded.values[:, i, COUNTS[i] :]).all()
    every = toks[["neurons", "resid"]].lz.pool("max")
    assert {name: every[name].dims[-1] for name in every.data_vars} == {"neurons_max": "neurons_unit", "resid_max": "hidden"}


def test_a_layer_that_lacks_the_site_has_no_rows_to_give(toks: xr.Dataset) -> None:
    with pytest.raises(
        MissingPromptsError, match=r"'gate' is not stored in the layers \[0\]: choose those that it is stored in, layer=\[1\]"
    ):
        list(toks.gate.lz.batches(batch_tokens=4))
    np.testing.assert_array_equal(np.concatenate(list(toks.gate.lz.batches(layer=1, shuffle=False))), VALUES[1])
    np.testing.assert_allclose(toks.gate.lz.statistics(layer=[1]).mean_value.values[0], VALUES[1].astype("f8").mean(0), rtol=1e-6)


@pytest.mark.model
def test_tensors_and_batches_of_torch(toks: xr.Dataset) -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(toks.neurons.lz.to_torch().numpy(), VALUES)
    tensors: Any = toks.drop_vars("gate").lz.to_torch()
    assert tensors["neurons"].shape == (2, N, WIDTH)
    assert torch.equal(torch.cat(list(toks.neurons.lz.batches(layer=0, shuffle=False, framework="torch"))), torch.from_numpy(VALUES[0]))


def test_the_cosines_of_directions_of_any_width_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    coef = xr.DataArray(VALUES[:, 0], dims=("layer", "neurons_unit"), coords={"layer": [0, 1]})
    axes = lz.cosine_similarity(coef).lz.plot_cosine()
    drawn = np.ma.filled(axes.collections[0].get_array() if axes.collections else axes.images[0].get_array(), np.nan)
    lengths = np.linalg.norm(VALUES[:, 0].astype("f8"), axis=1)
    assert np.asarray(drawn).reshape(2, 2)[0, 1] == pytest.approx(VALUES[0, 0].astype("f8") @ VALUES[1, 0].astype("f8") / np.prod(lengths))
