"""Flags of tokens over several parts: roles, of which each part has codes of its own, as names; and truth values."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.batch import NO_ROLE, ROLES, as_slice, decode_role_names
from lmprobe_zarr.interchange import TEXT
from lmprobe_zarr.store.parts.variable import NOWHERE, VirtualArray
from lmprobe_zarr.tokens import tidy_key
from lmprobe_zarr.typing import Array, Ints

__all__ = ["FlagArray", "RoleArray", "has_role_names"]


def has_role_names(array: VirtualArray) -> bool:
    """Whether any part says what its codes of roles mean."""
    return any(decode_role_names(stored.info.attributes) is not None for stored in array.arrays)


class FlagArray(BackendArray):
    """Truth values of tokens, False where unknown, for xarray's lazy indexing.

    Parameters
    ----------
    array : VirtualArray
        1, 0 and -1.
    """

    def __init__(self, array: VirtualArray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype: np.dtype[Any] = np.dtype(bool)

    def values(self, rows: slice | Ints) -> Array:
        """The values of some tokens, in the dtype of this array."""
        return np.asarray(self.array.read(np.zeros(1, np.int64), rows, note=True)[0] == 1, bool)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        rows = np.arange(self.shape[0])[key[0]]
        taken = self.values(as_slice(rows) if rows.ndim else rows[None])
        return np.asarray(taken.reshape(np.shape(rows)), self.dtype)


class RoleArray(FlagArray):
    """The names of the roles of tokens, "" where unknown, for xarray's lazy indexing.

    Parameters
    ----------
    array : VirtualArray
        The codes. Those of parts that do not say what they mean are unknown.
    """

    def __init__(self, array: VirtualArray) -> None:
        super().__init__(array)
        self.dtype = TEXT

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All names by their common code."""
        found = dict.fromkeys(ROLES)
        for stored in self.array.arrays:
            found |= dict.fromkeys(name for name in decode_role_names(stored.info.attributes) or () if name)
        return tuple(found)

    @functools.cached_property
    def _common(self) -> Ints:
        """The common code of each code of each part, shape (part, code + 1); the last code stands for -1."""
        lists = [decode_role_names(stored.info.attributes) or () for stored in self.array.arrays]
        table = np.full((len(lists), max(map(len, lists), default=0) + 1), NO_ROLE, np.int64)
        for row, names in zip(table, lists, strict=True):
            row[: len(names)] = [self.names.index(name) if name else NO_ROLE for name in names]
        return table

    def codes(self, rows: slice | Ints) -> Ints:
        """The common codes of some tokens."""
        found = np.asarray(self.array.read(np.zeros(1, np.int64), rows, note=True)[0], np.int64)
        table = self._common
        found = np.where((found >= 0) & (found < table.shape[1] - 1), found, NO_ROLE)
        if len(table) == 1 or (table == table[0]).all():
            common: Ints = table[0][found]
            return common
        places = np.arange(*rows.indices(self.array.n_rows)) if isinstance(rows, slice) else rows
        prompts = places if self.array.offsets is None else np.searchsorted(self.array.offsets, places, "right") - 1
        part = self.array.source[0][prompts]
        return np.where(part == NOWHERE, NO_ROLE, table[part, found])

    def values(self, rows: slice | Ints) -> Array:
        """The names of the roles of some tokens."""
        texts: Array = np.array([*self.names, ""], object)
        return texts[self.codes(rows)]
