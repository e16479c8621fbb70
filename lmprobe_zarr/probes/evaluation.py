"""Measures of predictions that were made elsewhere, as `Probe.evaluate` gives them. Never fits, and knows no folds."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes.metrics import accuracy, auroc, power_of_two
from lmprobe_zarr.typing import Array

__all__ = ["evaluate_classification", "evaluate_regression"]


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
    size = power_of_two(targets)
    spread = float(np.sum(((targets - targets.mean()) / size) ** 2))
    off = predicted - targets
    shares = off / size
    constant = bool((targets == targets[0]).all()) or not spread
    return {"r2": np.nan if constant else 1 - float(shares @ shares) / spread, "mae": float(np.abs(off).mean())}


def _check_lengths(predicted: Array, labels: Array) -> None:
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise LabelError(f"predictions have shape {predicted.shape} and labels {labels.shape}: give one label per prompt")
    if not len(labels):
        raise LabelError("there are no labels: nothing can be scored on no prompts")


def _present(labels: Array, predicted: Array) -> list[Any]:
    return list(dict.fromkeys([*labels.tolist(), *predicted.tolist()]))


def _precision_recall_f1(predicted: Array, true: Array) -> tuple[float, float, float]:
    """Those of one class, from booleans; 0 where a divisor is 0."""
    hits, claimed, present = (int(np.sum(values)) for values in (predicted & true, predicted, true))
    return (
        hits / claimed if claimed else 0.0,
        hits / present if present else 0.0,
        2 * hits / (claimed + present) if claimed + present else 0.0,
    )
