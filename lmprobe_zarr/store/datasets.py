"""A view as lazy xarray datasets, one row per prompt or one per token.

Builds dimensions and coordinates; `VirtualArray` decides what is read, and when.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import STATISTICS, LayerSpec, choose_layers, positions_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingPromptsError
from lmprobe_zarr.interchange import MISSING_TEXT, TEXT, as_texts, to_interchange
from lmprobe_zarr.store.format import LEVELS, PROMPT_COLUMNS, SAE, SAMPLE_DIM, Level
from lmprobe_zarr.store.parts import (
    FlagArray,
    LazyArray,
    RoleArray,
    View,
    column_attrs,
    has_role_names,
    holds_texts_only,
    merged_kind,
)
from lmprobe_zarr.store.requested import requested_otherwise
from lmprobe_zarr.tokens import (
    INDEXED_COLUMNS,
    SEVERAL_CALLS,
    ColumnVariable,
    TakenArray,
    TokenIndex,
    kept_in_memory,
    lazy_variable,
    prompt_coordinates,
    protect,
    with_columns,
)
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Chunks", "Dtype", "chunked", "reads_stored", "to_dataset", "to_datatree"]

Chunks = Literal["auto"] | int | Mapping[str, Any] | None
#: "stored", or None for float16 as float32.
Dtype = Literal["stored"] | None


def reads_stored(dtype: Dtype) -> bool:
    """Whether values are read in the dtype that is stored.

    Raises
    ------
    InvalidArgumentError
        `dtype` is neither None nor ``"stored"``.
    """
    if dtype is not None and not (isinstance(dtype, str) and dtype == "stored"):
        raise InvalidArgumentError(
            f"dtype={dtype!r} is unknown: leave it out for float16 as float32, or give 'stored'; .astype() gives any other"
        )
    return dtype == "stored"


def to_dataset(
    view: View,
    level: Level,
    *,
    prompts: Iterable[Any] | None = None,
    layers: LayerSpec | None = None,
    dtype: Dtype = None,
) -> xr.Dataset:
    """A lazy dataset of one level of a view: dims (layer, prompt, hidden) or (layer, token, hidden).

    Parameters
    ----------
    view : View
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    prompts : iterable of texts, hashes or token ids, optional
        Exactly these, in this order, repeats included; None takes all, in the store's order.
    layers : int, sequence of int, slice or str, optional
        Which layers, as for `choose_layers`.
    dtype : "stored", optional
        None reads float16 as float32; each chunk is converted by the thread that reads it.

    Returns
    -------
    Dataset
        As an engine of xarray gives it to `xarray.open_dataset`: see `lmprobe_zarr.tokens.protect`, and `chunked`.

    Raises
    ------
    MissingPromptsError
        A prompt is not in the view, or (tokens) is stored without tokens.
    LayerOutOfRangeError
        A wanted layer is not stored.
    """
    rows = np.arange(len(view)) if prompts is None else view.select(prompts)
    chosen = choose_layers(view.layers(level), layers, where=view.where, num_layers=view.group.num_layers)
    counts = view.token_counts()
    if level == "tokens":
        if prompts is None and len(rows) and not counts.any():
            raise MissingPromptsError(
                f"no tokens were kept of the {len(rows)} prompts in {view.where}: extract them with keep_tokens=True, or read what is "
                "stored per prompt with store.dataset()"
            )
        if prompts is None:
            rows = rows[counts[rows] > 0]
        elif (counts[rows] == 0).any():
            without = np.flatnonzero(counts[rows] == 0)
            raise MissingPromptsError(
                f"{len(without)} of {len(rows)} prompts are in {view.where} without tokens, first {view.hashes[rows[without[0]]]}: "
                "extract them with keep_tokens=True"
            )
    make = _token_dataset if level == "tokens" else _prompt_dataset
    data = make(view, rows, counts[rows], chosen, stored=reads_stored(dtype))
    other = not view.one_call or requested_otherwise(view.storage.url, view.group.name, view.digests)
    if prompts is None and len(view) > 1 and other:
        for name in ("prompt", "prompt_sha256", "text"):
            if name in data.coords:
                data.coords[name].attrs.update(SEVERAL_CALLS)
    attrs = {"group": view.group.name, "provenance": json.dumps(dict(view.group.provenance))}
    known = {"num_layers": view.group.num_layers, "hidden_size": view.group.hidden_size}
    return to_interchange(data.assign_coords(model=view.group.model).assign_attrs(attrs | known))


def chunked(data: xr.Dataset, chunks: Chunks) -> xr.Dataset:
    """The dataset as a caller gets it: with activations as Dask arrays, or lazy without Dask. Columns are never Dask arrays.

    Parameters
    ----------
    data : Dataset
        From `to_dataset`.
    chunks : mapping, int or "auto", optional
        As in `xarray.open_dataset`: along a dimension without a size, chunks are as they are stored. All variables have the same chunks.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        No sizes of chunks, or a dimension that the dataset lacks.
    """
    if chunks is None:
        return protect(data)
    if isinstance(chunks, bool) or not (isinstance(chunks, int | np.integer | Mapping) or (isinstance(chunks, str) and chunks == "auto")):
        raise InvalidTypeError(
            f"chunks={chunks!r}: give a size for each dimension, as {{'layer': 1}}, one number, 'auto', or None for no Dask"
        )
    unknown = [dim for dim in chunks if dim not in data.dims] if isinstance(chunks, Mapping) else []
    if unknown:
        raise InvalidArgumentError(f"chunks={chunks!r} names {unknown}: this dataset has the dimensions {[str(dim) for dim in data.dims]}")
    sizes = _chunk_sizes(data, chunks)
    made = {name: array.variable.chunk({d: s for d, s in sizes.items() if d in array.dims}) for name, array in data.data_vars.items()}
    return protect(data.assign(made))


def _chunk_sizes(data: xr.Dataset, chunks: Literal["auto"] | int | Mapping[str, Any]) -> dict[Hashable, Any]:
    """The sizes of chunks along every dimension, chosen for the largest variable; "auto" gives multiples of what is stored."""
    normalize_chunks: Any = importlib.import_module("dask.array.core").normalize_chunks

    sizes: dict[Hashable, Any] = {}
    for array in sorted(data.data_vars.values(), key=lambda array: -array.nbytes):
        stored = array.encoding.get("preferred_chunks", {})
        held = {dim: stored.get(dim) or length for dim, length in array.sizes.items()}
        given = {dim: chunks.get(str(dim)) if isinstance(chunks, Mapping) else chunks for dim in array.dims}
        wanted = {dim: held[dim] if size is None else size for dim, size in given.items()}
        if array.size == 0:
            wanted = {dim: held[dim] if size == "auto" else size for dim, size in wanted.items()}
        found = normalize_chunks(tuple(wanted.values()), array.shape, dtype=array.dtype, previous_chunks=tuple(held.values()))
        sizes = dict(zip(wanted, found, strict=True)) | sizes
    return sizes


def to_datatree(views: Iterable[View], *, dtype: Dtype = None) -> xr.DataTree:
    """Datasets of several groups: ``/<group>/prompts`` of each, and ``/<group>/tokens`` where it keeps any."""
    nodes: dict[str, xr.Dataset] = {}
    for view in views:
        for level in LEVELS:
            if view.variables(level) or level == "prompts":
                nodes[f"/{view.group.name}/{level}"] = to_dataset(view, level, dtype=dtype)
    return xr.DataTree.from_dict(nodes)


def _activation_variables(
    view: View, level: Level, rows: Ints, layers: tuple[int, ...], lengths: Ints | None, *, stored: bool
) -> dict[str, xr.Variable]:
    variables, rows_per_chunk = {}, []
    for name, info in view.variables(level).items():
        array = view.source(level, name, rows, layers, lengths, widened=not stored)
        kinds = sorted({str(a.info.attributes.get("stored_dtype", a.info.dtype)) for a in array.arrays})
        noted = {key: info.attributes[key] for key in ("site_path", "num_heads", SAE) if key in info.attributes}
        if array.layers is not None and 0 < len(held := array.held_layers) < len(array.layers):
            noted["stored_layers"] = list(held)
        variables[name] = lazy_variable(info.dims, LazyArray(array), {"stored_dtype": ", ".join(kinds), **noted})
        rows_per_chunk.append(array.arrays[0].info.rows_per_chunk)
    for variable in variables.values():
        # Of the variable with the widest rows, so that all have the same chunks, as `Dataset.chunks` and data frames of Dask need.
        variable.encoding["preferred_chunks"] = {"layer": 1, SAMPLE_DIM[level]: min(rows_per_chunk)}
    return variables


def _layer_coords(view: View, layers: tuple[int, ...]) -> dict[str, Any]:
    """The layers and, where they differ in it, the module of each that mixes tokens, which the site ``attn`` is the output of."""
    if not layers:
        return {}
    coords: dict[str, Any] = {"layer": np.array(layers, np.int64)}
    mixers = next((part.info.recorded["mixers"] for part in reversed(view.parts) if "mixers" in part.info.recorded), None)
    if isinstance(mixers, list) and len(mixers) > max(layers):
        coords["mixer"] = ColumnVariable(("layer",), np.array([str(mixers[layer]) for layer in layers]))
    return coords


def _prompt_columns(view: View, rows: Ints, *, stored: bool) -> dict[str, tuple[LazyArray, dict[str, Any]]]:
    columns = {}
    for name in view.columns("prompts"):
        if name in {"prompt", "prompt_sha256", "n_tokens", "prompt_row"}:
            continue
        array = view.source("prompts", name, rows, (), widened=not stored)
        attrs: dict[str, Any] = {"missing": array.n_absent} if array.n_absent else {}
        own = {} if name in PROMPT_COLUMNS else column_attrs(merged_kind([each.info for each in array.arrays]), array.dtype)
        lazy = LazyArray(array)
        if array.dtype == object and not array.n_absent and holds_texts_only([each.info for each in array.arrays]):
            lazy.dtype = TEXT  # so that Dask arrays of it are written without being computed first
        columns[name] = (lazy, own | attrs)
    return columns


def _prompt_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...], *, stored: bool) -> xr.Dataset:
    variables = _activation_variables(view, "prompts", rows, layers, None, stored=stored)
    coords: dict[str, Any] = {"n_tokens": _kept_tokens(counts)}
    coords |= _layer_coords(view, layers)
    if "perplexity" in variables:
        coords["statistic"] = list(STATISTICS)
    coords |= {name: _column("prompt", a, attrs) for name, (a, attrs) in _prompt_columns(view, rows, stored=stored).items()}
    coords["prompt_sha256"] = lazy_variable(("prompt",), TakenArray(_digest_texts(view), rows), column=True)
    return with_columns(xr.Dataset(variables, coords=prompt_coordinates(as_texts(view.hashes[rows]))), coords)


def _column(dim: str, array: LazyArray | TakenArray, attrs: dict[str, Any]) -> xr.Variable:
    variable = lazy_variable((dim,), array, attrs, column=True)
    if array.dtype == object and array.dtype.metadata is None:
        variable.encoding["missing_value"] = MISSING_TEXT
    return variable


def _kept_tokens(counts: Ints) -> xr.Variable:
    """How many tokens are kept of each prompt: NaN where none are, as in any column that some prompts lack."""
    kept = counts > 0
    attrs = {"sample_dimension": "token"} | ({} if kept.all() else {"missing": int((~kept).sum())})
    return ColumnVariable(("prompt",), counts if kept.all() else np.where(kept, counts, np.nan), attrs)


def _token_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...], *, stored: bool) -> xr.Dataset:
    variables = _activation_variables(view, "tokens", rows, layers, counts, stored=stored)
    uniques, codes = np.unique(rows, return_inverse=True)
    by_token = np.repeat(codes.astype(np.int32), counts)
    order = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    coords: dict[str, Any] = {}
    coords |= _layer_coords(view, layers)
    selectable: dict[Hashable, xr.Variable] = {}
    for name in view.columns("tokens"):
        if name in INDEXED_COLUMNS:
            selectable[name] = kept_in_memory(_indexed_column(view, name, rows, counts))
        elif name not in {"prompt_row", "position"}:
            column = LazyArray(view.source("tokens", name, rows, (), counts, widened=not stored))
            coords[name] = lazy_variable(("token",), column, column=True)
    index = TokenIndex(as_texts(view.hashes[uniques]), by_token, _positions(view, rows, counts), columns=selectable)
    for name, (array, attrs) in _prompt_columns(view, rows, stored=stored).items():
        if name not in selectable:  # a column of the user's may have the name of one that chats have
            coords[name] = _column("token", TakenArray(array, order), attrs)
    coords["prompt_sha256"] = lazy_variable(("token",), TakenArray(_digest_texts(view), rows[order]), column=True)
    data = with_columns(xr.Dataset(variables), coords)
    variables_of_index = index.create_variables()
    return data.assign_coords(xr.Coordinates(variables_of_index, indexes=dict.fromkeys(variables_of_index, index)))


def _indexed_column(view: View, name: str, rows: Ints, counts: Ints) -> xr.Variable:
    """A column of tokens by which they are selected: roles by their names, and whether a token was generated as a truth value."""
    array = view.source("tokens", name, rows, (), counts)
    if name == "role" and has_role_names(array):
        return lazy_variable(("token",), RoleArray(array), column=True)
    return lazy_variable(("token",), FlagArray(array) if name == "generated" else LazyArray(array), column=True)


def _positions(view: View, rows: Ints, counts: Ints) -> Ints:
    """Places of tokens in their prompts: 0, 1, 2, … unless a part says that it kept only some."""
    if view.holds_whole_prompts:
        return positions_of(counts)
    array = view.source("tokens", "position", rows, (), counts)
    return np.asarray(array.read(np.zeros(1, np.int64), slice(0, array.n_rows))[0], np.int64)


def _digest_texts(view: View) -> Array:
    text = np.ascontiguousarray(view.digests).tobytes().hex()
    return as_texts(np.frombuffer(text.encode(), "S64").astype("U64"))
