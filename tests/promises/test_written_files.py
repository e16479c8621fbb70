"""Everything handed out as a dataset is written by every writer of xarray without a warning, comes back the same, and still works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.interchange import TEXT, as_attributes, read_list, to_interchange
from lmprobe_zarr.probes import calibration_curves, roc_curves

N = 24
#: netCDF 3 has no integers of 64 bits and none without a sign.
NETCDF3 = {"int64": np.dtype(np.int32), "uint8": np.dtype(np.int8)}
ENGINES = ["scipy", "h5netcdf", "netcdf4", "zarr 2", "zarr 3"]


def _store(folder: Path) -> lz.Store:
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}, é, 日本" for i in range(N)]
    lengths = rng.integers(3, 6, N)
    store = lz.open_store(folder)
    lz.write_activations(
        store,
        model="acme/tøy",
        prompts=prompts,
        token_ids=[list(range(n)) for n in lengths],
        activations={"resid": {i: [rng.standard_normal((n, 4)).astype(np.float32) for n in lengths] for i in range(2)}},
        pooled={
            "resid_mean": {i: rng.standard_normal((N, 4)).astype(np.float32) for i in range(2)},
            "attn_mean": {i: rng.standard_normal((N, 4)).astype(np.float32) for i in range(2)},
        },
        coords={
            "label": np.arange(N) % 2,
            "colour": np.array(["blå", 'a "quoted" one', "red, green"])[np.arange(N) % 3],
            "right": np.arange(N) % 4 < 2,
            "year": np.linspace(1900, 2000, N),
        },
    )  # fmt: skip
    return store


def _handed_out(folder: Path) -> dict[str, xr.Dataset]:
    store = _store(folder / "store")
    views, tokens = store.dataset("acme/tøy"), store.tokens("acme/tøy")
    mean = views.resid_mean
    controls = ["shuffled_labels", "majority"]
    scores = lz.sweep(mean, "label", ["ridge", "logistic_regression"], 2, repeats=2, predictions=True, controls=controls)
    colours = lz.sweep(mean, "colour", "ridge", 2, predictions=True)
    lz.sweep(mean, "colour", "ridge", 2, out=folder / "scores")
    probes = lz.fit_tokens(tokens.resid, "label")
    one = scores.isel(layer=0, probe=0, repetition=0)
    logistic = scores.isel(layer=0, probe=1, repetition=0)
    halves = {"first": mean.isel(prompt=slice(N // 2)), "second": mean.isel(prompt=slice(N // 2, N))}
    return {
        "prompts": views,
        "prompts in Dask": store.dataset("acme/tøy", chunks={}),
        "no prompts": views.isel(prompt=slice(0)),
        "tokens": tokens,
        "tokens in Dask": store.tokens("acme/tøy", chunks={}),
        "node of a tree": store.datatree()[f"/{views.attrs['group']}/prompts"].to_dataset(),
        "coverage": store.coverage("acme/tøy").to_dataset(),
        "pooled": tokens.lz.pool("mean"),
        "padded": tokens.lz.padded(),
        "last tokens": tokens.lz.at(-1),
        "norms": tokens.lz.norms().to_dataset(),
        "statistics": mean.lz.statistics(),
        "scores": scores,
        "scores of texts": colours,
        "scores of truth values": lz.sweep(mean, "right", "ridge", 2),
        "scores of numbers": lz.sweep(mean, "year", cv=2, task="regression", predictions=True),
        "grid of scores": lz.sweep(views, ["label", "right"], ["ridge"], 2, strengths=(0.1, 10), seeds=2),
        "chosen strengths": lz.sweep(mean, "label", "ridge", 2, strengths=(0.1, 10), inner_cv=2, random_state=2**32 - 1),
        "undefined scores": lz.sweep(mean.isel(prompt=range(6)), [0, 1, 0, 1, 1, 1], "ridge", [([0, 1, 2], [4, 5]), ([0, 1, 4], [2, 3])]),
        "scores that were written": xr.open_zarr(folder / "scores").drop_encoding(),
        "intervals": lz.confidence_intervals(scores, n_resamples=20),
        "intervals of texts": lz.confidence_intervals(colours, n_resamples=20),
        "comparison": lz.compare(scores),
        "comparison of layers": lz.compare(scores, along="layer", reference=1),
        "selectivity": lz.selectivity(scores).to_dataset(),
        "transfer": lz.sweep_transfer(halves, "label", cv=2),
        "directions": lz.fit_directions(mean, "label"),
        "directions of texts": lz.fit_directions(mean, "colour", "ridge"),
        "cosines": lz.cosine_similarity({"left": lz.fit_directions(mean, "label"), "right": lz.fit_directions(mean, "right")}).to_dataset(),
        "token probes": probes,
        "token scores": lz.score_tokens(probes, tokens.resid).to_dataset(),
        "pooled token scores": lz.score_tokens(probes, tokens.resid, "score:max").to_dataset(),
        "sweep of tokens": lz.sweep_tokens(tokens.resid, "label", "ridge", 2, controls=controls),
        "ROC curves": roc_curves(one.score, one.true.values),
        "calibration curves": calibration_curves(logistic.probability, logistic.true.values),
    }  # fmt: skip


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.Dataset]:
    return _handed_out(tmp_path_factory.mktemp("handed out"))


def _there_and_back(data: Any, engine: str, folder: Path) -> Any:
    """What is read, after it was written by one of the engines; every warning is an error."""
    place = folder / engine.replace(" ", "")
    if engine.startswith("zarr"):
        # Zarr 3 warns of consolidated metadata, whatever is written.
        consolidated = engine == "zarr 2"
        data.to_zarr(place, zarr_format=int(engine[-1]), consolidated=consolidated)
        opened: Any = xr.open_datatree if isinstance(data, xr.DataTree) else xr.open_dataset
        return opened(place, engine="zarr", consolidated=consolidated, chunks=None)
    if engine != "scipy":
        pytest.importorskip({"h5netcdf": "h5netcdf", "netcdf4": "netCDF4"}[engine])
    data.to_netcdf(place, engine=engine)
    opened = xr.open_datatree if isinstance(data, xr.DataTree) else xr.open_dataset
    return opened(place, engine=engine)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _differences(data: xr.Dataset, back: xr.Dataset, engine: str) -> list[str]:
    """Where dims, coordinates, values, dtypes or attributes differ. Texts may have any dtype of texts."""
    found = [f"sizes {dict(data.sizes)} and {dict(back.sizes)}"] if data.sizes != back.sizes else []
    found += [f"variables {set(data.variables) ^ set(back.variables)}"] if set(data.variables) != set(back.variables) else []
    found += [f"coordinates {set(data.coords) ^ set(back.coords)}"] if set(data.coords) != set(back.coords) else []
    for name in set(data.variables) & set(back.variables):
        mine, theirs = data[name], back[name]
        is_text = mine.dtype.kind in "OT" and theirs.dtype.kind in "OUT"
        wanted = NETCDF3.get(str(mine.dtype), mine.dtype) if engine == "scipy" else mine.dtype
        found += [f"dtype of {name}: {mine.dtype} and {theirs.dtype}"] if not is_text and theirs.dtype != wanted else []
        found += [f"dims of {name}"] if mine.dims != theirs.dims else []
        found += [f"values of {name}"] if not _equal(mine.values, theirs.values) else []
        found += [f"attributes of {name}"] if _listed(mine.attrs) != _listed(theirs.attrs) else []
    return found + ([f"attributes {data.attrs} and {back.attrs}"] if _listed(data.attrs) != _listed(back.attrs) else [])


def _equal(mine: Any, theirs: Any) -> bool:
    return np.shape(mine) == np.shape(theirs) and (
        list(map(str, mine.ravel())) == list(map(str, theirs.ravel()))
        if mine.dtype.kind in "OT"
        else bool(np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"))
    )


def _listed(attrs: Any) -> dict[str, tuple[str, Any]]:
    """Attributes with the types of their values: 1, 1.0 and "1" are three values."""
    return {name: (type(_plain(value)).__name__, _plain(value)) for name, value in attrs.items()}


NAMES = [
    "prompts", "prompts in Dask", "no prompts", "tokens", "tokens in Dask", "node of a tree", "coverage", "pooled", "padded", "last tokens",
    "norms", "statistics", "scores", "scores of texts", "scores of truth values", "scores of numbers", "grid of scores", "chosen strengths",
    "undefined scores", "scores that were written", "intervals", "intervals of texts", "comparison", "comparison of layers", "selectivity",
    "transfer", "directions", "directions of texts", "cosines", "token probes", "token scores", "pooled token scores", "sweep of tokens",
    "ROC curves", "calibration curves",
]  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_out_comes_back_the_same(handed_out: dict[str, xr.Dataset], name: str, engine: str, tmp_path: Path) -> None:
    assert set(handed_out) == set(NAMES)
    if engine == "scipy" and name == "no prompts":
        pytest.skip("scipy cannot read a file with a dimension of length 0, whoever wrote it")
    with _there_and_back(handed_out[name], engine, tmp_path) as back:
        assert _differences(handed_out[name], back, engine) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4", "zarr 2", "zarr 3"])
def test_a_tree_comes_back_the_same(engine: str, tmp_path: Path) -> None:
    tree = _store(tmp_path / "store").datatree()
    with _there_and_back(tree, engine, tmp_path) as back:
        for node in tree.leaves:
            assert _differences(node.to_dataset(), back[node.path].to_dataset(), engine) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_read_back_still_works(handed_out: dict[str, xr.Dataset], engine: str, tmp_path: Path) -> None:
    def back(name: str) -> xr.Dataset:
        (tmp_path / name).mkdir()
        with _there_and_back(handed_out[name], engine, tmp_path / name) as opened:
            read: xr.Dataset = opened.load()
        return read

    scores = back("scores")
    assert repr(scores.lz) == repr(handed_out["scores"].lz)
    metrics = ["accuracy", "auroc"]  # Zarr without consolidated metadata has no order of variables
    assert scores.lz.table(metrics, format="csv") == handed_out["scores"].lz.table(metrics, format="csv")
    xr.testing.assert_equal(lz.confidence_intervals(scores, n_resamples=20), handed_out["intervals"])
    xr.testing.assert_equal(lz.confidence_intervals(back("scores of texts"), n_resamples=20), handed_out["intervals of texts"])
    xr.testing.assert_equal(lz.compare(scores), handed_out["comparison"])
    np.testing.assert_array_equal(lz.selectivity(scores), handed_out["selectivity"].selectivity)

    tokens = back("tokens")
    np.testing.assert_array_equal(tokens.lz.pool("mean").resid_mean, handed_out["pooled"].resid_mean)
    np.testing.assert_array_equal(tokens.resid.lz.at(-1), handed_out["last tokens"].resid)
    np.testing.assert_array_equal(lz.score_tokens(back("token probes"), tokens.resid), handed_out["token scores"].score)
    np.testing.assert_array_equal(
        lz.sweep(back("prompts").resid_mean, "colour", "ridge", 2).accuracy, handed_out["scores of texts"].accuracy
    )


DRAW: dict[str, Callable[[xr.Dataset], Any]] = {
    "scores": lambda data: data.lz.plot("auroc"),
    "sweep of tokens": lambda data: data.lz.plot(),
    "transfer": lambda data: data.isel(layer=0, probe=0).lz.plot_transfer(),
    "ROC curves": lambda data: data.lz.plot_roc(),
    "calibration curves": lambda data: data.lz.plot_calibration(),
    "cosines": lambda data: data.cosine.lz.plot_cosine(),
    "token scores": lambda data: data.score.lz.plot_tokens(str(data.prompt.values[0])),
}


@pytest.fixture(scope="module")
def drawn(handed_out: dict[str, xr.Dataset]) -> dict[str, list[str]]:
    """The texts in the plots of what was never written."""
    pytest.importorskip("matplotlib")
    return {name: _texts(plot(handed_out[name])) for name, plot in DRAW.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_read_back_still_plots(
    handed_out: dict[str, xr.Dataset], drawn: dict[str, list[str]], engine: str, tmp_path: Path
) -> None:
    for name, plot in DRAW.items():
        (tmp_path / name).mkdir()
        with _there_and_back(handed_out[name], engine, tmp_path / name) as back:
            assert _texts(plot(back)) == drawn[name], name


def _texts(axes: Any) -> list[str]:
    labels = [text.get_text() for legend in [axes.get_legend()] if legend for text in legend.get_texts()]
    return [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *labels]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, 1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (2**31, float(2**31)),
        (2**60 + 1, str(2**60 + 1)),
        ([1, 2], [1, 2]),
        ((1, 2.5), [1.0, 2.5]),
        (np.array([1, 2]), [1, 2]),
        ([7], "[7]"),
        ([], "[]"),
        (["a", 'b "c"'], '["a", "b \\"c\\""]'),
        ([True, False], "[true, false]"),
        ({"a": np.int64(1), "b": None}, '{"a": 1, "b": null}'),
        ("日本", "日本"),
    ],
)
def test_an_attribute_is_a_number_a_text_or_some_numbers(value: Any, wanted: Any, tmp_path: Path) -> None:
    found = as_attributes({"it": value, "nothing": None})
    assert found == {"it": wanted}
    assert type(found["it"]) is type(wanted)
    for engine in ENGINES:
        data = xr.Dataset(attrs=found)
        with _there_and_back(data, engine, tmp_path) as back:
            assert _listed(back.attrs) == _listed(found)
            if isinstance(value, list | tuple | np.ndarray):
                assert read_list(back.attrs, "it") == list(value)


def test_texts_become_objects_and_the_data_are_not_changed() -> None:
    data = xr.Dataset(
        {"a": ("x", [1.0, 2.0])}, coords={"x": ["é", "b"], "kind": ("x", ["u", "v"]), "model": "m"}, attrs={"names": ["p", "q"]}
    )
    before = data.copy(deep=True)
    found = to_interchange(data)
    xr.testing.assert_identical(data, before)
    assert data.kind.dtype.kind == "U"
    assert [found[name].dtype for name in ("x", "kind", "model")] == [TEXT] * 3
    assert json.loads(found.attrs["names"]) == ["p", "q"]
    assert found.sel(x="b").a == 2
    xr.testing.assert_equal(found, data)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_missing_text_is_still_missing(engine: str, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "store")
    values = np.ones((4, 2), np.float32)
    told = ["a", None, "", "é"]
    lz.write_activations(store, model="m", prompts=[*"wxyz"], pooled={"resid_mean": {0: values}}, coords={"told": told})
    with _there_and_back(store.dataset("m"), engine, tmp_path) as back:
        assert [None if value != value else value for value in back.told.values.tolist()] == told
