"""The scaler for layers that are concatenated, as a scikit-learn transformer. Never labels, folds or files."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.probes.matrices import checked_matrix
from lmprobe_zarr.typing import Array

__all__ = ["LayerScaler"]
_MODES = ("per_neuron", "per_layer")


class LayerScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Brings concatenated layers to mean 0 and standard deviation 1.

    Parameters
    ----------
    n_layers : int
        How many layers a row holds, end to end: the first ``hidden`` columns are the first layer.
    mode : {"per_neuron", "per_layer"}
        "per_neuron": each hidden unit of each layer has its own mean and standard deviation. "per_layer": all units of a layer
        share one mean and one deviation, which keeps their relative sizes and leaves fewer numbers to estimate.

    Attributes
    ----------
    mean_, scale_ : ndarray of float64, shape (layer, hidden) or (layer, 1)
        Over the training prompts; a deviation of zero counts as 1.

    Notes
    -----
    The deviation divides by the number of values (not one less), as scikit-learn's ``StandardScaler`` does. Statistics are
    taken in float64, results are in the dtype of the activations.
    """

    mean_: Array
    scale_: Array
    n_features_in_: int

    def __init__(self, n_layers: int = 1, mode: str = "per_neuron") -> None:
        self.n_layers = n_layers
        self.mode = mode

    def fit(self, X: Any, y: Any = None) -> LayerScaler:  # noqa: N803  (scikit-learn's own name)
        """Takes mean and standard deviation.

        Parameters
        ----------
        X : array of float, shape (prompt, layer × hidden)
        y : ignored

        Raises
        ------
        InvalidArgumentError
            An unknown mode, or a width that is no multiple of the number of layers.
        """
        if isinstance(self.n_layers, bool) or not isinstance(self.n_layers, int | np.integer):
            raise InvalidTypeError(f"n_layers={self.n_layers!r} is not a whole number")
        if self.mode not in _MODES:
            raise InvalidArgumentError(f"mode={self.mode!r} is unknown: use {' or '.join(map(repr, _MODES))}")
        X = checked_matrix(self, X, fitting=True)  # noqa: N806
        if self.n_layers < 1 or X.shape[1] % self.n_layers:
            raise InvalidArgumentError(f"rows of {X.shape[1]} values cannot be cut into n_layers={self.n_layers!r} layers of one size")
        axis = 0 if self.mode == "per_neuron" else None
        means, scales = [], []
        # Layer by layer, because the standard deviation makes a float64 copy of its argument.
        for layer in np.split(X, self.n_layers, axis=1):
            means.append(np.atleast_1d(layer.mean(axis=axis, dtype=np.float64)))
            scale = np.atleast_1d(layer.std(axis=axis, dtype=np.float64))
            # By comparison: the computed deviation of equal values is a rounding error rather than zero.
            scale[np.atleast_1d(layer.max(axis=axis) == layer.min(axis=axis)) | (scale == 0)] = 1
            scales.append(scale)
        self.mean_, self.scale_ = np.stack(means), np.stack(scales)
        return self

    def transform(self, X: Any) -> Array:  # noqa: N803
        """The activations less the mean, divided by the deviation; in the given float dtype, shape (prompt, layer × hidden)."""
        X = checked_matrix(self, X)  # noqa: N806
        layers = X.reshape(len(X), self.n_layers, -1) - self.mean_.astype(X.dtype)
        layers /= self.scale_.astype(X.dtype)
        return np.asarray(layers.reshape(X.shape))

    def inverse_transform(self, X: Any) -> Array:  # noqa: N803
        """The activations that :meth:`transform` scaled."""
        X = checked_matrix(self, X)  # noqa: N806
        layers = X.reshape(len(X), self.n_layers, -1) * self.scale_.astype(X.dtype)
        layers += self.mean_.astype(X.dtype)
        return np.asarray(layers.reshape(X.shape))
