"""The options of ``.lz.batches``, checked, and the `Batches` that they make. Reads rows only where ``max_norm`` needs their norms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import check_flag, check_word, list_names
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.streaming.batches import Batches
from lmprobe_zarr.streaming.order import Blocks, Order
from lmprobe_zarr.streaming.rows import open_label_column, wanted_rows
from lmprobe_zarr.streaming.source import UNCHUNKED_BLOCK_BYTES, RowSource, open_source, stored_dtype
from lmprobe_zarr.streaming.statistics import finite_median, read_norms
from lmprobe_zarr.typing import Array

__all__ = ["BUFFER_BYTES", "BatchOptions", "open_batches"]

#: Bytes of the rows that are mixed together. The next buffer is read while one is used.
BUFFER_BYTES: Final = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """The options of `lmprobe_zarr.accessor.ArrayAccessor.batches`, which documents them and has their defaults.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        `framework` or `epochs` cannot be used. The others are checked where they are used.
    """

    layer: int | Iterable[int] | None
    batch_tokens: int
    shuffle: bool
    seed: int
    epochs: int | None
    drop_last: bool
    buffer_tokens: int | None
    rank: int
    world_size: int
    start_step: int
    skip_positions: int | Iterable[int]
    max_norm: float | None
    where: Any
    missing: str
    labels: str | Iterable[str] | None
    mean: Any
    scale: Any
    dtype: Any
    framework: str
    prefetch: bool

    def __post_init__(self) -> None:
        check_word("framework", self.framework, ("numpy", "torch"))
        for option in ("shuffle", "drop_last", "prefetch"):
            check_flag(option, getattr(self, option))
        if self.epochs is not None and (isinstance(self.epochs, bool) or not isinstance(self.epochs, int | np.integer)):
            raise InvalidTypeError(f"epochs={self.epochs!r} is no whole number: give one, or None to go on for ever")
        if self.epochs is not None and self.epochs < 1:
            raise InvalidArgumentError(f"epochs={self.epochs!r} is out of range: give at least 1, or None to go on for ever")

    def order(self, row_nbytes: int) -> Order:
        """The order of rows of so many bytes."""
        size = max(1, BUFFER_BYTES // row_nbytes) if self.buffer_tokens is None else self.buffer_tokens
        return Order(self.batch_tokens, size, bool(self.shuffle), self.seed, bool(self.drop_last), self.rank, self.world_size)


def open_batches(array: xr.DataArray, options: BatchOptions) -> Batches:
    """Batches of an array's rows; see `lmprobe_zarr.accessor.ArrayAccessor.batches`."""
    source = open_source(array, options.layer)
    order = options.order(source.row_nbytes)
    blocks = wanted_rows(array, source, skip_positions=options.skip_positions, where=options.where, missing=options.missing)
    if options.max_norm is not None:
        blocks = _below_norm(source, blocks, options.max_norm)
    if not options.shuffle and blocks.rows is not None and (np.diff(blocks.rows) < 0).any():
        blocks = _in_order(source, blocks)
    names = None if options.labels is None else list_names("labels", options.labels, "prompt")
    labels = None if names is None else {name: open_label_column(array, source, name) for name in names}
    # Values that were loaded as float32 come as those that are read from the store.
    values = np.dtype(np.float16 if options.dtype is None and stored_dtype(source.variable) == "float16" else source.variable.dtype)
    if options.mean is not None or options.scale is not None:
        values = np.result_type(values, np.float32)
    mean = _parse_shift("mean", options.mean, source, array)
    scale = _for_mean(options.scale, mean, source)
    kind: type[Batches] = Batches
    dtype: Any = None
    if options.framework == "torch":
        kind, dtype = _torch(options.dtype, values)
    else:
        dtype = _parse_dtype(options.dtype, values)
    return kind(
        source,
        blocks,
        order,
        epochs=options.epochs,
        labels=labels,
        dtype=dtype,
        mean=mean,
        scale=_parse_shift("scale", scale, source, array),
        prefetch=options.prefetch,
        start_step=options.start_step,
    )


def _in_order(source: RowSource, blocks: Blocks) -> Blocks:
    """The same rows in the order of the data, where their chunks have another."""
    size = max(1, UNCHUNKED_BLOCK_BYTES * len(source.places) // source.row_nbytes)
    rows = np.sort(blocks.rows if blocks.rows is not None else np.arange(blocks.offsets[-1]))
    return Blocks(np.append(np.arange(0, len(rows), size), len(rows)), rows, blocks.kept)


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
        parsed: np.dtype[Any] | None = np.dtype(dtype)
    except TypeError:
        parsed = None
    # numpy knows the name bfloat16 only where ml_dtypes has been imported, so the message must not depend on that.
    if parsed is None or parsed.name == "bfloat16":
        raise InvalidArgumentError(
            f"dtype={dtype!r}: give float16, float32 or float64; torch's, bfloat16 among them, come with framework='torch'"
        )
    if parsed.name not in {"float16", "float32", "float64"}:
        raise InvalidArgumentError(f"dtype={dtype!r}: give float16, float32 or float64")
    return parsed


def _for_mean(scale: Any, mean: Array | None, source: RowSource) -> Any:
    """The scale for rows less `mean`: ``norm_scale`` is measured about the mean, and brings the factor for rows as they are.

    Raises
    ------
    InvalidArgumentError
        The mean is another than the scale was measured about.
    """
    if not isinstance(scale, xr.DataArray) or scale.name != "norm_scale" or not {"without_mean", "norm_of_mean"} <= set(scale.coords):
        return scale
    if mean is None:
        return (scale * scale.coords["without_mean"]).assign_attrs(scale.attrs)
    scale = _check_layer("scale", scale, source)
    known = scale.coords["norm_of_mean"]
    whole = np.broadcast_to(mean[:, 0], (len(mean), *source.row_shape)).reshape(len(mean), -1)
    given = np.linalg.norm(whole.astype(np.float64), axis=1)
    # The mean may have been rounded to float16 in between.
    if not np.allclose(given, known.values, rtol=0.01, atol=0.01 * float(np.min(scale.values))):
        raise InvalidArgumentError(
            f"scale is norm_scale of statistics, measured about their mean_value of norm {np.asarray(known.values).tolist()}, and mean has "
            f"norm {given.tolist()}: give mean=stats.mean_value of the same statistics, or a number as scale"
        )
    return scale


def _check_layer(name: str, given: xr.DataArray, source: RowSource) -> xr.DataArray:
    """The values of the layers of the batches, in their order; values that name no layer apply to all.

    Raises
    ------
    InvalidArgumentError
        They are of other layers.
    """
    if "layer" not in given.coords:
        if "layer" in given.dims and source.labels != (None,):
            raise InvalidArgumentError(f"{name} has a dimension layer without labels, and batches are of {list(source.labels)}: label them")
        return given
    known = np.atleast_1d(given.coords["layer"].values).tolist()
    if source.labels == (None,) and len(known) == 1:
        return given.isel(layer=0) if "layer" in given.dims else given
    missing = [label for label in source.labels if label not in known]
    if missing:
        raise InvalidArgumentError(
            f"{name} is of layers {known}, and lacks some of the layers {list(source.labels)}: make it for all of them, {missing} too"
        )
    return given.sel(layer=list(source.labels)) if "layer" in given.dims else given


def _parse_shift(name: str, given: Any, source: RowSource, array: xr.DataArray) -> Array | None:
    """The mean or scale in float32 at least, shape (layer, 1, …) or (1, 1, …), to broadcast with (layer, row, …)."""
    if given is None:
        return None
    if isinstance(given, xr.Dataset):
        raise InvalidTypeError(f"{name} is a Dataset with {', '.join(map(str, given.data_vars))}: give one of them, as in stats.mean_value")
    if isinstance(given, xr.DataArray):
        _check_origin(name, given, array)
        given = _check_layer(name, given, source)
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


def _check_origin(name: str, given: xr.DataArray, array: xr.DataArray) -> None:
    """Raise where statistics are of another variable or model than the batches."""
    model = array.coords["model"].item() if "model" in array.coords and array.coords["model"].ndim == 0 else ""
    for what, mine in (("of", array.name or ""), ("model", model)):
        theirs = str(given.attrs.get(what, ""))
        if theirs and str(mine) and theirs != str(mine):
            of = "variable" if what == "of" else "model"
            raise InvalidArgumentError(
                f"{name} is of {of} {theirs!r}, and the batches are of {str(mine)!r}: make statistics of the same {of}"
            )


def _below_norm(source: RowSource, blocks: Blocks, factor: float) -> Blocks:
    """The rows whose norm is at most `factor` times the median in every layer."""
    if isinstance(factor, bool) or not isinstance(factor, int | float | np.number) or not factor > 0:
        raise InvalidArgumentError(f"max_norm={factor!r}: give a number above 0, in medians of the layer's norms, such as 10")
    kept = np.ones(source.n_rows, bool)
    for place in range(len(source.places)):
        norms = read_norms(source.only(place), blocks)
        kept &= norms <= factor * finite_median(norms)  # False for NaN: rows that are not wanted or not finite
    blocks = replace(blocks, kept=kept)
    if not blocks.total:
        raise InvalidArgumentError(f"no row has a norm of at most {factor} medians: give a larger max_norm")
    return blocks
