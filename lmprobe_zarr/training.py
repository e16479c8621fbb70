"""What training needs of activations: batches, norms, and the mean and standard deviation of every layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
import xarray as xr

from lmprobe_zarr.epochs import Blocks, Order
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from lmprobe_zarr.rows import BLOCK_BYTES, Source, open_column, open_source, pieces_of, read_all, read_norms, wanted_rows
from lmprobe_zarr.safetensors_file import encode, header_length, parse_header
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.streaming import Batches

__all__ = ["BUFFER_BYTES", "Moments", "norms_of", "open_batches", "statistics_of"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

#: Of the rows that are mixed together; while one buffer is used, the next is read.
BUFFER_BYTES: Final = 256 * 2**20
_ABOUT: Final = "lmprobe_zarr.statistics"


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
        from lmprobe_zarr.torch_streaming import TorchBatches, parse_torch_dtype
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
        kept &= norms <= factor * _median(norms)  # NaN, for what is not wanted or not a number, is not
    blocks = replace(blocks, kept=kept)
    if not blocks.total:
        raise InvalidArgumentError(f"no row has a norm of at most {factor} medians: give a larger max_norm")
    return blocks


def _median(norms: Floats) -> float:
    finite = norms[np.isfinite(norms)]
    return float(np.median(finite)) if len(finite) else float("nan")


# ----------------------------------------------------------------------------------------------------------------- norms


def norms_of(array: xr.DataArray, layer: Any = None) -> xr.DataArray:
    """The norm of every row; see `lmprobe_zarr.accessor.ArrayAccessor.norms`."""
    source = open_source(array, layer)
    blocks = source.blocks()
    values = np.stack([read_norms(source.only(place), blocks) for place in range(len(source.places))]).astype(np.float32)
    rest = [dim for dim in array.dims if dim not in ("layer", source.dim)]
    head = array.isel(dict.fromkeys(rest, 0), drop=True)
    if "layer" in head.dims:
        head = head.isel(layer=source.places[0] if source.single else list(source.places))
    head = head.transpose("layer", source.dim, missing_dims="ignore")
    name = f"{array.name}_norm" if array.name else "norm"
    return xr.DataArray(values[0] if "layer" not in head.dims else values, head.coords, head.dims, name)


# ------------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Number, mean and sum of squared deviations of some rows, in float64.

    Parameters
    ----------
    count : int
    mean, squares : ndarray of float64, shape (hidden,)
    """

    count: int
    mean: Floats
    squares: Floats

    @classmethod
    def of(cls, rows: Floats) -> Moments:
        """Those of rows, shape (row, hidden), at least one."""
        mean = rows.mean(axis=0)
        apart = rows - mean
        return cls(len(rows), mean, np.einsum("ij,ij->j", apart, apart))

    def __add__(self, other: Moments) -> Moments:
        """Those of both together (Chan, Golub and LeVeque 1979, equation 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + apart**2 * (self.count * (other.count / count)))


def statistics_of(
    array: xr.DataArray,
    *,
    layer: Any = None,
    skip_positions: int | Iterable[int] = (),
    where: Any = None,
    missing: str = "raise",
    outlier_factor: float = 10.0,
    keep: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    """Mean, standard deviation and norms of every layer; see `lmprobe_zarr.accessor.ArrayAccessor.statistics`."""
    source = open_source(array, layer)
    if isinstance(outlier_factor, bool) or not isinstance(outlier_factor, int | float | np.number) or not outlier_factor > 0:
        raise InvalidArgumentError(f"outlier_factor={outlier_factor!r}: give a number above 0, in medians of the norms")
    blocks = wanted_rows(array, source, skip_positions=skip_positions, where=where, missing=missing)
    inner = [str(dim) for dim in source.variable.dims if dim not in ("layer", source.dim)]
    key = ""
    if keep is not None:
        if source.stored() is None:
            raise InvalidArgumentError("keep needs activations that are read from a store, for nothing else says when they change")
        wanted = b"" if blocks.kept is None else np.packbits(blocks.kept).tobytes()
        key = hashlib.sha256(f"1 {source.fingerprint()} {float(outlier_factor)!r} ".encode() + wanted).hexdigest()
        kept = _read_kept(keep, key)
        if kept is not None:
            return _as_dataset(kept, source, inner, array.name, outlier_factor)
    found = [_statistics_of_layer(source.only(place), blocks, float(outlier_factor)) for place in range(len(source.places))]
    values = {name: np.stack([np.asarray(one[name]) for one in found]) for name in found[0]}
    if keep is not None:
        _write_kept(keep, key, values)
    return _as_dataset(values, source, inner, array.name, outlier_factor)


def _statistics_of_layer(source: Source, blocks: Blocks, factor: float) -> dict[str, Any]:
    width = int(np.prod(source.row_shape))
    moments = Moments(0, np.zeros(width), np.zeros(width))
    norms = np.empty(blocks.total)
    at = 0
    for rows, values in read_all(source, blocks):
        flat = values[0].reshape(len(rows), -1)
        for some in pieces_of(flat):
            wide = flat[some].astype(np.float64)
            length = np.sqrt(np.einsum("ij,ij->i", wide, wide))
            norms[at : at + len(wide)] = length
            at += len(wide)
            finite = np.isfinite(length)
            wide = wide if finite.all() else wide[finite]
            if len(wide):
                moments += Moments.of(wide)
    norms = norms[np.isfinite(norms)]
    nothing = not moments.count
    median = float("nan") if nothing else float(np.median(norms))
    mean_norm = float("nan") if nothing else float(norms.mean())
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(moments.squares / (moments.count or np.nan))
    return {
        "mean_value": (moments.mean if moments.count else spread).reshape(source.row_shape),
        "std_value": spread.reshape(source.row_shape),
        "mean_norm": mean_norm,
        "median_norm": median,
        "largest_norm": float("nan") if nothing else float(norms.max()),
        "norm_scale": mean_norm / np.sqrt(width),
        "outlier_share": float("nan") if nothing else float((norms > factor * median).mean()),
        "n_rows": np.int64(moments.count),
        "n_not_finite": np.int64(blocks.total - moments.count),
    }


def _as_dataset(values: Mapping[str, Array], source: Source, inner: list[str], name: Any, factor: float) -> xr.Dataset:
    layered = source.labels != (None,)
    data = {n: (("layer", *inner)[: v.ndim], v) for n, v in values.items()}
    found = xr.Dataset(data, attrs={"of": str(name or ""), "outlier_factor": float(factor)})
    found = found.assign_coords(layer=list(source.labels)) if layered else found
    return found.isel(layer=0) if source.single else found


def _place(keep: str | os.PathLike[str]) -> tuple[Any, str]:
    folder, name = os.path.split(os.fspath(keep))
    if not name:
        raise InvalidArgumentError(f"keep={keep!r} is a folder: give the name of a file, such as 'statistics.safetensors'")
    return open_storage(folder or "."), name


def _read_kept(keep: str | os.PathLike[str], key: str) -> dict[str, Array] | None:
    """What a file keeps, where it is whole and of the very same rows; None where it must be made again."""
    storage, name = _place(keep)
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return None
    try:
        header = parse_header(data[: header_length(data)])
        about = json.loads(header.metadata[_ABOUT])
    except (ValueError, KeyError) as error:
        what = f"keep={os.fspath(keep)!r} is something else than kept statistics"
        raise InvalidArgumentError(f"{what}, and stays as it is: give another name") from error
    if about != {"key": key, "crc32c": google_crc32c.value(data[len(header.raw) :])}:
        return None
    arrays = {
        n: np.frombuffer(data[t.start : t.stop], np.dtype(t.dtype).newbyteorder("<")).reshape(t.shape).astype(t.dtype)
        for n, t in header.tensors.items()
    }
    return dict(sorted(arrays.items()))


def _write_kept(keep: str | os.PathLike[str], key: str, values: Mapping[str, Array]) -> None:
    storage, name = _place(keep)
    tensors = {n: (v, v.dtype.name) for n, v in values.items()}
    body = b"".join(encode(tensors)[1:])
    about = {"key": key, "crc32c": google_crc32c.value(body)}
    storage.commit(name, b"".join(encode(tensors, {_ABOUT: json.dumps(about)})), durable=True)
