"""Stored values, read back as batches for a writer: some prompts at a time, with nothing lost. Never writes."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch import Column, ColumnKind, TokenBatch, parse_column
from lmprobe_zarr.store.format import LEVELS, MADE_BY_WRITER, PROMPT_COLUMNS, SITE_ATTRIBUTES, ArrayInfo, Level
from lmprobe_zarr.store.parts.columns import column_of, kind_of, merged_kind
from lmprobe_zarr.store.parts.roles import RoleArray, has_role_names
from lmprobe_zarr.store.parts.view import View
from lmprobe_zarr.typing import Array, Ints

__all__ = ["BLOCK_BYTES", "blocks_of", "kinds_of_column", "read_batches", "read_column", "read_values"]

BLOCK_BYTES: Final = 64 * 2**20


def read_values(view: View, level: Level, name: str, rows: Ints, layers: tuple[int, ...], *, note: bool = False) -> Array:
    """One variable of some prompts in memory: (layer, row, …), or (row, …) where it has no layers; a row is a prompt or a token.

    With `note`, this counts as a use of the parts.
    """
    lengths = view.token_counts()[rows] if level == "tokens" else None
    array = view.source(level, name, rows, layers, lengths)
    at = np.arange(1 if array.layers is None else len(layers))
    values = array.read(at, slice(0, array.n_rows), note=note)
    return values[0] if array.layers is None else values


def kinds_of_column(view: View, name: str) -> list[ColumnKind]:
    """The kind of a column in each part that holds it, in their order; usually all are equal."""
    return [kind_of(info) for info in view.column_parts(name)]


def read_column(view: View, name: str, rows: Ints) -> Column:
    """A column of the user's of some prompts in memory; prompts that no part has it of are missing in it.

    Raises
    ------
    InvalidArgumentError
        Its parts hold values of several kinds.
    """
    values = read_values(view, "prompts", name, rows, ())
    column = column_of(values, merged_kind(view.column_parts(name)))
    return parse_column(name, values) if column is None else column


def blocks_of(weights: Array, most: int = BLOCK_BYTES) -> Iterator[slice]:
    """Runs of neighbours that together weigh at most `most`; a neighbour that alone weighs more is a run of its own."""
    start, held = 0, 0.0
    for i, weight in enumerate(np.asarray(weights, float).tolist()):
        if i > start and held + weight > most:
            yield slice(start, i)
            start, held = i, 0.0
        held += weight
    if len(weights) > start:
        yield slice(start, len(weights))


def read_batches(
    view: View,
    rows: Ints,
    *,
    most: int = BLOCK_BYTES,
    layers: Container[int] | None = None,
    without: Collection[str] = (),
) -> Iterator[TokenBatch]:
    """Everything that a view holds of some prompts, as batches that a writer takes.

    Parameters
    ----------
    view : View
        Of parts that all hold the same variables, layers and columns: usually of a single one.
    rows : ndarray of int
        Which of its prompts, in this order.
    most : int
        Bytes of activations in one batch.
    layers : container of int, optional
        Only these; variables of which no layer is left are left out.
    without : collection of str
        Variables and columns to leave out, as ``"tokens/resid"``.
    """
    held = view.all_layers()
    kept = held if layers is None else tuple(layer for layer in held if layer in layers)
    found = {
        level: {n: i for n, i in view.variables(level).items() if f"{level}/{n}" not in without and (kept or not i.layered)}
        for level in LEVELS
    }
    left_out = layers is not None or bool(without)
    if left_out and not any(info.layered for variables in found.values() for info in variables.values()):
        kept = ()
    counts = view.token_counts()[rows]
    weights = _row_bytes(found["prompts"], len(kept)) + counts * _row_bytes(found["tokens"], len(kept))
    left_out_columns = MADE_BY_WRITER.union(without)
    columns = {level: [n for n in view.columns(level) if f"{level}/{n}" not in left_out_columns] for level in LEVELS}
    unlayered = frozenset(name for variables in found.values() for name, info in variables.items() if not info.layered)
    dtypes = {n: str(i.attributes["stored_dtype"]) for v in found.values() for n, i in v.items() if "stored_dtype" in i.attributes}
    noted = {n: {key: i.attributes[key] for key in SITE_ATTRIBUTES if key in i.attributes} for v in found.values() for n, i in v.items()}
    has_tokens = any(part.info.n_tokens is not None for part in view.parts)
    for block in blocks_of(weights, most):
        chosen = rows[block]
        described: dict[str, Any] = {
            name: read_values(view, "prompts", name, chosen, ()) if name in PROMPT_COLUMNS else read_column(view, name, chosen)
            for name in columns["prompts"]
        }
        text = described.pop("text", None)
        token_columns, role_names = _token_columns(view, columns["tokens"], chosen)
        yield TokenBatch(
            sha256=[view.digests[row].tobytes().hex() for row in chosen],
            text=None if text is None else text.tolist(),
            prompt_length=described.pop("prompt_length", None),
            n_tokens=counts[block] if has_tokens else None,
            layers=kept,
            tokens={name: read_values(view, "tokens", name, chosen, kept) for name in found["tokens"]},
            token_columns=token_columns,
            role_names=role_names,
            prompts={name: read_values(view, "prompts", name, chosen, kept) for name in found["prompts"]},
            prompt_columns=described,
            unlayered=unlayered,
            stored_dtype=dtypes,
            site_attributes={name: values for name, values in noted.items() if values},
        )


def _token_columns(view: View, names: Collection[str], rows: Ints) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Columns of the tokens of some prompts, and the names of roles where parts have them."""
    found = {name: read_values(view, "tokens", name, rows, ()) for name in names if name != "role"}
    if "role" not in names:
        return found, ()
    array = view.source("tokens", "role", rows, (), view.token_counts()[rows])
    if not has_role_names(array):
        return {**found, "role": read_values(view, "tokens", "role", rows, ())}, ()
    roles = RoleArray(array)
    return {**found, "role": roles.codes(slice(0, array.n_rows))}, roles.names


def _row_bytes(variables: dict[str, ArrayInfo], layers: int) -> int:
    return sum(
        int(np.prod(info.row_shape)) * np.dtype(info.dtype).itemsize * (layers if info.layered else 1) for info in variables.values()
    )
