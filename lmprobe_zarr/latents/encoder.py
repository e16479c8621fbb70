"""`Encoder`: rows to their largest latents, in numpy. Knows no store and no file."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidArgumentError, NumberRangeError
from lmprobe_zarr.latents.sae import SparseAutoencoder
from lmprobe_zarr.typing import Array

__all__ = ["NO_LATENT", "Encoder", "largest"]

#: What stands in the place of an index where a row has fewer latents.
NO_LATENT: Final = -1
# Of the latents of the rows that are computed at a time, before most of them are dropped.
BLOCK_BYTES: Final = 64 << 20
_EPSILON: Final = 1e-5  # of SAELens' layer norm


class Encoder:
    """Encodes rows with one autoencoder.

    Parameters
    ----------
    sae : SparseAutoencoder
    k : int
        How many latents of each row are kept, at most; of TopK no more than it keeps itself.
    threshold : float
        Only larger ones are; 0 keeps all that are active.
    dtype : numpy dtype
        That it computes in.
    """

    def __init__(self, sae: SparseAutoencoder, *, k: int, threshold: float, dtype: npt.DTypeLike) -> None:
        self.sae, self.threshold, self.dtype = sae, threshold, np.dtype(dtype)
        self.k = k if sae.k is None else min(k, sae.k)  # TopK itself keeps no more
        self._weights = sae.encoder.astype(self.dtype)
        self.rows_per_block = max(1, BLOCK_BYTES // (self.dtype.itemsize * sae.num_latents))

    def encode(self, rows: Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """The largest latents of each row, descending, and which they are; of equal ones the first.

        Parameters
        ----------
        rows : ndarray, shape (token, hidden)
            Finite.

        Returns
        -------
        values : ndarray of float32, shape (token, k)
            0 where fewer are active.
        indices : ndarray of int32, shape (token, k)
            −1 there.

        Raises
        ------
        NumberRangeError
            A latent is beyond the range of float32.
        InvalidArgumentError
            A row of zeros, whose norm cannot be made constant.
        """
        values = np.zeros((len(rows), self.k), np.float32)
        indices = np.full((len(rows), self.k), NO_LATENT, np.int32)
        for start in range(0, len(rows), self.rows_per_block):
            block = slice(start, start + self.rows_per_block)
            largest(self._latents(rows[block]), self.k, self.threshold, values[block], indices[block])
        return values, indices

    def _latents(self, rows: Array) -> Array:
        """All latents, shape (token, latent); those that are not positive are not active."""
        sae = self.sae
        inputs = self._normalised(rows.astype(self.dtype))
        if sae.input_bias is not None:
            inputs = inputs - sae.input_bias.astype(self.dtype)
        found: Array = inputs @ self._weights
        if sae.architecture == "gated":
            closed = found + self._of("gate_bias") <= 0
            found *= np.exp(self._of("log_magnitude"))
            found += self._of("encoder_bias")
            found[closed] = 0
            return found
        if sae.encoder_bias is not None:
            found += self._of("encoder_bias")
        if sae.architecture == "jumprelu":
            found[found <= self._of("threshold")] = 0
        return found

    def _of(self, name: str) -> Array:
        held = getattr(self.sae, name)
        return np.zeros(self.sae.num_latents, self.dtype) if held is None else held.astype(self.dtype)

    def _normalised(self, rows: Array) -> Array:
        kind = self.sae.normalisation
        if kind in ("centred", "layer_norm"):
            rows = rows - rows.mean(axis=1, keepdims=True)
        if kind == "layer_norm":
            rows = rows / (rows.std(axis=1, ddof=1, keepdims=True) + _EPSILON)
        if kind == "constant_norm":
            norms = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
            if not norms.all():
                raise InvalidArgumentError(
                    f"{int((norms == 0).sum())} rows are all zeros, and this autoencoder divides by their norm: leave out their prompts"
                )
            rows = rows * (np.sqrt(rows.shape[1]) / norms)
        return rows * np.asarray(self.sae.input_scale, self.dtype) if self.sae.input_scale != 1 else rows


def largest(latents: Array, k: int, threshold: float, values: npt.NDArray[np.float32], indices: npt.NDArray[np.int32]) -> None:
    """Write the `k` largest latents above a threshold of each row into `values` and `indices`, descending; of equal ones the first."""
    n, width = latents.shape
    kept = latents > threshold
    counts = np.count_nonzero(kept, axis=1)
    over = np.flatnonzero(counts > k)
    if len(over):
        some = latents[over]
        least = np.partition(some, width - k, axis=1)[:, width - k]
        kept[over] &= some >= least[:, None]
        for row, bound in zip(over.tolist(), least.tolist(), strict=True):
            equal = np.flatnonzero(kept[row] & (latents[row] == bound))
            kept[row, equal[len(equal) - (np.count_nonzero(kept[row]) - k) :]] = False  # of several equal to the least the last
        counts[over] = k
    flat = np.flatnonzero(kept)
    rows = np.repeat(np.arange(n), counts)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((n, k), -np.inf, latents.dtype)
    columns = np.full((n, k), NO_LATENT, np.int32)
    found[rows, place], columns[rows, place] = latents.reshape(-1)[flat], flat - rows * width
    order = np.argsort(-found, axis=1, kind="stable")
    found, columns = np.take_along_axis(found, order, axis=1), np.take_along_axis(columns, order, axis=1)
    with np.errstate(over="ignore", under="ignore"):
        values[:] = np.where(columns >= 0, found, 0)
    if not np.isfinite(values).all():
        raise NumberRangeError("a latent is beyond 3.4e38, where float32 ends: the weights or the rows are of another scale")
    indices[:] = np.where(values > 0, columns, NO_LATENT)  # none that float32 rounds to zero
