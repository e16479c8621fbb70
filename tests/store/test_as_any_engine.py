"""Datasets of a store behave as those that `xarray.open_zarr` opens: the same data in both, the same calls, the same results."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError
from lmprobe_zarr.store.store import Store

TEXTS = ["the cat sat", "a dog ran off", "the cat ran", "an eel"]
COUNTS = [3, 4, 3, 2]


def write(place: Any, value: float = 0.0, texts: list[str] = TEXTS) -> Store:
    rng = np.random.default_rng(3)
    store = lz.open_store(place, durable=False)
    arrays = [(rng.standard_normal((n, 4)) + value).astype(np.float16) for n in COUNTS[: len(texts)]]
    pooled = {0: np.stack([array.mean(0) for array in arrays]), 1: np.stack([array.max(0) for array in arrays])}
    lz.write_activations(
        store,
        model="m",
        prompts=texts,
        activations={"resid": {0: arrays, 1: [2 * array for array in arrays]}},
        pooled={"resid_mean": pooled},
        coords={"animal": ["cat", "dog", "cat", "eel"][: len(texts)], "n": [1, 2, 3, 4][: len(texts)]},
    )
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("s") / "acts")


@pytest.fixture(scope="module")
def copied(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same dataset in plain Zarr."""
    place = str(tmp_path_factory.mktemp("z") / "plain.zarr")
    plain = store.dataset().load()
    plain = plain.assign_coords({n: c.astype("U") for n, c in plain.coords.items() if c.dtype == object})
    plain.to_zarr(place, zarr_format=2, consolidated=False)
    return place


def ways(store: Store, place: str, chunks: Any) -> list[xr.Dataset]:
    """The data as the store, as the engine and as plain Zarr give them."""
    plain = xr.open_zarr(place, chunks=chunks, consolidated=False)
    plain = plain.assign_coords({n: c.astype(object) for n, c in plain.load().coords.items() if c.dtype.kind in "UT" and n != "prompt"})
    if chunks is not None:  # without its columns, by which xarray neither groups nor selects where they are Dask arrays
        plain = plain.assign({n: array.variable.chunk(chunks) for n, array in plain.data_vars.items()})
    return [store.dataset(chunks=chunks), xr.open_dataset(store.url, engine="lmprobe_zarr", chunks=chunks), plain]


def assigned(data: Any) -> Any:
    data.resid_mean[0, 0] = 7.0
    return data


def assigned_column(data: Any) -> Any:
    data.n[1] = 9
    return data


def filled(data: Any) -> Any:
    data["resid_mean"].loc[{"layer": 1}] = np.arange(4)
    return data.assign(double=data.resid_mean * 2).assign_attrs(title="t")


CALLS: dict[str, Callable[[Any], Any]] = {
    "load": lambda d: d.load(),
    "compute": lambda d: d.compute(),
    "persist": lambda d: d.persist(),
    "shallow copy": lambda d: d.copy(),
    "deep copy": lambda d: d.copy(deep=True),
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),  # noqa: S301
    "assignment": assigned,
    "assignment to a column": assigned_column,
    "assignment by label": filled,
    "assignment to a copy": lambda d: assigned(d.copy(deep=True)),
    "concat": lambda d: xr.concat(
        [d.isel(prompt=[0, 1]), d.isel(prompt=[3])], "prompt", data_vars="all", coords="different", compat="equals"
    ),
    "align": lambda d: xr.align(d, d.isel(prompt=[2, 0]), join="inner")[0],
    "reindex": lambda d: d.resid_mean.reindex(layer=[0, 1, 5]),
    "interp": lambda d: d.resid_mean.interp(layer=0.5),
    "stack": lambda d: d.resid_mean.stack(z=("prompt", "hidden")),
    "rename": lambda d: d.rename(resid_mean="x", prompt="p"),
    "swap_dims": lambda d: d.swap_dims(prompt="n").resid_mean.sel(n=[4, 1]),
    "where": lambda d: d.where(d.animal == "cat", drop=True),
    "condition": lambda d: d.isel(prompt=d.n > 1),
    "groupby": lambda d: d.resid_mean.groupby("animal").mean(),
    "query": lambda d: d.query(prompt="n > 1"),
    "sortby": lambda d: d.sortby("animal"),
    "to_dataframe": lambda d: xr.Dataset.from_dataframe(d.resid_mean.to_dataframe()[["resid_mean"]]),
    "fillna": lambda d: d.fillna(0),
    "astype": lambda d: d.resid_mean.astype("float64"),
    "chunk": lambda d: d.chunk({"prompt": 2}),
    "set_coords": lambda d: d.reset_coords("n").set_coords("n"),
    "expand_dims": lambda d: d.expand_dims(run=[1]),
    "ufunc": lambda d: np.sqrt(abs(d.resid_mean)),
    "polyfit": lambda d: d.resid_mean.polyfit("layer", 1).polyfit_coefficients,
    "to_dict": lambda d: xr.Dataset.from_dict(d.to_dict()),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("chunks", [None, {}])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_it_gives_on_plain_zarr(store: Store, copied: str, name: str, chunks: Any) -> None:
    results = []
    for data in ways(store, copied, chunks):
        result = CALLS[name](data)
        results.append((result if name == "stack" else result.drop_attrs()).load())
    if name == "stack":
        results = [result.drop_vars(["z", "prompt", "hidden"], errors="ignore").drop_attrs() for result in results]
    for result in results[:2]:
        xr.testing.assert_identical(result, results[2])
    again = store.dataset()
    assert not (again.resid_mean.values == 7).any()  # an assignment never reaches the store, nor another dataset


def test_what_was_loaded_is_not_read_again(store: Store, chunk_reads: list[tuple[str, int, int]]) -> None:
    data = store.dataset()
    first = data.resid_mean.values
    assert chunk_reads
    chunk_reads.clear()
    assert np.shares_memory(data.resid_mean.values, first)
    data.resid_mean.isel(layer=1).mean("prompt").load()
    assert data.text.values.tolist() == TEXTS
    chunk_reads.clear()
    assert data.text.values.tolist() == TEXTS
    assert chunk_reads == []
    assert store.dataset().isel(layer=0).load().resid_mean.shape == (4, 4)


def test_a_selection_of_a_lazy_array_leaves_the_whole_unread(store: Store, chunk_reads: list[tuple[str, int, int]]) -> None:
    data = store.dataset().resid_mean
    data.isel(layer=0).load()
    data.isel(layer=0).load()
    assert len(chunk_reads) == 2  # the slice keeps what it has read, not the array that it was cut from


def test_frames_of_dask_hold_the_same_numbers(store: Store) -> None:
    pytest.importorskip("dask.dataframe", exc_type=ImportError)  # some versions need pyarrow
    for data in (store.dataset(chunks={}), xr.open_dataset(store.url, engine="lmprobe_zarr", chunks={})):
        lazy: Any = data[["resid_mean"]].to_dask_dataframe(["layer", "prompt", "hidden"])
        frame = lazy.compute()
        np.testing.assert_array_equal(frame.resid_mean.to_numpy(), store.dataset().resid_mean.values.reshape(-1))


# ----------------------------------------------------------------------------------------------------------- chunks

compute: Any = importlib.import_module("dask").compute
OPENED: dict[str, Callable[[Any], Callable[..., xr.Dataset]]] = {
    "store.dataset": lambda url: lz.open_store(url).dataset,
    "store.tokens": lambda url: lz.open_store(url).tokens,
    "engine": lambda url: lambda **o: xr.open_dataset(url, engine="lmprobe_zarr", **o),
    "engine, tokens": lambda url: lambda **o: xr.open_dataset(url, engine="lmprobe_zarr", level="tokens", **o),
    "open_mfdataset": lambda url: lambda **o: xr.open_mfdataset([url], engine="lmprobe_zarr", **o),
    "open_datatree": lambda url: lambda **o: next(n for n in xr.open_datatree(url, engine="lmprobe_zarr", **o).leaves).to_dataset(),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("chunks", [{}, "auto", 2, {"layer": 1}, {"hidden": "auto"}, {"layer": -1}])
@pytest.mark.parametrize("how", OPENED)
@pytest.mark.filterwarnings("ignore:The specified chunks separate")
def test_columns_are_no_dask_arrays_and_the_page_on_slicing_works(store: Store, how: str, chunks: Any) -> None:
    opener = OPENED[how](store.url)
    data, plain = opener(chunks=chunks), opener(chunks={} if how == "open_mfdataset" else None)
    assert all(array.chunks is not None for array in data.data_vars.values())
    assert not [name for name, coord in data.coords.items() if coord.chunks is not None]
    dim = "token" if "token" in data.dims else "prompt"
    calls: list[Callable[[Any], Any]] = [
        lambda d: d.where(d.animal == "cat", drop=True),
        lambda d: d.isel({dim: d.n > 1}),
        lambda d: d.groupby("animal").mean(),
        lambda d: d.groupby("prompt").mean(),
        lambda d: d.query({dim: "n > 1"}),
    ]
    for call in calls:
        xr.testing.assert_allclose(call(data).compute(), call(plain.load()))


@pytest.mark.parametrize("chunks", [True, "automatic", 2.5, [1, 2], "", {"tokens": 3}, {"token": 3}])
def test_chunks_that_mean_nothing_are_refused(store: Store, chunks: Any) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match="chunks="):
        store.dataset(chunks=chunks)


# ----------------------------------------------------------------------------------------------- names of Dask arrays


def name_of(data: xr.Dataset) -> str:
    return str(next(iter(data.data_vars.values())).data.name)


@pytest.mark.few(2)
@pytest.mark.parametrize("how", OPENED)
def test_dask_names_are_the_same_for_the_same_content_and_others_after_a_change(tmp_path: Path, how: str) -> None:
    store = write(tmp_path / "acts")
    opener = OPENED[how](store.url)
    before = opener(chunks={})
    assert name_of(before) == name_of(opener(chunks={}))
    assert name_of(before) != name_of(opener(chunks={"hidden": 2}))
    if how != "open_datatree":
        assert name_of(before) != name_of(OPENED[how](store.url)(chunks={}, dtype="stored"))
        assert name_of(before) != name_of(OPENED[how](store.url)(chunks={}, prompts=[TEXTS[1], TEXTS[0], *TEXTS[2:]]))
    write(tmp_path / "acts", 2.0)
    after = OPENED[how](store.url)(chunks={})
    assert name_of(before) != name_of(after)
    names = list(before.data_vars)
    right = [opener(chunks=None if how != "open_mfdataset" else {})[name].values for name in names]
    for name, expected in zip(names, right, strict=True):
        both = compute(before[name].data, after[name].data)
        np.testing.assert_array_equal(both[1], OPENED[how](store.url)(chunks={})[name].values)
        assert not np.array_equal(both[0], both[1])
        del expected


@pytest.mark.few(2)
@pytest.mark.parametrize("place", ["file", "list", "two", "memory", "path", "store"])
def test_dask_arrays_of_any_kind_of_place_follow_the_content(tmp_path: Path, place: str) -> None:
    mine: Any = f"memory://as-any-engine-{tmp_path.name}" if place == "memory" else str(tmp_path / "mine")
    write(str(tmp_path / "team"), 5.0, TEXTS[:2])
    write(mine, 0.0)
    given: Any = {
        "file": f"file://{mine}", "list": [mine], "two": [str(tmp_path / "team"), mine], "memory": mine,
        "path": tmp_path / "mine", "store": lz.open_store(mine),
    }[place]  # fmt: skip
    before = xr.open_dataset(given, engine="lmprobe_zarr", chunks={}).resid_mean
    write(mine, 3.0)
    given = lz.open_store(mine) if place == "store" else given
    after = xr.open_dataset(given, engine="lmprobe_zarr", chunks={}).resid_mean
    difference = (after.drop_vars("text", errors="ignore") - before.drop_vars("text", errors="ignore")).compute()
    np.testing.assert_allclose(difference.sel(prompt=[lz.prompt_hash(text) for text in TEXTS]).values[0], 3, atol=0.02)


# --------------------------------------------------------------------------------------- no prompts, and no layers

EMPTY: dict[str, Callable[[Any], Any]] = {
    "load": lambda d: d.load(),
    "mean": lambda d: d.mean(),
    "sum over rows": lambda d: d.sum(next(dim for dim in ("token", "prompt") if dim in d.dims)),
    "groupby": lambda d: d.groupby("animal").mean(),
    "where": lambda d: d.where(d.animal == "cat", drop=True),
    "condition": lambda d: d.isel({next(dim for dim in ("token", "prompt") if dim in d.dims): (d.n > 1).values}),
    "copy": lambda d: d.copy(deep=True),
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),  # noqa: S301
    "concat": lambda d: xr.concat([d, d], "layer", data_vars="minimal", coords="minimal", compat="override"),
    "chunk": lambda d: d.chunk(),
    "persist": lambda d: d.persist(),
    "repr": lambda d: (repr(d), d._repr_html_(), d)[2],
    "std": lambda d: d.std("hidden"),
    "astype": lambda d: d.astype("float64"),
    "batches": lambda d: (list(d.lz.batches(batch_tokens=2)), d)[1],
    "norms": lambda d: d.lz.norms(),
}
if find_spec("torch"):
    EMPTY["torch"] = lambda d: ({k: v.numpy() for k, v in d.lz.to_torch().items()}, d)[1]


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of nothing
@pytest.mark.parametrize("chunks", [None, {}, "auto"])
@pytest.mark.parametrize("level", ["prompts", "tokens"])
@pytest.mark.parametrize("empty", ["prompts", "layers"])
def test_a_view_of_nothing_gives_nothing_or_a_clear_error(store: Store, empty: str, level: str, chunks: Any) -> None:
    options: dict[str, Any] = {"prompts": []} if empty == "prompts" else {}
    opener = store.dataset if level == "prompts" else store.tokens
    for data in (
        opener(chunks=chunks, **options),
        xr.open_dataset(store.url, engine="lmprobe_zarr", level=level, chunks=chunks, **options),
    ):
        nothing = data if empty == "prompts" else data.isel(layer=slice(0))
        for call in EMPTY.values():
            try:
                result = call(nothing)
            except ValueError:
                continue
            result.load()


def test_layers_that_select_nothing_are_refused(store: Store) -> None:
    for chunks in (None, "auto"):
        with pytest.raises(LayerOutOfRangeError, match="selects none"):
            store.dataset(layers=slice(7, 9), chunks=chunks)
