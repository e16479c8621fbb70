"""An xarray index over ``prompt(token)`` and ``position(token)``, so that tokens are selected by prompt and by place.

It behaves as a pandas MultiIndex over the two does, but keeps one int32 per token instead of one label, selects lists of
prompts in the given order, and is dropped rather than left stale by whatever it cannot follow.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from xarray import Index, Variable
from xarray.backends import BackendArray
from xarray.core import indexing
from xarray.core.indexing import IndexSelResult

from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError
from lmprobe_zarr.ragged import as_slice

__all__ = ["TakenArray", "TokenIndex", "lazy_variable"]

Array = npt.NDArray[Any]


class TakenArray(BackendArray):
    """``labels[codes]``, one-dimensional, made only where it is looked at.

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
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.VECTORIZED, self._take)

    def _take(self, key: Any) -> Any:
        codes = self.codes[key]
        if isinstance(self.labels, np.ndarray):
            return self.labels[codes]
        wanted, inverse = np.unique(codes, return_inverse=True)
        values = np.asarray(self.labels[indexing.OuterIndexer((wanted,))])
        taken = values[inverse.reshape(np.shape(codes))]
        return np.asarray(taken, self.dtype)


def lazy_variable(dims: tuple[str, ...], array: BackendArray, attrs: Mapping[str, Any] | None = None) -> Variable:
    """An xarray variable that reads only what is taken from it."""
    return Variable(dims, indexing.LazilyIndexedArray(array), attrs, fastpath=True)


class TokenIndex(Index):
    """Index over the coordinates ``prompt`` and ``position`` of one token dimension.

    Parameters
    ----------
    labels : ndarray of str, shape (prompt,)
        The prompt hashes, no hash twice.
    codes : ndarray of int32, shape (token,)
        For each token the number of its prompt in `labels`.
    positions : ndarray of int64, shape (token,)
        For each token its place in its prompt.
    dim : str
        Name of the token dimension.

    Examples
    --------
    >>> tokens = tokens.set_xindex(["prompt", "position"], TokenIndex)  # doctest: +SKIP
    >>> tokens.sel(prompt="cdb0653ff12f87fd")  # doctest: +SKIP
    """

    def __init__(self, labels: Array, codes: Array, positions: Array, dim: str = "token") -> None:
        self.labels, self.codes, self.positions, self.dim = labels, codes, positions, dim
        self._rows_by_code: tuple[Array, Array] | None = None
        self._lookup: pd.Index[Any] | None = None

    @classmethod
    def from_variables(cls, variables: Mapping[Any, Variable], *, options: Mapping[str, Any]) -> TokenIndex:
        """The index of two coordinates named ``prompt`` and ``position`` on one dimension."""
        if set(variables) != {"prompt", "position"} or options:
            raise InvalidArgumentError(f"a TokenIndex takes the coordinates prompt and position, not {sorted(map(str, variables))}")
        prompt, position = variables["prompt"], variables["position"]
        if prompt.dims != position.dims or prompt.ndim != 1:
            raise InvalidArgumentError(f"prompt{prompt.dims} and position{position.dims} must lie on one dimension")
        codes, labels = pd.factorize(np.asarray(prompt.values, object))
        return cls(np.asarray(labels), codes.astype(np.int32), np.asarray(position.values), str(prompt.dims[0]))

    def create_variables(self, variables: Mapping[Any, Variable] | None = None) -> dict[Hashable, Variable]:
        """The two coordinates; ``prompt`` is spelled out only where it is looked at."""
        old = variables or {}
        attrs = {name: old[name].attrs if name in old else None for name in ("prompt", "position")}
        return {
            "prompt": lazy_variable((self.dim,), TakenArray(self.labels, self.codes), attrs["prompt"]),
            "position": Variable((self.dim,), self.positions, attrs["position"]),
        }

    def to_pandas_index(self) -> pd.Index[Any]:
        """The pandas MultiIndex over the same prompts and positions."""
        places, codes = np.unique(self.positions, return_inverse=True)
        return pd.MultiIndex(
            levels=[pd.Index(self.labels.astype(object)), pd.Index(places)],
            codes=cast(Any, [self.codes, codes]),
            names=["prompt", "position"],
            verify_integrity=False,
        )

    def _rows_of(self, prompts: Iterable[Any]) -> list[Array]:
        if self._lookup is None or self._rows_by_code is None:
            self._lookup = pd.Index(self.labels.astype(object))
            ordered = len(self.codes) < 2 or bool((np.diff(self.codes) >= 0).all())
            order = np.arange(len(self.codes)) if ordered else np.argsort(self.codes, kind="stable")
            self._rows_by_code = order, np.searchsorted(self.codes[order], np.arange(len(self.labels) + 1))
        order, bounds = self._rows_by_code
        wanted = np.asarray(list(prompts), object)
        codes = self._lookup.get_indexer(pd.Index(wanted, dtype=object))
        rows = [order[bounds[c] : bounds[c + 1]] if c >= 0 else order[:0] for c in codes]
        missing = [str(label) for label, found in zip(wanted, rows, strict=True) if not len(found)]
        if missing:
            raise MissingPromptsError(
                f"{len(missing)} of {len(wanted)} prompts have no tokens here, first {missing[0][:40]!r}: select by prompt hash, "
                "see lmprobe_zarr.prompt_hash"
            )
        return rows

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """Rows of the given prompts, in the given order, and of the given positions in them.

        Raises
        ------
        MissingPromptsError
            A prompt has no tokens here, or no token stands at a position.
        InvalidArgumentError
            Something that selects no prompts: a slice, `method` or `tolerance`.
        """
        if method is not None or tolerance is not None:
            raise InvalidArgumentError("prompt and position are selected exactly: leave out method and tolerance")
        plain = {name: getattr(value, "values", value) for name, value in labels.items()}
        rows = np.arange(len(self.codes))
        if "prompt" in plain:
            if isinstance(plain["prompt"], slice):
                raise InvalidArgumentError("prompts have no order to slice by: give one hash, or a list of hashes")
            rows = np.concatenate([rows[:0], *self._rows_of(np.atleast_1d(np.asarray(plain["prompt"], object)))])
        if "position" in plain:
            rows = rows[self._at(plain["position"], self.positions[rows])]
        scalars = all(np.ndim(value) == 0 and not isinstance(value, slice) for value in plain.values())
        if len(plain) == 2 and scalars and len(rows) == 1:
            # Both scalars: one token, and the dimension goes, as with a MultiIndex.
            return IndexSelResult({self.dim: int(rows[0])})
        return IndexSelResult({self.dim: as_slice(rows)})

    @staticmethod
    def _at(wanted: Any, places: Array) -> Array:
        if isinstance(wanted, slice):
            if wanted.step not in {None, 1}:
                raise InvalidArgumentError("positions are sliced without a step: use isel afterwards")
            # Labels, so both ends are included, as everywhere in xarray's sel.
            low = -np.inf if wanted.start is None else wanted.start
            high = np.inf if wanted.stop is None else wanted.stop
            return (places >= low) & (places <= high)
        listed = np.atleast_1d(np.asarray(wanted))
        found = np.isin(places, listed)
        absent = listed[~np.isin(listed, places)]
        if len(absent):
            raise MissingPromptsError(f"no token stands at position {absent[0]}: positions go from 0 to {places.max(initial=-1)}")
        return found

    def isel(self, indexers: Mapping[Any, Any]) -> TokenIndex | None:
        """The index of the selected tokens; None (no index) where they no longer lie along one token dimension."""
        indexer = indexers[self.dim]
        if isinstance(indexer, Variable):
            if indexer.dims != (self.dim,):
                return None
            indexer = indexer.values
        if not isinstance(indexer, slice) and np.ndim(indexer) != 1:
            return None
        return TokenIndex(self.labels, self.codes[indexer], self.positions[indexer], self.dim)

    def equals(self, other: Index, *, exclude: frozenset[Hashable] | None = None) -> bool:
        """Whether the other index has the same prompts and positions in the same order."""
        if not isinstance(other, TokenIndex) or len(self.codes) != len(other.codes):
            return False
        if self.labels is not other.labels and not np.array_equal(self.labels, other.labels):
            if not np.array_equal(self.labels[self.codes], other.labels[other.codes]):
                return False
        elif not np.array_equal(self.codes, other.codes):
            return False
        return bool(np.array_equal(self.positions, other.positions))

    def _from_pandas(self, index: pd.MultiIndex) -> TokenIndex:
        labels, codes = np.asarray(index.levels[0], object), np.asarray(index.codes[0], np.int32)
        return TokenIndex(labels.astype(str), codes, np.asarray(index.get_level_values(1), np.int64), self.dim)

    def join(self, other: TokenIndex, how: Any = "inner") -> TokenIndex:
        """The index of the tokens that both have (inner) or that either has (outer)."""
        mine, theirs = self.to_pandas_index(), other.to_pandas_index()
        joined = mine.intersection(theirs, sort=False) if how == "inner" else mine.union(theirs)
        return self._from_pandas(cast(pd.MultiIndex, joined))

    def reindex_like(self, other: TokenIndex) -> dict[Hashable, Any]:
        """Where each token of the other index stands in this one, −1 where it does not."""
        mine = self.to_pandas_index()
        if not mine.is_unique:
            raise InvalidArgumentError("a prompt occurs several times along token, so tokens cannot be aligned: select each prompt once")
        return {self.dim: mine.get_indexer(other.to_pandas_index())}

    def roll(self, shifts: Mapping[Any, int]) -> TokenIndex:
        """The index after ``roll(token=…, roll_coords=True)``."""
        shift = shifts[self.dim]
        return TokenIndex(self.labels, np.roll(self.codes, shift), np.roll(self.positions, shift), self.dim)

    def rename(self, name_dict: Mapping[Any, Hashable], dims_dict: Mapping[Any, Hashable]) -> TokenIndex:
        """The index after the token dimension was renamed."""
        return TokenIndex(self.labels, self.codes, self.positions, str(dims_dict.get(self.dim, self.dim)))

    @classmethod
    def concat(cls, indexes: Sequence[TokenIndex], dim: Hashable, positions: Iterable[Iterable[int]] | None = None) -> TokenIndex:
        """The index of several, one after the other, or interleaved as `positions` says."""
        spelled = np.concatenate([np.asarray(index.labels, object)[index.codes] for index in indexes])
        codes, labels = pd.factorize(spelled)
        places = np.concatenate([index.positions for index in indexes])
        if positions is not None:
            order = np.argsort(np.concatenate([np.asarray(list(p)) for p in positions]), kind="stable")
            codes, places = codes[order], places[order]
        return cls(np.asarray(labels).astype(str), codes.astype(np.int32), places, str(dim))

    def should_add_coord_to_array(self, name: Hashable, var: Variable, dims: set[Hashable]) -> bool:
        """Both coordinates stay on every array along the token dimension."""
        return self.dim in dims

    def __repr__(self) -> str:
        return f"TokenIndex({len(self.codes)} tokens of {len(self.labels)} prompts, dim={self.dim!r})"
