"""`SparseAutoencoder`: the encoder of a sparse autoencoder as a plain record of weights, and what identifies it. Never sees a row."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

import numpy as np

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store import as_array
from lmprobe_zarr.typing import Array

__all__ = ["Architecture", "Normalisation", "SparseAutoencoder"]

Architecture = Literal["relu", "topk", "jumprelu", "gated"]
Normalisation = Literal["none", "centred", "constant_norm", "layer_norm"]
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
_WIDTH: Final = ("input_bias",)
_LATENTS: Final = ("encoder_bias", "threshold", "gate_bias", "log_magnitude")


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseAutoencoder:
    """The encoder of a sparse autoencoder: weights, and how rows become latents. Arrays may be numpy arrays or torch tensors.

    A row x becomes x′, by `normalisation` and `input_scale` and then less `input_bias`. With p = x′ · `encoder` + `encoder_bias`, the
    latents are

    * ``relu``: p where it is positive, otherwise 0;
    * ``topk``: the `k` largest of p, where they are positive, otherwise 0;
    * ``jumprelu``: p where it is positive and exceeds `threshold`, otherwise 0. An autoencoder that was trained with BatchTopK is this one,
      with the threshold that it has learned;
    * ``gated``: with q = x′ · `encoder`, what is positive of exp(`log_magnitude`) q + `encoder_bias`, where q + `gate_bias` is positive.

    Parameters
    ----------
    encoder : array, shape (hidden, latent)
        The encoder's weights.
    encoder_bias : array, shape (latent,), optional
        None for zeros.
    input_bias : array, shape (hidden,), optional
        What is subtracted from each row, mostly the decoder's bias; None for nothing.
    architecture : {"relu", "topk", "jumprelu", "gated"}
        How the pre-activations become latents.
    k : int, optional
        Of ``topk``.
    threshold : float or array, shape (latent,), optional
        Of ``jumprelu``.
    gate_bias, log_magnitude : array, shape (latent,), optional
        Of ``gated``.
    normalisation : {"none", "centred", "constant_norm", "layer_norm"}
        What each row goes through first: nothing; less its mean (as TransformerLens centres the residual stream); scaled to the norm
        √hidden; or less its mean and divided by its standard deviation (of hidden − 1 degrees of freedom) plus 1e-5.
    input_scale : float
        What each row is multiplied by after that.
    site, layer : str, int, optional
        Where it was trained, in the terms of this package: layer i is the output of block i. None where that is not known.
    model : str, optional
        The model, for people.

    Attributes
    ----------
    width, num_latents : int
        The lengths of a row, and of its latents.
    sha256 : str
        A digest of the weights and of everything above that changes the latents.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        Shapes that do not fit together, values that are not finite, or parts that the architecture lacks or does not have.

    Notes
    -----
    Sources of the architectures: L. Gao et al., "Scaling and evaluating sparse autoencoders" (2024), arXiv:2406.04093 (TopK);
    S. Rajamanoharan et al., arXiv:2407.14435 (JumpReLU) and arXiv:2404.16014 (gated); B. Bussmann et al., arXiv:2412.06410 (BatchTopK, and
    its threshold).
    """

    encoder: Any
    encoder_bias: Any = None
    input_bias: Any = None
    architecture: Architecture = "relu"
    k: int | None = None
    threshold: Any = None
    gate_bias: Any = None
    log_magnitude: Any = None
    normalisation: Normalisation = "none"
    input_scale: float = 1.0
    site: str | None = None
    layer: int | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("encoder", *_WIDTH, *_LATENTS):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _weights(name, getattr(self, name)))
        for name, known in (("architecture", get_args(Architecture)), ("normalisation", get_args(Normalisation))):
            if getattr(self, name) not in known:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r:.80} is unknown: this package encodes {', '.join(known)}")
        if self.encoder.ndim != 2 or 0 in self.encoder.shape:
            raise InvalidArgumentError(f"encoder has shape {self.encoder.shape}: give the weights as (hidden, latent)")
        if self.threshold is not None and self.threshold.ndim == 0:
            object.__setattr__(self, "threshold", np.full(self.num_latents, self.threshold))
        for names, length, dim in ((_WIDTH, self.width, "hidden"), (_LATENTS, self.num_latents, "latent")):
            for name in names:
                if getattr(self, name) is not None and getattr(self, name).shape != (length,):
                    raise InvalidArgumentError(
                        f"{name} has shape {getattr(self, name).shape}, and encoder {self.encoder.shape}: give ({dim},), here ({length},)"
                    )
        self._check_parts()
        if isinstance(self.input_scale, bool) or not isinstance(self.input_scale, int | float | np.number):
            raise InvalidTypeError(f"input_scale={self.input_scale!r:.60} is no number: give one, or leave it out")
        if not math.isfinite(self.input_scale) or self.input_scale <= 0:
            raise InvalidArgumentError(f"input_scale={self.input_scale!r} scales nothing: give a positive number")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0):
            raise InvalidTypeError(f"layer={self.layer!r:.60} is no layer: give a whole number from 0, or None where it is not known")
        for name in ("site", "model"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise InvalidTypeError(f"{name}={getattr(self, name)!r:.60} is no name: give a text, or None where it is not known")

    def _check_parts(self) -> None:
        """Raise where the architecture lacks a part, or has one that it does not use."""
        own = {"relu": (), "topk": ("k",), "jumprelu": ("threshold",), "gated": ("gate_bias", "log_magnitude")}
        for architecture, names in own.items():
            for name in names:
                given = getattr(self, name) is not None
                if given != (architecture == self.architecture):
                    problem = "is given for" if given else "is missing of"
                    raise InvalidArgumentError(f"{name} {problem} architecture={self.architecture!r}: it is of {architecture!r}")
        if self.k is not None:
            if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer):
                raise InvalidTypeError(f"k={self.k!r:.60} is no whole number: give how many latents the autoencoder keeps")
            if not 1 <= self.k <= self.num_latents:
                raise InvalidArgumentError(f"k={self.k} of an autoencoder with {self.num_latents} latents: give 1 to {self.num_latents}")
            object.__setattr__(self, "k", int(self.k))

    @property
    def width(self) -> int:
        """The length of a row."""
        return int(self.encoder.shape[0])

    @property
    def num_latents(self) -> int:
        """The number of latents."""
        return int(self.encoder.shape[1])

    @property
    def sha256(self) -> str:
        """64 hex digits that change with the weights and with everything else that changes the latents."""
        found = hashlib.sha256(repr((self.architecture, self.k, self.normalisation, float(self.input_scale))).encode())
        for name in ("encoder", *_WIDTH, *_LATENTS):
            array = getattr(self, name)
            if array is not None:
                found.update(f"{name} {array.shape} {array.dtype.str} ".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(getattr(self, f.name), np.ndarray)}
        parts = ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
        return f"<SparseAutoencoder {self.width} → {self.num_latents}, {parts}>"


def _weights(name: str, values: Any) -> Array:
    """Weights as a numpy array of floating-point numbers that nobody else writes to."""
    if not (hasattr(values, "detach") or hasattr(values, "__array__") or isinstance(values, int | float | list | tuple)):
        raise InvalidTypeError(f"{name} is a {type(values).__name__}: give an array or a tensor")
    array = np.asarray(values) if isinstance(values, int | float | list | tuple) else values
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if str(getattr(array, "dtype", None)).rpartition(".")[2] not in _FLOATS:
        raise InvalidTypeError(f"{name} has dtype {getattr(array, 'dtype', None)}: give floating-point numbers")
    found = np.array(as_array(array)[0])
    if not np.isfinite(found).all():
        raise InvalidArgumentError(f"{name} holds values that are not finite: the file is damaged, or the training has failed")
    found.flags.writeable = False
    return found
