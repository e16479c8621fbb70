"""How scores come about: folds, held-out splits, chosen strengths, several labels, values; and what they allow to say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.sweeps.sweep import sweep

N, HIDDEN = 150, 6
Y = (np.arange(N) % 3 == 0).astype(int)
GROUPS = np.arange(N) // 5


def activations(dtype: str = "float64") -> xr.DataArray:
    values = np.random.default_rng(0).normal(size=(2, N, HIDDEN))
    values[0, :, 1] += 0.7 * Y
    values[1, :, 1] += 2.0 * Y
    coords: dict[str, Any] = {
        "layer": [4, 8],
        "prompt": [lz.prompt_hash(f"prompt {i}") for i in range(N)],
        "label": ("prompt", Y),
        "family": ("prompt", GROUPS),
        "split": ("prompt", np.where(np.arange(N) < 90, "train", np.where(np.arange(N) < 120, "test", "validation"))),
    }
    return xr.DataArray(values.astype(dtype), dims=("layer", "prompt", "hidden"), coords=coords, name="resid_mean")


X = activations().values
FOLDS = list(StratifiedKFold(5, shuffle=True, random_state=0).split(X[0], Y))


# -- folds -----------------------------------------------------------------------------------------------------------------


def test_repeats_are_drawn_with_seeds_of_their_own_and_the_first_is_as_without() -> None:
    scores = sweep(activations(), "label", "ridge", 5, repeats=3, random_state=7)
    assert scores.sizes["fold"] == 15
    assert scores["repeat"].values.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    once = [sweep(activations(), "label", "ridge", StratifiedKFold(5, shuffle=True, random_state=7 + r)).accuracy.values for r in range(3)]
    np.testing.assert_array_equal(scores.accuracy, np.concatenate(once, axis=2))
    assert scores.attrs["cv"].startswith("3 times StratifiedKFold")
    with pytest.raises(InvalidArgumentError, match="give cv as a number"):
        sweep(activations(), "label", "ridge", StratifiedKFold(5), repeats=2)
    with pytest.raises(InvalidArgumentError, match="repeats=0"):
        sweep(activations(), "label", "ridge", repeats=0)


def test_a_split_is_one_fold_and_leaves_others_out() -> None:
    scores = sweep(activations(), "label", "logistic_regression", split="split")
    assert (scores.n_train.item(), scores.n_test.item()) == (90, 30)
    for place, x in enumerate(X):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[:90], Y[:90])
        assert scores.accuracy[place].item() == fitted.score(x[90:120], Y[90:120])
    assert scores.attrs["cv"] == "split 'split'"
    with pytest.raises(InvalidArgumentError, match="cv and split were given"):
        sweep(activations(), "label", cv=5, split="split")
    with pytest.raises(LabelError, match="split 'family' needs prompts of 'train' and of 'test'"):
        sweep(activations(), "label", split="family")
    with pytest.raises(InvalidArgumentError, match="groups on both sides"):
        sweep(activations(), "label", split="split", groups=np.arange(N) % 50)


def test_prompts_without_a_label_are_named_and_dropped_only_with_missing_drop() -> None:
    labels = Y.astype(float)
    labels[[3, 70]] = np.nan
    with pytest.raises(LabelError, match=r"miss 2 of 150 prompts .*missing='drop'"):
        sweep(activations(), labels)
    with pytest.raises(InvalidArgumentError, match="missing='skip' is unknown"):
        sweep(activations(), labels, missing="skip")
    scores = sweep(activations(), labels, ["ridge", "mass_mean"], missing="drop", groups="family")
    kept = np.delete(np.arange(N), [3, 70])
    expected = sweep(activations().isel(prompt=kept), Y[kept], ["ridge", "mass_mean"], groups=GROUPS[kept])
    for name in ("accuracy", "auroc", "n_train", "n_test"):
        np.testing.assert_allclose(scores[name], expected[name], rtol=0, atol=1e-12)
    assert (scores.attrs["n_prompts"], scores.attrs["n_dropped"]) == (148, 2)
    # Folds of the caller's are of all prompts; and what is not fitted may be NaN.
    spoilt = activations()
    spoilt[:, 3] = np.nan
    by_hand = sweep(spoilt, labels, "ridge", cv=[(np.arange(100), np.arange(100, N))], missing="drop")
    assert by_hand.n_train.item() == 98
    with pytest.raises(LabelError, match="none of the 1 prompts of test has a label"):
        sweep(activations(), labels, cv=[(np.arange(3), [3])], missing="drop")
    with pytest.raises(LabelError, match="missing for all 150 prompts"):
        sweep(activations(), np.full(N, np.nan), missing="drop")


def test_a_test_fold_of_one_class_has_no_auroc_and_a_training_fold_of_one_is_refused() -> None:
    positive = np.flatnonzero(Y)
    scores = sweep(
        activations(), "label", "ridge", cv=[(np.arange(100), positive[positive >= 100])], metrics=["accuracy", "auroc", "auprc"]
    )
    assert scores.auroc.isnull().all()
    assert json.loads(scores.auroc.attrs["nan_reasons"]) == ["ridge: the test fold holds a single class"]
    assert np.isfinite(scores.accuracy).all()
    assert "nan_reasons" not in scores.accuracy.attrs
    with pytest.raises(LabelError, match="fold 0 trains on 50 prompts that all are 1"):
        sweep(activations(), "label", cv=[(positive, np.arange(1, 30, 3))])


# -- measures --------------------------------------------------------------------------------------------------------------


def test_metrics_are_chosen_and_those_of_probabilities_need_them() -> None:
    names = ["balanced_accuracy", "f1", "auprc", "log_loss", "brier", "ece", "recall_at_fpr_0.05"]
    scores = sweep(activations(), "label", ["logistic_regression", "lda"], metrics=names)
    assert set(scores.data_vars) == {*names, "fit_seconds", "converged", "n_train", "n_test"}
    assert all(np.isfinite(scores[name]).all() for name in names)
    assert scores.log_loss.attrs["units"] == "nat"
    for probe in ("ridge", "svm"):
        with pytest.raises(InvalidArgumentError, match=f"'brier' needs probabilities, and probe '{probe}' has no predict_proba"):
            sweep(activations(), "label", ["lda", probe], metrics=["accuracy", "brier"])
    with pytest.raises(InvalidArgumentError, match="probe 'mine' has no predict_proba"):
        sweep(activations(), "label", {"mine": LinearSVC(dual=False)}, metrics="log_loss")
    with pytest.raises(InvalidArgumentError, match="no metric 'acuracy'"):
        sweep(activations(), "label", metrics="acuracy")


def test_values_are_learned_on_the_folds_of_scikit_learn() -> None:
    target = X[1, :, 1] * 3 + np.random.default_rng(1).normal(size=N)
    scores = sweep(activations(), target, task="regression", metrics=["r2", "mae", "spearman"])
    assert scores.probe.values.tolist() == ["ridge_regression"]
    for k, (train, test) in enumerate(KFold(5, shuffle=True, random_state=0).split(X[0])):
        for place, x in enumerate(X):
            by_sklearn = make_pipeline(StandardScaler(), Ridge()).fit(x[train], target[train]).predict(x[test])
            at = scores.isel(layer=place, probe=0, fold=k)
            assert at.r2.item() == pytest.approx(r2_score(target[test], by_sklearn), abs=1e-9)
            assert at.mae.item() == pytest.approx(mean_absolute_error(target[test], by_sklearn), abs=1e-9)
            assert at.spearman.item() == pytest.approx(stats.spearmanr(target[test], by_sklearn).statistic, abs=1e-9)
    grouped = sweep(activations(), target, "lasso", task="regression", groups="family")
    assert "StratifiedGroupKFold" in grouped.attrs["cv"]
    assert "classes" not in scores.attrs
    with pytest.raises(LabelError, match="hold str: a regression needs finite numbers"):
        sweep(activations(), ["a", "b"] * (N // 2), task="regression")
    with pytest.raises(InvalidArgumentError, match="'ridge' is for classification"):
        sweep(activations(), target, "ridge", task="regression")
    with pytest.raises(LabelError, match=r"continuous numbers.*task='regression'"):
        sweep(activations(), target)


def test_several_labels_are_each_learned_on_the_same_folds() -> None:
    given = activations().assign_coords(other=("prompt", (X[1, :, 3] > 0).astype(int)))
    scores = sweep(given, ["label", "other"], ["ridge", "mass_mean"])
    assert scores.accuracy.dims == ("layer", "probe", "fold", "label")
    assert scores.label.values.tolist() == ["label", "other"]
    folds = list(KFold(5, shuffle=True, random_state=0).split(X[0]))
    for name in ("label", "other"):
        alone = sweep(given, name, ["ridge", "mass_mean"], folds)
        np.testing.assert_array_equal(scores.accuracy.sel(label=name), alone.accuracy)
    assert scores.accuracy.sel(label="other", layer=8, probe="ridge").mean() > 0.9
    table = xr.concat([given.label, given.other.rename("label")], dim="what").assign_coords(what=["label", "other"])
    np.testing.assert_array_equal(sweep(given, table, ["ridge", "mass_mean"]).auroc, scores.auroc)
    with pytest.raises(LabelError, match="name one coordinate twice"):
        sweep(given, ["label", "label"])


# -- strengths and seeds ---------------------------------------------------------------------------------------------------


def test_strengths_are_alpha_or_one_over_c_and_others_stay_the_same() -> None:
    strengths = (0.01, 1, 100)
    scores = sweep(activations(), "label", ["ridge", "logistic_regression", "mass_mean"], strengths=strengths)
    assert scores.accuracy.dims == ("layer", "probe", "fold", "strength")
    for s, strength in enumerate(strengths):
        for k, (train, test) in enumerate(FOLDS):
            for estimator, name in (
                (RidgeClassifier(alpha=strength), "ridge"),
                (LogisticRegression(C=1 / strength), "logistic_regression"),
            ):
                fitted = make_pipeline(StandardScaler(), estimator).fit(X[1][train], Y[train])
                at = scores.isel(layer=1, fold=k, strength=s).sel(probe=name)
                assert at.auroc.item() == pytest.approx(roc_auc_score(Y[test], fitted.decision_function(X[1][test])), abs=1e-6)
    flat = scores.accuracy.sel(probe="mass_mean")
    assert (flat == flat.isel(strength=0)).all()
    # One strength alone gives the scores of the default where it is the default.
    np.testing.assert_allclose(
        scores.auroc.sel(strength=1, probe="ridge"), sweep(activations(), "label", "ridge").auroc.isel(probe=0), atol=1e-12
    )


def test_a_strength_chosen_within_each_training_fold_is_grid_searchs() -> None:
    strengths = (1e-3, 1.0, 1e3)
    scores = sweep(activations(), "label", "logistic_regression", strengths=strengths, inner_cv=4, choose_by="auroc", groups="family")
    assert scores.accuracy.dims == ("layer", "probe", "fold")
    outer = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(X[0], Y, GROUPS)
    chosen = set()
    for k, (train, test) in enumerate(outer):
        fits = [GROUPS[train], Y[train]]
        at = scores.isel(layer=1, probe=0, fold=k)
        # The inner folds depend on the fit's seed; any of scikit-learn's of that kind gives the same means here within noise, so the
        # chosen strength is checked by refitting with it.
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=1 / at.chosen_strength.item(), max_iter=1000)).fit(
            X[1][train], fits[1]
        )
        assert at.accuracy.item() == accuracy_score(Y[test], fitted.predict(X[1][test]))
        chosen.add(at.chosen_strength.item())
    assert chosen <= set(strengths)
    # Where one strength is far the best, it is the one that scikit-learn's own search finds.
    weak = activations()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [1e-6, 1.0]}, scoring="neg_log_loss", cv=StratifiedKFold(4, shuffle=True, random_state=0),
    )  # fmt: skip
    found = sweep(weak, "label", "logistic_regression", strengths=(1e6, 1.0), inner_cv=4, choose_by="log_loss", metrics="accuracy")
    for k, (train, _) in enumerate(FOLDS):
        best = search.fit(X[1][train], Y[train]).best_params_["logisticregression__C"]
        assert found.chosen_strength.isel(layer=1, probe=0, fold=k).item() == 1 / best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": [1, -1]}, "no strengths: give different positive numbers"),
        ({"strengths": [1, 1]}, "no strengths"),
        ({"strengths": [1, 2], "probes": "lda"}, "none of 'lda' has one"),
        ({"inner_cv": 5}, "chooses among strengths: give several"),
        ({"inner_cv": 1, "strengths": [1, 2]}, "inner_cv=1"),
        ({"choose_by": "auroc"}, "without inner folds"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": [1, 1]}, "no seeds"),
        ({"task": "ranking"}, "task='ranking' is unknown"),
        ({"preprocessing": "whiten"}, "no preprocessing step 'whiten'"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        sweep(activations(), "label", **options)


def test_seeds_fit_anew_what_draws_and_once_what_does_not() -> None:
    scores = sweep(activations(), "label", ["sgd", "ridge"], seeds=[3, 4])
    assert scores.accuracy.dims == ("layer", "probe", "fold", "seed")
    ridge = scores.auroc.sel(probe="ridge")
    assert (ridge.sel(seed=3) == ridge.sel(seed=4)).all()
    assert (scores.auroc.sel(probe="sgd", seed=3) != scores.auroc.sel(probe="sgd", seed=4)).any()
    alone = sweep(activations(), "label", "sgd", FOLDS, random_state=4)
    np.testing.assert_array_equal(scores.auroc.sel(probe="sgd", seed=4), alone.auroc.isel(probe=0))
    assert lz.plan_sweep(activations(), "label", ["sgd", "ridge"], seeds=2).n_fits == 2 * 5 * (2 + 1)


def test_preprocessing_stands_in_front_of_every_probe() -> None:
    from sklearn.decomposition import PCA

    scores = sweep(activations(), "label", ["mass_mean", "ridge"], preprocessing="standard+pca:2")
    for k, (train, test) in enumerate(FOLDS):
        fitted = make_pipeline(StandardScaler(), PCA(2, random_state=0), RidgeClassifier()).fit(X[1][train], Y[train])
        assert scores.accuracy.sel(layer=8, probe="ridge", fold=k).item() == fitted.score(X[1][test], Y[test])
    by_layer = sweep(activations(), "label", "ridge", preprocessing="per_layer")
    train, test = FOLDS[0]
    scaled = (X[1] - X[1][train].mean()) / X[1][train].std()
    assert by_layer.accuracy.sel(layer=8, fold=0).item() == RidgeClassifier().fit(scaled[train], Y[train]).score(scaled[test], Y[test])
    assert by_layer.attrs["preprocessing"] == "per_layer"


# -- grids -----------------------------------------------------------------------------------------------------------------


def test_variables_of_a_dataset_are_a_dim_with_site_and_pooling() -> None:
    resid = activations()
    ds = xr.Dataset(
        {
            "resid_mean": resid,
            "mlp_last_token": resid.isel(layer=[1]) * 2,
            "embed_mean": resid.isel(layer=0, drop=True) + 1,
            "other": ("prompt", Y),
        }
    )
    scores = sweep(ds, "label", ["ridge", "mass_mean"])
    assert scores.accuracy.dims == ("variable", "layer", "probe", "fold")
    assert scores.variable.values.tolist() == ["resid_mean", "mlp_last_token", "embed_mean"]
    assert scores.site.values.tolist() == ["resid", "mlp", "embed"]
    assert scores.pooling.values.tolist() == ["mean", "last_token", "mean"]
    np.testing.assert_array_equal(scores.accuracy.sel(variable="resid_mean"), sweep(resid, "label", ["ridge", "mass_mean"]).accuracy)
    assert scores.accuracy.sel(variable="mlp_last_token", layer=4).isnull().all()
    assert np.isfinite(scores.accuracy.sel(variable="mlp_last_token", layer=8)).all()
    embedded = scores.accuracy.sel(variable="embed_mean")
    np.testing.assert_array_equal(embedded.sel(layer=4), embedded.sel(layer=8))


def test_a_plan_counts_fits_and_bytes_before_anything_is_read() -> None:
    plan = lz.plan_sweep(
        activations("float32").chunk(), "label", ["ridge", "sgd"], 5, strengths=(0.1, 1), repeats=2,
        controls=["shuffled_labels", "majority"],
    )  # fmt: skip
    # Two layers, ten folds; ridge, sgd and both on shuffled labels with two strengths; the majority once.
    assert plan.n_fits == 2 * 10 * 4 * 2 + 10
    assert plan.nbytes == 2 * N * HIDDEN * 4
    assert plan.n_tasks == 3
    assert plan.dims == ("layer", "probe", "fold", "strength")
    text = str(plan)
    assert "fits       170 in 3 tasks" in text
    assert "to read    7.0 KiB, each layer once" in text
    assert "controls   shuffled_labels:ridge, shuffled_labels:sgd, majority" in text
    nested = lz.plan_sweep(activations(), "label", "ridge", strengths=(1, 2, 3), inner_cv=4)
    assert nested.n_fits == 2 * 5 * (3 * 4 + 1)


# -- what scores allow to say ----------------------------------------------------------------------------------------------


def predicted() -> xr.Dataset:
    names = ["accuracy", "auroc", "f1", "auprc", "log_loss", "brier", "ece"]
    return sweep(activations(), "label", ["logistic_regression", "mass_mean"], predictions=True, metrics=names, repeats=2)


def test_predictions_are_those_of_the_fold_that_tests_the_prompt() -> None:
    scores = sweep(activations(), "label", "logistic_regression", predictions=True)
    assert scores.predicted.dims == ("layer", "probe", "prompt")
    for k, (train, test) in enumerate(FOLDS):
        assert (scores.test_fold[test] == k).all()
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X[1][train], Y[train])
        np.testing.assert_array_equal(scores.predicted[1, 0, test], fitted.predict(X[1][test]))
        np.testing.assert_allclose(scores.probability[1, 0, test], fitted.predict_proba(X[1][test])[:, 1], atol=1e-12)
    assert scores.true.values.tolist() == Y.tolist()
    twice = predicted()
    assert twice.predicted.dims == ("layer", "probe", "repetition", "prompt")


def test_the_estimate_of_an_interval_is_the_score_itself() -> None:
    scores = predicted()
    intervals = lz.confidence_intervals(scores, n_resamples=50)
    for name in ("accuracy", "auroc", "f1", "auprc", "log_loss", "brier", "ece"):
        np.testing.assert_allclose(intervals[name].sel(bound="estimate"), scores[name].mean("fold"), atol=1e-12)
        assert (intervals[name].sel(bound="lower") <= intervals[name].sel(bound="upper")).all()
    assert intervals.attrs["resampled"] == "prompt"
    more = lz.confidence_intervals(scores, "balanced_accuracy", n_resamples=10)
    assert np.isfinite(more.balanced_accuracy).all()


def test_the_estimate_for_shuffled_labels_is_their_score_too() -> None:
    several: tuple[dict[str, Any], ...] = ({}, {"seeds": [3, 4]})
    for options in several:
        scores = sweep(activations(), Y, "mass_mean", controls="shuffled_labels", predictions=True, **options)
        intervals = lz.confidence_intervals(scores, "accuracy", n_resamples=10)
        np.testing.assert_allclose(intervals.accuracy.sel(bound="estimate"), scores.accuracy.mean("fold"), atol=1e-12)
        assert (scores.dealt != scores.true).any()


def test_intervals_of_an_accuracy_are_about_those_of_the_binomial() -> None:
    scores = sweep(activations(), "label", "mass_mean", predictions=True)
    found = lz.confidence_intervals(scores, "accuracy", n_resamples=4000).accuracy.isel(layer=0, probe=0)
    p = float(found.sel(bound="estimate"))
    half = 1.96 * np.sqrt(p * (1 - p) / N)
    np.testing.assert_allclose(found.sel(bound=["lower", "upper"]), [p - half, p + half], atol=0.015)
    narrower = lz.confidence_intervals(scores, "accuracy", level=0.5).accuracy.isel(layer=0, probe=0)
    assert narrower.sel(bound="upper") - narrower.sel(bound="lower") < 0.6 * half * 2


def test_whole_groups_are_drawn_where_there_are_some() -> None:
    # All five prompts of a group are alike, so that only the number of groups counts.
    alike = activations()[:, ::5].isel(prompt=np.repeat(np.arange(N // 5), 5)).assign_coords(prompt=np.arange(N), family=("prompt", GROUPS))
    y = np.repeat(Y[::5], 5)
    grouped = lz.confidence_intervals(sweep(alike, y, "mass_mean", groups="family", predictions=True), "accuracy")
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(X[0], y, GROUPS)
    alone = lz.confidence_intervals(sweep(alike, y, "mass_mean", cv=folds, predictions=True), "accuracy")

    def width(intervals: xr.Dataset) -> Any:
        return (intervals.accuracy.sel(bound="upper") - intervals.accuracy.sel(bound="lower")).values

    assert grouped.attrs["resampled"] == "group"
    np.testing.assert_array_equal(grouped.accuracy.sel(bound="estimate"), alone.accuracy.sel(bound="estimate"))
    assert (width(grouped) > 1.6 * width(alone)).all()


def test_several_classes_and_values_have_intervals_too() -> None:
    y = np.arange(N) % 3
    three = lz.confidence_intervals(sweep(activations(), y, ["lda", "ridge"], predictions=True), n_resamples=20)
    assert np.isfinite(three.auroc).all()
    values = sweep(activations(), X[1, :, 0], task="regression", predictions=True)
    found = lz.confidence_intervals(values, ["r2", "spearman"], n_resamples=20)
    np.testing.assert_allclose(found.r2.sel(bound="estimate"), values.r2.mean("fold"), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"level": 1.5}, "level=1.5"), ({"n_resamples": 1}, "n_resamples=1"), ({"metrics": "r2"}, "not for classification")],
)
def test_intervals_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    scores = sweep(activations(), "label", "mass_mean", predictions=True)
    with pytest.raises(InvalidArgumentError, match=message):
        lz.confidence_intervals(scores, **options)


def test_intervals_need_predictions_and_scores() -> None:
    with pytest.raises(InvalidArgumentError, match="sweep with predictions=True"):
        lz.confidence_intervals(sweep(activations(), "label", "mass_mean"))
    with pytest.raises(InvalidTypeError, match="not DataArray"):
        lz.confidence_intervals(activations())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="holds no scores"):
        lz.confidence_intervals(activations().to_dataset())


def test_a_comparison_is_nadeau_and_bengios_test() -> None:
    scores = sweep(activations(), "label", ["mass_mean", "logistic_regression", "ridge"], 5, repeats=4)
    found = lz.compare(scores, "accuracy", reference="mass_mean")
    difference = (scores.accuracy.sel(probe="ridge") - scores.accuracy.sel(probe="mass_mean")).sel(layer=4).values
    # By hand: equation (6) of the corrected resampled t-test, J = 20, n2 / n1 = 30 / 120.
    t = difference.mean() / np.sqrt((1 / 20 + 30 / 120) * difference.var(ddof=1))
    at = found.sel(layer=4, probe="ridge")
    assert at.t.item() == pytest.approx(t)
    assert at.p_value.item() == pytest.approx(2 * stats.t.sf(abs(t), 19))
    assert at.difference.item() == pytest.approx(difference.mean())
    assert found.p_value.sel(probe="mass_mean").isnull().all()
    # Far more careful than the ordinary one.
    assert at.p_value.item() > stats.ttest_1samp(difference, 0).pvalue


def test_holms_correction_is_that_of_the_book() -> None:
    from lmprobe_zarr.sweeps.compare import _holm

    # Holm (1979): the smallest times n, the next times n − 1, …, never falling, never above 1.
    np.testing.assert_allclose(_holm(np.array([[0.01, 0.04], [0.03, np.nan]])), [[0.03, 0.06], [0.06, np.nan]])
    np.testing.assert_allclose(_holm(np.array([0.6, 0.7])), [1, 1])


def test_layers_are_compared_and_equal_ones_do_not_differ() -> None:
    given = activations().isel(layer=[0, 1, 1]).assign_coords(layer=[4, 8, 9])
    found = lz.compare(sweep(given, "label", "ridge", 5, repeats=2), "auroc", along="layer", reference=8)
    assert found.p_holm.sel(layer=4).item() < 0.05
    assert (found.t.sel(layer=9).item(), found.p_value.sel(layer=9).item()) == (0, 1)
    assert found.attrs["reference"] == 8


def test_comparisons_that_cannot_be_are_refused() -> None:
    scores = sweep(activations(), "label", "mass_mean")
    with pytest.raises(InvalidArgumentError, match="no score 'f1' by fold: use one of accuracy, auroc"):
        lz.compare(scores, "f1")
    with pytest.raises(InvalidArgumentError, match="no dim 'fold' to compare along: use one of 'layer', 'probe'"):
        lz.compare(scores, along="fold")
    with pytest.raises(InvalidArgumentError, match="no layer 5 to compare with: use one of 4, 8"):
        lz.compare(scores, along="layer", reference=5)
    with pytest.raises(InvalidArgumentError, match="a single fold"):
        lz.compare(sweep(activations(), "label", ["mass_mean", "ridge"], split="split"))
