"""Which dimension of an array holds the units of a row, and which layers have any: `hidden`, or another of a site of another width."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Iterable
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.display import name_in_messages
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.tokens.lazy import stored_rows

__all__ = ["find_inner_dim", "inner_dim", "is_inner_dim", "is_ranked", "without_absent_layers"]

#: Dimensions that tell rows or results apart, and so are never the one along which a row is summed.
_OUTER: Final = frozenset(
    {"layer", "prompt", "token", "position", "head", "class", "variable", "label", "probe", "fold", "seed", "repeat", "strength", "shuffle"}
)  # fmt: skip


def find_inner_dim(dims: Iterable[Hashable]) -> str | None:
    """The dimension of the units of a row: the only one named as such, or else the only one that is not known to be another; or None."""
    listed = [str(dim) for dim in dims]
    named = [dim for dim in listed if is_inner_dim(dim)]
    found = named or [dim for dim in listed if dim not in _OUTER]
    return found[0] if len(found) == 1 else None


def is_inner_dim(dim: Hashable) -> bool:
    """Whether a dimension has a name that stores give to the units of a row, or `.lz.heads()` to those of a head."""
    return dim in ("hidden", "head_dim") or str(dim).endswith("_unit")


def is_ranked(array: xr.DataArray) -> bool:
    """Whether an array has the largest latents of each row, by size: its columns are of other latents in every row, and are no units."""
    return "sae" in array.attrs and any(str(dim).endswith("_k") for dim in array.dims)


def inner_dim(array: xr.DataArray | xr.Variable) -> str:
    """The dimension of the units of a row, by which activations and coefficients are multiplied.

    Parameters
    ----------
    array : DataArray or Variable
        Activations, coefficients or means.

    Raises
    ------
    InvalidArgumentError
        There is none, or there are several.
    """
    found = find_inner_dim(array.dims)
    if found is None:
        name = name_in_messages(array) if isinstance(array, xr.DataArray) else "the array"
        others = [str(dim) for dim in array.dims if dim not in _OUTER]
        raise InvalidArgumentError(
            f"{name} has dims {tuple(array.dims)}, of which {', '.join(others) if others else 'none'} could be that of its units: give one "
            "such dimension, such as hidden or neurons_unit; .stack makes one of several"
        )
    return found


def without_absent_layers(array: xr.DataArray) -> xr.DataArray:
    """The array without the layers that nothing is stored of, which a warning names; the same array if it has values in each, or in none.

    A site may be in some layers of a model only, and a store may hold further layers of other variables. Never reads what is lazy.
    """
    held = read_list(array.attrs, "stored_layers")
    if held is None or "layer" not in array.dims or "layer" not in array.coords:
        return array
    labels = array.coords["layer"].values.tolist()
    absent = [place for place, label in enumerate(labels) if label not in held and not _has_values(array.variable, place)]
    if not absent or len(absent) == len(labels):
        return array
    kept = [place for place in range(len(labels)) if place not in absent]
    shown = [labels[place] for place in absent]
    warnings.warn(
        f"{name_in_messages(array)} is not stored in the layers {shown}, which are left out: select the others by .sel(layer="
        f"{[labels[place] for place in kept]})",
        UserWarning,
        stacklevel=_callers_level(),
    )
    return array.isel(layer=kept)


def _callers_level() -> int:
    """How many frames the caller of this package is above `without_absent_layers`, which calls reach by ways of different lengths."""
    level, frame = 1, inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("lmprobe_zarr."):
        level, frame = level + 1, frame.f_back
    return level


def _has_values(variable: xr.Variable, place: int) -> bool:
    """Whether a layer has values, although its attribute says that it has not: arrays of several stores may have been put together."""
    layer = variable.isel(layer=place)
    stored: Any = stored_rows(layer)
    if stored is not None:
        return bool(stored.any())
    if layer.chunks is not None or not layer._in_memory or layer.dtype.kind != "f":
        return False
    return not bool(np.isnan(layer.values).all())
