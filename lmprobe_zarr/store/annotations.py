"""Columns that a user adds to stored prompts, as the batches of annotations. Writes nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmprobe_zarr.batch import Column, TokenBatch, columns_by_key, fit_column, parse_column
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.format import validate_column_names
from lmprobe_zarr.store.parts import View, kinds_of_column
from lmprobe_zarr.typing import Ints

__all__ = ["annotation_batches", "check_columns", "find_rows", "fit_batch"]


def check_columns(columns: object) -> Mapping[str, Mapping[Any, Any]]:
    """Columns as ``{column: {text or hash: value}}``; raises where they are not given so, or a name cannot be stored."""
    by_key = columns_by_key(columns)
    for name, values in by_key.items() if isinstance(by_key, Mapping) else [("columns", by_key)]:
        if not isinstance(values, Mapping):
            raise InvalidTypeError(
                f"{name!r} is a {type(values).__name__}: give {{column: {{text or hash: value}}}}, or a DataFrame with prompts as its index"
            )
    validate_column_names(by_key, new=True)
    return dict(by_key)


def find_rows(view: View, columns: Mapping[str, Mapping[Any, Any]]) -> dict[str, tuple[Ints, Any]]:
    """For each column the prompts of the view that have a value, and their values.

    Raises
    ------
    MissingPromptsError
        A prompt is not in the view.
    InvalidArgumentError
        A column has no values, or has two for one prompt.
    """
    found: dict[str, tuple[Ints, Any]] = {}
    for name, values in columns.items():
        if not values:
            raise InvalidArgumentError(f"column {name!r} has no values: give {{text or hash: value}}")
        rows = view.select(list(values))
        if len(set(rows.tolist())) != len(rows):
            raise InvalidArgumentError(f"column {name!r} names a prompt twice, by its text and by its hash")
        whole = getattr(values, "column", None)  # what a Series held, with its dtype
        found[name] = rows, list(values.values()) if whole is None else whole
    return found


def fit_batch(view: View, batch: TokenBatch) -> TokenBatch:
    """A batch whose columns are as they can be added to those of a group; raises `InvalidArgumentError` for one of another kind."""
    fitted = {n: fit_column(n, parse_column(n, values), kinds_of_column(view, n)) for n, values in batch.prompt_columns.items()}
    return replace(batch, prompt_columns=fitted) if fitted else batch


def annotation_batches(view: View, columns: Mapping[str, tuple[Ints, Sequence[Any] | Column]]) -> list[TokenBatch]:
    """Columns as batches without activations, one for all columns of the same prompts.

    Parameters
    ----------
    view : View
        The group as it is.
    columns : mapping of str to (ndarray of int, sequence)
        For each column the prompts of the view, none twice, and their values.
    """
    together: dict[tuple[int, ...], dict[str, Column]] = {}
    for name, (rows, values) in columns.items():
        order = np.argsort(rows, kind="stable")
        column = fit_column(name, parse_column(name, values), kinds_of_column(view, name))[order]
        together.setdefault(tuple(rows[order].tolist()), {})[name] = column
    return [
        TokenBatch(sha256=[view.digests[row].tobytes().hex() for row in rows], prompt_columns=named) for rows, named in together.items()
    ]
