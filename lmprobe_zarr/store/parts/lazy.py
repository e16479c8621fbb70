"""`LazyArray`, a `VirtualArray` behind xarray's lazy indexing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.batch import as_slice
from lmprobe_zarr.store.parts.variable import NOWHERE, VirtualArray
from lmprobe_zarr.tokens import tidy_key, unwrapped
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["LazyArray", "as_stored"]


class LazyArray(BackendArray):
    """A `VirtualArray` for xarray's lazy indexing: ``[…]`` reads values, by outer indexing."""

    def __init__(self, array: VirtualArray) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "lmprobe_zarr", self.array.digest()

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        if isinstance(key, indexing.BasicIndexer):
            values = self._read_neighbours(key.tuple)
            if values is not None:
                return values
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.OUTER, self._read)

    def stored_rows(self, key: tuple[Any, ...]) -> Mask:
        """Which of the selected rows are stored in all of the selected layers; no values are read."""
        array = self.array
        layers = np.atleast_1d(np.arange(len(array.layers))[key[0]]) if array.layers is not None else np.zeros(1, np.int64)
        rows = np.atleast_1d(np.arange(array.n_rows)[key[0 if array.layers is None else 1]])
        prompts = rows if array.offsets is None else np.searchsorted(array.offsets, rows, "right") - 1
        return np.asarray((array.source[np.unique(array.classes[layers])][:, prompts] != NOWHERE).all(axis=0), bool)

    def _read_neighbours(self, key: tuple[Any, ...]) -> Array | None:
        """Whole rows that follow one another, of layers that do; None for any other selection, which `_read` and xarray take apart.

        This is what most reads are, and taking it apart would cost more than a small read.
        """
        layered = self.array.layers is not None
        ranges: list[tuple[int, int]] = [] if layered else [(0, 1)]
        for k, length in zip(key, self.shape, strict=True):
            begin, end, step = k.indices(length) if isinstance(k, slice) else (int(k), int(k) + 1, 1)
            if step != 1 or not 0 <= begin < end <= length or (len(ranges) > 1 and end - begin < length):
                return None
            ranges.append((begin, end))
        layers, rows = ranges[:2]
        values = self.array.read(np.arange(*layers), slice(*rows), note=True)
        if not layered:
            values = values[0]
        drop = tuple(slice(None) if isinstance(k, slice) else 0 for k in key)
        return np.asarray(values[drop], self.dtype)

    def _read(self, key: tuple[Any, ...]) -> Any:
        layered = self.array.layers is not None
        lengths = self.shape if layered else (1, *self.shape)
        # An integer drops its axis, as in numpy; it is read as an axis of length 1.
        drop = tuple(0 if isinstance(k, (int, np.integer)) else slice(None) for k in key)
        layers, rows, *inner = (_checked(k, n) for k, n in zip(key if layered else (0, *key), lengths, strict=True))
        at, flip = _ascending(rows, self.array.n_rows)
        # Chunks are cut by at most one list; the other inner axes are cut afterwards.
        listed = [i for i, k in enumerate(inner) if not isinstance(k, slice)][1:]
        columns = tuple(slice(None) if i in listed else k for i, k in enumerate(inner))
        if all(isinstance(c, slice) and c == slice(None) for c in columns):
            columns = ()
        values = self.array.read(_as_rows(layers, lengths[0]), at, columns, note=True)
        for i in listed:
            values = np.take(values, inner[i], axis=i + 2)
        if flip:
            values = values[:, ::-1]
        return np.asarray((values if layered else values[0])[drop], self.dtype)


def as_stored(variable: xr.Variable) -> xr.Variable:
    """The variable in the dtype that is stored; the same one where it is in that dtype, or is not read from a store."""
    data = unwrapped(variable._data)
    if not isinstance(data, indexing.LazilyIndexedArray) or not isinstance(data.array, LazyArray) or not data.array.array.widened:
        return variable
    array = LazyArray(replace(data.array.array, widened=False))
    return xr.Variable(variable.dims, indexing.LazilyIndexedArray(array, data.key), variable.attrs, variable.encoding, fastpath=True)


def _checked(key: Any, length: int) -> Any:
    """An indexer that does not point beyond its axis, an integer as an array of one.

    Raises
    ------
    IndexError
        It points beyond the axis.
    """
    if isinstance(key, slice):
        return key
    rows = np.atleast_1d(np.asarray(key, np.int64))
    # `tidy_key` has made negative indices positive: one that is still negative points before the beginning.
    if len(rows) and (rows.min() < 0 or rows.max() >= length):
        raise IndexError(f"an index is out of bounds for an axis of length {length}")
    return rows


def _as_rows(key: Any, length: int) -> Ints:
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    return np.atleast_1d(np.asarray(key, np.int64))


def _ascending(key: Any, length: int) -> tuple[slice | Ints, bool]:
    """Rows as a slice of step 1 where they are one, and whether the result must be reversed."""
    if isinstance(key, slice):
        begin, end, step = key.indices(length)
        if step == 1:
            return slice(begin, max(begin, end)), False
        rows = np.arange(begin, end, step)
        return (as_slice(rows[::-1]), True) if step < 0 else (rows, False)
    return as_slice(_as_rows(key, length)), False
