"""Columns that bring an index along (of pandas, xarray) put into the order of the prompts that they are given with. Checks no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lmprobe_zarr.batch.given import shorten
from lmprobe_zarr.batch.prompts import prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["align_columns", "columns_by_key"]


def align_columns(columns: object, given: object, prompts: Sequence[Any], *, what: str = "coords") -> dict[Any, Any]:
    """Columns by name, with one value per prompt in the order of the prompts wherever a column's own index says what that is.

    Parameters
    ----------
    columns : mapping or pandas.DataFrame, or None
        Names to columns.
    given : object
        The prompts as the caller gave them: where they are a Series, columns with the same index are matched by it.
    prompts : sequence
        The prompts as a list.
    what : str
        Name of the argument, for messages.

    Returns
    -------
    dict of str to sequence
        Columns without an index are as they were.

    Raises
    ------
    InvalidTypeError
        `columns` is no mapping and no frame, or the index of a column is not that of the prompts.
    InvalidArgumentError
        An index lacks a prompt, or holds it twice.
    """
    if columns is None:
        return {}
    if isinstance(columns, pd.DataFrame):
        _check_names(columns, what)
        columns = {name: columns[name] for name in columns.columns}
    if not isinstance(columns, Mapping):
        raise InvalidTypeError(f"{what} is a {type(columns).__name__}: give {{column: one value per prompt}}, or a pandas DataFrame")
    own = given.index if isinstance(given, pd.Series) else None
    return {name: _aligned(str(name), values, own, prompts) for name, values in columns.items()}


def _check_names(frame: pd.DataFrame, what: str) -> None:
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InvalidArgumentError(f"{what} is a DataFrame that has the column {twice!r} twice: rename one of them")


def _aligned(name: str, values: Any, own: pd.Index[Any] | None, prompts: Sequence[Any]) -> Any:
    if hasattr(values, "dims") and hasattr(values, "to_index") and "prompt" in getattr(values, "coords", ()):
        index: Any = pd.Index(np.asarray(values.coords["prompt"].values, object))
        values = values.values
    elif isinstance(values, pd.Series):
        index = values.index
        if own is not None and (index is own or index.equals(own)):
            return values.array
        if isinstance(index, pd.RangeIndex) and index.start == 0 and index.step == 1:
            return values.array
        if own is not None and index.is_unique and own.is_unique and not len(own.difference(index)):
            return values.loc[own].array
        if pd.api.types.is_integer_dtype(index.dtype) and index.is_monotonic_increasing and index.is_unique and own is None:
            return values.array  # rows of a frame that was filtered, in their old order
        values = values.array
    else:
        return values
    if not all(isinstance(key, str) for key in index):
        raise InvalidTypeError(
            f"column {name!r} is a Series whose index is neither the prompts nor that of a Series of prompts: set the "
            "prompts as its index, frame.set_index('text')['label'], or give .to_numpy() if its order is that of the prompts"
        )
    return values.take(_rows(name, index, prompts)) if len(prompts) else values[:0]


def _rows(name: str, index: pd.Index[Any], prompts: Sequence[Any]) -> np.ndarray[Any, Any]:
    """The row of an index of texts or hashes that holds each prompt."""
    place: dict[str, int] = {}
    twice: set[str] = set()
    for row, key in enumerate(index):
        if place.setdefault(str.__str__(key), row) != row:
            twice.add(key)
    rows = np.zeros(len(prompts), np.int64)
    for number, prompt in enumerate(prompts):
        key = prompt if isinstance(prompt, str) else ""
        if key not in place:
            try:
                key = prompt_hash(prompt)
            except InvalidTypeError as error:
                raise InvalidTypeError(
                    f"column {name!r} is a Series with an index of its own, and prompts[{number}] is a chat: {error}"
                ) from error
        if key not in place:
            shown = shorten(prompt) if isinstance(prompt, str) else key
            raise InvalidArgumentError(
                f"column {name!r} is a Series with prompts as its index, and prompts[{number}], {shown}, is not in it: add it "
                "(.reindex(prompts) gives missing values), or give .to_numpy() if its order is that of the prompts"
            )
        if key in twice:
            raise InvalidArgumentError(
                f"column {name!r} is a Series whose index holds prompts[{number}] twice: .groupby(level=0).first() keeps one"
            )
        rows[number] = place[key]
    return rows


def columns_by_key(columns: object) -> Any:
    """Columns as ``{column: {text or hash: value}}``, where they are given as frames, Series or arrays whose index is the prompts.

    Raises
    ------
    InvalidTypeError
        An index that is not one of texts or hashes.
    InvalidArgumentError
        A name or a prompt twice.
    """
    if isinstance(columns, pd.DataFrame):
        _check_names(columns, "columns")
        columns = {name: columns[name] for name in columns.columns}
    if not isinstance(columns, Mapping):
        return columns
    return {name: _Keyed.of(str(name), values) for name, values in columns.items()}


class _Keyed(dict[Any, Any]):
    """Values by prompt that are also kept as they were, with their dtype: a Categorical's values alone do not say its categories."""

    column: Any = None

    @classmethod
    def of(cls, name: str, values: Any) -> Any:
        if hasattr(values, "dims") and "prompt" in getattr(values, "coords", ()):
            values = pd.Series(values.values, index=pd.Index(np.asarray(values.coords["prompt"].values, object)))
        if not isinstance(values, pd.Series):
            return values
        if not all(isinstance(key, str) for key in values.index):
            raise InvalidTypeError(
                f"column {name!r} is a Series whose index is not the prompts: set their texts or hashes as its index, "
                "frame.set_index('text')"
            )
        if not values.index.is_unique:
            twice = values.index[values.index.duplicated()][0]
            raise InvalidArgumentError(f"column {name!r} holds the prompt {shorten(str(twice))} twice: .groupby(level=0).first() keeps one")
        keyed = cls(zip(values.index, values.array, strict=True))
        keyed.column = values.array
        return keyed
