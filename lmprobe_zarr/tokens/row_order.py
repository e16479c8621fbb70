"""Whether the rows of some activations are in an order that a list of labels can be in: that of one call, or that of ``prompts=[…]``.

What several calls wrote is shown as the store has it. A list in the order of one of these calls would give prompts each other's labels, so
such rows are marked, by an attribute of the coordinates that says so, and bare lists are refused for them.
"""

from __future__ import annotations

from typing import Any, Final

import xarray as xr

from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["SEVERAL_CALLS", "check_listed", "is_in_known_order", "order_attributes"]

_NAME: Final = "row_order"
#: The attribute of the coordinates of rows that several calls wrote.
SEVERAL_CALLS: Final = {_NAME: "of several calls"}


def is_in_known_order(array: xr.DataArray | xr.Dataset) -> bool:
    """Whether values can be given for the rows of these activations by position alone."""
    return all(array.coords[name].attrs.get(_NAME) is None for name in ("prompt", "prompt_sha256", "text") if name in array.coords)


def order_attributes(array: xr.DataArray | xr.Dataset) -> dict[str, str]:
    """The attributes by which a new coordinate of the same rows carries on whether their order is known."""
    return {} if is_in_known_order(array) else dict(SEVERAL_CALLS)


def check_listed(array: xr.DataArray | xr.Dataset, given: Any, noun: str) -> None:
    """Raise where values are given by position for rows in no known order.

    Parameters
    ----------
    array : DataArray or Dataset
        Whose rows the values are for.
    given : object
        The values; those with a prompt coordinate of their own are not by position.
    noun : str
        What they are called, in the plural.

    Raises
    ------
    InvalidArgumentError
    """
    if is_in_known_order(array) or (isinstance(given, xr.DataArray) and "prompt" in given.coords):
        return
    raise InvalidArgumentError(
        f"{noun} are given as a bare {type(given).__name__}, but several calls have stored or requested these prompts, so nothing says "
        "that the list is in the order of the rows\nname a column, give a mapping, a Series or a DataArray by prompt, or request the rows "
        "in the order of your list: store.dataset(…, prompts=[…])"
    )
