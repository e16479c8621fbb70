"""Tokens of labelled arrays back to prompts: at, pool, pad."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.batch import pool_ragged
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.tokens.index import TokenIndex, by_appearance
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    pass


from typing import cast

import pandas as pd

from lmprobe_zarr.display import called

__all__ = ["prompts_of", "token_texts"]

T = TypeVar("T", xr.Dataset, xr.DataArray)

# Coordinates of single tokens, which mean nothing to a whole prompt.
OF_TOKENS: Final = ("position", "token_id", "char_start", "char_end")


def one_per_prompt(data: T, dim: Hashable) -> T:
    """One token per prompt, now along ``prompt`` with its ordinary index."""
    plain = data.drop_indexes(["prompt", "position"]) if isinstance(data.xindexes.get("prompt"), TokenIndex) else data
    swapped: T = plain.swap_dims({dim: "prompt"})
    return swapped


def pool_values(values: npt.NDArray[Any], counts: npt.NDArray[np.int64], pooling: str) -> npt.NDArray[Any]:
    """Pooled rows of values of shape (token, …)."""
    if pooling == "mean" and values.dtype.kind in "biu":
        values = values.astype(np.float64)
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    return pool_ragged(flat, counts, pooling).reshape(len(counts), *values.shape[1:])


def renamed(dims: tuple[Any, ...], dim: Hashable) -> list[Any]:
    return ["prompt" if d == dim else d for d in dims]


def prompts_of(array: xr.DataArray, dim: str) -> tuple[Array, Array]:
    """The number of each row's prompt, by first appearance, and the prompts.

    Raises
    ------
    InvalidArgumentError
        There is no ``prompt`` coordinate along the dimension.
    """
    index = array.xindexes.get("prompt")
    if isinstance(index, TokenIndex) and index.dim == dim:
        numbers = by_appearance(index.codes)
        first = np.unique(numbers, return_index=True)[1]
        return numbers, index.labels[index.codes[first]]
    if "prompt" not in array.coords or array.coords["prompt"].dims != (dim,):
        raise InvalidArgumentError(
            f"{called(array)} has no prompt coordinate along {dim!r}, which says which tokens belong together: open it with store.tokens()"
        )
    numbers, names = pd.factorize(np.asarray(array.coords["prompt"].values, object))
    return numbers, np.asarray(names).astype(str)


def token_texts(tokens: xr.DataArray | xr.Dataset) -> npt.NDArray[np.str_] | None:
    """What each token stands for in its prompt's text, shape (token,); "" for tokens that the tokenizer added, None where it is not known.

    Parameters
    ----------
    tokens : DataArray or Dataset
        With the coordinates ``text``, ``char_start`` and ``char_end`` along ``token``, as ``store.tokens()`` has them.
    """
    if not all(name in tokens.coords and tokens.coords[name].dims == ("token",) for name in ("text", "char_start", "char_end")):
        return None
    numbers, _ = prompts_of(cast("xr.DataArray", tokens), "token")
    first = np.unique(numbers, return_index=True)[1]
    texts = tokens.coords["text"].variable.isel(token=first).values.tolist()
    starts, ends = tokens.coords["char_start"].values.tolist(), tokens.coords["char_end"].values.tolist()
    if not any(texts):
        return None
    return np.array([texts[n][a:b] if a >= 0 else "" for n, a, b in zip(numbers.tolist(), starts, ends, strict=True)])
