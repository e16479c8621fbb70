"""What training needs of activations: batches, norms, and the mean and standard deviation of every layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.streaming.batches import Batches
from lmprobe_zarr.streaming.order import Blocks, Order
from lmprobe_zarr.streaming.rows import BLOCK_BYTES, Source, open_column, open_source, read_norms, wanted_rows
from lmprobe_zarr.streaming.statistics import finite_median
from lmprobe_zarr.typing import Array

__all__ = ["BUFFER_BYTES", "open_batches"]

#: Of the rows that are mixed together; while one buffer is used, the next is read.
BUFFER_BYTES: Final = 256 * 2**20


def open_batches(
    array: xr.DataArray,
    *,
    layer: Any = None,
    batch_tokens: int = 4096,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    drop_last: bool = False,
    buffer_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    skip_positions: int | Iterable[int] = (),
    max_norm: float | None = None,
    where: Any = None,
    missing: str = "raise",
    labels: str | Iterable[str] | None = None,
    mean: Any = None,
    scale: Any = None,
    dtype: Any = None,
    framework: str = "numpy",
    prefetch: bool = True,
) -> Batches:
    """Batches of an array's rows; see `lmprobe_zarr.accessor.ArrayAccessor.batches`."""
    if framework not in {"numpy", "torch"}:
        raise InvalidArgumentError(f'framework={framework!r}: give "numpy" or "torch"')
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int | np.integer)):
        raise InvalidTypeError(f"epochs={epochs!r} is no whole number: give one, or None to go on for ever")
    if epochs is not None and epochs < 1:
        raise InvalidArgumentError(f"epochs={epochs!r} is out of range: give at least 1, or None to go on for ever")
    source = open_source(array, layer)
    if buffer_tokens is None:
        buffer_tokens = max(1, BUFFER_BYTES // source.row_nbytes)
    order = Order(batch_tokens, buffer_tokens, bool(shuffle), seed, bool(drop_last), rank, world_size)
    blocks = wanted_rows(array, source, skip_positions=skip_positions, where=where, missing=missing)
    if max_norm is not None:
        blocks = _below_norm(source, blocks, max_norm)
    if not shuffle and blocks.rows is not None and (np.diff(blocks.rows) < 0).any():
        # In the order of the data, even where their chunks lie otherwise.
        size = max(1, BLOCK_BYTES * len(source.places) // source.row_nbytes)
        rows = np.sort(blocks.rows)
        blocks = Blocks(np.append(np.arange(0, len(rows), size), len(rows)), rows, blocks.kept)
    names = [labels] if isinstance(labels, str) else labels
    columns = None if names is None else {name: open_column(array, source, name) for name in names}
    values = np.dtype(source.variable.dtype)
    if mean is not None or scale is not None:
        values = np.result_type(values, np.float32)
    kind: type[Batches] = Batches
    if framework == "torch":
        kind, dtype = _torch(dtype, values)
    else:
        dtype = _parse_dtype(dtype, values)
    return kind(
        source,
        blocks,
        order,
        epochs=epochs,
        labels=columns,
        dtype=dtype,
        mean=_parse_shift("mean", mean, source),
        scale=_parse_shift("scale", scale, source),
        prefetch=prefetch,
        start_step=start_step,
    )


def _torch(dtype: Any, values: np.dtype[Any]) -> tuple[type[Batches], Any]:
    try:
        from lmprobe_zarr.streaming.torch import TorchBatches, parse_torch_dtype
    except ImportError as error:
        raise MissingDependencyError('framework="torch" needs torch: pip install "lmprobe-zarr[models]"') from error
    return TorchBatches, parse_torch_dtype(dtype, values)


def _parse_dtype(dtype: Any, values: np.dtype[Any]) -> np.dtype[Any]:
    if dtype is None:
        return values
    try:
        parsed: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise InvalidArgumentError(
            f"dtype={dtype!r}: give float16, float32 or float64; torch's, bfloat16 among them, come with framework='torch'"
        ) from error
    if parsed.name not in {"float16", "float32", "float64"}:
        raise InvalidArgumentError(f"dtype={dtype!r}: give float16, float32 or float64")
    return parsed


def _parse_shift(name: str, given: Any, source: Source) -> Array | None:
    """What is subtracted or divided by, in float32, shape (layer, 1, …) or (1, …) to broadcast with (layer, row, …)."""
    if given is None:
        return None
    if isinstance(given, xr.DataArray):
        if "layer" in given.dims:
            if "layer" not in given.coords or not set(source.labels) <= set(given.coords["layer"].values.tolist()):
                raise InvalidArgumentError(f"{name} lacks some of the layers {list(source.labels)}: make it for all of them")
            given = given.sel(layer=list(source.labels))
        others = [dim for dim in source.variable.dims if dim not in ("layer", source.dim)]
        if not set(given.dims) <= {"layer", *others}:
            raise InvalidArgumentError(f"{name} has dims {given.dims}: give some of {('layer', *others)}")
        for dim in ["layer", *others]:
            given = given if dim in given.dims else given.expand_dims(dim)
        values = np.asarray(given.transpose("layer", *others).values)
    else:
        values = np.asarray(given)
        values = values.reshape(1, *values.shape) if values.ndim <= len(source.row_shape) else values
    full = (len(source.places), *source.row_shape)
    if values.dtype.kind not in "fiu":
        raise InvalidTypeError(f"{name} is a {type(given).__name__}: give numbers that broadcast to (layer, hidden) = {full}")
    try:
        np.broadcast_to(values, full)
    except ValueError:
        raise InvalidArgumentError(f"{name} has shape {values.shape}: give numbers that broadcast to (layer, hidden) = {full}") from None
    if not np.isfinite(values).all() or (name == "scale" and (values <= 0).any()):
        range_ = "finite" if name == "mean" else "finite and above 0"
        raise InvalidArgumentError(f"{name} holds values that are not {range_}: see statistics()")
    return np.expand_dims(values.astype(np.result_type(source.variable.dtype, np.float32)), 1)


def _below_norm(source: Source, blocks: Blocks, factor: float) -> Blocks:
    """The rows whose norm is at most so many times the median, in every layer."""
    if isinstance(factor, bool) or not isinstance(factor, int | float | np.number) or not factor > 0:
        raise InvalidArgumentError(f"max_norm={factor!r}: give a number above 0, in medians of the layer's norms, such as 10")
    kept = np.ones(source.n_rows, bool)
    for place in range(len(source.places)):
        norms = read_norms(source.only(place), blocks)
        kept &= norms <= factor * finite_median(norms)  # NaN, for what is not wanted or not a number, is not
    blocks = replace(blocks, kept=kept)
    if not blocks.total:
        raise InvalidArgumentError(f"no row has a norm of at most {factor} medians: give a larger max_norm")
    return blocks
