"""``.lz.batches``: what is read is what is stored, each chunk once; to be resumed, shared out, filtered, normalised and given to torch."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    LayerOutOfRangeError,
    MissingDependencyError,
    MissingPromptsError,
    NumberRangeError,
)
from lmprobe_zarr.store.parts import writer
from lmprobe_zarr.store.store import Store
from lmprobe_zarr.streaming.batches import Batches
from lmprobe_zarr.streaming.order import plan_reading
from lmprobe_zarr.tokens import unwrapped

Array = npt.NDArray[Any]
LAYERS = (0, 2, 5)


def fill(store: Store, parts: int = 3, prompts: int = 40, hidden: int = 16, layers: tuple[int, ...] = LAYERS, dtype: str = "f2") -> None:
    rng = np.random.default_rng(parts)
    for part in range(parts):
        lengths = rng.integers(2, 12, prompts)
        lz.write_activations(
            store,
            model="acme/toy",
            prompts=[f"{part}.{i}" for i in range(prompts)],
            activations={"resid": {layer: [(rng.standard_normal((n, hidden)) + layer).astype(dtype) for n in lengths] for layer in layers}},
            pooled={"resid_mean": {layer: rng.standard_normal((prompts, hidden)).astype(dtype) for layer in layers}},
            token_ids=[rng.integers(0, 1000, n).tolist() for n in lengths],
            coords={"label": (np.arange(prompts) % 2).tolist()},
        )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows, so that a small store has many of them."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(writer, "REMOTE_CHUNK_BYTES", 1024)
    monkeypatch.setattr(writer, "MIN_CHUNK_BYTES", 1024)


@pytest.fixture
def tokens(small_chunks: None, tmp_path: Path) -> xr.Dataset:
    store = lz.open_store(tmp_path / "acts", durable=False)
    fill(store)
    return store.tokens()


def rows_of(batches: Any) -> list[int]:
    return [int(row) for _, labels in batches for row in labels["row"]]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def assert_same(some: Any, others: Any) -> None:
    for batch, other in itertools.zip_longest(some, others):
        np.testing.assert_array_equal(batch, other)


# ------------------------------------------------------------------------------------------------------------ what comes out


def test_every_row_comes_once_with_its_values_and_labels_and_each_chunk_is_read_once(
    tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]
) -> None:
    truth = tokens.resid.sel(layer=2).compute()
    chunk_reads.clear()
    labels = ["row", "prompt", "position", "token_id", "label"]
    batches = tokens.lz.batches(layer=2, batch_tokens=50, buffer_tokens=150, labels=labels)
    found = list(batches)
    assert len(found) == len(batches) == -(-truth.sizes["token"] // 50)
    assert sorted(rows_of(found)) == list(range(truth.sizes["token"]))
    assert rows_of(found) != list(range(truth.sizes["token"]))
    for values, known in found:
        assert values.dtype == np.float16
        assert values.shape[1:] == (16,)
        np.testing.assert_array_equal(values, truth.values[known["row"]])
        for name in labels[1:]:
            np.testing.assert_array_equal(known[name], truth[name].values[known["row"]])
    assert set(Counter(chunk_reads).values()) == {1}
    part = np.array([text.split(".")[0] for text in truth.text.values])
    assert len(set(chunk_reads)) == sum(-(-int((part == number).sum()) // 32) for number in "012"), "every chunk of 32 rows"


def test_several_layers_come_together_in_the_requested_order(tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]) -> None:
    truth = tokens.resid.compute().values
    chunk_reads.clear()
    for values, labels in tokens.lz.batches(layer=[5, 0], batch_tokens=64, labels="row"):
        assert values.shape[0::2] == (2, 16)
        np.testing.assert_array_equal(values, truth[[2, 0]][:, labels["row"]])
    assert set(Counter(chunk_reads).values()) == {1}
    assert {layer for _, layer, _ in chunk_reads} == {0, 2}, "the layer in between is not read"
    assert next(iter(tokens.lz.batches(batch_tokens=8))).shape == (3, 8, 16)
    assert next(iter(tokens.isel(layer=1).lz.batches(batch_tokens=8))).shape == (8, 16)
    assert next(iter(tokens.resid.lz.batches(layer=5, batch_tokens=8))).shape == (8, 16)


def selections(tokens: xr.Dataset) -> dict[str, xr.DataArray]:
    resid = tokens.resid
    hashes = [lz.prompt_hash(text) for text in ("2.7", "0.3", "1.1", "1.0")]
    rng = np.random.default_rng(0)
    return {
        "all": resid,
        "prompts": resid.sel(prompt=hashes),
        "positions": resid.sel(position=slice(1, None)),
        "slice": resid.isel(token=slice(17, 203)),
        "stepped": resid.isel(token=slice(200, 3, -3)),
        "scattered": resid.isel(token=rng.permutation(resid.sizes["token"])[:111]),
        "repeated": resid.isel(token=[5, 5, 7, 100, 5]),
        "hidden": resid.isel(hidden=slice(2, 9)),
        "listed hidden": resid.isel(hidden=[3, 1]),
        "layers": resid.isel(layer=[2, 0], token=slice(3, 90)),
        "transposed": resid.transpose("token", "hidden", "layer"),
        "in memory": resid.isel(token=slice(20, 90)).compute(),
        "plain": xr.DataArray(resid[1].values, dims=("token", "hidden")),
        "dask": resid.chunk({"token": 60, "layer": 1}),
        "computed": resid.isel(token=slice(20, 90)) * 2,
    }


KINDS = ["all", "prompts", "positions", "slice", "stepped", "scattered", "repeated", "hidden", "listed hidden", "layers", "transposed"]
KINDS += ["in memory", "plain", "dask", "computed"]


@pytest.mark.few(6)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_any_selection_can_be_batched(tokens: xr.Dataset, kind: str, shuffle: bool) -> None:
    array = selections(tokens)[kind]
    truth = array.transpose("layer", "token", "hidden", missing_dims="ignore").values
    truth = truth if truth.ndim == 3 else truth[None]
    batches = array.lz.batches(batch_tokens=13, buffer_tokens=40, shuffle=shuffle, labels="row")
    found = list(batches)
    rows = rows_of(found)
    assert sorted(rows) == list(range(truth.shape[1]))
    assert (rows == sorted(rows)) is (not shuffle)
    for values, labels in found:
        np.testing.assert_array_equal(values if values.ndim == 3 else values[None], truth[:, labels["row"]])


def test_a_selection_of_prompts_reads_each_of_their_chunks_once(tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]) -> None:
    chosen = tokens.sel(prompt=[lz.prompt_hash(f"1.{i}") for i in range(0, 40, 9)])
    list(chosen.lz.batches(layer=0, batch_tokens=5, buffer_tokens=8))
    assert set(Counter(chunk_reads).values()) == {1}
    assert {path.split("/")[1] for path, _, _ in chunk_reads} == {tokens_part(tokens, 1)}


def tokens_part(tokens: xr.Dataset, number: int) -> str:
    array = unwrapped(tokens.resid.variable._data).array.array
    return str(sorted({member.path.split("/")[1] for member in array.arrays})[number])


def test_prompts_are_batched_as_tokens_are(small_chunks: None, tmp_path: Path, chunk_reads: list[tuple[str, int, int]]) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    fill(store)
    data = store.dataset()
    truth = data.resid_mean.sel(layer=2).values
    chunk_reads.clear()
    found = list(data.lz.batches(layer=2, batch_tokens=16, labels=["row", "prompt", "label"]))
    assert sorted(rows_of(found)) == list(range(120))
    for values, labels in found:
        np.testing.assert_array_equal(values, truth[labels["row"]])
        np.testing.assert_array_equal(labels["prompt"], data.prompt.values[labels["row"]])
        np.testing.assert_array_equal(labels["label"], data.label.values[labels["row"]])
    assert set(Counter(chunk_reads).values()) == {1}


def test_layered_stores_and_the_engine_are_streamed_chunk_by_chunk_too(
    small_chunks: None, tmp_path: Path, chunk_reads: list[tuple[str, int, int]]
) -> None:
    fill(lz.open_store(tmp_path / "team", durable=False), parts=1)
    mine = lz.open_store(tmp_path / "mine", durable=False)
    fill(mine, parts=2)
    places = [str(tmp_path / "team"), str(tmp_path / "mine")]
    for tokens in (lz.open_store(places).tokens(), xr.open_dataset(places, engine="lmprobe_zarr", model="acme/toy", level="tokens")):  # type: ignore[arg-type]
        truth = tokens.resid.sel(layer=5).values
        chunk_reads.clear()
        for values, labels in tokens.lz.batches(layer=5, batch_tokens=30, buffer_tokens=100, labels="row"):
            np.testing.assert_array_equal(values, truth[labels["row"]])
        assert set(Counter(chunk_reads).values()) == {1}
        assert len({path.split("/")[1] for path, _, _ in chunk_reads}) == 2


# -------------------------------------------------------------------------------------------------------- again and resumed


def test_the_same_options_give_the_same_batches_every_time_and_other_seeds_others(tokens: xr.Dataset) -> None:
    options = {"layer": 0, "batch_tokens": 40, "buffer_tokens": 120}
    batches = tokens.lz.batches(**options)
    first = list(batches)
    assert_same(first, batches)
    assert_same(first, tokens.lz.batches(**options, prefetch=False))
    assert_same(first, pickle.loads(pickle.dumps(batches)))  # noqa: S301 — our own
    assert any((batch != other).any() for batch, other in zip(first, tokens.lz.batches(**options, seed=1), strict=True))


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"mean": 0.5}, {"dtype": "float16", "scale": 2.0}, {"dtype": "float64"}])
def test_batches_that_are_kept_stay_as_they_are(tokens: xr.Dataset, options: dict[str, Any]) -> None:
    """Though those that are not are made where earlier ones were."""
    half = tokens.astype("float16")
    batches = half.lz.batches(layer=[0, 2], batch_tokens=40, buffer_tokens=120, **options)
    copies = [batch.copy() for batch in batches]
    assert_same(list(batches), copies)
    kept = [batch[1, 3:5].T for batch in batches]
    for row, batch in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(row, batch[1, 3:5].T)
    places = set()
    for batch in batches:
        places.add(batch.__array_interface__["data"][0])
    assert len(places) < len(copies)


@pytest.mark.few(1)
@pytest.mark.parametrize("drop_last", [False, True])
def test_iteration_resumes_at_any_step_of_any_epoch(tokens: xr.Dataset, drop_last: bool, chunk_reads: list[tuple[str, int, int]]) -> None:
    options: dict[str, Any] = {"layer": 0, "batch_tokens": 70, "buffer_tokens": 150, "epochs": 3, "labels": "row", "drop_last": drop_last}
    batches = tokens.lz.batches(**options)
    every = [rows_of([batch]) for batch in batches]
    steps = batches.steps_per_epoch
    assert len(every) == 3 * steps == len(batches)
    epochs = [flat(every[i * steps : (i + 1) * steps]) for i in range(3)]
    assert len({str(rows) for rows in epochs}) == 3
    if not drop_last:
        assert all(sorted(rows) == list(range(tokens.sizes["token"])) for rows in epochs)
    for start in range(3 * steps + 1):
        later = tokens.lz.batches(**options, start_step=start)
        assert len(later) == 3 * steps - start
        assert [rows_of([batch]) for batch in later] == every[start:]
    chunk_reads.clear()
    next(iter(tokens.lz.batches(**options, start_step=2 * steps - 1, prefetch=False)))
    assert len(chunk_reads) <= 2 * (150 // 32 + 2), "only the buffers that it needs"


def test_a_state_resumes_iteration_and_only_of_the_same_batches(tokens: xr.Dataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": 0, "batch_tokens": 70, "buffer_tokens": 150, "epochs": 2, "skip_positions": 0}
    batches = tokens.lz.batches(**options)
    running = iter(batches)
    for _ in range(7):
        next(running)
    state = batches.state_dict()
    assert state["step"] == 7
    rest = list(running)
    again = tokens.lz.batches(**options)
    again.load_state_dict(state)
    assert_same(rest, again)
    assert again.state_dict(step=3) == {"step": 3, "plan": state["plan"]}
    for other in ({"seed": 1}, {"batch_tokens": 71}, {"layer": 2}, {"skip_positions": 1}, {"epochs": 3}):
        with pytest.raises(InvalidArgumentError, match="belongs to other batches"):
            tokens.lz.batches(**{**options, **other}).load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="no state of batches"):
        batches.load_state_dict({"step": 1})
    store = lz.open_store(tmp_path / "acts", durable=False)
    lz.write_activations(store, model="acme/toy", prompts=["new"], activations={"resid": {i: [np.ones((2, 16), "f2")] for i in LAYERS}})
    with pytest.raises(InvalidArgumentError, match="adding or merging parts"):
        store.tokens().lz.batches(**options).load_state_dict(state)


def test_endless_epochs_continue(tokens: xr.Dataset) -> None:
    batches = tokens.lz.batches(layer=0, batch_tokens=300, epochs=None)
    assert len(list(itertools.islice(batches, 12))) == 12
    with pytest.raises(TypeError, match="steps_per_epoch"):
        len(batches)


# ---------------------------------------------------------------------------------------------------------- several trainers


def test_trainers_get_disjoint_rows_in_equally_many_batches_and_share_at_most_their_border_chunks(
    tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]
) -> None:
    shares = []
    for rank in range(3):
        batches = tokens.lz.batches(layer=0, batch_tokens=30, buffer_tokens=100, rank=rank, world_size=3, labels="row")
        found = list(batches)
        assert len(found) == len(batches) == -(-tokens.sizes["token"] // 90)
        shares.append(rows_of(found))
    assert sorted(flat(shares)) == list(range(tokens.sizes["token"]))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(times > 1 for times in Counter(chunk_reads).values()) <= 2, "the two borders between three trainers"


# ----------------------------------------------------------------------------------------------------------------- filters


def test_positions_and_norms_and_masks_leave_rows_out(tokens: xr.Dataset) -> None:
    array = tokens.resid.compute().copy()
    array[:, 10] *= 50
    array[1, 20] = np.inf
    norms = np.linalg.norm(array.values.astype("f8"), axis=-1)
    medians = np.array([np.median(of_layer[np.isfinite(of_layer)]) for of_layer in norms])
    position = array.position.values

    def kept(**options: Any) -> set[int]:
        return set(rows_of(array.lz.batches(batch_tokens=64, labels="row", **options)))

    everything = set(range(array.sizes["token"]))
    assert kept(layer=0, skip_positions=0) == set(np.flatnonzero(position > 0))
    assert kept(layer=0, skip_positions=[0, 3]) == set(np.flatnonzero((position != 0) & (position != 3)))
    assert kept(layer=0, max_norm=5) == everything - {10}
    assert kept(layer=[0, 2], max_norm=5) == everything - {10, 20}, "out in one layer is out"
    assert kept(layer=0, max_norm=1) == set(np.flatnonzero(norms[0] <= medians[0]))
    assert kept(layer=0, where=array.position == 1, max_norm=5) == set(np.flatnonzero(position == 1)) - {10}
    assert kept(layer=0, where=position % 2 == 0) == set(np.flatnonzero(position % 2 == 0))
    found = array.lz.norms(layer=[2, 0])
    assert found.dims == ("layer", "token")
    assert found.name == "resid_norm"
    np.testing.assert_allclose(found.values, norms[[1, 0]], rtol=1e-6)
    assert array.lz.norms(layer=2).dims == ("token",)
    assert kept(layer=0, where=array.lz.norms(layer=0) < 5 * medians[0]) == everything - {10}
    with pytest.raises(InvalidArgumentError, match="other rows"):
        kept(layer=0, where=(array.position == 1)[::-1])


def test_stored_rows_are_filtered_without_reading_more(tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]) -> None:
    truth = tokens.resid.sel(layer=2).values
    chunk_reads.clear()
    options: dict[str, Any] = {"layer": 2, "batch_tokens": 40, "buffer_tokens": 90, "labels": ["row", "position"]}
    found = list(tokens.lz.batches(**options, skip_positions=0))
    assert set(Counter(chunk_reads).values()) == {1}
    for values, labels in found:
        assert (labels["position"] > 0).all()
        np.testing.assert_array_equal(values, truth[labels["row"]])
    chunk_reads.clear()
    list(tokens.lz.batches(**options, max_norm=1.1))
    assert set(Counter(chunk_reads).values()) == {2}, "once for the norms, once for the batches"


def test_rows_that_a_layer_lacks_are_an_error_or_left_out_never_nan(small_chunks: None, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    fill(store, parts=1)
    fill(store, parts=2, prompts=20, layers=(0, 7))
    tokens = store.tokens()
    there = ~np.isnan(tokens.resid.sel(layer=[2, 0]).values).any(axis=(0, 2))
    assert 0 < there.sum() < len(there)
    with pytest.raises(MissingPromptsError, match=rf"{(~there).sum()} of {len(there)} rows are not stored in all of layers \[2, 0\]"):
        tokens.lz.batches(layer=[2, 0])
    found = list(tokens.lz.batches(layer=[2, 0], batch_tokens=30, buffer_tokens=70, missing="drop", labels="row"))
    assert sorted(rows_of(found)) == np.flatnonzero(there).tolist()
    assert not any(np.isnan(values).any() for values, _ in found)
    norms = tokens.lz.norms(layer=2)
    np.testing.assert_array_equal(np.isnan(norms.values), np.isnan(tokens.resid.sel(layer=2).values[:, 0]))
    assert int(tokens.lz.statistics(layer=2, missing="drop").n_rows) == (~np.isnan(norms)).sum()


# ------------------------------------------------------------------------------------------------- statistics and normalising


def test_mean_and_deviation_come_from_one_pass_and_do_not_suffer_from_a_mean_far_from_zero(
    tokens: xr.Dataset, chunk_reads: list[tuple[str, int, int]]
) -> None:
    wide = tokens.resid.compute().values.astype("f8")
    chunk_reads.clear()
    found = tokens.lz.statistics(layer=[5, 0], skip_positions=0, outlier_factor=1.2)
    assert set(Counter(chunk_reads).values()) == {1}
    wide = wide[[2, 0]][:, tokens.position.values > 0]
    norms = np.linalg.norm(wide, axis=-1)
    np.testing.assert_allclose(found.mean_value, wide.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.std_value, wide.std(1), rtol=1e-12)
    np.testing.assert_allclose(found.mean_norm, norms.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.median_norm, np.median(norms, axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.largest_norm, norms.max(1), rtol=1e-12)
    centred = np.linalg.norm(wide - wide.mean(1, keepdims=True), axis=-1)
    np.testing.assert_allclose(found.norm_scale, centred.mean(1) / 4, rtol=1e-12)
    np.testing.assert_allclose(found.norm_scale * found.without_mean, norms.mean(1) / 4, rtol=1e-12)
    np.testing.assert_allclose(found.outlier_share, (norms > 1.2 * np.median(norms, axis=1)[:, None]).mean(1))
    assert found.n_rows.values.tolist() == [wide.shape[1]] * 2
    assert found.layer.values.tolist() == [5, 0]
    far = xr.DataArray(1e9 + np.random.default_rng(0).standard_normal((50_000, 3)), dims=("token", "hidden"))
    np.testing.assert_allclose(far.lz.statistics().std_value, far.std("token"), rtol=1e-7)
    squares = np.sqrt(((far.values**2).mean(0) - far.values.mean(0) ** 2).clip(0))
    assert (abs(squares - 1) > 0.01).any(), "as the sum of squares would"


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    values = np.random.default_rng(0).standard_normal((20, 4)).astype("f4")
    values[3, 1], values[7, 2] = np.nan, np.inf
    found = xr.DataArray(values, dims=("token", "hidden")).lz.statistics()
    good = np.delete(values, [3, 7], axis=0).astype("f8")
    np.testing.assert_allclose(found.mean_value, good.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std_value, good.std(0), rtol=1e-12)
    assert (int(found.n_rows), int(found.n_not_finite)) == (18, 2)
    nothing = xr.DataArray(np.full((2, 3), np.nan, "f4"), dims=("token", "hidden")).lz.statistics()
    assert np.isnan(nothing.mean_value).all()
    assert np.isnan(nothing.std_value).all()
    assert np.isnan(nothing.mean_norm)


def test_kept_statistics_are_read_back_until_their_rows_change(
    tokens: xr.Dataset, tmp_path: Path, chunk_reads: list[tuple[str, int, int]]
) -> None:
    keep = tmp_path / "acts" / "statistics.safetensors"  # beside the data
    first = tokens.lz.statistics(layer=[0, 2], keep=keep)
    assert len(chunk_reads) > 0
    chunk_reads.clear()
    xr.testing.assert_identical(tokens.lz.statistics(layer=[0, 2], keep=keep), first)
    again = lz.open_store(tmp_path / "acts", durable=False)
    xr.testing.assert_identical(again.tokens().lz.statistics(layer=[0, 2], keep=keep), first)
    assert len(chunk_reads) == 0, "nothing is read for it"
    again.gc(max_age=0)
    assert keep.exists(), "gc leaves it alone"
    lz.write_activations(again, model="acme/toy", prompts=["new"], activations={"resid": {i: [np.full((2, 16), 9, "f2")] for i in LAYERS}})
    grown = again.tokens().lz.statistics(layer=[0, 2], keep=keep)
    assert grown.n_rows.values.tolist() == [int(first.n_rows[0]) + 2] * 2
    for options in ({"layer": 0}, {"layer": [0, 2], "skip_positions": 0}, {"layer": [0, 2], "outlier_factor": 3.0}):
        chunk_reads.clear()
        again.tokens().lz.statistics(**options, keep=keep)
        assert len(chunk_reads) > 0, "of other rows, or otherwise"
    data = bytearray(keep.read_bytes())
    data[-3] ^= 1
    keep.write_bytes(data)
    chunk_reads.clear()
    xr.testing.assert_identical(
        again.tokens().lz.statistics(layer=[0, 2], outlier_factor=3.0, keep=keep),
        again.tokens().lz.statistics(layer=[0, 2], outlier_factor=3.0),
    )
    assert len(chunk_reads) > 0, "a flipped bit is noticed"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="holds no kept statistics"):
        tokens.lz.statistics(layer=0, keep=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InvalidArgumentError, match="read from a store"):
        tokens.compute().lz.statistics(layer=0, keep=keep)


def test_rows_are_centred_and_scaled_to_a_norm_of_the_root_of_hidden(tokens: xr.Dataset) -> None:
    stats = tokens.lz.statistics(layer=[2, 0, 5])
    truth = tokens.resid.values.astype("f8")
    for layer, place in ((2, 1), ([5, 2], [2, 1])):
        for values, labels in tokens.lz.batches(layer=layer, mean=stats.mean_value, scale=stats.std_value, labels="row"):
            wanted = np.asarray(layer)
            expected = (truth[place][..., labels["row"], :] - stats.mean_value.sel(layer=wanted).values[..., None, :]) / (
                stats.std_value.sel(layer=wanted).values[..., None, :]
            )
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    scaled = np.concatenate(list(tokens.lz.batches(layer=5, scale=stats.norm_scale)))
    assert np.linalg.norm(scaled, axis=1).mean() == pytest.approx(4, rel=1e-5), "√16"
    plain = np.concatenate(list(tokens.lz.batches(layer=5, mean=1.5, scale=np.full(16, 2.0), shuffle=False)))
    np.testing.assert_allclose(plain, (truth[2] - 1.5) / 2, rtol=1e-6)


def test_dtypes_are_the_stored_or_the_requested_ones_and_overflow_is_an_error(tokens: xr.Dataset) -> None:
    assert next(iter(tokens.lz.batches(layer=0))).dtype == np.float16
    for dtype in ("float32", np.float64, np.dtype("float16")):
        assert next(iter(tokens.lz.batches(layer=0, dtype=dtype))).dtype == np.dtype(dtype)
    large = xr.DataArray(np.full((4, 2), 1e5, "f4"), dims=("token", "hidden"))
    with pytest.raises(NumberRangeError, match="65504"):
        next(iter(large.lz.batches(dtype="float16")))
    assert next(iter(large.lz.batches(dtype="float16", scale=10.0))).max() == 1e4


# ------------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.model
def test_torch_gets_tensors_and_bfloat16(tokens: xr.Dataset) -> None:
    torch = pytest.importorskip("torch")
    plain = list(tokens.lz.batches(layer=0, batch_tokens=90))
    for dtype in (None, "float32", torch.bfloat16, "bfloat16", np.float32):
        found = list(tokens.lz.batches(layer=0, batch_tokens=90, framework="torch", dtype=dtype))
        for tensor, values in zip(found, plain, strict=True):
            expected = torch.from_numpy(values)
            wanted = {None: torch.float16, "float32": torch.float32, np.float32: torch.float32}.get(dtype, torch.bfloat16)
            assert torch.equal(tensor, expected.to(wanted))
            assert tensor.dtype == wanted
    values, labels = next(iter(tokens.lz.batches(layer=0, framework="torch", labels=["position", "prompt"])))
    assert labels["position"].dtype == torch.int64
    assert labels["prompt"].shape == (len(values),)
    with pytest.raises(InvalidArgumentError, match="bfloat16"):
        tokens.lz.batches(layer=0, dtype=torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match="dtype="):
        tokens.lz.batches(layer=0, dtype="int8", framework="torch")
    large = xr.DataArray(np.full((4, 2), 1e5, "f4"), dims=("token", "hidden"))
    with pytest.raises(NumberRangeError):
        next(iter(large.lz.batches(dtype="float16", framework="torch")))


@pytest.mark.model
def test_spawned_workers_of_a_dataloader_give_every_row_once_resumably(tokens: xr.Dataset) -> None:
    torch = pytest.importorskip("torch")
    options: dict[str, Any] = {"layer": 0, "batch_tokens": 90, "buffer_tokens": 200, "epochs": 2, "labels": "row", "framework": "torch"}

    whole = tokens.lz.batches(**options)
    steps = whole.steps_per_epoch
    assert steps % 2, "an odd number, so that the second epoch begins with the other worker"
    every: list[list[int]] = []
    for epoch in range(2):
        streams = [plan_reading(whole.blocks, whole.order, epoch, worker, 2) for worker in range(2)]
        rows = [np.concatenate([stream.window(i) for i in range(len(stream.cuts) - 1)]).tolist() for stream in streams]
        bounds = [stream.bounds.tolist() for stream in streams]
        # By turns, as long as there are batches.
        every += [rows[step % 2][bounds[step % 2][step // 2] : bounds[step % 2][step // 2 + 1]] for step in range(steps)]
        assert sorted(flat(every[-steps:])) == list(range(tokens.sizes["token"]))
    batches = tokens.lz.batches(**options, start_step=1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="forkserver")
    assert len(loader) == len(batches) == 2 * steps - 1
    assert [labels["row"].tolist() for _, labels in loader] == every[1:]


def test_batches_pickle_to_few_bytes(small_chunks: None, tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    lengths = np.full(500, 200)
    values = np.zeros((100_000, 2), "f2")
    arrays = np.split(values, np.cumsum(lengths)[:-1])
    lz.write_activations(store, model="m", prompts=[str(i) for i in range(500)], activations={"resid": {0: arrays}})
    batches = store.tokens().lz.batches(layer=0, skip_positions=0)
    # One bit per token for the filter, 20 bytes per prompt, about 60 per chunk.
    assert len(pickle.dumps(batches)) < 100_000 / 8 + 500 * 30 + 391 * 90 + 4000
    assert batches.blocks.total == 99_500


def test_without_torch_only_torch_is_refused(tokens: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmprobe_zarr.streaming.torch", None)
    with pytest.raises(MissingDependencyError, match=r"lmprobe-zarr\[models\]"):
        tokens.lz.batches(layer=0, framework="torch")


def test_bfloat16_is_refused_alike_where_numpy_knows_its_name(tokens: xr.Dataset) -> None:
    pytest.importorskip("ml_dtypes")  # registers the name with numpy
    with pytest.raises(InvalidArgumentError, match="framework='torch'"):
        tokens.lz.batches(layer=0, dtype="bfloat16")


# ------------------------------------------------------------------------------------------------------------------ memory

BOUNDED = """
import sys
from pathlib import Path
import numpy as np
import lmprobe_zarr as lz
def peak():
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))) * 1024
tokens = lz.open_store(sys.argv[1], "r").tokens()
row = 512 * 4
batches = tokens.lz.batches(layer=0, batch_tokens=1024, buffer_tokens=8 * 2**20 // row, labels=["position"], dtype="float32")
next(iter(tokens.isel(token=slice(0, 64)).lz.batches(layer=0)))
before = peak()
rows = sum(len(values) for values, labels in batches)
print(rows, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's own memory is read from Linux")
def test_memory_is_bounded_by_the_buffers_not_by_the_data(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    values = np.random.default_rng(0).standard_normal((500, 60, 512), np.float32)  # 61 MB
    lz.write_activations(store, model="m", prompts=[str(i) for i in range(500)], activations={"resid": {0: list(values)}})
    done = subprocess.run([sys.executable, "-c", BOUNDED, store.url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    assert rows == 30_000
    # Two buffers of 8 MiB, a chunk of 4 MiB more in each; a decoded and an encoded chunk for each of two threads; two batches of 2 MiB.
    assert grown < 2 * (8 + 4) * 2**20 + 2 * 8 * 2**20 + 4 * 2**20, grown


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layer": 1}, LayerOutOfRangeError, r"layer 1 is not here, which has layers \[0, 2, 5\]"),
        ({"layer": []}, InvalidArgumentError, "names no layers"),
        ({"layer": True}, InvalidTypeError, "no layer"),
        ({"layer": "2"}, InvalidTypeError, "no layer"),
        ({"batch_tokens": 0}, InvalidArgumentError, "batch_tokens"),
        ({"epochs": 0}, InvalidArgumentError, "epochs=0"),
        ({"epochs": 1.5}, InvalidTypeError, "epochs=1.5"),
        ({"start_step": -1}, InvalidArgumentError, "start_step=-1"),
        ({"start_step": 10**6}, InvalidArgumentError, "at most"),
        ({"start_step": "1"}, InvalidTypeError, "start_step"),
        ({"skip_positions": -1}, InvalidArgumentError, "skip_positions"),
        ({"skip_positions": ["a"]}, InvalidArgumentError, "skip_positions"),
        ({"skip_positions": range(99)}, InvalidArgumentError, "no row is left"),
        ({"where": np.ones(3, bool)}, InvalidArgumentError, "truth values, one per row"),
        ({"where": xr.DataArray(np.ones((3, 2), bool), dims=("a", "b"))}, InvalidArgumentError, "over 'token' alone"),
        ({"max_norm": 0}, InvalidArgumentError, "max_norm=0"),
        ({"max_norm": 1e-9}, InvalidArgumentError, "no row has a norm"),
        ({"missing": "skip"}, InvalidArgumentError, "missing='skip'"),
        ({"labels": "colour"}, InvalidArgumentError, "'colour' is no coordinate over 'token'"),
        ({"mean": np.ones(7)}, InvalidArgumentError, r"broadcast to \(layer, hidden\) = \(3, 16\)"),
        ({"mean": sum}, InvalidTypeError, "mean is a builtin_function_or_method"),
        ({"scale": 0.0}, InvalidArgumentError, "above 0"),
        ({"mean": np.nan}, InvalidArgumentError, "not finite"),
        ({"scale": xr.DataArray([1.0], dims="layer", coords={"layer": [0]})}, InvalidArgumentError, "lacks some of the layers"),
        ({"mean": xr.DataArray([1.0], dims="place")}, InvalidArgumentError, "has dims"),
        ({"dtype": "int32"}, InvalidArgumentError, "dtype='int32'"),
        ({"dtype": "bfloat16"}, InvalidArgumentError, "framework='torch'"),
        ({"framework": "jax"}, InvalidArgumentError, "framework='jax'"),
        ({"variable": "attn"}, InvalidArgumentError, r"name one of \['resid'\]"),
        ({"drop_last": True, "batch_tokens": 10**6}, InvalidArgumentError, "smaller batch_tokens"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_read(
    tokens: xr.Dataset, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        tokens.lz.batches(**options)
    assert len(str(raised.value).splitlines()) <= 2


def test_damage_is_an_error_and_no_batch(tokens: xr.Dataset, tmp_path: Path) -> None:
    chunk = next((tmp_path / "acts").rglob("tokens/resid/c.0.1.0"))
    data = bytearray(chunk.read_bytes())
    data[40] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(lz.errors.CorruptPartError, match=r"c\.0\.1\.0"):
        list(tokens.lz.batches(layer=0))
    list(tokens.lz.batches(layer=5))


def test_a_loop_that_stops_early_leaves_no_thread(tokens: xr.Dataset) -> None:
    import threading

    batches: Batches = tokens.lz.batches(layer=0, batch_tokens=10, buffer_tokens=40)
    for _ in batches:
        break
    assert not [thread for thread in threading.enumerate() if "ahead" in thread.name]
