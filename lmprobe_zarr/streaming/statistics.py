"""Norms of rows, and the mean and standard deviation of every layer. Writes nothing but the file that ``keep=`` names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import google_crc32c
import numpy as np
import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.interchange import to_interchange
from lmprobe_zarr.safetensors_file import encode, header_length, parse_header
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.streaming.order import Blocks
from lmprobe_zarr.streaming.read_ahead import read_all
from lmprobe_zarr.streaming.rows import wanted_rows
from lmprobe_zarr.streaming.source import RowSource, open_source
from lmprobe_zarr.typing import Array, Floats

__all__ = ["RowMoments", "finite_median", "norms_of", "read_norms", "statistics_of"]
_ABOUT: Final = "lmprobe_zarr.statistics"
#: How many values of rows are kept in memory, to correct the norms about the mean, which is known only after the last row.
_KEPT_VALUES: Final = 2**21


# ----------------------------------------------------------------------------------------------------------------- norms


def norms_of(array: xr.DataArray, layer: Any = None) -> xr.DataArray:
    """The norms of all rows; see `lmprobe_zarr.accessor.ArrayAccessor.norms`."""
    source = open_source(array, layer)
    blocks = source.blocks()
    values = np.stack([read_norms(source.only(place), blocks) for place in range(len(source.places))]).astype(np.float32)
    rest = [dim for dim in array.dims if dim not in ("layer", source.dim)]
    head = array.isel(dict.fromkeys(rest, 0), drop=True)
    if "layer" in head.dims:
        head = head.isel(layer=source.places[0] if source.single else list(source.places))
    head = head.transpose("layer", source.dim, missing_dims="ignore")
    name = f"{array.name}_norm" if array.name else "norm"
    return to_interchange(xr.DataArray(values[0] if "layer" not in head.dims else values, head.coords, head.dims, name))


def read_norms(source: RowSource, blocks: Blocks) -> Floats:
    """The Euclidean norm of every wanted row of one layer, shape (row,); NaN for rows that are not wanted."""
    norms = np.full(source.n_rows, np.nan)
    for rows, values in read_all(source, blocks):
        flat = values[0].reshape(len(rows), -1)
        for some in _cache_sized_slices(flat):
            wide = flat[some].astype(np.float64)
            norms[rows[some]] = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return norms


def _cache_sized_slices(values: Array) -> Iterator[slice]:
    """Slices of a few rows each, small enough as float64 for the processor's cache: 1 MiB."""
    size = max(1, 2**20 // max(1, values.shape[1] * 8))
    return (slice(i, min(i + size, len(values))) for i in range(0, len(values), size))


def finite_median(norms: Floats) -> float:
    """The median of the norms that are finite; NaN without any."""
    finite = norms[np.isfinite(norms)]
    return float(np.median(finite)) if len(finite) else float("nan")


# ------------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, slots=True, eq=False)
class RowMoments:
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
    def of(cls, rows: Floats) -> RowMoments:
        """The moments of at least one row, shape (row, hidden)."""
        mean = rows.mean(axis=0)
        apart = rows - mean
        return cls(len(rows), mean, np.einsum("ij,ij->j", apart, apart))

    def __add__(self, other: RowMoments) -> RowMoments:
        """The moments of both together (Chan, Golub and LeVeque 1979, equation 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        return RowMoments(count, mean, self.squares + other.squares + apart**2 * (self.count * (other.count / count)))


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
            raise InvalidArgumentError("keep needs activations that are read from a store, because only a store tells when they change")
        wanted = b"" if blocks.kept is None else np.packbits(blocks.kept).tobytes()
        key = hashlib.sha256(f"2 {source.fingerprint()} {float(outlier_factor)!r} ".encode() + wanted).hexdigest()
        kept = _read_kept(keep, key)
        if kept is not None:
            return _as_dataset(kept, source, inner, array, outlier_factor)
    by_layer = [_statistics_of_layer(source.only(place), blocks, float(outlier_factor)) for place in range(len(source.places))]
    values = {name: np.stack([np.asarray(layer_values[name]) for layer_values in by_layer]) for name in by_layer[0]}
    if keep is not None:
        _write_kept(keep, key, values)
    return _as_dataset(values, source, inner, array, outlier_factor)


def _statistics_of_layer(source: RowSource, blocks: Blocks, factor: float) -> dict[str, Any]:
    width = int(np.prod(source.row_shape))
    moments = RowMoments(0, np.zeros(width), np.zeros(width))
    norms = np.empty(blocks.total)
    about_mean = _NormsAboutMean(blocks.total, width)
    at = 0
    for rows, values in read_all(source, blocks):
        flat = values[0].reshape(len(rows), -1)
        for some in _cache_sized_slices(flat):
            wide = flat[some].astype(np.float64)
            length = np.sqrt(np.einsum("ij,ij->i", wide, wide))
            norms[at : at + len(wide)] = length
            at += len(wide)
            finite = np.isfinite(length)
            wide = wide if finite.all() else wide[finite]
            if len(wide):
                moments += RowMoments.of(wide)
                about_mean.add(wide, moments.mean)
    norms = norms[np.isfinite(norms)]
    nothing = not moments.count
    median = float("nan") if nothing else float(np.median(norms))
    mean_norm = float("nan") if nothing else float(norms.mean())
    centred = float("nan") if nothing else about_mean.mean(moments.mean)
    with np.errstate(invalid="ignore"):
        spread = np.sqrt(moments.squares / (moments.count or np.nan))
    return {
        "mean_value": (moments.mean if moments.count else spread).reshape(source.row_shape),
        "std_value": spread.reshape(source.row_shape),
        "mean_norm": mean_norm,
        "median_norm": median,
        "largest_norm": float("nan") if nothing else float(norms.max()),
        "norm_scale": centred / np.sqrt(width),
        # Where rows do not vary, there is nothing to scale once their mean is subtracted.
        "without_mean": mean_norm / centred if centred else 1.0,
        "norm_of_mean": float("nan") if nothing else float(np.linalg.norm(moments.mean)),
        "outlier_share": float("nan") if nothing else float((norms > factor * median).mean()),
        "n_rows": np.int64(moments.count),
        "n_not_finite": np.int64(blocks.total - moments.count),
    }


class _NormsAboutMean:
    """The mean norm of rows less their mean, in one pass: norms about the mean so far, and how far these are off for some of the rows.

    Two norms of a row differ by no more than the two means do, so that some of the rows tell the difference well. It is exact where there
    are few enough rows to keep all.
    """

    def __init__(self, n_rows: int, width: int) -> None:
        self._share = max(64, _KEPT_VALUES // max(1, width)) / max(1, n_rows)
        self._rng = np.random.default_rng(0)
        self._sum, self._count = 0.0, 0
        self._kept: list[tuple[Array, Floats]] = []

    def add(self, rows: Floats, mean: Floats) -> None:
        """Count more rows, shape (row, hidden), of which the last are part of this mean."""
        apart = rows - mean
        norms = np.sqrt(np.einsum("ij,ij->i", apart, apart))
        self._sum += float(norms.sum())
        self._count += len(norms)
        some = self._rng.random(len(rows)) < self._share
        if some.any():
            # What was float16 or float32 is kept as float32 without loss.
            narrow = rows[some].astype(np.float32)
            self._kept.append((narrow if (narrow == rows[some]).all() else rows[some], norms[some]))

    def mean(self, mean: Floats) -> float:
        """The mean norm of all rows less this mean."""
        off = [np.linalg.norm(rows - mean, axis=1) - norms for rows, norms in self._kept]
        return max(0.0, self._sum / self._count + (float(np.concatenate(off).mean()) if off else 0.0))


def _as_dataset(values: Mapping[str, Array], source: RowSource, inner: list[str], array: xr.DataArray, factor: float) -> xr.Dataset:
    layered = source.labels != (None,)
    # What they are of goes with each variable, since batches compare it.
    of = {"of": str(array.name or "")}
    if "model" in array.coords and array.coords["model"].ndim == 0:
        of["model"] = str(array.coords["model"].item())
    data = {n: (("layer", *inner)[: v.ndim], v, of) for n, v in values.items()}
    found = xr.Dataset(data, attrs={**of, "outlier_factor": float(factor)})
    found = found.set_coords(["without_mean", "norm_of_mean"])
    found = found.assign_coords(layer=list(source.labels)) if layered else found
    return to_interchange(found.isel(layer=0) if source.single else found)


def _place(keep: str | os.PathLike[str]) -> tuple[Any, str]:
    folder, name = os.path.split(os.fspath(keep))
    if not name:
        raise InvalidArgumentError(f"keep={keep!r} is a folder: give the name of a file, such as 'statistics.safetensors'")
    return open_storage(folder or "."), name


def _read_kept(keep: str | os.PathLike[str], key: str) -> dict[str, Array] | None:
    """The statistics in a file, if it is whole and describes the same rows; None if they must be computed again."""
    storage, name = _place(keep)
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return None
    try:
        header = parse_header(data[: header_length(data)])
        about = json.loads(header.metadata[_ABOUT])
    except (ValueError, KeyError) as error:
        what = f"keep={os.fspath(keep)!r} holds no kept statistics"
        raise InvalidArgumentError(f"{what} and is left as it is: give another name") from error
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
