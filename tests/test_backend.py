from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.errors import AmbiguousProvenanceError, InvalidArgumentError, StoreNotFoundError
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

TEXTS = ["a", "bb", "ccc", "dddd"]


def test_the_engine_gives_what_the_store_gives(store: Store) -> None:
    store.write(GROUP, make_batch(TEXTS, columns={"label": [0, 1, 0, 1]}))
    for level, ours in (("prompts", store.dataset()), ("tokens", store.tokens())):
        theirs = xr.open_dataset(store.url, engine="lmprobe_zarr", model="acme/toy", level=level)
        xr.testing.assert_identical(theirs.load(), ours.load())


def test_the_engine_takes_prompts_layers_and_chunks(store: Store) -> None:
    batch = make_batch(TEXTS)
    store.write(GROUP, batch)
    data = xr.open_dataset(store.url, engine="lmprobe_zarr", prompts=["ccc", "a"], layers=[1, 3], chunks={}, drop_variables="text")
    assert data.resid_mean.chunks is not None
    assert "text" not in data.coords
    np.testing.assert_array_equal(data.resid_mean.values, batch.prompts["resid_mean"][1:][:, [2, 0]])


def test_a_tree_holds_every_group_at_both_levels(store: Store) -> None:
    store.write(GROUP, make_batch(TEXTS))
    other = GroupInfo(model="other", hidden_size=8)
    store.write(other, make_batch(["x"], tokens=False))
    tree = xr.open_datatree(store.url, engine="lmprobe_zarr")
    assert {node.path for node in tree.leaves} == {f"/{GROUP.name}/prompts", f"/{GROUP.name}/tokens", f"/{other.name}/prompts"}
    np.testing.assert_array_equal(tree[f"/{GROUP.name}/tokens"]["resid"].values, store.tokens("acme/toy").resid.values)
    with pytest.raises(AmbiguousProvenanceError):
        xr.open_dataset(store.url, engine="lmprobe_zarr")


def test_xarray_finds_the_engine_by_itself_for_a_local_store(tmp_path: Path) -> None:
    lz.open_store(tmp_path / "s").write(GROUP, make_batch(TEXTS))
    assert xr.open_dataset(tmp_path / "s").attrs["group"] == GROUP.name


def test_the_engine_raises_clear_errors(store: Store) -> None:
    with pytest.raises(StoreNotFoundError):
        xr.open_dataset(store.url, engine="lmprobe_zarr")
    with pytest.raises(InvalidArgumentError, match="level='layers'"):
        xr.open_dataset(store.url, engine="lmprobe_zarr", level="layers")


def test_dask_arrays_opened_before_and_after_a_commit_are_not_mixed_up(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "s")
    old, new = make_batch(TEXTS, seed=1), make_batch(TEXTS, seed=2)
    store.write(GROUP, old)
    before = xr.open_dataset(store.url, engine="lmprobe_zarr", chunks={}).resid_mean
    store.write(GROUP, new)
    after = xr.open_dataset(store.url, engine="lmprobe_zarr", chunks={}).resid_mean
    difference = (after - before).compute().values
    np.testing.assert_allclose(difference, new.prompts["resid_mean"] - old.prompts["resid_mean"], rtol=1e-6)


def test_dask_chunks_of_a_store_without_layers(store: Store) -> None:
    lz.write_activations(store, model="m", prompts=["a"], activations={"embed": [np.ones((3, 4), "f4")]})
    assert store.tokens(chunks={}).embed.compute().shape == (3, 4)
