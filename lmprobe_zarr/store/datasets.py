"""A view as lazy xarray datasets, one row per prompt or one per token.

Builds dimensions and coordinates; `VirtualArray` decides what is read, and when.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import STATISTICS, LayerSpec, choose_layers, positions_of
from lmprobe_zarr.errors import MissingPromptsError
from lmprobe_zarr.interchange import as_texts, to_interchange
from lmprobe_zarr.store.format import LEVELS, PROMPT_COLUMNS, SAMPLE_DIM, Level
from lmprobe_zarr.store.parts import LazyArray, View, VirtualArray, column_attrs, merged_kind
from lmprobe_zarr.store.requested import requested_otherwise
from lmprobe_zarr.tokens import SEVERAL_CALLS, TakenArray, TokenIndex, lazy_variable, prompt_coordinates
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Chunks", "to_dataset", "to_datatree"]

Chunks = Literal["auto"] | int | Mapping[str, Any] | None


def to_dataset(
    view: View,
    level: Level,
    *,
    prompts: Iterable[Any] | None = None,
    layers: LayerSpec | None = None,
    chunks: Chunks = None,
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
    chunks : mapping, int or "auto", optional
        None is lazy without Dask, ``{}`` is Dask with one layer and one stored chunk at a time.

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
    data = _token_dataset(view, rows, counts[rows], chosen) if level == "tokens" else _prompt_dataset(view, rows, counts[rows], chosen)
    other = not view.one_call or requested_otherwise(view.storage.url, view.group.name, view.digests)
    if prompts is None and len(view) > 1 and other:
        for name in ("prompt", "prompt_sha256", "text"):
            if name in data.coords:
                data.coords[name].attrs.update(SEVERAL_CALLS)
    attrs = {"group": view.group.name, "provenance": json.dumps(dict(view.group.provenance))}
    known = {"num_layers": view.group.num_layers, "hidden_size": view.group.hidden_size}
    data = to_interchange(data.assign_coords(model=view.group.model).assign_attrs(attrs | known))
    return data if chunks is None else data.chunk(_stored_chunks(data) if chunks == {} else chunks)


def _stored_chunks(data: xr.Dataset) -> dict[str, int]:
    """One layer, and as many rows as a stored chunk has."""
    hints = [variable.encoding.get("preferred_chunks", {}) for variable in data.data_vars.values()]
    return {dim: size for hint in hints for dim, size in hint.items() if dim in data.sizes}


def to_datatree(views: Iterable[View]) -> xr.DataTree:
    """Lazy datasets of several groups: ``/<group>/prompts`` of each, and ``/<group>/tokens`` where it keeps any."""
    nodes: dict[str, xr.Dataset] = {}
    for view in views:
        for level in LEVELS:
            if view.variables(level) or level == "prompts":
                nodes[f"/{view.group.name}/{level}"] = to_dataset(view, level)
    return xr.DataTree.from_dict(nodes)


def _activation_variables(view: View, level: Level, rows: Ints, layers: tuple[int, ...], lengths: Ints | None) -> dict[str, xr.Variable]:
    variables = {}
    for name, info in view.variables(level).items():
        array = view.source(level, name, rows, layers, lengths)
        kinds = sorted({str(a.info.attributes.get("stored_dtype", a.info.dtype)) for a in array.arrays})
        attrs = {"stored_dtype": ", ".join(kinds)}
        variables[name] = lazy_variable(info.dims, LazyArray(array), attrs)
        variables[name].encoding["preferred_chunks"] = {"layer": 1, SAMPLE_DIM[level]: array.arrays[0].info.rows_per_chunk}
    return variables


def _layer_coords(view: View, layers: tuple[int, ...]) -> dict[str, Any]:
    """The layers and, where they differ in it, the module of each that mixes tokens, which the site ``attn`` is the output of."""
    if not layers:
        return {}
    coords: dict[str, Any] = {"layer": np.array(layers, np.int64)}
    mixers = next((part.info.recorded["mixers"] for part in reversed(view.parts) if "mixers" in part.info.recorded), None)
    if isinstance(mixers, list) and len(mixers) > max(layers):
        coords["mixer"] = ("layer", np.array([str(mixers[layer]) for layer in layers]))
    return coords


def _prompt_columns(view: View, rows: Ints) -> dict[str, tuple[VirtualArray, dict[str, Any]]]:
    columns = {}
    for name in view.columns("prompts"):
        if name in {"prompt", "prompt_sha256", "n_tokens", "prompt_row"}:
            continue
        array = view.source("prompts", name, rows, ())
        attrs: dict[str, Any] = {"missing": array.n_absent} if array.n_absent else {}
        own = {} if name in PROMPT_COLUMNS else column_attrs(merged_kind([stored.info for stored in array.arrays]), array.dtype)
        columns[name] = (array, own | attrs)
    return columns


def _prompt_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...]) -> xr.Dataset:
    variables = _activation_variables(view, "prompts", rows, layers, None)
    coords: dict[str, Any] = {"n_tokens": _kept_tokens(counts)}
    coords |= _layer_coords(view, layers)
    if "perplexity" in variables:
        coords["statistic"] = list(STATISTICS)
    coords |= {name: lazy_variable(("prompt",), LazyArray(a), attrs) for name, (a, attrs) in _prompt_columns(view, rows).items()}
    coords["prompt_sha256"] = lazy_variable(("prompt",), TakenArray(_digest_texts(view), rows))
    return xr.Dataset(variables, coords=prompt_coordinates(as_texts(view.hashes[rows]))).assign_coords(coords)


def _kept_tokens(counts: Ints) -> xr.Variable:
    """How many tokens are kept of each prompt: NaN where none are, as in any column that some prompts lack."""
    kept = counts > 0
    attrs = {"sample_dimension": "token"} | ({} if kept.all() else {"missing": int((~kept).sum())})
    return xr.Variable(("prompt",), counts if kept.all() else np.where(kept, counts, np.nan), attrs)


def _token_dataset(view: View, rows: Ints, counts: Ints, layers: tuple[int, ...]) -> xr.Dataset:
    variables = _activation_variables(view, "tokens", rows, layers, counts)
    uniques, codes = np.unique(rows, return_inverse=True)
    by_token = np.repeat(codes.astype(np.int32), counts)
    order = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    index = TokenIndex(as_texts(view.hashes[uniques]), by_token, _positions(view, rows, counts))
    coords: dict[str, Any] = {}
    coords |= _layer_coords(view, layers)
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
    if view.holds_whole_prompts:
        return positions_of(counts)
    array = view.source("tokens", "position", rows, (), counts)
    return np.asarray(array.read(np.zeros(1, np.int64), slice(0, array.n_rows))[0], np.int64)


def _digest_texts(view: View) -> Array:
    text = np.ascontiguousarray(view.digests).tobytes().hex()
    return as_texts(np.frombuffer(text.encode(), "S64").astype("U64"))
