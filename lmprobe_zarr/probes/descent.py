"""Logistic regression by stochastic gradient descent, which says whether it has arrived. Never folds or files."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
from sklearn.linear_model import SGDClassifier

from lmprobe_zarr.typing import Array, Floats

__all__ = ["DescentClassifier"]

#: The largest share of the decisions that the way to the optimum still changes, for which a descent has arrived.
_APART: Final = 0.08
#: Steps of conjugate gradients that solve for the way to the optimum. More of them changed no verdict in any case that was tried.
_STEPS: Final = 20


class DescentClassifier(SGDClassifier):  # type: ignore[misc]
    """scikit-learn's, but its first step fits the width of the rows, and it knows whether it has reached the optimum.

    The default schedule of `SGDClassifier` begins with steps that suit one unit; the mean over its steps keeps what they did. With
    ``learning_rate="adaptive"`` the first step here is ``eta0`` divided by the number of units, for which standardised rows are safe.

    After a fit with log loss and an L2 penalty, one step of Newton's method is solved for. Where it would change the decisions for the
    training rows by more than 8 %, apart from their scale, the descent has not arrived. It goes on once with a finer tolerance; if
    that does not suffice, ``converged_`` is False, with a warning.

    Parameters
    ----------
    eta0 : float
        The first step, times the number of units, where the learning rate is "adaptive".
    others
        Those of `sklearn.linear_model.SGDClassifier`.

    Attributes
    ----------
    converged_ : bool
        Whether the fit has reached the optimum; for other losses and penalties, whether it ended before its iteration limit.
    others
        Those of `sklearn.linear_model.SGDClassifier`.
    """

    converged_: bool
    eta0: Any
    tol: Any
    n_iter_no_change: Any

    def fit(self, X: Any, y: Any, coef_init: Any = None, intercept_init: Any = None, sample_weight: Any = None) -> DescentClassifier:  # noqa: N803
        """As scikit-learn's.

        Parameters
        ----------
        X : array of float, shape (row, hidden)
        y : array, shape (row,)
        coef_init, intercept_init, sample_weight
            As for `sklearn.linear_model.SGDClassifier`.

        Warns
        -----
        ConvergenceWarning
            scikit-learn's own: the optimum was not reached.
        """
        given: dict[str, Any] = {"eta0": self.eta0, "tol": self.tol, "n_iter_no_change": self.n_iter_no_change}
        known = self.loss == "log_loss" and self.penalty == "l2" and self.class_weight is None and self.fit_intercept
        known = known and isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind == "f" and self.tol is not None
        weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        try:
            if self.learning_rate == "adaptive" and np.ndim(X) == 2 and np.shape(X)[1]:
                self.eta0 = given["eta0"] / np.shape(X)[1]
            super().fit(X, y, coef_init=coef_init, intercept_init=intercept_init, sample_weight=sample_weight)
            left = self._way_left(X, np.asarray(y), weights) if known else 0.0
            if left >= _APART:
                self.tol, self.n_iter_no_change = given["tol"] / 100, 4 * given["n_iter_no_change"]
                super().fit(X, y, coef_init=self.coef_, intercept_init=self.intercept_, sample_weight=sample_weight)
                left = self._way_left(X, np.asarray(y), weights)
        finally:
            self.set_params(**given)
        ended = self.tol is None or bool(self.n_iter_ < self.max_iter)
        self.converged_ = ended and left < _APART
        if ended and not self.converged_:  # else scikit-learn has warned
            from sklearn.exceptions import ConvergenceWarning

            warnings.warn(
                f"{type(self).__name__} has not reached the optimum after {self.n_iter_} passes: lower tol, or raise n_iter_no_change",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _way_left(self, rows: Array, y: Array, weights: Floats) -> float:
        """By how much a step of Newton's method would change the decisions for the rows, apart from their scale, 0 to 1; of all classes."""
        wanted = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        fits = zip(wanted, self.coef_, self.intercept_, strict=True)
        return max(_turn(rows, y == label, weights, coef, float(intercept), self.alpha) for label, coef, intercept in fits)


def _turn(rows: Array, hits: Array, weights: Floats, coef: Array, intercept: float, alpha: float) -> float:
    """The sine of the angle between the decisions, less their mean, before and after a step of Newton's method."""
    from scipy.special import expit

    n = len(rows)
    decisions = np.asarray(rows @ coef, np.float64) + intercept
    share = expit(decisions)
    missed, curvature = weights * (share - hits) / n, weights * share * (1 - share) / n

    def product(step: Floats) -> Floats:
        by_row = curvature * (np.asarray(rows @ step[:-1].astype(rows.dtype), np.float64) + step[-1])
        return np.append(np.asarray(by_row.astype(rows.dtype) @ rows, np.float64) + alpha * step[:-1], by_row.sum())

    gradient = np.append(np.asarray(missed.astype(rows.dtype) @ rows, np.float64) + alpha * coef, missed.sum())
    step = _solve(product, gradient)
    after = decisions - rows @ step[:-1].astype(rows.dtype)
    before, after = decisions - decisions.mean(), after - after.mean()
    lengths = float(np.linalg.norm(before) * np.linalg.norm(after))
    if not np.isfinite(lengths):
        return 1.0
    if lengths == 0:
        return 0.0
    return float(np.sqrt(max(0.0, 1 - (float(before @ after) / lengths) ** 2)))


def _solve(product: Any, right: Floats) -> Floats:
    """Conjugate gradients for a positive matrix, of which products are given."""
    found, rest = np.zeros_like(right), right.copy()
    along, size = rest.copy(), float(rest @ rest)
    for _ in range(_STEPS):
        if size < 1e-24:
            break
        image = product(along)
        length = size / float(along @ image)
        found += length * along
        rest -= length * image
        before, size = size, float(rest @ rest)
        along = rest + size / before * along
    return found
