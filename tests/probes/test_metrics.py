"""Measures equal scikit-learn's, with weights too, which is what bootstrap resamples are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics as oracle

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.metrics import Outcome, measure_outcome, named_metrics, outcome_of, parse_metrics, score_outcome, undefined_reasons

N = 200


def outcome(n_classes: int = 2, seed: int = 0, *, ties: bool = False) -> Outcome:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, n_classes, N)
    logits = rng.normal(size=(N, n_classes)) + 1.3 * (true[:, None] == np.arange(n_classes))
    if ties:
        logits = np.round(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = logits[:, 1] - logits[:, 0] if n_classes == 2 else logits
    return Outcome(true, probabilities.argmax(axis=1), n_classes, scores, probabilities)


def recall_at(true: Any, scores: Any, rate: float, weights: Any = None) -> float:
    """Of all thresholds that leave few enough alarms, the largest recall; by trying each."""
    weights = np.ones(len(true)) if weights is None else weights
    found = [0.0]
    for threshold in np.unique(scores):
        positive = scores >= threshold
        if weights[positive & (true == 0)].sum() <= rate * weights[true == 0].sum() + 1e-9:
            found.append(weights[positive & (true == 1)].sum() / weights[true == 1].sum())
    return float(max(found))


def ece(true: Any, probabilities: Any, weights: Any = None) -> float:
    """Guo et al. (2017), equation 3, bin by bin."""
    weights = np.ones(len(true)) if weights is None else weights
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if weights[inside].sum():
            right = np.average(predicted[inside] == true[inside], weights=weights[inside])
            total += weights[inside].sum() / weights.sum() * abs(right - np.average(confidence[inside], weights=weights[inside]))
    return total


def expected(name: str, o: Outcome, w: Any = None) -> float:
    average = "binary" if o.n_classes == 2 else "macro"
    options: dict[str, Any] = {"average": average, "zero_division": 0, "sample_weight": w}
    labels = np.arange(o.n_classes)
    ranks: Any = o.scores
    one_hot = o.true[:, None] == labels
    simple: dict[str, Any] = {
        "accuracy": lambda: oracle.accuracy_score(o.true, o.predicted, sample_weight=w),
        "balanced_accuracy": lambda: oracle.balanced_accuracy_score(o.true, o.predicted, sample_weight=w),
        "f1": lambda: oracle.f1_score(o.true, o.predicted, **options),
        "precision": lambda: oracle.precision_score(o.true, o.predicted, **options),
        "recall": lambda: oracle.recall_score(o.true, o.predicted, **options),
        "auroc": lambda: oracle.roc_auc_score(o.true if o.n_classes == 2 else one_hot, ranks, average="macro", sample_weight=w),
        "auprc": lambda: oracle.average_precision_score(o.true if o.n_classes == 2 else one_hot, ranks, average="macro", sample_weight=w),
        "log_loss": lambda: oracle.log_loss(o.true, o.probabilities, labels=labels, sample_weight=w),
        "brier": lambda: np.average(((o.probabilities - one_hot) ** 2).sum(axis=1), weights=w) / (2 if o.n_classes == 2 else 1),
        "ece": lambda: ece(o.true, o.probabilities, w),
        "recall_at_fpr_0.1": lambda: recall_at(o.true, o.scores, 0.1, w),
    }
    return float(simple[name]())


CLASSES = [*named_metrics("classification")[:-1], "recall_at_fpr_0.1"]


@pytest.mark.few(12)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("name", CLASSES)
def test_measures_of_classes_equal_scikit_learns_with_and_without_weights(name: str, n_classes: int, ties: bool) -> None:
    if name.startswith("recall_at") and n_classes > 2:
        return
    given = outcome(n_classes, ties=ties)
    (metric,) = parse_metrics(name, "classification", n_classes)
    drawn = np.random.default_rng(1).multinomial(N, np.full(N, 1 / N), size=3).astype(float)
    found = measure_outcome(metric, given, np.vstack([np.ones((1, N)), drawn]))
    wanted = [expected(name, given), *(expected(name, given, weights) for weights in drawn)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_the_brier_score_of_two_classes_is_that_of_the_second() -> None:
    given = outcome()
    assert given.probabilities is not None
    values, _ = score_outcome(given, parse_metrics("brier", "classification", 2))
    assert values[0] == pytest.approx(oracle.brier_score_loss(given.true, given.probabilities[:, 1]), abs=1e-12)


def test_measures_of_values_equal_scikit_learns_and_scipys() -> None:
    rng = np.random.default_rng(0)
    true = np.round(rng.normal(size=N), 1)
    given = Outcome(true, true + rng.normal(size=N))
    values, why = score_outcome(given, parse_metrics(["r2", "mae", "spearman"], "regression"))
    wanted = [
        oracle.r2_score(true, given.predicted),
        oracle.mean_absolute_error(true, given.predicted),
        spearmanr(true, given.predicted).statistic,
    ]
    np.testing.assert_allclose(values, wanted, atol=1e-12)
    assert why == 0
    # Drawn twice is the same as there twice.
    weights = rng.integers(0, 3, N).astype(float)
    rows = np.repeat(np.arange(N), weights.astype(int))
    metric = parse_metrics("spearman", "regression")[0]
    assert measure_outcome(metric, given, weights[None])[0] == pytest.approx(spearmanr(true[rows], given.predicted[rows]).statistic)


@pytest.mark.parametrize(
    ("given", "name", "reason"),
    [
        (Outcome(np.array([0, 1]), np.array([0, 1]), 2), "auroc", "no score per class"),
        (Outcome(np.array([1, 1]), np.array([0, 1]), 2, np.array([0.1, 0.2])), "auprc", "a single class"),
        (Outcome(np.array([0, 1]), np.array([0, 1]), 2, np.array([0.1, np.inf])), "auroc", "not finite"),
        (Outcome(np.array([0, 1]), np.array([0, 1]), 2), "log_loss", "no probabilities"),
        (Outcome(np.array([0, 2]), np.array([0, 1]), 3, np.array([[0, 1, np.nan], [1, 0, np.nan]])), "auroc", "training fold lacks"),
        (Outcome(np.array([1.0, 1.0]), np.array([0.0, 1.0])), "r2", "all targets"),
        (Outcome(np.array([1.0, 2.0]), np.array([1.0, 1.0])), "spearman", "all predictions"),
    ],
)
def test_what_is_undefined_is_nan_with_its_reason(given: Outcome, name: str, reason: str) -> None:
    metrics = parse_metrics(name, "classification" if given.n_classes else "regression", given.n_classes)
    values, why = score_outcome(given, metrics)
    assert np.isnan(values[0])
    assert reason in undefined_reasons(why, metrics[0])[0]


def test_a_class_that_was_not_trained_on_has_no_probability_and_no_score() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), np.repeat(["a", "c"], 20)
    fitted = LogisticRegression().fit(x, y)
    given = outcome_of(fitted, x, np.repeat([0, 2], 20), np.array(["a", "b", "c"]), needs=("scores", "probabilities"), known=np.unique(y))
    assert given.scores is not None
    assert given.probabilities is not None
    assert np.isnan(given.scores[:, 1]).all()
    assert (given.probabilities[:, 1] == 0).all()
    np.testing.assert_array_equal(given.probabilities[:, [0, 2]], fitted.predict_proba(x))
    np.testing.assert_array_equal(given.scores[:, 2], fitted.decision_function(x))


@pytest.mark.parametrize(
    ("given", "task", "error", "message"),
    [
        ("acuracy", "classification", InvalidArgumentError, "no metric 'acuracy'.*: use some of accuracy, .*recall_at_fpr_0.01"),
        ("r2", "classification", InvalidArgumentError, "'r2' is not for classification"),
        ("auroc", "regression", InvalidArgumentError, "'auroc' is not for regression: use some of r2, mae, spearman"),
        (["mae", "mae"], "regression", InvalidArgumentError, "holds one twice"),
        ([], "regression", InvalidArgumentError, "metrics is empty"),
        (3, "regression", InvalidTypeError, "no names"),
        ("recall_at_fpr_1.5", "classification", InvalidArgumentError, "no metric 'recall_at_fpr_1.5'"),
        ("recall_at_fpr_0.1", "regression", InvalidArgumentError, "not for regression"),
    ],
)
def test_metrics_that_there_are_not_are_refused(given: Any, task: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_metrics(given, task, 2)


def test_recall_at_a_rate_is_for_two_classes() -> None:
    with pytest.raises(InvalidArgumentError, match="two classes, and there are 3"):
        parse_metrics("recall_at_fpr_0.01", "classification", 3)
