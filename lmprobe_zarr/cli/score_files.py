"""Scores of a sweep that were saved, for the commands that draw them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmprobe_zarr.errors import InvalidArgumentError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["open_scores"]


def open_scores(place: str) -> xr.Dataset:
    """What ``sweep --out``, ``to_zarr`` or ``to_netcdf`` wrote, by what is stored and not by its name."""
    import xarray

    try:
        if Path(place).is_file():
            with xarray.open_dataset(place) as opened:
                return opened.load()
        with _open_zarr(place) as opened:
            return opened.load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InvalidArgumentError(
            f"--scores {place!r} cannot be opened ({why}): give what sweep --out, scores.to_zarr(…) or to_netcdf(…) wrote"
        ) from error


def _open_zarr(place: str) -> xr.Dataset:
    import xarray

    try:
        # By default xarray looks for consolidated metadata first, and warns if there are none. Places that cannot be listed need them.
        opened: xr.Dataset = xarray.open_zarr(place, consolidated=True)
    except (OSError, ValueError, KeyError):
        opened = xarray.open_zarr(place, consolidated=False)
    return opened
