"""One variable over all parts of a group, read by selection: only the chunks that are touched, each once. Never writes."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import as_slice, concat_ranges, fill_value
from lmprobe_zarr.storage import empty_aligned
from lmprobe_zarr.store.parts.columns import absent_value, as_shown, kind_of
from lmprobe_zarr.store.parts.pieces import Piece, read_pieces
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.store.parts.uses import note_uses
from lmprobe_zarr.typing import Array, Ints

__all__ = ["NOWHERE", "VirtualArray"]
NOWHERE: Final = -1

#: Prompts that are looked at together where the runs of all of them are found: few enough that what is computed stays small.
_PROMPTS_AT_A_TIME: Final = 2**18
#: Runs of prompts are kept where they are at most this many, or an eighth of the prompts.
_FEW_RUNS: Final = 1024
#: Up to this many runs for each array, a loop over them is faster than numpy's calls for each array.
_LOOPED: Final = 32


class _Place(NamedTuple):
    """Rows of one chunk that are read: ``out[target] = chunk[rows]``. `array` is NOWHERE for rows that no part holds."""

    array: int
    block: int
    rows: slice | Ints
    target: slice | Ints


class _Runs(NamedTuple):
    """Rows as runs of neighbours in one array: the array, the first row there, the first row of the output, the length."""

    source: Ints
    start: Ints
    target: Ints
    length: Ints


@dataclass(frozen=True, eq=False)
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

    def __getstate__(self) -> dict[str, Any]:
        # Without what is computed from the rest.
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @functools.cached_property
    def n_rows(self) -> int:
        """Length of the sample axis."""
        return self.source.shape[1] if self.offsets is None else int(self.offsets[-1])

    @functools.cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row; where parts keep different numbers of the largest values, that of the widest."""
        return max(array.info.row_shape for array in self.arrays)

    @property
    def held_layers(self) -> tuple[int, ...]:
        """The layers that any part holds, of whichever prompts; empty where there is no layer axis."""
        return tuple(layer for layer, places in zip(self.layers or (), self.layer_rows.T, strict=False) if (places >= 0).any())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return (*(() if self.layers is None else (len(self.layers),)), self.n_rows, *self.row_shape)

    @functools.cached_property
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

    @functools.cached_property
    def n_absent(self) -> int:
        """How many (class, prompt) pairs no part holds."""
        return int((self.source == NOWHERE).sum())

    @functools.cached_property
    def _absent(self) -> Any:
        """What stands for a value that no part holds."""
        return absent_value([array.info for array in self.arrays], self.dtype) if self.absent_as_nan else fill_value(self.dtype)

    @functools.cached_property
    def _empty(self) -> tuple[bool, ...]:
        """Which arrays hold a column without any value."""
        return tuple(self.absent_as_nan and kind_of(array.info).name == "missing" for array in self.arrays)

    @functools.cached_property
    def _runs_of_all(self) -> dict[int, _Runs | None]:
        """The runs of all rows by class, None where they are too many; filled by `_runs`."""
        return {}

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
        dtype, row_shape, shown = self.dtype, self.row_shape, self.dtype if self.absent_as_nan else None
        tail = np.empty((0, *row_shape), bool)[(slice(None), *columns)].shape[1:] if columns else row_shape
        out = empty_aligned((len(layers), n, *tail), dtype)
        pieces: list[Piece] = []
        located: dict[int, list[_Place]] = {}
        for values, layer in zip(out, layers.tolist(), strict=True):
            group = int(self.classes[layer])
            if group not in located:
                located[group] = self._locate(group, rows)
            for array, block, chunk_rows, target in located[group]:
                if array == NOWHERE or self._empty[array]:
                    values[target] = self._absent
                else:
                    held = int(self.layer_rows[array, layer])
                    pieces.append(Piece(self.arrays[array], held, block, chunk_rows, values, target, row_shape, shown))
        read_pieces(pieces, columns)
        if note:
            read = {place.array for places in located.values() for place in places if place.array != NOWHERE}
            note_uses((array.storage, array.part) for array in map(self.arrays.__getitem__, read) if array.noted)
        return out

    def blocks(self, layer: int, rows: slice | Ints) -> list[slice | Ints]:
        """The rows of each chunk, as places among `rows`, chunk by chunk; rows that no part holds are left out."""
        return [place.target for place in self._locate(int(self.classes[layer]), rows) if place.array != NOWHERE]

    def _locate(self, group: int, rows: slice | Ints) -> list[_Place]:
        """Where rows are stored, each chunk once, those of one array together and in their order."""
        single = self._run_of_prompt(group, rows) if isinstance(rows, slice) else None
        if single is not None:
            return self._cut_few([single]) or []
        runs = self._runs(group, rows)
        found = None
        if len(runs.source) <= _LOOPED * len(self.arrays):
            found = self._cut_few([*zip(*(part.tolist() for part in runs), strict=True)])
        return self._cut(runs) if found is None else found

    def _cut_few(self, runs: list[tuple[int, int, int, int]]) -> list[_Place] | None:
        """The places of a few runs, each as in `_Runs`; None where two have rows in the same chunk, which is read once for both."""
        out: list[_Place] = []
        for array, start, target, length in runs:
            if array == NOWHERE:
                out.append(_Place(NOWHERE, 0, slice(0), slice(target, target + length)))
                continue
            size, end, shift = self.arrays[array].info.rows_per_chunk, start + length, target - start
            for block in range(start // size, -(-end // size)):
                base = block * size
                low, high = max(start, base), min(end, base + size)
                out.append(_Place(array, block, slice(low - base, high - base), slice(low + shift, high + shift)))
        if len(runs) > 1:
            chunks = [place[:2] for place in out if place.array != NOWHERE]
            if len(set(chunks)) < len(chunks):
                return None
            out.sort(key=lambda place: place[:2])
        return out

    def _cut(self, runs: _Runs) -> list[_Place]:
        """The places of any runs."""
        source, start, target, length = runs
        out: list[_Place] = []
        for array in np.unique(source):
            mine = source == array
            at, to, count = start[mine], target[mine], length[mine]
            if array == NOWHERE:
                out.append(_Place(NOWHERE, 0, slice(0), as_slice(concat_ranges(to, count))))
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
                out.append(_Place(int(array), base // size, chunk_rows, as_slice(concat_ranges(begins + shift[members], counts))))
        return out

    def _runs(self, group: int, rows: slice | Ints) -> _Runs:
        """Rows of a class as runs."""
        if not isinstance(rows, slice):
            return self._runs_of_each(group, rows)
        begin, end, _ = rows.indices(self.n_rows)
        if end <= begin:
            return _Runs(*(np.zeros(0, np.int64) for _ in _Runs._fields))
        runs = self._runs_of_all.get(group)
        # Looking at all prompts pays where a selection is a large part of them: others of its size are likely to follow.
        if runs is None and group not in self._runs_of_all and 4 * (end - begin) >= self.n_rows:
            runs = self._runs_of_all[group] = self._all_runs(group)
        return self._runs_of_slice(group, begin, end) if runs is None else _clipped(runs, begin, end)

    def _run_of_prompt(self, group: int, rows: slice) -> tuple[int, int, int, int] | None:
        """The run of some rows of a single prompt, which needs no look at another; None for the rows of several, or none."""
        begin, end, _ = rows.indices(self.n_rows)
        if self.offsets is None:
            if end - begin != 1:
                return None
            return int(self.source[group, begin]), int(self.start[group, begin]), 0, 1
        prompt = int(self.offsets.searchsorted(begin, "right")) - 1
        if end <= begin or end > self.offsets[prompt + 1]:
            return None
        within = begin - int(self.offsets[prompt])
        return int(self.source[group, prompt]), int(self.start[group, prompt]) + within, 0, end - begin

    def _all_runs(self, group: int) -> _Runs | None:
        """The runs of all rows; None where they are so many that keeping them would take much memory."""
        n = self.source.shape[1]
        found: list[_Runs] = []
        for low in range(0, n, _PROMPTS_AT_A_TIME):
            high = min(n, low + _PROMPTS_AT_A_TIME)
            begin, end = (low, high) if self.offsets is None else self.offsets[[low, high]].tolist()
            runs = self._runs_of_slice(group, begin, end)
            found.append(runs._replace(target=runs.target + begin))
            if sum(len(runs.source) for runs in found) > max(_FEW_RUNS, n // 8):
                return None
        return found[0] if len(found) == 1 else _joined(*map(np.concatenate, zip(*found, strict=True)))

    def _runs_of_slice(self, group: int, begin: int, end: int) -> _Runs:
        if self.offsets is None:
            source, start = self.source[group, begin:end].astype(np.int64), self.start[group, begin:end]
            return _joined(source, start, np.arange(end - begin), np.ones(end - begin, np.int64))
        low = int(self.offsets.searchsorted(begin, "right")) - 1
        high = int(self.offsets.searchsorted(end, "left"))
        bounds = self.offsets[low : high + 1] - begin
        start = self.start[group, low:high].copy()
        start[0] -= bounds[0]
        bounds[0], bounds[-1] = 0, end - begin
        return _joined(self.source[group, low:high].astype(np.int64), start, bounds[:-1], np.diff(bounds))

    def _runs_of_each(self, group: int, rows: Ints) -> _Runs:
        prompts, within = rows, np.zeros(len(rows), np.int64)
        if self.offsets is not None:
            prompts = np.searchsorted(self.offsets, rows, "right") - 1
            within = rows - self.offsets[prompts]
        start = self.start[group, prompts] + within
        return _joined(self.source[group, prompts].astype(np.int64), start, np.arange(len(rows)), np.ones(len(rows), np.int64))


def _joined(source: Ints, start: Ints, target: Ints, length: Ints) -> _Runs:
    """Runs that follow one another in the output, neighbours in one array joined."""
    new = np.ones(len(source), bool)
    new[1:] = (source[1:] != source[:-1]) | ((start[1:] != start[:-1] + length[:-1]) & (source[1:] != NOWHERE))
    heads = np.flatnonzero(new)
    end = target[-1:] + length[-1:]
    return _Runs(source[heads], start[heads], target[heads], np.diff(np.concatenate([target[heads], end])))


def _clipped(runs: _Runs, begin: int, end: int) -> _Runs:
    """The part of the runs that makes the rows from `begin` to `end` of their output, which becomes an output of its own."""
    low, high = int(runs.target.searchsorted(begin, "right")) - 1, int(runs.target.searchsorted(end, "left"))
    start, target = runs.start[low:high].copy(), runs.target[low:high] - begin
    start[0] -= target[0]
    target[0] = 0
    return _Runs(runs.source[low:high], start, target, np.diff(np.append(target, end - begin)))
