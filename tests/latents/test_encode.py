"""Latents of stored rows against plain numpy in float64: every architecture and normalisation, what is stored, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from encoded import LATENTS, WIDTH, dense_of, encoded_by_hand, largest_by_hand, random_sae, write_rows

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    CorruptPartError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerOutOfRangeError,
    MissingPromptsError,
    NumberRangeError,
    ReadOnlyError,
)
from lmprobe_zarr.latents import encoder as encoder_module
from lmprobe_zarr.latents import encoding


def encoded(store: lz.Store, sae: Any, **given: Any) -> xr.Dataset:
    return lz.encode(store.tokens().resid, sae, progress=False, **given)


def assert_is(found: xr.Dataset, latents: Any, k: int, threshold: float = 0.0, name: str = "latents") -> None:
    values, indices = largest_by_hand(latents, k, threshold)
    np.testing.assert_allclose(found[f"{name}_values"].values, values, rtol=2e-7, atol=1e-30)
    np.testing.assert_array_equal(found[f"{name}_indices"].values, indices)


@pytest.mark.few(2)
@pytest.mark.parametrize("normalisation", ["none", "centred", "constant_norm", "layer_norm"])
@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
def test_latents_are_those_of_plain_numpy_in_float64(architecture: str, normalisation: str, tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts")
    sae = random_sae(architecture, normalisation=normalisation, input_scale=1.5)
    right = encoded_by_hand(sae, rows[5])
    assert 0.03 < (right > 0).mean() < 0.7
    assert_is(encoded(store, sae, k=6), right, 6)
    assert_is(encoded(store, sae, k=LATENTS, name="every"), right, 6 if architecture == "topk" else LATENTS, name="every")
    assert_is(encoded(store, sae, k=6, threshold=1.25, name="strong"), right, 6, 1.25, name="strong")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_rows_of_every_dtype_are_encoded_as_they_are_stored(dtype: Any, tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts", dtype=dtype)
    sae = random_sae()
    assert_is(encoded(store, sae, k=8), encoded_by_hand(sae, rows[5]), 8)
    near = encoded(store, sae, k=8, name="fast", compute_dtype="float32")
    np.testing.assert_allclose(near.fast_values.values, encoded(store, sae, k=8).latents_values.values, rtol=1e-4, atol=1e-4)


def test_blocks_do_not_change_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = write_rows(tmp_path / "acts")
    monkeypatch.setattr(encoder_module, "BLOCK_BYTES", 8 * LATENTS * 3)  # three rows
    monkeypatch.setattr(encoding, "READ_BYTES", (8 * WIDTH + 8 * 5) * 7)  # seven tokens, fewer than some prompts have
    sae = random_sae()
    assert_is(encoded(store, sae, k=5), encoded_by_hand(sae, rows[5]), 5)


def test_of_equal_latents_the_first_are_kept(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts", n=5)
    sae = lz.SparseAutoencoder(encoder=np.zeros((WIDTH, LATENTS)), encoder_bias=np.repeat([1.0, 3.0, 2.0, 0.0], 10), layer=5)
    found = encoded(store, sae, k=14)
    assert_is(found, encoded_by_hand(sae, rows[5]), 14)
    assert found.latents_indices.values[0].tolist() == [*range(10, 20), *range(20, 24)]


def test_what_is_stored_is_a_variable_of_tokens_that_says_whose_it_is(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    before = store.tokens(), store.dataset()
    sae = random_sae("jumprelu")
    found = encoded(store, sae, name="latents_5", k=4)
    toks = lz.open_store(tmp_path / "acts").tokens()
    assert toks.latents_5_values.dims == toks.latents_5_indices.dims == ("token", "latents_5_k")
    assert (toks.latents_5_values.dtype, toks.latents_5_indices.dtype) == (np.float32, np.int32)
    xr.testing.assert_identical(toks[["latents_5_values", "latents_5_indices"]].load(), found.load())
    record = json.loads(toks.latents_5_values.attrs["sae"])
    assert record == {
        "sha256": sae.sha256, "architecture": "jumprelu", "normalisation": "none", "num_latents": LATENTS, "site": "resid", "layer": 5,
        "k": 4, "threshold": 0.0, "compute_dtype": "float64",
    }  # fmt: skip
    for name in ("prompt", "position", "token_id", "text"):
        np.testing.assert_array_equal(toks[name].values, before[0][name].values)
    np.testing.assert_array_equal(toks.resid.values, before[0].resid.values)
    assert toks.prompt.attrs == before[0].prompt.attrs, "the prompts are still in the order of their call"
    np.testing.assert_array_equal(store.dataset().prompt.values, before[1].prompt.values)
    assert store.verify(progress=False)


def test_every_prompt_has_a_list_of_its_latents(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    found, ds = encoded(store, random_sae(), k=5), store.dataset()
    dense = dense_of(found.latents_values.values, found.latents_indices.values)
    lists = dense_of(ds.latents_max_values.values, ds.latents_max_indices.values)
    for number, prompt in enumerate(ds.prompt.values):
        np.testing.assert_array_equal(lists[number], dense[found.prompt.values == prompt].max(axis=0))
    assert (np.diff(ds.latents_max_values.values, axis=1) <= 0).all(), "the largest come first"


def test_a_call_goes_on_where_another_has_stopped(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts")
    sae, toks = random_sae(), store.tokens()
    some = list(dict.fromkeys(toks.prompt.values))[4:9]
    part = lz.encode(toks.sel(prompt=some).resid, sae, k=6, progress=False)
    assert list(dict.fromkeys(part.prompt.values)) == some
    right = encoded_by_hand(sae, rows[5])
    assert_is(part, right[np.isin(toks.prompt.values, some)], 6)
    others = store.tokens().latents_values.values[~np.isin(toks.prompt.values, some)]
    assert np.isnan(others).all(), "what was not encoded is missing, not zero"
    assert_is(encoded(store, sae, k=6), right, 6)
    n_parts = len(store.list_parts(store.find_group().name))
    assert_is(encoded(store, sae, k=6), right, 6)
    assert len(store.list_parts(store.find_group().name)) == n_parts, "nothing was encoded twice"


def test_one_layer_is_chosen_by_the_record_or_by_the_caller(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts")
    anywhere = random_sae(layer=None)
    found = lz.encode(store.tokens().resid.sel(layer=3), anywhere, k=6, progress=False)
    assert_is(found, encoded_by_hand(anywhere, rows[3]), 6)
    assert_is(lz.encode(store.tokens(layers=[3]).resid, anywhere, k=6, progress=False), encoded_by_hand(anywhere, rows[3]), 6)
    with pytest.raises(InvalidArgumentError, match=r"has layers \[3, 5\].*sel\(layer=3\)"):
        encoded(store, anywhere, name="other")


def test_latents_survive_upkeep_and_copies(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts")
    sae, toks = random_sae(), store.tokens()
    prompts = list(dict.fromkeys(toks.prompt.values))
    for some in (prompts[:10], prompts[10:]):
        lz.encode(toks.sel(prompt=some).resid, sae, k=6, progress=False)
    right = encoded_by_hand(sae, rows[5])
    store.copy_to(tmp_path / "copy", progress=False)
    store.publish(tmp_path / "published", progress=False, page=False)
    for place in ("copy", "published"):
        assert_is(lz.open_store(tmp_path / place).tokens(), right, 6)
        assert len(lz.top_tokens(lz.open_store(tmp_path / place).tokens(), 7, 3))
    store.compact()
    assert_is(store.tokens(), right, 6)
    kept = ~np.isin(toks.prompt.values, prompts[8:12])
    store.delete("acme/toy", prompts[8:12])
    assert_is(store.tokens(), right[kept], 6)
    assert store.verify(progress=False)
    store.drop("acme/toy", ["latents_values", "latents_indices", "latents_max_values", "latents_max_indices"])
    assert set(store.tokens().data_vars) == {"resid"}
    assert_is(
        encoded(store, replace(sae, architecture="topk", k=3), k=6),
        encoded_by_hand(replace(sae, architecture="topk", k=3), rows[5][kept]),
        3,
    )


def test_latents_go_into_the_upper_of_two_stores(tmp_path: Path) -> None:
    _, rows = write_rows(tmp_path / "below")
    both, sae = lz.open_store([tmp_path / "below", tmp_path / "above"]), random_sae()
    with pytest.raises(ReadOnlyError, match="mode='a'"):
        encoded(both, sae)
    with pytest.raises(InvalidArgumentError, match="has no group"):
        lz.encode(both.tokens().resid, sae, store=tmp_path / "third")
    assert_is(lz.encode(both.tokens().resid, sae, store=both, k=6, progress=False), encoded_by_hand(sae, rows[5]), 6)
    assert set(lz.open_store(tmp_path / "below").tokens().data_vars) == {"resid"}


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_an_autoencoder_of_another_width_or_site_is_refused(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    with pytest.raises(InvalidArgumentError, match="rows of 16 values, and this autoencoder takes 8"):
        encoded(store, lz.SparseAutoencoder(encoder=np.ones((8, 20)), layer=5))
    with pytest.raises(InvalidArgumentError, match=r"trained on 'mlp', and these rows are 'resid': give toks\.mlp"):
        encoded(store, random_sae(site="mlp"))
    with pytest.raises(InvalidArgumentError, match="select no units"):
        lz.encode(store.tokens().resid.isel(hidden=slice(0, 8)), lz.SparseAutoencoder(encoder=np.ones((8, 20)), layer=5))
    assert set(store.tokens().data_vars) == {"resid"}


def test_an_autoencoder_of_another_normalisation_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="normalisation='batch_norm' is unknown: this package encodes none, centred"):
        random_sae(normalisation="batch_norm")
    with pytest.raises(InvalidArgumentError, match="architecture='temporal' is unknown"):
        lz.SparseAutoencoder(encoder=np.ones((2, 3)), architecture="temporal")  # type: ignore[arg-type]


def test_tokens_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    rows = [np.ones((4, WIDTH), np.float32) for _ in range(3)]
    rows[1][2, 5] = np.nan
    lz.write_activations(store, model="m", prompts=["a", "b", "c"], activations={"resid": {5: rows}})
    with pytest.raises(
        InvalidArgumentError, match=f"not finite in layer 5: token 2 of prompt {lz.prompt_hash('b')}.*Leave such prompts out"
    ):
        encoded(store, random_sae())
    left = store.tokens(prompts=["a", "c"])
    assert lz.encode(left.resid, random_sae(), progress=False).sizes["token"] == 8


def test_a_row_of_zeros_has_no_constant_norm(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    lz.write_activations(store, model="m", prompts=["a"], activations={"resid": {5: [np.zeros((3, WIDTH), np.float32)]}})
    with pytest.raises(InvalidArgumentError, match="3 rows are all zeros"):
        encoded(store, random_sae(normalisation="constant_norm"))


def test_a_layer_that_the_autoencoder_was_not_trained_on_is_refused(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    with pytest.raises(LayerOutOfRangeError, match=r"trained on layer 5, and these rows are of \[3\]"):
        lz.encode(store.tokens().resid.sel(layer=3), random_sae())
    with pytest.raises(LayerOutOfRangeError, match=r"trained on layer 4, and these rows are of \[3, 5\]"):
        encoded(store, random_sae(layer=4))


def test_prompts_without_the_layer_are_refused(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts", n=4)
    lz.write_activations(
        store, model="acme/toy", prompts=["x"], activations={"resid": {3: [np.ones((2, WIDTH), np.float32)]}}, num_layers=6
    )
    with pytest.raises(MissingPromptsError, match=f"1 of 5 prompts are stored without resid of layer 5, first {lz.prompt_hash('x')}"):
        encoded(store, random_sae())
    assert encoded(store, random_sae(layer=3)).sizes["token"] == store.tokens().sizes["token"]


@pytest.mark.few(9)
@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ({"k": LATENTS + 1}, InvalidArgumentError, f"k={LATENTS + 1} is out of range: this autoencoder has {LATENTS} latents"),
        ({"k": 0}, InvalidArgumentError, "k=0 is out of range"),
        ({"k": 2.5}, InvalidTypeError, "no whole number"),
        ({"k": True}, InvalidTypeError, "no whole number"),
        ({"threshold": -1.0}, InvalidArgumentError, "latents are never negative"),
        ({"threshold": np.nan}, InvalidArgumentError, "out of range"),
        ({"threshold": "1"}, InvalidTypeError, "is no number"),
        ({"compute_dtype": "float16"}, InvalidArgumentError, "give 'float64' or 'float32'"),
        ({"name": "a b"}, InvalidArgumentError, "no name for latents"),
        ({"name": "x" * 60}, InvalidArgumentError, "at most"),
        ({"name": "z_mean"}, InvalidArgumentError, "a pooling"),
        ({"name": 5}, InvalidTypeError, "no name"),
        ({"sae": {"W_enc": 1}}, InvalidTypeError, r"give a folder, or lz\.SparseAutoencoder"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], kind: type[Exception], match: str, tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts", n=3)
    with pytest.raises(kind, match=match):
        encoded(store, **({"sae": random_sae()} | given))
    assert set(store.tokens().data_vars) == {"resid"}


def test_a_store_that_was_opened_for_reading_is_not_written_to(tmp_path: Path) -> None:
    write_rows(tmp_path / "acts", n=3)
    store = lz.open_store(tmp_path / "acts", mode="r")
    with pytest.raises(ReadOnlyError, match="open it with mode='a'"):
        encoded(store, random_sae())
    with pytest.raises(ReadOnlyError):
        lz.encode(store.tokens().resid, random_sae(), store=store)
    assert set(store.tokens().data_vars) == {"resid"}


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    encoded(store, random_sae(), k=6)
    for other, given in ((random_sae(seed=1), {"k": 6}), (random_sae(), {"k": 5}), (random_sae(), {"k": 6, "threshold": 0.5})):
        with pytest.raises(InvalidArgumentError, match=r"'latents' is taken by latents of another autoencoder or other options .*name="):
            encoded(store, other, **given)
    encoded(store, random_sae(seed=1), name="others", k=6)
    store.annotate("acme/toy", {"mine_values": dict.fromkeys(list(dict.fromkeys(store.dataset().prompt.values)), 1.0)})
    with pytest.raises(InvalidArgumentError, match="'mine_values' is a variable or a column"):
        encoded(store, random_sae(), name="mine")
    with pytest.raises(InvalidArgumentError, match="'resid' is a variable"):
        encoded(store, random_sae(), name="resid")


def test_rows_that_are_not_as_they_are_stored_are_refused(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    toks, sae = store.tokens(), random_sae()
    for changed in (toks.resid * 2, store.tokens(chunks={}).resid, xr.DataArray(np.ones((3, WIDTH)), dims=("token", "hidden"))):
        with pytest.raises(InvalidArgumentError, match="is no variable as it is stored"):
            lz.encode(changed, sae)
    with pytest.raises(InvalidArgumentError, match="select prompts, not tokens"):
        lz.encode(store.tokens().resid.isel(token=slice(1, None)), sae)
    with pytest.raises(InvalidArgumentError, match="latents are those of tokens"):
        lz.encode(xr.DataArray(np.ones((3, WIDTH)), dims=("prompt", "hidden")), sae)
    for given in (toks, np.ones((3, WIDTH))):
        with pytest.raises(InvalidTypeError, match="encode takes a DataArray"):
            lz.encode(given, sae)  # type: ignore[arg-type]


def test_a_latent_beyond_float32_is_an_error(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts", n=3)
    with pytest.raises(NumberRangeError, match="float32 ends"):
        encoded(store, lz.SparseAutoencoder(encoder=np.full((WIDTH, LATENTS), 1e300), encoder_bias=np.full(LATENTS, 1e300), layer=5))


@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ({"encoder": np.ones(3)}, InvalidArgumentError, r"give the weights as \(hidden, latent\)"),
        ({"encoder": "x"}, InvalidTypeError, "encoder is a str"),
        ({"encoder": np.array([["a"]])}, InvalidTypeError, "dtype <U1"),
        ({"encoder": np.full((2, 3), np.nan)}, InvalidArgumentError, "not finite"),
        ({"encoder_bias": np.ones(4)}, InvalidArgumentError, r"encoder_bias has shape \(4,\)"),
        ({"input_bias": np.ones(3)}, InvalidArgumentError, r"give \(hidden,\), here \(2,\)"),
        ({"threshold": 1.0}, InvalidArgumentError, "threshold is given for architecture='relu'"),
        ({"architecture": "topk"}, InvalidArgumentError, "k is missing of architecture='topk'"),
        ({"architecture": "topk", "k": 4}, InvalidArgumentError, "k=4 of an autoencoder with 3 latents"),
        ({"architecture": "topk", "k": 1.5}, InvalidTypeError, "no whole number"),
        ({"input_scale": 0}, InvalidArgumentError, "scales nothing"),
        ({"input_scale": "1"}, InvalidTypeError, "no number"),
        ({"layer": -1}, InvalidTypeError, "no layer"),
        ({"site": 3}, InvalidTypeError, "no name"),
    ],
)
def test_records_that_cannot_be_are_refused(given: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        lz.SparseAutoencoder(**({"encoder": np.ones((2, 3))} | given))


def test_a_digest_tells_autoencoders_apart() -> None:
    first = random_sae("jumprelu")
    assert first.sha256 == random_sae("jumprelu").sha256 == replace(first, site="resid", layer=None, model="gpt2").sha256
    changed = first.encoder.copy()
    changed[0, 0] += 1e-3
    others = [replace(first, encoder=changed), replace(first, threshold=1.0), replace(first, input_scale=2.0),
              replace(first, normalisation="centred"), replace(first, input_bias=None), random_sae(), random_sae("topk")]  # fmt: skip
    assert len({first.sha256, *(other.sha256 for other in others)}) == 1 + len(others)
    assert repr(first).startswith(f"<SparseAutoencoder {WIDTH} → {LATENTS}, architecture='jumprelu'")


def test_what_a_repair_took_is_encoded_again(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts")
    sae = random_sae()
    encoded(store, sae, k=6)
    (chunk,) = (tmp_path / "acts").glob("*/*/tokens/latents_values/c.0.0")
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(CorruptPartError, match="latents_values"):
        lz.top_tokens(lz.open_store(tmp_path / "acts").tokens(), 7)
    lz.open_store(tmp_path / "acts").repair(progress=False)
    repaired = lz.open_store(tmp_path / "acts")
    assert "latents_values" not in repaired.tokens()
    with pytest.raises(InvalidArgumentError, match="'latents' is taken"):
        encoded(repaired, random_sae(seed=1), k=6)
    assert_is(encoded(repaired, sae, k=6), encoded_by_hand(sae, rows[5]), 6)
    assert len(lz.top_tokens(repaired.tokens(), 7))


def test_columns_of_latents_are_no_units_to_fit_or_pool(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    encoded(store, random_sae(), k=6)
    y = np.arange(30) % 2
    for call in (
        lambda: lz.sweep(store.dataset().latents_max_values, y, "ridge", 2),
        lambda: lz.fit_tokens(store.tokens().latents_values, y[0] + store.tokens().position.values % 2, "ridge"),
        lambda: store.tokens().latents_values.lz.pool("mean"),
    ):
        with pytest.raises(InvalidArgumentError, match=r"other latents in every row.*pool_latents"):
            call()
    with pytest.raises(InvalidArgumentError, match="holds no activations"):
        lz.sweep(store.dataset(), y, "ridge", 2)
    assert set(store.tokens().lz.pool("mean").data_vars) == {"resid_mean"}


def test_rows_that_were_written_again_are_encoded_again(tmp_path: Path) -> None:
    store, rows = write_rows(tmp_path / "acts", n=6)
    sae = random_sae()
    before = encoded(store, sae, k=6).compute()
    toks = store.tokens()
    prompts = list(dict.fromkeys(toks.text.values))
    of_first = toks.text.values == prompts[0]
    again = {layer: [(held[of_first] * 2).astype(np.float32)] for layer, held in rows.items()}
    lz.write_activations(store, model="acme/toy", prompts=prompts[:1], activations={"resid": again}, num_layers=6)
    found = encoded(store, sae, k=6)
    right = rows[5].copy()
    right[of_first] *= 2
    assert_is(found.sel(prompt=toks.prompt.values[of_first][0]), encoded_by_hand(sae, right[of_first]), 6)
    others = found.isel(token=found.text.values != prompts[0])
    np.testing.assert_array_equal(others.latents_values.values, before.latents_values.values[~of_first])
    assert len(store.list_parts(store.find_group().name)) == 4, "one prompt alone was encoded again"
    encoded(store, sae, k=6)
    assert len(store.list_parts(store.find_group().name)) == 4
