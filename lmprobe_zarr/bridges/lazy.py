"""Foreign files as lazy xarray datasets: only the bytes of the selected values are read.

The datasets have the names, dimensions, coordinates and index of a store's datasets (see ``store.datasets``). Knows no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.batch import STATISTICS, as_slice, copy_rows, offsets_of, positions_of
from lmprobe_zarr.bridges.entry import Entry, Held, LazySource, Piece, held_dtype
from lmprobe_zarr.bridges.files import map_files
from lmprobe_zarr.interchange import as_texts, to_interchange
from lmprobe_zarr.store.format import SAMPLE_DIM, Level, array_dims
from lmprobe_zarr.tokens import ColumnVariable, TakenArray, TokenIndex, lazy_variable, protect, tidy_key, with_columns
from lmprobe_zarr.typing import Array, Ints

__all__ = ["entries_dataset"]

CHUNK_BYTES: Final = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class _Variable:
    """One variable over all entries.

    `held` says for each tuple `Entry.holds` which `Held` has which layer, because entries differ in layers and dtypes.
    """

    name: str
    level: Level
    layers: tuple[int, ...] | None
    row_shape: tuple[int, ...]
    held: Mapping[tuple[Held, ...], Mapping[int | None, Held]]

    @property
    def dtypes(self) -> list[str]:
        """The dtypes in which the entries hold it."""
        return sorted({held.dtype for by_layer in self.held.values() for held in by_layer.values()})


class _EntriesArray(BackendArray):
    """A variable as xarray's lazy indexing needs it.

    Parameters
    ----------
    source : LazySource
        Reads the values.
    entries : sequence of Entry
        Along the sample axis, repeats included.
    offsets : ndarray of int64, shape (entry + 1,)
        The first row of each entry, and the end of the last.
    variable : _Variable
    """

    def __init__(self, source: LazySource, entries: Sequence[Entry], offsets: Ints, variable: _Variable, *, stored: bool) -> None:
        self.source, self.entries, self.offsets, self.variable = source, entries, offsets, variable
        layers = () if variable.layers is None else (len(variable.layers),)
        self.shape = (*layers, int(offsets[-1]), *variable.row_shape)
        dtype = np.result_type(*map(held_dtype, variable.dtypes))
        self.dtype = np.dtype(np.float32) if dtype == np.float16 and not stored else dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        # An integer drops its axis, as in numpy. It is read as an axis of length 1, which is dropped at the end.
        layered = self.variable.layers is not None
        lengths = self.shape if layered else (1, *self.shape)
        drop = tuple(0 if isinstance(k, (int, np.integer)) else slice(None) for k in key)
        places, rows, *inner = (_numbers(k, n) for k, n in zip(key if layered else (0, *key), lengths, strict=True))
        whole = all(len(k) == n and (k == np.arange(n)).all() for k, n in zip(inner, self.variable.row_shape, strict=True))
        cut = () if whole else np.ix_(*inner)
        fill = np.nan if self.dtype.kind == "f" else -1
        out = np.full((len(places), len(rows), *(len(k) for k in inner)), fill, self.dtype)
        owner = np.searchsorted(self.offsets, rows, "right") - 1
        order = np.argsort(owner, kind="stable")
        cuts = np.flatnonzero(np.diff(owner[order])) + 1
        groups = np.split(order, cuts) if len(order) else []

        def read(at: Ints) -> None:
            self._read_entry(int(owner[at[0]]), places, at, rows[at] - self.offsets[owner[at[0]]], cut, out)

        for _ in map_files(read, groups, local=self.source.is_local):
            pass
        return out[drop] if layered else out[0][drop]

    def _read_entry(self, number: int, places: Ints, at: Ints, within: Ints, cut: tuple[Any, ...], out: Array) -> None:
        """Read rows of one entry into `out`: one range of bytes for each layer."""
        entry = self.entries[number]
        by_layer = self.variable.held.get(entry.holds, {})
        low, high = int(within.min()), int(within.max()) + 1
        pieces, targets = [], []
        for i, place in enumerate(places.tolist()):
            layer = None if self.variable.layers is None else self.variable.layers[place]
            held = by_layer.get(layer)
            if held is not None:
                buffer = np.empty((high - low, *held.row_shape), held_dtype(held.dtype))
                pieces.append(Piece(entry, held, layer, low, high, buffer))
                targets.append((i, buffer))
        self.source.read_pieces(entry, pieces)
        for i, buffer in targets:
            taken = buffer[within - low]
            if taken.shape[1:] != self.variable.row_shape:  # this entry holds fewer of the largest values than others
                fill = np.nan if taken.dtype.kind == "f" else -1
                wide = np.full((len(taken), *self.variable.row_shape), fill, taken.dtype)
                wide[(slice(None), *map(slice, taken.shape[1:]))] = taken
                taken = wide
            copy_rows(taken, out[i], as_slice(at), cut)


def _numbers(key: Any, length: int) -> Ints:
    """A slice, an integer or an array of integers as an array of indices."""
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    numbers = np.atleast_1d(np.asarray(key, np.int64))
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= length):
        raise IndexError(f"an index is out of bounds for an axis of length {length}")
    return numbers


def entries_dataset(
    source: LazySource, entries: Sequence[Entry], level: Level, layers: tuple[int, ...], *, model: str, stored: bool
) -> xr.Dataset:
    """A lazy dataset over entries, one row per prompt or per token.

    Parameters
    ----------
    source : LazySource
        Reads the values.
    entries : sequence of Entry
        In the wanted order, repeats included. All have rows of the same width; for tokens, all hold tokens.
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    layers : tuple of int
        Which layers to show.
    model : str
        Its name.
    stored : bool
        Whether float16 is read as it is stored, not as float32.
    """
    counts = np.array([_token_rows(entry) for entry in entries], np.int64)
    offsets = offsets_of(counts) if level == "tokens" else np.arange(len(entries) + 1)
    sample = SAMPLE_DIM[level]
    variables, coords = {}, {}
    for variable in _variables(entries, level, layers):
        array = _EntriesArray(source, entries, offsets, variable, stored=stored)
        dims = array_dims(variable.name, level, array.shape, variable.layers is not None, None)
        if variable.name == "token_id":
            coords["token_id"] = lazy_variable((sample,), array, column=True)
            continue
        lazy = lazy_variable(dims, array, {"stored_dtype": ", ".join(variable.dtypes)})
        row_nbytes = max(1, int(np.prod(variable.row_shape, dtype=np.int64)) * array.dtype.itemsize)
        lazy.encoding["preferred_chunks"] = {"layer": 1, sample: max(1, CHUNK_BYTES // row_nbytes)}
        variables[variable.name] = lazy
    hashes = as_texts([entry.hash for entry in entries])
    columns: dict[str, Array] = {
        "prompt_length": np.array([-1 if entry.n_tokens is None else entry.n_tokens for entry in entries], np.int64),
        "prompt_sha256": as_texts([entry.sha256 for entry in entries]),
    }
    if any(entry.text is not None for entry in entries):
        columns["text"] = as_texts([entry.text or "" for entry in entries])
    if layers:
        coords["layer"] = xr.Variable(("layer",), np.array(layers, np.int64))
    data: xr.Dataset
    if level == "prompts":
        if "perplexity" in variables:
            coords["statistic"] = xr.Variable(("statistic",), list(STATISTICS))
        coords |= {name: ColumnVariable(("prompt",), values) for name, values in columns.items()}
        coords["prompt"] = xr.Variable(("prompt",), hashes)
        coords["n_tokens"] = ColumnVariable(("prompt",), counts, {"sample_dimension": "token"})
        data = with_columns(xr.Dataset(variables), coords)
    else:
        uniques, codes = np.unique(hashes, return_inverse=True)
        order = np.repeat(np.arange(len(entries), dtype=np.int32), counts)
        index = TokenIndex(uniques, np.repeat(codes.astype(np.int32), counts), positions_of(counts))
        coords |= {name: lazy_variable(("token",), TakenArray(values, order), column=True) for name, values in columns.items()}
        data = with_columns(xr.Dataset(variables), coords)
        data = data.assign_coords(xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index}))
    widths = {held.row_shape[0] for entry in entries for held in entry.holds if held.variable.startswith("resid")}
    attrs = {"provenance": "{}", "source": source.url} | ({"hidden_size": widths.pop()} if len(widths) == 1 else {})
    return protect(to_interchange(data.assign_coords(model=model).assign_attrs(attrs)))


def _token_rows(entry: Entry) -> int:
    return (entry.n_tokens or 0) if any(held.level == "tokens" for held in entry.holds) else 0


def _variables(entries: Sequence[Entry], level: Level, layers: tuple[int, ...]) -> list[_Variable]:
    distinct = {entry.holds for entry in entries}
    is_layered: dict[str, bool] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for held in (held for holds in distinct for held in holds if held.level == level):
        is_layered[held.variable] = held.layers is not None
        shapes[held.variable] = max(shapes.get(held.variable, held.row_shape), held.row_shape)
    found = []
    for name in sorted(is_layered):
        if is_layered[name] and not layers:
            continue
        by_holds: dict[tuple[Held, ...], dict[int | None, Held]] = {}
        for holds in distinct:
            matching = [held for held in holds if held.variable == name and held.level == level]
            by_holds[holds] = {layer: held for held in matching for layer in ((None,) if held.layers is None else held.layers)}
        found.append(_Variable(name, level, layers if is_layered[name] else None, shapes[name], by_holds))
    return found
