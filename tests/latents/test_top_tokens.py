"""The strongest prompts of a latent, and sparse arrays, against a search of everything; and how little is read for the first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from encoded import LATENTS, WIDTH, dense_of, random_sae, write_rows

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, MissingPromptsError
from lmprobe_zarr.latents import lists, prompt_lists, sparse_rows, top
from lmprobe_zarr.store.parts import VirtualArray

# Every so many latents, but in the long form of the tests all.
FEW = 1 if "LMPROBE_ZARR_STRESS" in os.environ else 5


def encoded(place: Path, sae: Any = None, **given: Any) -> tuple[lz.Store, xr.Dataset]:
    store, _ = write_rows(place, n=given.pop("n", 30), longest=given.pop("longest", 12))
    return store, lz.encode(store.tokens().resid, sae or random_sae(), progress=False, **({"k": 6} | given))


def by_hand(data: xr.Dataset, feature: int, n: int, name: str = "latents") -> list[tuple[str, int, float]]:
    """Prompt, position and value of the strongest token of each prompt, the strongest prompts first, from all values."""
    dense = dense_of(data[f"{name}_values"].values, data[f"{name}_indices"].values)[:, feature]
    prompts, positions = data.prompt.values, data.position.values
    best: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        if prompt not in best or dense[row] > dense[best[prompt]]:
            best[prompt] = row
    found = sorted((row for row in best.values() if dense[row] > 0), key=lambda row: -dense[row])
    return [(prompts[row], positions[row], dense[row]) for row in found[:n]]


def as_rows(found: xr.DataArray) -> list[tuple[str, int, float]]:
    return list(zip(found.prompt.values, found.position.values, found.values, strict=True))


@pytest.mark.few(1)
@pytest.mark.parametrize("k", [3, 12])
@pytest.mark.parametrize("least", [1, 16])
def test_the_strongest_are_those_of_a_search_of_everything(least: int, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if least == 1:  # lists that hold far from all latents of most prompts
        monkeypatch.setattr(lists, "LEAST", 1)
        monkeypatch.setattr(lists, "SHARE", 0.0)
        monkeypatch.setattr(prompt_lists, "READ_BYTES", 2000)
        monkeypatch.setattr(top, "READ_BYTES", 2000)
    store, data = encoded(tmp_path / "acts", k=k)
    width = store.dataset().sizes["latents_max_k"]
    full = (store.dataset().latents_max_indices.isel(latents_max_k=-1).values >= 0).mean()
    assert (full > 0.5, width < LATENTS) == ((True, True) if least == 1 else (full > 0.5, width < LATENTS))
    held = data.compute()
    for feature in range(0, LATENTS, FEW):
        right = by_hand(held, feature, 100)
        for n in (1, 4, 100):
            assert as_rows(lz.top_tokens(data, feature, n)) == right[:n], (feature, n)
        assert as_rows(lz.top_tokens(held, feature, 4)) == right[:4], "in memory"


def test_of_a_selection_only_its_tokens_count(tmp_path: Path) -> None:
    store, _ = encoded(tmp_path / "acts")
    toks = store.tokens()
    prompts = list(dict.fromkeys(toks.prompt.values))
    for some in (toks.sel(prompt=prompts[5:20][::-1]), toks.isel(token=toks.position.values > 0), toks.sel(prompt=[prompts[3]])):
        held = some.compute()
        for feature in range(0, LATENTS, 2 * FEW):
            assert as_rows(lz.top_tokens(some, feature, 5)) == by_hand(held, feature, 5)
    chunked = store.tokens(chunks={})
    assert as_rows(lz.top_tokens(chunked, 7, 5)) == by_hand(toks.compute(), 7, 5)


def test_equal_values_keep_the_order_of_the_data(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts")
    rows = [np.full((3, WIDTH), value, np.float32) for value in (1, 2, 1, 2, 2)]
    lz.write_activations(store, model="m", prompts=list("abcde"), activations={"resid": {5: rows}})
    weights = np.zeros((WIDTH, 2), np.float32)
    weights[0, 1] = 1
    data = lz.encode(store.tokens().resid, lz.SparseAutoencoder(encoder=weights), progress=False)
    found = lz.top_tokens(data, 1, 4)
    assert found.text.values.tolist() == ["b", "d", "e", "a"]
    assert found.position.values.tolist() == [0, 0, 0, 0]
    assert found.name == "latents_1"
    assert not len(lz.top_tokens(data, 0))


def test_the_strongest_are_found_without_reading_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = encoded(tmp_path / "acts", n=300, longest=30)
    read = {"tokens": 0, "prompts": 0}
    plain = VirtualArray.read

    def counted(self: VirtualArray, *given: Any, **options: Any) -> Any:
        found = plain(self, *given, **options)
        path = self.arrays[0].path
        if "latents" in path:
            read["tokens" if "/tokens/" in path else "prompts"] += found.nbytes
        return found

    monkeypatch.setattr(VirtualArray, "read", counted)
    found = lz.top_tokens(data, 7, 5)
    assert len(found) == 5
    of_all = data.latents_values.nbytes + data.latents_indices.nbytes
    assert 0 < read["tokens"] < of_all / 15
    assert read["prompts"] <= store.dataset().latents_max_indices.nbytes * 2
    never = lz.encode(store.tokens().resid, random_sae(encoder_bias=np.full(LATENTS, -1e3, np.float32)), name="never", progress=False)
    read.update(tokens=0)
    assert not len(lz.top_tokens(never, 3))
    assert read["tokens"] == 0, "lists that are not full say that a latent is nowhere"


def test_lists_that_are_gone_cost_a_search_of_everything(tmp_path: Path) -> None:
    store, data = encoded(tmp_path / "acts")
    held = data.compute()
    right = [by_hand(held, feature, 5) for feature in range(0, LATENTS, 2 * FEW)]
    store.drop("acme/toy", ["latents_max_values", "latents_max_indices"])
    toks = store.tokens()
    assert [as_rows(lz.top_tokens(toks, feature, 5)) for feature in range(0, LATENTS, 2 * FEW)] == right


def test_sparse_arrays_hold_what_is_stored(tmp_path: Path) -> None:
    store, data = encoded(tmp_path / "acts")
    dense = dense_of(data.latents_values.values, data.latents_indices.values)
    found = store.tokens().lz.to_sparse(kind="csr")
    np.testing.assert_array_equal(found.toarray(), dense)
    assert (found.dtype, found.shape) == (np.float32, (data.sizes["token"], LATENTS))
    assert found.has_canonical_format
    one = store.tokens().isel(token=slice(3, 9)).lz.to_sparse("latents", kind="csr")
    np.testing.assert_array_equal(one.toarray(), dense[3:9])


def test_sparse_arrays_of_the_package_sparse_have_the_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = encoded(tmp_path / "acts")
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "sparse", None)
        with pytest.raises(MissingDependencyError, match=r'lmprobe-zarr\[sparse\]"; or give kind="csr"'):
            data.lz.to_sparse()
    sparse = pytest.importorskip("sparse")
    found = data.lz.to_sparse()
    assert isinstance(found.data, sparse.COO)
    assert found.dims == ("token", "latent")
    np.testing.assert_array_equal(found.data.todense(), dense_of(data.latents_values.values, data.latents_indices.values))
    prompt = data.prompt.values[0]
    np.testing.assert_array_equal(found.sel(prompt=prompt).data.todense(), found.data.todense()[data.prompt.values == prompt])


@pytest.mark.parametrize("with_lists", [True, False])
def test_latents_are_pooled_by_prompt(with_lists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = encoded(tmp_path / "acts")
    if not with_lists:
        monkeypatch.setattr(sparse_rows, "open_lists", lambda latents: None)
        monkeypatch.setattr(sparse_rows, "READ_BYTES", 8 * 6 * 5)
    dense = dense_of(data.latents_values.values, data.latents_indices.values)
    codes = pd.factorize(data.prompt.values)[0]
    for toks, kept in ((store.tokens(), np.ones(len(codes), bool)), (store.tokens().isel(token=codes % 2 == 0), codes % 2 == 0)):
        rows = [dense[codes == code] for code in np.unique(codes[kept])]
        largest = lz.pool_latents(toks)
        np.testing.assert_array_equal(largest.toarray(), np.stack([each.max(axis=0) for each in rows]))
        assert largest.has_canonical_format
        means = np.stack([each.astype(np.float64).mean(axis=0) for each in rows])
        np.testing.assert_allclose(lz.pool_latents(toks, "mean").toarray(), means, rtol=1e-6)
    late = data.isel(token=data.position.values > 0)
    after = dense[data.position.values > 0]
    codes = pd.factorize(late.prompt.values)[0]
    np.testing.assert_array_equal(
        lz.pool_latents(late).toarray(), np.stack([after[codes == code].max(axis=0) for code in range(codes.max() + 1)])
    )


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_datasets_without_latents_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    store, data = encoded(tmp_path / "acts")
    for feature in (LATENTS, -1):
        with pytest.raises(InvalidArgumentError, match=f"feature={feature} is none of the latents of 'latents': give 0 to {LATENTS - 1}"):
            lz.top_tokens(data, feature)
    for other in (1.5, True, "7"):
        with pytest.raises(InvalidTypeError, match="give the number of a latent"):
            lz.top_tokens(data, other)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="n=0 keeps nothing"):
        lz.top_tokens(data, 1, 0)
    with pytest.raises(InvalidTypeError, match="give how many prompts"):
        lz.top_tokens(data, 1, 2.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="give the dataset that encode returned"):
        lz.top_tokens(data.latents_values, 1)
    with pytest.raises(InvalidArgumentError, match="has no latents of tokens"):
        lz.top_tokens(store.tokens()[["resid"]], 1)
    with pytest.raises(InvalidArgumentError, match="no latents named 'other': it has latents"):
        lz.top_tokens(data, 1, name="other")
    with pytest.raises(InvalidArgumentError, match="give 'coo'"):
        data.lz.to_sparse(kind="csc")
    with pytest.raises(InvalidArgumentError, match="give 'max' or 'mean'"):
        lz.pool_latents(data, "sum")  # type: ignore[arg-type]
    lz.encode(store.tokens().resid, random_sae(seed=1), name="others", progress=False)
    with pytest.raises(InvalidArgumentError, match="several latents, latents, others: say which"):
        lz.top_tokens(store.tokens(), 1)
    assert len(lz.top_tokens(store.tokens(), 1, name="others"))


def test_prompts_without_latents_are_an_error_and_never_zeros(tmp_path: Path) -> None:
    store, _ = write_rows(tmp_path / "acts")
    toks = store.tokens()
    prompts = list(dict.fromkeys(toks.prompt.values))
    lz.encode(toks.sel(prompt=prompts[:5]).resid, random_sae(), progress=False)
    calls: list[Callable[[xr.Dataset], Any]] = [
        lambda given: lz.top_tokens(given, 3), lambda given: given.lz.to_sparse(kind="csr"), lz.pool_latents,
    ]  # fmt: skip
    for given in (store.tokens(), store.tokens().compute(), store.tokens(chunks={})):
        for call in calls:
            with pytest.raises(MissingPromptsError, match="have no latents named 'latents'"):
                call(given)
