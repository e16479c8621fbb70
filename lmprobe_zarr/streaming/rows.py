"""Rows of activations, stored or in memory: by what is read together, which are wanted, and what is known of each.

Reads what `epochs` plans, one buffer ahead. Never writes, never imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xarray as xr
from xarray.core import indexing

from lmprobe_zarr.batch import as_slice
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, MissingPromptsError
from lmprobe_zarr.store.parts import LazyArray, VirtualArray
from lmprobe_zarr.streaming.order import Blocks, Order, Stream, join_blocks, plan_stream
from lmprobe_zarr.tokens import TokenIndex
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = [
    "BLOCK_BYTES",
    "Ahead",
    "Column",
    "Source",
    "Stored",
    "open_column",
    "open_source",
    "pieces_of",
    "read_all",
    "read_norms",
    "wanted_rows",
]

_PASS_BYTES: Final = 64 * 2**20  # of what is read at once where nothing is mixed
BLOCK_BYTES: Final = 4 * 2**20  # where nothing says how rows lie together


# ------------------------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
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
        What of the axes after them; empty for everything.
    """

    array: VirtualArray
    places: Ints
    rows: slice | Ints
    columns: tuple[slice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where rows come from.

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
        found = self.stored()
        if found is not None:
            at = found.rows.start + rows if isinstance(found.rows, slice) else found.rows[rows]
            return found.array.read(found.places, as_slice(at), found.columns)
        if isinstance(self.variable._data, np.ndarray):
            return self._take(rows)
        # Something else may look up every row by itself, unless they ascend.
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

    def only(self, place: int) -> Source:
        """One of its layers."""
        return replace(self, places=(self.places[place],), labels=(self.labels[place],), single=True)

    def stored(self) -> Stored | None:
        """What is stored behind it; None where it is no such thing, or no plain selection of it."""
        data = self.variable._data
        while isinstance(data, (indexing.CopyOnWriteArray, indexing.MemoryCachedArray)):
            data = data.array
        if not isinstance(data, indexing.LazilyIndexedArray) or not isinstance(data.array, LazyArray):
            return None
        array, key = data.array.array, data.key.tuple
        if array.layers is None:
            places = np.zeros(1, np.int64)
        else:
            places, key = np.atleast_1d(np.arange(len(array.layers))[key[0]])[list(self.places)], key[1:]
        rows, *columns = key
        if not all(isinstance(one, slice) for one in columns):
            return None
        if isinstance(rows, slice):
            begin, end, step = rows.indices(array.n_rows)
            rows = slice(begin, max(begin, end)) if step == 1 else np.arange(begin, end, step)
        whole = all(one in (slice(None), slice(None, None, 1), slice(0, n, 1)) for one, n in zip(columns, array.row_shape, strict=True))
        return Stored(array, places, rows if isinstance(rows, slice) else np.asarray(rows, np.int64), () if whole else tuple(columns))

    def blocks(self) -> Blocks:
        """All rows, by what is read together: by chunk, for what is stored. Rows that are absent in one of the layers are in none."""
        n, found = self.n_rows, self.stored()
        if isinstance(self.variable._data, np.ndarray):
            return Blocks(np.arange(n + 1))  # in memory any row is as near as any other
        if found is None:
            bounds = np.minimum(np.cumsum([0, *self._lengths(n)]), n).tolist()
            return join_blocks([slice(a, b) for a, b in itertools.pairwise(bounds)])
        array, places, rows = found.array, found.places, found.rows
        by_class = {int(array.classes[place]): int(place) for place in places}
        pieces, *others = [array.blocks(place, rows) for place in by_class.values()]
        absent = np.zeros(n, bool)
        for held in others:
            there = np.zeros(n, bool)
            for piece in held:
                there[piece] = True
            absent |= ~there
        if absent.any():
            pieces = [every[~absent[every]] for every in (np.arange(n)[piece] for piece in pieces)]
        return join_blocks(pieces)

    def _lengths(self, n: int) -> Sequence[int]:
        chunks = self.variable.chunksizes.get(self.dim)
        if chunks:
            return chunks
        size = self.variable.encoding.get("preferred_chunks", {}).get(self.dim)
        size = int(size or max(1, BLOCK_BYTES * len(self.places) // self.row_nbytes))
        return [size] * -(-n // size)

    def fingerprint(self) -> str:
        """32 digits that change when anything changes that decides what is read, or in which order it can be.

        Of what is stored: the parts, their files' checksums, and the selection. Of anything else only shape and dtype.
        """
        digest = hashlib.sha256(repr((self.variable.shape, str(self.variable.dtype), self.places, self.labels)).encode())
        found = self.stored()
        if found is not None:
            array, places, rows = found.array, found.places, found.rows
            for one in array.arrays:
                digest.update(repr((one.path, one.info.shape, one.info.chunks)).encode())
                for layer in np.unique(array.layer_rows[:, places]).tolist():
                    for block in range(one.info.n_blocks if layer >= 0 else 0):
                        key = one.path.rpartition("/")[0].rpartition("/")[2] + "/" + one.path.rpartition("/")[2]
                        digest.update(repr(one.files.get(f"{key}/{one.info.chunk_key(layer, block)}")).encode())
            ints = (places, array.classes, array.source, array.start, array.layer_rows)
            for values in (*ints, *(() if array.offsets is None else (array.offsets,))):
                digest.update(np.ascontiguousarray(values).tobytes())
            digest.update((repr(rows) if isinstance(rows, slice) else "").encode() + repr(found.columns).encode())
            if not isinstance(rows, slice):
                digest.update(rows.tobytes())
        return digest.hexdigest()[:32]


def open_source(array: xr.DataArray, layer: Any = None) -> Source:
    """The rows of an array of activations.

    Parameters
    ----------
    array : DataArray, dims (layer, token, …) or (layer, prompt, …) in any order; without ``layer`` it is one layer
    layer : int, or sequence of int, optional
        One layer, or several at once, by their labels along ``layer``; None for all that are there.

    Raises
    ------
    LayerOutOfRangeError
        A layer that is not there.
    InvalidArgumentError, InvalidTypeError
        An array without a sample dimension or of something else than numbers; no layer; something that is no layer.
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
        return Source(array.variable, dim, (0,), layer is None or np.ndim(layer) == 0, labels)
    there = array.coords["layer"].values.tolist() if "layer" in array.coords else list(range(array.sizes["layer"]))
    wanted = there if layer is None else np.atleast_1d(np.asarray(layer)).tolist()
    if not wanted or np.ndim(layer if layer is not None else 0) > 1:
        raise InvalidArgumentError(f"layer={layer!r} names no layers: give one number or a list, of {there}")
    if any(isinstance(one, bool) or not isinstance(one, int) for one in wanted):
        raise InvalidTypeError(f"layer={layer!r} is no layer: give one number or a list, of {there}")
    for one in wanted:
        if one not in there:
            raise LayerOutOfRangeError(f"layer {one} is not here, which has layers {there}: extract it first")
    places = tuple(there.index(one) for one in wanted)
    return Source(array.variable, dim, places, np.ndim(layer) == 0 and layer is not None, tuple(wanted))


class Ahead:
    """The windows of a stream one after the other, from one on; the next is read on a thread, once it is told to start.

    Parameters
    ----------
    source : Source
    stream : Stream
    first : int
        The first window to read.
    """

    def __init__(self, source: Source, stream: Stream, first: int = 0) -> None:
        self._source, self._stream, self._number = source, stream, first
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lmprobe-zarr-ahead")
        self._coming: Future[tuple[Ints, Array]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self) -> None:
        """Begin to read the window that `next` will return."""
        if self._coming is None and self._number < len(self._stream.cuts) - 1:
            self._coming = self._pool.submit(self._read, self._number)
            self._number += 1

    def next(self) -> tuple[Ints, Array] | None:
        """The rows of the next window and their values, shape (layer, row, …); None after the last."""
        self.start()
        coming, self._coming = self._coming, None
        return None if coming is None else coming.result()

    def _read(self, number: int) -> tuple[Ints, Array]:
        rows = self._stream.window(number)
        return rows, self._source.read(rows)


def read_all(source: Source, blocks: Blocks) -> Iterator[tuple[Ints, Array]]:
    """Every wanted row once, as (row numbers, values of shape (layer, row, …)), each block read once and one window ahead."""
    if not blocks.total:
        return
    order = Order(batch_tokens=1, buffer_tokens=max(1, _PASS_BYTES // source.row_nbytes), shuffle=False)
    with Ahead(source, plan_stream(blocks, order, 0)) as ahead:
        while (window := ahead.next()) is not None:
            ahead.start()
            yield window


# -------------------------------------------------------------------------------------------------------------- which rows


def wanted_rows(
    array: xr.DataArray,
    source: Source,
    *,
    skip_positions: int | Iterable[int] = (),
    where: Any = None,
    missing: str = "raise",
) -> Blocks:
    """The rows of a source that are wanted, by block.

    Parameters
    ----------
    array : DataArray
        What `source` was opened from; its coordinates say positions and prompts.
    source : Source
    skip_positions : int or iterable of int
        Tokens at these places of their prompts are left out.
    where : DataArray of bool over the sample dimension, or array of bool, shape (row,), optional
        Only rows where it is true.
    missing : {"raise", "drop"}
        What happens where rows are not stored in all of the layers.

    Raises
    ------
    MissingPromptsError
        Rows are not stored in a layer.
    InvalidArgumentError, InvalidTypeError
        A filter that does not fit the rows, or one that leaves none.
    """
    if missing not in {"raise", "drop"}:
        raise InvalidArgumentError(f'missing={missing!r}: give "raise" or "drop"')
    blocks, n = source.blocks(), source.n_rows
    absent = n - int(blocks.offsets[-1])
    if absent and missing == "raise":
        raise MissingPromptsError(
            f"{absent} of {n} rows are not stored in all of layers {list(source.labels)}: extract them, select prompts that have them, "
            'or give missing="drop"'
        )
    kept = np.ones(n, bool)
    skipped = np.unique(np.atleast_1d(np.asarray(skip_positions if isinstance(skip_positions, int) else list(skip_positions))))
    if len(skipped):
        if skipped.dtype.kind not in "iu" or skipped[0] < 0:
            raise InvalidArgumentError(f"skip_positions={skip_positions!r}: give places counted from 0, such as 0 or [0, 1]")
        if "position" not in array.coords or array.coords["position"].dims != (source.dim,):
            raise InvalidArgumentError("skip_positions needs a position along token, which is not here: open it with store.tokens()")
        kept &= ~np.isin(array.coords["position"].values, skipped)
    if where is not None:
        kept &= _as_mask(where, array, source)
    if not kept.all():
        blocks = replace(blocks, kept=kept)
    if not blocks.total:
        raise InvalidArgumentError(f"no row is left of {n}: filter less")
    return blocks


def _as_mask(where: Any, array: xr.DataArray, source: Source) -> Mask:
    if isinstance(where, xr.DataArray):
        if where.dims != (source.dim,):
            raise InvalidArgumentError(f"where has dims {where.dims}: give truth values over {source.dim!r} alone")
        index, other = array.xindexes.get("prompt"), where.xindexes.get("prompt")
        if index is not None and other is not None and (type(index) is not type(other) or not index.equals(other)):
            raise InvalidArgumentError("where is over other rows, or another order of them: make it from the same selection")
    mask = np.asarray(where)
    if mask.dtype != bool or mask.shape != (source.n_rows,):
        raise InvalidArgumentError(f"where has dtype {mask.dtype} and shape {mask.shape}: give {source.n_rows} truth values, one per row")
    return mask


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """What is known of every row: ``values[codes]``, or ``values`` itself."""

    values: Array
    codes: Array | None = None

    def take(self, rows: Ints) -> Array:
        """Those of some rows."""
        taken: Array = self.values[rows if self.codes is None else self.codes[rows]]
        return taken


def open_column(array: xr.DataArray, source: Source, name: str) -> Column:
    """A coordinate along the sample dimension, in memory; prompts stay one label per prompt."""
    if name == "row":
        return Column(np.arange(source.n_rows))
    index = array.xindexes.get(name)
    if isinstance(index, TokenIndex) and index.dim == source.dim:
        return Column(index.labels, index.codes) if name == index.names[0] else Column(index.positions)
    if name not in array.coords or array.coords[name].dims != (source.dim,):
        along = sorted(str(n) for n, c in array.coords.items() if c.dims == (source.dim,))
        raise InvalidArgumentError(f"labels: {name!r} is no coordinate over {source.dim!r} here: give some of {[*along, 'row']}")
    values = np.asarray(array.coords[name].values)
    if values.dtype == object:
        texts, codes = np.unique(values.astype(str), return_inverse=True)
        return Column(texts, codes.astype(np.int32))
    return Column(values)


# ----------------------------------------------------------------------------------------------------------------- norms


def read_norms(source: Source, blocks: Blocks) -> npt.NDArray[np.float64]:
    """The Euclidean norm of every wanted row of one layer, shape (row,); NaN for rows that are not wanted."""
    norms = np.full(source.n_rows, np.nan)
    for rows, values in read_all(source, blocks):
        flat = values[0].reshape(len(rows), -1)
        for some in pieces_of(flat):
            wide = flat[some].astype(np.float64)
            norms[rows[some]] = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return norms


def pieces_of(values: Array) -> Iterator[slice]:
    """Rows a few at a time, which as float64 stay in a processor's own memory."""
    size = max(1, 2**20 // max(1, values.shape[1] * 8))
    return (slice(i, min(i + size, len(values))) for i in range(0, len(values), size))
