"""Scores of a fitted classifier or regressor on prompts that it has not seen. Never fits anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import LabelError

__all__ = ["accuracy", "auroc", "class_scores", "evaluate_classification", "evaluate_regression"]

Array = npt.NDArray[Any]


def accuracy(predicted: Array, labels: Array) -> float:
    """The share of prompts whose label is predicted, 0 to 1.

    Parameters
    ----------
    predicted, labels : ndarray, shape (prompt,)
    """
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def class_scores(estimator: Any, activations: Array) -> Array | None:
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
    from sklearn.metrics import roc_auc_score

    if scores is None:
        return np.nan, "the estimator gives no score per class"
    if not np.isfinite(scores).all():
        return np.nan, "the estimator's scores are not finite"
    present = np.unique(labels)
    if len(present) < 2:
        return np.nan, "the test fold holds a single class"
    if not np.isin(present, classes).all():
        return np.nan, "the test fold holds a class that the training fold lacks"
    if scores.ndim == 1:
        return float(roc_auc_score(labels == classes[1], scores)), ""
    columns = [int(np.flatnonzero(classes == label)[0]) for label in present]
    return float(np.mean([roc_auc_score(labels == classes[k], scores[:, k]) for k in columns])), ""


def evaluate_classification(predicted: Any, scores: Any, labels: Any, classes: Any) -> dict[str, float]:
    """Accuracy, F1, precision, recall and AUROC, each 0 to 1.

    For two classes F1, precision and recall are those of the second class. For more they are the mean over the classes that
    occur among labels or predictions, every class weighing the same. Where one is undefined, because a class is never
    predicted or never occurs, it counts as 0, as scikit-learn's ``zero_division=0`` says.

    Parameters
    ----------
    predicted, labels : array, shape (prompt,)
    scores : array of float, shape (prompt,) or (prompt, class), or None
        Decision function or probabilities; None, where the estimator has neither, leaves AUROC undefined.
    classes : array, shape (class,)
        ``classes_`` of the estimator.

    Returns
    -------
    dict
        "accuracy", "f1", "precision", "recall", and "auroc", which is NaN where :func:`auroc` is.

    Raises
    ------
    LabelError
        No labels, or another number of labels than of predictions or scores.
    """
    predicted, labels, classes = np.asarray(predicted), np.asarray(labels), np.asarray(classes)
    _check_lengths(predicted, labels)
    if scores is not None:
        scores = np.asarray(scores)
        if len(scores) != len(labels):
            raise LabelError(f"there are scores for {len(scores)} prompts and {len(labels)} labels: give one label per prompt")
        if scores.ndim == 2 and scores.shape[1] == 2:
            scores = scores[:, 1]
    counted = classes[1:] if len(classes) == 2 else _present(labels, predicted)
    each = [_precision_recall_f1(predicted == label, labels == label) for label in counted]
    precision, recall, f1 = (float(np.mean(values)) for values in zip(*each, strict=True))
    area, _ = auroc(scores, labels, classes)
    return {"accuracy": accuracy(predicted, labels), "f1": f1, "precision": precision, "recall": recall, "auroc": area}


def evaluate_regression(predicted: Any, targets: Any) -> dict[str, float]:
    """R² (1 is perfect, 0 no better than the mean) and the mean absolute error in the units of the target.

    Parameters
    ----------
    predicted, targets : array of float, shape (prompt,)

    Returns
    -------
    dict
        "r2", which is NaN where all targets are equal, and "mae".

    Raises
    ------
    LabelError
        No targets, or another number of targets than of predictions.
    """
    predicted, targets = np.asarray(predicted, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    _check_lengths(predicted, targets)
    spread = float(np.sum((targets - targets.mean()) ** 2))
    off = predicted - targets
    constant = bool((targets == targets[0]).all()) or not spread
    return {"r2": np.nan if constant else 1 - float(off @ off) / spread, "mae": float(np.abs(off).mean())}


def _check_lengths(predicted: Array, labels: Array) -> None:
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise LabelError(f"predictions have shape {predicted.shape} and labels {labels.shape}: give one label per prompt")
    if not len(labels):
        raise LabelError("there are no labels: nothing can be scored on no prompts")


def _present(labels: Array, predicted: Array) -> list[Any]:
    return list(dict.fromkeys([*labels.tolist(), *predicted.tolist()]))


def _precision_recall_f1(predicted: Array, true: Array) -> tuple[float, float, float]:
    """Of one class, from truth values; 0 where nothing is there to divide by."""
    hits, said, are = (int(np.sum(values)) for values in (predicted & true, predicted, true))
    return hits / said if said else 0.0, hits / are if are else 0.0, 2 * hits / (said + are) if said + are else 0.0
