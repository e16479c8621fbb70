"""Scores of a fitted classifier or regressor on prompts that it has not seen. Never fits anything.

Every measure is a function of the predictions and of one weight per prompt and resample. So a score (all weights 1) and its bootstrap
distribution (each weight counts how often its prompt was drawn) come from the same code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Array, Estimator, Floats, is_listed

__all__ = [
    "DEFAULT_METRICS",
    "FAILED",
    "NOT_STORED",
    "Metric",
    "Outcome",
    "accuracy",
    "auroc",
    "class_scores",
    "measure_outcome",
    "named_metrics",
    "outcome_of",
    "parse_metrics",
    "power_of_two",
    "score_outcome",
    "undefined_reasons",
]

#: Why a score may be NaN; a fit's reasons are the sum of these bits.
_NO_SCORES, _NOT_FINITE, _ONE_CLASS, _NEW_CLASS, _CONSTANT_TRUE, _CONSTANT_PREDICTED, _NO_PROBABILITIES, NOT_STORED = (
    1 << bit for bit in range(8)
)
#: The fit raised an error. A pair of bits that no other fit has, one of a classification and one of a regression: stores of scores keep the
#: reasons in a byte, whose bits are all in use.
FAILED: Final = _NO_SCORES | _CONSTANT_TRUE
REASONS: Final[Mapping[int, str]] = {
    _NO_SCORES: "the estimator gives no score per class",
    _NOT_FINITE: "the estimator's scores are not finite",
    _ONE_CLASS: "the test fold holds a single class",
    _NEW_CLASS: "the test fold holds a class that the training fold lacks",
    _CONSTANT_TRUE: "all targets of the test fold are equal",
    _CONSTANT_PREDICTED: "all predictions of the test fold are equal",
    _NO_PROBABILITIES: "the estimator gives no probabilities",
    NOT_STORED: "the variable holds nothing in some layers",
}
DEFAULT_METRICS: Final[Mapping[str, tuple[str, ...]]] = {"classification": ("accuracy", "auroc"), "regression": ("r2", "mae")}
_ECE_BINS: Final = 15
_AT_FPR: Final = re.compile(r"recall_at_fpr_(0?\.\d+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The predictions of a fitted probe for some prompts, with the true labels or values.

    Parameters
    ----------
    true : ndarray, shape (prompt,)
        The number of each prompt's class, or its value for a regression.
    predicted : ndarray, shape (prompt,)
        The same, as the probe predicts it.
    n_classes : int
        Of all labels, whether or not they occur here; 0 for a regression.
    scores : ndarray of float64, shape (prompt,) or (prompt, class), optional
        What prompts are ranked by: a single column for two classes. NaN for classes that the probe was not trained on.
    probabilities : ndarray of float64, shape (prompt, class), optional
        0 for classes that the probe was not trained on.
    """

    true: Array
    predicted: Array
    n_classes: int = 0
    scores: Floats | None = None
    probabilities: Floats | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One measure.

    Parameters
    ----------
    name : str
    task : {"classification", "regression"}
    needs : {"labels", "scores", "probabilities", "values"}
        Which part of a probe's outcome it uses.
    long_name, units : str
        As CF attributes.
    measure : callable
        Outcome and weights, shape (resample, prompt), to float64, shape (resample,); NaN where undefined.
    larger_is_better : bool
    """

    name: str
    task: str
    needs: str
    long_name: str
    measure: Callable[[Outcome, Floats], Floats]
    units: str = "1"
    larger_is_better: bool = True


# -- measures of classes ---------------------------------------------------------------------------------------------------


def _share(weights: Floats, values: Array) -> Floats:
    """The weighted mean of each resample."""
    return np.asarray((weights @ values.astype(np.float64)) / weights.sum(axis=1))


def _accuracy(outcome: Outcome, weights: Floats) -> Floats:
    """The share of prompts whose label is predicted."""
    return _share(weights, outcome.predicted == outcome.true)


def _counts(outcome: Outcome, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weights of true positives, of predicted and of true members of each class; each (resample, class)."""
    classes = np.arange(outcome.n_classes)
    predicted, true = (values[:, None] == classes for values in (outcome.predicted, outcome.true))
    hits, claimed, present = (weights @ table.astype(np.float64) for table in (predicted & true, predicted, true))
    return hits, claimed, present


def _ratio(over: Floats, under: Floats) -> Floats:
    """The quotient; 0 where the divisor is 0, as with scikit-learn's ``zero_division=0``."""
    return np.divide(over, under, out=np.zeros(np.broadcast(over, under).shape), where=under > 0)


def _balanced_accuracy(outcome: Outcome, weights: Floats) -> Floats:
    """The mean over the classes that occur of the share of each that is found. Source: scikit-learn's ``balanced_accuracy_score``."""
    hits, _, present = _counts(outcome, weights)
    return np.asarray(_ratio(hits, present).sum(axis=1) / (present > 0).sum(axis=1))


def _of_classes(outcome: Outcome, weights: Floats, which: str) -> Floats:
    """Precision, recall or F1 of the second of two classes; of more, the mean over those that occur among labels or predictions."""
    hits, claimed, present = _counts(outcome, weights)
    over, under = {"precision": (hits, claimed), "recall": (hits, present), "f1": (2 * hits, claimed + present)}[which]
    each = _ratio(over, under)
    if outcome.n_classes == 2:
        return np.asarray(each[:, 1])
    counted = (claimed + present) > 0
    return np.asarray((each * counted).sum(axis=1) / counted.sum(axis=1))


# -- measures of ranks -----------------------------------------------------------------------------------------------------


def _levels(scores: Floats, positive: Array, weights: Floats) -> tuple[Floats, Floats]:
    """Weights of positives and of negatives at each different score, ascending; each (resample, level)."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    taken, positive = weights[:, order], positive[order]
    return np.add.reduceat(taken * positive, starts, axis=1), np.add.reduceat(taken * ~positive, starts, axis=1)


def _auroc_of(scores: Floats, positive: Array, weights: Floats) -> Floats:
    positives, negatives = _levels(scores, positive, weights)
    below = np.cumsum(negatives, axis=1) - negatives
    with np.errstate(invalid="ignore"):
        return np.asarray((positives * (below + negatives / 2)).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1)))


def _auprc_of(scores: Floats, positive: Array, weights: Floats) -> Floats:
    positives, negatives = (counts[:, ::-1] for counts in _levels(scores, positive, weights))
    found, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((positives * _ratio(found, found + alarms)).sum(axis=1) / found[:, -1])


def _recall_at_fpr_of(scores: Floats, positive: Array, weights: Floats, rate: float) -> Floats:
    positives, negatives = (counts[:, ::-1] for counts in _levels(scores, positive, weights))
    found, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
    with np.errstate(invalid="ignore"):
        # A small tolerance: a rate of 0.1 of 30 prompts allows 3, and the product may be slightly less.
        allowed = alarms <= rate * alarms[:, -1:] * (1 + 1e-12)
        reached = np.where(allowed, found, 0).max(axis=1) / found[:, -1]
    return np.asarray(np.where(alarms[:, -1] > 0, reached, np.nan))


def _ranked(outcome: Outcome, weights: Floats, of: Callable[[Floats, Array, Floats], Floats]) -> Floats:
    """A measure of the second of two classes; of more, the mean over those that occur, each against the rest."""
    assert outcome.scores is not None  # noqa: S101  (`score_outcome` looks first)
    if outcome.scores.ndim == 1:
        return of(outcome.scores, outcome.true == 1, weights)
    return np.asarray(np.mean([of(outcome.scores[:, k], outcome.true == k, weights) for k in np.unique(outcome.true)], axis=0))


# -- measures of probabilities ---------------------------------------------------------------------------------------------


def _probabilities(outcome: Outcome) -> Floats:
    assert outcome.probabilities is not None  # noqa: S101  (`score_outcome` looks first)
    return outcome.probabilities


def _log_loss(outcome: Outcome, weights: Floats) -> Floats:
    """The mean of −ln of the probability of the true class, which counts as 2.2e-16 at least, as in scikit-learn's ``log_loss``."""
    probabilities = _probabilities(outcome)[np.arange(len(outcome.true)), outcome.true]
    return _share(weights, -np.log(np.clip(probabilities, np.finfo(np.float64).eps, 1)))


def _brier(outcome: Outcome, weights: Floats) -> Floats:
    """The mean squared error of the probabilities, summed over the classes (two classes: of the second alone, which is half of it).

    Source: G. W. Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78 (1950); halved for
    two classes as everywhere since, and as scikit-learn's ``brier_score_loss``.
    """
    probabilities = _probabilities(outcome)
    off = ((probabilities - (outcome.true[:, None] == np.arange(outcome.n_classes))) ** 2).sum(axis=1)
    return _share(weights, off / 2 if outcome.n_classes == 2 else off)


def _ece(outcome: Outcome, weights: Floats) -> Floats:
    """Expected calibration error: by how much confidence and accuracy differ, over 15 bins of equal width of the confidence.

    Source: C. Guo et al., "On calibration of modern neural networks" (2017), arXiv:1706.04599, equation 3: the confidence is the
    largest probability, the prediction its class.
    """
    probabilities = _probabilities(outcome)
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == outcome.true) - confidence
    bins = np.clip(np.ceil(confidence * _ECE_BINS).astype(int) - 1, 0, _ECE_BINS - 1)
    table = np.where(bins[:, None] == np.arange(_ECE_BINS), gap[:, None], 0.0)
    return np.asarray(np.abs(weights @ table).sum(axis=1) / weights.sum(axis=1))


# -- measures of values ----------------------------------------------------------------------------------------------------


def _r2(outcome: Outcome, weights: Floats) -> Floats:
    """1 less the squared error by the variance of the targets: 1 is perfect, 0 no better than their mean."""
    true = outcome.true.astype(np.float64)
    size = power_of_two(true)
    off = weights @ ((outcome.predicted - true) / size) ** 2
    mean = _share(weights, true)
    spread = np.einsum("bn,bn->b", weights, ((true - mean[:, None]) / size) ** 2)
    # Of a resample whose targets are all equal, what is left is the rounding error of their mean.
    rounded = (4 * np.finfo(np.float64).eps * np.abs(true / size).max(initial=0)) ** 2 * weights.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(spread > rounded, 1 - off / spread, np.nan))


def power_of_two(values: Floats) -> float:
    """About the range of the values: what is divided by it stays exact, and its squares neither overflow nor vanish."""
    return float(np.ldexp(1.0, int(np.frexp(np.ptp(values))[1]) - 1)) if len(values) else 1.0


def _mae(outcome: Outcome, weights: Floats) -> Floats:
    """The mean absolute error, in the units of the target."""
    return _share(weights, np.abs(outcome.predicted - outcome.true))


def _spearman(outcome: Outcome, weights: Floats) -> Floats:
    """Spearman's rank correlation, −1 to 1; equal values share the mean of their ranks."""
    ranks = [_ranks(np.asarray(values, np.float64), weights) for values in (outcome.predicted, outcome.true)]
    total = weights.sum(axis=1, keepdims=True)
    predicted, true = (r - (weights * r).sum(axis=1, keepdims=True) / total for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        norm = np.sqrt((weights * predicted**2).sum(axis=1) * (weights * true**2).sum(axis=1))
        return np.asarray(np.where(norm > 0, (weights * predicted * true).sum(axis=1) / norm, np.nan))


def _ranks(values: Floats, weights: Floats) -> Floats:
    """The rank of each prompt in each resample, shape (resample, prompt)."""
    levels, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    at = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(at, axis=1) - at / 2)[:, level])


_METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classification", "labels", "accuracy", _accuracy),
        Metric("balanced_accuracy", "classification", "labels", "balanced accuracy", _balanced_accuracy),
        Metric("f1", "classification", "labels", "F1", partial(_of_classes, which="f1")),
        Metric("precision", "classification", "labels", "precision", partial(_of_classes, which="precision")),
        Metric("recall", "classification", "labels", "recall", partial(_of_classes, which="recall")),
        Metric("auroc", "classification", "scores", "area under the ROC curve", partial(_ranked, of=_auroc_of)),
        Metric("auprc", "classification", "scores", "area under the precision-recall curve", partial(_ranked, of=_auprc_of)),
        Metric("log_loss", "classification", "probabilities", "log loss", _log_loss, "nat", larger_is_better=False),
        Metric("brier", "classification", "probabilities", "Brier score", _brier, larger_is_better=False),
        Metric("ece", "classification", "probabilities", "expected calibration error", _ece, larger_is_better=False),
        Metric("r2", "regression", "values", "R²", _r2),
        Metric("mae", "regression", "values", "mean absolute error", _mae, "", larger_is_better=False),
        Metric("spearman", "regression", "values", "Spearman's rank correlation", _spearman),
    )
}


def named_metrics(task: str | None = None) -> list[str]:
    """Names that `parse_metrics` takes; ``recall_at_fpr_0.01`` stands for any false-positive rate between 0 and 1.

    Parameters
    ----------
    task : {"classification", "regression"}, optional
        Those for it only.
    """
    names = [name for name, metric in _METRICS.items() if task in (None, metric.task)]
    return names if task == "regression" else [*names, "recall_at_fpr_0.01"]


def parse_metrics(metrics: str | Iterable[str] | None, task: str, n_classes: int = 0) -> tuple[Metric, ...]:
    """The metrics of these names, in the given order.

    Parameters
    ----------
    metrics : str, iterable of str, or None
        None: accuracy and AUROC, or R² and the mean absolute error.
    task : {"classification", "regression"}
    n_classes : int
        Recall at a false-positive rate is for two classes only.

    Raises
    ------
    InvalidTypeError
        `metrics` are no names.
    InvalidArgumentError
        An unknown name, one for the other task, one twice, or none.
    """
    if metrics is None:
        metrics = DEFAULT_METRICS[task]
    listed = [metrics] if isinstance(metrics, str) else list(metrics) if is_listed(metrics) else metrics
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InvalidTypeError(f"metrics={metrics!r} are no names: give some of {', '.join(named_metrics(task))}")
    if not listed:
        raise InvalidArgumentError(f"metrics is empty: give some of {', '.join(named_metrics(task))}")
    found = tuple(_parse_metric(name, task, n_classes) for name in listed)
    if len(set(listed)) < len(listed):
        raise InvalidArgumentError(f"metrics={listed!r} holds one twice: name each once")
    return found


def _parse_metric(name: str, task: str, n_classes: int) -> Metric:
    at = _AT_FPR.fullmatch(name)
    if at is not None and task == "classification":
        if n_classes != 2:
            raise InvalidArgumentError(f"metric {name!r} is for two classes, and there are {n_classes}: leave it out, or use 'auroc'")
        rate = float(at[1])
        return Metric(name, task, "scores", f"recall at a false-positive rate of at most {rate:g}",
                      partial(_ranked, of=partial(_recall_at_fpr_of, rate=rate)))  # fmt: skip
    if name not in _METRICS and at is None:
        raise InvalidArgumentError(
            f"there is no metric {name!r}{nearest(name, named_metrics(task))}: use some of {', '.join(named_metrics(task))}"
        )
    if at is not None or _METRICS[name].task != task:
        raise InvalidArgumentError(f"metric {name!r} is not for {task}: use some of {', '.join(named_metrics(task))}")
    return _METRICS[name]


# -- what a probe predicts -----------------------------------------------------------------------------------------------------


def class_scores(estimator: Estimator, activations: Array) -> Array | None:
    """What a fitted classifier ranks prompts by: its decision function, else its probabilities, else None.

    Parameters
    ----------
    estimator : fitted classifier
    activations : ndarray of float, shape (prompt, hidden)

    Returns
    -------
    ndarray of float, shape (prompt,) or (prompt, class), or None
        One column for two classes (larger means the second of ``classes_``). Also None where the decision function has
        another number of columns than there are classes (one against one).
    """
    n_classes = len(estimator.classes_) if hasattr(estimator, "classes_") else 0
    for method in ("decision_function", "predict_proba"):
        if not hasattr(estimator, method):
            continue
        scores = np.asarray(getattr(estimator, method)(activations))
        if scores.ndim == 2 and scores.shape[1] == n_classes == 2:
            return np.asarray(scores[:, 1] - scores[:, 0] if method == "decision_function" else scores[:, 1])
        if (scores.ndim == 1 and n_classes == 2) or (scores.ndim == 2 and scores.shape[1] == n_classes):
            return scores
    return None


def outcome_of(
    estimator: Estimator, activations: Any, true: Array, classes: Array | None, *, needs: Iterable[str], known: Array
) -> Outcome:
    """The predictions of a fitted estimator for some prompts.

    Parameters
    ----------
    estimator : fitted estimator
    activations : what it predicts from, one row per prompt
    true : ndarray, shape (prompt,)
        The number of each prompt's class among `classes`; or its value.
    classes : ndarray, shape (class,), or None
        All labels, sorted; None for a regression.
    needs : iterable of str
        Which parts of the outcome are needed: "scores", "probabilities".
    known : ndarray, shape (class,)
        Labels of the training prompts, which are the estimator's classes where it has no ``classes_``.
    """
    predicted = np.asarray(estimator.predict(activations))
    if classes is None:
        return Outcome(true, predicted.astype(np.float64).reshape(len(true)))
    places = np.searchsorted(classes, np.asarray(getattr(estimator, "classes_", known)))
    scores = class_scores(estimator, activations) if "scores" in needs else None
    probabilities = None
    if "probabilities" in needs and hasattr(estimator, "predict_proba"):
        probabilities = np.zeros((len(true), len(classes)))
        probabilities[:, places] = estimator.predict_proba(activations)
    if scores is not None:
        scores = np.asarray(scores, np.float64)
        if len(places) < len(classes):
            # The training fold lacks a class: its column of scores stays NaN.
            columns = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
            scores = np.full((len(true), len(classes)), np.nan)
            scores[:, places] = columns
    return Outcome(true, np.searchsorted(classes, predicted), len(classes), scores, probabilities)


def measure_outcome(metric: Metric, outcome: Outcome, weights: Floats) -> Floats:
    """One measure by weights, shape (resample, prompt), as shape (resample,); NaN where it is undefined."""
    return np.full(len(weights), np.nan) if _why_undefined(metric, outcome) else metric.measure(outcome, weights)


def score_outcome(outcome: Outcome, metrics: Iterable[Metric]) -> tuple[list[float], int]:
    """The value of each measure, and the reasons of those that are NaN, as bits for :func:`undefined_reasons`."""
    ones = np.ones((1, len(outcome.true)))
    values, reasons = [], 0
    for metric in metrics:
        why = _why_undefined(metric, outcome)
        values.append(np.nan if why else float(metric.measure(outcome, ones)[0]))
        reasons |= why
    return values, reasons


def _why_undefined(metric: Metric, outcome: Outcome) -> int:
    if metric.needs == "scores":
        return _why_unranked(outcome)
    if metric.needs == "probabilities":
        if outcome.probabilities is None:
            return _NO_PROBABILITIES
        return 0 if np.isfinite(outcome.probabilities).all() else _NOT_FINITE
    if metric.needs == "values" and not np.isfinite(outcome.predicted).all():
        return _NOT_FINITE
    if metric.name in ("r2", "spearman") and not np.ptp(outcome.true):
        return _CONSTANT_TRUE
    return _CONSTANT_PREDICTED if metric.name == "spearman" and not np.ptp(outcome.predicted) else 0


def _why_unranked(outcome: Outcome) -> int:
    if outcome.scores is None:
        return _NO_SCORES
    present = np.unique(outcome.true)
    if len(present) < 2:
        return _ONE_CLASS
    columns = outcome.scores if outcome.scores.ndim == 1 else outcome.scores[:, present]
    if outcome.scores.ndim == 2 and np.isnan(columns).all(axis=0).any():
        return _NEW_CLASS
    return 0 if np.isfinite(columns).all() else _NOT_FINITE


def undefined_reasons(bits: int, metric: Metric) -> list[str]:
    """The reasons among `bits` for which this measure may be NaN, as texts."""
    needed = {
        "scores": _NO_SCORES | _NOT_FINITE | _ONE_CLASS | _NEW_CLASS,
        "probabilities": _NO_PROBABILITIES | _NOT_FINITE,
        "values": _CONSTANT_TRUE | _CONSTANT_PREDICTED | _NOT_FINITE,
    }
    return [text for bit, text in REASONS.items() if bits & bit & (needed.get(metric.needs, 0) | NOT_STORED)]


# -- for single probes -----------------------------------------------------------------------------------------------------


def accuracy(predicted: Array, labels: Array) -> float:
    """The share of prompts whose label is predicted, 0 to 1.

    Parameters
    ----------
    predicted, labels : ndarray, shape (prompt,)
    """
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def auroc(scores: Array | None, labels: Array, classes: Array) -> tuple[float, str]:
    """Area under the ROC curve, 0 to 1, and why it is NaN where it is (else an empty text).

    Two classes: the chance that a prompt of the second class scores higher than one of the first, ties counting half. More:
    the mean over the classes that occur of each against the rest, every class weighing the same, by its own column of scores.

    Parameters
    ----------
    scores : ndarray of float, shape (prompt,) or (prompt, class), or None
        From :func:`class_scores`.
    labels : ndarray, shape (prompt,)
    classes : ndarray, shape (class,)
        ``classes_`` of the estimator: what the columns mean.

    Notes
    -----
    Source: T. Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006); its multi-class mean is
    scikit-learn's ``roc_auc_score(average="macro", multi_class="ovr")``, here also for scores that are no probabilities.
    """
    if scores is None:
        return np.nan, REASONS[_NO_SCORES]
    if not np.isfinite(scores).all():
        return np.nan, REASONS[_NOT_FINITE]
    if len(np.unique(labels)) < 2:
        return np.nan, REASONS[_ONE_CLASS]
    if not np.isin(labels, classes).all():
        return np.nan, REASONS[_NEW_CLASS]
    codes = np.searchsorted(classes, labels)
    outcome = Outcome(codes, codes, len(classes), np.asarray(scores, np.float64))
    return float(_ranked(outcome, np.ones((1, len(codes))), _auroc_of)[0]), ""
