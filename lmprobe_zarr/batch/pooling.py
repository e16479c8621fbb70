"""What each pooling means, on ragged numpy arrays. Never torch, files or zarr."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["POOLINGS", "parse_poolings", "pool_ragged"]

POOLINGS: Final = ("last_token", "first_token", "mean", "max", "min")


def parse_poolings(poolings: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Pooling names as a tuple without repeats, in the given order.

    Raises
    ------
    InvalidArgumentError
        A name is none of ``last_token, first_token, mean, max, min``.
    """
    names = (poolings,) if isinstance(poolings, str) else tuple(poolings)
    for name in names:
        if name not in POOLINGS:
            raise InvalidArgumentError(f"unknown pooling {name!r}: choose from {', '.join(POOLINGS)}")
    return tuple(dict.fromkeys(names))


def pool_ragged(values: npt.NDArray[Any], n_tokens: npt.ArrayLike, pooling: str) -> npt.NDArray[Any]:
    """One vector per prompt from the tokens of all prompts laid end to end.

    Parameters
    ----------
    values : ndarray, shape (..., token, hidden), floating
        Tokens of the prompts, one prompt after the other.
    n_tokens : array_like of int, shape (prompt,)
        Tokens of each prompt; all at least 1, and together the length of the token axis.
    pooling : {"last_token", "first_token", "mean", "max", "min"}
        ``mean`` is accumulated in float32 (float64 for float64 input) and returned in the dtype of `values`.

    Returns
    -------
    ndarray, shape (..., prompt, hidden), dtype of `values`

    Raises
    ------
    InvalidArgumentError
        Unknown pooling, a prompt without tokens, or counts that do not sum to the token axis.
    """
    (pooling,) = parse_poolings(pooling)
    counts = np.asarray(n_tokens, dtype=np.int64)
    if counts.sum() != values.shape[-2]:
        raise InvalidArgumentError(f"the token axis has {values.shape[-2]} rows but n_tokens sums to {counts.sum()}")
    if (counts < 1).any():
        raise InvalidArgumentError(f"prompt number {int(np.argmin(counts))} has no tokens, so nothing can be pooled")
    ends = np.cumsum(counts)
    starts = ends - counts
    if pooling == "last_token":
        return values[..., ends - 1, :]
    if pooling == "first_token":
        return values[..., starts, :]
    if not len(counts):
        return values[..., :0, :]
    if pooling == "mean":
        wide = np.float64 if values.dtype == np.float64 else np.float32
        total = np.add.reduceat(values, starts, axis=-2, dtype=wide)
        mean: npt.NDArray[Any] = (total / counts[:, None].astype(wide)).astype(values.dtype)
        return mean
    reduce = np.maximum if pooling == "max" else np.minimum
    extreme: npt.NDArray[Any] = reduce.reduceat(values, starts, axis=-2)
    return extreme
