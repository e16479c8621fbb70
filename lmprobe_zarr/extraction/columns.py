"""TODO: lmprobe_zarr/extraction/columns.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.extraction.models import Prompts
from lmprobe_zarr.store import Store
from lmprobe_zarr.typing import Array, Ints

if TYPE_CHECKING:
    pass


def columns_by_prompt(columns: Mapping[str, Array], prompts: Prompts) -> dict[str, Array]:
    """One value per different prompt; a prompt that occurs twice must have the same value twice."""
    for name, values in columns.items():
        expected = values[prompts.first][prompts.row]
        same = (values == expected) | ((values != values) & (expected != expected))  # NaN equals NaN here
        if not np.all(same):
            i = int(np.argmin(same))
            first = int(prompts.first[prompts.row[i]])
            raise InvalidArgumentError(
                f"coords[{name!r}] gives the same prompt two values: {values[first]!r} at number {first}, {values[i]!r} at number {i}"
            )
    return {name: values[prompts.first] for name, values in columns.items()}


# --------------------------------------------------------------------------------------------------------------- writing


def with_columns(batch: TokenBatch, rows: Mapping[str, int], columns: Mapping[str, Array], store_text: bool) -> TokenBatch:
    chosen = np.array([rows[digest] for digest in batch.sha256])
    return replace(
        batch,
        prompt_columns={name: values[chosen] for name, values in columns.items()},
        text=batch.text if store_text else None,
    )


def annotate_found(store: Store, looked: Lookup, missing: Ints, columns: Mapping[str, Array]) -> None:
    """Write the columns of prompts that are stored already, where they are new or differ."""
    if not columns or looked.view is None:
        return
    view = looked.view
    found = np.setdiff1d(np.arange(len(looked.prompts)), missing)
    rows = view.find([looked.prompts.sha256[i] for i in found])
    known = view.columns("prompts")
    changes: dict[str, tuple[Ints, list[Any]]] = {}
    for name, values in columns.items():
        wanted = values[found]
        changed = np.ones(len(found), bool)
        if name in known:
            array = view.source("prompts", name, rows, ())
            stored = array.read(np.zeros(1, np.int64), slice(0, len(rows)))[0]
            there = view.covers("prompts", name, rows, ())[0]
            alike = (stored == wanted) | ((stored != stored) & (wanted != wanted))  # NaN equals NaN here too
            changed = ~(there & np.asarray(alike, bool))
        if changed.any():
            changes[name] = rows[changed], wanted[changed].tolist()
    store.write_columns(view, changes)
