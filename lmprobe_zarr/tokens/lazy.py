"""Lazy adapters of xarray. Work-arounds for errors of xarray stand only here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from xarray import Variable
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.typing import Array

__all__ = ["TakenArray", "lazy_variable", "stored_rows", "tidy_key"]


class TakenArray(BackendArray):
    """``labels[codes]``, one-dimensional, computed only when it is read.

    Parameters
    ----------
    labels : array_like, shape (prompt,)
        One value per prompt: an ndarray, or a lazy array of this package.
    codes : ndarray of int, shape (token,)
        Which prompt each token belongs to.
    """

    def __init__(self, labels: Any, codes: Array) -> None:
        self.labels, self.codes = labels, codes
        self.shape, self.dtype = codes.shape, labels.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.VECTORIZED, self._take)

    def _take(self, key: Any) -> Any:
        codes = self.codes[key]
        if isinstance(self.labels, np.ndarray):
            return self.labels[codes]
        wanted, inverse = np.unique(codes, return_inverse=True)
        values = np.asarray(self.labels[indexing.OuterIndexer((wanted,))])
        taken = values[inverse.reshape(np.shape(codes))]
        return np.asarray(taken, self.dtype)


def tidy_key(key: indexing.ExplicitIndexer, shape: tuple[int, ...]) -> indexing.ExplicitIndexer:
    """The same key, without two kinds of index that xarray 2026.9 passes wrongly to a lazy array.

    It cannot decompose an empty slice with a negative step. And it has already added the length to negative numbers, so a number that is
    still negative lies before the beginning; it must not be counted from the end a second time.

    Raises
    ------
    IndexError
        A number before the beginning of an axis.
    """
    tidy: list[Any] = []
    for k, n in zip(key.tuple, shape, strict=True):
        if not isinstance(k, slice) and not isinstance(key, indexing.VectorizedIndexer) and np.min(k, initial=0) < 0:
            raise IndexError(f"an index is out of bounds for an axis of length {n}")
        tidy.append(slice(0) if isinstance(k, slice) and not range(*k.indices(n)) else k)
    return type(key)(tuple(tidy))


def stored_rows(variable: Variable) -> Array | None:
    """Which rows of a lazy variable are stored, as truth values; None where it is none of this package's, or has been computed with.

    A row counts as stored if it is in all layers that the variable has.
    """
    data: Any = variable._data
    while isinstance(data, indexing.CopyOnWriteArray | indexing.MemoryCachedArray):
        data = data.array
    if not isinstance(data, indexing.LazilyIndexedArray) or not hasattr(data.array, "stored_rows"):
        return None
    found: Array = data.array.stored_rows(data.key.tuple)
    return found


def lazy_variable(dims: tuple[Hashable, ...], array: BackendArray, attrs: Mapping[str, Any] | None = None) -> Variable:
    """An xarray variable that reads only what is taken from it."""
    return Variable(dims, indexing.LazilyIndexedArray(array), attrs, fastpath=True)
