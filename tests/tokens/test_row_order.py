"""Values by position are taken for rows in a known order alone; prompts are found by text; what is not stored is named so."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError
from lmprobe_zarr.tokens import is_in_known_order

TEXTS = [f"the {i}" for i in range(24)]
Y = [0, 1] * 12
RNG = np.random.default_rng(0)
VALUES = {text: (RNG.normal(size=(2, 4)) + Y[i]).astype(np.float32) for i, text in enumerate(TEXTS)}


def write(store: Any, texts: list[str], *, layers: tuple[int, ...] = (0, 1), tokens: bool = False) -> None:
    pooled = {"resid_mean": {layer: np.stack([VALUES[text][layer] for text in texts]) for layer in layers}}
    kept = {"resid": {layer: [np.stack([VALUES[text][layer]] * 2) for text in texts] for layer in layers}} if tokens else None
    label = [Y[TEXTS.index(text)] for text in texts]
    lz.write_activations(store, model="m", prompts=texts, pooled=pooled, activations=kept, coords={"label": label})


@pytest.fixture
def one(tmp_path: Path) -> Any:
    store = lz.open_store(tmp_path / "one", durable=False)
    write(store, TEXTS, tokens=True)
    return store


@pytest.fixture
def several(tmp_path: Path) -> Any:
    """All prompts, from two calls in an order of their own."""
    store = lz.open_store(tmp_path / "several", durable=False)
    write(store, TEXTS[12:], tokens=True)
    write(store, TEXTS[:12], tokens=True)
    return store


FORMS: dict[str, Any] = {
    "list": Y, "tuple": tuple(Y), "array": np.array(Y), "series": pd.Series(Y), "index": pd.Index(Y), "categorical": pd.Categorical(Y),
}  # fmt: skip
USES: dict[str, Any] = {
    "sweep": lambda ds, y: lz.sweep(ds.resid_mean, y, "mass_mean", cv=2),
    "sweep of a dataset": lambda ds, y: lz.sweep(ds[["resid_mean"]], y, "mass_mean", cv=2),
    "groups": lambda ds, y: lz.sweep(ds.resid_mean, "label", "mass_mean", cv=2, groups=list(range(24)) if y is Y else y),
    "directions": lambda ds, y: lz.fit_directions(ds.resid_mean, y, "mass_mean"),
    "transfer": lambda ds, y: lz.sweep_transfer({"a": ds.resid_mean, "b": ds.resid_mean}, y, cv=2),
    "tokens by prompt": lambda ds, y: lz.fit_tokens(ds.resid_mean, y),
    "probe": lambda ds, y: lz.Probe(model="m").fit(ds.resid_mean.sel(layer=0), y),
}


@pytest.mark.few(9)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use", ["sweep", "directions", "tokens by prompt", "probe"])
def test_labels_by_position_are_refused_for_rows_of_several_calls_in_every_form(several: Any, use: str, form: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"several calls(?s:.*)name a column(?s:.*)prompts=\[…\]"):
        USES[use](several.dataset(), FORMS[form])


@pytest.mark.few(6)
@pytest.mark.parametrize("use", USES)
def test_labels_by_position_are_taken_where_the_order_is_known_and_refused_elsewhere(one: Any, several: Any, use: str) -> None:
    USES[use](one.dataset(), Y)
    USES[use](several.dataset(prompts=TEXTS), Y)
    with pytest.raises(InvalidArgumentError, match="several calls"):
        USES[use](several.dataset(), Y)


OTHERS: dict[str, Any] = {
    "split": lambda ds: lz.sweep(ds.resid_mean, "label", "mass_mean", split=(["train"] * 2 + ["test"] * 2) * 6),
    "folds": lambda ds: lz.sweep(ds.resid_mean, "label", "mass_mean", cv=[(np.arange(12), np.arange(12, 24))]),
    "features of a control": lambda ds: lz.sweep(ds.resid_mean, "label", "mass_mean", cv=2, controls={"mine": RNG.normal(size=(24, 2))}),
    "targets": lambda ds: lz.sweep(ds.resid_mean, RNG.normal(size=24), "ridge_regression", cv=2, task="regression"),
    "weights": lambda ds: lz.Probe(model="m").fit(ds.resid_mean.sel(layer=0), ds.label, sample_weight=np.ones(24)),
    "labels to score": lambda ds: lz.Probe(model="m").fit(ds.resid_mean.sel(layer=0), ds.label).score(ds.resid_mean.sel(layer=0), Y),
    "labels to evaluate": lambda ds: lz.Probe(model="m").fit(ds.resid_mean.sel(layer=0), ds.label).evaluate(ds.resid_mean.sel(layer=0), Y),
    "folds of tokens": lambda ds: lz.sweep_tokens(ds.resid_mean, "label", "mass_mean", cv=[(np.arange(12), np.arange(12, 24))]),
    "groups of tokens": lambda ds: lz.sweep_tokens(ds.resid_mean, "label", "mass_mean", cv=2, groups=list(range(24))),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("use", OTHERS)
def test_whatever_else_is_given_by_position_is_refused_too(one: Any, several: Any, use: str) -> None:
    OTHERS[use](one.dataset())
    OTHERS[use](several.dataset(prompts=TEXTS))
    with pytest.raises(InvalidArgumentError, match="several calls"):
        OTHERS[use](several.dataset())


def test_a_mask_that_was_computed_from_the_view_is_taken_in_its_order(several: Any) -> None:
    data = several.dataset()
    mask = data.label.values == 1
    fitted = lz.fit_tokens(data.resid_mean, "label", "mass_mean", where=np.ones(24, bool))
    assert fitted.attrs["n_tokens"] == 24
    (batch,) = data.resid_mean.sel(layer=0).lz.batches(where=mask, shuffle=False)
    np.testing.assert_array_equal(np.asarray(batch), data.resid_mean.sel(layer=0).values[mask])


def test_labels_of_tokens_by_position_are_refused_too(one: Any, several: Any) -> None:
    for labels in (Y, np.repeat(Y, 2)):
        lz.fit_tokens(one.tokens().resid, labels)
        with pytest.raises(InvalidArgumentError, match="several calls"):
            lz.fit_tokens(several.tokens().resid, labels)
    lz.fit_tokens(several.tokens().resid, "label")


def test_labels_by_prompt_are_taken_and_mean_the_same_in_any_order(several: Any) -> None:
    ds = several.dataset()
    by_column = lz.sweep(ds.resid_mean, "label", cv=2).accuracy.values
    given: list[Any] = [
        dict(zip(TEXTS, Y, strict=True)), pd.Series(Y, index=TEXTS), several.dataset(prompts=TEXTS).label, ds.label.sortby("label"),
    ]  # fmt: skip
    for labels in given:
        np.testing.assert_array_equal(lz.sweep(ds.resid_mean, labels, cv=2).accuracy.values, by_column)
    at = ds.resid_mean.sel(layer=0)
    probes = [lz.Probe(model="m").fit(at, labels) for labels in (ds.label, *given)]
    for probe in probes:
        np.testing.assert_allclose(probe.decision_function(at.values), probes[0].decision_function(at.values), rtol=1e-6)


def test_the_mark_survives_what_people_do_with_a_view(several: Any, tmp_path: Path) -> None:
    ds = several.dataset()
    da = ds.resid_mean
    ones = xr.DataArray(np.ones(24), dims="prompt", coords={"prompt": ds.prompt.values})
    da.drop_vars("text").to_netcdf(tmp_path / "saved.nc", engine="scipy")
    made = {
        "isel": da.isel(prompt=[3, 1]), "sel": da.sel(prompt=TEXTS[:3]), "sortby": da.sortby("label"), "load": da.copy().load(),
        "chunk": da.chunk(), "astype": da.astype("float64"), "arithmetic": da * 2 + 1, "left": ones * da, "right": da * ones,
        "centred": da - da.mean("prompt"), "where": da.where(da.label == 1, drop=True), "function": np.sqrt(abs(da)),
        "reindex": da.reindex(prompt=da.prompt.values[::-1]), "concat": xr.concat([da.isel(layer=[0]), da.isel(layer=[1])], "layer"),
        "groupby": da.groupby("label").map(lambda group: group - group.mean("prompt")), "pickle": pickle.loads(pickle.dumps(da)),  # noqa: S301
        "no prompt": da.drop_vars("prompt"), "reset": da.reset_index("prompt"), "saved": xr.open_dataarray(tmp_path / "saved.nc"),
        "merge": xr.merge([ds[["resid_mean"]], ones.rename("w")]).resid_mean, "assigned": da.assign_coords(z=("prompt", Y)),
    }  # fmt: skip
    assert {name: is_in_known_order(each) for name, each in made.items()} == dict.fromkeys(made, False)
    assert is_in_known_order(several.dataset(prompts=TEXTS))
    assert is_in_known_order(xr.DataArray(np.ones((3, 2)), dims=("prompt", "hidden")))


def test_upkeep_keeps_the_order_and_what_is_known_of_it(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    for layers in ((0,), (1,)):
        write(store, TEXTS, layers=layers)
    store.delete("m", TEXTS[5:7])
    assert store.dataset().text.values.tolist() == TEXTS[:5] + TEXTS[7:]
    assert is_in_known_order(store.dataset())
    write(store, TEXTS[5:7])
    store.compact("m", progress=False)
    assert not is_in_known_order(store.dataset())
    other = lz.open_store(tmp_path / "copy", durable=False)
    store.copy_to(other, progress=False)
    assert not is_in_known_order(other.dataset())


# ------------------------------------------------------------------------------------------------------------ by the text


def test_prompts_are_selected_by_text_wherever_by_hash(one: Any) -> None:
    ds, tokens = one.dataset(), one.tokens()
    for view in (ds, ds.load(), ds.chunk(), ds.sortby("label"), ds.isel(prompt=slice(2, 20)), pickle.loads(pickle.dumps(ds))):  # noqa: S301
        np.testing.assert_array_equal(view.resid_mean.sel(prompt=TEXTS[7]).values, VALUES[TEXTS[7]])
        both = view.resid_mean.sel(prompt=[TEXTS[9], lz.prompt_hash(TEXTS[3])]).values
        np.testing.assert_array_equal(both, np.stack([VALUES[TEXTS[9]], VALUES[TEXTS[3]]], axis=1))
    np.testing.assert_array_equal(ds.resid_mean.loc[:, TEXTS[7]].values, VALUES[TEXTS[7]])
    np.testing.assert_array_equal(tokens.resid.sel(prompt=TEXTS[7], layer=1).values, np.stack([VALUES[TEXTS[7]][1]] * 2))
    np.testing.assert_array_equal(tokens.resid.sel(prompt=TEXTS[7], layer=1, position=0).values, VALUES[TEXTS[7]][1])
    assert ds.sel(prompt=TEXTS[:2]).prompt.values.tolist() == [lz.prompt_hash(text) for text in TEXTS[:2]]


def test_a_prompt_that_is_not_here_is_an_error_that_names_prompt_hash(one: Any) -> None:
    with pytest.raises(KeyError) as failed:
        one.dataset().sel(prompt="never seen")
    assert "prompt_hash" in str(failed.value.__cause__)
    with pytest.raises(KeyError):
        one.dataset().sel(prompt=[TEXTS[0], "never seen"])
    with pytest.raises(MissingPromptsError, match="prompt_hash"):
        one.tokens().sel(prompt="never seen")


def test_the_index_of_texts_aligns_with_plain_indexes(one: Any) -> None:
    ds = one.dataset()
    weights = xr.DataArray(np.arange(24.0), dims="prompt", coords={"prompt": ds.prompt.values}, name="w")
    right = np.stack([VALUES[text] for text in TEXTS], axis=1) * np.arange(24.0)[:, None]
    for product in (ds.resid_mean * weights, (weights * ds.resid_mean).transpose("layer", "prompt", "hidden")):
        np.testing.assert_allclose(product.values, right)
    assert xr.align(ds, weights.isel(prompt=[3, 1]), join="inner")[0].sizes["prompt"] == 2
    joined = xr.concat([ds.isel(prompt=[0, 1]), ds.isel(prompt=[5])], "prompt")
    np.testing.assert_array_equal(joined.resid_mean.sel(prompt=TEXTS[5]).values, VALUES[TEXTS[5]])
    assert ds.identical(ds.assign_coords(prompt=("prompt", ds.prompt.values, ds.prompt.attrs)))


# ------------------------------------------------------------------------------------------------------------- not stored


def test_what_was_never_extracted_is_not_called_nan(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    write(store, TEXTS, layers=(0,))
    write(store, TEXTS[:20], layers=(1,))
    ds = store.dataset()
    mapping = dict(zip(TEXTS, Y, strict=True))
    for use in ("sweep", "directions", "transfer", "tokens by prompt"):
        with pytest.raises(InvalidArgumentError, match=r"layer 1 .*was never extracted for 4 (?s:.*)layers=\[1\]") as failed:
            USES[use](ds, "label" if use == "tokens by prompt" else mapping)
        assert "NaN" not in str(failed.value)
    with pytest.raises(InvalidArgumentError, match=r"layer 1 of 'resid_mean' was never extracted for 4 of 24 prompts"):
        lz.Probe(model="m").fit(ds.resid_mean, mapping)
    with pytest.raises(InvalidArgumentError, match=r"layer 1 .* was never extracted for any of these prompts"):
        lz.sweep(ds.resid_mean.isel(prompt=slice(20, 24)), "label", "mass_mean", cv=2)
    with pytest.raises(InvalidArgumentError, match=r"NaN or infinite for 4 of 24(?s:.*)store.coverage\(\) tells"):
        lz.sweep(ds.resid_mean.load(), mapping, "mass_mean", cv=2)


def test_a_stored_value_that_is_not_finite_is_not_called_missing(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    values = np.stack([VALUES[text][0] for text in TEXTS])
    values[3] = np.nan
    lz.write_activations(store, model="m", prompts=TEXTS, pooled={"resid_mean": {0: values}})
    for array in (store.dataset().resid_mean, store.dataset()[["resid_mean"]]):
        with pytest.raises(InvalidArgumentError, match=r"layer 0 of 'resid_mean' is NaN or infinite for 1 of 24") as failed:
            lz.sweep(array, Y, "mass_mean", cv=2)
        assert "extracted reads" not in str(failed.value)
    everything = np.full_like(values, np.nan)
    lz.write_activations(store, model="other", prompts=TEXTS, pooled={"resid_mean": {0: everything}})
    with pytest.raises(InvalidArgumentError, match="NaN or infinite for 24 of 24"):
        lz.sweep(store.dataset("other"), Y, "mass_mean", cv=2)


def test_tokens_that_were_not_kept_are_named_so(tmp_path: Path, one: Any) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    write(store, TEXTS)
    with pytest.raises(MissingPromptsError, match=r"no tokens were kept of the 24 prompts.*keep_tokens=True"):
        store.tokens()
    assert np.isnan(store.dataset().n_tokens.values).all()
    write(store, TEXTS[:5], tokens=True)
    np.testing.assert_array_equal(store.dataset(prompts=TEXTS).n_tokens.values, [2] * 5 + [np.nan] * 19)
    assert store.dataset().n_tokens.attrs["missing"] == 19
    assert one.dataset().n_tokens.values.tolist() == [2] * 24
    assert one.dataset().n_tokens.dtype == np.int64
