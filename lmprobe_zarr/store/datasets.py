"""A view as lazy xarray datasets, one row per prompt or one per token. Lays out; what is read is up to `virtual`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.batch import STATISTICS, LayerSpec, describe_layers, positions_of, resolve_layers
from lmprobe_zarr.errors import LayerOutOfRangeError, MissingPromptsError
from lmprobe_zarr.store.format import SAMPLE_DIM, Level
from lmprobe_zarr.store.parts import LazyArray, View, VirtualArray
from lmprobe_zarr.tokens import TakenArray, TokenIndex, lazy_variable
from lmprobe_zarr.typing import Ints

__all__ = ["choose_layers", "to_dataset"]


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
    chosen = choose_layers(view, view.layers(level), layers)
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


def choose_layers(view: View, held: tuple[int, ...], layers: LayerSpec | None) -> tuple[int, ...]:
    """Those of the layers held that are meant; raises `LayerOutOfRangeError` where one that is named is not among them."""
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return held
    wanted = resolve_layers(layers, view.group.num_layers or (max(held, default=-1) + 1))
    there = tuple(layer for layer in wanted if layer in held)
    # Numbers are meant one by one; a slice or a word means those of its layers that are stored.
    if len(there) < len(wanted) and (not there or not isinstance(layers, slice | str)):
        absent = next(layer for layer in wanted if layer not in held)
        raise LayerOutOfRangeError(
            f"layer {absent} is not stored in {view.where}, which holds layers {describe_layers(held)}: extract it first"
        )
    return there


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
    if "perplexity" in variables:
        coords["statistic"] = list(STATISTICS)
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
    if view.holds_whole_prompts:
        return positions_of(counts)
    array = view.source("tokens", "position", rows, (), counts)
    return np.asarray(array.read(np.zeros(1, np.int64), slice(0, array.n_rows))[0], np.int64)


def _digest_texts(view: View) -> npt.NDArray[np.str_]:
    text = np.ascontiguousarray(view.digests).tobytes().hex()
    return np.frombuffer(text.encode(), "S64").astype("U64")


def choose_held_layers(held: Sequence[int], layers: LayerSpec | None, where: str, num_layers: int | None = None) -> tuple[int, ...]:
    """Those of the layers that are there which are meant: numbers one by one, a slice or a word those of its layers."""
    if layers is None:
        return tuple(held)
    wanted = resolve_layers(layers, num_layers or max(held, default=-1) + 1)
    absent = [i for i in wanted if i not in held]
    if absent and (len(absent) == len(wanted) or not isinstance(layers, slice | str)):
        raise LayerOutOfRangeError(f"layer {absent[0]} is not in {where}, which holds layers {describe_layers(held)}")
    return tuple(i for i in wanted if i in held)
