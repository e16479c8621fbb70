"""Columns of a view as pandas holds them, in the dtypes that they were given with. Never a path or a part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.parts.columns import shown_column

__all__ = ["as_series", "prompt_index"]


def as_series(column: xr.DataArray) -> pd.Series[Any]:
    """A column with the hashes of its prompts as the index; raises `InvalidArgumentError` where it has several dimensions."""
    if column.ndim != 1:
        raise InvalidArgumentError(f"{column.name!r} has dims {column.dims}: a column has one; select or stack the others first")
    shown = shown_column(column.values, column.attrs)
    dtype = object if shown.kind.categories is None and (shown.kind.dtype == "object" or shown.kind.name == "date") else None
    return pd.Series(shown.to_pandas(), index=prompt_index(column, list(column.dims)), name=column.name, dtype=dtype)


def prompt_index(data: xr.DataArray | xr.Dataset, dims: list[Any]) -> pd.Index[Any] | None:
    """The hashes of the prompts along a dimension; None where they are not known."""
    prompts = data.coords.get("prompt")
    return pd.Index(np.asarray(prompts.values, object), name="prompt") if prompts is not None and list(prompts.dims) == dims else None
