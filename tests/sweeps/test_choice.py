"""Choosing a layer, a probe, a variable or a strength: within training folds, or on the scores that are shown.

LMPROBE_ZARR_STRESS=1 runs the long form of the simulation of docs/design/statistics.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from clusters import local_client
from sklearn.exceptions import FitFailedWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.folds import inner_folds

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
HERE: dict[str, Any] = {"scheduler": "synchronous"}


def array_of(x: Any, y: Any, **columns: Any) -> xr.DataArray:
    """Activations with the layers 10, 11, …, so that no place is taken for a layer."""
    coords = {"layer": 10 + np.arange(len(x)), "prompt": [f"p{i}" for i in range(x.shape[1])], "label": ("prompt", y)}
    columns = {name: ("prompt", values) for name, values in columns.items()}
    return xr.DataArray(x.astype("float32"), dims=("layer", "prompt", "hidden"), coords={**coords, **columns})


def noise(seed: int, layers: int, n: int, hidden: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(layers, n, hidden)), rng.permutation(np.arange(n) % 2)


def plain(name: str, strength: float = 1.0) -> Any:
    """The probe of that name in plain scikit-learn."""
    kinds = {"ridge": RidgeClassifier(alpha=strength), "logistic_regression": LogisticRegression(C=1 / strength, max_iter=1000)}
    return make_pipeline(StandardScaler(), kinds[name])


def nested(x: Any, y: Any, folds: Any, inner: Any, probes: Any, strengths: Any = (1.0,)) -> list[Any]:
    """Nested cross-validation by hand: for each fold the candidate (layer, probe, strength), its inner and its outer accuracy."""
    found = []
    for train, test in folds:
        means = {}
        within = list(inner(train))
        for layer in range(len(x)):
            for probe in probes:
                for strength in sorted(strengths, reverse=True):  # of equally good ones the strongest
                    scores = []
                    for learn, look in within:
                        fitted = plain(probe, strength).fit(x[layer][train[learn]], y[train[learn]])
                        scores.append(accuracy_score(y[train[look]], fitted.predict(x[layer][train[look]])))
                    means[layer, probe, strength] = np.mean(scores)
        best = max(means, key=lambda candidate: means[candidate])
        fitted = plain(best[1], best[2]).fit(x[best[0]][train], y[train])
        found.append((*best, means[best], accuracy_score(y[test], fitted.predict(x[best[0]][test]))))
    return found


# -- the oracle ------------------------------------------------------------------------------------------------------------


def test_a_chosen_layer_is_that_of_nested_cross_validation_by_hand() -> None:
    x, y = noise(0, 5, 60)
    x[3, :, 0] += 0.7 * y
    x = x.astype("f4").astype(float)
    outer = StratifiedKFold(5, shuffle=True, random_state=0).split(y, y)
    expected = nested(x, y, outer, lambda t: StratifiedKFold(5, shuffle=True, random_state=0).split(t, y[t]), ["ridge"])
    found = lz.sweep(array_of(x, y), "label", "ridge", choose="layer", **HERE).isel(probe=0)
    assert found.accuracy.dims == ("fold",)
    assert found.chosen_layer.values.tolist() == [10 + layer for layer, *_ in expected]
    np.testing.assert_allclose(found.inner_score, [each[3] for each in expected], rtol=1e-12)
    assert found.accuracy.values.tolist() == [each[4] for each in expected]


def test_layer_probe_and_strength_are_chosen_together_within_groups() -> None:
    x, y = noise(1, 3, 60)
    groups = np.repeat(np.arange(20), 3)[np.random.default_rng(5).permutation(60)]
    x = (x + 0.6 * np.random.default_rng(2).normal(size=(3, 20, 5))[:, groups]).astype("f4").astype(float)
    outer = list(StratifiedGroupKFold(4, shuffle=True, random_state=7).split(x[0], y, groups))
    expected = nested(
        x, y, outer, lambda t: StratifiedGroupKFold(3, shuffle=True, random_state=7).split(t, y[t], groups[t]),
        ["ridge", "logistic_regression"], (0.1, 100.0),
    )  # fmt: skip
    found = lz.sweep(
        array_of(x, y, topic=groups), "label", ["ridge", "logistic_regression"], 4, groups="topic", strengths=(0.1, 100),
        choose=["strength", "layer", "probe"], inner_cv=3, random_state=7, **HERE,
    )  # fmt: skip
    assert found.accuracy.dims == ("probe", "fold")
    assert found.probe.values.tolist() == ["chosen"]
    at = found.isel(probe=0)
    picked = list(zip(at.chosen_layer.values - 10, at.chosen_probe.values, at.chosen_strength.values, strict=True))
    assert picked == [each[:3] for each in expected]
    assert at.accuracy.values.tolist() == [each[4] for each in expected]


def test_a_choice_for_a_regression_by_the_smallest_error() -> None:
    x, _ = noise(2, 5, 50)
    x = x.astype("f4").astype(float)
    target = x[2, :, 0] + 0.5 * x[4, :, 1] + np.random.default_rng(3).normal(size=50)
    found = lz.sweep(array_of(x, target), "label", task="regression", choose="layer", choose_by="mae", inner_cv=4, **HERE).isel(probe=0)
    for fold, (train, test) in enumerate(KFold(5, shuffle=True, random_state=0).split(x[0])):
        errors = np.zeros((5, 4))
        for layer in range(5):
            for inner, (learn, look) in enumerate(KFold(4, shuffle=True, random_state=0).split(train)):
                fitted = make_pipeline(StandardScaler(), Ridge()).fit(x[layer][train[learn]], target[train[learn]])
                errors[layer, inner] = np.abs(fitted.predict(x[layer][train[look]]) - target[train[look]]).mean()
        best = int(errors.mean(axis=1).argmin())
        fitted = make_pipeline(StandardScaler(), Ridge()).fit(x[best][train], target[train])
        assert found.chosen_layer[fold] == 10 + best
        np.testing.assert_allclose(found.r2[fold], r2_score(target[test], fitted.predict(x[best][test])), rtol=1e-9)
        np.testing.assert_allclose(found.inner_score[fold], errors.mean(axis=1).min(), rtol=1e-9)


OWN = {"own": GridSearchCV(RidgeClassifier(), {"alpha": [1, 100]}, cv=2)}


@pytest.mark.few(1)
@pytest.mark.parametrize("probe", ["sgd", "mass_mean", OWN], ids=["sgd", "mass_mean", "own"])
def test_what_is_chosen_is_what_a_sweep_of_the_training_prompts_alone_scores_best(probe: Any) -> None:
    """Whatever the probe: also one that draws at random, and one that cross-validates itself; prompts repeat."""
    x, y = noise(3, 2, 36)
    rows = np.r_[np.arange(36), 3, 3, 8, 20]
    array = array_of(x, y).isel(prompt=rows)
    options: dict[str, Any] = {"probes": probe, "metrics": "auroc", **HERE}
    found = lz.sweep(array, "label", cv=3, choose="layer", inner_cv=3, **options).isel(probe=0)
    every = lz.sweep(array, "label", cv=3, **options).auroc.isel(probe=0)
    codes = np.unique(array.prompt.values.astype(str), return_inverse=True)[1]
    for fold, (train, _) in enumerate(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(rows, array.label, codes)):
        alone = lz.sweep(array.isel(prompt=train), "label", cv=3, **options).auroc.isel(probe=0).mean("fold")
        best = int(np.argmax(alone.values))
        assert found.chosen_layer[fold] == array.layer[best]
        np.testing.assert_allclose(found.inner_score[fold], alone[best], rtol=1e-12)
        assert found.auroc[fold] == every.isel(layer=best, fold=fold)


# -- what the choice is worth ----------------------------------------------------------------------------------------------


def test_the_best_of_layers_of_noise_is_at_chance_when_it_is_chosen_within_training_folds() -> None:
    layers, seeds = (60, 40) if STRESS else (20, 4)
    shown, chosen, controls = [], [], []
    for seed in range(seeds):
        x, y = noise(100 + seed, layers, 60, 6)
        every = lz.sweep(array_of(x, y), "label", "ridge", metrics="accuracy", **HERE)
        shown.append(float(every.lz.best().accuracy[0]))
        control = "shuffled_labels" if STRESS else None
        found = lz.sweep(array_of(x, y), "label", "ridge", metrics="accuracy", choose="layer", controls=control, **HERE)
        chosen.append(float(found.accuracy.isel(probe=0).mean()))
        controls.append(float(found.accuracy.isel(probe=-1).mean()))
    if STRESS:
        print(f"shown {np.mean(shown):.3f}, chosen {np.mean(chosen):.3f}, control {np.mean(controls):.3f}")  # noqa: T201 (for the page)
    # The standard deviation of an accuracy of 60 prompts by chance, and somewhat more, since folds depend on one another.
    error = 0.08 / np.sqrt(seeds)
    assert np.mean(shown) > 0.6
    assert abs(np.mean(chosen) - 0.5) < 3 * error
    assert abs(np.mean(controls) - 0.5) < 3 * error


def test_a_layer_with_a_signal_is_found_among_noise() -> None:
    x, y = noise(4, 12, 100)
    x[7, :, 1] += 2.5 * y
    found = lz.sweep(array_of(x, y), "label", "ridge", choose="layer", **HERE)
    assert (found.chosen_layer == 17).all()
    assert found.accuracy.mean() > 0.8


# -- shapes ----------------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_layer_that_was_chosen_without_the_prompt() -> None:
    x, y = noise(5, 3, 48)
    options: dict[str, Any] = {"probes": "mass_mean", "cv": 3, "predictions": True, "repeats": 2, "seeds": 2, **HERE}
    options |= {"controls": ["shuffled_labels", "majority", "layer_0"]}
    array = array_of(x, y).assign_coords(layer=np.arange(3))
    every, found = lz.sweep(array, "label", **options), lz.sweep(array, "label", choose="layer", **options)
    assert found.predicted.dims == tuple(dim for dim in every.predicted.dims if dim != "layer")
    assert found.accuracy.dims == ("probe", "fold", "seed")
    for probe in found.probe.values:
        tests = "dealt_fold" if str(probe).startswith("shuffled") else "test_fold"
        for seed in (0, 1):
            for repetition in (0, 1):
                for prompt in range(0, 48, 7):
                    at: dict[str, Any] = {"repetition": repetition, "prompt": prompt}
                    fold = (found[tests].isel(seed=seed) if tests == "dealt_fold" else found[tests]).isel(at).item()
                    layer = found.chosen_layer.isel(seed=seed, fold=fold).sel(probe=probe).item()
                    layer = 0 if np.isnan(layer) else layer
                    for name in ("predicted", "score"):
                        expected = every[name].sel(probe=probe, layer=layer).isel({"seed": seed, **at})
                        np.testing.assert_array_equal(found[name].sel(probe=probe).isel({"seed": seed, **at}), expected)
    assert found.chosen_layer.sel(probe=["majority", "layer_0"]).isnull().all()
    assert np.isfinite(lz.confidence_intervals(found, n_resamples=20).accuracy).all()
    assert lz.compare(found, "accuracy").p_value.shape == (4, 2)


def test_probes_are_chosen_among_probes_and_their_controls_among_controls() -> None:
    x, y = noise(6, 3, 40)
    scores = lz.sweep(
        array_of(x, y, text=[f"word {i}" for i in range(40)]), "label", ["mass_mean", "ridge"], choose="probe",
        controls=["shuffled_labels", "bag_of_words", "majority"], **HERE,
    )  # fmt: skip
    assert scores.probe.values.tolist() == ["chosen", "shuffled_labels:chosen", "bag_of_words", "majority"]
    assert scores.kind.values.tolist() == ["probe", "control", "control", "control"]
    assert set(scores.chosen_probe.sel(probe="chosen").values.ravel()) <= {"mass_mean", "ridge"}
    control = scores.chosen_probe.sel(probe="shuffled_labels:chosen")
    assert set(control.values.ravel()) <= {"shuffled_labels:mass_mean", "shuffled_labels:ridge"}
    every = lz.sweep(array_of(x, y), "label", ["mass_mean", "ridge"], **HERE)
    for layer in (10, 11, 12):
        for fold in range(5):
            name = scores.chosen_probe.sel(probe="chosen", layer=layer, fold=fold).item()
            assert scores.auroc.sel(probe="chosen", layer=layer, fold=fold) == every.auroc.sel(probe=name, layer=layer, fold=fold)
    assert lz.selectivity(scores).dims == ("layer", "probe", "fold")
    assert np.isfinite(lz.selectivity(scores)).all()


def test_variables_with_other_layers_are_chosen_from_what_they_hold() -> None:
    x, y = noise(7, 3, 60)
    x[1, :, 0] += 2 * y
    resid = array_of(np.random.default_rng(0).normal(size=x.shape), y)
    ds = xr.Dataset({"resid_mean": resid, "mlp_mean": array_of(x, y).isel(layer=[1]), "embed_mean": resid.isel(layer=0, drop=True) + 1})
    both = lz.sweep(ds, "label", "ridge", choose=["variable", "layer"], **HERE)
    assert both.accuracy.dims == ("probe", "fold")
    assert (both.chosen_variable == "mlp_mean").all()
    assert (both.chosen_layer == 11).all()
    layers = lz.sweep(ds, "label", "ridge", choose="layer", **HERE)
    assert layers.accuracy.dims == ("variable", "probe", "fold")
    assert (layers.chosen_layer.sel(variable="mlp_mean") == 11).all()
    assert layers.chosen_layer.sel(variable="embed_mean").isnull().all()  # it has no layers
    variables = lz.sweep(ds, "label", "ridge", choose="variable", **HERE)
    assert variables.accuracy.dims == ("layer", "probe", "fold")
    assert (variables.chosen_variable.sel(layer=11) == "mlp_mean").all()
    assert not (variables.chosen_variable.sel(layer=[10, 12]) == "mlp_mean").any()
    alone = lz.sweep(ds[["embed_mean"]], "label", "ridge", choose=["variable", "layer"], **HERE)
    assert (alone.chosen_variable == "embed_mean").all()
    assert alone.chosen_layer.isnull().all()


def test_a_dim_with_a_single_entry_is_chosen_too() -> None:
    x, y = noise(8, 1, 30)
    every = lz.sweep(array_of(x, y), "label", "ridge", strengths=[2.0], **HERE)
    found = lz.sweep(array_of(x, y), "label", "ridge", strengths=[2.0], choose=["layer", "probe", "strength"], **HERE)
    assert (found.chosen_layer == 10).all()
    assert (found.chosen_strength == 2).all()
    np.testing.assert_array_equal(found.accuracy.values.ravel(), every.accuracy.values.ravel())
    assert (lz.sweep(array_of(x, y).isel(layer=0), "label", "ridge", choose="layer", **HERE).chosen_layer == 10).all()


def test_several_labels_strengths_that_are_not_chosen_and_a_split() -> None:
    x, y = noise(9, 3, 40)
    other = np.roll(y, 1)
    array = array_of(x, y, other=other, side=np.where(np.arange(40) < 28, "train", "test"))
    found = lz.sweep(array, ["label", "other"], "ridge", split="side", strengths=(1, 1000), choose="layer", inner_cv=3, **HERE)
    assert found.accuracy.dims == ("probe", "fold", "strength", "label")
    train = np.arange(28)
    for name, values in (("label", y), ("other", other)):
        for strength in (1, 1000):
            means = []
            for layer in range(3):
                rows = x[layer].astype("f4").astype(float)
                scores = [
                    plain("ridge", strength).fit(rows[learn], values[learn]).score(rows[look], values[look])
                    for learn, look in StratifiedKFold(3, shuffle=True, random_state=0).split(train, values[train])
                ]
                means.append(np.mean(scores))
            at = found.sel(label=name, strength=strength).isel(probe=0, fold=0)
            assert at.chosen_layer == 10 + int(np.argmax(means))
            rows = x[int(np.argmax(means))].astype("f4").astype(float)
            fitted = plain("ridge", strength).fit(rows[:28], values[:28])
            assert at.auroc.item() == pytest.approx(roc_auc_score(values[28:], fitted.decision_function(rows[28:])), abs=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("way", ["threads", "dask array", "store", "out", "client"])
def test_choices_are_the_same_wherever_they_are_made(way: str, tmp_path: Path) -> None:
    x, y = noise(10, 4, 40)
    array = array_of(x, y)
    options: dict[str, Any] = {"labels": "label", "probes": ["ridge", "mass_mean"], "choose": ["layer", "probe"]}
    options |= {"controls": "shuffled_labels", "predictions": True, "cv": 3, "inner_cv": 3}
    expected = lz.sweep(array, **options, **HERE)
    if way == "threads":
        found = lz.sweep(array, **options, n_workers=2)
    elif way == "dask array":
        found = lz.sweep(array.chunk(layer=1, prompt=7), **options)
    elif way == "client":
        with local_client(workers=1, threads=2) as client:
            found = lz.sweep(array.chunk(layer=1), **options, client=client)
    elif way == "store":
        store = lz.open_store(tmp_path / "acts")
        pooled = {"resid_mean": {layer: array.sel(layer=layer).values for layer in array.layer.values.tolist()}}
        lz.write_activations(store, model="m", prompts=array.prompt.values.tolist(), pooled=pooled, coords={"label": y})
        data = store.dataset("m", prompts=array.prompt.values.tolist())
        found = lz.sweep(data.resid_mean, **options)
        # Labels are dealt by the prompts' names, which are hashes in a store.
        found, expected = found.isel(probe=[0]), expected.isel(probe=[0])
    else:
        lz.sweep(array, **options, out=tmp_path / "scores")
        stored = xr.open_zarr(tmp_path / "scores")
        assert stored.accuracy.dims == ("layer", "probe", "fold")
        assert "chosen" not in stored.attrs
        assert json.loads(stored.attrs["choose"]) == ["layer", "probe"]
        (tmp_path / "scores" / "done" / "c.2").unlink()
        found = lz.sweep(array, **options, out=tmp_path / "scores")
        with pytest.raises(InvalidArgumentError, match="what is chosen"):
            lz.sweep(array, **{**options, "choose": "layer"}, out=tmp_path / "scores")
    for name in ("accuracy", "auroc", "inner_score", "chosen_layer", "chosen_probe", "predicted", "score"):
        assert found[name].dims == expected[name].dims
        np.testing.assert_array_equal(found[name].values, expected[name].values)


@pytest.mark.few(1)
@pytest.mark.parametrize("choose", ["probe", "layer"])
def test_a_place_keeps_all_that_could_be_chosen_and_says_nothing_is(choose: str, tmp_path: Path) -> None:
    x, y = noise(21, 2, 30)
    options: dict[str, Any] = {"labels": "label", "probes": ["ridge", "mass_mean"], "cv": 3}
    lz.sweep(array_of(x, y), **options, choose=choose, out=tmp_path / "scores")
    stored, every = xr.open_zarr(tmp_path / "scores"), lz.sweep(array_of(x, y), **options)
    np.testing.assert_array_equal(stored.accuracy, every.accuracy)
    assert stored.probe.values.tolist() == ["ridge", "mass_mean"]
    assert "chosen" not in stored.attrs
    assert "chosen by the score that is shown" in repr(stored.lz)


def test_a_choice_is_written_and_read_by_xarray(tmp_path: Path) -> None:
    x, y = noise(11, 3, 30)
    options: dict[str, Any] = {"choose": ["layer", "probe"], "cv": 3, "controls": "majority", "predictions": True}
    found = lz.sweep(array_of(x, y), "label", ["ridge", "mass_mean"], **options, **HERE)
    found.to_netcdf(tmp_path / "scores.nc")
    with xr.open_dataset(tmp_path / "scores.nc") as again:
        np.testing.assert_array_equal(again.chosen_layer, found.chosen_layer)
        assert repr(again.lz) == repr(found.lz)
        for text in (again.lz.table("accuracy", format="markdown"), again.accuracy.lz.table(format="markdown")):
            assert "over 3 folds. Chosen: layer and probe, in each fold by accuracy" in text


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"choose": "fold"}, InvalidArgumentError, "choose='fold' cannot be chosen within training folds: use some of 'layer', 'probe'"),
        ({"choose": "layers"}, InvalidArgumentError, "use some of 'layer', 'probe'"),
        ({"choose": "variable"}, InvalidArgumentError, "where a dataset of several is given"),
        ({"choose": "strength"}, InvalidArgumentError, "where strengths are given"),
        ({"choose": "C", "strengths": (1, 2)}, InvalidArgumentError, "use some of 'layer', 'probe', 'strength'"),
        ({"choose": ["layer", "layer"]}, InvalidArgumentError, "names a dimension twice"),
        ({"choose": []}, InvalidArgumentError, "names nothing"),
        ({"choose": 3}, InvalidTypeError, "names no dimension: give 'layer'"),
        ({"choose": {"layer": 1}}, InvalidTypeError, "names no dimension"),
        ({"choose": "layer", "inner_cv": 1}, InvalidArgumentError, "inner_cv=1"),
        ({"choose": "layer", "choose_by": "log_loss"}, InvalidArgumentError, "metric 'log_loss' needs probabilities"),
        ({"choose": "layer", "choose_by": "r2"}, InvalidArgumentError, "r2"),
        ({"choose": "layer", "controls": {"shuffled_labels": 9}}, InvalidArgumentError, "with seeds=100 shuffles once per seed"),
        ({"choose": "probe", "controls": {"chosen": np.arange(24)}}, InvalidArgumentError, "control is called 'chosen'"),
        ({"choose_by": "auroc"}, InvalidArgumentError, "choose='layer'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_what_can(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x, y = noise(12, 2, 24)
    with pytest.raises(error, match=message):
        lz.plan_sweep(array_of(x, y), "label", "ridge", **options)


def test_a_training_fold_in_which_nothing_can_be_chosen_is_an_error_before_anything_is_fitted() -> None:
    x, _ = noise(13, 2, 12)
    y = np.r_[np.zeros(10, int), 1, 1]
    with pytest.raises(LabelError, match="a single prompt \\(or group\\) of a class"):
        lz.plan_sweep(array_of(x, y), "label", "ridge", cv=2, choose="layer")


def test_inner_folds_count_the_groups_that_have_a_class_and_not_their_first_rows() -> None:
    # Pairs of opposites, of which all but the last begin with class 0.
    codes, kept = np.r_[np.tile([0, 1], 9), 1, 0], np.repeat(np.arange(10), 2)
    assert len(inner_folds(codes, kept, 5, 0)) == 5
    with pytest.raises(LabelError):
        inner_folds(np.r_[0, 0, 0, 1, 1], np.r_[0, 1, 2, 3, 3], 2, 0)


class Picky(LogisticRegression):  # type: ignore[misc]
    """Fails on few rows, as inner folds have, where the first unit is large."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
        if X[:, 0].mean() > 50 and len(X) < 20:
            raise ValueError("too few rows")
        return super().fit(X, y, sample_weight)


def test_what_fails_in_inner_folds_is_not_chosen_and_a_warning_says_so() -> None:
    x, y = noise(14, 3, 30)
    x[1, :, 0] += 100
    x[1, :, 1] += 50 * y
    with pytest.warns(FitFailedWarning, match="5 of 15 fits of what could be chosen failed .*too few rows"):
        found = lz.sweep(array_of(x, y), "label", {"picky": Picky()}, choose="layer", **HERE)
    assert not (found.chosen_layer == 11).any()
    assert np.isfinite(found.accuracy).all()
    everywhere = x + np.array([100, 0, 0, 0, 0])
    with pytest.raises(InvalidArgumentError, match="too few rows"):
        lz.sweep(array_of(everywhere, y), "label", {"picky": Picky()}, choose="layer", **HERE)


def test_an_inner_fold_in_which_the_measure_is_undefined_does_not_prevent_a_choice() -> None:
    x, _ = noise(15, 3, 40)
    target = np.where(np.arange(40) < 24, 3 * x[2, :, 0], 0.0)
    outer = next(iter(KFold(4, shuffle=True, random_state=0).split(target)))[0]
    within = KFold(12, shuffle=True, random_state=0).split(outer)
    assert any(len(np.unique(target[outer[look]])) == 1 for _, look in within)  # R² has no value there
    found = lz.sweep(array_of(x, target), "label", "ridge_regression", 4, task="regression", choose="layer", inner_cv=12, **HERE)
    assert (found.chosen_layer == 12).all()


def test_a_plan_counts_the_fits_of_inner_folds() -> None:
    x, y = noise(16, 4, 40)
    options: dict[str, Any] = {"strengths": (1, 2, 3), "choose": ["layer", "strength"], "inner_cv": 4, "controls": "majority"}
    plan = lz.plan_sweep(array_of(x, y), "label", ["ridge", "lda"], **options)
    # Of ridge three strengths in four inner folds and the chosen one; of lda four inner folds and the fit; the majority once.
    assert plan.n_fits == 4 * 5 * (3 * 4 + 1) + 4 * 5 * (4 + 1) + 5
    assert plan.dims == ("probe", "fold")
    assert "chosen     layer and strength, in each fold by accuracy over 4 inner folds of its training prompts" in str(plan)


# -- the best of what is shown ---------------------------------------------------------------------------------------------


def test_the_best_of_many_says_that_it_was_chosen_by_what_it_shows() -> None:
    x, y = noise(17, 8, 40)
    scores = lz.sweep(array_of(x, y), "label", ["ridge", "mass_mean"], controls="majority", **HERE)
    best = scores.lz.best()
    means = scores.accuracy.mean("fold")
    np.testing.assert_array_equal(best.accuracy, means.max("layer"))
    np.testing.assert_array_equal(best.best_layer, means.layer.values[means.transpose("probe", "layer").values.argmax(axis=1)])
    for shown in (repr(best), repr(best.accuracy), repr(best.sel(probe="ridge")), repr(best.accuracy[0] - 0.5)):
        assert "the best of 8, by these scores themselves" in shown
    assert "choose='layer'" in best.attrs["chosen"]
    assert "choose='layer'" in best.accuracy.attrs["chosen"]
    assert "the best of 8 layers was chosen by the score that is shown, which is therefore too high" in repr(scores.lz)
    assert "the best of 8 layers was chosen by the score that is shown" in scores.lz._repr_html_()
    both = scores.lz.best("auroc", ["layer", "probe"])
    probes = scores.auroc.sel(probe=["ridge", "mass_mean"]).mean("fold")
    assert both.auroc == probes.max()
    assert probes.sel(layer=both.best_layer.item(), probe=both.best_probe.item()) == probes.max()
    single = lz.sweep(array_of(x[:1], y), "label", "ridge", **HERE)
    assert "too high" not in repr(single.lz)


def test_the_best_of_a_transfer_and_of_what_holds_no_scores() -> None:
    x, y = noise(22, 4, 40)
    halves = {"a": array_of(x, y).isel(prompt=slice(0, 20)), "b": array_of(x, y).isel(prompt=slice(20, 40))}
    scores = lz.sweep_transfer(halves, "label", "ridge", 2)
    best = scores.lz.best("auroc")
    np.testing.assert_array_equal(best.auroc.transpose(..., "train", "test"), scores.auroc.max("layer").transpose(..., "train", "test"))
    assert "the best of 4, by these scores themselves" in repr(best)
    with pytest.raises(InvalidArgumentError, match="holds no scores by probe"):
        array_of(x, y).to_dataset(name="resid").lz.best()


def test_the_best_of_losses_is_the_least() -> None:
    x, y = noise(18, 4, 40)
    scores = lz.sweep(array_of(x, y), "label", "logistic_regression", metrics="log_loss", **HERE)
    assert scores.lz.best().log_loss[0] == scores.log_loss.mean("fold").min()


def test_chosen_scores_show_what_was_chosen_and_have_no_best() -> None:
    x, y = noise(19, 5, 40)
    x[2, :, 0] += 4 * y
    scores = lz.sweep(array_of(x, y), "label", "ridge", choose="layer", **HERE)
    text = repr(scores.lz)
    assert "with layer 12 (in 5 of 5)" in text
    assert "chosen: layer, in each fold by accuracy over 5 inner folds" in text
    assert "layer 12 (in 5 of 5)" in scores.lz._repr_html_()
    assert "in each fold by accuracy over 5 inner folds of its training prompts" in scores.attrs["chosen"]
    with pytest.raises(InvalidArgumentError, match=r"was chosen within each training fold: scores\.accuracy\.mean"):
        scores.lz.best()
    with pytest.raises(InvalidArgumentError, match="no score 'f1' to choose by: use one of 'accuracy', 'auroc'"):
        scores.lz.best("f1")
    with pytest.raises(InvalidArgumentError, match="was chosen within"):
        scores.lz.plot()


def test_sweeps_that_choose_nothing_say_what_to_use_instead() -> None:
    x, y = noise(20, 2, 20)
    array = array_of(x, y)
    with pytest.raises(InvalidArgumentError, match=r"choose='layer': only lz.sweep chooses within training folds; choose by lz.sweep"):
        lz.sweep_transfer({"a": array, "b": array}, "label", choose="layer")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"only lz.sweep chooses within training folds; sweep pooled tokens, as toks.lz.pool"):
        lz.sweep_tokens(array, "label", choose="layer")  # type: ignore[arg-type]
