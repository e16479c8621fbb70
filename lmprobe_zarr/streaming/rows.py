"""Which rows of a source are wanted, and the labels that are given beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import check_word
from lmprobe_zarr.errors import InvalidArgumentError, MissingPromptsError
from lmprobe_zarr.interchange import read_list
from lmprobe_zarr.streaming.order import Blocks
from lmprobe_zarr.streaming.source import RowSource
from lmprobe_zarr.tokens import TokenIndex
from lmprobe_zarr.typing import Array, Ints, Mask, is_listed

__all__ = ["LabelColumn", "open_label_column", "wanted_rows"]


def wanted_rows(
    array: xr.DataArray,
    source: RowSource,
    *,
    skip_positions: int | Iterable[int] = (),
    where: Any = None,
    missing: str = "raise",
) -> Blocks:
    """The rows of a source that are wanted, by block.

    Parameters
    ----------
    array : DataArray
        The array that `source` was opened from; its coordinates give positions and prompts.
    source : RowSource
    skip_positions : int or iterable of int
        Tokens at these places of their prompts are left out.
    where : DataArray of bool over the sample dimension, or array of bool, shape (row,), optional
        Only rows where it is true.
    missing : {"raise", "drop"}
        What happens where rows are not stored in all of the layers.

    Raises
    ------
    MissingPromptsError
        Rows are not stored in a layer.
    InvalidArgumentError, InvalidTypeError
        A filter that does not fit the rows, or filters that leave no row.
    """
    check_word("missing", missing, ("raise", "drop"))
    blocks, n = source.blocks(), source.n_rows
    absent = n - int(blocks.offsets[-1])
    if absent and missing == "raise":
        held = read_list(array.attrs, "stored_layers")
        if held is not None and (lacking := [label for label in source.labels if label not in held]):
            raise MissingPromptsError(
                f"{array.name!r} is not stored in the layers {lacking}: choose those that it is stored in, layer={held}"
            )
        raise MissingPromptsError(
            f"{absent} of {n} rows are not stored in all of layers {list(source.labels)}: extract them, select prompts that have them, "
            'or give missing="drop"'
        )
    kept = np.ones(n, bool)
    given: Any = skip_positions
    listed = list(given) if is_listed(given) and not isinstance(given, str) else [given]
    skipped = np.asarray(listed)
    if skipped.dtype.kind in "iu":
        skipped = np.unique(skipped)
    if len(skipped):
        if skipped.dtype.kind not in "iu" or skipped.ndim != 1 or skipped[0] < 0:
            raise InvalidArgumentError(f"skip_positions={skip_positions!r:.60}: give places counted from 0, such as 0 or [0, 1]")
        if "position" not in array.coords or array.coords["position"].dims != (source.dim,):
            raise InvalidArgumentError("skip_positions needs a position along token, which is not here: open it with store.tokens()")
        kept &= ~np.isin(array.coords["position"].values, skipped)
    if where is not None:
        kept &= _as_mask(where, array, source)
    if not kept.all():
        blocks = replace(blocks, kept=kept)
    if not blocks.total:
        raise InvalidArgumentError(f"no row is left of {n}: filter less")
    return blocks


def _as_mask(where: Any, array: xr.DataArray, source: RowSource) -> Mask:
    if isinstance(where, xr.DataArray):
        if where.dims != (source.dim,):
            raise InvalidArgumentError(f"where has dims {where.dims}: give truth values over {source.dim!r} alone")
        index, other = array.xindexes.get("prompt"), where.xindexes.get("prompt")
        if index is not None and other is not None and (type(index) is not type(other) or not index.equals(other)):
            raise InvalidArgumentError("where is over other rows, or another order of them: make it from the same selection")
    # A bare mask is taken as it is: it is computed from the view, not kept in the order of some call.
    mask = np.asarray(where)
    if mask.dtype != bool or mask.shape != (source.n_rows,):
        raise InvalidArgumentError(f"where has dtype {mask.dtype} and shape {mask.shape}: give {source.n_rows} truth values, one per row")
    return mask


@dataclass(frozen=True, slots=True, eq=False)
class LabelColumn:
    """One label per row: ``values[codes]``, or ``values`` itself."""

    values: Array
    codes: Array | None = None

    def take(self, rows: Ints) -> Array:
        """The labels of some rows."""
        taken: Array = self.values[rows if self.codes is None else self.codes[rows]]
        return taken


def open_label_column(array: xr.DataArray, source: RowSource, name: str) -> LabelColumn:
    """A coordinate along the sample dimension, in memory; ``prompt`` is kept as one label per prompt."""
    if name == "row":
        return LabelColumn(np.arange(source.n_rows))
    index = array.xindexes.get(name)
    if isinstance(index, TokenIndex) and index.dim == source.dim and name in index.names:
        return LabelColumn(index.labels, index.codes) if name == index.names[0] else LabelColumn(index.positions)
    if name not in array.coords or array.coords[name].dims != (source.dim,):
        along = sorted(str(n) for n, c in array.coords.items() if c.dims == (source.dim,))
        raise InvalidArgumentError(f"labels: {name!r} is no coordinate over {source.dim!r} here: give some of {[*along, 'row']}")
    values = np.asarray(array.coords[name].values)
    if values.dtype == object:
        texts, codes = np.unique(np.asarray(list(map(str, values)), str), return_inverse=True)
        return LabelColumn(texts, codes.astype(np.int32))
    return LabelColumn(values)
