"""Which of several layers matter for a label: by a group lasso, or by the coefficients of a probe on all of them. Never folds or files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LabelError
from lmprobe_zarr.probes.coefficients import undo_steps
from lmprobe_zarr.probes.group_lasso import fit_group_lasso
from lmprobe_zarr.typing import Array, Floats

__all__ = ["check_alpha", "check_top_k", "choose_by_importance", "choose_by_lasso", "layer_importance"]

#: A layer is chosen whose coefficients have a larger norm; the solver's zeros are exact.
_CHOSEN: Final = 1e-6
_METRICS: Final[Mapping[str, Callable[[Floats], Floats]]] = {
    "l2": lambda coef: np.linalg.norm(coef, axis=1),
    "l1": lambda coef: np.abs(coef).sum(axis=1),
    "mean_abs": lambda coef: np.abs(coef).mean(axis=1),
    "max_abs": lambda coef: np.abs(coef).max(axis=1),
}


def check_alpha(alpha: Any) -> float:
    """The strength of the group lasso, if it is one.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No number, or none that is positive and finite.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number):
        raise InvalidTypeError(f"auto_alpha={alpha!r:.60} is no number: give a positive one such as 0.01")
    if not np.isfinite(alpha) or alpha <= 0:
        raise InvalidArgumentError(f"auto_alpha={alpha!r} penalises nothing: give a positive number such as 0.01")
    return float(alpha)


def check_top_k(top_k: Any) -> int | None:
    """How many layers are chosen, if it is a number of layers, or None.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        No whole number, or none of at least 1.
    """
    if top_k is None:
        return None
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer):
        raise InvalidTypeError(f"fast_auto_top_k={top_k!r:.60} is no number of layers: give a whole number, or None for half of them")
    if top_k < 1:
        raise InvalidArgumentError(f"fast_auto_top_k={top_k!r} chooses nothing: give at least 1, or None for half of the layers")
    return int(top_k)


def choose_by_lasso(rows: Array, labels: Array, n_layers: int, alpha: float, normalize: bool | str) -> tuple[list[int], Floats]:
    """The layers to which a group lasso gives coefficients.

    Parameters
    ----------
    rows : ndarray of float, shape (prompt, layer × hidden)
        As they are; they are scaled here, as `normalize` says.
    labels : ndarray, shape (prompt,)
        Of two classes.
    n_layers : int
    alpha : float
        Strength of the penalty: larger chooses fewer.
    normalize : bool, "per_neuron" or "per_layer"

    Returns
    -------
    chosen : list of int
        Numbers among the layers of the rows, ascending; all of them where none has coefficients.
    norms : ndarray of float64, shape (layer,)
        Of the coefficients of each layer.

    Raises
    ------
    LabelError
        There are not two classes.

    Warns
    -----
    UserWarning
        No layer has coefficients.
    ConvergenceWarning
        scikit-learn's own: the optimum was not reached.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) != 2:
        raise LabelError(
            f"layers='auto' chooses layers for two classes, and there are {len(classes)}: use layers='fast_auto', or name layers"
        )
    coef, converged = fit_group_lasso(_scaled(rows, n_layers, normalize), codes, n_layers, alpha)
    if not converged:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn("the group lasso stopped before its optimum: give a larger auto_alpha", ConvergenceWarning, stacklevel=5)
    norms = np.linalg.norm(coef, axis=1)
    chosen = [int(layer) for layer in np.flatnonzero(norms > _CHOSEN)]
    if not chosen:
        warnings.warn(
            f"the group lasso chose no layer with auto_alpha={alpha}, so all {n_layers} are used: give a smaller auto_alpha",
            UserWarning,
            stacklevel=6,
        )
        chosen = list(range(n_layers))
    return chosen, norms


def choose_by_importance(
    rows: Array, n_layers: int, top_k: int | None, normalize: bool | str, fit: Callable[[Array], Any]
) -> tuple[list[int], Floats]:
    """The layers with the largest coefficients in a probe on all of them.

    Parameters
    ----------
    rows : ndarray of float, shape (prompt, layer × hidden)
    n_layers : int
    top_k : int, optional
        How many; None is half of them, at least one.
    normalize : bool, "per_neuron" or "per_layer"
    fit : callable
        The fitted estimator for scaled rows.

    Returns
    -------
    chosen : list of int
        Numbers among the layers of the rows, ascending. Of equal ones the last.
    importances : ndarray of float64, shape (layer,)

    Raises
    ------
    InvalidArgumentError
        The estimator has no coefficients.
    """
    importances = layer_importance(fit(_scaled(rows, n_layers, normalize)), n_layers)
    number = min(n_layers, max(1, n_layers // 2) if top_k is None else top_k)
    return sorted(int(layer) for layer in np.argsort(importances, kind="stable")[-number:]), importances


def layer_importance(pipeline: Any, n_layers: int, metric: str = "l2") -> Floats:
    """How large the coefficients of each layer are in a fitted linear probe, in the units in which the estimator sees the layers.

    Parameters
    ----------
    pipeline : fitted pipeline or estimator
        Components, and a mass-mean column, are undone.
    n_layers : int
    metric : {"l2", "l1", "mean_abs", "max_abs"}
        Over all coefficients of a layer, those of every class.

    Returns
    -------
    ndarray of float64, shape (layer,)

    Raises
    ------
    InvalidArgumentError
        No such metric, or the probe has no coefficients.
    """
    if not isinstance(metric, str) or metric not in _METRICS:
        raise InvalidArgumentError(f"metric={metric!r:.60} is unknown: use {', '.join(map(repr, _METRICS))}")
    *before, last = [step for _, step in getattr(pipeline, "steps", [("", pipeline)])]
    if getattr(last, "coef_", None) is None or np.ndim(last.coef_) > 2:
        raise InvalidArgumentError(f"{type(last).__name__} has no coefficients by layer: use a linear probe such as 'logistic_regression'")
    coef = np.atleast_2d(np.asarray(last.coef_, np.float64))
    # The scaler of the layers is not undone: without one scale, layers with small activations would seem important.
    first = 1 if before and type(before[0]).__name__ in ("LayerScaler", "StandardScaler") else 0
    coef, _ = undo_steps(before[first:], coef, np.zeros(len(coef)))
    return np.asarray(_METRICS[metric](coef.reshape(len(coef), n_layers, -1).transpose(1, 0, 2).reshape(n_layers, -1)))


def _scaled(rows: Array, n_layers: int, normalize: bool | str) -> Array:
    if normalize is False:
        return rows
    from lmprobe_zarr.probes.scaling import LayerScaler

    return np.asarray(LayerScaler(n_layers, "per_neuron" if normalize is True else str(normalize)).fit_transform(rows))
