"""Linear regressors whose penalty and margin are in standard deviations of the target. Never folds or files.

scikit-learn's are in the units of the target: the same default fits only a constant to a target between 0 and 0.1, and hardly
penalises a target in the thousands. Here the target is scaled for the fit, and coefficients and intercept are scaled back. The
fitted regressor then is an ordinary one of scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import Lasso
from sklearn.svm import LinearSVR

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array

__all__ = ["ScaledTargetLasso", "ScaledTargetLinearSVR"]


def _fit_scaled(regressor: Any, fit: Callable[[Any, Array], Any], activations: Any, target: Any) -> None:
    target = np.asarray(target, dtype=np.float64)
    if target.ndim != 1:
        raise InvalidArgumentError(f"the target has shape {target.shape}, expected one number per prompt")
    # Without an intercept the fit goes through zero, so the target must not be shifted.
    centre = float(target.mean()) if regressor.fit_intercept and len(target) else 0.0
    apart = target - centre
    # Divided first, since squares of the largest and smallest numbers are no numbers.
    size = float(np.abs(apart).max(initial=0)) or 1.0
    scale = size * (float((target / size - centre / size).std()) or 1.0)
    fit(activations, apart / scale)
    # In float64 whatever the fit is computed in: float32 knows 1e9 to the nearest 64.
    regressor.coef_ = np.asarray(regressor.coef_, np.float64) * scale
    regressor.intercept_ = np.asarray(regressor.intercept_, np.float64) * scale + centre


class ScaledTargetLasso(Lasso):  # type: ignore[misc]
    """:class:`sklearn.linear_model.Lasso` with ``alpha`` in standard deviations of the target; `coef_` in the target's own units."""

    def fit(self, X: Any, y: Any) -> ScaledTargetLasso:  # noqa: N803  (scikit-learn's own name)
        """Fits the scaled target, shape (prompt,), and scales the result back."""
        _fit_scaled(self, super().fit, X, y)
        return self


class ScaledTargetLinearSVR(LinearSVR):  # type: ignore[misc]
    """:class:`sklearn.svm.LinearSVR` with ``epsilon`` in standard deviations of the target; `coef_` in the target's own units."""

    def fit(self, X: Any, y: Any) -> ScaledTargetLinearSVR:  # noqa: N803  (scikit-learn's own name)
        """Fits the scaled target, shape (prompt,), and scales the result back."""
        _fit_scaled(self, super().fit, X, y)
        return self
