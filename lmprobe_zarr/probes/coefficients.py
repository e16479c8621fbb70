"""The direction of a fitted linear probe in the units of the activations, for steering and for comparison. Never fits anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array

__all__ = ["coefficients", "undo_steps"]


def coefficients(pipeline: Any, n_layers: int = 1) -> tuple[Array, Array]:
    """Coefficients and intercept of a fitted linear probe, in the units of the raw activations.

    Every scaler and projection before the estimator is undone, so that ``(activations * coef[k]).sum(("layer", "hidden")) +
    intercept[k]`` is the decision function (of a regressor: the prediction). The exception is "ensemble", which has no decision
    function: its direction is the mean of its regressions'.

    Parameters
    ----------
    pipeline : fitted pipeline or estimator
        Its steps are standardisations, layer scalers, principal components and one linear estimator.
    n_layers : int
        How many layers its rows hold, end to end.

    Returns
    -------
    coef : ndarray of float64, shape (1 or class, layer, hidden)
        A single row for a regression, and for two classes, where it points to the second class.
    intercept : ndarray of float64, shape (1 or class,)

    Raises
    ------
    InvalidArgumentError
        The probe is not fitted, not linear, or compares classes one against one; a step cannot be undone; or the width is no multiple
        of `n_layers`.
    """
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    *before, last = _flatten_steps(pipeline)
    name = type(last).__name__
    try:
        check_is_fitted(last)
    except NotFittedError as error:
        raise InvalidArgumentError(f"{name} is not fitted: it has no coefficients yet, call fit first") from error
    if getattr(last, "coef_", None) is None or getattr(last, "intercept_", None) is None:
        raise InvalidArgumentError(f"{name} is not linear: it has no coefficients, use a linear probe such as 'logistic_regression'")
    intercept = np.atleast_1d(np.asarray(last.intercept_, dtype=np.float64))
    coef = np.atleast_2d(np.asarray(last.coef_, dtype=np.float64))
    n_classes = len(last.classes_) if hasattr(last, "classes_") else 1
    expected = 1 if n_classes <= 2 else n_classes
    if len(coef) != expected:
        raise InvalidArgumentError(f"{name} has {len(coef)} directions for {expected} scores: only one against the rest has one for each")
    intercept = np.broadcast_to(intercept, (expected,)).copy()
    coef, intercept = undo_steps(before, coef, intercept)
    if n_layers < 1 or coef.shape[1] % n_layers:
        raise InvalidArgumentError(
            f"the probe was fitted on rows of {coef.shape[1]} values, which are not n_layers={n_layers!r} of one size"
        )
    return coef.reshape(len(coef), n_layers, -1), intercept


def undo_steps(steps: Sequence[Any], coef: Array, intercept: Array) -> tuple[Array, Array]:
    """A linear map of what some fitted steps put out as one of what they are given.

    Parameters
    ----------
    steps : sequence of transformers
        In the order in which they are applied.
    coef : ndarray of float64, shape (output, unit)
    intercept : ndarray of float64, shape (output,)

    Raises
    ------
    InvalidArgumentError
        A step that cannot be undone.
    """
    from lmprobe_zarr.probes.augment import AllButLast, MassMeanColumn

    for step in reversed([step for step in steps if step not in (None, "passthrough")]):
        if isinstance(step, MassMeanColumn):
            coef = coef[:, :-1] + coef[:, -1:] * step.direction_
            continue
        if isinstance(step, AllButLast):
            others, intercept = undo_steps([step.step_], coef[:, :-1], intercept)
            coef = np.hstack([others, coef[:, -1:]])
            continue
        offset, matrix = _affine(step)
        coef = coef * matrix if matrix.ndim == 1 else coef @ matrix
        intercept = intercept - coef @ offset
    return coef, intercept


def _flatten_steps(pipeline: Any) -> list[Any]:
    """All steps in their order, those of inner pipelines too."""
    steps = getattr(pipeline, "steps", None)
    return [pipeline] if steps is None else [inner for _, step in steps for inner in _flatten_steps(step)]


def _affine(step: Any) -> tuple[Array, Array]:
    """`offset` and `matrix` of a transformer ``matrix @ (x − offset)``; a vector where the matrix is diagonal."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    from lmprobe_zarr.probes.scaling import LayerScaler

    if isinstance(step, StandardScaler):
        n = step.n_features_in_
        offset = step.mean_ if step.with_mean else np.zeros(n)
        return offset, 1 / step.scale_ if step.with_std else np.ones(n)
    if isinstance(step, LayerScaler):
        shape = (step.n_layers, step.n_features_in_ // step.n_layers)
        return np.broadcast_to(step.mean_, shape).ravel(), 1 / np.broadcast_to(step.scale_, shape).ravel()
    if isinstance(step, PCA):
        components = np.asarray(step.components_, dtype=np.float64)
        if step.whiten:
            components = components / np.sqrt(step.explained_variance_)[:, None]
        return np.asarray(step.mean_, dtype=np.float64), components
    raise InvalidArgumentError(
        f"{type(step).__name__} cannot be undone: coefficients are known behind StandardScaler, LayerScaler, PCA and MassMeanColumn only"
    )
