"""The mass-mean probe as a scikit-learn estimator. Never folds or files."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from lmprobe_zarr.errors import LabelError

__all__ = ["MassMeanClassifier"]

Array = npt.NDArray[Any]


class MassMeanClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies by the nearest class mean, along the difference of the means.

    With two classes the direction is θ = μ₁ − μ₀ and the decision θ·(x − (μ₀ + μ₁) / 2), so the threshold lies halfway
    between the means whatever the class sizes. With more classes the score of class k is μₖ·x − |μₖ|² / 2, whose largest
    value belongs to the nearest mean; for two classes the difference of these scores is the decision above.

    Nothing is standardised and nothing is tuned: means are taken in float64, scores in the dtype of the activations.

    Attributes
    ----------
    classes_ : ndarray, shape (class,)
        The labels, sorted.
    means_ : ndarray of float64, shape (class, hidden)
        The mean of each class.
    coef_ : ndarray of float64, shape (1, hidden) or (class, hidden)
        θ for two classes, μₖ for more.
    intercept_ : ndarray of float64, shape (1,) or (class,)
        The constant of the decision.

    Notes
    -----
    Source: S. Marks and M. Tegmark, "The Geometry of Truth" (2023), arXiv:2310.06824, section 5, without their
    covariance correction.
    """

    classes_: Array
    means_: Array
    coef_: Array
    intercept_: Array

    def fit(self, X: Any, y: Any) -> MassMeanClassifier:  # noqa: N803  (scikit-learn's own name)
        """Takes the mean of each class.

        Parameters
        ----------
        X : array of float, shape (prompt, hidden)
        y : array, shape (prompt,)

        Raises
        ------
        LabelError
            All labels are the same.
        """
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])  # noqa: N806
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise LabelError(f"all {len(y)} labels are {self.classes_[0]!r}: a probe needs prompts of at least two classes")
        self.means_ = np.stack([X[codes == k].mean(axis=0, dtype=np.float64) for k in range(len(self.classes_))])
        if len(self.classes_) == 2:
            self.coef_ = self.means_[1:] - self.means_[:1]
            # As a product of sum and difference: the difference of two squares loses all digits where both means are far off zero.
            self.intercept_ = -0.5 * self.coef_ @ (self.means_[0] + self.means_[1])
        else:
            self.coef_ = self.means_
            self.intercept_ = -0.5 * np.einsum("kd,kd->k", self.means_, self.means_)
        return self

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Scores, shape (prompt,) for two classes (positive means the second), else (prompt, class)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)  # noqa: N806
        scores = X @ self.coef_.T.astype(X.dtype) + self.intercept_.astype(X.dtype)
        return np.asarray(scores[:, 0] if len(self.classes_) == 2 else scores)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """The class of the nearest mean, shape (prompt,)."""
        scores = self.decision_function(X)
        return np.asarray(self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)])

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """σ of the score (softmax for more classes), float64, shape (prompt, class). Not calibrated: it scales with the activations."""
        from scipy.special import expit, softmax

        scores = self.decision_function(X).astype(np.float64)
        if scores.ndim == 2:
            return np.asarray(softmax(scores, axis=1))
        return np.stack([expit(-scores), expit(scores)], axis=1)
