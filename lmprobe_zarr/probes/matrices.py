"""Checks of the matrices and labels that this package's estimators take. Fits nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array

__all__ = ["checked_labels", "checked_matrix"]


def checked_matrix(estimator: Any, activations: Any, *, fitting: bool = False) -> Array:
    """The activations as a finite matrix of float32 or float64, of as many columns as the estimator was fitted on.

    scikit-learn's own ``validate_data`` does the same, but exists only since its version 1.6.

    Parameters
    ----------
    estimator : estimator
        Messages name it. Its ``n_features_in_`` is set when `fitting`, and compared otherwise.
    activations : array of float, shape (prompt, hidden)

    Raises
    ------
    InvalidArgumentError
        The number of columns is not that of the fit.
    ValueError
        Raised by scikit-learn for anything that is no finite matrix.
    """
    from sklearn.utils.validation import check_array, check_is_fitted

    name = type(estimator).__name__
    if not fitting:
        check_is_fitted(estimator)
    matrix = check_array(activations, dtype=[np.float64, np.float32], estimator=name)
    if fitting:
        estimator.n_features_in_ = matrix.shape[1]
    elif matrix.shape[1] != estimator.n_features_in_:
        raise InvalidArgumentError(
            f"X has {matrix.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input: "
            "give activations of the layers that it was fitted on"
        )
    return np.asarray(matrix)


def checked_labels(labels: Any, n: int) -> tuple[Array, Array]:
    """The classes, sorted, and the index of each row's class.

    Parameters
    ----------
    labels : array, shape (prompt,)
    n : int
        How many labels there must be.

    Raises
    ------
    InvalidArgumentError
        Another number of labels.
    ValueError
        Raised by scikit-learn for labels that are not one class per row.
    """
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import column_or_1d

    labels = column_or_1d(labels)
    check_classification_targets(labels)
    if len(labels) != n:
        raise InvalidArgumentError(f"there are {len(labels)} labels for {n} rows of activations: give one label per row")
    classes, codes = np.unique(labels, return_inverse=True)
    return classes, codes
