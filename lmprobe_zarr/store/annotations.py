"""Columns that a user adds to stored prompts, as the batches of annotations. Writes nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.format import validate_column_names
from lmprobe_zarr.store.parts import View, as_column
from lmprobe_zarr.typing import Array, Ints

__all__ = ["annotation_batches", "check_columns", "find_rows"]


def check_columns(columns: Mapping[str, Mapping[Any, Any]]) -> None:
    """Raise where columns are not given as ``{column: {text or hash: value}}``, or a name cannot be stored."""
    for name, values in columns.items() if isinstance(columns, Mapping) else [("columns", columns)]:
        if not isinstance(values, Mapping):
            raise InvalidTypeError(f"{name!r} is a {type(values).__name__}: give {{column: {{text or hash: value}}}}")
    validate_column_names(columns)


def find_rows(view: View, columns: Mapping[str, Mapping[Any, Any]]) -> dict[str, tuple[Ints, list[Any]]]:
    """For each column the prompts of the view that have a value, and their values.

    Raises
    ------
    MissingPromptsError
        A prompt is not in the view.
    InvalidArgumentError
        A column has no values, or has two for one prompt.
    """
    found: dict[str, tuple[Ints, list[Any]]] = {}
    for name, values in columns.items():
        if not values:
            raise InvalidArgumentError(f"column {name!r} has no values: give {{text or hash: value}}")
        rows = view.select(list(values))
        if len(set(rows.tolist())) != len(rows):
            raise InvalidArgumentError(f"column {name!r} names a prompt twice, by its text and by its hash")
        found[name] = rows, list(values.values())
    return found


def annotation_batches(view: View, columns: Mapping[str, tuple[Ints, Sequence[Any]]]) -> list[TokenBatch]:
    """Columns as batches without activations, one for all columns of the same prompts.

    Parameters
    ----------
    view : View
        The group as it is.
    columns : mapping of str to (ndarray of int, sequence)
        For each column the prompts of the view, none twice, and their values.
    """
    together: dict[tuple[int, ...], dict[str, Array]] = {}
    for name, (rows, values) in columns.items():
        order = np.argsort(rows, kind="stable")
        column = as_column(name, values)[order]
        together.setdefault(tuple(rows[order].tolist()), {})[name] = column
    return [
        TokenBatch(sha256=[view.digests[row].tobytes().hex() for row in rows], prompt_columns=named) for rows, named in together.items()
    ]
