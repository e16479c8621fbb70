"""Committed parts of one group to lazy datasets: which part holds what, and reading just that. Never writes.

`View` is the union of a group's parts at one moment. `VirtualArray` is one variable of it: it knows for every prompt and
layer which part holds it, and reads only the chunks that a selection touches.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from lmprobe_zarr.batch import HASH_DIGITS, prompt_sha256
from lmprobe_zarr.chunks import Piece, StoredArray, fill_value, read_pieces
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, LayerOutOfRangeError, MissingPromptsError, PromptCollisionError
from lmprobe_zarr.index import TakenArray, TokenIndex, lazy_variable, tidy_key
from lmprobe_zarr.layers import LayerSpec, describe_layers, resolve_layers
from lmprobe_zarr.ragged import as_slice, concat_ranges, offsets_of, positions_of
from lmprobe_zarr.schema import SAMPLE_DIM, ArrayInfo, GroupInfo, Level, PartInfo
from lmprobe_zarr.storage import Storage

__all__ = ["Part", "View", "VirtualArray", "is_hash", "open_view", "to_dataset"]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
NOWHERE: Final = -1


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part and where it lies: `path` is its key below the store's root."""

    path: str
    info: PartInfo

    def array(self, storage: Storage, level: Level, name: str) -> StoredArray:
        """One of its arrays."""
        path = f"{level}/{name}"
        info = self.info.arrays[path]
        keys = ((key, f"{path}/{key}") for key in info.chunk_keys())
        files = {key: self.info.files[full] for key, full in keys if full in self.info.files}
        return StoredArray(storage, f"{self.path}/{path}", info, files)


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
    """

    arrays: tuple[StoredArray, ...]
    layers: tuple[int, ...] | None
    layer_rows: npt.NDArray[np.int32]
    classes: Ints
    source: npt.NDArray[np.int32]
    start: Ints
    offsets: Ints | None

    @property
    def n_rows(self) -> int:
        """Length of the sample axis."""
        return self.source.shape[1] if self.offsets is None else int(self.offsets[-1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.arrays[0].info.row_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return (*(() if self.layers is None else (len(self.layers),)), self.n_rows, *self.row_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds every part's values and, where some are absent, what stands for them."""
        dtypes = {array.dtype for array in self.arrays}
        if np.dtype(object) in dtypes:
            return np.dtype(object)
        common = np.result_type(*dtypes)
        if common == np.bool_ and self.n_absent:
            return np.dtype(np.int8)
        return common

    @property
    def n_absent(self) -> int:
        """How many (class, prompt) pairs no part holds."""
        return int((self.source == NOWHERE).sum())

    def read(self, layers: Ints, rows: slice | Ints, columns: tuple[Any, ...] = ()) -> Array:
        """Values of some layers and rows.

        Parameters
        ----------
        layers : ndarray of int
            Places along the layer axis (0 where there is none).
        rows : slice with step 1, or ndarray of int
            Places along the sample axis.
        columns : tuple
            Selection of the axes after it, as for indexing.

        Returns
        -------
        ndarray, shape (len(layers), rows, …)
        """
        n = len(range(*rows.indices(self.n_rows))) if isinstance(rows, slice) else len(rows)
        tail = np.empty((0, *self.row_shape), bool)[(slice(None), *columns)].shape[1:]
        out = np.empty((len(layers), n, *tail), self.dtype)
        pieces: list[Piece] = []
        outs: list[Array] = []
        located: dict[int, list[tuple[int, int, slice | Ints, slice | Ints]]] = {}
        for i, layer in enumerate(layers):
            group = int(self.classes[layer])
            if group not in located:
                located[group] = self._locate(group, rows)
            for array, block, chunk_rows, target in located[group]:
                if array == NOWHERE:
                    out[i][target] = fill_value(self.dtype)
                    continue
                pieces.append(Piece(self.arrays[array], int(self.layer_rows[array, layer]), block, chunk_rows, target))
                outs.append(out[i])
        read_pieces(pieces, outs, columns)
        return out

    def _locate(self, group: int, rows: slice | Ints) -> list[tuple[int, int, slice | Ints, slice | Ints]]:
        """Where rows lie: (array, chunk, rows in the chunk, rows of the output), each chunk once."""
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
            order = np.argsort(block, kind="stable")
            cuts = np.flatnonzero(np.diff(block[order])) + 1
            for members in np.split(order, cuts):
                begins, counts, base = low[members], (high - low)[members], int(block[members[0]]) * size
                chunk_rows = as_slice(concat_ranges(begins - base, counts))
                out.append((int(array), base // size, chunk_rows, as_slice(concat_ranges(begins + shift[members], counts))))
        return out

    def _runs(self, group: int, rows: slice | Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Rows as runs that lie together in one array: (array, first row there, first row of the output, length)."""
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


class LazyArray(BackendArray):
    """A `VirtualArray` as xarray's lazy indexing wants it: read at ``[…]``, by outer indexing."""

    def __init__(self, array: VirtualArray) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(tidy_key(key, self.shape), self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        layered = self.array.layers is not None
        lengths = self.shape if layered else (1, *self.shape)
        # An integer drops its axis, as in numpy; it is read as an axis of one.
        drop = tuple(0 if isinstance(k, (int, np.integer)) else slice(None) for k in key)
        layers, rows, *inner = (_checked(k, n) for k, n in zip(key if layered else (0, *key), lengths, strict=True))
        at, flip = _ascending(rows, self.array.n_rows)
        # Chunks are cut by at most one list; the other inner axes are cut afterwards.
        listed = [i for i, k in enumerate(inner) if not isinstance(k, slice)][1:]
        columns = tuple(slice(None) if i in listed else k for i, k in enumerate(inner))
        if all(isinstance(c, slice) and c == slice(None) for c in columns):
            columns = ()
        values = self.array.read(_as_rows(layers, lengths[0]), at, columns)
        for i in listed:
            values = np.take(values, inner[i], axis=i + 2)
        if flip:
            values = values[:, ::-1]
        return np.asarray((values if layered else values[0])[drop], self.dtype)


def _checked(key: Any, length: int) -> Any:
    """An indexer that does not point beyond its axis, an integer as a list of one.

    Raises
    ------
    IndexError
        It points beyond the axis.
    """
    if isinstance(key, slice):
        return key
    rows = np.atleast_1d(np.asarray(key, np.int64))
    # Negative ones have become positive before, see tidy_key: what is negative still is beyond the beginning.
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


@dataclass(frozen=True, eq=False)
class View:
    """The union of a group's parts at one moment. Opening another shows what was committed since.

    Parameters
    ----------
    storage : Storage
        The store's place.
    group : GroupInfo
        Whose parts these are.
    parts, annotations : tuple of Part
        In the order of their names, hidden ones left out.
    digests : ndarray of uint8, shape (prompt, 32)
        sha256 of every prompt, in the order of first appearance.
    members : tuple of ndarray of int64
        For each part and then each annotation: which prompt of the view each of its prompts is, −1 for none.
    keys : pandas.Index of uint64
        The first 16 digits of every digest, as a number, for looking prompts up.
    """

    storage: Storage
    group: GroupInfo
    parts: tuple[Part, ...]
    annotations: tuple[Part, ...]
    digests: npt.NDArray[np.uint8]
    members: tuple[Ints, ...]
    keys: pd.Index[Any]

    def __len__(self) -> int:
        """Prompts in the view."""
        return len(self.digests)

    @property
    def where(self) -> str:
        """The group, as it is named in messages."""
        return f"{self.storage.url}/{self.group.name}"

    @property
    def hashes(self) -> npt.NDArray[np.str_]:
        """The 16-digit label of every prompt."""
        return hashes_of(self.digests)

    def layers(self, level: Level) -> tuple[int, ...]:
        """All layers that any part holds at a level."""
        return tuple(sorted({i for part in self.parts if f"{level}/layer" in part.info.arrays for i in part.info.layers}))

    def variables(self, level: Level) -> dict[str, ArrayInfo]:
        """Activation variables of a level, as the last part has them; columns are not among them."""
        found: dict[str, ArrayInfo] = {}
        for part in self.parts:
            found |= {name: a for name, a in part.info.variables(level).items() if len(a.dims) > 1}
        return dict(sorted(found.items()))

    def columns(self, level: Level) -> dict[str, ArrayInfo]:
        """Columns of a level, the format's own and the user's."""
        found: dict[str, ArrayInfo] = {}
        for part in (*self.parts, *(self.annotations if level == "prompts" else ())):
            found |= {name: a for name, a in part.info.variables(level).items() if a.dims == (SAMPLE_DIM[level],)}
        return dict(sorted(found.items()))

    def find(self, digests: Sequence[str]) -> Ints:
        """Which prompt of the view each whole digest is; −1 for none.

        Raises
        ------
        PromptCollisionError
            A stored prompt has the same 16 digits but another digest.
        """
        wanted = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        rows = self._find_keys(_keys_of(wanted))
        found = rows >= 0
        differ = (self.digests[rows[found]] != wanted[found]).any(axis=1)
        if differ.any():
            one = hashes_of(wanted[found][differ][:1])[0]
            raise PromptCollisionError(f"a stored prompt and a given one share the hash {one} but differ: they cannot be in one group")
        return rows

    def _find_keys(self, keys: npt.NDArray[np.uint64]) -> Ints:
        return np.asarray(self.keys.get_indexer(pd.Index(keys)), np.int64)

    def select(self, prompts: Iterable[Any]) -> Ints:
        """Which prompts of the view are meant, in the given order, repeats included.

        Parameters
        ----------
        prompts : iterable of str or sequence of int
            Texts, hashes of 16 digits, or token ids. A hash is only taken for one where no prompt has that very text.

        Raises
        ------
        MissingPromptsError
            Some are not in the view; the first few are named.
        """
        if isinstance(prompts, str):
            raise InvalidArgumentError("prompts is one text: give a list of texts, hashes or token ids")
        listed = list(prompts)
        rows = self.find([prompt_sha256(p) for p in listed]) if listed else np.zeros(0, np.int64)
        absent = np.flatnonzero(rows < 0)
        labels = [str(listed[i]) for i in absent]
        as_hash = [j for j, label in enumerate(labels) if is_hash(label)]
        if as_hash:
            rows[absent[as_hash]] = self._find_keys(np.array([int(labels[j], 16) for j in as_hash], np.uint64))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(f"number {i} ({str(listed[i])[:40]!r})" for i in missing[:3])
            raise MissingPromptsError(f"{len(missing)} of {len(listed)} prompts are not in {self.where}: {shown}; extract them first")
        return rows

    def source(self, level: Level, name: str, rows: Ints, layers: tuple[int, ...], lengths: Ints | None = None) -> VirtualArray:
        """One variable or column of the view, over some of its prompts.

        Parameters
        ----------
        level : {"prompts", "tokens"}
            Where it lives.
        name : str
            Its name.
        rows : ndarray of int
            Prompts of the view, in the wanted order.
        layers : tuple of int
            Wanted layers.
        lengths : ndarray of int, shape (len(rows),), optional
            For tokens: rows of each prompt. A part that holds another number of them is out of date for that prompt.
        """
        key = f"{level}/{name}"
        owners = (*self.parts, *self.annotations)
        holding = [i for i, part in enumerate(owners) if key in part.info.arrays]
        holding.sort(key=lambda i: owners[i].info.name)  # the last by name wins, be it a part or an annotation
        arrays = tuple(owners[i].array(self.storage, level, name) for i in holding)
        layered = arrays[0].info.layered
        if len({(a.info.layered, a.info.row_shape) for a in arrays}) > 1:
            shapes = sorted({a.info.row_shape for a in arrays})
            raise CorruptPartError(f"the parts of {self.where} disagree on the shape of {name!r}: {shapes}")
        places = np.zeros((len(holding), 1), np.int32)
        if layered:
            places = np.array([[_place(owners[i].info.layers, layer) for layer in layers] for i in holding], np.int32).reshape(
                -1, len(layers)
            )
        held, classes = np.unique(places >= 0, axis=1, return_inverse=True)
        source = np.full((held.shape[1], len(self)), NOWHERE, np.int32)
        start = np.zeros((held.shape[1], len(self)), np.int64)
        view_lengths = self.token_counts() if level == "tokens" else None
        for c in range(held.shape[1]):
            for j in np.flatnonzero(held[:, c]):
                counts, member = owners[holding[j]].info.n_tokens, self.members[holding[j]]
                valid, first = member >= 0, np.arange(len(member))
                if view_lengths is not None and counts is not None:
                    valid, first = valid & (counts == view_lengths[member]), offsets_of(counts)[:-1]
                source[c, member[valid]] = j
                start[c, member[valid]] = first[valid]
        offsets = None if lengths is None else offsets_of(lengths)
        return VirtualArray(
            arrays=arrays,
            layers=layers if layered else None,
            layer_rows=places,
            classes=np.asarray(classes, np.int64).reshape(-1),
            source=source[:, rows],
            start=start[:, rows],
            offsets=offsets,
        )

    def token_counts(self) -> Ints:
        """Token rows of each prompt, 0 where none are kept: those of the last part that keeps any."""
        counts = np.zeros(len(self), np.int64)
        for part, member in zip(self.parts, self.members, strict=False):
            if part.info.n_tokens is not None:
                counts[member] = part.info.n_tokens
        return counts

    def covers(self, level: Level, name: str, rows: Ints, layers: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Whether a variable is there, shape (layer, prompt); one row for a variable without layers."""
        if name not in (*self.variables(level), *self.columns(level)):
            return np.zeros((max(1, len(layers)), len(rows)), bool)
        array = self.source(level, name, rows, layers)
        there: npt.NDArray[np.bool_] = (array.source != NOWHERE)[array.classes]
        return there if array.layers is not None else there[:1]


def is_hash(label: object) -> bool:
    """Whether a label looks like a prompt hash."""
    return isinstance(label, str) and len(label) == HASH_DIGITS and all(c in "0123456789abcdef" for c in label)


def hashes_of(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.str_]:
    """16-digit labels of whole digests."""
    text = np.ascontiguousarray(digests[:, : HASH_DIGITS // 2]).tobytes().hex()
    return np.frombuffer(text.encode(), f"S{HASH_DIGITS}").astype(f"U{HASH_DIGITS}")


def _keys_of(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    keys = np.ascontiguousarray(digests[:, : HASH_DIGITS // 2]).view(">u8").reshape(-1)
    return keys.astype(np.uint64)


def _place(layers: tuple[int, ...], layer: int) -> int:
    return layers.index(layer) if layer in layers else NOWHERE


def open_view(storage: Storage, group: GroupInfo, parts: Sequence[Part], annotations: Sequence[Part]) -> View:
    """The union of parts and annotations, given in the order of their names.

    Raises
    ------
    PromptCollisionError
        Two different prompts of the group share a hash.
    """
    hidden = {name for part in parts for name in part.info.replaces}
    shown = tuple(part for part in parts if part.info.name not in hidden)
    noted = tuple(annotations)
    # Parts and annotations in the order of their names decide together which column is the last; see `View.source`.
    every = np.concatenate([np.zeros((0, 32), np.uint8), *(part.info.digests for part in shown)])
    codes, first = _first_appearance(_keys_of(every))
    digests = every[first]
    if (digests[codes] != every).any():
        one = hashes_of(every[(digests[codes] != every).any(axis=1)][:1])[0]
        raise PromptCollisionError(f"two different prompts in {storage.url}/{group.name} share the hash {one}")
    bounds = offsets_of([len(part.info.digests) for part in shown])
    members = [codes[a:b] for a, b in itertools.pairwise(bounds)]
    keys = pd.Index(_keys_of(digests))
    members += [np.asarray(keys.get_indexer(pd.Index(_keys_of(note.info.digests))), np.int64) for note in noted]
    return View(storage, group, shown, noted, digests, tuple(members), keys)


def _first_appearance(keys: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
    codes, uniques = pd.factorize(keys)
    first = np.full(len(uniques), len(keys), np.int64)
    np.minimum.at(first, codes, np.arange(len(keys)))
    return codes.astype(np.int64), first


# ------------------------------------------------------------------------------------------------------------ datasets


def to_dataset(
    view: View,
    level: Level,
    *,
    prompts: Iterable[Any] | None = None,
    layers: LayerSpec | None = None,
) -> xr.Dataset:
    """A lazy dataset of one level of a view: dims (layer, prompt, hidden) or (layer, token, hidden).

    Parameters
    ----------
    view : View
        What to show.
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    prompts : iterable of texts, hashes or token ids, optional
        Exactly these, in this order, repeats included; None shows all, in the store's order.
    layers : int, sequence of int, slice or "all", optional
        Which layers; None shows all.

    Raises
    ------
    MissingPromptsError
        A prompt is not in the view, or (tokens) is stored without tokens.
    LayerOutOfRangeError
        A layer that the group does not hold.
    """
    rows = np.arange(len(view)) if prompts is None else view.select(prompts)
    chosen = _choose_layers(view, level, layers)
    counts = view.token_counts()
    if level == "tokens":
        if prompts is None:
            rows = rows[counts[rows] > 0]
        elif (counts[rows] == 0).any():
            without = np.flatnonzero(counts[rows] == 0)
            raise MissingPromptsError(
                f"{len(without)} of {len(rows)} prompts are in {view.where} without tokens, first {view.hashes[rows[without[0]]]}: "
                "extract them with keep_tokens=True"
            )
    data = _token_dataset(view, rows, counts[rows], chosen) if level == "tokens" else _prompt_dataset(view, rows, counts[rows], chosen)
    attrs = {"group": view.group.name, "provenance": json.dumps(dict(view.group.provenance))}
    known = {"num_layers": view.group.num_layers, "hidden_size": view.group.hidden_size}
    return data.assign_coords(model=view.group.model).assign_attrs(attrs | {k: v for k, v in known.items() if v is not None})


def _choose_layers(view: View, level: Level, layers: LayerSpec | None) -> tuple[int, ...]:
    held = view.layers(level)
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return held
    wanted = resolve_layers(layers, view.group.num_layers or (max(held, default=-1) + 1))
    absent = [layer for layer in wanted if layer not in held]
    if absent:
        raise LayerOutOfRangeError(
            f"layer {absent[0]} is not stored in {view.where}, which holds layers {describe_layers(held)}: extract it first"
        )
    return wanted


def _activation_variables(view: View, level: Level, rows: Ints, layers: tuple[int, ...], lengths: Ints | None) -> dict[str, xr.Variable]:
    variables = {}
    for name, info in view.variables(level).items():
        array = view.source(level, name, rows, layers, lengths)
        kinds = sorted({str(a.info.attributes.get("stored_dtype", a.info.dtype)) for a in array.arrays})
        attrs = {"stored_dtype": ", ".join(kinds)}
        variables[name] = lazy_variable(info.dims, LazyArray(array), attrs)
        variables[name].encoding["preferred_chunks"] = {"layer": 1, SAMPLE_DIM[level]: array.arrays[0].info.rows_per_chunk}
    return variables


def _prompt_columns(view: View, rows: Ints) -> dict[str, tuple[VirtualArray, dict[str, Any]]]:
    columns = {}
    for name in view.columns("prompts"):
        if name in {"prompt", "prompt_sha256", "n_tokens", "prompt_row"}:
            continue
        array = view.source("prompts", name, rows, ())
        columns[name] = (array, {"missing": array.n_absent} if array.n_absent else {})
    return columns


def _prompt_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...]) -> xr.Dataset:
    variables = _activation_variables(view, "prompts", rows, layers, None)
    coords: dict[str, Any] = {"prompt": view.hashes[rows], "n_tokens": ("prompt", counts, {"sample_dimension": "token"})}
    if layers:
        coords["layer"] = np.array(layers, np.int64)
    coords |= {name: lazy_variable(("prompt",), LazyArray(a), attrs) for name, (a, attrs) in _prompt_columns(view, rows).items()}
    coords["prompt_sha256"] = lazy_variable(("prompt",), TakenArray(_digest_texts(view), rows))
    return xr.Dataset(variables, coords=coords)


def _token_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...]) -> xr.Dataset:
    variables = _activation_variables(view, "tokens", rows, layers, counts)
    uniques, codes = np.unique(rows, return_inverse=True)
    by_token = np.repeat(codes.astype(np.int32), counts)
    order = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    index = TokenIndex(view.hashes[uniques], by_token, _positions(view, rows, counts))
    coords: dict[str, Any] = {}
    if layers:
        coords["layer"] = np.array(layers, np.int64)
    for name in view.columns("tokens"):
        if name not in {"prompt_row", "position"}:
            coords[name] = lazy_variable(("token",), LazyArray(view.source("tokens", name, rows, (), counts)))
    for name, (array, attrs) in _prompt_columns(view, rows).items():
        coords[name] = lazy_variable(("token",), TakenArray(LazyArray(array), order), attrs)
    coords["prompt_sha256"] = lazy_variable(("token",), TakenArray(_digest_texts(view), rows[order]))
    data = xr.Dataset(variables, coords=coords)
    return data.assign_coords(xr.Coordinates(index.create_variables(), indexes={"prompt": index, "position": index}))


def _positions(view: View, rows: Ints, counts: Ints) -> Ints:
    """Places of tokens in their prompts: 0, 1, 2, … unless a part says that it kept only some."""
    positions = [part.info.arrays["tokens/position"] for part in view.parts if part.info.n_tokens is not None]
    if all(info.attributes.get("whole_prompts") for info in positions):
        return positions_of(counts)
    array = view.source("tokens", "position", rows, (), counts)
    return np.asarray(array.read(np.zeros(1, np.int64), slice(0, array.n_rows))[0], np.int64)


def _digest_texts(view: View) -> npt.NDArray[np.str_]:
    text = np.ascontiguousarray(view.digests).tobytes().hex()
    return np.frombuffer(text.encode(), "S64").astype("U64")
