"""Named estimators, what is put before them, and their scores, one matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.linear_model import Lasso, LogisticRegression, Ridge, RidgeClassifier, SGDClassifier
from sklearn.metrics import f1_score, mean_absolute_error, precision_score, r2_score, recall_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC, LinearSVR

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import (
    accuracy,
    auroc,
    class_scores,
    coefficients,
    converged,
    evaluate_classification,
    evaluate_regression,
    fit_in_place,
    make_pipeline_for,
    make_probe,
    named_probes,
    parse_preprocessing,
)
from lmprobe_zarr.probes.ensemble import EnsembleClassifier
from lmprobe_zarr.probes.mass_mean import MassMeanClassifier
from lmprobe_zarr.probes.scaling import LayerScaler

NAMES = [
    "logistic_regression",
    "logistic_regression_cv",
    "logistic_l1",
    "ridge",
    "lda",
    "svm",
    "mass_mean",
    "mass_mean_cov",
    "sgd",
    "ensemble",
    "mlp",
    "majority",
]
REGRESSION = ["ridge_regression", "lasso", "svr"]
LINEAR = [name for name in NAMES if name not in ("mlp", "majority")]


def along_a_direction(n: int = 200, hidden: int = 30, classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, hidden)).astype(np.float32)
    x[np.arange(n), y] += 3
    return x, y


def test_named_probes_are_pinned_and_document_what_they_standardise() -> None:
    described = named_probes()
    assert list(described) == NAMES + REGRESSION
    assert list(named_probes("classification")) == NAMES
    assert list(named_probes("regression")) == REGRESSION
    for name in described:
        assert name == "majority" or "tandardis" in described[name]
    with pytest.raises(InvalidArgumentError, match="task='ranking' is unknown: use 'classification' or 'regression'"):
        named_probes("ranking")


@pytest.mark.few(10)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", NAMES[:-1])
def test_each_named_probe_finds_a_known_direction(name: str, classes: int) -> None:
    x, y = along_a_direction(classes=classes)
    probe = make_probe(name).fit(x[:100], y[:100])
    assert accuracy(probe.predict(x[100:]), y[100:]) > 0.8
    assert auroc(class_scores(probe, x[100:]), y[100:], probe.classes_)[0] > 0.95
    assert converged(probe)


@pytest.mark.parametrize("name", NAMES)
def test_each_named_probe_can_be_cloned_and_is_fresh(name: str) -> None:
    probe = make_probe(name, 3)
    assert make_probe(name, 3) is not probe
    assert type(clone(probe)) is type(probe)


def test_the_majority_control_scores_at_chance() -> None:
    x, _ = along_a_direction()
    y = np.array([0] * 120 + [1] * 80)
    probe = make_probe("majority").fit(x, y)
    assert accuracy(probe.predict(x), y) == pytest.approx(0.6)
    assert auroc(class_scores(probe, x), y, probe.classes_) == (0.5, "")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_in_place_equals_a_fit_bit_for_bit(name: str) -> None:
    x, y = along_a_direction(hidden=600)
    x = x * np.linspace(0.01, 50, 600, dtype=np.float32) + 100
    plain = make_probe(name).fit(x.copy(), y)
    ours = fit_in_place(name, make_probe(name), x.copy(), y)
    np.testing.assert_array_equal(class_scores(ours, x), class_scores(plain, x))
    np.testing.assert_array_equal(ours.predict(x), plain.predict(x))


@pytest.mark.parametrize("name", REGRESSION)
def test_a_regression_fitted_in_place_equals_a_fit_bit_for_bit(name: str) -> None:
    x, _ = along_a_direction(hidden=300)
    y = x[:, 0] * 3 + 100
    plain = make_probe(name, task="regression").fit(x.copy(), y)
    ours = fit_in_place(name, make_probe(name, task="regression"), x.copy(), y)
    np.testing.assert_array_equal(ours.predict(x), plain.predict(x))


def test_a_fit_in_place_leaves_an_estimator_that_overwrites_nothing() -> None:
    x, y = along_a_direction()
    probe = fit_in_place("ridge", make_probe("ridge"), x.copy(), y)
    before = x.copy()
    probe.predict(x)
    probe.fit(x, y)
    np.testing.assert_array_equal(x, before)


def test_mass_mean_by_hand() -> None:
    x = np.array([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    probe = MassMeanClassifier().fit(x, ["no", "no", "yes", "yes"])
    np.testing.assert_array_equal(probe.coef_, [[4.0, 0.0]])  # means (0, 1) and (4, 1)
    np.testing.assert_array_equal(probe.decision_function([[2.0, 9.0], [3.0, -5.0]]), [0.0, 4.0])
    assert probe.predict([[3.0, 0.0], [1.0, 0.0]]).tolist() == ["yes", "no"]
    np.testing.assert_allclose(probe.predict_proba([[2.0, 0.0], [3.0, 0.0]])[:, 1], [0.5, 1 / (1 + np.exp(-4))])


def test_mass_mean_of_several_classes_is_the_nearest_mean() -> None:
    x, y = along_a_direction(classes=4, seed=1)
    probe = MassMeanClassifier().fit(x, y)
    means = np.stack([x[y == k].mean(axis=0) for k in range(4)])
    nearest = ((x[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(probe.predict(x), nearest)
    np.testing.assert_allclose(probe.predict_proba(x).sum(axis=1), 1)


def test_mass_mean_refuses_a_single_class() -> None:
    with pytest.raises(LabelError, match="at least two classes"):
        MassMeanClassifier().fit(np.ones((3, 2)), [1, 1, 1])


def test_a_given_estimator_is_cloned_and_only_its_unset_seeds_are_set() -> None:
    given = make_pipeline(StandardScaler(), SGDClassifier())
    probe = make_probe(given, 7)
    assert probe is not given
    assert probe.get_params()["sgdclassifier__random_state"] == 7
    assert given.get_params()["sgdclassifier__random_state"] is None
    assert make_probe(LogisticRegression(random_state=1), 7).random_state == 1


def test_the_error_names_an_invalid_probe() -> None:
    with pytest.raises(
        InvalidArgumentError, match="no probe named 'logreg': use one of logistic_regression, logistic_regression_cv, logistic_l1"
    ):
        make_probe("logreg")
    with pytest.raises(InvalidArgumentError, match="Ridge is a regressor"):
        make_probe(Ridge())
    with pytest.raises(InvalidTypeError, match=r"give an instance, LogisticRegression\(\)"):
        make_probe(LogisticRegression)
    with pytest.raises(InvalidTypeError, match="not int"):
        make_probe(3)


def test_auroc_of_several_classes_equals_scikit_learn_on_probabilities() -> None:
    x, y = along_a_direction(classes=3)
    probabilities = LogisticRegression().fit(x[:100], y[:100]).predict_proba(x[100:])
    expected = roc_auc_score(y[100:], probabilities, multi_class="ovr", average="macro")
    assert auroc(probabilities, y[100:], np.arange(3))[0] == pytest.approx(expected, abs=1e-12)


def test_auroc_is_nan_with_a_reason_where_it_is_undefined() -> None:
    two = np.array([0, 1])
    for scores, labels, reason in (
        (None, [0, 1], "gives no score per class"),
        (np.array([1.0, 2.0]), [1, 1], "single class"),
        (np.array([1.0, np.nan]), [0, 1], "not finite"),
        (np.array([1.0, 2.0]), [0, 2], "training fold lacks"),
    ):
        value, why = auroc(scores, np.array(labels), two)
        assert np.isnan(value)
        assert reason in why


def test_an_estimator_without_scores_or_with_one_against_one_gives_none() -> None:
    x, y = along_a_direction(classes=4)
    assert class_scores(KMeans(2, n_init=1).fit(x), x) is None
    assert class_scores(SVC(decision_function_shape="ovo").fit(x, y), x) is None


def test_an_estimator_that_ran_into_its_limit_has_not_converged() -> None:
    x, y = along_a_direction()
    with pytest.warns(Warning, match="failed to converge"):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1)).fit(x, y)
    assert not converged(probe)


# -- more named estimators -------------------------------------------------------------------------------------------------


def numbers(n: int = 200, hidden: int = 30, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, hidden))
    return x, x[:, 3] * 2 - x[:, 5] + 0.1 * rng.normal(size=n)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize(("scale", "centre"), [(1, 0), (1e-3, 5), (1e4, -1e5)])
def test_each_named_regression_finds_a_known_direction_whatever_the_units_of_the_target(name: str, scale: float, centre: float) -> None:
    x, y = numbers()
    y = y * scale + centre
    probe = make_probe(name, task="regression").fit(x[:100], y[:100])
    assert r2_score(y[100:], probe.predict(x[100:])) > 0.95
    assert converged(probe)
    coef, intercept = coefficients(probe)
    np.testing.assert_allclose(x @ coef[0, 0] + intercept, probe.predict(x), rtol=1e-9)
    assert set(np.argsort(-abs(coef[0, 0]))[:2]) == {3, 5}


def test_lasso_and_svr_are_scikit_learns_own_on_a_scaled_target() -> None:
    x, y = numbers()
    y = 50 * y + 7
    z = StandardScaler().fit_transform(x)
    target = (y - y.mean()) / y.std()
    for name, oracle in (
        ("lasso", Lasso(alpha=0.1, max_iter=10_000)),
        ("svr", LinearSVR(loss="squared_epsilon_insensitive", dual=False, epsilon=0.1, tol=1e-3, max_iter=10_000)),
    ):
        expected = oracle.fit(z, target).predict(z) * y.std() + y.mean()
        np.testing.assert_allclose(make_probe(name, task="regression").fit(x, y).predict(x), expected, rtol=1e-9)


def test_without_an_intercept_the_target_is_not_centred() -> None:
    x, y = numbers()
    y = y + 30
    ours = make_probe("lasso", task="regression", params={"fit_intercept": False}, standardise=False).fit(x, y)
    expected = Lasso(alpha=0.1 * y.std(), fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(ours.coef_, expected.coef_, rtol=1e-6)


# scikit-learn 1.5 says that coordinate descent does not end on a target of zeros, though it is there from the start.
@pytest.mark.filterwarnings("ignore:Objective did not converge")
def test_a_target_that_never_changes_is_predicted_and_several_are_refused() -> None:
    x, _ = numbers()
    for name in ("lasso", "svr"):
        np.testing.assert_allclose(make_probe(name, task="regression").fit(x, np.full(200, 4.0)).predict(x), 4)
    with pytest.raises(InvalidArgumentError, match=r"target has shape \(200, 2\)"):
        make_probe("lasso", task="regression").fit(x, x[:, :2])


@pytest.mark.parametrize(("n", "hidden"), [(60, 8), (30, 80), (31, 31)])
@pytest.mark.parametrize("classes", [2, 3])
def test_mass_mean_with_covariance_solves_by_the_shrunk_covariance(n: int, hidden: int, classes: int) -> None:
    x, y = along_a_direction(n, hidden, classes)
    x = (x @ np.random.default_rng(1).normal(size=(hidden, hidden))).astype(np.float64)
    means = np.stack([x[y == k].mean(axis=0) for k in range(classes)])
    covariance, _ = ledoit_wolf(x - means[y], assume_centered=True)
    probe = MassMeanClassifier(covariance=True).fit(x, y)
    distances = np.stack([np.einsum("nd,nd->n", x - mean, np.linalg.solve(covariance, (x - mean).T).T) for mean in means], axis=1)
    np.testing.assert_array_equal(probe.predict(x), distances.argmin(axis=1))
    if classes == 2:
        np.testing.assert_allclose(probe.coef_[0], np.linalg.solve(covariance, means[1] - means[0]), rtol=1e-6)
        np.testing.assert_allclose(probe.decision_function(x), (distances[:, 0] - distances[:, 1]) / 2, rtol=1e-6, atol=1e-8)


def test_mass_mean_with_covariance_beats_the_plain_one_on_a_slanted_cloud() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(400) % 2
    nuisance = rng.normal(size=400) * 4
    x = np.stack([nuisance + 2 * y, nuisance], axis=1) + 0.3 * rng.normal(size=(400, 2))
    assert make_probe("mass_mean").fit(x[:200], y[:200]).score(x[200:], y[200:]) < 0.7
    assert make_probe("mass_mean_cov").fit(x[:200], y[:200]).score(x[200:], y[200:]) > 0.99


def test_mass_mean_with_covariance_exists_where_the_covariance_does_not() -> None:
    two = np.array([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0]])
    np.testing.assert_array_equal(MassMeanClassifier(covariance=True).fit(two, [0, 1]).coef_, [[3, 0, 0]])
    four = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
    assert np.isfinite(MassMeanClassifier(covariance=True).fit(four, [0, 0, 1, 1]).coef_).all()
    np.testing.assert_allclose(MassMeanClassifier(covariance=True).fit([[0.0], [2.0], [5.0], [7.0]], [0, 0, 1, 1]).coef_, [[5.0]])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_ensemble_averages_the_probabilities_of_its_regressions(classes: int) -> None:
    x, y = along_a_direction(classes=classes)
    x = x.astype(np.float64)
    z = StandardScaler().fit_transform(x)
    expected = np.mean(
        [LogisticRegression(C=c, max_iter=1000).fit(z, y).predict_proba(z) for c in (0.01, 0.1, 0.5, 1.0, 5.0)],
        axis=0,
    )
    probe = make_probe("ensemble").fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), expected, atol=1e-12)
    np.testing.assert_array_equal(probe.predict(x), expected.argmax(axis=1))
    assert not hasattr(probe, "decision_function")


@pytest.mark.parametrize("values", [[], [0.0], [1.0, -1.0], ["a"]])
def test_an_ensemble_of_no_strength_is_refused(values: list[Any]) -> None:
    x, y = along_a_direction()
    with pytest.raises(InvalidArgumentError, match="give one or more positive numbers"):
        EnsembleClassifier(values).fit(x, y)


def test_our_estimators_refuse_what_was_not_fitted_or_is_of_another_width() -> None:
    x, y = along_a_direction()
    for estimator in (MassMeanClassifier(), EnsembleClassifier(), LayerScaler()):
        estimator.fit(x, y)
        with pytest.raises(InvalidArgumentError, match=r"X has 29 features, but .* is expecting 30"):
            (estimator.transform if isinstance(estimator, LayerScaler) else estimator.predict)(x[:, 1:])
        with pytest.raises(ValueError, match="NaN"):
            estimator.fit(np.full_like(x, np.nan), y)
    with pytest.raises(InvalidArgumentError, match="3 labels for 200 rows"):
        MassMeanClassifier().fit(x, [0, 1, 0])


def test_parameters_replace_the_defaults_of_the_last_estimator() -> None:
    assert make_probe("logistic_regression", params={"C": 0.01, "random_state": 5})[-1].get_params()["C"] == 0.01
    assert make_probe("lda", params={"solver": "svd", "shrinkage": None}).solver == "svd"
    assert make_probe("ensemble", params={"C_values": [1.0]})[-1].C_values == [1.0]
    for name, params, message in (
        ("ridge", {"C": 1, "alpha": 2}, "'ridge' has no parameter 'C': its parameters are alpha, "),
        ("logistic_regression", {"C": -1}, "'logistic_regression' cannot be made with {'C': -1}: The 'C' parameter .* must be"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            make_probe(name, params=params)
    with pytest.raises(InvalidTypeError, match="mapping such as"):
        make_probe("ridge", params=["C"])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="'C' were given with an estimator of your own: set them on LogisticRegression"):
        make_probe(LogisticRegression(), params={"C": 1})


def test_a_probe_for_the_other_task_raises_an_error_with_the_fitting_names() -> None:
    with pytest.raises(InvalidArgumentError, match="'lasso' is for regression, not for classification: use one of logistic_regression, "):
        make_probe("lasso")
    with pytest.raises(
        InvalidArgumentError, match="'svm' is for classification, not for regression: use one of ridge_regression, lasso, svr"
    ):
        make_probe("svm", task="regression")
    with pytest.raises(InvalidArgumentError, match="LogisticRegression is a classifier: labels are numbers here"):
        make_probe(LogisticRegression(), task="regression")
    assert make_probe(Ridge(alpha=3), task="regression").alpha == 3


# -- preprocessing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "components", "expected"),
    [
        (None, None, []),
        ([], None, []),
        ("standard", None, ["standard"]),
        ("standard_scaler", None, ["standard"]),
        ("pca:7", None, ["pca:7"]),
        ("pca", 5, ["pca:5"]),
        (" standard + pca:7 ", 5, ["standard", "pca:7"]),
        (["pca", "standard"], 5, ["pca:5", "standard"]),
    ],
)
def test_preprocessing_is_read_as_lmprobe_reads_it(spec: Any, components: int | None, expected: list[str]) -> None:
    assert [str(step) for step in parse_preprocessing(spec, components)] == expected


@pytest.mark.parametrize(
    ("spec", "components", "error", "message"),
    [
        ("whiten", None, InvalidArgumentError, "no preprocessing step 'whiten': use 'standard', 'per_layer', 'pca:N'"),
        ("", None, InvalidArgumentError, "no preprocessing step ''"),
        ("standard:3", None, InvalidArgumentError, "no preprocessing step 'standard:3'"),
        ("pca", None, InvalidArgumentError, "does not say how many components: give 'pca:50', or pca_components=50"),
        ("pca:", None, InvalidArgumentError, "'pca:' has no number"),
        ("pca:0", None, InvalidArgumentError, "'pca:0' has no number"),
        ("pca:-3", None, InvalidArgumentError, "'pca:-3' has no number"),
        ("pca:0.9", None, InvalidArgumentError, "'pca:0.9' has no number"),
        ("pca", 0, InvalidArgumentError, "pca_components=0 keeps nothing"),
        ("pca", 2.5, InvalidTypeError, "pca_components=2.5 is not a whole number"),
        ("standard", 5, InvalidArgumentError, "pca_components=5 but preprocessing='standard' has no 'pca'"),
        (None, 5, InvalidArgumentError, "pca_components=5 but preprocessing=None has no 'pca'"),
        (7, None, InvalidTypeError, "not int"),
        ({"pca": 3}, None, InvalidTypeError, "not dict"),
        ([3], None, InvalidTypeError, "is a text such as .*, not 3"),
    ],
)
def test_invalid_preprocessing_is_refused(spec: Any, components: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_preprocessing(spec, components)


def test_the_layer_scaler_by_hand() -> None:
    x = np.array([[1.0, 3.0, 10.0, 10.0], [3.0, 5.0, 30.0, 10.0]])
    per_neuron = LayerScaler(2).fit(x)
    np.testing.assert_array_equal(per_neuron.mean_, [[2, 4], [20, 10]])
    np.testing.assert_array_equal(per_neuron.scale_, [[1, 1], [10, 1]])
    np.testing.assert_array_equal(per_neuron.transform(x), [[-1, -1, -1, 0], [1, 1, 1, 0]])
    per_layer = LayerScaler(2, "per_layer").fit(x)
    np.testing.assert_array_equal(per_layer.mean_, [[3], [15]])
    np.testing.assert_allclose(per_layer.scale_, [[np.sqrt(2)], [np.sqrt(75)]])
    np.testing.assert_allclose(per_layer.inverse_transform(per_layer.transform(x)), x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layer_scaler_per_neuron_is_a_standard_scaler(dtype: str) -> None:
    x = (np.random.default_rng(0).normal(size=(50, 24)) * np.linspace(0.1, 40, 24) + 7).astype(dtype)
    x[:, 5] = 0.1
    scaled = LayerScaler(3).fit_transform(x)
    assert scaled.dtype == dtype
    np.testing.assert_allclose(scaled, StandardScaler().fit_transform(x), atol=1e-4)
    assert (scaled[:, 5] == scaled[0, 5]).all()
    np.testing.assert_allclose(LayerScaler(3).fit(x).inverse_transform(scaled), x, rtol=1e-4)


def test_the_layer_scaler_is_a_transformer_of_scikit_learn() -> None:
    scaler = clone(LayerScaler(2, "per_layer"))
    assert scaler.get_params() == {"n_layers": 2, "mode": "per_layer"}
    assert scaler.fit(np.ones((2, 4))).get_feature_names_out().tolist() == ["x0", "x1", "x2", "x3"]
    for bad, error, message in (
        (LayerScaler(3), InvalidArgumentError, "rows of 4 values cannot be cut into n_layers=3"),
        (LayerScaler(0), InvalidArgumentError, "n_layers=0"),
        (LayerScaler("2"), InvalidTypeError, "n_layers='2' is not a whole number"),  # type: ignore[arg-type]
        (LayerScaler(2, "per_unit"), InvalidArgumentError, "mode='per_unit' is unknown: use 'per_neuron' or 'per_layer'"),
    ):
        with pytest.raises(error, match=message):
            bad.fit(np.ones((2, 4)))


@pytest.mark.parametrize(
    ("probe", "options", "expected"),
    [
        ("ridge", {}, ["standard", "probe"]),
        ("lda", {}, ["probe"]),
        (RidgeClassifier(), {}, ["probe"]),
        ("ridge", {"n_layers": 2}, ["layer_scaler", "probe"]),
        (RidgeClassifier(), {"n_layers": 2}, ["layer_scaler", "probe"]),
        ("mass_mean", {"n_layers": 2, "normalize_layers": "per_layer"}, ["layer_scaler", "probe"]),
        ("ridge", {"n_layers": 2, "normalize_layers": False}, ["probe"]),
        ("ridge", {"normalize_layers": False}, ["standard", "probe"]),
        ("ridge", {"preprocessing": "standard"}, ["standard", "probe"]),
        ("ridge", {"preprocessing": "standard", "n_layers": 2}, ["standard", "probe"]),
        ("ridge", {"preprocessing": "pca:3"}, ["standard", "pca", "probe"]),
        ("ridge", {"preprocessing": "standard+pca:3"}, ["standard", "pca", "probe"]),
        ("ridge", {"preprocessing": "pca+standard", "pca_components": 3}, ["pca", "standard", "probe"]),
        ("ridge", {"preprocessing": "standard+pca:3+standard"}, ["standard", "pca", "standard_2", "probe"]),
        ("lda", {"preprocessing": "pca:3"}, ["pca", "probe"]),
        ("ridge", {"preprocessing": "pca:3", "n_layers": 2}, ["layer_scaler", "pca", "probe"]),
    ],
)
def test_every_hidden_unit_is_brought_to_scale_once(probe: Any, options: dict[str, Any], expected: list[str]) -> None:
    x, y = along_a_direction()
    pipeline = make_pipeline_for(probe, **options)
    assert [name for name, _ in pipeline.steps] == expected
    assert converged(pipeline.fit(x, y))


def test_a_pipeline_of_one_layer_is_the_named_probe_of_a_sweep() -> None:
    x, y = along_a_direction()
    for name in NAMES:
        np.testing.assert_array_equal(make_pipeline_for(name).fit(x, y).predict(x), make_probe(name).fit(x, y).predict(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "ranking"}, InvalidArgumentError, "task='ranking'"),
        ({"n_layers": 0}, InvalidArgumentError, "n_layers=0"),
        ({"n_layers": 1.0}, InvalidTypeError, "n_layers=1.0"),
        ({"normalize_layers": "per_unit"}, InvalidArgumentError, "normalize_layers='per_unit' is unknown: use True, False"),
        ({"normalize_layers": 1}, InvalidArgumentError, "normalize_layers=1"),
        ({"params": {"c": 1}}, InvalidArgumentError, "no parameter 'c'"),
    ],
)
def test_a_pipeline_that_cannot_be_made_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_pipeline_for("ridge", **options)


# -- coefficients ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_layers": 3},
        {"n_layers": 3, "normalize_layers": "per_layer", "preprocessing": "pca:8"},
        {"preprocessing": "standard+pca:8"},
        {"preprocessing": "pca:8+standard"},
    ],
)
@pytest.mark.parametrize("name", LINEAR)
def test_coefficients_times_raw_activations_are_the_decision_function(name: str, options: dict[str, Any], classes: int) -> None:
    x, y = along_a_direction(classes=classes)
    x = x * np.linspace(0.1, 20, 30, dtype=np.float32) + 3
    pipeline = make_pipeline_for(name, **options).fit(x, y)
    n_layers = options.get("n_layers", 1)
    coef, intercept = coefficients(pipeline, n_layers)
    assert coef.shape == (1 if classes == 2 else classes, n_layers, 30 // n_layers)
    scores = np.einsum("nlh,klh->nk", x.reshape(200, n_layers, -1).astype(np.float64), coef) + intercept
    if name == "ensemble":
        assert np.mean((scores[:, 0] > 0 if classes == 2 else scores.argmax(axis=1)) == pipeline.predict(x)) > 0.97
    else:
        decision = pipeline.decision_function(x).reshape(scores.shape)
        np.testing.assert_allclose(scores, decision, atol=1e-4 * max(1, abs(decision).max()))


def test_coefficients_of_any_linear_estimator_behind_what_can_be_undone() -> None:
    x, y = along_a_direction()
    inner = make_pipeline(StandardScaler(with_mean=False), PCA(4, whiten=True))
    pipeline = make_pipeline(inner, "passthrough", SVC(kernel="linear")).fit(x, y)
    coef, intercept = coefficients(pipeline)
    np.testing.assert_allclose(x @ coef[0, 0] + intercept, pipeline.decision_function(x), atol=1e-4)


def test_an_estimator_without_coefficients_raises_an_error() -> None:
    x, y = along_a_direction(classes=3)
    fitted = make_pipeline_for("ridge").fit(x, y)
    for pipeline, n_layers, message in (
        (make_pipeline_for("mlp").fit(x, y), 1, "MLPClassifier is not linear"),
        (make_pipeline_for("majority").fit(x, y), 1, "DummyClassifier is not linear"),
        (make_pipeline_for("ridge"), 1, "RidgeClassifier is not fitted"),
        (SVC(kernel="linear", decision_function_shape="ovo").fit(x[:, :2], np.arange(200) % 4), 1, "6 directions for 4 scores"),
        (make_pipeline(MinMaxScaler(), RidgeClassifier()).fit(x, y), 1, "MinMaxScaler cannot be undone"),
        (fitted, 7, "rows of 30 values, which are not n_layers=7"),
        (fitted, 0, "n_layers=0"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            coefficients(pipeline, n_layers)


# -- evaluation ------------------------------------------------------------------------------------------------------------


def test_evaluation_of_two_classes_is_of_the_second() -> None:
    labels = np.array(["no", "no", "no", "yes", "yes"])
    predicted = np.array(["no", "yes", "no", "yes", "no"])
    found = evaluate_classification(predicted, np.array([-1.0, 0.5, -2.0, 1.0, -0.5]), labels, np.array(["no", "yes"]))
    assert found == pytest.approx({"accuracy": 0.6, "precision": 0.5, "recall": 0.5, "f1": 0.5, "auroc": 5 / 6})


def test_evaluation_of_several_classes_equals_scikit_learns_macro_average() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    proba = rng.dirichlet(np.ones(4), 50)
    found = evaluate_classification(predicted, proba, labels, np.arange(4))
    for name, oracle in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[name] == pytest.approx(oracle(labels, predicted, average="macro", zero_division=0)), name
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, proba, multi_class="ovr"))


def test_what_is_undefined_is_zero_as_in_lmprobe_but_an_area_is_nan() -> None:
    found = evaluate_classification([0, 0], [[0.9, 0.1], [0.8, 0.2]], [0, 0], [0, 1])
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (1, 0, 0, 0)
    assert np.isnan(found["auroc"])
    assert np.isnan(evaluate_classification([0, 1], None, [0, 1], [0, 1])["auroc"])
    assert evaluate_classification([0, 1], [[0.9, 0.1], [0.8, 0.2]], [0, 1], [0, 1])["auroc"] == 1


def test_evaluation_of_a_regression_equals_scikit_learn() -> None:
    x, y = numbers()
    found = evaluate_regression(x[:, 3], y)
    assert found == pytest.approx({"r2": r2_score(y, x[:, 3]), "mae": mean_absolute_error(y, x[:, 3])})
    constant = evaluate_regression([1.0, 2.0], [0.1, 0.1])
    assert np.isnan(constant["r2"])
    assert constant["mae"] == pytest.approx(1.4)


def test_labels_that_do_not_match_the_predictions_are_refused() -> None:
    for predicted, scores, labels, message in (
        ([0, 1], None, [0], "one label per prompt"),
        ([], None, [], "no labels"),
        ([0, 1], [0.5], [0, 1], "scores for 1 prompts and 2 labels"),
    ):
        with pytest.raises(LabelError, match=message):
            evaluate_classification(predicted, scores, labels, [0, 1])
    with pytest.raises(LabelError, match="one label per prompt"):
        evaluate_regression([1.0], [1.0, 2.0])


# -- lmprobe ---------------------------------------------------------------------------------------------------------------


@pytest.mark.few(8)
@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*does not support predict_proba:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_layers": 2},
        {"n_layers": 2, "normalize_layers": "per_layer"},
        {"n_layers": 2, "normalize_layers": False},
        {"preprocessing": "pca:5"},
        {"preprocessing": "standard+pca:5"},
        {"n_layers": 2, "preprocessing": "pca:5"},
    ],
)
@pytest.mark.parametrize("name", ["logistic_regression", "ridge", "ridge_regression"])
def test_predictions_are_those_of_lmprobe(name: str, options: dict[str, Any], dtype: str) -> None:
    pytest.importorskip("torch")
    lmprobe = pytest.importorskip("lmprobe")
    x, y = along_a_direction()
    x = (x * np.linspace(0.5, 20, 30, dtype=np.float32) + 3).astype(dtype)
    y = y if name != "ridge_regression" else (x[:, 0] / 10 + y).astype(np.float64)
    task = "regression" if name == "ridge_regression" else "classification"
    theirs_only = {key: value for key, value in options.items() if key != "n_layers"}
    theirs = lmprobe.Probe(classifier=name, task=task, random_state=0, **theirs_only)
    theirs.fit_from_activations(x[:100], y[:100], n_layers=options.get("n_layers", 1))
    ours = make_pipeline_for(name, task=task, **options).fit(x[:100], y[:100])
    expected = theirs.predict_from_activations(x[100:])
    if task == "regression":
        np.testing.assert_allclose(ours.predict(x[100:]), expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(ours.predict(x[100:]), expected)
    if name == "logistic_regression":
        np.testing.assert_allclose(ours.predict_proba(x[100:]), theirs.predict_proba_from_activations(x[100:]), atol=2e-3)
