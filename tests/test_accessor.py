"""``.lz``: one token per prompt, pooling, padding and torch, against loops over prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, LayerOutOfRangeError
from lmprobe_zarr.tokens.index import TokenIndex

Array = npt.NDArray[Any]
REDUCE = {
    "last_token": lambda a: a[-1],
    "first_token": lambda a: a[0],
    "mean": lambda a: a.mean(0, dtype=np.float64),
    "max": lambda a: a.max(0),
    "min": lambda a: a.min(0),
}


def tokens_of(lengths: list[int], order: list[int] | None = None, dtype: str = "float32") -> xr.Dataset:
    """Prompts ``a, b, c, …`` of some lengths, in memory, their tokens in any order; every value differs."""
    total = sum(lengths)
    values = np.arange(2 * total * 3).reshape(2, total, 3).astype(dtype)
    data = xr.Dataset(
        {"resid": (("layer", "token", "hidden"), values), "loss": ("token", np.arange(total) / 4)},
        {
            "layer": [4, 7],
            "prompt": ("token", np.repeat([chr(97 + i) for i in range(len(lengths))], lengths).astype("U1")),
            "position": ("token", np.array([j for n in lengths for j in range(n)], np.int64)),
            "label": ("token", np.repeat(np.arange(len(lengths)), lengths)),
        },
    )
    return data.isel(token=list(range(total)) if order is None else order).set_xindex(["prompt", "position"], TokenIndex)


def rows_of(data: xr.Dataset) -> dict[str, list[int]]:
    """Rows of each prompt, by position, prompts in the order in which they appear: by a plain loop."""
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(data.prompt.values.tolist()):
        found.setdefault(prompt, []).append(row)
    places = data.position.values.tolist()
    return {prompt: sorted(rows, key=lambda row: places[row]) for prompt, rows in found.items()}


@st.composite
def shuffled_tokens(draw: st.DrawFn) -> xr.Dataset:
    """Some of the tokens of some prompts, in any order, none twice."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    order = draw(st.permutations(range(sum(lengths))))
    return tokens_of(lengths, list(order[: draw(st.integers(0, len(order)))]))


@given(shuffled_tokens(), st.integers(-3, 3))
@settings(max_examples=examples(40, 300), deadline=None)
def test_at_takes_one_token_of_every_prompt(data: xr.Dataset, position: int) -> None:
    rows = rows_of(data)
    if any(not -len(r) <= position < len(r) for r in rows.values()):
        with pytest.raises(LayerOutOfRangeError, match="fewer tokens"):
            data.lz.at(position)
        return
    taken = data.lz.at(position)
    chosen = [r[position] for r in rows.values()]
    assert taken.resid.dims == ("layer", "prompt", "hidden")
    assert taken.prompt.values.tolist() == list(rows)
    np.testing.assert_array_equal(taken.resid.values, data.resid.values[:, chosen])
    np.testing.assert_array_equal(data.resid.lz.at(position).values, data.resid.values[:, chosen])
    np.testing.assert_array_equal(taken.label.values, data.label.values[chosen])
    np.testing.assert_array_equal(taken.position.values, data.position.values[chosen])
    for prompt, row in zip(rows, chosen, strict=True):
        np.testing.assert_array_equal(taken.resid.sel(prompt=prompt).values, data.resid.values[:, row])


@pytest.mark.few(1)
@pytest.mark.parametrize("pooling", list(REDUCE))
@given(data=shuffled_tokens())
@settings(max_examples=examples(30, 300), deadline=None)
def test_pool_is_a_loop_over_prompts(pooling: str, data: xr.Dataset) -> None:
    rows = rows_of(data)
    pooled = data.lz.pool(pooling)
    assert set(pooled.data_vars) == {f"resid_{pooling}", f"loss_{pooling}"}
    resid, loss = pooled[f"resid_{pooling}"], pooled[f"loss_{pooling}"]
    assert resid.dims == ("layer", "prompt", "hidden")
    assert resid.dtype == np.float32
    assert resid.prompt.values.tolist() == list(rows)
    assert not {"position", "token"} & set(resid.coords)
    for i, (prompt, of_prompt) in enumerate(rows.items()):
        for layer in range(2):
            expected = REDUCE[pooling](data.resid.values[layer, of_prompt])
            np.testing.assert_allclose(resid.values[layer, i], expected, rtol=1e-6)
        np.testing.assert_allclose(loss.sel(prompt=prompt), REDUCE[pooling](data.loss.values[of_prompt]))
        assert pooled.label.values[i] == data.label.values[of_prompt[0]]


@given(shuffled_tokens())
@settings(max_examples=examples(30, 300), deadline=None)
def test_padded_puts_every_token_at_its_own_position(data: xr.Dataset) -> None:
    padded = data.lz.padded()
    places, rows = sorted(set(data.position.values.tolist())), rows_of(data)
    assert padded.resid.dims == ("layer", "prompt", "position", "hidden")
    assert padded.position.values.tolist() == places
    assert padded.prompt.values.tolist() == list(rows)
    expected = np.full((2, len(rows), len(places), 3), np.nan, np.float32)
    mask = np.zeros((len(rows), len(places)), bool)
    for i, of_prompt in enumerate(rows.values()):
        for row in of_prompt:
            j = places.index(int(data.position.values[row]))
            expected[:, i, j], mask[i, j] = data.resid.values[:, row], True
    np.testing.assert_array_equal(padded.resid.values, expected)
    np.testing.assert_array_equal(padded["mask"].values, mask)
    if len(data.token):
        unstacked = data.resid.drop_vars("label").unstack("token")
        xr.testing.assert_equal(padded.resid.drop_vars("label").sortby("prompt"), unstacked.transpose(*padded.resid.dims))


def test_pool_takes_any_order_and_number_of_dims() -> None:
    data = tokens_of([2, 3])
    # As many numbers as there are tokens: an axis that is mistaken for the token axis would fit.
    values = np.random.default_rng(0).standard_normal((4, 5, 5, 2))
    array = xr.DataArray(values, {"prompt": data.prompt, "position": data.position}, ["head", "expert", "token", "layer"])
    array = array.drop_indexes(["prompt", "position"], errors="ignore").set_xindex(["prompt", "position"], TokenIndex)
    pooled = array.lz.pool("max")
    assert pooled.dims == ("head", "expert", "prompt", "layer")
    np.testing.assert_array_equal(pooled.values, np.stack([values[:, :, :2].max(2), values[:, :, 2:].max(2)], 2))


def test_the_mean_of_integers_and_truth_values_is_no_integer() -> None:
    data = tokens_of([2, 2]).assign(hit=("token", [True, False, True, True]), rank=("token", [1, 2, 4, 7]))
    assert data.lz.pool("mean").hit_mean.values.tolist() == [0.5, 1.0]
    assert data.lz.pool("mean").rank_mean.values.tolist() == [1.5, 5.5]
    assert data.lz.pool("max").hit_max.values.tolist() == [True, True]


def test_padded_marks_what_is_absent_by_kind() -> None:
    data = tokens_of([1, 2]).assign(
        hit=("token", [True, False, True]),
        rank=("token", [1, 2, 4]),
        byte=("token", np.array([1, 2, 255], np.uint8)),
        piece=("token", np.array(["x", "y", "z"])),
        word=("token", np.array(["x", "y", "z"], object)),
    )
    padded = data.lz.padded()
    assert padded.hit.values.tolist() == [[1, -1], [0, 1]]
    assert padded["rank"].values.tolist() == [[1, -1], [2, 4]]
    assert padded.byte.values.tolist() == [[1, -1], [2, 255]]
    assert padded.piece.values.tolist() == padded.word.values.tolist() == [["x", ""], ["y", "z"]]


def test_no_layers_and_no_tokens_are_no_special_case() -> None:
    data = tokens_of([2, 1])
    assert data.isel(layer=[]).lz.pool("mean").resid_mean.shape == (0, 2, 3)
    assert data.isel(token=[]).lz.pool("mean").resid_mean.shape == (2, 0, 3)
    assert data.isel(token=[]).lz.padded().resid.shape == (2, 0, 0, 3)
    assert data.isel(token=[]).lz.at(-1).resid.shape == (2, 0, 3)


def test_a_prompt_given_twice_is_an_error() -> None:
    twice = tokens_of([2, 1]).sel(prompt=["a", "a"])
    uses: list[Callable[[], Any]] = [lambda: twice.lz.at(0), lambda: twice.lz.pool("mean"), twice.lz.padded]
    for use in uses:
        with pytest.raises(InvalidArgumentError, match="several times"):
            use()


def test_without_a_token_index_the_error_names_how_to_get_one() -> None:
    data = tokens_of([2, 1])
    # As a file gives it back: the index is made again.
    xr.testing.assert_equal(data.drop_indexes(["prompt", "position"]).lz.at(0), data.lz.at(0))
    for without in (data.lz.at(0), data.isel(token=0), data.swap_dims({"token": "prompt"})):
        with pytest.raises(InvalidArgumentError, match="set_xindex"):
            without.lz.at(0)


def test_an_unknown_pooling_is_refused_before_anything_is_read() -> None:
    for use in (tokens_of([1]).lz.pool, tokens_of([1]).resid.lz.pool):
        with pytest.raises(InvalidArgumentError, match="median"):
            use("median")


def test_at_stays_lazy_and_pool_reads_each_chunk_once(tmp_path: Path, chunk_reads: list[tuple[str, int, int]]) -> None:
    store = lz.open_store(tmp_path / "s", durable=False)
    lz.write_activations(
        store, model="m", prompts=["x", "y"], activations={"resid": {i: [np.ones((2, 3)), np.ones((1, 3))] for i in (0, 1)}}
    )
    last = store.tokens().resid.lz.at(-1)
    assert chunk_reads == []
    assert last.values.shape == (2, 2, 3)
    assert len(chunk_reads) == 2
    chunk_reads.clear()
    store.tokens().resid.lz.pool("mean")
    assert len(chunk_reads) == 2


@pytest.mark.model
def test_to_torch_gives_back_the_stored_dtype(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store = lz.open_store(tmp_path / "s", durable=False)
    values = torch.arange(12).reshape(4, 3).to(torch.bfloat16) / 3
    lz.write_activations(store, model="m", prompts=["x", "y"], activations={"resid": {0: [values[:3], values[3:]]}})
    resid = store.tokens().resid
    assert resid.lz.to_torch().dtype == torch.bfloat16
    assert torch.equal(resid.lz.to_torch()[0], values)
    assert torch.equal(store.tokens().lz.to_torch()["resid"][0], values)
    assert resid.lz.to_torch(dtype=torch.float64).dtype == torch.float64
    assert torch.equal(resid.sel(prompt=lz.prompt_hash("y")).lz.to_torch()[0], values[3:])
    third = (resid / 3).assign_attrs(resid.attrs)
    assert third.lz.to_torch().dtype == torch.float32, "what no longer fits is not rounded"
    np.testing.assert_array_equal(third.lz.to_torch().numpy(), third.values)
    assert resid.isel(layer=0, token=0, hidden=1).lz.to_torch().shape == ()
    assert resid.isel(token=slice(None, None, -1)).lz.to_torch().shape == (1, 4, 3)
