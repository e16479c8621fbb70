"""Logistic regressions of several strengths whose probabilities are averaged, as one scikit-learn estimator. Never folds or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.probes.matrices import checked_labels, checked_matrix
from lmprobe_zarr.typing import Array

__all__ = ["EnsembleClassifier"]


class EnsembleClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The mean probability of logistic regressions that differ only in the strength of their L2 penalty.

    It has no decision function: a mean of probabilities is no function of one linear score.

    Parameters
    ----------
    C_values : sequence of float
        One regression each; larger means a weaker penalty.
    tol, max_iter, class_weight, random_state
        Of every :class:`sklearn.linear_model.LogisticRegression`.

    Attributes
    ----------
    classes_ : ndarray, shape (class,)
        The labels, sorted.
    coefs_, intercepts_ : ndarray of float, shape (strength, 1 or class, hidden) and (strength, 1 or class)
        Of every regression.
    coef_, intercept_ : ndarray of float, shape (1 or class, hidden) and (1 or class,)
        Their mean over the regressions: the direction of the ensemble.
    n_iter_ : int
        The largest number of iterations that any of them took.
    """

    classes_: Array
    coefs_: Array
    intercepts_: Array
    coef_: Array
    intercept_: Array
    n_iter_: int

    def __init__(
        self,
        C_values: Sequence[float] = (0.01, 0.1, 0.5, 1.0, 5.0),  # noqa: N803  (lmprobe's own name)
        *,
        tol: float = 1e-4,
        max_iter: int = 1000,
        class_weight: str | Mapping[Any, float] | None = None,
        random_state: int | None = None,
    ) -> None:
        self.C_values = C_values
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> EnsembleClassifier:  # noqa: N803  (scikit-learn's own name)
        """Fit one regression per strength.

        Parameters
        ----------
        X : array of float, shape (prompt, hidden)
        y : array, shape (prompt,)

        Raises
        ------
        InvalidArgumentError
            No strength, or a strength that is no positive number.
        """
        from sklearn.linear_model import LogisticRegression

        strengths: list[Any] = [self.C_values] if np.ndim(self.C_values) == 0 else list(self.C_values)
        if not strengths or not all(isinstance(value, int | float | np.number) and value > 0 for value in strengths):
            raise InvalidArgumentError(f"C_values={self.C_values!r} are no strengths: give one or more positive numbers")
        X = checked_matrix(self, X, fitting=True)  # noqa: N806
        self.classes_, _ = checked_labels(y, len(X))
        options = {"tol": self.tol, "max_iter": self.max_iter, "class_weight": self.class_weight, "random_state": self.random_state}
        members = [LogisticRegression(C=float(value), **options).fit(X, y) for value in strengths]
        # In C order, as the arrays are saved: matrix products round differently in another memory order.
        self.coefs_ = np.ascontiguousarray(np.stack([member.coef_ for member in members]))
        self.intercepts_ = np.stack([member.intercept_ for member in members])
        self.coef_, self.intercept_ = self.coefs_.mean(axis=0), self.intercepts_.mean(axis=0)
        self.n_iter_ = max(int(np.max(member.n_iter_)) for member in members)
        return self

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """The mean of the regressions' probabilities, float64, shape (prompt, class)."""
        from scipy.special import expit, softmax

        X = checked_matrix(self, X)  # noqa: N806
        total = np.zeros((len(X), len(self.classes_)))
        for coef, intercept in zip(self.coefs_, self.intercepts_, strict=True):
            scores = np.asarray(X @ coef.T + intercept, dtype=np.float64)
            total += softmax(scores, axis=1) if len(self.classes_) > 2 else np.hstack([expit(-scores), expit(scores)])
        return np.asarray(total / len(self.coefs_))

    def predict(self, X: Any) -> Array:  # noqa: N803
        """The class of the largest mean probability, shape (prompt,)."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])
