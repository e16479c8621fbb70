"""Variables are given up, physically, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xarray as xr
from shown_values import assert_same, shown
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store


def two_kinds(store: Store) -> Store:
    batch = make_batch(["a", "b"], seed=1, columns={"label": [1, 2]})
    store.write(GROUP, replace(batch, tokens={**batch.tokens, "attn": -batch.tokens["resid"]}))
    store.write(GROUP, make_batch(["b", "c"], seed=2))
    store.write(GROUP, make_batch(["d"], seed=3, tokens=False))
    store.annotate("acme/toy", {"split": {"a": "x"}})
    return store


def size(store: Store) -> int:
    return sum(entry.nbytes for entry in store.entries(GROUP))


@pytest.mark.few(1)
def test_tokens_go_and_pooled_vectors_stay(store: Store) -> None:
    two_kinds(store)
    before, large = shown(store), size(store)
    assert store.drop("acme/toy", ["resid"]) == 2
    after = shown(lz.open_store(store.url))
    xr.testing.assert_identical(after[0], before[0])
    assert before[1] is not None
    assert after[1] is not None
    xr.testing.assert_identical(after[1], before[1].drop_vars("resid"))
    xr.testing.assert_identical(after[2], before[2].drop_sel(variable="resid"))
    assert size(store) < large
    assert all("tokens/resid" not in key for part in store.list_parts(GROUP.name) for key in part.info.arrays)


@pytest.mark.few(1)
def test_some_layers_go_and_the_others_stay(store: Store) -> None:
    two_kinds(store)
    before = shown(store)
    store.drop("acme/toy", ["resid"], layers=[0, 3])
    after = shown(lz.open_store(store.url))
    xr.testing.assert_identical(after[0], before[0])
    assert before[1] is not None
    assert after[1] is not None
    xr.testing.assert_equal(after[1].resid.dropna("layer", how="all"), before[1].resid.sel(layer=[1]))
    xr.testing.assert_equal(after[1].attn, before[1].attn)
    held = after[2].sel(variable="resid")
    assert not held.sel(layer=[0, 3]).any()
    assert bool((held.sel(layer=1) == before[2].sel(variable="resid", layer=1)).all())
    assert store.drop("acme/toy", ["resid"], layers=[1]) > 0
    assert "resid" not in lz.open_store(store.url).tokens()


def test_a_part_that_is_left_without_anything_goes(store: Store) -> None:
    store.write(GROUP, make_batch(["a"], seed=1, tokens=False))
    both = make_batch(["b"], seed=2, tokens=False)
    store.write(GROUP, replace(both, prompts={"resid_max": both.prompts["resid_mean"]}))
    store.drop("acme/toy", ["resid_mean"])
    fresh = lz.open_store(store.url)
    assert fresh.dataset().text.values.tolist() == ["b"]
    fresh.drop("acme/toy", ["resid_max"])
    assert lz.open_store(store.url).models() == []


@pytest.mark.few(1)
def test_replaced_parts_are_freed_too_and_a_wrong_name_drops_nothing(store: Store) -> None:
    two_kinds(store)
    store.write(GROUP, make_batch(["e"], seed=5, tokens=False))
    store.compact()
    before = shown(store)
    for names, error in ((["resid", "mlp"], lz.errors.InvalidArgumentError), ("resid", lz.errors.InvalidTypeError)):
        with pytest.raises(error):
            store.drop("acme/toy", names)
    with pytest.raises(lz.errors.LayerOutOfRangeError):
        store.drop("acme/toy", ["resid"], layers=[2])
    assert_same(store, before)
    store.drop("acme/toy", ["resid_mean"])
    assert all("prompts/resid_mean" not in part.info.arrays for part in lz.open_store(store.url).list_parts(GROUP.name))
