"""Columns as they are stored: a user's values checked, and how many texts fit into a chunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import offsets_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.format import TEXT_BYTES
from lmprobe_zarr.typing import Array

__all__ = ["as_column", "storable", "text_rows"]

TEXT_ROWS: Final = 2**16


def text_rows(key: str, values: Array) -> int:
    """How many texts go into one chunk: fewer where they are long."""
    offsets = offsets_of([4 + len(text.encode()) for text in values])
    rows = TEXT_ROWS
    while True:
        starts = np.arange(0, len(values), rows)
        longest = int((offsets[np.minimum(starts + rows, len(values))] - offsets[starts]).max())
        if longest <= TEXT_BYTES:
            return rows
        if rows == 1:
            raise InvalidArgumentError(f"{key} holds a text of {longest} bytes, and {TEXT_BYTES} is the most: leave it out, or shorten it")
        rows //= 2


def as_column(name: str, values: Sequence[Any] | Array) -> Array:
    """A user's per-prompt column as it is stored: int64, float64, bool, or object holding texts.

    Raises
    ------
    InvalidArgumentError
        Values that are neither numbers, truth values nor texts, or several of these at once.
    InvalidTypeError
        No sequence, or one with labels of its own that may be in another order than the prompts.
    """
    if isinstance(values, Mapping | set | frozenset | str | bytes) or not isinstance(values, Iterable):
        raise InvalidTypeError(f"column {name!r} is a {type(values).__name__}: give one value per prompt, in the order of the prompts")
    index: Any = getattr(values, "index", None)  # of a pandas Series, without importing pandas
    if hasattr(values, "iloc") and any(isinstance(key, str) for key in index):
        raise InvalidTypeError(f"column {name!r} is a Series with labels of its own: give .to_numpy() if its order is that of the prompts")
    # item() would make a bare number of a numpy date, so dates stay as they are, and are refused below.
    listed = [item.item() if isinstance(item, np.generic) and item.dtype.kind not in "mM" else item for item in values]
    kinds = {type(item) for item in listed}
    if kinds <= {bool}:
        return np.array(listed, bool)
    if kinds <= {int, float}:
        # Beyond 2**53 a number is rounded wherever other prompts lack the column, because it is a float64 there.
        wide = [item for item in listed if isinstance(item, int) and abs(item) > 2**53]
        if wide:
            raise InvalidArgumentError(f"column {name!r} holds {str(wide[0])[:24]}, too large to be stored exactly: use texts")
        return np.array(listed, np.int64 if kinds <= {int} else np.float64)
    if all(isinstance(item, str) for item in listed):
        return np.array([storable(str(item)) for item in listed], object)
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InvalidArgumentError(f"column {name!r} holds {found}: use numbers only, truth values only, or texts only, none missing")


def storable(text: str) -> str:
    """A text as UTF-8 can hold it: lone surrogates become replacement marks. The digest still tells such texts apart."""
    return text.encode("utf-8", "replace").decode("utf-8")
