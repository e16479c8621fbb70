"""What lets every writer of xarray take a dataset of this package: attributes that are numbers and texts, and texts as objects.

Everything that is handed out passes through `to_interchange`, so ``to_netcdf`` and ``to_zarr`` neither refuse it nor warn. Never a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import numpy as np
import xarray as xr
from xarray.indexes import PandasIndex

from lmprobe_zarr.typing import Array

__all__ = ["ABSENT_TEXT", "MISSING_TEXT", "TEXT", "AbsentText", "as_attributes", "as_texts", "read_list", "to_interchange"]

T = TypeVar("T", xr.Dataset, xr.DataArray)


class AbsentText(str):
    """An empty text that stands for none, in columns of stores whose version knew no missing texts.

    The value itself says so, where an attribute would go on saying it of whatever is computed from the column: xarray keeps attributes.
    """

    __slots__ = ()


ABSENT_TEXT: Final = AbsentText("")

#: The dtype of texts. Its metadata is xarray's mark of texts of any length: without it, a writer computes a Dask array to find out.
TEXT: Final = np.dtype(object, metadata={"element_type": str})
#: What a file holds for a missing text, which is none of its texts: no format has one of its own, and xarray would write "".
MISSING_TEXT: Final = "<missing in lmprobe-zarr>"
#: Whole numbers beyond 32 bits fit into no attribute of a netCDF 3 file; up to this one, a float holds them exactly.
_EXACT: Final = 2**53


def to_interchange(data: T) -> T:
    """The data with attributes and texts that every writer of xarray takes.

    Parameters
    ----------
    data : Dataset or DataArray
        It is not changed.

    Returns
    -------
    same kind
        Attributes as by `as_attributes`, fixed-width texts as by `as_texts`. Lazy and Dask arrays stay what they are.
    """
    found = data.copy(deep=False)
    held: dict[Any, xr.DataArray] = {**found.coords, **(found.data_vars if isinstance(found, xr.Dataset) else {})}
    texts: dict[Any, xr.Variable] = {}
    for name, array in held.items():
        if not _has_fixed_width(array.variable):
            continue
        index = found.xindexes.get(name)
        if index is None:
            texts[name] = _as_text_variable(array.variable)
        elif type(index) is PandasIndex:
            # The same index, so that one that finds more than its labels goes on doing so.
            index = PandasIndex(index.index, index.dim, coord_dtype=TEXT)
            found = found.assign_coords(xr.Coordinates(index.create_variables({name: array.variable}), indexes={name: index}))
    if isinstance(found, xr.Dataset):
        # Not by `assign_coords`, which makes plain variables of the columns that are never chunked.
        found = found.assign(texts).set_coords([name for name in texts if name in found.coords])
    else:
        found = found.assign_coords(texts)
    for name in held:
        array = found.coords[name] if name in found.coords else found[name]
        array.attrs = as_attributes(array.attrs)
    found.attrs = as_attributes(found.attrs)
    return found


def _as_text_variable(variable: xr.Variable) -> xr.Variable:
    return type(variable)(variable.dims, as_texts(variable.values), variable.attrs, variable.encoding)


def _has_fixed_width(variable: xr.Variable) -> bool:
    return variable.dtype.kind == "U" and variable._in_memory


def as_texts(values: Any) -> Array:
    """Texts as an array of objects of dtype `TEXT`. Zarr 3 has no specification of fixed-width texts, and warns of them.

    Parameters
    ----------
    values : array_like of str

    Returns
    -------
    ndarray of object
    """
    return np.asarray(values).astype(TEXT)


def as_attributes(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as numbers, texts, and lists of two or more numbers, which are all that a netCDF 3 file holds.

    Parameters
    ----------
    attrs : mapping
        None is left out. A truth value becomes 0 or 1. Lists of texts or truth values, lists of fewer than two items, which come back as
        no list, and mappings become JSON.

    Returns
    -------
    dict
    """
    return {str(name): _attribute(value) for name, value in attrs.items() if value is not None}


def _attribute(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if -(2**31) <= value < 2**31 else float(value) if abs(value) <= _EXACT else str(value)
    if isinstance(value, str | float):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    listed = list(listed) if isinstance(listed, tuple | set | frozenset) else listed
    if isinstance(listed, list) and len(listed) > 1 and not any(isinstance(item, bool | np.bool_) for item in listed):
        numbers = [_attribute(item) for item in listed if isinstance(item, int | float | np.number)]
        kinds = {type(number) for number in numbers}
        if len(numbers) == len(listed) and kinds <= {int, float}:
            return numbers if len(kinds) == 1 else [float(number) for number in numbers]
    return json.dumps(listed, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def read_list(attrs: Mapping[Any, Any], name: str) -> list[Any] | None:
    """A list among attributes, whether it was just made or has been in a file.

    Parameters
    ----------
    attrs : mapping
    name : str

    Returns
    -------
    list or None
        None if there is no such attribute.
    """
    if name not in attrs:
        return None
    value = attrs[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, np.ndarray):
        return list(np.atleast_1d(value).tolist())
    return list(value) if isinstance(value, list | tuple) else [value]
