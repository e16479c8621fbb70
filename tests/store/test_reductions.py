"""Reductions of stored float16, bfloat16 and float32 by xarray, eager and with Dask, against the same in float64."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError

Array = npt.NDArray[Any]
Operation = Callable[[Any, random.Random], Any]

#: Half a step of each; of float32 as many as the sums of these tests may lose.
STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-17}
PROMPTS = [f"prompt {i}" for i in range(48)]
COUNTS = [1 + i % 4 for i in range(48)]
ANIMALS = [("cat", "dog", "eel")[i % 3] for i in range(48)]
HIDDEN = 4


def values_around(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Numbers around 1, 5, 0.1 and 300, as hidden dimensions with outliers have them."""
    return np.asarray(rng.standard_normal(shape) + np.resize([1, 5, 0.1, 300], shape[-1]))


# ------------------------------------------------------------------------------------------------- random chains


def sample_dim(data: Any) -> str:
    return "token" if "token" in data.dims else "prompt"


def select_rows(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    if dim not in data.dims:
        return data
    n = data.sizes[dim]
    return data.isel({dim: rng.choice([slice(0, max(1, n // 2)), slice(None, None, 2), sorted(rng.sample(range(n), (n + 1) // 2))])})


def select_layer(data: Any, rng: random.Random) -> Any:
    return data.isel(layer=rng.randrange(data.sizes["layer"])) if "layer" in data.dims else data


def centre(data: Any, rng: random.Random) -> Any:
    return data - data.mean(rng.choice(list(data.dims)))


def scale(data: Any, rng: random.Random) -> Any:
    return data * rng.choice([0.5, 3.0])


def turn(data: Any, rng: random.Random) -> Any:
    dims = list(data.dims)
    rng.shuffle(dims)
    return data.transpose(*dims)


STEPS: list[Operation] = [select_rows, select_layer, centre, scale, turn]


def reduce_by(name: str, **options: Any) -> Operation:
    def reduce(data: Any, rng: random.Random) -> Any:
        dims = list(data.dims)
        return getattr(data, name)(rng.sample(dims, rng.randrange(1, len(dims) + 1)), **options)

    reduce.__name__ = name
    return reduce


def norm(data: Any, _: random.Random) -> Any:
    return (data**2).sum("hidden") ** 0.5


def quantile(data: Any, rng: random.Random) -> Any:
    dim = rng.choice(list(data.dims))
    whole = data.chunk({dim: -1}) if data.chunks is not None else data  # Dask has no quantile over chunks
    return whole.quantile(0.25, dim).drop_vars("quantile")


def by_group(data: Any, rng: random.Random) -> Any:
    return getattr(data.groupby("animal"), rng.choice(["mean", "sum", "std", "max"]))() if sample_dim(data) in data.dims else data


def weighted(data: Any, rng: random.Random) -> Any:
    dim = sample_dim(data)
    if dim not in data.dims:
        return data
    weights = xr.DataArray(np.linspace(0.5, 2, data.sizes[dim]), dims=dim)
    return getattr(data.weighted(weights), rng.choice(["mean", "sum", "std"]))(dim)


def rolling(data: Any, rng: random.Random) -> Any:
    dim = rng.choice(list(data.dims))
    return getattr(data.rolling({dim: min(3, data.sizes[dim])}, min_periods=1), rng.choice(["mean", "sum", "max"]))()


def coarsen(data: Any, rng: random.Random) -> Any:
    data = data.drop_vars("animal", errors="ignore")  # a coordinate of texts has no mean
    return getattr(data.coarsen({rng.choice(list(data.dims)): 2}, boundary="trim"), rng.choice(["mean", "sum", "std"]))()


def cumulative(data: Any, rng: random.Random) -> Any:
    return data.cumsum(rng.choice(list(data.dims)))


def product(data: Any, rng: random.Random) -> Any:
    return data.dot(data, dim=rng.choice(list(data.dims)))


REDUCTIONS: list[Operation] = [
    *(reduce_by(name) for name in ("mean", "sum", "std", "var", "min", "max", "median")),
    reduce_by("std", ddof=1),
    *(quantile, norm, by_group, weighted, rolling, coarsen, cumulative, product),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, xr.DataArray]]]:
    """A store of each dtype, in two parts of which the second lacks a layer, and its values in float64."""
    return {dtype: fill(tmp_path_factory.mktemp(dtype), dtype) for dtype in STEP}


def fill(place: Path, dtype: str) -> tuple[Any, dict[str, xr.DataArray]]:
    torch = pytest.importorskip("torch")
    rng, store = np.random.default_rng(0), lz.open_store(place / "acts", durable=False)
    ends = np.cumsum([0, *COUNTS])
    held = {"resid": values_around(rng, (2, ends[-1], HIDDEN)), "resid_mean": values_around(rng, (2, 48, HIDDEN))}
    exact = {name: torch.from_numpy(values).to(getattr(torch, dtype)) for name, values in held.items()}
    for first, last, layers in ((0, 30, (0, 1)), (30, 48, (0,))):
        lz.write_activations(
            store,
            model="m",
            prompts=PROMPTS[first:last],
            activations={"resid": {i: [exact["resid"][i, ends[j] : ends[j + 1]] for j in range(first, last)] for i in layers}},
            pooled={"resid_mean": {i: exact["resid_mean"][i, first:last] for i in layers}},
            coords={"animal": ANIMALS[first:last]},
        )
    truth = {}
    for name, values in exact.items():
        dim, lacking = ("token", ends[30]) if name == "resid" else ("prompt", 30)
        array = xr.DataArray(values.double().numpy().copy(), dims=("layer", dim, "hidden"), coords={"layer": [0, 1]})
        array[1, lacking:] = np.nan
        animals = np.repeat(ANIMALS, COUNTS) if dim == "token" else np.array(ANIMALS)
        truth[name] = array.assign_coords(animal=(dim, animals.astype(object)))
    return store, truth


def opened(store: Any, how: str, name: str) -> xr.DataArray:
    """A variable as each way of opening gives it, with the coordinates that the tests use."""
    level, chunks = ("tokens", {"token": 31}) if name == "resid" else ("prompts", {"prompt": 13})
    if how == "engine":
        data = xr.open_dataset(store.url, engine="lmprobe_zarr", level=level)
    elif how == "engine, Dask":
        with pytest.warns(UserWarning, match="separate the stored chunks"):  # as with every engine
            data = xr.open_dataset(store.url, engine="lmprobe_zarr", level=level, chunks=chunks)
    elif how == "tree":
        data = store.datatree()[f"{store.find_group().name}/{level}"].to_dataset()
    else:
        data = (store.tokens if name == "resid" else store.dataset)(chunks=chunks if how == "store, Dask" else None)
    assert (data[name].chunks is not None) == how.endswith("Dask")
    return data[name].drop_vars(set(data.coords) - {"layer", "animal"})


WAYS = ("store", "store, Dask", "engine", "engine, Dask", "tree")


def assert_close(got: Any, expected: Any, dtype: str, largest: float, what: object) -> None:
    assert got.dims == expected.dims, what
    np.testing.assert_allclose(got.values, expected.values, rtol=4 * STEP[dtype], atol=STEP[dtype] * largest, err_msg=str(what))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["resid", "resid_mean"])
@pytest.mark.parametrize("dtype", STEP)
@given(
    how=st.sampled_from(WAYS),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**16)), max_size=3),
    last=st.tuples(st.sampled_from(REDUCTIONS), st.integers(0, 2**16)),
)
@settings(max_examples=20, deadline=None)
def test_chains_with_reductions_give_what_float64_gives(
    stores: Any, dtype: str, name: str, how: str, steps: list[tuple[Operation, int]], last: tuple[Operation, int]
) -> None:
    store, truth = stores[dtype]
    ours, oracle = opened(store, how, name), truth[name]
    largest = float(np.nanmax(np.abs(oracle)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        for operation, seed in [*steps, last]:
            expected = operation(oracle, random.Random(seed))
            try:
                got = operation(ours, random.Random(seed))
            except NotImplementedError:  # Dask has no median over chunks
                assert how.endswith("Dask")
                return
            # Sums of numbers that cancel are as far off as those of their magnitudes.
            magnitudes = operation(abs(oracle), random.Random(seed))
            ours, oracle = got, expected
            largest = max(largest, *(float(np.nanmax(np.abs(values), initial=0)) for values in (oracle, magnitudes)))
        assert_close(ours, oracle, dtype, largest, (how, steps, last))


@pytest.mark.few(2)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", STEP)
def test_reductions_give_what_numpy_and_pandas_give(stores: Any, dtype: str, how: str) -> None:
    store, truth = stores[dtype]
    for name, array in truth.items():
        ours, right = opened(store, how, name), array.values
        dim = array.dims[1]
        frame = pd.DataFrame(right[0]).assign(animal=array.animal.values)

        def check(found: Any, expected: Any, dtype: str = dtype) -> None:
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=4 * STEP[dtype], atol=4 * STEP[dtype])

        check(ours.mean(dim).values, np.nanmean(right, axis=1))
        check(ours.sum(dim).values, np.nansum(right, axis=1))
        check(ours.std(dim).values, np.nanstd(right, axis=1))
        check(ours.var(dim).values, np.nanvar(right, axis=1))
        check(((ours**2).sum("hidden") ** 0.5).values, np.sqrt(np.nansum(right**2, axis=2)))
        by_animal = ours.isel(layer=0).groupby("animal").mean()
        check(by_animal.values, frame.groupby("animal").mean().values)
        rolled = ours.isel(layer=0).rolling({dim: 5}).mean()
        check(rolled.transpose(dim, "hidden").values, pd.DataFrame(right[0]).rolling(5).mean().values)
        weights = np.linspace(0.5, 2, right.shape[1])
        found = ours.isel(layer=0).weighted(xr.DataArray(weights, dims=dim)).mean(dim)
        check(found.values, np.average(right[0], axis=0, weights=weights))
        times = pd.date_range("2026-01-01", periods=right.shape[1], freq="h")
        by_day = ours.isel(layer=0).assign_coords({dim: times}).resample({dim: "D"}).mean()
        check(by_day.values, pd.DataFrame(right[0], index=times).resample("D").mean().values)


def test_a_mean_of_many_float16_is_neither_stuck_nor_infinite(tmp_path: Path) -> None:
    values = values_around(np.random.default_rng(0), (20_000, 4)).astype(np.float16)
    store = lz.open_store(tmp_path / "acts")
    lz.write_activations(store, model="m", prompts=list(map(str, range(20_000))), pooled={"resid_mean": {0: values}})
    with np.errstate(all="ignore"):
        wrong = store.dataset(dtype="stored").resid_mean.mean("prompt").values
    assert not np.allclose(wrong, values.astype(float).mean(0), rtol=0.1)
    every: list[Any] = [None, {}, "auto"]
    for chunks in every:
        found = store.dataset(chunks=chunks).resid_mean.mean("prompt").values[0]
        np.testing.assert_allclose(found, values.astype(float).mean(0), rtol=2e-3)


@pytest.mark.parametrize("dtype", STEP)
def test_the_stored_dtype_is_named_and_given_where_it_is_wanted(stores: Any, tmp_path: Path, dtype: str) -> None:
    store, truth = stores[dtype]
    kept = "float16" if dtype == "float16" else "float32"
    trees = [(store.datatree(dtype=d), d) for d in (None, "stored")]
    for opener in (store.dataset, lambda **o: xr.open_dataset(store.url, engine="lmprobe_zarr", **o)):
        safe, stored = opener().resid_mean, opener(dtype="stored").resid_mean
        assert (safe.dtype, stored.dtype) == (np.dtype(np.float32), np.dtype(kept))
        assert safe.attrs["stored_dtype"] == stored.attrs["stored_dtype"] == dtype
        for found in (safe, stored):
            np.testing.assert_array_equal(found.values, truth["resid_mean"].values)
    for tree, wanted in trees:
        assert tree[f"{store.find_group().name}/tokens"].resid.dtype == (kept if wanted else "float32")
    array = store.dataset().resid_mean
    data = array.drop_vars(set(array.coords) - {"layer"}).to_dataset()  # texts of numpy have no place in Zarr v3 yet
    data.to_zarr(tmp_path / "copy.zarr", zarr_format=3, consolidated=False)
    assert xr.open_zarr(tmp_path / "copy.zarr", consolidated=False).resid_mean.attrs["stored_dtype"] == dtype


def test_a_variable_in_three_dtypes_is_exact_and_names_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store, rng = lz.open_store(tmp_path / "acts"), np.random.default_rng(1)
    kinds = [torch.float16, torch.bfloat16, torch.float32]
    held = [torch.from_numpy(values_around(rng, (2, 4))).to(kind) for kind in kinds]
    for i, values in enumerate(held):
        lz.write_activations(store, model="m", prompts=[f"{i} a", f"{i} b"], pooled={"resid_mean": {0: values}})
    for dtype in (None, "stored"):
        array = store.dataset(dtype=dtype).resid_mean
        assert array.dtype == np.float32
        assert array.attrs["stored_dtype"] == "bfloat16, float16, float32"
        np.testing.assert_array_equal(array.values[0], np.concatenate([values.double().numpy() for values in held]))


@pytest.mark.parametrize("dtype", ["float32", "float16", np.float32, "Stored", True, ""])
def test_any_other_dtype_is_refused_with_what_to_give(tmp_path: Path, dtype: Any) -> None:
    store = lz.open_store(tmp_path / "acts")
    lz.write_activations(store, model="m", prompts=["a"], pooled={"resid_mean": {0: np.ones((1, 2), np.float16)}})
    for call in (store.dataset, lambda **o: xr.open_dataset(store.url, engine="lmprobe_zarr", **o), store.datatree):
        with pytest.raises(InvalidArgumentError, match="'stored'"):
            call(dtype=dtype)
