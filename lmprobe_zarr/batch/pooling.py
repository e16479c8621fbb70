"""Poolings: one vector per prompt from its tokens, on ragged numpy arrays. Never torch, files or zarr.

A new pooling is a function in `_POOL_RAGGED`, and its twin for padded tensors in ``extraction.models.padded_pooling``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.display import nearest
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array, Ints

__all__ = ["ALL", "POOLINGS", "parse_poolings", "pool_ragged", "pooled_name", "split_variable"]


def _last_token(values: Array, starts: Ints, counts: Ints) -> Array:
    return values[..., starts + counts - 1, :]


def _first_token(values: Array, starts: Ints, _counts: Ints) -> Array:
    return values[..., starts, :]


def _mean(values: Array, starts: Ints, counts: Ints) -> Array:
    wide = np.float64 if values.dtype == np.float64 else np.float32
    total = np.add.reduceat(values, starts, axis=-2, dtype=wide)
    mean: Array = (total / counts[:, None].astype(wide)).astype(values.dtype)
    return mean


def _max(values: Array, starts: Ints, _counts: Ints) -> Array:
    return np.asarray(np.maximum.reduceat(values, starts, axis=-2))


def _min(values: Array, starts: Ints, _counts: Ints) -> Array:
    return np.asarray(np.minimum.reduceat(values, starts, axis=-2))


# Each function takes the values, and the first row and the number of rows of every prompt.
_POOL_RAGGED: Final[Mapping[str, Callable[[Array, Ints, Ints], Array]]] = {
    "last_token": _last_token,
    "first_token": _first_token,
    "mean": _mean,
    "max": _max,
    "min": _min,
}
POOLINGS: Final = tuple(_POOL_RAGGED)
#: The part that is all tokens of a prompt, whose variables are ``<site>_<pooling>``.
ALL: Final = "all"


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
            raise InvalidArgumentError(f"unknown pooling {name!r}{nearest(name, POOLINGS)}: choose from {', '.join(POOLINGS)}")
    return tuple(dict.fromkeys(names))


def pool_ragged(values: Array, n_tokens: npt.ArrayLike, pooling: str) -> Array:
    """One vector per prompt from the tokens of all prompts laid end to end.

    Parameters
    ----------
    values : ndarray, shape (..., token, hidden), floating
        Tokens of the prompts, one prompt after another.
    n_tokens : array_like of int, shape (prompt,)
        Tokens of each prompt, each at least 1; their sum is the length of the token axis.
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
    if not len(counts):
        return values[..., :0, :]
    return _POOL_RAGGED[pooling](values, np.cumsum(counts) - counts, counts)


def pooled_name(site: str, pooling: str, part: str = ALL) -> str:
    """The name of a pooled variable."""
    return f"{site}_{pooling}" if part == ALL else f"{site}_{pooling}_{part}"


def split_variable(variable: str) -> tuple[str, str | None, str]:
    """Site, pooling and part of the name of a pooled variable; no pooling where it is none, and `ALL` for all tokens.

    >>> split_variable("resid_mean_assistant")
    ('resid', 'mean', 'assistant')
    """
    for pooling in POOLINGS:
        if variable.endswith(f"_{pooling}"):
            return variable.removesuffix(f"_{pooling}"), pooling, ALL
    for pooling in POOLINGS:
        site, found, part = variable.partition(f"_{pooling}_")
        if site and found and part:
            return site, pooling, part
    return variable, None, ALL
