"""Labels that are shuffled many times: their mean, their spread, and p-values that hold where labels mean nothing.

The long forms of the simulations run with LMPROBE_ZARR_STRESS=1; docs/design/statistics.md has their figures.
"""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LinearRegression, RidgeClassifier
from sklearn.model_selection import StratifiedKFold, permutation_test_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))


def array_of(x: Any, y: Any, prompts: Any = None, **columns: Any) -> xr.DataArray:
    """Activations, shape (layer, prompt, hidden) or (prompt, hidden)."""
    x = np.asarray(x, "f4")
    x = x[None] if x.ndim == 2 else x
    names = [f"p{i}" for i in range(x.shape[1])] if prompts is None else prompts
    coords = {"layer": range(len(x)), "prompt": names, "label": ("prompt", y), **{name: ("prompt", held) for name, held in columns.items()}}
    return xr.DataArray(x, dims=("layer", "prompt", "hidden"), coords=coords)


def noise(seed: int, n: int, layers: int = 1, signal: float = 0.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    x = rng.normal(size=(layers, n, 4))
    x[0, :, 0] += signal * y
    return x, y


def shuffled(array: xr.DataArray, number: int = 19, probes: Any = "mass_mean", **options: Any) -> xr.Dataset:
    options = {"metrics": "accuracy", "scheduler": "synchronous"} | options
    return lz.sweep(array, options.pop("labels", "label"), probes, controls={"shuffled_labels": number}, **options)


# -- p-values --------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("signal", [0.0, 1.5])
def test_a_p_value_is_that_of_all_permutations_within_the_error_of_the_shuffles(signal: float) -> None:
    x, y = noise(4, 8, signal=signal)
    folds = [(np.flatnonzero(np.arange(8) % 4 != k), np.flatnonzero(np.arange(8) % 4 == k)) for k in range(4)]

    def score(labels: Any) -> float:
        found = []
        for train, test in folds:
            if len(set(labels[train])) < 2:
                return np.nan
            probe = make_pipeline(StandardScaler(), RidgeClassifier()).fit(x[0][train].astype("f4"), labels[train])
            found.append(probe.score(x[0][test].astype("f4"), labels[test]))
        return float(np.mean(found))

    every = np.array([score(np.isin(np.arange(8), chosen).astype(int)) for chosen in combinations(range(8), 4)])
    exact = float((every >= score(y) - 1e-9).mean())
    p = shuffled(array_of(x, y), 80, "ridge", cv=folds).accuracy_p_value.sel(probe="ridge").item()
    assert p == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 80) + 1 / 80)


def test_a_p_value_agrees_with_scikit_learns_permutation_test_on_equal_folds() -> None:
    for seed, signal in ((0, 0.0), (2, 1.0)):
        x, y = noise(seed, 40, signal=signal)
        found = shuffled(array_of(x, y), 60, "ridge", cv=StratifiedKFold(4, shuffle=True, random_state=0))
        ridge = make_pipeline(StandardScaler(), RidgeClassifier())
        folds = StratifiedKFold(4, shuffle=True, random_state=0)
        real, theirs, p = permutation_test_score(ridge, x[0].astype("f4"), y, cv=folds, n_permutations=60, random_state=0)
        assert found.accuracy.sel(probe="ridge").mean().item() == pytest.approx(real)
        of = found.sel(probe="ridge", layer=0)
        assert of.accuracy_shuffled_mean.item() == pytest.approx(theirs.mean(), abs=4 * theirs.std() * np.sqrt(2 / 60))
        assert of.accuracy_shuffled_std.item() == pytest.approx(theirs.std(), rel=0.4)
        assert of.accuracy_p_value.item() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 30) + 1 / 61)


def test_p_is_one_and_the_number_of_shuffles_that_are_as_good_by_one_and_all() -> None:
    x, y = noise(0, 30, layers=3, signal=5.0)
    found = shuffled(array_of(x, y), 9, ["mass_mean", "ridge"], metrics=["accuracy", "auroc"])
    for metric in ("accuracy", "auroc"):
        for probe in ("mass_mean", "ridge"):
            of = found.sel(probe=probe)
            real, null = of[metric].mean("fold").values, of[f"{metric}_shuffled"].values
            assert null.shape == (3, 9)
            np.testing.assert_allclose(of[f"{metric}_shuffled_mean"], null.mean(1))
            np.testing.assert_allclose(of[f"{metric}_shuffled_std"], null.std(1))
            np.testing.assert_allclose(of[f"{metric}_p_value"], (1 + (null >= real[:, None] - 1e-12).sum(1)) / 10)
            np.testing.assert_allclose(of[f"{metric}_p_any_layer"], (1 + (null.max(0) >= real[:, None] - 1e-12).sum(1)) / 10)
            assert of[f"{metric}_p_value"][0] == 0.1, "never 0: the floor of nine shuffles"
            control = found[metric].sel(probe=f"shuffled_labels:{probe}").mean("fold")
            np.testing.assert_allclose(control, null.mean(1))
    assert found.accuracy_p_value.sel(probe=found.kind == "control").isnull().all()


def test_smaller_errors_are_better_and_regressions_have_p_values_too() -> None:
    x, y = noise(1, 40, signal=4.0)
    target = y + 0.1 * x[0, :, 1]
    found = shuffled(array_of(x, target), 9, "ridge_regression", metrics=["r2", "mae"], task="regression").sel(probe="ridge_regression")
    assert found.r2_p_value.item() == found.mae_p_value.item() == 0.1
    assert (found.mae_shuffled > found.mae.mean()).all()
    worse = shuffled(array_of(x[:, :, 1:], y * 1.0), 39, "ridge_regression", metrics=["r2", "mae"], task="regression")
    assert (worse[["r2_p_value", "mae_p_value"]].sel(probe="ridge_regression").to_array() > 0.05).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["prompts", "groups", "pairs", "copies"])
def test_p_values_of_labels_without_meaning_are_uniform_or_conservative(kind: str) -> None:
    times, number = (1000, 19) if STRESS else (12, 9)
    found = []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        y = rng.permutation(np.arange(20) % 2)
        x = rng.normal(size=(20, 4))
        if kind == "prompts":
            found.append(shuffled(array_of(x, y), number, cv=4))
        elif kind == "groups":  # of one label each, alike within
            topic = np.repeat(np.arange(20), 3)
            array = array_of(x[topic] + 0.3 * rng.normal(size=(60, 4)), y[topic], topic=topic)
            found.append(shuffled(array, number, cv=4, groups="topic"))
        elif kind == "pairs":  # of opposites
            pair = np.repeat(np.arange(10), 2)
            side = np.repeat(rng.integers(0, 2, 10), 2)
            array = array_of(x[pair] + 0.3 * rng.normal(size=(20, 4)), (np.arange(20) + side) % 2, pair=pair)
            found.append(shuffled(array, number, cv=4, groups="pair"))
        else:  # each prompt in three rows
            names = np.repeat([f"p{i}" for i in range(20)], 3)
            found.append(shuffled(array_of(np.repeat(x, 3, 0), np.repeat(y, 3), names), number, cv=4))
    p = np.array([each.accuracy_p_value.sel(probe="mass_mean").item() for each in found])
    assert p.min() >= 1 / (number + 1)
    for level in (0.05, 0.1, 0.2, 0.5):
        assert (p <= level + 1e-9).mean() <= level + 3 * np.sqrt(level * (1 - level) / times), (kind, level)


def test_the_best_of_many_layers_of_noise_is_no_finding() -> None:
    times, alone, among = (200 if STRESS else 4), 0, 0
    for seed in range(times):
        x, y = noise(seed, 24, layers=20 if STRESS else 10)
        of = shuffled(array_of(x, y), 19, cv=3).sel(probe="mass_mean")
        best = int(np.argmax(of.accuracy.mean("fold").values))
        alone += of.accuracy_p_value[best].item() <= 0.1
        among += of.accuracy_p_any_layer[best].item() <= 0.1
    assert alone / times > (0.4 if STRESS else 0.2)
    assert among / times <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / times)


# -- what it is beside -----------------------------------------------------------------------------------------------------


def test_without_a_number_the_control_is_as_before_and_the_first_of_many_is_that_shuffle() -> None:
    x, y = noise(2, 40, layers=2)
    array = array_of(x, y)
    once = lz.sweep(array, "label", ["mass_mean", "ridge"], controls=["shuffled_labels", "majority"])
    xr.testing.assert_equal(once, once.drop_vars([name for name in once.data_vars if "shuffled" in str(name) or "_p_" in str(name)]))
    none = lz.sweep(array, "label", ["mass_mean", "ridge"], controls={"shuffled_labels": None, "majority": None})
    xr.testing.assert_equal(none.accuracy, once.accuracy)
    many = lz.sweep(array, "label", ["mass_mean", "ridge"], controls={"shuffled_labels": 5, "majority": None})
    for probe in ("mass_mean", "ridge"):
        first = once.accuracy.sel(probe=f"shuffled_labels:{probe}").mean("fold")
        np.testing.assert_allclose(many.accuracy_shuffled.sel(probe=probe).isel(shuffle=0), first, atol=1e-12)
        xr.testing.assert_equal(many.accuracy.sel(probe=probe), once.accuracy.sel(probe=probe))
    assert len(np.unique(many.accuracy_shuffled.sel(probe="ridge"))) > 4


def test_every_seed_strength_label_and_variable_has_its_shuffles() -> None:
    x, y = noise(3, 40, layers=2, signal=1.0)
    array = array_of(x, y, other=np.arange(40) % 2)
    data = xr.Dataset({"resid_mean": array, "attn_mean": 2 * array})
    found = lz.sweep(
        data, ["label", "other"], ["ridge", "mass_mean"], 3, controls={"shuffled_labels": 4}, seeds=2, strengths=(1.0, 100.0)
    )  # fmt: skip
    assert dict(found.accuracy_shuffled.sizes) == {
        "variable": 2, "layer": 2, "probe": 4, "seed": 2, "strength": 2, "label": 2, "shuffle": 4,
    }  # fmt: skip
    assert found.accuracy_shuffled.sel(probe=["ridge", "mass_mean"]).notnull().all()
    assert set(found.auroc_p_value.dims) == set(found.auroc.dims) - {"fold"}
    assert lz.plan_sweep(array, "label", "ridge", controls={"shuffled_labels": 100}).n_fits == 2 * 5 * 101


def test_scores_that_are_written_are_continued_with_the_same_shuffles(tmp_path: Path) -> None:
    x, y = noise(4, 30, layers=3)
    expected = shuffled(array_of(x, y), 5, ["ridge", "mass_mean"])
    written = shuffled(array_of(x, y), 5, ["ridge", "mass_mean"], out=tmp_path / "scores")
    xr.testing.assert_allclose(written.drop_vars("fit_seconds"), expected.drop_vars("fit_seconds"))
    again = shuffled(array_of(x, y), 5, ["ridge", "mass_mean"], out=tmp_path / "scores")
    xr.testing.assert_identical(again.accuracy_p_any_layer, written.accuracy_p_any_layer)
    opened = xr.open_zarr(tmp_path / "scores")
    np.testing.assert_array_equal(opened.accuracy_shuffled, written.accuracy_shuffled)
    assert opened.load().lz.__repr__() == written.lz.__repr__()
    with pytest.raises(InvalidArgumentError, match="scores of another sweep, with other shuffles"):
        shuffled(array_of(x, y), 6, ["ridge", "mass_mean"], out=tmp_path / "scores")


def test_a_control_of_many_shuffles_has_no_interval_and_the_reason() -> None:
    x, y = noise(5, 40)
    scores = shuffled(array_of(x, y), 5, predictions=True)
    assert "dealt" not in scores.coords
    found = lz.confidence_intervals(scores, n_resamples=50).accuracy
    control = found.sel(probe="shuffled_labels:mass_mean", layer=0)
    assert control.isnull().values.tolist() == [True, False, True]
    assert control[1] == pytest.approx(scores.accuracy_shuffled_mean.sel(probe="mass_mean").item())
    assert found.sel(probe="mass_mean").notnull().all()
    assert "mean over many shuffles" in found.attrs["nan_reasons"]
    np.testing.assert_allclose(lz.selectivity(scores).mean("fold"), scores.accuracy.sel(probe=["mass_mean"]).mean("fold") - control[1])


def test_scores_at_a_glance_tables_and_reports_show_shuffles_beside_the_best_layer() -> None:
    from lmprobe_zarr.sweeps.charts import draw_scores

    x, y = noise(6, 40, layers=3, signal=3.0)
    scores = shuffled(array_of(x, y), 9, metrics=["accuracy", "auroc"])
    mean, spread = (scores[f"accuracy_shuffled_{of}"].sel(probe="mass_mean", layer=0).item() for of in ("mean", "std"))
    words = f"9 shuffles of the labels {mean:.3f} ± {spread:.3f}, p = 0.1 among the best of 3 layers"
    assert words in repr(scores.lz)
    assert words in scores.lz._repr_html_()
    assert set(scores.lz.table().columns.get_level_values("metric")) == {"accuracy", "auroc"}
    charts = draw_scores(scores)
    assert [chart.unit for chart in charts] == ["accuracy", "auroc"]
    assert words in charts[0].note
    few = scores.isel(layer=[1])
    assert "among" not in repr(few.lz)


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "100", [1]])
def test_a_number_of_shuffles_that_is_none_is_refused(number: Any) -> None:
    x, y = noise(0, 20)
    for call in (lz.sweep, lz.plan_sweep, lz.sweep_tokens):
        with pytest.raises(InvalidArgumentError, match="give how many times labels are shuffled, such as 100"):
            call(array_of(x, y), "label", "ridge", controls={"shuffled_labels": number})


# -- tokens ----------------------------------------------------------------------------------------------------------------


def tokens_of(x: Any, prompt: Any, **columns: Any) -> xr.DataArray:
    coords = {"layer": [0], "prompt": ("token", prompt), "position": ("token", np.arange(len(prompt)))}
    return xr.DataArray(
        np.asarray(x, "f4")[None], dims=("layer", "token", "hidden"), coords=coords | {k: ("token", v) for k, v in columns.items()}
    )


def test_folds_of_tokens_are_drawn_for_shuffled_labels() -> None:
    # With folds stratified by the true labels the control scores below chance, 0.43 here: the oracle shuffles first.
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        prompt = np.repeat([f"p{i:02}" for i in range(16)], 3)
        x, y = rng.normal(size=(48, 30)), np.repeat(rng.permutation(np.arange(16) % 2), 3)
        scores = lz.sweep_tokens(tokens_of(x, prompt, label=y), "label", "ridge", 8, controls={"shuffled_labels": 12}, random_state=seed)
        found.append(scores.accuracy_shuffled.sel(probe="ridge").mean().item())
    oracle = []
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        x, y = np.repeat(rng.normal(size=(16, 30)), 3, 0) + rng.normal(size=(48, 30)), rng.permutation(np.arange(16) % 2)
        for train, test in StratifiedKFold(8, shuffle=True, random_state=seed).split(y, y):
            rows, held = (np.concatenate([np.arange(3) + 3 * i for i in side]) for side in (train, test))
            of = np.repeat(y, 3)
            oracle.append(make_pipeline(StandardScaler(), RidgeClassifier()).fit(x[rows], of[rows]).score(x[held], of[held]))
    assert np.mean(found) == pytest.approx(np.mean(oracle), abs=0.05)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["prompts", "groups", "spans"])
def test_p_values_of_tokens_without_meaning_are_uniform_or_conservative(kind: str) -> None:
    times, number = (400, 9) if STRESS else (6, 4)
    p = []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(3, 8, 16)
        of = np.repeat(np.arange(16), sizes)
        prompt = np.array([f"p{i:02}" for i in range(16)])[of]
        x = rng.normal(size=(16, 3))[of] + 0.5 * rng.normal(size=(len(of), 3))
        y = rng.permutation(np.arange(16) % 2)[of]
        columns, groups = {}, None
        if kind == "groups":
            y, columns, groups = rng.permutation(np.arange(8) % 2)[of // 2], {"topic": of // 2}, "topic"
            x = rng.normal(size=(8, 3))[of // 2] + 0.5 * rng.normal(size=(len(of), 3))
        if kind == "spans":  # all tokens of most prompts are alike, but of each prompt one differs
            y = np.where(np.r_[True, of[1:] != of[:-1]], 1 - y, y)
        scores = lz.sweep_tokens(
            tokens_of(x, prompt, label=y, **columns), "label", "mass_mean", 4, groups=groups, controls={"shuffled_labels": number},
            random_state=seed, scheduler="synchronous",
        )  # fmt: skip
        p.append(scores.accuracy_p_value.sel(probe="mass_mean").item())
    for level in (0.1, 0.2, 0.4, 0.6):
        assert np.mean(np.array(p) <= level + 1e-9) <= level + 3 * np.sqrt(level * (1 - level) / times), (kind, level)


def test_tokens_have_p_values_and_the_plain_control_is_the_first_shuffle() -> None:
    rng = np.random.default_rng(0)
    prompt = np.repeat([f"p{i:02}" for i in range(20)], 4)
    y = np.repeat(np.arange(20) % 2, 4)
    array = tokens_of(rng.normal(size=(80, 3)) + 2 * y[:, None], prompt, label=y)
    many = lz.sweep_tokens(array, "label", ["ridge", "lda"], controls={"shuffled_labels": 4, "majority": None})
    once = lz.sweep_tokens(array, "label", ["ridge", "lda"], controls=["shuffled_labels", "majority"])
    assert many.probe.values.tolist() == once.probe.values.tolist()
    for probe in ("ridge", "lda"):
        first = once.auroc.sel(probe=f"shuffled_labels:{probe}").mean("fold")
        np.testing.assert_allclose(many.auroc_shuffled.sel(probe=probe).isel(shuffle=0), first)
        of = many.sel(probe=probe)
        np.testing.assert_allclose(many.auroc.sel(probe=f"shuffled_labels:{probe}").mean("fold"), of.auroc_shuffled.mean("shuffle"))
        assert of.accuracy_p_value.item() == of.auroc_p_any_layer.item() == 0.2
    with pytest.raises(InvalidTypeError, match="are no names"):
        lz.sweep_tokens(array, "label", controls={"majority": 3})


def test_class_counts_of_tokens_are_of_the_tokens_or_prompts_that_are_scored() -> None:
    rng = np.random.default_rng(0)
    prompt = np.repeat([f"p{i:02}" for i in range(10)], 3)
    y = np.repeat([0, 1, 0, 1, 0, 1, 0, 0, 0, 1], 3)
    array = tokens_of(rng.normal(size=(30, 3)), prompt, label=y)
    folds = [(np.arange(6), np.arange(6, 10))]
    found = lz.sweep_tokens(array, "label", cv=folds)
    assert (found.attrs["class_counts"], found.attrs["majority_share"]) == ([9, 3], 0.75)
    pooled = lz.sweep_tokens(array, "label", cv=folds, pooling="score:mean")
    assert pooled.attrs["class_counts"] == [3, 1]
    every = lz.sweep_tokens(array, "label", cv=2, pooling="score:max")
    assert every.attrs["class_counts"] == [6, 4]


def test_linear_regression_of_the_callers_is_shuffled_too() -> None:
    x, y = noise(7, 30, signal=3.0)
    found = shuffled(array_of(x, y * 1.0), 9, {"own": LinearRegression()}, metrics="r2", task="regression")
    assert found.r2_p_value.sel(probe="own").item() == 0.1
