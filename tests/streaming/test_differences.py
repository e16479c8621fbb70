"""`compare_groups`: how far two groups are apart, by variable and layer, over the rows that both have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

PROMPTS = [f"prompt {i}" for i in range(9)]
LENGTHS = [2, 3, 1, 4, 2, 2, 5, 1, 3]
LAYERS, WIDTH = 3, 4


def written(store: lz.Store, engine: str, prompts: list[str], pooled: Any, **options: Any) -> xr.Dataset:
    """The dataset of one group, per prompt."""
    lz.write_activations(
        store, model="m", prompts=prompts, pooled={"resid_mean": dict(enumerate(pooled))}, provenance={"engine": engine}, **options
    )  # fmt: skip
    return store.dataset("m", provenance={"engine": engine})


def values(seed: int = 0, layers: int = LAYERS, prompts: int = len(PROMPTS)) -> Any:
    return np.random.default_rng(seed).standard_normal((layers, prompts, WIDTH)).astype(np.float32)


def test_it_is_what_numpy_says(tmp_path: Path) -> None:
    store, one = lz.open_store(tmp_path / "acts"), values()
    other = one + np.array([0, 1e-3, 1e-2], np.float32)[:, None, None] * values(1)
    a, b = written(store, "a", PROMPTS, one), written(store, "b", PROMPTS, other)
    found = lz.compare_groups(a, b)
    assert found.resid_mean.dims == ("difference", "layer")
    assert found.layer.values.tolist() == [0, 1, 2]
    apart = other.astype(np.float64) - one
    held = {str(name): found.resid_mean.sel(difference=name).values for name in found.difference.values}
    assert np.allclose(held["largest"], np.abs(apart).max(axis=(1, 2)), rtol=1e-12)
    assert np.allclose(held["relative"], np.abs(apart).max(axis=(1, 2)) / np.abs(one).max(axis=(1, 2)), rtol=1e-6)
    ratios = np.linalg.norm(apart, axis=2) / np.linalg.norm(one.astype(np.float64), axis=2)
    assert np.allclose(held["typical"], np.median(ratios, axis=1), rtol=1e-12)
    assert held["rows"].tolist() == [9, 9, 9]
    assert held["one_sided"].tolist() == [0, 0, 0]
    assert found.attrs == {"a": a.attrs["group"], "b": b.attrs["group"]}
    assert float(found.resid_mean.sel(difference="largest", layer=0)) == 0.0
    assert len(found.to_dataframe()) == len(found.difference) * LAYERS


def test_rows_are_matched_by_prompt_in_any_order_and_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [4, 0, 8, 6, 2]
    one, two = lz.open_store(tmp_path / "one"), lz.open_store(tmp_path / "two")
    a = written(one, "a", PROMPTS, values())
    b = written(two, "b", [*(PROMPTS[i] for i in order), "another"], np.concatenate([values()[:2, order], values(3)[:2, :1]], axis=1))
    monkeypatch.setattr("lmprobe_zarr.streaming.differences.BLOCK_BYTES", 8 * WIDTH * 2)
    for found in (lz.compare_groups(a, b), lz.compare_groups(b, a), lz.compare_groups(a.isel(prompt=slice(None, None, -1)), b)):
        assert found.layer.values.tolist() == [0, 1]
        assert (found.resid_mean.sel(difference="rows") == 5).all()
        assert (found.resid_mean.sel(difference="largest") == 0).all()
    assert (lz.compare_groups(a.sel(prompt=[lz.prompt_hash(PROMPTS[4])]), b).resid_mean.sel(difference="rows") == 1).all()


def test_tokens_are_matched_by_prompt_and_position(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).standard_normal((2, sum(LENGTHS), WIDTH)).astype(np.float32)
    ids = np.arange(sum(LENGTHS))
    stores = [lz.open_store(tmp_path / name) for name in "ab"]
    cuts = np.cumsum(LENGTHS)[:-1]
    for store, factor in zip(stores, (1, 1.5), strict=True):
        rows = {"resid": {layer: np.split(factor * layer_rows, cuts) for layer, layer_rows in enumerate(tokens)}}
        lz.write_activations(store, model="m", prompts=PROMPTS, activations=rows, token_ids=[each.tolist() for each in np.split(ids, cuts)])
    a, b = (store.tokens("m") for store in stores)
    found = lz.compare_groups(a, b).resid
    assert np.allclose(found.sel(difference="typical"), 0.5)
    assert (found.sel(difference="rows") == sum(LENGTHS)).all()
    some = b.sel(prompt=PROMPTS[3]).isel(token=slice(1, None))
    assert (lz.compare_groups(a, some).resid.sel(difference="rows") == LENGTHS[3] - 1).all()
    other = b.assign_coords(token_id=("token", np.where(ids == 4, 99, ids)))
    with pytest.raises(InvalidArgumentError, match=r"1 tokens have another id in b than in a, first at position 2 of prompt"):
        lz.compare_groups(a, other)
    with pytest.raises(InvalidArgumentError, match="a has a row for every token and b has a row for every prompt"):
        lz.compare_groups(a, a.lz.pool("mean"))


def test_what_is_missing_is_counted_and_never_zero(tmp_path: Path) -> None:
    store, one, other = lz.open_store(tmp_path / "acts"), values(), values()
    one[0, 2], other[0, 2], other[1, 3], one[2], other[2] = np.nan, np.nan, np.inf, np.nan, np.nan
    found = lz.compare_groups(written(store, "a", PROMPTS, one), written(store, "b", PROMPTS, other)).resid_mean
    assert found.sel(difference="rows").values.tolist() == [8, 8, 0]
    assert found.sel(difference="one_sided").values.tolist() == [0, 1, 0]
    assert found.sel(difference=["largest", "relative", "typical"], layer=2).isnull().all()
    assert (found.sel(difference="largest", layer=[0, 1]) == 0).all()


def test_rows_of_zeros_do_not_hide_a_difference(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    zeros, ones = np.zeros((1, 2, WIDTH), np.float32), np.ones((1, 2, WIDTH), np.float32)
    a, b = written(store, "a", PROMPTS[:2], zeros), written(store, "b", PROMPTS[:2], ones)
    assert lz.compare_groups(a, b).resid_mean.values[:4, 0].tolist() == [1.0, np.inf, np.inf, 2.0]
    assert lz.compare_groups(a, a).resid_mean.values[:4, 0].tolist() == [0.0, 0.0, 0.0, 2.0]


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    a = written(store, "a", PROMPTS, values())
    with pytest.raises(InvalidTypeError, match="b is a str"):
        lz.compare_groups(a, "b")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="share no prompt"):
        lz.compare_groups(a, written(store, "b", ["x", "y"], values(prompts=2)))
    with pytest.raises(InvalidArgumentError, match="share no variable"):
        lz.compare_groups(a, a.rename(resid_mean="attn_mean"))
    with pytest.raises(InvalidArgumentError, match="share no layer"):
        lz.compare_groups(a.sel(layer=[0]), a.sel(layer=[1]))
    with pytest.raises(InvalidArgumentError, match="another shape in b"):
        lz.compare_groups(a, a.isel(hidden=slice(2)))
    with pytest.raises(InvalidArgumentError, match="b has some rows twice"):
        lz.compare_groups(a, a.isel(prompt=[0, 0]))
