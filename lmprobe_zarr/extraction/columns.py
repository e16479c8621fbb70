"""The caller's own columns, such as labels: checked, aligned with the distinct prompts, and written as annotations of stored prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lmprobe_zarr.batch import Column, Prompts, TokenBatch, align_columns, fit_column, parse_column
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import validate_column_names
from lmprobe_zarr.store.parts import View, kinds_of_column, read_column
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Columns", "annotate", "check_columns", "columns_by_prompt", "fit_columns", "with_columns"]

Columns = Mapping[str, Sequence[Any] | Array] | pd.DataFrame


def check_columns(columns: Columns | None, given: object, prompts: Sequence[Any]) -> dict[str, Column]:
    """Columns that can be stored, one value per given prompt.

    Parameters
    ----------
    columns : mapping or DataFrame, optional
        As the caller gave them.
    given : object
        The prompts as the caller gave them.
    prompts : sequence
        The same as a list.

    Raises
    ------
    InvalidArgumentError
        A name that cannot be stored, or not one value per prompt.
    """
    aligned = align_columns(columns, given, prompts)
    validate_column_names(aligned, new=True)
    checked = {}
    for name, values in aligned.items():
        column = parse_column(name, values)
        if len(column) != len(prompts):
            raise InvalidArgumentError(
                f"coords[{name!r}] has {len(column)} values for {len(prompts)} prompts: give one per prompt, in their order"
            )
        checked[name] = column
    return checked


def fit_columns(columns: Mapping[str, Column], view: View | None) -> dict[str, Column]:
    """Columns as they can be added to those of a group, None where it is new; raises `InvalidArgumentError` for one of another kind."""
    return (
        dict(columns) if view is None else {name: fit_column(name, column, kinds_of_column(view, name)) for name, column in columns.items()}
    )


def columns_by_prompt(columns: Mapping[str, Column], prompts: Prompts) -> dict[str, Column]:
    """Columns with one value per distinct prompt.

    Raises
    ------
    InvalidArgumentError
        A prompt that occurs twice has two different values.
    """
    for name, values in columns.items():
        differs = ~values.equals(values[prompts.first][prompts.row])
        if differs.any():
            i = int(np.argmax(differs))
            first = int(prompts.first[prompts.row[i]])
            raise InvalidArgumentError(
                f"the column {name!r} gives the same prompt two values: {values.show(first)} at number {first}, "
                f"{values.show(i)} at number {i}"
            )
    return {name: values[prompts.first] for name, values in columns.items()}


def with_columns(
    batch: TokenBatch, rows: Mapping[str, int], columns: Mapping[str, Column], *, store_text: bool, more: Mapping[str, Column] | None = None
) -> TokenBatch:
    """A copy of a batch to which the columns of its prompts are added; its texts are left out unless they are stored.

    Parameters
    ----------
    batch : TokenBatch
    rows : mapping of str to int
        Row of each digest in the columns.
    columns : mapping of str to Column
    store_text : bool
    more : mapping of str to Column, optional
        Columns of just these prompts.
    """
    chosen = np.array([rows[digest] for digest in batch.sha256])
    return replace(
        batch,
        prompt_columns={**{name: values[chosen] for name, values in columns.items()}, **(more or {})},
        text=batch.text if store_text else None,
    )


def annotate(store: Store, view: View, rows: Ints, columns: Mapping[str, Column]) -> None:
    """Write columns of stored prompts: the values that are new or differ from the stored ones.

    Parameters
    ----------
    store : Store
    view : View
    rows : ndarray of int, shape (prompt,)
        Rows of the prompts in the view.
    columns : mapping of str to Column, shape (prompt,)
    """
    if not columns:
        return
    known = view.columns("prompts")
    changes: dict[str, tuple[Ints, Column]] = {}
    for name, values in columns.items():
        changed = np.ones(len(rows), bool)
        if name in known:
            changed = ~(view.covers("prompts", name, rows, ())[0] & read_column(view, name, rows).equals(values))
        if changed.any():
            changes[name] = rows[changed], values[changed]
    store.write_columns(view, changes)
