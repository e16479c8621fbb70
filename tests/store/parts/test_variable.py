"""`VirtualArray` and `LazyArray`: the short way of contiguous selections gives what the long way gives, and what plain numpy gives."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from stores import GROUP, make_batch
from xarray.core import indexing

import lmprobe_zarr as lz
from lmprobe_zarr.storage import Pace, run_all
from lmprobe_zarr.store.parts import LazyArray, variable
from lmprobe_zarr.store.parts.variable import VirtualArray
from lmprobe_zarr.store.store import Store

LAYERS, HIDDEN = 4, 8
#: Texts, layers, dtype and columns of each part. Later parts replace prompts in the middle of earlier ones; no part holds layer 2.
PARTS: tuple[tuple[range, tuple[int, ...], str, dict[str, Any]], ...] = (
    (range(20), (0, 1, 3), "float16", {"label": np.arange(20) % 3, "note": [f"note {i}" for i in range(20)]}),
    (range(20, 41), (0, 1), "float32", {"label": np.arange(21) % 2}),
    (range(5, 9), (0, 1, 3), "float16", {}),
    (range(41, 46), (3,), "float16", {"note": ["é" * (1 + i) for i in range(5)], "when": np.arange(5).astype("M8[s]")}),
    (range(30, 31), (1,), "float32", {"label": np.array([7])}),
)


def lazy(data: xr.DataArray) -> LazyArray:
    found: Any = data.variable._data
    while not isinstance(found, LazyArray):
        found = found.array
    return found


def text(i: int) -> str:
    return f"{'abcde'[: i % 5]}{i:02}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five parts, in chunks of 7 pooled rows or tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK_BYTES", "REMOTE_CHUNK_BYTES", "MIN_CHUNK_BYTES"):
            patch.setattr(f"lmprobe_zarr.store.parts.writer.{name}", 7 * HIDDEN * 2)
        made = lz.open_store(tmp_path_factory.mktemp("rows") / "acts", durable=False)
        for seed, (prompts, layers, dtype, columns) in enumerate(PARTS):
            made.write(GROUP, make_batch([text(i) for i in prompts], layers=layers, seed=seed, dtype=dtype, columns=columns))
    return made


def truth(level: str) -> np.ndarray[Any, Any]:
    """What the store holds of layers 0, 1 and 3, in the order of the prompts; NaN where no part holds it."""
    rows: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for seed, (prompts, layers, dtype, columns) in enumerate(PARTS):
        batch = make_batch([text(i) for i in prompts], layers=layers, seed=seed, dtype=dtype, columns=columns)
        assert batch.n_tokens is not None
        ends = np.cumsum(batch.n_tokens)
        for j, prompt in enumerate(prompts):
            for at, layer in enumerate(layers):
                tokens = batch.tokens["resid"][at, ends[j] - batch.n_tokens[j] : ends[j]]
                rows[layer, prompt] = tokens if level == "tokens" else batch.prompts["resid_mean"][at, j : j + 1]
    lengths = [1 + len(text(i)) % 5 if level == "tokens" else 1 for i in range(46)]
    of_layers = [
        np.concatenate([rows.get((layer, i), np.full((lengths[i], HIDDEN), np.nan)).astype("f4") for i in range(46)]) for layer in (0, 1, 3)
    ]
    return np.stack(of_layers)


def keys_of(rng: np.random.Generator, n: int) -> Any:
    """A scalar, a slice of any step, or a list with repeats, in or out of order, of an axis of `n`."""
    a, b = sorted(rng.integers(0, n + 1, 2).tolist())
    choices: list[Callable[[], Any]] = [
        lambda: int(rng.integers(n)),
        lambda: np.int64(rng.integers(-n, n)),
        lambda: slice(a, b),
        lambda: slice(None),
        lambda: slice(a, a),
        lambda: slice(b, a, -int(rng.integers(1, 4))),
        lambda: slice(None, None, -1),
        lambda: slice(a, b, int(rng.integers(2, 5))),
        lambda: rng.integers(0, n, int(rng.integers(0, 6))).tolist(),
        lambda: np.sort(rng.choice(n, min(n, 5), replace=False)),
    ]
    return choices[int(rng.integers(len(choices)))]()


def same(values: Any, others: Any) -> bool:
    """Whether values are equal, NaN to NaN, in arrays of objects too."""
    mine, other = (pd.Series(np.atleast_1d(each)).astype(object) for each in (values, others))
    return np.shape(values) == np.shape(others) and mine.equals(other)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, selections are taken apart by xarray, prompts are looked up each, and chunks are found by numpy."""

    def take() -> None:
        monkeypatch.setattr(LazyArray, "_read_neighbours", lambda *_: None)
        monkeypatch.setattr(VirtualArray, "_run_of_prompt", lambda *_: None)
        monkeypatch.setattr(VirtualArray, "_cut_few", lambda *_: None)
        monkeypatch.setattr(VirtualArray, "_runs", each_row)

    def each_row(array: VirtualArray, group: int, rows: Any) -> Any:
        return array._runs_of_each(group, np.arange(*rows.indices(array.n_rows)) if isinstance(rows, slice) else rows)

    return take


@pytest.mark.few(1)
@pytest.mark.parametrize("level", ["prompts", "tokens"])
def test_any_selection_is_that_of_numpy_by_the_short_way_and_by_the_long(
    store: Store, level: str, long_way: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = truth(level)
    assert np.isnan(whole).any(axis=(1, 2)).all(), "each layer lacks prompts"
    name, dim = ("resid_mean", "prompt") if level == "prompts" else ("resid", "token")
    rng, seen, shortened = np.random.default_rng(18), [], 0
    real = LazyArray._read_neighbours

    def counted(self: LazyArray, key: tuple[Any, ...]) -> Any:
        nonlocal shortened
        values = real(self, key)
        shortened += values is not None
        return values

    monkeypatch.setattr(LazyArray, "_read_neighbours", counted)
    data = (store.dataset() if level == "prompts" else store.tokens())[name]
    assert data.shape == whole.shape
    for i in range(160):
        if i % 40 == 0:  # with nothing computed yet
            data = (store.dataset() if level == "prompts" else store.tokens())[name]
        layer, row, inner = keys_of(rng, 3), keys_of(rng, whole.shape[1]), slice(None) if rng.random() < 0.8 else keys_of(rng, HIDDEN)
        found = data.isel({"layer": layer, dim: row, "hidden": inner}).values
        seen.append((layer, row, inner, found))
        expected = whole[layer][..., row, :][..., inner] if isinstance(layer, int | np.integer) else whole[layer][:, row][..., inner]
        np.testing.assert_array_equal(found, expected, err_msg=repr((layer, row, inner)))
        assert found.dtype == np.float32
    assert shortened > 20
    long_way()
    data = (store.dataset() if level == "prompts" else store.tokens())[name]
    for layer, row, inner, found in seen:
        np.testing.assert_array_equal(data.isel({"layer": layer, dim: row, "hidden": inner}).values, found)


def test_columns_and_texts_are_the_same_by_both_ways(store: Store, long_way: Callable[[], None]) -> None:
    rng = np.random.default_rng(4)
    picks = [keys_of(rng, 46) for _ in range(60)]
    names = ("label", "note", "when", "text")

    def taken(whole: bool) -> list[list[Any]]:
        data = store.dataset()
        return [[data[name].values[pick] if whole else data[name].isel(prompt=pick).values for pick in picks] for name in names]

    short = taken(whole=False)
    assert store.dataset().label.values[[0, 30, 41]].tolist()[:2] == [0.0, 7.0]
    assert np.isnan(store.dataset().label.values[41])
    for found, expected in zip(short, taken(whole=True), strict=True):
        for mine, other in zip(found, expected, strict=True):
            assert same(mine, other)
    long_way()
    for found, expected in zip(short, taken(whole=False), strict=True):
        for mine, other in zip(found, expected, strict=True):
            assert same(mine, other)
            assert np.asarray(mine).dtype == np.asarray(other).dtype


@pytest.mark.few(2)
@pytest.mark.parametrize("level", ["prompts", "tokens"])
@pytest.mark.parametrize("few", [1, 10**6])
def test_the_places_of_a_slice_are_those_of_its_rows_whatever_is_kept(
    store: Store, level: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variable, "_PROMPTS_AT_A_TIME", 3)
    monkeypatch.setattr(variable, "_FEW_RUNS", few)
    data = store.dataset().resid_mean if level == "prompts" else store.tokens().resid
    array, kept = lazy(data).array, 0
    for group in range(3):
        for begin in range(0, array.n_rows, 7):
            for end in range(begin, array.n_rows + 1, 5 if level == "prompts" else 17):
                runs, each = array._runs(group, slice(begin, end)), array._runs_of_each(group, np.arange(begin, end))
                np.testing.assert_array_equal((runs.source, runs.target, runs.length), (each.source, each.target, each.length))
                held = each.source != variable.NOWHERE
                np.testing.assert_array_equal(runs.start[held], each.start[held])
                single = array._run_of_prompt(group, slice(begin, end))
                if single is not None and single[0] != variable.NOWHERE:
                    assert single == tuple(int(part[0]) for part in each)
                assert (single is not None) == (level == "prompts" and end - begin == 1) or level == "tokens"
                few_places = array._cut_few([*zip(*(part.tolist() for part in runs), strict=True)])
                if few_places is not None:
                    placed = [place for place in array._cut(runs) if place.array != variable.NOWHERE]
                    assert [place for place in few_places if place.array != variable.NOWHERE] == placed
        kept += array._runs_of_all[group] is not None
    assert kept == (3 if few > 1 else 0), "of three layers, each held by other parts"


def test_empty_selections_of_every_kind_read_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_zarr.store.parts.stored_array.StoredArray.read_rows", None)
    monkeypatch.setattr("lmprobe_zarr.store.parts.stored_array.StoredArray.read_chunk", None)
    data = store.dataset().resid_mean
    of_layers: list[Any] = [0, slice(None), slice(0), []]
    of_rows: list[Any] = [slice(3, 3), slice(0), [], slice(5, 2), slice(2, 5, -1)]
    for layer in of_layers:
        for row in of_rows:
            layers: int | None = None if layer == 0 else len(np.arange(3)[layer])
            assert data.isel(layer=layer, prompt=row).values.shape == ((0, HIDDEN) if layers is None else (layers, 0, HIDDEN))


def test_an_index_outside_is_an_error(store: Store) -> None:
    array = lazy(store.dataset().resid_mean)
    for key in ((0, 46, slice(None)), (3, 0, slice(None)), (0, -47, slice(None)), (-1, 0, slice(None))):
        with pytest.raises(IndexError, match="out of bounds"):
            array[indexing.BasicIndexer(key)]


def test_what_is_computed_from_the_rest_is_neither_sent_nor_copied(store: Store) -> None:
    array = lazy(store.tokens().resid).array
    fresh = len(pickle.dumps(array))
    expected = array.read(np.arange(3), slice(0, array.n_rows))
    assert array._runs_of_all, "computed and kept"
    assert len(pickle.dumps(array)) == fresh
    for other in (pickle.loads(pickle.dumps(array)), replace(array)):  # noqa: S301 — made here
        assert "_runs_of_all" not in vars(other)
        np.testing.assert_array_equal(other.read(np.arange(3), slice(0, other.n_rows)), expected)
    stored = replace(array, widened=False)
    assert stored.dtype == np.float32, "one part is float32"
    half = replace(array, arrays=array.arrays[:1], widened=True)
    assert half.dtype == np.float32
    assert replace(half, widened=False).dtype == np.float16


def test_threads_are_started_for_several_large_chunks_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def run(jobs: Any, pace: Pace) -> None:
        started.append(len(jobs))
        run_all(jobs, pace)

    monkeypatch.setattr("lmprobe_zarr.store.parts.pieces.run_all", run)
    whole = truth("tokens")
    np.testing.assert_array_equal(store.tokens().resid.isel(layer=1).values, whole[1])
    assert not started, "some twenty chunks of 112 bytes"
    monkeypatch.setattr("lmprobe_zarr.store.parts.pieces._ALONE", 300)
    np.testing.assert_array_equal(store.tokens().resid.isel(layer=1, token=3).values, whole[1, 3])
    assert not started, "a single chunk"
    np.testing.assert_array_equal(store.tokens().resid.isel(layer=1).values, whole[1])
    assert len(started) == 1
    monkeypatch.setattr("lmprobe_zarr.store.parts.pieces._ALONE", 2**18)
    monkeypatch.setattr(type(store.storage), "is_local", False)
    np.testing.assert_array_equal(store.tokens().resid.isel(layer=1).values, whole[1])
    assert len(started) == 2, "elsewhere each chunk is a request, which takes as long as many bytes"
