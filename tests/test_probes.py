"""Named classifiers and their scores, one matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes import accuracy, auroc, class_scores, converged, fit_in_place, make_probe, named_probes
from lmprobe_zarr.probes.mass_mean import MassMeanClassifier

NAMES = ["logistic_regression", "ridge", "lda", "svm", "mass_mean", "majority"]


def along_a_direction(n: int = 200, hidden: int = 30, classes: int = 2, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, hidden)).astype(np.float32)
    x[np.arange(n), y] += 3
    return x, y


def test_the_names_are_these_and_each_says_what_it_standardises() -> None:
    described = named_probes()
    assert list(described) == NAMES
    for name in ("logistic_regression", "ridge", "lda", "svm", "mass_mean"):
        assert "standardis" in described[name]


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


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_in_place_equals_a_fit_bit_for_bit(name: str) -> None:
    x, y = along_a_direction(hidden=600)
    x = x * np.linspace(0.01, 50, 600, dtype=np.float32) + 100
    plain = make_probe(name).fit(x.copy(), y)
    ours = fit_in_place(name, make_probe(name), x.copy(), y)
    np.testing.assert_array_equal(class_scores(ours, x), class_scores(plain, x))
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


def test_what_is_no_probe_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="no probe named 'logreg': use one of logistic_regression, ridge"):
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
