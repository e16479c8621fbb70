"""An xarray index over ``prompt(token)`` and ``position(token)``, so that tokens are selected by prompt and by position.

Where a store has them, it also covers ``role``, ``turn`` and ``generated``: xarray selects by one index for each dimension. These are read
when they are selected by, and never tell tokens apart.

It behaves as a pandas MultiIndex over both coordinates, with three differences. It keeps one int32 per token instead of one label, it
selects lists of prompts in the given order, and an operation that it cannot follow drops it instead of leaving it stale.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from xarray import Coordinates, DataArray, Dataset, Index, Variable, align, broadcast
from xarray.core.indexing import IndexSelResult
from xarray.indexes import PandasIndex

from lmprobe_zarr.batch import as_slice, concat_ranges, offsets_of, prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError
from lmprobe_zarr.tokens.lazy import ColumnVariable, SharedVariable, TakenArray, lazy_variable
from lmprobe_zarr.tokens.prompt_labels import as_prompt_labels
from lmprobe_zarr.typing import Array

__all__ = ["INDEXED_COLUMNS", "TokenIndex", "by_appearance", "has_value", "without_coordinates"]

#: Columns of tokens that can be selected by, in the order in which an index has them.
INDEXED_COLUMNS: Final = ("role", "turn", "generated")


class TokenIndex(Index):
    """Index over the coordinates ``prompt`` and ``position`` of one token dimension.

    Parameters
    ----------
    labels : ndarray of str, shape (prompt,)
        The prompt hashes, each once.
    codes : ndarray of int32, shape (token,)
        For each token the number of its prompt in `labels`.
    positions : ndarray of int64, shape (token,)
        For each token its position in its prompt.
    dim : str
        Name of the token dimension.
    names : (str, str)
        Names of the two coordinates.
    columns : mapping of str to Variable, optional
        Further coordinates of the tokens to select by, usually lazy: texts, whole numbers or truth values.

    Examples
    --------
    >>> tokens = tokens.set_xindex(["prompt", "position"], TokenIndex)  # doctest: +SKIP
    >>> tokens.sel(prompt="cdb0653ff12f87fd")  # doctest: +SKIP
    """

    def __init__(
        self,
        labels: Array,
        codes: Array,
        positions: Array,
        dim: Hashable = "token",
        names: tuple[Hashable, Hashable] = ("prompt", "position"),
        columns: Mapping[Hashable, Variable] | None = None,
    ) -> None:
        self.labels, self.codes, self.dim, self.names = labels, codes, dim, names
        self.columns = dict(columns or {})
        # The coordinate and all selections share this array's memory, so a write to one would change them all.
        self.positions = positions.view()
        self.positions.flags.writeable = False
        self._found: tuple[pd.Index[Any], Array | None, Array] | None = None

    def _like(self, codes: Array, positions: Array, columns: Mapping[Hashable, Variable]) -> TokenIndex:
        return TokenIndex(self.labels, codes, positions, self.dim, self.names, columns)

    @property
    def coord_names(self) -> tuple[Hashable, ...]:
        """Names of all coordinates of this index."""
        return (*self.names, *self.columns)

    @classmethod
    def from_variables(cls, variables: Mapping[Any, Variable], *, options: Mapping[str, Any]) -> TokenIndex:
        """The index of two coordinates named ``prompt`` and ``position`` on one dimension, and of those of `INDEXED_COLUMNS` if given."""
        if not {"prompt", "position"} <= set(variables) <= {"prompt", "position", *INDEXED_COLUMNS} or options:
            raise InvalidArgumentError(
                f"a TokenIndex takes the coordinates prompt and position, and perhaps {', '.join(INDEXED_COLUMNS)}, "
                f"not {sorted(map(str, variables))}"
            )
        prompt, position = variables["prompt"], variables["position"]
        if len({variable.dims for variable in variables.values()}) > 1 or prompt.ndim != 1:
            dims = " and ".join(f"{name}{variable.dims}" for name, variable in variables.items())
            raise InvalidArgumentError(f"{dims} must lie on one dimension")
        labels, places = np.asarray(prompt.values), np.asarray(position.values)
        codes, uniques = pd.factorize(labels.astype(object))
        if (codes < 0).any() or places.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"some tokens have no prompt, or no whole number as position (dtype {places.dtype}), as after pad: leave them out first"
            )
        columns: dict[Hashable, Variable] = {name: variables[name] for name in INDEXED_COLUMNS if name in variables}
        return cls(
            np.asarray(uniques).astype(labels.dtype), codes.astype(np.int32), places.astype(np.int64), prompt.dims[0], columns=columns
        )

    def create_variables(self, variables: Mapping[Any, Variable] | None = None) -> dict[Hashable, Variable]:
        """The coordinates; the labels of ``prompt`` are made only when they are read."""
        old = variables or {}
        if any(name in old and old[name].dims == (name,) != (self.dim,) for name in self.coord_names):
            raise InvalidArgumentError(
                f"swap_dims has put {self.dim!r} on {' or '.join(map(repr, self.names))}, and no index of tokens can follow: "
                f"call drop_indexes({list(self.coord_names)}) before it"
            )
        prompt, position = self.names
        attrs = {name: old[name].attrs if name in old else None for name in self.names}
        return {
            prompt: lazy_variable((self.dim,), TakenArray(self.labels, self.codes), attrs[prompt], column=True),
            position: ColumnVariable((self.dim,), self.positions, attrs[position]),
            # With the same data, and not as a copy of xarray's, so that what either has read is in the memory of both.
            **{name: _on(column, self.dim, old[name].attrs if name in old else column.attrs) for name, column in self.columns.items()},
        }

    def to_pandas_index(self) -> pd.Index[Any]:
        """The pandas MultiIndex over the same prompts and positions."""
        places, codes = np.unique(self.positions, return_inverse=True)
        return pd.MultiIndex(
            levels=[pd.Index(self.labels.astype(object)), pd.Index(places)],
            codes=cast(Any, [self.codes, codes]),
            names=list(self.names),
            verify_integrity=False,
        )

    def _by_prompt(self) -> tuple[pd.Index[Any], Array | None, Array]:
        """The labels, the rows by prompt (None where they are in that order anyway), and where each prompt's begin among these."""
        if self._found is None:
            ordered = len(self.codes) < 2 or bool((self.codes[1:] >= self.codes[:-1]).all())
            order = None if ordered else np.argsort(self.codes, kind="stable")
            codes = self.codes if order is None else self.codes[order]
            bounds = np.searchsorted(codes, np.arange(len(self.labels) + 1, dtype=codes.dtype))
            self._found = as_prompt_labels(self.labels), order, bounds
        return self._found

    def _slice_of(self, prompt: str) -> slice | None:
        """The rows of a single prompt without the arrays that a list of them needs; None where they are no slice."""
        lookup, order, bounds = self._by_prompt()
        try:
            code = lookup.get_loc(prompt)
        except KeyError:
            return None
        if order is not None or not isinstance(code, int) or bounds[code] == bounds[code + 1]:
            return None
        return slice(int(bounds[code]), int(bounds[code + 1]))

    def _rows_of(self, prompts: Iterable[Any]) -> list[Array]:
        lookup, order, bounds = self._by_prompt()
        wanted = np.asarray(list(prompts), object)
        codes = lookup.get_indexer(pd.Index(wanted, dtype=object))
        rows = [np.arange(bounds[c], bounds[c + 1]) if c >= 0 else np.zeros(0, np.int64) for c in codes]
        if order is not None:
            rows = [order[some] for some in rows]
        missing = [str(label) for label, found in zip(wanted, rows, strict=True) if not len(found)]
        if missing:
            raise MissingPromptsError(
                f"{len(missing)} of {len(wanted)} prompts have no tokens here, first {missing[0][:40]!r}: select by text or hash; "
                "lmprobe_zarr.prompt_hash gives the hash of token ids and chats"
            )
        return rows

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """Rows of the given prompts, in the given order, of the given positions in them, and with the given values of other columns.

        A list of positions gives the tokens of each prompt in the order of that list; a slice or a single position keeps the order
        of the rows. A prompt that ends before a position gives no token for it. Two DataArrays are taken pair by pair, as
        everywhere in xarray.

        Raises
        ------
        MissingPromptsError
            A prompt has no tokens here, no token stands at a position, or none has a value.
        InvalidArgumentError
            Something that selects no prompts or positions: a slice of prompts, a mask, `method` or `tolerance`.
        """
        if method is not None or tolerance is not None:
            raise InvalidArgumentError("prompt and position are selected exactly: leave out method and tolerance")
        if self.columns.keys() & labels.keys():
            return self._sel_columns(labels)
        prompt, position = self.names
        if len(labels) == 1 and isinstance(labels.get(prompt), str):
            single = self._slice_of(labels[prompt])
            if single is not None:
                return IndexSelResult({self.dim: single})
        if len(labels) == 2 and all(isinstance(value, (DataArray, Variable)) and value.ndim for value in labels.values()):
            return IndexSelResult({self.dim: self._pairs(labels[prompt], labels[position])})
        plain = {name: _plain(name, value, numbers=name == position) for name, value in labels.items()}
        rows = np.arange(len(self.codes))
        groups: Array | None = None
        if prompt in plain:
            if isinstance(plain[prompt], slice):
                raise InvalidArgumentError("prompts have no order to slice by: give one hash, or a list of hashes")
            found = self._rows_of(np.atleast_1d(plain[prompt]))
            groups = np.repeat(np.arange(len(found)), [len(some) for some in found])
            rows = np.concatenate([rows[:0], *found])
        if position in plain:
            rows = rows[self._at(plain[position], rows, groups)]
        scalars = all(np.ndim(value) == 0 and not isinstance(value, slice) for value in plain.values())
        if len(plain) == 2 and scalars and len(rows) == 1:
            # Two scalars select one token and drop the dimension, as with a MultiIndex.
            return IndexSelResult({self.dim: int(rows[0])})
        return IndexSelResult({self.dim: as_slice(rows)})

    def _sel_columns(self, labels: Mapping[Any, Any]) -> IndexSelResult:
        """What `sel` selects by prompt and position, of which only the tokens whose other columns have the given values."""
        others = {name: value for name, value in labels.items() if name not in self.columns}
        rows: Any = self.sel(others).dim_indexers[self.dim] if others else np.arange(len(self.codes))
        if isinstance(rows, DataArray):
            raise InvalidArgumentError(f"pairs of {self.names[0]} and {self.names[1]} are selected alone: leave out {[*self.columns]}")
        found = np.arange(*rows.indices(len(self.codes))) if isinstance(rows, slice) else np.atleast_1d(rows)
        for name, column in self.columns.items():
            if name in labels:
                found = found[has_value(name, _taken(column, self.dim, found), labels[name])]
        return IndexSelResult({self.dim: int(found[0]) if np.ndim(rows) == 0 and not isinstance(rows, slice) else as_slice(found)})

    def _at(self, wanted: Any, rows: Array, groups: Array | None) -> Array:
        """Which of `rows` have the wanted positions; `groups` is the number of each row's prompt in the selection."""
        places = self.positions[rows]
        if isinstance(wanted, slice):
            if wanted.step not in {None, 1}:
                raise InvalidArgumentError("positions are sliced without a step: use isel afterwards")
            if not all(end is None or np.asarray(end).dtype.kind in "iuf" for end in (wanted.start, wanted.stop)):
                raise InvalidArgumentError(f"positions are sliced by numbers, not {wanted!r}")
            for end in (wanted.start, wanted.stop):
                self._check_counted_from_start(end)
            # Labels, so both ends are included, as everywhere in xarray's sel.
            low = -np.inf if wanted.start is None else wanted.start
            high = np.inf if wanted.stop is None else wanted.stop
            return np.flatnonzero((places >= low) & (places <= high))
        listed = np.atleast_1d(wanted)
        absent = listed[~np.isin(listed, places)]
        if len(absent):
            self._check_counted_from_start(absent[0])
            raise MissingPromptsError(f"no token stands at position {absent[0]}: positions go from 0 to {places.max(initial=-1)}")
        kept = np.flatnonzero(np.isin(places, listed))
        if np.ndim(wanted) == 0:
            return kept
        kept = kept[np.argsort(places[kept], kind="stable")]
        first, last = np.searchsorted(places[kept], listed, "left"), np.searchsorted(places[kept], listed, "right")
        found = kept[concat_ranges(first, last - first)]
        if groups is None:
            groups = by_appearance(self.codes[rows])
        return found[np.lexsort((np.repeat(np.arange(len(listed)), last - first), groups[found]))]

    def _check_counted_from_start(self, position: Any) -> None:
        """Raise where a position is negative and those of the tokens are not: `sel` takes labels, and these count from the start."""
        if position is not None and position < 0 and self.positions.min(initial=0) >= 0:
            raise InvalidArgumentError(
                f"position {position} is negative, and sel takes positions as they are stored, from 0: for tokens from the end of each "
                "prompt, use where(lz.mask_tokens(data, position=slice(-3, None)), drop=True), or data.lz.at(-1) for one per prompt"
            )

    def _pairs(self, prompt: Any, position: Any) -> DataArray:
        """The one token of every pair of a prompt and a position."""
        arrays = [value if isinstance(value, DataArray) else DataArray(value) for value in (prompt, position)]
        # Coordinates of these names would conflict with the selected ones.
        arrays = [array.drop_vars([name for name in self.names if name in array.coords]) for array in arrays]
        prompts, places = broadcast(*align(*arrays, join="exact"))
        wanted = [
            _plain(name, array.values.reshape(-1), numbers=i == 1)
            for i, (name, array) in enumerate(zip(self.names, (prompts, places), strict=True))
        ]
        known = set(self.labels.tolist())
        wanted[0] = np.array([label if label in known else prompt_hash(str(label)) for label in wanted[0].tolist()], object)
        mine = self.to_pandas_index()
        if not mine.is_unique:
            raise InvalidArgumentError("a prompt occurs several times along token, so pairs are ambiguous: select each prompt once")
        rows = mine.get_indexer(pd.MultiIndex.from_arrays(wanted)) if len(wanted[0]) else np.zeros(0, np.int64)
        if (rows < 0).any():
            i = int(np.argmax(rows < 0))
            raise MissingPromptsError(
                f"{int((rows < 0).sum())} of {len(rows)} pairs have no token here, first prompt {wanted[0][i]!r}, position {wanted[1][i]}"
            )
        return prompts.copy(data=np.reshape(rows, prompts.shape))

    def isel(self, indexers: Mapping[Any, Any]) -> TokenIndex | None:
        """The index of the selected tokens; None (no index) where they no longer lie along one token dimension."""
        indexer = indexers.get(self.dim)
        if isinstance(indexer, Variable):
            if indexer.dims != (self.dim,):
                return None
            indexer = indexer.values
        if indexer is None or (not isinstance(indexer, slice) and np.ndim(indexer) != 1):
            return None  # one token, or swap_dims has moved the coordinates to another dimension
        columns = {name: column.isel({self.dim: indexer}) for name, column in self.columns.items()}
        return self._like(self.codes[indexer], self.positions[indexer], columns)

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

    def join(self, other: TokenIndex, how: Any = "inner") -> TokenIndex:
        """The index of the tokens that both have (inner) or that either has (outer)."""
        mine, theirs = self.to_pandas_index(), other.to_pandas_index()
        joined = cast(pd.MultiIndex, mine.intersection(theirs, sort=False) if how == "inner" else mine.union(theirs))
        labels = np.asarray(joined.levels[0], object).astype(np.result_type(self.labels, other.labels))
        places = np.asarray(joined.get_level_values(1), np.int64)
        columns = {}
        if self.columns:
            here, there = mine.get_indexer(joined), theirs.get_indexer(joined)
            for name, column in self.columns.items():
                # What both have is taken from this one; xarray joins indexes of the same coordinates only.
                values = other.columns[name].values[there]
                values[here >= 0] = column.values[here[here >= 0]]
                columns[name] = ColumnVariable((self.dim,), values, column.attrs)
        return TokenIndex(labels, np.asarray(joined.codes[0], np.int32), places, self.dim, self.names, columns)

    def reindex_like(self, other: TokenIndex) -> dict[Hashable, Any]:
        """The row in this index of each token of the other one; −1 where this index lacks it."""
        mine = self.to_pandas_index()
        if not mine.is_unique:
            raise InvalidArgumentError("a prompt occurs several times along token, so tokens cannot be aligned: select each prompt once")
        return {self.dim: mine.get_indexer(other.to_pandas_index())}

    def roll(self, shifts: Mapping[Any, int]) -> TokenIndex | None:
        """The index after ``roll(token=…, roll_coords=True)``; xarray takes None for no index, as from `isel`."""
        if self.dim not in shifts:
            return None  # see isel
        shift = shifts[self.dim]
        columns: dict[Hashable, Variable] = {
            name: ColumnVariable((self.dim,), np.roll(column.values, shift), column.attrs) for name, column in self.columns.items()
        }
        return self._like(np.roll(self.codes, shift), np.roll(self.positions, shift), columns)

    def rename(self, name_dict: Mapping[Any, Hashable], dims_dict: Mapping[Any, Hashable]) -> TokenIndex:
        """The index after the token dimension or the coordinates were renamed."""
        prompt, position = (name_dict.get(name, name) for name in self.names)
        dim = dims_dict.get(self.dim, self.dim)
        columns = {name_dict.get(name, name): _on(column, dim) for name, column in self.columns.items()}
        return TokenIndex(self.labels, self.codes, self.positions, dim, (prompt, position), columns)

    def unstack(self) -> tuple[dict[Hashable, Index], pd.MultiIndex]:
        """Sorted indexes of prompts and of positions, and the MultiIndex that places each token between them."""
        clean = cast(pd.MultiIndex, self.to_pandas_index()).remove_unused_levels()
        if not clean.is_unique:
            raise InvalidArgumentError("a prompt occurs several times along token, so it cannot be unstacked: select each prompt once")
        order = np.argsort(np.asarray(clean.levels[0], object), kind="stable")
        clean = pd.MultiIndex(
            levels=cast(Any, [clean.levels[0][order], clean.levels[1]]),
            codes=cast(Any, [np.argsort(order)[np.asarray(clean.codes[0])], clean.codes[1]]),
            names=clean.names,
            verify_integrity=False,
        )
        dtypes = self.labels.dtype, self.positions.dtype
        return {n: PandasIndex(v, n, coord_dtype=t) for n, v, t in zip(self.names, clean.levels, dtypes, strict=True)}, clean

    @classmethod
    def concat(cls, indexes: Sequence[TokenIndex], dim: Hashable, positions: Iterable[Iterable[int]] | None = None) -> TokenIndex:
        """The indexes one after the other, or interleaved by `positions`."""
        spelled = np.concatenate([index.labels for index in indexes])
        numbers, labels = pd.factorize(spelled.astype(object))
        starts = offsets_of([len(index.labels) for index in indexes])
        codes = np.concatenate([numbers[start + index.codes] for start, index in zip(starts[:-1], indexes, strict=True)])
        places = np.concatenate([index.positions for index in indexes])
        if positions is not None:
            order = np.argsort(np.concatenate([np.asarray(list(p)) for p in positions]), kind="stable")
            codes, places = codes[order], places[order]
        columns = {}
        for name in indexes[0].columns:
            if all(name in index.columns for index in indexes):
                values = np.concatenate([index.columns[name].values for index in indexes])
                columns[name] = ColumnVariable((dim,), values if positions is None else values[order], indexes[0].columns[name].attrs)
        return cls(np.asarray(labels).astype(spelled.dtype), codes.astype(np.int32), places, dim, indexes[0].names, columns)

    def should_add_coord_to_array(self, name: Hashable, var: Variable, dims: set[Hashable]) -> bool:
        """All coordinates stay on every array along the token dimension."""
        return self.dim in dims

    def __repr__(self) -> str:
        return f"TokenIndex({len(self.codes)} tokens of {len(self.labels)} prompts, dim={self.dim!r})"


def without_coordinates(data: Dataset, names: Iterable[Hashable]) -> Dataset:
    """The dataset without some variables; of columns that an index can go without, it is one without them."""
    dropped = set(names)
    index = data.xindexes.get("prompt")
    if isinstance(index, TokenIndex) and dropped & index.columns.keys() and not dropped & set(index.names):
        columns = {name: column for name, column in index.columns.items() if name not in dropped}
        left = TokenIndex(index.labels, index.codes, index.positions, index.dim, index.names, columns)
        variables = left.create_variables({name: data.variables[name] for name in left.coord_names})
        bare = data.drop_vars(list(index.coord_names))
        data = bare.assign_coords(Coordinates(variables, indexes=dict.fromkeys(variables, left)))
    return data.drop_vars(list(dropped), errors="ignore")


def _on(column: Variable, dim: Hashable, attrs: Mapping[Any, Any] | None = None) -> Variable:
    """The data of a column as a variable on a dimension of another name."""
    return SharedVariable((dim,), cast(Any, column._data), column.attrs if attrs is None else attrs, column.encoding, fastpath=True)


def _taken(column: Variable, dim: Hashable, rows: Array) -> Array:
    """Some values of a column; all of them are kept in memory once they are read."""
    if len(rows) == column.size:
        return np.asarray(column.values)[rows]
    return np.asarray(column.isel({dim: as_slice(rows)}).values)


def has_value(name: Hashable, values: Array, wanted: Any) -> Array:
    """Which values of a column are among those that are selected: one, a flat list of them, or a slice of numbers, both ends included.

    Raises
    ------
    MissingPromptsError
        No token has one of them.
    InvalidArgumentError
        Values of another kind than those of the column.
    """
    wanted = getattr(wanted, "values", wanted)
    if isinstance(wanted, slice):
        bounds = [end for end in (wanted.start, wanted.stop) if end is not None]
        if wanted.step not in {None, 1} or values.dtype.kind not in "iu" or not all(np.asarray(end).dtype.kind in "iu" for end in bounds):
            raise InvalidArgumentError(f"{name!r} is selected by one value or a flat list of them, not by {wanted!r}")
        low = -np.inf if wanted.start is None else wanted.start
        high = np.inf if wanted.stop is None else wanted.stop
        return np.asarray((values >= low) & (values <= high), bool)
    listed = np.atleast_1d(np.asarray(wanted, object))
    if listed.ndim > 1 or any(isinstance(item, set | frozenset | dict | list | tuple) for item in listed.tolist()):
        raise InvalidArgumentError(f"{name!r} is selected by one value or a flat list of them, not by {type(wanted).__name__}")
    kind, which = {"b": ((bool, np.bool_), "True or False"), "i": ((int, np.integer), "whole numbers")}.get(
        values.dtype.kind, ((str,), "texts")
    )
    if not all(isinstance(item, kind) and (kind[0] is bool or not isinstance(item, bool)) for item in listed.tolist()):
        raise InvalidArgumentError(f"{name!r} is selected by {which}, not {wanted!r}")
    codes, uniques = pd.factorize(values)
    there = {value: code for code, value in enumerate(uniques.tolist())}
    absent = [item for item in listed.tolist() if item not in there]
    if absent:
        known = ", ".join(repr(item) for item in sorted(there) if item != "") or "no other"
        raise MissingPromptsError(f"no token here has {name}={absent[0]!r}: there are {known}")
    return np.isin(codes, [there[item] for item in listed.tolist()])


def _plain(name: Hashable, value: Any, *, numbers: bool) -> Any:
    """The selected labels as a slice, a scalar or a one-dimensional array."""
    values = getattr(value, "values", value)
    if isinstance(values, slice):
        return values
    array: Array = np.asarray(values, object)
    if array.ndim > 1 or (array.ndim == 0 and isinstance(array.item(), (set, frozenset, dict))):
        raise InvalidArgumentError(f"{name!r} is selected by one value or a flat list of them, not by {type(value).__name__} {array.shape}")
    if any(isinstance(item, (bool, np.bool_)) for item in array.reshape(-1).tolist()):
        raise InvalidArgumentError(f"{name!r} was given truth values: use isel(token=mask), or where(mask, drop=True)")
    if numbers:
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "iuf":
            raise InvalidArgumentError(f"{name!r} is selected by whole numbers, not {values!r}")
    return array


def by_appearance(codes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Codes renumbered by the order in which they first appear."""
    uniques, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty(len(uniques), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(uniques))
    return rank[inverse]
