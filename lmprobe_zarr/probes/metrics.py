"""Scores of a fitted classifier on prompts that it has not seen. Never fits anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["accuracy", "auroc", "class_scores"]

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
