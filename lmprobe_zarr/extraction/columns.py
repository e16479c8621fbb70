"""The caller's own columns, such as labels: checked, aligned with the distinct prompts, and written as annotations of stored prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmprobe_zarr.batch import Prompts, TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store import Store
from lmprobe_zarr.store.format import validate_column_names
from lmprobe_zarr.store.parts import View, as_column
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["Columns", "annotate", "check_columns", "columns_by_prompt", "with_columns"]

Columns = Mapping[str, Sequence[Any] | Array]


def check_columns(columns: Columns | None, n_prompts: int) -> dict[str, Array]:
    """Columns as arrays that can be stored, one value per given prompt.

    Raises
    ------
    InvalidArgumentError
        A name that cannot be stored, or not one value per prompt.
    """
    validate_column_names(columns or {})
    checked = {}
    for name, values in (columns or {}).items():
        column = as_column(name, values.detach().cpu().numpy() if hasattr(values, "detach") else values)
        if len(column) != n_prompts:
            raise InvalidArgumentError(
                f"coords[{name!r}] has {len(column)} values for {n_prompts} prompts: give one per prompt, in their order"
            )
        checked[name] = column
    return checked


def columns_by_prompt(columns: Mapping[str, Array], prompts: Prompts) -> dict[str, Array]:
    """Columns with one value per distinct prompt.

    Raises
    ------
    InvalidArgumentError
        A prompt that occurs twice has two different values.
    """
    for name, values in columns.items():
        differs = ~_equal(values, values[prompts.first][prompts.row])
        if differs.any():
            i = int(np.argmax(differs))
            first = int(prompts.first[prompts.row[i]])
            raise InvalidArgumentError(
                f"coords[{name!r}] gives the same prompt two values: {values[first]!r} at number {first}, {values[i]!r} at number {i}"
            )
    return {name: values[prompts.first] for name, values in columns.items()}


def with_columns(batch: TokenBatch, rows: Mapping[str, int], columns: Mapping[str, Array], *, store_text: bool) -> TokenBatch:
    """A copy of a batch to which the columns of its prompts are added; its texts are left out unless they are stored.

    Parameters
    ----------
    batch : TokenBatch
    rows : mapping of str to int
        Row of each digest in the columns.
    columns : mapping of str to ndarray
    store_text : bool
    """
    chosen = np.array([rows[digest] for digest in batch.sha256])
    return replace(
        batch,
        prompt_columns={name: values[chosen] for name, values in columns.items()},
        text=batch.text if store_text else None,
    )


def annotate(store: Store, view: View, rows: Ints, columns: Mapping[str, Array]) -> None:
    """Write columns of stored prompts: the values that are new or differ from the stored ones.

    Parameters
    ----------
    store : Store
    view : View
    rows : ndarray of int, shape (prompt,)
        Rows of the prompts in the view.
    columns : mapping of str to ndarray, shape (prompt,)
    """
    if not columns:
        return
    known = view.columns("prompts")
    changes: dict[str, tuple[Ints, list[Any]]] = {}
    for name, values in columns.items():
        changed = np.ones(len(rows), bool)
        if name in known:
            array = view.source("prompts", name, rows, ())
            stored = array.read(np.zeros(1, np.int64), slice(0, len(rows)))[0]
            changed = ~(view.covers("prompts", name, rows, ())[0] & _equal(stored, values))
        if changed.any():
            changes[name] = rows[changed], values[changed].tolist()
    store.write_columns(view, changes)


def _equal(values: Array, others: Array) -> Mask:
    """Where two columns have equal values; NaN equals NaN."""
    return np.asarray((values == others) | ((values != values) & (others != others)), bool)
