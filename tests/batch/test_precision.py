"""Rounding: what comes back is within the promised error, never infinite where it was finite, and NaN stays NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stores import GROUP, make_batch

import lmprobe_zarr as lz
from lmprobe_zarr.batch.precision import Precision, round_bits, store_as
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, NumberRangeError
from lmprobe_zarr.store.ingest import Ingest
from lmprobe_zarr.store.store import Store

FLOATS = st.sampled_from([np.float16, np.float32, np.float64])


@given(st.data(), FLOATS)
def test_rounding_keeps_its_promise_for_every_number(data: st.DataObject, dtype: Any) -> None:
    bits = data.draw(st.integers(1, {np.float16: 9, np.float32: 22, np.float64: 51}[dtype]))
    width = np.dtype(dtype).itemsize * 8
    values = data.draw(arrays(dtype, st.integers(1, 20), elements=st.floats(width=width)))
    rounded = round_bits(values, bits)
    assert rounded.dtype == values.dtype
    finite = np.isfinite(values)
    assert np.isfinite(rounded[finite]).all(), "what was finite stays finite"
    assert (np.isnan(rounded) == np.isnan(values)).all()
    assert (rounded[np.isinf(values)] == values[np.isinf(values)]).all()
    normal = finite & (np.abs(values) >= np.finfo(dtype).tiny)
    largest = np.finfo(dtype).max
    # At the very end of the range there is nothing to round up to.
    inner = normal & (np.abs(values) <= largest * (1 - 2.0 ** -(bits + 1)))
    error = np.abs(rounded[inner].astype(np.longdouble) - values[inner].astype(np.longdouble))
    assert (error <= np.abs(values[inner].astype(np.longdouble)) * 2.0 ** -(bits + 1)).all()
    assert (round_bits(rounded, bits) == rounded)[finite].all(), "twice is once"


@given(arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32)))
def test_bfloat16_is_that_of_everybody_else(values: npt.NDArray[np.float32]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    stored, name, overflowed = store_as("resid", values, Precision(dtype="bfloat16"), source_dtype="float32")
    assert name == "bfloat16"
    assert stored.dtype == np.float32
    assert not overflowed
    beyond = np.isinf(expected) & np.isfinite(values)  # theirs overflows just below the end of float32, ours stays at the largest number
    np.testing.assert_array_equal(stored[~beyond], expected[~beyond])
    assert np.isfinite(stored[beyond]).all()


def test_nan_of_every_kind_stays_nan() -> None:
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32)
    assert np.isnan(round_bits(bits.view(np.float32), 3)).all(), "plain bit rounding turns the first two into zeros"


@pytest.mark.parametrize(
    ("dtype", "keep_bits"), [("float8", None), ("float16", 11), ("bfloat16", 8), ("float32", 24), (None, 0), (None, 2.5), (None, True)]
)
def test_precisions_that_cannot_be_are_refused(dtype: str | None, keep_bits: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        Precision(dtype=dtype, keep_bits=keep_bits)


def pooled(value: float, text: str) -> TokenBatch:
    batch = make_batch([text], tokens=False)
    values = batch.prompts["resid_mean"].copy()
    values[0, 0, 0] = value
    return TokenBatch(sha256=batch.sha256, text=batch.text, layers=batch.layers, prompts={"resid_mean": values})


def put(store: Store, precision: Precision, *batches: TokenBatch, **options: Any) -> None:
    with Ingest(store, GROUP, precision=precision, **options) as ingest:
        for batch in batches:
            ingest.put(batch)


def test_a_value_beyond_float16_is_kept_and_the_log_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    put(store, Precision(dtype="float16"), pooled(1.5, "a"), pooled(7e5, "b"), pooled(2.5, "c"))
    data = store.dataset()
    assert np.isfinite(data.resid_mean.values).all()
    assert data.resid_mean.sel(prompt=lz.prompt_hash("b")).values[0, 0] == pytest.approx(7e5, rel=2**-8)
    assert data.resid_mean.attrs["stored_dtype"] == "bfloat16, float16"
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1, "once"
    assert "resid_mean" in said[0]
    assert "65504" in said[0]
    alone = lz.open_store(store.url).dataset(prompts=["a"]) if store.storage.is_local else store.dataset(prompts=["a"])
    assert np.abs(alone.resid_mean.values - pooled(1.5, "a").prompts["resid_mean"]).max() < 2e-3


def test_a_value_beyond_float16_is_an_error_where_that_is_asked_for(store: Store) -> None:
    with pytest.raises(NumberRangeError, match=r"resid_mean.*700000"):
        put(store, Precision(dtype="float16", overflow="raise"), pooled(7e5, "b"))
    assert not store.groups() or not len(store.view(GROUP))


def test_infinity_and_nan_of_the_model_are_no_overflow(store: Store) -> None:
    put(store, Precision(dtype="float16", overflow="raise"), pooled(np.inf, "a"), pooled(np.nan, "b"))
    values = store.dataset(prompts=["a", "b"]).resid_mean.values[0, :, 0]
    assert np.isposinf(values[0])
    assert np.isnan(values[1])


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
@pytest.mark.parametrize("keep_bits", [3, 5, 7, None])
def test_what_is_stored_reads_back_within_the_error_of_its_precision(store: Store, dtype: str | None, keep_bits: int | None) -> None:
    batch = make_batch(["a", "bb", "ccc"], seed=3)
    put(store, Precision(dtype=dtype, keep_bits=keep_bits), batch)
    bits = min(keep_bits or 99, {"float16": 10, "bfloat16": 7, "float32": 23, None: 23}[dtype])
    tokens = store.tokens(prompts=["a", "bb", "ccc"])
    for found, truth in ((tokens.resid.values, batch.tokens["resid"]), (store.dataset().resid_mean.values, batch.prompts["resid_mean"])):
        assert (np.abs(found - truth) <= np.abs(truth) * 2.0 ** -(bits + 1) + 1e-7).all()
    assert tokens.resid.attrs["stored_dtype"] == (dtype or "float32")
    assert tokens.resid.dtype == np.float32
    assert store.tokens(dtype="stored").resid.dtype == (np.float16 if dtype == "float16" else np.float32)
    assert (tokens.token_id.values == batch.token_columns["token_id"]).all(), "columns are not rounded"


def test_perplexity_and_log_probabilities_are_never_rounded(store: Store) -> None:
    n_tokens = np.array([2, 3])
    batch = make_batch(["a", "b"], tokens=False)
    exact = TokenBatch(
        sha256=batch.sha256,
        n_tokens=n_tokens,
        tokens={"token_log_prob": np.array([np.nan, -100.25, np.nan, -1e-6, -3.3], np.float32)},
        prompts={"perplexity": np.array([[1e38, 1.0, 3e38]] * 2, np.float32)},
        unlayered=frozenset({"token_log_prob", "perplexity"}),
    )
    put(store, Precision(dtype="float16", overflow="raise"), exact)
    np.testing.assert_array_equal(store.tokens().token_log_prob.values, exact.tokens["token_log_prob"])
    np.testing.assert_array_equal(store.dataset().perplexity.values, exact.prompts["perplexity"])
