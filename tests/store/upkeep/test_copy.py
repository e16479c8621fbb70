"""Copying upward: what the target lacks arrives, what it has stays, and a copy that stopped goes on."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from shown_values import shown
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store


@pytest.fixture
def target() -> Store:
    return lz.open_store(f"memory://{uuid.uuid4().hex}")


def filled(store: Store) -> Store:
    store.write(GROUP, make_batch(["a", "b"], seed=1, columns={"label": [1, 2]}))
    store.write(GROUP, make_batch(["b", "c"], seed=2))
    store.write(GROUP, make_batch(["d"], seed=3, layers=(0, 1)))
    store.annotate("acme/toy", {"split": {"a": "x"}})
    return store


def test_an_empty_target_gets_the_parts_as_they_are(store: Store, target: Store) -> None:
    filled(store)
    summary = store.copy_to(target)
    assert (summary.copied, summary.rewritten, summary.there) == (4, 0, 0)
    fresh = lz.open_store(target.url)
    xr.testing.assert_identical(fresh.dataset().load(), store.dataset().load())
    xr.testing.assert_identical(fresh.tokens().load(), store.tokens().load())
    assert [p.info.name for p in fresh.view(GROUP).parts] == [p.info.name for p in store.view(GROUP).parts]
    again = store.copy_to(target)
    assert (again.copied, again.rewritten, again.there) == (0, 0, 4)
    assert "4 were there" in str(again)


@pytest.mark.few(1)
def test_a_compacted_source_has_nothing_new_to_give(store: Store, target: Store) -> None:
    filled(store)
    store.write(GROUP, make_batch(["e"], seed=4, layers=(0, 1)))
    store.copy_to(target)
    before = shown(lz.open_store(target.url))
    assert store.compact().runs
    summary = store.copy_to(target)
    assert (summary.copied, summary.rewritten) == (0, 0)
    xr.testing.assert_identical(shown(lz.open_store(target.url))[0], before[0])


def test_only_what_is_missing_arrives_and_what_is_there_stays(store: Store, target: Store) -> None:
    filled(store)
    target.write(GROUP, make_batch(["b"], seed=9, layers=(0,), columns={"label": [7]}))
    target.write(GROUP, make_batch(["d"], seed=8, layers=(0, 1)))
    summary = store.copy_to(target)
    assert summary.rewritten
    fresh = lz.open_store(target.url)
    data, source = fresh.dataset(prompts=["a", "b", "c", "d"]), store.dataset(prompts=["a", "b", "c", "d"])
    np.testing.assert_array_equal(data.resid_mean[:, [0, 2]], source.resid_mean[:, [0, 2]])
    np.testing.assert_array_equal(data.resid_mean.sel(layer=[1, 3])[:, 1], source.resid_mean.sel(layer=[1, 3])[:, 1])
    np.testing.assert_array_equal(data.resid_mean.sel(layer=0)[1], make_batch(["b"], seed=9, layers=(0,)).prompts["resid_mean"][0, 0])
    np.testing.assert_array_equal(
        data.resid_mean.sel(layer=[0, 1])[:, 3], make_batch(["d"], seed=8, layers=(0, 1)).prompts["resid_mean"][:, 0]
    )
    assert data.label.values[:2].tolist() == [1, 7]
    again = store.copy_to(target)
    assert (again.copied, again.rewritten) == (0, 0)


@pytest.mark.few(1)
def test_prompts_can_be_chosen_and_the_target_must_be_writable(store: Store, target: Store, tmp_path: Path) -> None:
    filled(store)
    store.copy_to(target, prompts=["b", "d"])
    fresh = lz.open_store(target.url)
    wanted = store.dataset(prompts=["b", "d"]).load().drop_vars("split")
    xr.testing.assert_identical(fresh.dataset(prompts=["b", "d"]).load(), wanted)
    assert len(fresh.view(GROUP)) == 2
    assert store.copy_to(target, prompts=["b", "d"]).rewritten == 0
    for wrong in (lz.open_store(target.url, mode="r"),):
        with pytest.raises(lz.errors.ReadOnlyError):
            store.copy_to(wrong)
    with pytest.raises(lz.errors.InvalidArgumentError):
        store.copy_to(store)
    store.publish(tmp_path / "frozen")
    with pytest.raises(lz.errors.ReadOnlyError):
        store.copy_to(tmp_path / "frozen")
    published = lz.open_store(tmp_path / "frozen")
    published.copy_to(tmp_path / "live")
    xr.testing.assert_identical(lz.open_store(tmp_path / "live").dataset().load(), store.dataset().load())


def test_a_damaged_file_is_not_passed_on(tmp_path: Path) -> None:
    store = filled(lz.open_store(tmp_path / "s"))
    chunk = next((tmp_path / "s" / store.view(GROUP).parts[0].path).rglob("c.0.0.0"))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(lz.errors.CorruptPartError, match="not copied"):
        store.copy_to(tmp_path / "t")
    assert len(lz.open_store(tmp_path / "t").view(GROUP)) == 0
