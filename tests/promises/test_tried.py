"""What other people's reports of xarray, zarr, scikit-learn and torch say goes wrong, tried here; ``docs/design/tried.md`` is the list."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import LabelError

N = 30
PAGE = Path(__file__).resolve().parents[2] / "docs" / "design" / "tried.md"


def _store(folder: Path, seed: int) -> tuple[lz.Store, dict[str, Any]]:
    """A store, and the vectors of each prompt, shape (layer, hidden)."""
    rng = np.random.default_rng(seed)
    prompts = [f"prompt {i} of {seed}" for i in range(N)]
    values = rng.standard_normal((2, N, 4)).astype(np.float32)
    store = lz.open_store(folder)
    columns = {"label": np.arange(N) % 2, "word": np.array(["a", "b", "c"])[np.arange(N) % 3]}
    lz.write_activations(store, model="m", prompts=prompts, pooled={"resid_mean": dict(enumerate(values))}, coords=columns)
    return store, {lz.prompt_hash(prompt): values[:, i] for i, prompt in enumerate(prompts)}


def _expected(data: xr.Dataset, truth: dict[str, Any]) -> Any:
    return np.stack([truth[label] for label in data.prompt.values.tolist()], axis=1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[lz.Store, dict[str, Any]]]:
    return [_store(tmp_path_factory.mktemp(f"store{seed}") / "store", seed) for seed in (1, 2)]


def test_dask_arrays_of_two_stores_are_not_taken_for_the_same(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    (left, one), (right, other) = stores
    both = xr.concat([left.dataset("m", chunks={}), right.dataset("m", chunks={})], "prompt")
    np.testing.assert_array_equal(both.resid_mean.values, _expected(both, one | other))


def test_an_array_of_a_lazy_variable_reads_nothing(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    array = stores[0][0].dataset("m").resid_mean
    again = xr.DataArray(array.variable, coords=array.coords)
    assert (again.nbytes, len(again)) == (2 * N * 4 * 4, 2)
    assert repr(again)
    assert not again.variable._in_memory


def test_masks_lists_and_points_read_what_numpy_reads(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    store, truth = stores[0]
    data = store.dataset("m")
    values = _expected(data, truth)
    rng = np.random.default_rng(0)
    mask = rng.random(N) < 0.5
    np.testing.assert_array_equal(data.resid_mean[:, mask], values[:, mask])
    np.testing.assert_array_equal(data.resid_mean.where(xr.DataArray(mask, dims="prompt"), drop=True), values[:, mask])
    layer, prompt = (xr.DataArray(rng.integers(0, n, 9), dims="point") for n in (2, N))
    np.testing.assert_array_equal(data.resid_mean.isel(layer=layer, prompt=prompt), values[layer.values, prompt.values])


def test_halves_put_together_are_the_whole(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    data = stores[0][0].dataset("m")
    halves = [data.isel(prompt=slice(0, 11)), data.isel(prompt=slice(11, None))]
    xr.testing.assert_identical(xr.concat(halves, "prompt").load(), data.load())


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("chunks", [None, {}])
def test_what_is_appended_to_a_zarr_is_all_there(
    stores: list[tuple[lz.Store, dict[str, Any]]], tmp_path: Path, zarr_format: Any, chunks: Any
) -> None:
    data = stores[0][0].dataset("m", chunks=chunks)
    for rows in (slice(0, 7), slice(7, N)):
        more: dict[str, Any] = {"append_dim": "prompt"} if rows.start else {"zarr_format": zarr_format}
        data.isel(prompt=rows).to_zarr(tmp_path / "zarr", consolidated=False, **more)
    with xr.open_zarr(tmp_path / "zarr", consolidated=False) as back:
        np.testing.assert_array_equal(back.resid_mean, _expected(data, stores[0][1]))
        assert back.text.values.tolist() == data.text.values.tolist()


def test_labels_of_pandas_are_matched_by_their_index(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    data = stores[0][0].dataset("m")
    right = lz.sweep(data.resid_mean, "label", "ridge", 3).accuracy
    labels = pd.Series(data.label.values, index=data.prompt.values).sample(frac=1, random_state=0)
    np.testing.assert_array_equal(lz.sweep(data.resid_mean, labels, "ridge", 3).accuracy, right)
    numbered = pd.Series(data.label.values).sample(frac=1, random_state=0)
    with pytest.raises(LabelError, match="without prompts as its index"):
        lz.sweep(data.resid_mean, numbered, "ridge", 3)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", [{"transform_output": "pandas"}, {"enable_metadata_routing": True}, {"assume_finite": True}])
def test_settings_of_scikit_learn_change_no_score(stores: list[tuple[lz.Store, dict[str, Any]]], options: dict[str, Any]) -> None:
    import sklearn

    data = stores[0][0].dataset("m")
    right = lz.sweep(data.resid_mean, "label", ["ridge", "logistic_regression"], 3, controls="shuffled_labels").auroc
    with sklearn.config_context(**options):
        found = lz.sweep(data.resid_mean, "label", ["ridge", "logistic_regression"], 3, controls="shuffled_labels").auroc
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("options", [{"keep_attrs": True}, {"keep_attrs": False}, {"arithmetic_join": "exact"}])
def test_settings_of_xarray_change_no_score(stores: list[tuple[lz.Store, dict[str, Any]]], options: dict[str, Any]) -> None:
    data = stores[0][0].dataset("m")
    right = lz.sweep(data.resid_mean, "label", "ridge", 3)
    with xr.set_options(**options):  # type: ignore[no-untyped-call]
        found = lz.sweep(data.resid_mean, "label", "ridge", 3)
        lz.compare(found, along="layer")
    np.testing.assert_array_equal(found.auroc, right.auroc)


def test_a_view_goes_through_pickle_lazily(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    store, truth = stores[0]
    data = pickle.loads(pickle.dumps(store.dataset("m")))  # noqa: S301 (our own)
    assert not data.resid_mean.variable._in_memory
    np.testing.assert_array_equal(data.resid_mean, _expected(data, truth))


@pytest.mark.model
def test_values_and_tensors_are_on_the_cpu_and_can_be_written_into(stores: list[tuple[lz.Store, dict[str, Any]]]) -> None:
    torch = pytest.importorskip("torch")
    data = stores[0][0].dataset("m")
    torch.set_default_device("meta")
    try:
        tensor = data.resid_mean.lz.to_torch()
    finally:
        torch.set_default_device(None)
    assert tensor.device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (data.resid_mean.values, data.resid_mean.sel(layer=1).values, data.label.values, data.n_tokens.values):
            torch.from_numpy(values)


def test_every_report_on_the_page_names_a_test_that_exists() -> None:
    known = {
        name for path in PAGE.parents[2].glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text("utf-8"))
    }
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| [")]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert set(named) <= known, row
        assert named or row.rstrip(" |").endswith("open"), row
