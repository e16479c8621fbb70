"""lmprobe's files as lazy xarray datasets, where they lie: only the bytes of what is selected are ever read.

The datasets are laid out as those of a store (see `datasets`): the same names, dimensions, coordinates and index.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.batch import STATISTICS, LayerSpec, choose_layers, offsets_of, positions_of
from lmprobe_zarr.bridges import lmprobe_v2
from lmprobe_zarr.bridges.entry import Entry, Held, Skipped, held_dtype
from lmprobe_zarr.bridges.files import map_files, open_files
from lmprobe_zarr.bridges.import_plan import of_one_width, prompt_list
from lmprobe_zarr.bridges.lmprobe_v2 import LmprobeV2, Piece
from lmprobe_zarr.bridges.summaries import Tally
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError, ModelNotStoredError
from lmprobe_zarr.store.format import LEVELS, SAMPLE_DIM, Level, array_dims
from lmprobe_zarr.tokens import TakenArray, TokenIndex, lazy_variable, tidy_key
from lmprobe_zarr.typing import Array, Ints

__all__ = ["entries_dataset", "open_legacy"]
CHUNK_BYTES: Final = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class _Variable:
    """One variable over all entries: which of them hold which layers, in which dtype."""

    name: str
    level: Level
    layers: tuple[int, ...] | None
    row_shape: tuple[int, ...]
    held: Mapping[tuple[Held, ...], Mapping[int | None, Held]]

    @property
    def kinds(self) -> list[str]:
        return sorted({held.dtype for by_layer in self.held.values() for held in by_layer.values()})


class _EntriesArray(BackendArray):
    """A variable as xarray's lazy indexing wants it.

    Parameters
    ----------
    source : LmprobeV2
        Where from.
    entries : sequence of Entry
        Along the sample axis, repeats included.
    offsets : ndarray of int64, shape (entry + 1,)
        Where the rows of each begin.
    variable : _Variable
        What.
    """

    def __init__(self, source: LmprobeV2, entries: Sequence[Entry], offsets: Ints, variable: _Variable) -> None:
        self.source, self.entries, self.offsets, self.variable = source, entries, offsets, variable
        layers = () if variable.layers is None else (len(variable.layers),)
        self.shape = (*layers, int(offsets[-1]), *variable.row_shape)
        self.dtype = np.result_type(*(held_dtype(kind) for kind in variable.kinds))

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        # An integer drops its axis, as in numpy; it is read as an axis of one.
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

        for _ in map_files(read, groups, local=self.source.files.is_local):
            pass
        return out[drop] if layered else out[0][drop]

    def _read_entry(self, number: int, places: Ints, at: Ints, within: Ints, cut: tuple[Any, ...], out: Array) -> None:
        """Rows of one entry: one range of bytes for each layer."""
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
            if taken.shape[1:] != self.variable.row_shape:  # fewer of the largest values than elsewhere
                fill = np.nan if taken.dtype.kind == "f" else -1
                wide = np.full((len(taken), *self.variable.row_shape), fill, taken.dtype)
                wide[(slice(None), *map(slice, taken.shape[1:]))] = taken
                taken = wide
            out[i, at] = taken[(slice(None), *cut)] if cut else taken


def _numbers(key: Any, length: int) -> Ints:
    if isinstance(key, slice):
        return np.arange(*key.indices(length))
    numbers = np.atleast_1d(np.asarray(key, np.int64))
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= length):
        raise IndexError(f"an index is out of bounds for an axis of length {length}")
    return numbers


def entries_dataset(source: LmprobeV2, entries: Sequence[Entry], level: Level, layers: tuple[int, ...]) -> xr.Dataset:
    """A lazy dataset over entries, one row per prompt or per token.

    Parameters
    ----------
    source : LmprobeV2
        Where from.
    entries : sequence of Entry
        In the wanted order, repeats included; for tokens, only such as hold tokens. Their rows must be of one width.
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    layers : tuple of int
        Which layers.
    """
    counts = np.array([_token_rows(entry) for entry in entries], np.int64)
    offsets = offsets_of(counts) if level == "tokens" else np.arange(len(entries) + 1)
    sample = SAMPLE_DIM[level]
    variables, coords = {}, {}
    for variable in _variables(entries, level, layers):
        array = _EntriesArray(source, entries, offsets, variable)
        dims = array_dims(variable.name, level, len(array.shape), variable.layers is not None)
        if variable.name == "token_id":
            coords["token_id"] = lazy_variable((sample,), array)
            continue
        lazy = lazy_variable(dims, array, {"stored_dtype": ", ".join(variable.kinds)})
        row_nbytes = max(1, int(np.prod(variable.row_shape, dtype=np.int64)) * array.dtype.itemsize)
        lazy.encoding["preferred_chunks"] = {"layer": 1, sample: max(1, CHUNK_BYTES // row_nbytes)}
        variables[variable.name] = lazy
    hashes = np.array([entry.hash for entry in entries], "U16")
    columns: dict[str, Array] = {
        "prompt_length": np.array([-1 if entry.n_tokens is None else entry.n_tokens for entry in entries], np.int64),
        "prompt_sha256": np.array([entry.sha256 for entry in entries], "U64"),
    }
    if any(entry.text is not None for entry in entries):
        columns["text"] = np.array([entry.text or "" for entry in entries], object)
    if layers:
        coords["layer"] = xr.Variable(("layer",), np.array(layers, np.int64))
    data: xr.Dataset
    if level == "prompts":
        if "perplexity" in variables:
            coords["statistic"] = xr.Variable(("statistic",), list(STATISTICS))
        coords |= {name: xr.Variable(("prompt",), values) for name, values in columns.items()}
        coords["prompt"] = xr.Variable(("prompt",), hashes)
        coords["n_tokens"] = xr.Variable(("prompt",), counts, {"sample_dimension": "token"})
        data = xr.Dataset(variables, coords=coords)
    else:
        uniques, codes = np.unique(hashes, return_inverse=True)
        order = np.repeat(np.arange(len(entries), dtype=np.int32), counts)
        index = TokenIndex(uniques, np.repeat(codes.astype(np.int32), counts), positions_of(counts))
        coords |= {name: lazy_variable(("token",), TakenArray(values, order)) for name, values in columns.items()}
        data = xr.Dataset(variables, coords=coords)
        data = data.assign_coords(xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index}))
    widths = {held.row_shape[0] for entry in entries for held in entry.holds if held.variable.startswith("resid")}
    attrs = {"provenance": "{}", "source": source.url} | ({"hidden_size": widths.pop()} if len(widths) == 1 else {})
    return data.assign_coords(model=source.model).assign_attrs(attrs)


def _token_rows(entry: Entry) -> int:
    return (entry.n_tokens or 0) if any(held.level == "tokens" for held in entry.holds) else 0


def _variables(entries: Sequence[Entry], level: Level, layers: tuple[int, ...]) -> list[_Variable]:
    alike = {entry.holds for entry in entries}
    names: dict[str, bool] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for held in (held for holds in alike for held in holds if held.level == level):
        names[held.variable] = held.layers is not None
        shapes[held.variable] = max(shapes.get(held.variable, held.row_shape), held.row_shape)
    found = []
    for name in sorted(names):
        if names[name] and not layers:
            continue
        by_holds: dict[tuple[Held, ...], dict[int | None, Held]] = {}
        for holds in alike:
            mine = [held for held in holds if held.variable == name and held.level == level]
            by_holds[holds] = {layer: held for held in mine for layer in ((None,) if held.layers is None else held.layers)}
        found.append(_Variable(name, level, layers if names[name] else None, shapes[name], by_holds))
    return found


# -------------------------------------------------------------------------------------------------------------- in place


def open_legacy(
    cache_dir: str | os.PathLike[str],
    model: str,
    *,
    level: Level = "prompts",
    prompts: Iterable[str] | None = None,
    layers: LayerSpec | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """An lmprobe cache (safetensors, format v2) as a lazy dataset, where it lies.

    Parameters
    ----------
    cache_dir : path or URL
        The cache: a folder, or any URL that fsspec knows. Headers are read; of tensors, later, only the bytes that are selected.
    model : str
        Name of the model.
    level : {"prompts", "tokens"}
        As `Store.dataset`, one row per prompt; or as `Store.tokens`, one per token.
    prompts : iterable of str, optional
        Texts or hashes: exactly these, in this order, repeats included. None is all.
    layers : int, sequence of int, slice or word, optional
        Which layers; None is all that are there.
    storage_options : mapping, optional
        For the file system.

    Returns
    -------
    xarray.Dataset
        The same names, dimensions, coordinates and index as a store shows. Its attribute ``skipped`` says what could not be read.

    Raises
    ------
    ModelNotStoredError, MissingPromptsError, LayerOutOfRangeError
        It is not in the cache.
    CorruptFileError
        At reading: a file was changed since, or is damaged.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level={level!r} is unknown: use 'prompts' or 'tokens'")
    source = lmprobe_v2.LmprobeV2(open_files(cache_dir, storage_options), model)
    skipped = Tally()
    wanted = None if prompts is None else prompt_list(prompts)
    found: list[Entry | None] = []
    if wanted is None:
        found = [_or_tally(item, skipped) for item in source.entries()]
    else:
        different = list(dict.fromkeys(wanted))
        looked = dict(zip(different, source.find(different), strict=True))
        entries = {prompt: _first_entry(items or [], skipped) for prompt, items in looked.items()}
        found = [entries[prompt] for prompt in wanted]
        absent = [prompt for prompt, entry in zip(wanted, found, strict=True) if entry is None]
        if absent:
            raise MissingPromptsError(
                f"{len(absent)} of {len(wanted)} prompts are not in {source.url}, or are damaged there: first {absent[0][:40]!r}"
            )
    chosen = [entry for entry in found if entry is not None and (level == "prompts" or any(h.level == "tokens" for h in entry.holds))]
    if wanted is not None and len(chosen) < len(found):
        raise MissingPromptsError(f"{len(found) - len(chosen)} of {len(found)} prompts are in {source.url} without tokens")
    fitting = of_one_width(chosen, None, skipped)
    if not fitting:
        raise ModelNotStoredError(f"{source.url} holds no {level} of {model!r} that can be read: check the name and the folder")
    held = sorted({i for entry in fitting for h in entry.holds if h.level == level for i in h.layers or ()})
    data = entries_dataset(source, fitting, level, choose_layers(held, layers, where=source.url))
    return data.assign_attrs(skipped="; ".join(map(str, skipped.reasons()))) if len(skipped) else data


def _or_tally(found: Entry | Skipped, skipped: Tally) -> Entry | None:
    if isinstance(found, Entry):
        return found
    skipped.add(found.reason, found.name, found.detail)
    return None


def _first_entry(items: Sequence[Entry | Skipped], skipped: Tally) -> Entry | None:
    entries = [entry for entry in (_or_tally(item, skipped) for item in items) if entry is not None]
    return entries[0] if entries else None
