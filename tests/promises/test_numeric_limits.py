"""Numbers and sizes at their ends: every bit comes back, or errs by what its precision promises; nothing is too small, long or deep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from stores import GROUP

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.precision import Precision
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, LabelError
from lmprobe_zarr.store.ingest import Ingest
from lmprobe_zarr.store.store import Store

NUMBER = itertools.count()


def fresh() -> Store:
    return lz.open_store(f"memory://limits-{next(NUMBER)}")


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    import fsspec

    fsspec.filesystem("memory").store.clear()


def stored(values: npt.NDArray[Any], *, tokens: bool, compressed: bool = True, precision: Precision | None = None) -> npt.NDArray[Any]:
    """What reads back of values (layer, row, hidden) that are stored as the tokens of one prompt, or as one pooled vector of each."""
    store = fresh()
    rows = values.shape[1]
    texts = ["all"] if tokens else [f"p{i}" for i in range(rows)]
    batch = TokenBatch(
        sha256=[prompt_sha256(text) for text in texts],
        layers=tuple(range(len(values))),
        n_tokens=np.array([rows]) if tokens else None,
        tokens={"resid": values} if tokens else {},
        prompts={} if tokens else {"resid_mean": values},
    )
    with Ingest(store, GROUP, precision=precision or Precision(), compressed=compressed) as ingest:
        ingest.put(batch)
    again = lz.open_store(store.url)
    opened = again.tokens(dtype="stored").resid if tokens else again.dataset(dtype="stored").resid_mean
    found: npt.NDArray[Any] = opened.values
    assert again.verify(progress=False).not_finite == np.count_nonzero(~np.isfinite(found))
    return found


@settings(max_examples=examples(30, 300))
@given(st.data(), st.sampled_from(["float16", "float32", "float64"]), st.booleans(), st.booleans())
def test_values_stored_without_rounding_are_read_bit_for_bit(data: st.DataObject, dtype: str, tokens: bool, compressed: bool) -> None:
    shape = data.draw(array_shapes(min_dims=3, max_dims=3, max_side=5))
    # All bit patterns: subnormal numbers, both zeros, infinities, every kind of NaN.
    bits = data.draw(arrays(f"u{np.dtype(dtype).itemsize}", shape))
    found = stored(bits.view(dtype), tokens=tokens, compressed=compressed)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.view(bits.dtype), bits)


FRACTION = {"float16": 10, "bfloat16": 7, "float32": 23}


@settings(max_examples=examples(50, 300))
@given(st.data(), st.sampled_from([*FRACTION]), st.sampled_from(["float32", "float64"]), st.booleans())
def test_rounding_errors_are_within_the_promised_bound(data: st.DataObject, dtype: str, source: str, tokens: bool) -> None:
    keep_bits = data.draw(st.none() | st.integers(1, FRACTION[dtype]))
    shape = data.draw(array_shapes(min_dims=3, max_dims=3, max_side=4))
    # Neither beyond the largest number of the target, which `test_precision.py` is about, nor below the least normal one.
    largest = {"float16": 65000.0, "bfloat16": 3e38, "float32": 3e38}[dtype]
    least = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}[dtype]
    sizes = st.floats(least, largest, width=64)
    values = data.draw(arrays(source, shape, elements=st.one_of(st.just(0.0), sizes, sizes.map(lambda x: -x)).map(np.dtype(source).type)))
    found = stored(values, tokens=tokens, precision=Precision(dtype=dtype, keep_bits=keep_bits))
    bits = FRACTION[dtype] if keep_bits is None else keep_bits
    assert np.isfinite(found).all()
    exact, read = values.astype(np.longdouble), found.astype(np.longdouble)
    # Made narrow and rounded again, a number errs by half a step of each.
    steps = 2.0 ** -(bits + 1) + (2.0**-24 if source == "float64" else 0.0)
    assert (np.abs(read - exact) <= np.abs(exact) * steps).all()
    assert (found[values == 0] == 0).all()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "bool"])
def test_whole_numbers_come_back_as_they_are(dtype: str) -> None:
    ends = [0, 1] if dtype == "bool" else [np.iinfo(dtype).min, -1, 0, np.iinfo(dtype).max]
    values = np.array(ends, dtype).reshape(1, -1, 1)
    found = stored(values, tokens=True)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_computed_nan_is_distinguished_from_missing_values(store: Store) -> None:
    nothing = np.full((4, 3), np.nan, np.float32)
    lz.write_activations(store, model="m", prompts=list("abcd"), pooled={"resid_mean": {0: nothing}})
    lz.write_activations(store, model="m", prompts=["e"], pooled={"resid_mean": {1: np.ones((1, 3), np.float32)}})
    assert np.isnan(store.dataset().resid_mean.sel(layer=0).values).all()
    assert store.coverage().sel(variable="resid_mean", layer=0).values.tolist() == [True, True, True, True, False]
    assert store.verify(progress=False).not_finite == 12
    with pytest.raises(InvalidArgumentError, match="NaN or infinite for 4 of 4 prompts"):
        lz.sweep(store.dataset(prompts=list("abcd"), layers=[0]).resid_mean, labels=[0, 1, 0, 1], cv=2, progress=False)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_prompt_of_one_token_is_its_own_pooling_of_every_kind(store: Store, dtype: str) -> None:
    value = np.array([[-1.5, 2.25, 0.0]], dtype)
    lz.write_activations(store, model="m", prompts=["a"], activations={"resid": {0: [value]}})
    tokens = store.tokens()
    for pooling in ("mean", "max", "min", "last_token", "first_token"):
        np.testing.assert_array_equal(tokens.lz.pool(pooling)[f"resid_{pooling}"].values[0], value)
    for position in (0, -1):
        np.testing.assert_array_equal(tokens.lz.at(position).resid.values[0], value)
    np.testing.assert_array_equal(tokens.resid.sel(layer=0, prompt=lz.prompt_hash("a")).values, value)


def test_a_prompt_without_tokens_is_refused_and_a_range_without_tokens_is_empty(store: Store) -> None:
    full, empty = np.ones((2, 3), np.float32), np.ones((0, 3), np.float32)
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        lz.write_activations(store, model="m", prompts=["a", "b"], activations={"resid": {0: [full, empty]}})
    assert store.models() == []
    lz.write_activations(store, model="m", prompts=["a", "b"], activations={"resid": {0: [full, full]}})
    tokens = store.tokens()
    assert tokens.isel(token=slice(2, 2)).resid.values.shape == (1, 0, 3)
    assert tokens.resid.isel(token=np.zeros(0, int)).values.shape == (1, 0, 3)
    assert store.tokens(prompts=[]).resid.values.shape == (1, 0, 3)
    assert store.dataset(prompts=[]).sizes["prompt"] == 0


def test_a_prompt_of_100_000_tokens_between_short_ones(store: Store) -> None:
    rng = np.random.default_rng(0)
    arrays_ = [rng.standard_normal((n, 4)).astype(np.float16) for n in (1, 100_000, 3)]
    lz.write_activations(store, model="m", prompts=["s", "long", "t"], activations={"resid": {0: arrays_, 7: [-a for a in arrays_]}})
    tokens = store.tokens()
    long_prompt = tokens.resid.sel(layer=7, prompt=lz.prompt_hash("long"))
    np.testing.assert_array_equal(long_prompt.values, -arrays_[1])
    last = tokens.resid.sel(layer=0).isel(token=slice(100_000, 100_003))  # the end of the long one, and the start of the next
    np.testing.assert_array_equal(last.values, np.concatenate([arrays_[1][-1:], arrays_[2][:2]]))
    means = tokens.lz.pool("mean").resid_mean.sel(layer=0).values
    for mean, array in zip(means, arrays_, strict=True):
        np.testing.assert_allclose(mean, array.astype(np.float64).mean(0), atol=1e-3)
    np.testing.assert_array_equal(tokens.lz.at(-1).resid.sel(layer=0).values, np.stack([a[-1] for a in arrays_]))
    assert store.verify(progress=False).ok


def test_hidden_size_one_is_read_pooled_and_fitted(store: Store) -> None:
    y = np.arange(40) % 2
    resid = [np.array([[float(label)], [label + 0.5]], np.float32) for label in y]
    lz.write_activations(store, model="m", prompts=[f"p{i}" for i in range(40)], activations={"resid": {0: resid}}, coords={"label": y})
    pooled = store.tokens().lz.pool("mean").resid_mean
    assert pooled.shape == (1, 40, 1)
    np.testing.assert_array_equal(pooled.values[0, :, 0], y + 0.25)
    scores = lz.sweep(pooled, labels=y, cv=2, progress=False)
    assert float(scores.accuracy.mean()) == 1.0


def test_a_thousand_layers(tmp_path: Any) -> None:
    store = lz.open_store(tmp_path / "deep", durable=False)
    rng = np.random.default_rng(0)
    pooled = rng.standard_normal((1000, 6, 2)).astype(np.float32)
    tokens = rng.standard_normal((1000, 7, 2)).astype(np.float16)
    bounds = [0, 1, 2, 3, 4, 5, 7]
    resid = {i: [tokens[i, a:b] for a, b in itertools.pairwise(bounds)] for i in range(1000)}
    texts = [f"p{i}" for i in range(6)]
    lz.write_activations(store, model="m", prompts=texts, activations={"resid": resid}, pooled={"resid_mean": dict(enumerate(pooled))})
    again = lz.open_store(tmp_path / "deep")
    data = again.dataset()
    assert data.sizes["layer"] == 1000
    np.testing.assert_array_equal(data.resid_mean.sel(layer=999).values, pooled[999])
    np.testing.assert_array_equal(data.resid_mean.values, pooled)
    np.testing.assert_array_equal(again.tokens().resid.sel(layer=[0, 500]).values, tokens[[0, 500]])
    scores = lz.sweep(data.resid_mean.isel(layer=slice(None, None, 250)), labels=[0, 1, 0, 1, 0, 1], cv=2, progress=False)
    assert scores.layer.values.tolist() == [0, 250, 500, 750]
    assert again.verify(full=False, progress=False).ok


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [([0] * 8, LabelError, "two classes"), ([0] * 7 + [1], LabelError, "one|few|fold"), ([], InvalidArgumentError, "nothing to fit")],
)
def test_a_class_that_nobody_is_in_is_refused(labels: list[int], error: type[Exception], words: str) -> None:
    store = fresh()
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    lz.write_activations(store, model="m", prompts=[f"p{i}" for i in range(8)], pooled={"resid_mean": {0: x}})
    data = store.dataset(prompts=[f"p{i}" for i in range(len(labels))])
    with pytest.raises(error, match=words):
        lz.sweep(data.resid_mean, labels=np.array(labels, int), cv=2, progress=False)
