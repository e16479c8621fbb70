"""Lazy adapters of xarray. Work-arounds for errors of xarray stand only here."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from typing import Any, cast

import numpy as np
import xarray as xr
from xarray import Variable
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.typing import Array

__all__ = [
    "ColumnVariable",
    "LazyVariable",
    "SharedVariable",
    "TakenArray",
    "kept_in_memory",
    "lazy_variable",
    "protect",
    "stored_rows",
    "tidy_key",
    "unwrapped",
    "with_columns",
]


class LazyVariable(Variable):
    """A variable that reads only what is taken from it, and whose Dask arrays are named after what is stored.

    xarray names the Dask arrays of `xarray.open_dataset` after the place and the time of its folder, which for many places does not change
    with the content. Dask takes two arrays of one name for the same values.
    """

    __slots__ = ()

    def chunk(  # type: ignore[override]
        self,
        chunks: Any = {},  # noqa: B006 — as in xarray
        name: str | None = None,
        lock: bool | None = None,
        inline_array: bool | None = None,
        chunked_array_type: Any = None,
        from_array_kwargs: Any = None,
        **chunks_kwargs: Any,
    ) -> Any:
        """As `xarray.Variable.chunk`, with a name of the Dask array that changes with what is stored."""
        data = unwrapped(self._data)
        tokenize = getattr(getattr(data, "array", None), "__dask_tokenize__", None)
        if not isinstance(data, indexing.LazilyIndexedArray) or tokenize is None:
            return super().chunk(chunks, name, lock, inline_array, chunked_array_type, from_array_kwargs, **chunks_kwargs)
        from dask.base import tokenize as digest

        given = dict(from_array_kwargs or {})
        prefix = str(given.get("name") or name or "xarray-").rpartition("-")[0] or "xarray"
        given["name"] = f"{prefix}-{digest(tokenize(), data.key.tuple, str(chunks), str(chunks_kwargs))}"
        return super().chunk(chunks, None, lock, inline_array, chunked_array_type, given, **chunks_kwargs)


class ColumnVariable(Variable):
    """A column or a coordinate of an index: `chunk` leaves it as it is, as it does the variables of pandas indexes.

    xarray neither groups nor selects by a Dask array, and Dask sizes no chunks of texts.
    """

    __slots__ = ()

    @property
    def _in_memory(self) -> bool:
        # xarray does not chunk what is in memory. It asks this when it prints too, and printing must read nothing.
        return bool(super()._in_memory) or sys._getframe(1).f_globals.get("__name__") == "xarray.backends.api"

    def chunk(self, *_: Any, **__: Any) -> Any:
        """The same variable."""
        return self.copy(deep=False)


class SharedVariable(ColumnVariable):
    """A column of an index whose shallow copies share what was read: an index keeps one, and datasets have copies of it.

    xarray lets copies of other variables read for themselves, because they can be written to.
    """

    __slots__ = ()

    def copy(self, deep: bool = True, data: Any = None) -> Any:
        """As `xarray.Variable.copy`."""
        if deep or data is not None:
            return super().copy(deep, data)
        return type(self)(self.dims, cast(Any, self._data), self._attrs, self._encoding, fastpath=True)


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


def lazy_variable(
    dims: tuple[Hashable, ...], array: BackendArray, attrs: Mapping[str, Any] | None = None, *, column: bool = False
) -> Variable:
    """An xarray variable that reads only what is taken from it; a column is never chunked."""
    kind = ColumnVariable if column else LazyVariable
    return kind(dims, indexing.LazilyIndexedArray(array), attrs, fastpath=True)


def kept_in_memory(variable: Variable) -> SharedVariable:
    """The lazy variable, of which what was read once stays in memory."""
    held = indexing.MemoryCachedArray(variable._data)  # type: ignore[no-untyped-call]
    return SharedVariable(variable.dims, held, variable.attrs, variable.encoding, fastpath=True)


def with_columns(data: xr.Dataset, coords: Mapping[str, Any]) -> xr.Dataset:
    """The dataset with coordinates. xarray makes plain variables of coordinates that it is given, but not of data that become some."""
    columns = {name: coord for name, coord in coords.items() if isinstance(coord, ColumnVariable)}
    others = {name: coord for name, coord in coords.items() if name not in columns}
    return data.assign_coords(others).assign(columns).set_coords(list(columns))


def protect(data: xr.Dataset) -> xr.Dataset:
    """The dataset as `xarray.open_dataset` returns one: what was loaded stays in memory, and what is assigned to goes into a copy.

    Parameters
    ----------
    data : Dataset
        Of lazy variables; changed in place.
    """
    for name, variable in data.variables.items():
        if name not in data.xindexes and isinstance(variable._data, indexing.LazilyIndexedArray):
            variable.data = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(variable._data))  # type: ignore[no-untyped-call]
    return data


def unwrapped(data: Any) -> Any:
    """The array inside of what `protect` or `xarray.open_dataset` has put around it."""
    while isinstance(data, (indexing.CopyOnWriteArray, indexing.MemoryCachedArray)):
        data = data.array
    return data


def stored_rows(variable: Variable) -> Array | None:
    """Which rows of a lazy variable are stored, as truth values; None where it is none of this package's, or has been computed with.

    A row counts as stored if it is in all layers that the variable has.
    """
    data = unwrapped(variable._data)
    if not isinstance(data, indexing.LazilyIndexedArray) or not hasattr(data.array, "stored_rows"):
        return None
    found: Array = data.array.stored_rows(data.key.tuple)
    return found
