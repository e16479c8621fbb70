"""One variable over all parts of a group, read by selection: only the chunks that are touched, each once. Never writes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import as_slice, concat_ranges, fill_value, offsets_of
from lmprobe_zarr.storage import empty_aligned
from lmprobe_zarr.store.parts.columns import absent_value, as_shown, kind_of
from lmprobe_zarr.store.parts.stored_array import Piece, StoredArray, read_pieces
from lmprobe_zarr.store.parts.uses import note_uses
from lmprobe_zarr.typing import Array, Ints

__all__ = ["NOWHERE", "VirtualArray"]
NOWHERE: Final = -1


@dataclass(frozen=True, slots=True, eq=False)
class VirtualArray:
    """One variable over all parts, read by selection.

    Parameters
    ----------
    arrays : tuple of StoredArray
        The variable in each part that holds it.
    layers : tuple of int, optional
        Layers along the first axis; None where there is no layer axis.
    layer_rows : ndarray of int32, shape (array, layer)
        For each array the place of each layer in it, −1 where it does not hold it.
    classes : ndarray of int, shape (layer,)
        Layers that exactly the same arrays hold form one class, and share their rows of `source`.
    source : ndarray of int32, shape (class, prompt)
        Which array holds each prompt, −1 for none.
    start : ndarray of int64, shape (class, prompt)
        First row of the prompt in that array.
    offsets : ndarray of int64, shape (prompt + 1,), optional
        Where each prompt's rows begin along the sample axis; None where every prompt has one row.
    absent_as_nan : bool
        Whether this is a column of the user's, in which NaN or NaT stands for what is missing, as in pandas: −1 and "" may be values.
        Integers and truth values become float64 then.
    widened : bool
        Whether float16 is read as float32.
    """

    arrays: tuple[StoredArray, ...]
    layers: tuple[int, ...] | None
    layer_rows: npt.NDArray[np.int32]
    classes: Ints
    source: npt.NDArray[np.int32]
    start: Ints
    offsets: Ints | None
    absent_as_nan: bool = False
    widened: bool = False

    @property
    def n_rows(self) -> int:
        """Length of the sample axis."""
        return self.source.shape[1] if self.offsets is None else int(self.offsets[-1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row; where parts keep different numbers of the largest values, that of the widest."""
        return max(array.info.row_shape for array in self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return (*(() if self.layers is None else (len(self.layers),)), self.n_rows, *self.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every part's values and, where some are absent, what stands for them."""
        if self.absent_as_nan:
            shown = as_shown([array.info for array in self.arrays], absent=bool(self.n_absent))
            return np.dtype(np.float32) if shown == np.float16 and self.widened else shown
        dtypes = {array.dtype for array in self.arrays}
        if np.dtype(object) in dtypes:
            return np.dtype(object)
        common = np.result_type(*dtypes)
        return np.dtype(np.float32) if common == np.float16 and self.widened else common

    @property
    def n_absent(self) -> int:
        """How many (class, prompt) pairs no part holds."""
        return int((self.source == NOWHERE).sum())

    def digest(self) -> str:
        """32 digits that change with the values: of the parts, whose files never change, and of what is taken from them."""
        found = hashlib.sha256(repr((self.layers, self.shape, str(self.dtype))).encode())
        for array in self.arrays:
            found.update(repr((array.storage.url, array.path, array.info.shape, array.info.dtype)).encode())
        for values in (self.layer_rows, self.classes, self.source, self.start, self.offsets):
            if values is not None:
                found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()[:32]

    def read(self, layers: Ints, rows: slice | Ints, columns: tuple[Any, ...] = (), *, note: bool = False) -> Array:
        """Values of some layers and rows.

        Parameters
        ----------
        layers : ndarray of int
            Places along the layer axis (0 where there is none).
        rows : slice with step 1, or ndarray of int
            Places along the sample axis.
        columns : tuple
            Selection of the axes after it, as for indexing.
        note : bool
            Whether this is a use of the parts that are read, which eviction takes last; upkeep is none.

        Returns
        -------
        ndarray, shape (len(layers), rows, …)
        """
        n = len(range(*rows.indices(self.n_rows))) if isinstance(rows, slice) else len(rows)
        row_shape = self.row_shape
        tail = np.empty((0, *row_shape), bool)[(slice(None), *columns)].shape[1:]
        dtype = self.dtype
        out = empty_aligned((len(layers), n, *tail), dtype)
        absent = fill_value(dtype)
        if self.absent_as_nan:
            absent = absent_value([array.info for array in self.arrays], dtype)
        empty = [self.absent_as_nan and kind_of(array.info).name == "missing" for array in self.arrays]
        pieces: list[Piece] = []
        outs: list[Array] = []
        located: dict[int, list[tuple[int, int, slice | Ints, slice | Ints]]] = {}
        for i, layer in enumerate(layers):
            group = int(self.classes[layer])
            if group not in located:
                located[group] = self._locate(group, rows)
            for array, block, chunk_rows, target in located[group]:
                if array == NOWHERE or empty[array]:
                    out[i][target] = absent
                    continue
                shown = dtype if self.absent_as_nan else None
                pieces.append(Piece(self.arrays[array], int(self.layer_rows[array, layer]), block, chunk_rows, target, row_shape, shown))
                outs.append(out[i])
        read_pieces(pieces, outs, columns)
        if note:
            read = {place for found in located.values() for place, _, _, _ in found if place != NOWHERE}
            note_uses((array.storage, array.path.rsplit("/", 2)[0]) for array in map(self.arrays.__getitem__, read) if array.noted)
        return out

    def blocks(self, layer: int, rows: slice | Ints) -> list[slice | Ints]:
        """The rows of each chunk, as places among `rows`, chunk by chunk; rows that no part holds are left out."""
        return [target for array, _, _, target in self._locate(int(self.classes[layer]), rows) if array != NOWHERE]

    def _locate(self, group: int, rows: slice | Ints) -> list[tuple[int, int, slice | Ints, slice | Ints]]:
        """Where rows are stored: (array, chunk, rows in the chunk, rows of the output), each chunk once."""
        source, start, target, length = self._runs(group, rows)
        out: list[tuple[int, int, slice | Ints, slice | Ints]] = []
        for array in np.unique(source):
            mine = source == array
            at, to, count = start[mine], target[mine], length[mine]
            if array == NOWHERE:
                out.append((NOWHERE, 0, slice(0), as_slice(concat_ranges(to, count))))
                continue
            size = self.arrays[array].info.rows_per_chunk
            first, last = at // size, (at + count - 1) // size
            spans = last - first + 1
            run = np.repeat(np.arange(len(at)), spans)
            block = concat_ranges(first, spans)
            low = np.maximum(at[run], block * size)
            high = np.minimum((at + count)[run], (block + 1) * size)
            shift = to[run] - at[run]
            # In the order of the chunk, so that a whole chunk is read as one slice even where its rows have scattered targets.
            order = np.lexsort((low, block))
            cuts = np.flatnonzero(np.diff(block[order])) + 1
            for members in np.split(order, cuts):
                begins, counts, base = low[members], (high - low)[members], int(block[members[0]]) * size
                chunk_rows = as_slice(concat_ranges(begins - base, counts))
                out.append((int(array), base // size, chunk_rows, as_slice(concat_ranges(begins + shift[members], counts))))
        return out

    def _runs(self, group: int, rows: slice | Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Rows as runs of neighbours in one array: (array, first row there, first row of the output, length)."""
        if isinstance(rows, slice):
            begin, end, _ = rows.indices(self.n_rows)
            if self.offsets is None:
                prompts = np.arange(begin, end)
                within, length = np.zeros_like(prompts), np.ones_like(prompts)
            else:
                low = int(np.searchsorted(self.offsets, begin, "right")) - 1
                high = int(np.searchsorted(self.offsets, end, "left"))
                prompts = np.arange(low, high) if end > begin else np.arange(0)
                from_, to = np.maximum(self.offsets[prompts], begin), np.minimum(self.offsets[prompts + 1], end)
                within, length = from_ - self.offsets[prompts], to - from_
        else:
            length = np.ones(len(rows), np.int64)
            if self.offsets is None:
                prompts, within = rows, np.zeros(len(rows), np.int64)
            else:
                prompts = np.searchsorted(self.offsets, rows, "right") - 1
                within = rows - self.offsets[prompts]
        source = self.source[group, prompts].astype(np.int64)
        start = self.start[group, prompts] + within
        joined = np.ones(len(source), bool)
        joined[1:] = (source[1:] != source[:-1]) | ((start[1:] != start[:-1] + length[:-1]) & (source[1:] != NOWHERE))
        heads = np.flatnonzero(joined)
        target = offsets_of(length)
        return source[heads], start[heads], target[heads], np.diff(np.append(target[heads], target[-1]))
