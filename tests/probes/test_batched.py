"""Fits in bulk against scikit-learn's, fitted one by one in float64 until nothing changes any more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.errors import InvalidArgumentError, MissingDependencyError

pytest.importorskip("torch")

from lmprobe_zarr.probes import batched, bulk_logistic
from lmprobe_zarr.probes.batched import BATCHED, TOLERANCE, Bulk, FitRequest, solve_batched
from lmprobe_zarr.probes.classifiers import make_probe
from lmprobe_zarr.probes.devices import parse_device
from lmprobe_zarr.probes.gram import Solved
from lmprobe_zarr.typing import Array

pytestmark = pytest.mark.model
STRENGTHS = (0.01, 1.0, 100.0)


def rows(n: int, hidden: int, *, spread: float = 0.0, seed: int = 0) -> Array:
    """Random rows whose variance falls by a power along directions of their own, with an offset and one large unit."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0]
    x = (rng.standard_normal((n, hidden)) * (1 + np.arange(hidden)) ** -spread) @ turn + rng.standard_normal(hidden)
    x[:, 1] = 40 * x[:, 1] + 300
    return np.asarray(x, "float32")


def with_units(x: Array) -> tuple[Array, Array]:
    """The matrix with a row of zeros and a row for each unit behind it, whose decisions give the coefficients; and these rows."""
    hidden = x.shape[1]
    return np.concatenate([x, np.zeros((1, hidden), "float32"), np.eye(hidden, dtype="float32")]), np.arange(len(x), len(x) + hidden + 1)


def labels_for(x: Array, n_classes: int, seed: int = 1) -> Array:
    rng = np.random.default_rng(seed)
    z = (x - x.mean(0)) / x.std(0)
    scores = z @ rng.standard_normal((x.shape[1], n_classes)) + 4 * rng.standard_normal((len(x), n_classes))
    return np.asarray(scores.argmax(axis=1))


def scores_of(fit: Solved) -> Array:
    assert fit.outcome.scores is not None
    return fit.outcome.scores


def chances_of(fit: Solved) -> Array:
    assert fit.outcome.probabilities is not None
    return fit.outcome.probabilities


def converged_pipeline(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Newton's method, whose last step is smaller than any difference that is tested.
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-10, max_iter=500))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("n", "hidden", "spread", "n_classes"),
    [(240, 40, 0.0, 2), (240, 40, 0.8, 2), (60, 150, 0.8, 2), (200, 30, 0.8, 4)],
    ids=["tall", "tall, uneven", "wide, uneven", "four classes"],
)
def test_coefficients_are_those_of_scikit_learn_at_its_optimum(n: int, hidden: int, spread: float, n_classes: int) -> None:
    x = rows(n, hidden, spread=spread)
    y = labels_for(x, n_classes)
    classes = np.arange(n_classes)
    matrix, units = with_units(x)
    values = np.concatenate([y, np.zeros(len(units), int)])
    trains = [np.flatnonzero(np.arange(n) % 4 != fold) for fold in range(4)]
    requests = [FitRequest(train, units, values, classes, strength) for train in trains for strength in STRENGTHS]
    solved = solve_batched("logistic_regression", matrix, requests)
    for request, fit in zip(requests, solved, strict=True):
        assert fit is not None
        assert fit.ended
        assert request.strength is not None
        pipeline = converged_pipeline(request.strength).fit(x[request.train].astype(float), y[request.train])
        scaler, expected = pipeline[0], pipeline[1]
        scores = fit.outcome.scores
        assert scores is not None
        found = (scores[1:] - scores[0]).reshape(hidden, -1).T * scaler.scale_
        # Raw decisions of the row of zeros lose digits where a unit is far from zero.
        largest = max(1.0, float(np.abs(expected.coef_).max()))
        np.testing.assert_allclose(found, expected.coef_, atol=TOLERANCE * largest)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("shape", [(120, 30), (50, 90)])
@pytest.mark.parametrize("probe", ["ridge", "mass_mean"])
def test_exact_probes_predict_what_scikit_learn_does(probe: str, shape: tuple[int, int], n_classes: int) -> None:
    x = rows(*shape, spread=0.5)
    y = labels_for(x, n_classes)
    train, test = np.arange(len(x)) % 5 > 0, np.arange(len(x)) % 5 == 0
    request = FitRequest(np.flatnonzero(train), np.flatnonzero(test), y, np.arange(n_classes), None)
    (fit,) = solve_batched(probe, x, [request])
    assert fit is not None
    expected = make_probe(probe).fit(x[train].astype(float), y[train])
    wide = x[test].astype(float)
    np.testing.assert_array_equal(fit.outcome.predicted, expected.predict(wide))
    np.testing.assert_allclose(scores_of(fit), expected.decision_function(wide), rtol=1e-7, atol=1e-7)
    if probe == "mass_mean":
        np.testing.assert_allclose(chances_of(fit), expected.predict_proba(wide), atol=1e-7)
    else:
        assert fit.outcome.probabilities is None


@pytest.mark.parametrize("shape", [(120, 30), (50, 90)])
def test_regression_by_ridge(shape: tuple[int, int]) -> None:
    x = rows(*shape, spread=0.5)
    y = 1e6 + 1e-2 * x[:, 0].astype(float) + np.random.default_rng(0).standard_normal(len(x))
    train, test = np.arange(len(x)) % 5 > 0, np.arange(len(x)) % 5 == 0
    requests = [FitRequest(np.flatnonzero(train), np.flatnonzero(test), y, None, alpha) for alpha in STRENGTHS]
    for alpha, fit in zip(STRENGTHS, solve_batched("ridge_regression", x, requests), strict=True):
        assert fit is not None
        expected = make_probe("ridge_regression", task="regression", strength=alpha).fit(x[train].astype(float), y[train])
        np.testing.assert_allclose(fit.outcome.predicted - 1e6, expected.predict(x[test].astype(float)) - 1e6, rtol=1e-5, atol=1e-6)


def test_probabilities_and_predictions_of_logistic_regression() -> None:
    x = rows(150, 20, spread=0.5)
    y = labels_for(x, 3)
    train, test = np.flatnonzero(np.arange(150) % 3 > 0), np.flatnonzero(np.arange(150) % 3 == 0)
    (fit,) = solve_batched("logistic_regression", x, [FitRequest(train, test, y, np.arange(3), None)])
    assert fit is not None
    expected = converged_pipeline(1.0).fit(x[train].astype(float), y[train])
    np.testing.assert_allclose(chances_of(fit), expected.predict_proba(x[test].astype(float)), atol=1e-4)
    np.testing.assert_array_equal(fit.outcome.predicted, expected.predict(x[test].astype(float)))


def test_rows_that_count_twice_constant_units_and_rows_that_no_fit_names() -> None:
    x = rows(90, 12).astype("float64")
    x[:, 4] = 7.25
    x[:, 5] = np.where(np.arange(90) % 3 == 0, x[:, 5], 1e6)  # constant in training, not in the test rows
    y = labels_for(rows(90, 12), 2)
    train, test = np.flatnonzero(np.arange(90) % 3 > 0), np.flatnonzero(np.arange(90) % 3 == 0)
    twice = np.sort(np.concatenate([train, train[:20]]))
    with_nan = np.concatenate([x, np.full((3, 12), np.nan)])
    (fit,) = solve_batched("logistic_regression", with_nan, [FitRequest(twice, test, np.concatenate([y, [0, 0, 0]]), np.arange(2), None)])
    assert fit is not None
    expected = converged_pipeline(1.0).fit(x[twice], y[twice])
    np.testing.assert_allclose(scores_of(fit), expected.decision_function(x[test]), atol=1e-3)


def test_a_class_that_a_fold_lacks_is_never_predicted() -> None:
    x = rows(90, 10)
    y = labels_for(x, 3)
    train, test = np.flatnonzero((np.arange(90) % 3 > 0) & (y != 1)), np.flatnonzero(np.arange(90) % 3 == 0)
    for probe in ("logistic_regression", "ridge", "mass_mean"):
        (fit,) = solve_batched(probe, x, [FitRequest(train, test, y, np.arange(3), None)])
        assert fit is not None
        expected = (converged_pipeline(1.0) if probe == "logistic_regression" else make_probe(probe)).fit(x[train].astype(float), y[train])
        assert 1 not in fit.outcome.predicted
        assert fit.outcome.scores is not None
        assert np.isnan(fit.outcome.scores[:, 1]).all()
        np.testing.assert_allclose(fit.outcome.scores[:, 2], expected.decision_function(x[test].astype(float)), atol=1e-3)


def test_one_class_is_left_to_scikit_learn() -> None:
    x = rows(20, 5)
    request = FitRequest(np.arange(10), np.arange(10, 20), np.repeat([0, 1], 10), np.arange(2), None)
    assert [solve_batched(probe, x, [request]) for probe in BATCHED if probe != "ridge_regression"] == [[None]] * 3


def test_a_weak_penalty_goes_on_in_float64() -> None:
    x = rows(150, 20, spread=0.5)
    y = labels_for(x, 2)
    matrix, units = with_units(x)
    request = FitRequest(np.arange(150), units, np.concatenate([y, np.zeros(len(units), int)]), np.arange(2), 1e-4)
    (fit,) = solve_batched("logistic_regression", matrix, [request])
    assert fit is not None
    assert fit.ended
    pipeline = converged_pipeline(1e-4).fit(x.astype(float), y)
    scores = fit.outcome.scores
    assert scores is not None
    found = (scores[1:] - scores[0]) * pipeline[0].scale_
    np.testing.assert_allclose(found, pipeline[1].coef_[0], atol=TOLERANCE * max(1, np.abs(pipeline[1].coef_).max()))


def test_fits_that_do_not_fit_into_memory_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(100, 15, spread=0.5)
    y = labels_for(x, 2)
    folds = [(np.flatnonzero(np.arange(100) % 4 != f), np.flatnonzero(np.arange(100) % 4 == f)) for f in range(4)]
    requests = [FitRequest(*fold, y, np.arange(2), strength) for fold in folds for strength in STRENGTHS]
    whole = solve_batched("logistic_regression", x, requests)
    monkeypatch.setattr(batched, "_VALUES_AT_ONCE", 1)
    for one, other in zip(whole, solve_batched("logistic_regression", x, requests), strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(scores_of(one), scores_of(other), atol=1e-3)


def test_an_iteration_limit_is_no_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(100, 15, spread=0.5)
    monkeypatch.setattr(bulk_logistic, "_MOST_ITERATIONS", 2)
    (fit,) = solve_batched("logistic_regression", x, [FitRequest(np.arange(80), np.arange(80, 100), labels_for(x, 2), np.arange(2), 0.01)])
    assert fit is not None
    assert not fit.ended


def test_what_is_not_solved_is_not_there() -> None:
    x, y = rows(20, 5), np.arange(20) % 2
    train = np.arange(15)
    bulk = Bulk("ridge", x, "cpu")
    bulk.solve([FitRequest(train, np.arange(15, 20), y, np.arange(2), 1.0)])
    assert bulk.take(train, y, 1.0) is not None
    assert bulk.take(train, y, 2.0) is None
    assert not Bulk("", x, "cpu")


def test_a_device_that_does_not_exist_is_refused() -> None:
    for device, words in (("cuda:7", "there is cpu"), ("gpu", "there is cpu"), (3.5, "there is cpu"), ("meta", "cannot be used here")):
        with pytest.raises(InvalidArgumentError, match=words):
            parse_device(device, needed_by="solver='batched'", double=True)


def test_without_torch_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"lmprobe-zarr\[models\]"):
        parse_device("cpu", needed_by="solver='batched'")
