"""What is said of rows that cannot be fitted: that they were never extracted, or that their values are NaN or infinite."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.probes.identity import show_prompts
from lmprobe_zarr.tokens import stored_rows

__all__ = ["describe_unfit", "is_stored"]


def is_stored(array: xr.DataArray | xr.Variable, layer: Any = None) -> Any:
    """Which rows of one layer are stored, as truth values over its rows; None where that is not known any more.

    Parameters
    ----------
    array : DataArray or Variable
        Lazy as it was opened, or selected from that. What has been loaded or computed with no longer knows.
    layer : int, optional
        The place of the layer; None where there is no such dimension.
    """
    variable = array.variable if isinstance(array, xr.DataArray) else array
    return stored_rows(variable if layer is None or "layer" not in variable.dims else variable.isel(layer=layer))


def describe_unfit(array: xr.DataArray, layer: Any, rows: list[int], n: int, *, noun: str = "prompt", name: str = "") -> str:
    """Why rows of a layer cannot be fitted, and what helps; never an activation is read, unless it is in memory.

    Parameters
    ----------
    array : DataArray
        The activations.
    layer : int or None
        The place of the layer; None where there is none.
    rows : list of int
        The rows that hold NaN or infinity, along ``prompt`` or ``token``.
    n : int
        How many rows were wanted.
    noun : str
        What a row is.
    name : str
        What the activations are called, by default by their own name.
    """
    held = is_stored(array, layer)
    labels = np.atleast_1d(array.coords["layer"].values) if "layer" in array.coords else None
    label = None if labels is None or layer is None else labels[layer if len(labels) > 1 else 0]
    of = f"{'' if label is None else f'layer {label} of '}{name or name_in_messages(array)}"
    absent = [] if held is None else [row for row in rows if not held[row]]
    shown = f" ({show_prompts(array, absent or rows)})" if array.sizes.get("prompt") else ""
    extract = "extract them" if label is None else f"extract it for them with layers=[{label}]"
    if absent:
        other = len(rows) - len(absent)
        more = f", and is NaN or infinite for {other} more" if other else ""
        if held is not None and not held.any():
            where = f"select the layers that are stored, {_selection(array)}" if label is not None else "choose another variable"
            return f"{of} was never extracted for any of these {noun}s, so that it has no values: {extract}, or {where}"
        return (
            f"{of} was never extracted for {len(absent)} of {n} {noun}s{shown}{more}: {extract}, or leave these {noun}s out with "
            f".dropna({noun!r})"
        )
    if held is None and layer is not None and len(rows) == n and (others := _layers_with_values(array)):
        # A site that some layers lack, in an array that has lost what it knew of that.
        return (
            f"{of} is NaN or infinite for all {n} {noun}s: its site may not be in this layer, store.coverage() tells: select the layers "
            f"that have values, .sel(layer={others})"
        )
    remedy = f"drop them with .dropna({noun!r}), or extract them again (float16 overflows at 65504)"
    unknown = "\nwhat was never extracted reads as NaN too, and store.coverage() tells which it is"
    return f"{of} is NaN or infinite for {len(rows)} of {n} {noun}s{shown}: {remedy}{unknown if _may_be_absent(array, layer, rows) else ''}"


def _selection(array: xr.DataArray) -> str:
    others = _layers_with_values(array)
    return f".sel(layer={others or '…'})"


def _layers_with_values(array: xr.DataArray) -> list[Any]:
    """Labels of the layers that are stored for every row, or that are in memory and hold a finite value; empty if that is not known."""
    if "layer" not in array.dims or "layer" not in array.coords:
        return []
    in_memory = array.variable.chunks is None and bool(array.variable._in_memory)
    found = []
    for place, label in enumerate(array.coords["layer"].values.tolist()):
        held = is_stored(array, place)
        if held.all() if held is not None else in_memory and np.isfinite(array.variable.isel(layer=place).values).any():
            found.append(label)
    return found


def _may_be_absent(array: xr.DataArray, layer: Any, rows: list[int]) -> bool:
    """Whether nothing is known of what is stored, and some of these rows hold NaN alone."""
    if is_stored(array, layer) is not None:
        return False
    variable = array.variable if layer is None or "layer" not in array.dims else array.variable.isel(layer=layer)
    if variable.chunks is not None or not variable._in_memory:
        return True
    dim = next((dim for dim in ("prompt", "token") if dim in variable.dims), None)
    return dim is None or any(bool(np.isnan(np.asarray(variable.isel({dim: row}).values, np.float64)).all()) for row in rows)
