"""Sweeps and probes on sites of any width: they are what they are on `hidden`, and what they return keeps the data's own dimension."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.store import Store

N, WIDTH, HIDDEN, HEADS = 48, 12, 6, 3
TEXTS = [f"prompt number {i}" for i in range(N)]
Y = np.arange(N) % 2
COUNTS = np.random.default_rng(3).integers(2, 5, N)


def neurons(layers: tuple[int, ...] = (0, 1), width: int = WIDTH, seed: int = 0) -> dict[int, list[Any]]:
    """By layer, the tokens of each prompt; the last layer has the label along its first unit."""
    rng = np.random.default_rng(seed)
    found = {layer: [rng.normal(size=(count, width)).astype("f4") for count in COUNTS] for layer in layers}
    for label, array in zip(Y, found[layers[-1]], strict=True):
        array[:, 0] += 2 * label
    return found


def means(acts: dict[int, list[Any]]) -> dict[int, Any]:
    return {layer: np.stack([array.mean(0) for array in arrays]) for layer, arrays in acts.items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """`neurons` of another width than `resid`, `gate` in one layer of two, `last` without layers, `heads` of three heads."""
    opened = lz.open_store(tmp_path_factory.mktemp("acts"), durable=False)
    acts, resid, heads = neurons(), neurons(width=HIDDEN, seed=1), neurons(width=HEADS * 4, seed=2)
    last = means(neurons(width=5, seed=4))[1]
    lz.write_activations(
        opened, model="a/model", prompts=TEXTS, coords={"label": Y},
        activations={"neurons": acts, "resid": resid},
        pooled={"neurons_mean": means(acts), "resid_mean": means(resid), "heads_mean": means(heads), "last_mean": last},
    )  # fmt: skip
    lz.write_activations(opened, model="a/model", prompts=TEXTS, pooled={"gate_mean": means(neurons((1,), width=7, seed=5))}, hidden_size=6)
    return opened


def test_a_sweep_is_that_of_the_same_values_along_hidden(store: Store) -> None:
    own = store.dataset().neurons_mean
    assert own.dims == ("layer", "prompt", "neurons_unit")
    same = own.load().rename(neurons_unit="hidden")
    options: dict[str, Any] = {"probes": ["mass_mean", "ridge"], "controls": ["shuffled_labels"], "cv": 3}
    for given in (own, own.load(), own.chunk({"layer": 1, "prompt": 10}), own.transpose("neurons_unit", "prompt", "layer")):
        scores = lz.sweep(given, "label", **options)
        xr.testing.assert_equal(
            scores.drop_vars(["fit_seconds"]).reset_coords(drop=True),
            lz.sweep(same, "label", **options).drop_vars(["fit_seconds"]).reset_coords(drop=True),
        )
    assert str(lz.plan_sweep(own, "label")) == str(lz.plan_sweep(same, "label"))


def test_scores_of_one_layer_are_those_of_scikit_learn(store: Store) -> None:
    array = store.dataset().neurons_mean
    folds = list(StratifiedKFold(4, shuffle=True, random_state=1).split(np.zeros(N), Y))
    scores = lz.sweep(array, "label", ["logistic_regression"], cv=folds)
    x = array.sel(layer=1).values.astype(np.float64)
    right = [make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[a], Y[a]).score(x[b], Y[b]) for a, b in folds]
    np.testing.assert_allclose(scores.accuracy.sel(layer=1, probe="logistic_regression").values, right)
    assert np.mean(right) > 0.75


def test_scores_go_on_in_a_place_that_holds_those_of_another_dimension(store: Store, tmp_path: Path) -> None:
    array = store.dataset().neurons_mean
    first = lz.sweep(array, "label", "ridge", cv=3, out=tmp_path / "scores")
    # The place was begun when all inner dimensions were called hidden.
    again = lz.sweep(array.rename(neurons_unit="hidden"), "label", "ridge", cv=3, out=tmp_path / "scores")
    xr.testing.assert_identical(first.accuracy, again.accuracy)
    np.testing.assert_array_equal(first.fit_seconds, again.fit_seconds, "nothing was fitted again")


def test_a_dataset_of_several_widths_is_swept_whole(store: Store) -> None:
    ds = store.dataset()
    scores = lz.sweep(ds, "label", "ridge", cv=3)
    assert sorted(scores.variable.values) == ["gate_mean", "heads_mean", "last_mean", "neurons_mean", "resid_mean"]
    for name in ("neurons_mean", "resid_mean", "heads_mean"):
        xr.testing.assert_allclose(
            scores.accuracy.sel(variable=name, drop=True).reset_coords(drop=True),
            lz.sweep(ds[name], "label", "ridge", cv=3).accuracy.reset_coords(drop=True),
        )
    assert np.isnan(scores.accuracy.sel(variable="gate_mean", layer=0)).all(), "a layer that a variable lacks has no score"
    assert np.isfinite(scores.accuracy.sel(variable="gate_mean", layer=1)).all()
    assert "not stored" in str(scores.lz.table("accuracy"))


def test_directions_keep_the_dimension_of_the_data(store: Store) -> None:
    array = store.dataset().neurons_mean
    found = lz.fit_directions(array, "label", "ridge")
    assert found.coef.dims == ("layer", "neurons_unit")
    decision = ((array * found.coef).sum("neurons_unit") + found.intercept).transpose("layer", "prompt")
    same = lz.fit_directions(array.rename(neurons_unit="hidden"), "label", "ridge")
    np.testing.assert_array_equal(found.coef.values, same.coef.values)
    assert ((decision.sel(layer=1) > 0).values == Y).mean() > 0.8
    several = lz.fit_directions(array, np.array(["a", "b", "c"])[np.arange(N) % 3], "ridge")
    assert several.coef.dims == ("layer", "class", "neurons_unit")
    cosine = lz.cosine_similarity({"neurons": found, "resid": lz.fit_directions(store.dataset().resid_mean, "label", "ridge")})
    vectors = found.coef.values
    expected = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    assert cosine.sel(direction="neurons layer 0", other="neurons layer 1") == pytest.approx(expected)
    assert np.isnan(cosine.sel(direction="neurons layer 0", other="resid layer 0"))
    np.testing.assert_allclose(np.diag(lz.cosine_similarity(several)), 1)


def test_transfer_between_sites_of_one_width(store: Store) -> None:
    array = store.dataset().neurons_mean
    halves = {"first": array.isel(prompt=slice(0, N // 2)), "second": array.isel(prompt=slice(N // 2, N))}
    scores = lz.sweep_transfer(halves, "label", "mass_mean", cv=3)
    same = lz.sweep_transfer({name: half.rename(neurons_unit="hidden") for name, half in halves.items()}, "label", "mass_mean", cv=3)
    np.testing.assert_array_equal(scores.accuracy.values, same.accuracy.values)
    mixed = lz.sweep_transfer({"neurons": array, "resid": store.dataset().resid_mean}, "label", "mass_mean", cv=3)
    assert "the hidden sizes differ" in mixed.accuracy.attrs["nan_reasons"]
    assert np.isfinite(mixed.accuracy.sel(train="neurons", test="neurons")).all()


def test_token_probes_keep_the_dimension_of_the_data(store: Store) -> None:
    array = store.tokens().neurons
    assert array.dims == ("layer", "token", "neurons_unit")
    probes = lz.fit_tokens(array, "label", "lda")
    assert probes.coef.dims == ("layer", "neurons_unit")
    scores = lz.score_tokens(probes, array)
    np.testing.assert_allclose(scores.values, ((array * probes.coef).sum("neurons_unit") + probes.intercept).values, atol=1e-4)
    same = array.load().rename(neurons_unit="hidden")
    np.testing.assert_array_equal(lz.fit_tokens(same, "label", "lda").coef.values, probes.coef.values)
    # Probes of a file that was written when every inner dimension was called hidden.
    np.testing.assert_array_equal(lz.score_tokens(probes.rename(neurons_unit="hidden"), array).values, scores.values)
    swept = lz.sweep_tokens(array, "label", ["ridge"], 3)
    np.testing.assert_array_equal(swept.accuracy.values, lz.sweep_tokens(same, "label", ["ridge"], 3).accuracy.values)
    with pytest.raises(InvalidArgumentError, match="fitted on 12 units along neurons_unit, and these activations have 6"):
        lz.score_tokens(probes, store.tokens().resid)


def test_intervals_comparisons_and_selectivity_of_other_widths(store: Store) -> None:
    array = store.dataset().neurons_mean
    scores = lz.sweep(array, "label", ["ridge"], cv=3, controls=["shuffled_labels"], predictions=True)
    same = lz.sweep(array.rename(neurons_unit="hidden"), "label", ["ridge"], cv=3, controls=["shuffled_labels"], predictions=True)
    for use in (lz.selectivity, lz.confidence_intervals, lz.compare):
        xr.testing.assert_allclose(use(scores).reset_coords(drop=True), use(same).reset_coords(drop=True))
    means = scores.accuracy.sel(layer=1).mean("fold")
    difference = lz.compare(scores, reference="shuffled_labels:ridge").difference.sel(layer=1, probe="ridge").item()
    assert difference == pytest.approx(float(means.sel(probe="ridge") - means.sel(probe="shuffled_labels:ridge")))


def test_a_probe_learns_from_activations_of_any_width(store: Store) -> None:
    array = store.dataset().neurons_mean.sel(layer=1)
    probe = lz.Probe(model="a/model", classifier="ridge").fit_from_activations(array, Y)
    same = lz.Probe(model="a/model", classifier="ridge").fit_from_activations(array.values, Y)
    np.testing.assert_array_equal(probe.predict_from_activations(array), same.predict_from_activations(array.values))
    with pytest.raises(InvalidArgumentError, match="one inner dimension such as hidden"):
        lz.Probe(model="a/model").fit_from_activations(array.expand_dims(head=2), Y)


# -- sites that some layers lack, or that have none ------------------------------------------------------------------------


def test_layers_that_lack_a_site_are_left_out_and_named(store: Store) -> None:
    array = store.dataset().gate_mean
    assert array.sizes["layer"] == 2
    named = r"'gate_mean' is not stored in the layers \[0\], which are left out: select the others by .sel\(layer=\[1\]\)"
    for given in (array, array.load(), array.chunk({"prompt": 9})):
        with pytest.warns(UserWarning, match=named) as caught:
            scores = lz.sweep(given, "label", "ridge", cv=3)
        assert [warning.filename for warning in caught] == [__file__], "it points to the call"
        assert scores.layer.values.tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        alone = lz.sweep(array.sel(layer=[1]), "label", "ridge", cv=3)
        whole = lz.sweep(store.dataset().neurons_mean, "label", "ridge", cv=3)
    xr.testing.assert_equal(scores.accuracy, alone.accuracy)
    assert whole.layer.values.tolist() == [0, 1]
    with pytest.warns(UserWarning, match=named):
        assert lz.plan_sweep(array, "label").layers == (1,)
    with pytest.warns(UserWarning, match=named):
        assert lz.fit_directions(array, "label", "ridge").layer.values.tolist() == [1]
    with pytest.warns(UserWarning, match=named):
        assert lz.Probe(model="m", classifier="ridge").fit_from_activations(array, Y).layers_ == (1,)


def test_an_absent_layer_is_an_error_that_says_which_to_select_where_nothing_says_that_it_is(store: Store) -> None:
    bare = store.dataset().gate_mean.load().drop_attrs()
    with pytest.raises(InvalidArgumentError, match=r"layer 0 .*its site may not be in this layer.*\.sel\(layer=\[1\]\)"):
        lz.sweep(bare, "label", "ridge", cv=3)
    with pytest.raises(InvalidArgumentError, match=r"layer 0 of 'gate_mean' was never extracted for any of these prompts.*"):
        lz.sweep(store.dataset().gate_mean.sel(layer=[0]), "label", "ridge", cv=3)


def test_values_are_never_left_out_for_what_an_attribute_says() -> None:
    coords: dict[str, Any] = {"layer": [0, 1], "prompt": TEXTS, "label": ("prompt", Y)}
    values = np.random.default_rng(0).normal(size=(2, N, WIDTH))
    array = xr.DataArray(values, dims=("layer", "prompt", "gate_unit"), coords=coords, attrs={"stored_layers": [1]}, name="gate_mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert lz.sweep(array, "label", "ridge", cv=3).layer.values.tolist() == [0, 1]


def test_tokens_of_layers_that_lack_a_site_are_left_out_and_named(tmp_path: Path) -> None:
    store = lz.open_store(tmp_path / "acts", durable=False)
    gate = neurons((1,), width=7)
    lz.write_activations(store, model="m", prompts=TEXTS, activations={"resid": neurons((0, 1), width=HIDDEN)}, coords={"label": Y})
    lz.write_activations(store, model="m", prompts=TEXTS, activations={"gate": gate}, hidden_size=HIDDEN)
    array = store.tokens(prompts=TEXTS).gate
    named = r"'gate' is not stored in the layers \[0\], which are left out"
    with pytest.warns(UserWarning, match=named):
        probes = lz.fit_tokens(array, "label", "ridge")
    assert probes.layer.values.tolist() == [1]
    with pytest.warns(UserWarning, match=named):
        scores = lz.score_tokens(probes, array)
    x = np.concatenate(gate[1]).astype(np.float64)
    right = make_pipeline(StandardScaler(), RidgeClassifier()).fit(x, np.repeat(Y, COUNTS)).decision_function(x)
    np.testing.assert_allclose(scores.sel(layer=1).values, right, atol=1e-4)
    with pytest.warns(UserWarning, match=named):
        assert lz.sweep_tokens(array, "label", "ridge", 3).layer.values.tolist() == [1]


def test_a_site_without_layers_is_one_layer(store: Store) -> None:
    array = store.dataset().last_mean
    assert array.dims == ("prompt", "last_unit")
    scores = lz.sweep(array, "label", "ridge", cv=3)
    assert scores.layer.values.tolist() == [0]
    same = lz.sweep(array.load().rename(last_unit="hidden").expand_dims(layer=[0]), "label", "ridge", cv=3)
    np.testing.assert_array_equal(scores.accuracy.values, same.accuracy.values)
    assert lz.fit_directions(array, "label", "ridge").coef.dims == ("layer", "last_unit")


# -- heads -----------------------------------------------------------------------------------------------------------------


def test_one_head_is_swept_and_all_of_them(store: Store) -> None:
    heads = store.dataset().heads_mean.lz.heads(HEADS)
    assert heads.dims == ("layer", "prompt", "head", "head_dim")
    with pytest.raises(InvalidArgumentError, match=r"'heads_mean' has dims .*expected layer \(or none\), prompt and one inner dimension"):
        lz.sweep(heads, "label")
    one = lz.sweep(heads.sel(head=2), "label", "ridge", cv=3)
    cut = store.dataset().heads_mean.values[..., 8:12]
    np.testing.assert_array_equal(one.accuracy.values, lz.sweep(heads.sel(head=2).copy(data=cut), "label", "ridge", cv=3).accuracy.values)
    assert lz.fit_directions(heads.sel(head=2), "label", "ridge").coef.dims == ("layer", "head_dim")
    every = xr.concat([lz.sweep(heads.sel(head=h), "label", "ridge", cv=3) for h in range(HEADS)], "head")
    xr.testing.assert_equal(every.accuracy.isel(head=2, drop=True), one.accuracy)


@pytest.mark.parametrize(
    ("dims", "problem"),
    [(("layer", "prompt", "head"), "expected layer"), (("layer", "prompt", "a", "b"), "expected layer"), (("layer", "prompt"), "expected")],
)
def test_none_or_several_inner_dimensions_are_an_error(dims: tuple[str, ...], problem: str) -> None:
    array = xr.DataArray(np.ones([2, N, 3, 3][: len(dims)]), dims=dims, coords={"label": ("prompt", Y)}, name="x")
    for use in (lz.sweep, lz.fit_directions):
        with pytest.raises(InvalidArgumentError, match=problem):
            use(array, "label")
