"""Where rows of activations come from, stored or in memory: how they are read, and which of them are read together.

Never writes, never imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xarray as xr
from xarray.core import indexing

from lmprobe_zarr.batch import as_slice
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError
from lmprobe_zarr.store.parts import LazyArray, VirtualArray, as_stored
from lmprobe_zarr.streaming.order import Blocks, join_blocks
from lmprobe_zarr.tokens import unwrapped
from lmprobe_zarr.typing import Array, Ints

__all__ = ["UNCHUNKED_BLOCK_BYTES", "RowSource", "StoredSelection", "open_source", "stored_dtype"]

#: Bytes of the rows of one layer that are read together, where the array has no chunks that could say so.
UNCHUNKED_BLOCK_BYTES: Final = 4 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class StoredSelection:
    """A selection of a stored variable.

    Parameters
    ----------
    array : VirtualArray
        The variable.
    places : ndarray of int64, shape (layer,)
        Which of its layers.
    rows : slice of step 1, or ndarray of int64
        Which of its rows.
    columns : tuple of slice
        Slices of the axes after the rows; empty for everything.
    """

    array: VirtualArray
    places: Ints
    rows: slice | Ints
    columns: tuple[slice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RowSource:
    """An array whose rows are read, and which of its layers.

    Parameters
    ----------
    variable : xarray.Variable
        Lazy or in memory, with a sample dimension.
    dim : str
        The sample dimension, ``token`` or ``prompt``.
    places : tuple of int
        Which layers, by their places along ``layer``; (0,) where there is no such dimension.
    single : bool
        Whether batches have no layer axis.
    labels : tuple
        Those layers' labels, for messages.
    """

    variable: xr.Variable
    dim: Hashable
    places: tuple[int, ...]
    single: bool
    labels: tuple[Any, ...]

    @property
    def n_rows(self) -> int:
        """Length of the sample dimension."""
        length: int = self.variable.sizes[self.dim]
        return length

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one layer."""
        return tuple(n for d, n in self.variable.sizes.items() if d not in ("layer", self.dim))

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, all layers."""
        itemsize: int = self.variable.dtype.itemsize
        return max(1, len(self.places) * math.prod(self.row_shape) * itemsize)

    def read(self, rows: Ints) -> Array:
        """Values of some rows in any order, shape (layer, row, …)."""
        stored = self.stored()
        if stored is not None:
            at = stored.rows.start + rows if isinstance(stored.rows, slice) else stored.rows[rows]
            return stored.array.read(stored.places, as_slice(at), stored.columns, note=True)
        if isinstance(self.variable._data, np.ndarray):
            return self._take(rows)
        # Other lazy arrays may look up each row separately, unless the rows ascend.
        order = np.argsort(rows, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return np.take(self._take(rows[order]), back, axis=1)

    def _take(self, rows: Ints) -> Array:
        taken: dict[Hashable, Any] = {self.dim: as_slice(rows)}
        if "layer" in self.variable.dims:
            taken["layer"] = self.places[0] if len(self.places) == 1 else list(self.places)
        part = self.variable.isel(taken)
        values: Array = np.asarray(part.values)
        dims = part.dims
        if "layer" not in dims:
            values, dims = values[None], ("layer", *dims)
        axes = [dims.index("layer"), dims.index(self.dim)]
        return np.transpose(values, axes + [i for i in range(values.ndim) if i not in axes])

    def only(self, place: int) -> RowSource:
        """One of its layers."""
        return replace(self, places=(self.places[place],), labels=(self.labels[place],), single=True)

    def stored(self) -> StoredSelection | None:
        """The selection of a stored variable that this reads; None where it reads anything else, or selects single columns."""
        data = unwrapped(self.variable._data)
        if not isinstance(data, indexing.LazilyIndexedArray) or not isinstance(data.array, LazyArray):
            return None
        array, key = data.array.array, data.key.tuple
        if array.layers is None:
            places = np.zeros(1, np.int64)
        else:
            places, key = np.atleast_1d(np.arange(len(array.layers))[key[0]])[list(self.places)], key[1:]
        rows, *columns = key
        if not all(isinstance(column, slice) for column in columns):
            return None
        if isinstance(rows, slice):
            begin, end, step = rows.indices(array.n_rows)
            rows = slice(begin, max(begin, end)) if step == 1 else np.arange(begin, end, step)
        whole = all(c in (slice(None), slice(None, None, 1), slice(0, n, 1)) for c, n in zip(columns, array.row_shape, strict=True))
        return StoredSelection(
            array, places, rows if isinstance(rows, slice) else np.asarray(rows, np.int64), () if whole else tuple(columns)
        )

    def blocks(self) -> Blocks:
        """All rows, by what is read together: chunks, where the rows are stored. Rows that one of the layers lacks are in no block."""
        n, stored = self.n_rows, self.stored()
        if isinstance(self.variable._data, np.ndarray):
            return Blocks(np.arange(n + 1))  # in memory any row is read as fast as any other
        if stored is None:
            bounds = np.minimum(np.cumsum([0, *self._lengths(n)]), n).tolist()
            return join_blocks([slice(a, b) for a, b in itertools.pairwise(bounds)])
        array, places, rows = stored.array, stored.places, stored.rows
        by_class = {int(array.classes[place]): int(place) for place in places}
        first, *others = [array.blocks(place, rows) for place in by_class.values()]
        absent = np.zeros(n, bool)
        for blocks in others:
            present = np.zeros(n, bool)
            for rows_of_block in blocks:
                present[rows_of_block] = True
            absent |= ~present
        if absent.any():
            first = [numbers[~absent[numbers]] for numbers in (np.arange(n)[rows_of_block] for rows_of_block in first)]
        return join_blocks(first)

    def _lengths(self, n: int) -> Sequence[int]:
        chunks = self.variable.chunksizes.get(self.dim)
        if chunks:
            return chunks
        size = self.variable.encoding.get("preferred_chunks", {}).get(self.dim)
        size = int(size or max(1, UNCHUNKED_BLOCK_BYTES * len(self.places) // self.row_nbytes))
        return [size] * -(-n // size)

    def fingerprint(self) -> str:
        """32 digits that change with anything that decides which values are read, or how they can be ordered.

        For stored rows: the parts, the checksums of their files, and the selection. For other arrays only shape and dtype.
        """
        digest = hashlib.sha256(repr((self.variable.shape, str(self.variable.dtype), self.places, self.labels)).encode())
        stored = self.stored()
        if stored is not None:
            array, places, rows = stored.array, stored.places, stored.rows
            for member in array.arrays:
                digest.update(repr((member.path, member.info.shape, member.info.chunks)).encode())
                for layer in np.unique(array.layer_rows[:, places]).tolist():
                    for block in range(member.info.n_blocks if layer >= 0 else 0):
                        digest.update(repr(tuple(member.where.chunk(layer, block)[2:])).encode())
            ints = (places, array.classes, array.source, array.start, array.layer_rows)
            for values in (*ints, *(() if array.offsets is None else (array.offsets,))):
                digest.update(np.ascontiguousarray(values).tobytes())
            digest.update((repr(rows) if isinstance(rows, slice) else "").encode() + repr(stored.columns).encode())
            if not isinstance(rows, slice):
                digest.update(rows.tobytes())
        return digest.hexdigest()[:32]


def stored_dtype(variable: xr.Variable) -> str | None:
    """``bfloat16`` or ``float16`` for values in memory that were stored so, and that it still holds exactly; None otherwise."""
    named = str(variable.attrs.get("stored_dtype", ""))
    # Arithmetic keeps the attribute, but its results seldom are such numbers.
    if named not in _FITS or variable.dtype != np.float32 or not isinstance(variable._data, np.ndarray):
        return None
    flat = variable._data.reshape(-1)
    return named if all(_FITS[named](flat[i : i + _SOME]) for i in range(0, len(flat), _SOME)) else None


def _fits_bfloat16(values: Array) -> bool:
    return not int(np.bitwise_or.reduce(values.view(np.uint32))) & 0xFFFF


def _fits_float16(values: Array) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16), values, equal_nan=True)


_SOME: Final = 2**16
_FITS: Final[Mapping[str, Callable[[Array], bool]]] = {"bfloat16": _fits_bfloat16, "float16": _fits_float16}


def _as_moved(variable: xr.Variable) -> xr.Variable:
    """The variable in the dtype that is stored, where it is read from a store: half the bytes of float16. What was loaded is an ndarray."""
    if variable.chunks is None and variable._in_memory:
        return xr.Variable(variable.dims, variable.values, variable.attrs, variable.encoding, fastpath=True)
    return as_stored(variable)


def open_source(array: xr.DataArray, layer: Any = None) -> RowSource:
    """The rows of an array of activations.

    Parameters
    ----------
    array : DataArray, dims (layer, token, …) or (layer, prompt, …) in any order; without ``layer`` it is one layer
    layer : int, or sequence of int, optional
        One layer, or several at once, by their labels along ``layer``; None for all layers of the array.

    Raises
    ------
    LayerOutOfRangeError
        The array lacks a layer.
    InvalidArgumentError, InvalidTypeError
        The array has no sample dimension or no numbers, or `layer` is empty or no layer number.
    """
    dim = next((dim for dim in ("token", "prompt") if dim in array.dims), None)
    if dim is None or array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"{array.name!r} of dims {array.dims} and dtype {array.dtype} cannot be batched: give numbers along token or prompt"
        )
    if "layer" not in array.dims:
        labels = (array.coords["layer"].item(),) if "layer" in array.coords else (None,)
        if layer is not None and list(np.atleast_1d(layer)) != list(labels):
            raise LayerOutOfRangeError(f"layer={layer!r} is not here, which is one layer ({labels[0]}): leave layer out")
        return RowSource(_as_moved(array.variable), dim, (0,), layer is None or np.ndim(layer) == 0, labels)
    available = array.coords["layer"].values.tolist() if "layer" in array.coords else list(range(array.sizes["layer"]))
    wanted = available if layer is None else np.atleast_1d(np.asarray(layer)).tolist()
    if not wanted or np.ndim(layer if layer is not None else 0) > 1:
        raise InvalidArgumentError(f"layer={layer!r} names no layers: give one number or a list, of {available}")
    if any(isinstance(number, bool) or not isinstance(number, int) for number in wanted):
        raise InvalidTypeError(f"layer={layer!r} is no layer: give one number or a list, of {available}")
    for number in wanted:
        if number not in available:
            raise LayerOutOfRangeError(f"layer {number} is not here, which has layers {available}: extract it first")
    places = tuple(available.index(number) for number in wanted)
    return RowSource(_as_moved(array.variable), dim, places, np.ndim(layer) == 0 and layer is not None, tuple(wanted))
