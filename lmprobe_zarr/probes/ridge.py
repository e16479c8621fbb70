"""Named probes fitted as the sweep fits them: ridge exactly and in float64, regressions in float64 where their targets need it.

The one way for directions, transfer, `Probe` and the trials of a sweep that share no products of rows; ``gram`` has the solver. Never
folds, layers or files.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from lmprobe_zarr.probes.gram import ridge_coefficients
from lmprobe_zarr.typing import Array, Estimator, Floats

__all__ = ["RIDGES", "fit_probe", "is_ridge", "needs_float64", "rows_for"]

#: The named probes that are ridges.
RIDGES: Final = ("ridge", "ridge_regression")
#: The largest rounding error of a target in float32, as a share of the targets' standard deviation.
_ROUNDED: Final = 1e-6
#: Targets with a smaller standard deviation, or larger values than one over it, are fitted in float64.
_LEAST: Final = 1e-6


def is_ridge(probe: str | Estimator) -> bool:
    """Whether a probe is one of `RIDGES`."""
    return isinstance(probe, str) and probe in RIDGES


def needs_float64(targets: Array) -> bool:
    """Whether float32, in which scikit-learn fits float32 rows, would lose something of the targets of a regression."""
    wide = np.asarray(targets, np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        spread, largest = float(wide.std()), float(np.abs(wide).max(initial=0))
        lost = float(np.abs(wide.astype(np.float32) - wide).max(initial=0))
    # Squares of float32 have a short range, so that very small and very large targets need float64 too.
    return largest > 0 and not (lost <= _ROUNDED * spread and spread > _LEAST and largest < 1 / _LEAST)


def rows_for(probe: str | Estimator, rows: Any, targets: Array | None = None) -> Any:
    """Rows in the dtype in which a probe is fitted on them, or predicts from them: float64 for a ridge, and where `targets` need it.

    Parameters
    ----------
    probe : str or estimator
    rows : ndarray of float, shape (row, hidden)
        Anything else is returned as it is.
    targets : ndarray, shape (row,), optional
        Those of a regression.
    """
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        return rows
    own = not isinstance(probe, str) and targets is not None and needs_float64(targets)
    return rows.astype(np.float64, copy=False) if is_ridge(probe) or own else rows


def fit_probe(probe: str | Estimator, estimator: Any, rows: Any, labels: Array, weights: Array | None = None) -> Any:
    """The estimator, fitted as ``estimator.fit(rows, labels)`` does in the dtype of the rows, but a named ridge exactly.

    Parameters
    ----------
    probe : str or estimator
        What the estimator, or the last step of a pipeline, was made from.
    estimator : estimator or pipeline
    rows : ndarray of float, shape (row, hidden)
        As `rows_for` gives them.
    labels : ndarray, shape (row,)
    weights : ndarray of float, shape (row,), optional
        For the last step alone.
    """
    steps = getattr(estimator, "steps", None) or [("", estimator)]
    name, last = steps[-1]
    plain = isinstance(rows, np.ndarray) and rows.dtype == np.float64 and rows.ndim == 2
    if is_ridge(probe) and plain and last.solver == "auto" and not last.positive:
        for _, step in steps[:-1]:
            rows = step.fit_transform(rows, labels)
        _fit_ridge(last, rows, labels, weights)
        return estimator
    key = f"{name}__sample_weight" if name else "sample_weight"
    return estimator.fit(rows, labels, **({} if weights is None else {key: weights}))


def _fit_ridge(ridge: Any, rows: Floats, labels: Array, weights: Array | None) -> None:
    """Set what scikit-learn's ``fit`` sets."""
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils.class_weight import compute_sample_weight

    ridge._validate_params()
    classifies = hasattr(ridge, "class_weight")
    if classifies:
        binarizer = LabelBinarizer(pos_label=1, neg_label=-1)
        targets = np.asarray(binarizer.fit_transform(labels), np.float64)
        ridge._label_binarizer = binarizer
        # Before 1.9 this is a property that takes the binarizer's.
        if not isinstance(getattr(type(ridge), "classes_", None), property):
            ridge.classes_ = binarizer.classes_
        if ridge.class_weight is not None:
            by_class = compute_sample_weight(ridge.class_weight, labels)
            weights = by_class if weights is None else weights * by_class
    else:
        targets = np.asarray(labels, np.float64)[:, None]
    mean, centre = np.zeros(rows.shape[1]), np.zeros(targets.shape[1])
    if ridge.fit_intercept:
        mean, centre = np.average(rows, axis=0, weights=weights), np.average(targets, axis=0, weights=weights)
    rows, targets = rows - mean, targets - centre
    if weights is not None:
        root = np.sqrt(weights)[:, None]
        rows *= root
        targets *= root
    size = np.abs(targets).max(axis=0)
    size = np.where(size > 0, size, 1.0)
    coef = (ridge_coefficients(rows, targets / size, float(ridge.alpha)) * size).T
    intercept = centre - coef @ mean
    ridge.coef_ = coef if classifies else coef[0]
    ridge.intercept_ = (intercept if classifies else float(intercept[0])) if ridge.fit_intercept else 0.0
    ridge.n_features_in_, ridge.n_iter_, ridge.solver_ = rows.shape[1], None, "svd"
