"""Several stores read as one: what wins, what is written where, and that nothing but the last is ever touched."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch import prompt_hash, prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import (
    CacheWarning,
    CorruptPartError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingPromptsError,
    ModelNotStoredError,
    NotAStoreError,
    ReadOnlyError,
    StoreNotFoundError,
)
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.storage.remote import FsspecStorage
from lmprobe_zarr.store.store import Store

TEAM = ["one", "two", "three"]
MINE = ["three", "four"]


def tree(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every name below a folder, with when it was written and what it holds."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [folder, *folder.rglob("*")]}


def watching(real: Any, name: str, root: str, tried: list[str]) -> Any:
    """A verb of a storage that notes where it is used on one root."""

    def verb(self: LocalStorage, *args: Any, **options: Any) -> Any:
        if self.root == root:
            tried.append(name)
        return real(self, *args, **options)

    return verb


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset of others, in which nothing changes whatever a test does, not a byte, not a time; nor is it even tried."""
    folder = tmp_path / "team"
    lz.open_store(folder).write(GROUP, make_batch(TEAM, seed=1, columns={"label": [0, 1, 0]}))
    before = tree(folder)
    tried: list[str] = []
    for name in ("write", "commit", "remove", "touch", "remove_tree"):
        monkeypatch.setattr(LocalStorage, name, watching(getattr(LocalStorage, name), name, str(folder), tried))
    yield folder
    assert not tried
    assert tree(folder) == before


@pytest.fixture
def layered(team: Path, tmp_path: Path) -> Store:
    store = lz.open_store([team, tmp_path / "mine"])
    lz.open_store(tmp_path / "mine").write(GROUP, make_batch(MINE, seed=2))
    return store


# ----------------------------------------------------------------------------------------------------------------- reading


def test_all_are_read_in_order_and_the_later_one_wins(layered: Store) -> None:
    old, new = make_batch(TEAM, seed=1), make_batch(MINE, seed=2)
    data, tokens = layered.dataset(), layered.tokens()
    assert data.text.values.tolist() == ["one", "two", "three", "four"]
    np.testing.assert_array_equal(data.resid_mean.values[:, :2], old.prompts["resid_mean"][:, :2])
    np.testing.assert_array_equal(data.resid_mean.values[:, 2:], new.prompts["resid_mean"])
    np.testing.assert_array_equal(tokens.resid.sel(prompt=prompt_hash("four")).values, new.tokens["resid"][:, -5:])
    assert layered.models() == ["acme/toy"]
    assert list(layered.groups()) == [GROUP.name]
    assert layered.coverage().all()
    assert layered.datatree()[f"/{GROUP.name}/prompts"].sizes["prompt"] == 4
    assert "mine" in repr(layered)
    assert "team" in repr(layered)
    assert "4 prompts" in repr(layered)


def test_a_later_place_wins_even_where_the_earlier_one_was_written_after_it(tmp_path: Path) -> None:
    mine, team = lz.open_store(tmp_path / "mine"), lz.open_store(tmp_path / "team")
    batch = make_batch(["a", "b"], seed=1, n_tokens=[2, 3], columns={"label": ["mine", "mine"]})
    mine.write(GROUP, batch)
    team.write(GROUP, make_batch(["b", "c"], seed=2, n_tokens=[7, 4], columns={"label": ["team", "team"]}))
    team.annotate("acme/toy", {"label": {"b": "later"}})
    layered = lz.open_store([team, mine])
    assert layered.dataset().text.values.tolist() == ["b", "c", "a"]
    assert layered.dataset().label.values.tolist() == ["mine", "team", "mine"]
    np.testing.assert_array_equal(layered.dataset(prompts=["a", "b"]).resid_mean.values, batch.prompts["resid_mean"])
    np.testing.assert_array_equal(layered.tokens(prompts=["a", "b"]).resid.values, batch.tokens["resid"])
    # The other way round the same two say the opposite.
    other = lz.open_store([mine, team])
    assert other.dataset().text.values.tolist() == ["a", "b", "c"]
    assert other.dataset().label.values.tolist() == ["mine", "later", "team"]
    assert other.tokens(prompts=["b"]).sizes["token"] == 7


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), min_size=1), st.sets(st.integers(0, 2), min_size=1)), max_size=8))
def test_the_union_is_that_of_a_slow_oracle(writes: list[tuple[int, set[int], set[int]]]) -> None:
    """Whatever is written in which order to three roots: the highest root wins, and in it what was written last."""
    names = [f"memory://layered-{os.getpid()}-{i}" for i in range(3)]
    stores = [lz.open_store(name) for name in names]
    held: dict[tuple[int, int], tuple[int, int, float]] = {}
    appeared: dict[int, tuple[int, int, int]] = {}
    try:
        for store in stores:
            store.write(GROUP, _numbered([9], [0], 0.0))  # so that each is one
        for number, (root, prompts, layers) in enumerate(writes, start=1):
            stores[root].write(GROUP, _numbered(sorted(prompts), sorted(layers), float(number)))
            for place, prompt in enumerate(sorted(prompts)):
                appeared[prompt] = min(appeared.get(prompt, (9, 9, 9)), (root, number, place))
                for layer in layers:
                    held[prompt, layer] = max(held.get((prompt, layer), (-1, -1, 0.0)), (root, number, float(number)))
        data = lz.open_store(names).dataset()
        order = [9, *sorted((p for p in appeared if appeared[p][0] == 0), key=lambda p: appeared[p])]
        order += sorted((p for p in appeared if p not in order), key=lambda p: appeared[p])
        assert data.prompt.values.tolist() == [prompt_hash(str(p)) for p in order]
        for p, layer in ((p, layer) for p in appeared for layer in data.layer.values.tolist()):
            found = float(data.resid_mean.sel(prompt=prompt_hash(str(p)), layer=layer).values[0])
            np.testing.assert_equal(found, held[p, layer][2] if (p, layer) in held else np.nan)
    finally:
        memory = fsspec.filesystem("memory")
        for name in names:
            memory.rm(name, recursive=True)


def _numbered(prompts: list[int], layers: list[int], value: float) -> TokenBatch:
    texts = [str(p) for p in prompts]
    pooled = np.full((len(layers), len(prompts), 8), value, np.float32)
    return TokenBatch(sha256=[prompt_sha256(t) for t in texts], text=texts, layers=tuple(layers), prompts={"resid_mean": pooled})


def test_xarray_opens_a_list_too(layered: Store, tmp_path: Path) -> None:
    places = [str(tmp_path / "team"), str(tmp_path / "mine")]
    options: dict[str, Any]
    for options in ({}, {"chunks": {}}):
        data = xr.open_dataset(places, engine="lmprobe_zarr", model="acme/toy", **options)  # type: ignore[arg-type]
        xr.testing.assert_identical(data.load(), layered.dataset().load())
    assert set(xr.open_datatree(places, engine="lmprobe_zarr").groups) >= {f"/{GROUP.name}/prompts"}  # type: ignore[arg-type]


@pytest.mark.long
def test_a_layered_store_travels_to_other_processes(layered: Store) -> None:
    again = pickle.loads(pickle.dumps(layered))  # noqa: S301 — our own bytes
    assert again.dataset().sizes["prompt"] == 4
    lazy = layered.dataset().resid_mean.isel(layer=1)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_read, (lazy,)), lazy.values)
        assert pool.apply(_texts, (layered,)) == ["one", "two", "three", "four"]


def _read(array: xr.DataArray) -> Any:
    return array.values


def _texts(store: Store) -> list[str]:
    texts: list[str] = store.dataset().text.values.tolist()
    return texts


def test_a_copy_that_was_changed_in_the_last_store_does_not_replace_the_original(team: Path, tmp_path: Path) -> None:
    shutil.copytree(team, tmp_path / "mine")
    lz.open_store(tmp_path / "mine").delete("acme/toy", ["one"])
    layered = lz.open_store([team, tmp_path / "mine"])
    assert layered.dataset().text.values.tolist() == TEAM
    np.testing.assert_array_equal(layered.dataset().resid_mean.values, make_batch(TEAM, seed=1).prompts["resid_mean"])


def test_three_stores_and_layered_stores_can_be_layered(team: Path, tmp_path: Path) -> None:
    lab, mine = tmp_path / "lab", tmp_path / "mine"
    lz.open_store(lab).write(GROUP, make_batch(["two", "lab's"], seed=3))
    three = lz.open_store([lz.open_store([team, lab]), mine])
    three.write(GROUP, make_batch(["lab's", "mine"], seed=4))
    assert [store.url for store in three.stack] == [str(team), str(lab), str(mine)]
    assert [store.mode for store in three.stack] == ["r", "r", "a"]
    assert three.dataset().text.values.tolist() == [*TEAM, "lab's", "mine"]
    by_hand = [make_batch(TEAM, seed=1), make_batch(["two", "lab's"], seed=3), make_batch(["lab's", "mine"], seed=4)]
    np.testing.assert_array_equal(three.dataset(prompts=["two"]).resid_mean.values[:, 0], by_hand[1].prompts["resid_mean"][:, 0])
    np.testing.assert_array_equal(three.dataset(prompts=["lab's"]).resid_mean.values[:, 0], by_hand[2].prompts["resid_mean"][:, 0])


# ----------------------------------------------------------------------------------------------------------------- writing


def test_columns_of_prompts_that_only_the_first_holds_go_into_the_last(team: Path, tmp_path: Path) -> None:
    layered = lz.open_store([team, tmp_path / "mine"])
    layered.annotate("acme/toy", {"label": {"two": 7}, "split": {"one": "test"}})
    assert layered.dataset().label.values.tolist() == [0, 7, 0]
    assert layered.dataset().split.fillna("?").values.tolist() == ["test", "?", "?"]
    assert layered.tokens().sel(prompt=prompt_hash("two")).label.values.tolist() == [7, 7, 7, 7]
    assert (tmp_path / "mine" / GROUP.name / "zarr.json").is_file(), "the group's document lies in the last too"
    assert lz.open_store(team, "r").dataset().label.values.tolist() == [0, 1, 0]
    assert lz.open_store([team, tmp_path / "mine"]).dataset().label.values.tolist() == [0, 7, 0]


def test_last_uses_are_recorded_in_the_own_root_only(layered: Store, tmp_path: Path) -> None:
    layered.mark_used(layered.view(GROUP).parts)
    assert len(list((tmp_path / "mine" / GROUP.name / ".used").iterdir())) == 1
    assert not (tmp_path / "team" / GROUP.name / ".used").exists()


def test_the_first_is_read_only_even_where_it_was_opened_for_writing(team: Path, tmp_path: Path) -> None:
    layered = lz.open_store([lz.open_store(team), tmp_path / "mine"])
    assert layered.below is not None
    with pytest.raises(ReadOnlyError, match="team"):
        layered.below.write(GROUP, make_batch(["x"]))
    lz.open_store(tmp_path / "mine").write(GROUP, make_batch(["x"]))
    with pytest.raises(ReadOnlyError, match="mine"):
        lz.open_store([team, tmp_path / "mine"], "r").write(GROUP, make_batch(["y"]))
    with pytest.raises(ReadOnlyError, match="mine"):
        lz.open_store([team, lz.open_store(tmp_path / "mine", "r")]).write(GROUP, make_batch(["y"]))


def test_own_activations_go_into_the_last(team: Path, tmp_path: Path) -> None:
    places = [team, tmp_path / "mine"]
    lz.write_activations(places, model="own", prompts=["p"], pooled={"resid_mean": {0: np.ones((1, 4))}})
    assert lz.open_store(places).models() == ["acme/toy", "own"]
    assert lz.open_store(tmp_path / "mine").models() == ["own"]


# ---------------------------------------------------------------------------------------------------------------- removing


def test_a_prompt_that_a_lower_store_holds_cannot_be_deleted(layered: Store, tmp_path: Path) -> None:
    before = tree(tmp_path / "mine")
    for prompts in (["one"], ["three"], ["four", "three"]):  # only the team's; in both; one of the two
        with pytest.raises(ReadOnlyError, match=rf"(?s)1 of {len(prompts)} prompts.*{tmp_path}/team.*nothing was deleted"):
            layered.delete("acme/toy", prompts)
    assert tree(tmp_path / "mine") == before
    with pytest.raises(MissingPromptsError, match=r"team/acme.* and .*mine/acme"):
        layered.delete("acme/toy", ["nowhere"])
    assert layered.delete("acme/toy", ["four"]) == 1
    assert layered.dataset().text.values.tolist() == TEAM


def test_eviction_and_clearing_take_from_the_last_only(layered: Store, tmp_path: Path) -> None:
    places = [str(tmp_path / "team"), str(tmp_path / "mine")]
    plan = lz.evict(places, max_gb=0, min_age=0, dry_run=True)
    assert plan is not None
    assert len(plan.entries) == 1
    assert layered.dataset().sizes["prompt"] == 4
    gone = lz.evict(layered, max_gb=0, min_age=0)
    assert gone is not None
    assert (len(gone.entries), gone.kept) == (1, gone.columns)
    assert layered.dataset().text.values.tolist() == ["one", "two"], "what was replaced below stays hidden"
    layered.write(GROUP, make_batch(["five"]))
    assert lz.clear_cache("acme/toy", url=places) == 1
    assert lz.clear_cache(url=layered) == 0
    assert not (tmp_path / "mine" / GROUP.name).exists()
    assert lz.open_store(places).dataset().text.values.tolist() == TEAM
    layered.annotate("acme/toy", {"label": {"one": 5}})
    assert layered.dataset().label.values.tolist() == [5, 1, 0]


# ----------------------------------------------------------------------------------------------------------- as the cache


def test_upkeep_acts_on_the_last_store_only(layered: Store, tmp_path: Path) -> None:
    for i, text in enumerate(["five", "six"]):
        layered.write(GROUP, make_batch([text], seed=3 + i))
    before = layered.dataset().load()
    plan = layered.compact(progress=False)
    assert (plan.parts, plan.parts_after) == (3, 1)
    xr.testing.assert_identical(layered.dataset().load().drop_attrs(), before.drop_attrs())
    assert len(layered.gc(max_age=0).replaced) == 3
    xr.testing.assert_identical(lz.open_store([tmp_path / "team", tmp_path / "mine"]).dataset().load().drop_attrs(), before.drop_attrs())
    summary = layered.copy_to(tmp_path / "copied", progress=False)
    assert summary.copied == 1
    assert _texts(lz.open_store(tmp_path / "copied")) == ["three", "four", "five", "six"], "what is mine"
    assert layered.drop(None, ["resid"]) == 1
    tokens = layered.tokens()
    there = tokens.resid.notnull().all(("layer", "hidden")).values
    held = set(map(prompt_hash, TEAM))
    assert there.tolist() == [prompt in held for prompt in tokens.prompt.values], "below they go on to show"
    with pytest.raises(InvalidArgumentError, match="publish each of them alone"):
        layered.publish(tmp_path / "public")
    assert not (tmp_path / "public").exists()


def test_a_published_copy_can_be_a_lower_store_but_not_the_last(team: Path, tmp_path: Path) -> None:
    lz.open_store(team, "r").publish(tmp_path / "public", progress=False)
    store = lz.open_store([tmp_path / "public", tmp_path / "own"])
    store.write(GROUP, make_batch(MINE, seed=2))
    assert _texts(store) == [*TEAM, "four"]
    assert _texts(pickle.loads(pickle.dumps(store))) == [*TEAM, "four"]  # noqa: S301
    turned = lz.open_store([tmp_path / "own", tmp_path / "public"])
    assert turned.mode == "r"
    with pytest.raises(ReadOnlyError):
        turned.write(GROUP, make_batch(["seven"]))
    with pytest.raises(ReadOnlyError, match="published copy"):
        lz.open_store([tmp_path / "own", tmp_path / "public"], "a")


def test_cache_info_of_layered_stores_counts_each_root_separately(layered: Store, tmp_path: Path) -> None:
    places = [str(tmp_path / "team"), str(tmp_path / "mine")]
    for place in (places, layered):
        info = lz.cache_info(store=place)
        assert info.url == places[1]
        assert [model.num_prompts for model in info.models] == [2]
        assert [(lower.url, [model.num_prompts for model in lower.models]) for lower in info.below] == [(places[0], [3])]
        assert info.total_size_bytes == info.models[0].size_bytes == lz.cache_info(store=places[1]).total_size_bytes
        assert f"read only  {places[0]}" in str(info)
        found = lz.discover_cached("acme/toy", "one", store=place)
        assert found is not None
        assert found.pooled == {"mean": [0, 1, 3]}
        assert [cached.prompt for cached in lz.list_cached_prompts("acme/toy", store=place)] == ["one", "two", "three", "four"]


def test_the_cache_itself_may_be_layered(team: Path, tmp_path: Path) -> None:
    for backend in ([team, tmp_path / "cache"], lz.open_store([team, tmp_path / "cache" / ".zarr"])):
        lz.set_cache_backend(backend)
        found = lz.discover_cached("acme/toy", "one")
        assert found is not None, "also before anything is written to the last"
        assert [lower.url for lower in lz.cache_info().below] == [str(team)]
        store = lz.open_store()
        assert store.is_default
        assert [lower.url for lower in store.stack] == [str(team), str(tmp_path / "cache" / ".zarr")]
        store.annotate("acme/toy", {"mine": {"one": 1}})
        assert lz.clear_cache() == 1
    with pytest.raises(InvalidTypeError, match="not int"):
        lz.set_cache_backend([team, 3])
    with pytest.raises(InvalidArgumentError, match="empty"):
        lz.set_cache_backend([])


# ------------------------------------------------------------------------------------------------------------------ errors


def test_a_first_place_that_cannot_be_read_is_an_error_that_names_it(team: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        lz.open_store([tmp_path / "nowhere", mine])
    with pytest.raises(StoreNotFoundError, match="mine"):
        lz.open_store([team, mine], "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(NotAStoreError, match=r"other.*thesis\.tex"):
        lz.open_store([team, tmp_path / "other", mine])
    with pytest.raises(InvalidArgumentError, match=r"named twice.*the one to write to last"):
        lz.open_store([team, str(team)])
    with pytest.raises(InvalidArgumentError, match="list of places is empty"):
        lz.open_store([])
    with pytest.raises(InvalidTypeError, match="not by int"):
        lz.open_store([team, 3])  # type: ignore[list-item]
    with pytest.raises(ModelNotStoredError, match=r"team and .*mine"):
        lz.open_store([team, mine]).dataset("other/model")
    assert not mine.exists()


def test_storage_options_are_for_the_urls_or_one_by_one(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []
    real = fsspec.core.url_to_fs

    def url_to_fs(url: str, **options: Any) -> Any:
        seen.append((url, options))
        return real(url)

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    lz.open_store([team, "memory://layered-options"], storage_options={"anon": True})
    lz.open_store([team, "memory://layered-options"], storage_options=[None, {"key": "k"}])
    assert seen == [("memory://layered-options", {"anon": True}), ("memory://layered-options", {"key": "k"})]
    with pytest.raises(InvalidArgumentError, match="1 mappings for 2 places"):
        lz.open_store([team, tmp_path / "mine"], storage_options=[None])


def test_damage_in_a_lower_store_is_reported_with_its_root_and_can_be_skipped(tmp_path: Path) -> None:
    team, mine = lz.open_store(tmp_path / "team"), lz.open_store(tmp_path / "mine")
    name = team.write(GROUP, make_batch(TEAM))
    mine.write(GROUP, make_batch(MINE, seed=2))
    files = (tmp_path / "team" / GROUP.name / name / "prompts" / "resid_mean").rglob("*")
    chunk = next(file for file in files if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    layered = lz.open_store([team, mine])
    with pytest.raises(CorruptPartError, match=f"{tmp_path}/team") as caught:
        layered.dataset().resid_mean.load()
    with pytest.warns(CacheWarning, match="going on without"):
        layered.set_aside(caught.value)
    assert len(layered.view(GROUP, whole=False)) == 2
    with pytest.raises(CorruptPartError, match="team"):
        layered.view(GROUP)
    assert len(mine.view(GROUP)) == 2


# ----------------------------------------------------------------------------------------------------------------- models


def plain(folder: Path, prompts: list[str], root: Path) -> Store:
    store = lz.open_store(root, durable=False)
    lz.extract(folder, prompts, store=store, device="cpu", progress=False, keep_tokens=True)
    return store


@pytest.mark.model
def test_only_what_no_place_has_is_extracted_and_into_the_last(tmp_path: Path, runs: list[int]) -> None:
    pytest.importorskip("torch")
    from tiny_models import PROMPTS, save_tiny

    folder = save_tiny("llama", tmp_path / "llama")
    plain(folder, PROMPTS[:3], tmp_path / "team")
    truth = plain(folder, PROMPTS, tmp_path / "truth")
    before, places = tree(tmp_path / "team"), [tmp_path / "team", tmp_path / "mine"]
    runs.clear()
    assert lz.plan_extract(folder, PROMPTS, store=places, keep_tokens=True).missing == 3
    stats = lz.extract(folder, PROMPTS, store=places, device="cpu", progress=False, keep_tokens=True, coords={"label": list(range(6))})
    assert (stats.found, stats.extracted, runs) == (3, 3, [3])
    again = lz.extract(folder, PROMPTS, store=places, device="cpu", progress=False, pooling=["mean", "last_token"])
    assert (again.derived, again.extracted, again.model_loaded) == (6, 0, False)
    layered, mine = lz.open_store(places), lz.open_store(tmp_path / "mine")
    assert layered.dataset().label.values.tolist() == list(range(6))
    np.testing.assert_allclose(layered.tokens().resid.values, truth.tokens(prompts=PROMPTS).resid.values, atol=1e-5)
    means = np.stack([truth.tokens().resid.sel(prompt=prompt_hash(p)).mean("token").values for p in PROMPTS], axis=1)
    np.testing.assert_allclose(layered.dataset().resid_mean.values, means, atol=1e-5)
    assert mine.tokens("llama").prompt.to_index().nunique() == 3
    assert tree(tmp_path / "team") == before


@pytest.mark.model
def test_a_probe_learns_from_all_places_and_adds_to_the_last(tmp_path: Path, runs: list[int]) -> None:
    pytest.importorskip("torch")
    from tiny_models import PROMPTS, save_tiny

    folder = save_tiny("llama", tmp_path / "llama")
    lz.extract(folder, PROMPTS[:4], store=tmp_path / "team", device="cpu", progress=False)
    before, places = tree(tmp_path / "team"), [tmp_path / "team", tmp_path / "mine"]
    alone = lz.Probe(folder, layers=2, device="cpu", store=tmp_path / "alone", random_state=0).fit(PROMPTS[:3], PROMPTS[3:])
    runs.clear()
    probe = lz.Probe(folder, layers=2, device="cpu", store=places, random_state=0).fit(PROMPTS[:3], PROMPTS[3:])
    assert runs == [2]
    opened = lz.Probe(folder, layers=2, device="cpu", store=lz.open_store(places), random_state=0).fit(PROMPTS[:3], PROMPTS[3:])
    assert runs == [2]
    np.testing.assert_allclose(probe.predict_proba(PROMPTS), alone.predict_proba(PROMPTS), atol=1e-4)
    np.testing.assert_array_equal(probe.predict_proba(PROMPTS), opened.predict_proba(PROMPTS))
    assert tree(tmp_path / "team") == before


def test_values_are_read_from_different_kinds_of_places(team: Path, tmp_path: Path) -> None:
    far = FsspecStorage(fsspec.filesystem("memory"), f"/far-{os.getpid()}", f"memory://far-{os.getpid()}")
    layered = lz.open_store([team, Store(far)])
    layered.write(GROUP, make_batch(MINE, seed=2))
    try:
        expected = [*make_batch(TEAM, seed=1).prompts["resid_mean"][1, :2], *make_batch(MINE, seed=2).prompts["resid_mean"][1]]
        np.testing.assert_array_equal(layered.dataset().resid_mean.isel(layer=1).values, expected)
    finally:
        far.remove_tree("")
