"""The mass-mean probe as a scikit-learn estimator, with and without its covariance. Never folds or files."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from lmprobe_zarr.errors import LabelError
from lmprobe_zarr.probes.matrices import checked_labels, checked_matrix
from lmprobe_zarr.typing import Array

__all__ = ["MassMeanClassifier"]

#: The covariance is shrunk by at least this much: it must be invertible whatever its rank.
_LEAST_SHRINKAGE = 1e-6


class MassMeanClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies by the nearest class mean, along the difference of the means.

    With two classes the direction is θ = μ₁ − μ₀ and the decision θ·(x − (μ₀ + μ₁) / 2), so the threshold lies halfway
    between the means whatever the class sizes. With more classes the score of class k is μₖ·x − |μₖ|² / 2, whose largest
    value belongs to the nearest mean; for two classes the difference of these scores is the decision above.

    With `covariance` the direction is Σ⁻¹θ, and distances to the means are measured by Σ⁻¹, where Σ is the covariance of the
    activations about the mean of their class. It is shrunk towards a multiple of the identity by Ledoit and Wolf's formula,
    since with more hidden units than prompts the plain estimate cannot be inverted; where no two prompts of a class differ
    it is the identity.

    Nothing is standardised and nothing is tuned: means are taken in float64, scores in the dtype of the activations.

    Parameters
    ----------
    covariance : bool
        Whether the direction is corrected by the covariance.

    Attributes
    ----------
    classes_ : ndarray, shape (class,)
        The labels, sorted.
    means_ : ndarray of float64, shape (class, hidden)
        The mean of each class.
    coef_ : ndarray of float64, shape (1, hidden) or (class, hidden)
        θ for two classes, μₖ for more; times Σ⁻¹ with `covariance`.
    intercept_ : ndarray of float64, shape (1,) or (class,)
        The constant of the decision.

    Notes
    -----
    Source: S. Marks and M. Tegmark, "The Geometry of Truth" (2023), arXiv:2310.06824, section 5. Theirs has no constant, since
    their activations are centred. Shrinkage: O. Ledoit and M. Wolf, "A well-conditioned estimator for large-dimensional
    covariance matrices", Journal of Multivariate Analysis 88 (2004), as scikit-learn's ``ledoit_wolf_shrinkage``.
    """

    classes_: Array
    means_: Array
    coef_: Array
    intercept_: Array

    def __init__(self, covariance: bool = False) -> None:
        self.covariance = covariance

    def fit(self, X: Any, y: Any) -> MassMeanClassifier:  # noqa: N803  (scikit-learn's own name)
        """Compute the mean of each class and, with `covariance`, the covariance about the means.

        Parameters
        ----------
        X : array of float, shape (prompt, hidden)
        y : array, shape (prompt,)

        Raises
        ------
        LabelError
            All labels are the same.
        """
        X = checked_matrix(self, X, fitting=True)  # noqa: N806
        self.classes_, codes = checked_labels(y, len(X))
        if len(self.classes_) < 2:
            raise LabelError(f"all {len(codes)} labels are {self.classes_[0]!r}: a probe needs prompts of at least two classes")
        self.means_ = np.stack([X[codes == k].mean(axis=0, dtype=np.float64) for k in range(len(self.classes_))])
        two = len(self.classes_) == 2
        directions = self.means_[1:] - self.means_[:1] if two else self.means_
        self.coef_ = _inverse_covariance_times(X - self.means_[codes], directions) if self.covariance else directions
        if two:
            # As a product of sum and difference: the difference of two squares loses all digits where both means are far off zero.
            self.intercept_ = -0.5 * self.coef_ @ (self.means_[0] + self.means_[1])
        else:
            self.intercept_ = -0.5 * np.einsum("kd,kd->k", self.means_, self.coef_)
        return self

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Scores, shape (prompt,) for two classes (positive means the second), else (prompt, class)."""
        check_is_fitted(self)
        X = checked_matrix(self, X)  # noqa: N806
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


def _inverse_covariance_times(residuals: Array, directions: Array) -> Array:
    """Σ⁻¹ times each direction, Σ being the shrunk covariance of the residuals; float64, shape (direction, hidden).

    Parameters
    ----------
    residuals : ndarray of float64, shape (prompt, hidden)
        Activations less the mean of their class.
    directions : ndarray of float64, shape (direction, hidden)
    """
    n, hidden = residuals.shape
    # The smaller of R Rᵀ and Rᵀ R: they have the same trace and the same norm, and either gives the inverse.
    wide = hidden > n
    product = residuals @ residuals.T if wide else residuals.T @ residuals
    variance = float(np.trace(product)) / n / hidden
    if not variance:
        return directions.copy()
    squared = float(np.einsum("ij,ij->", product, product)) / n**2
    spread = (squared - hidden * variance**2) / hidden
    noise = (float(np.mean(np.einsum("nd,nd->n", residuals, residuals) ** 2)) - squared) / (n * hidden)
    # Of a single hidden unit, or of units all alike, the covariance already is a multiple of the identity.
    shrinkage = 1.0 if spread <= 0 else min(1.0, max(noise / spread, _LEAST_SHRINKAGE))
    if shrinkage == 1:
        return np.asarray(directions / variance)
    floor = shrinkage * variance
    product *= (1 - shrinkage) / n
    if not wide:
        product[np.diag_indices(hidden)] += floor
        return np.asarray(np.linalg.solve(product, directions.T).T)
    # Woodbury: (c I + a Rᵀ R)⁻¹ = (I − a Rᵀ (c I + a R Rᵀ)⁻¹ R) / c.
    product[np.diag_indices(n)] += floor
    inner = np.linalg.solve(product, residuals @ directions.T)
    return np.asarray((directions - (1 - shrinkage) / n * (residuals.T @ inner).T) / floor)
