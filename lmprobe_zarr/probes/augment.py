"""A column beside the activations, as scikit-learn transformers: the projection on the difference of the class means, and what keeps it.

Never layers, folds or files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils.validation import check_is_fitted

from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes.matrices import checked_labels, checked_matrix
from lmprobe_zarr.typing import Array

__all__ = ["AllButLast", "MassMeanColumn"]


class MassMeanColumn(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Appends one column: the projection of each row on the difference of the two class means, scaled to length 1.

    Attributes
    ----------
    direction_ : ndarray of float64, shape (hidden,)
        From the first to the second of the sorted classes; zeros where the means are equal.

    Notes
    -----
    What lmprobe 0.10 calls ``mass_mean_augment``. Weights of rows play no part in the means.
    """

    direction_: Array
    n_features_in_: int

    def fit(self, X: Any, y: Any) -> MassMeanColumn:  # noqa: N803  (scikit-learn's own name)
        """Take the direction, in float64.

        Parameters
        ----------
        X : array of float, shape (prompt, hidden)
        y : array, shape (prompt,)

        Raises
        ------
        LabelError
            There are not two classes.
        """
        X = checked_matrix(self, X, fitting=True)  # noqa: N806
        classes, codes = checked_labels(y, len(X))
        if len(classes) != 2:
            raise LabelError(f"mass_mean_augment projects on the difference of two class means, and there are {len(classes)}: leave it out")
        first, second = (X[codes == code].mean(axis=0, dtype=np.float64) for code in (0, 1))
        direction = second - first
        length = float(np.linalg.norm(direction))
        self.direction_ = direction / length if length else direction
        return self

    def transform(self, X: Any) -> Array:  # noqa: N803
        """The rows with one more column, in the dtype of the activations, shape (prompt, hidden + 1)."""
        check_is_fitted(self)
        X = checked_matrix(self, X)  # noqa: N806
        return np.hstack([X, (X @ self.direction_.astype(X.dtype))[:, None]])


class AllButLast(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Applies a transformer to all columns but the last, which stays as it is, and last.

    Parameters
    ----------
    step : transformer
        A clone of it is fitted.

    Attributes
    ----------
    step_ : transformer
        The fitted clone.
    """

    step_: Any
    n_features_in_: int

    def __init__(self, step: Any) -> None:
        self.step = step

    def fit(self, X: Any, y: Any = None) -> AllButLast:  # noqa: N803
        """Fit a clone of the step.

        Parameters
        ----------
        X : array of float, shape (prompt, column)
        y : array, shape (prompt,), optional
        """
        X = checked_matrix(self, X, fitting=True)  # noqa: N806
        self.step_ = clone(self.step).fit(X[:, :-1], y)
        return self

    def transform(self, X: Any) -> Array:  # noqa: N803
        """What the step makes of the other columns, and the last column."""
        check_is_fitted(self)
        X = checked_matrix(self, X)  # noqa: N806
        return np.hstack([self.step_.transform(X[:, :-1]), X[:, -1:]])
