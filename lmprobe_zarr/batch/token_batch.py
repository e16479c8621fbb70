"""`TokenBatch`, the value that every source of activations (model, old file, caller) gives to the writer.

Holds arrays and checks that they fit together. Never files, zarr or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmprobe_zarr.batch.columns import Column
from lmprobe_zarr.batch.ragged import offsets_of
from lmprobe_zarr.batch.sites import SCALARS
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.typing import Array

__all__ = ["TokenBatch", "validate_batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Activations of some prompts, ragged, without padding.

    Parameters
    ----------
    sha256 : sequence of str, shape (prompt,)
        Whole digests, see :func:`prompt_sha256`, without repeats.
    text : sequence of str, shape (prompt,), optional
        The texts; None if they are unknown or must not be stored.
    prompt_length : ndarray of int, shape (prompt,), optional
        Tokens of each prompt, −1 where unknown.
    n_tokens : ndarray of int, shape (prompt,), optional
        Token rows that this batch holds of each prompt; None if it holds values per prompt only.
    layers : tuple of int
        The layers along the layer axis of every layered array, ascending.
    tokens : mapping of str to ndarray
        Variable to (layer, token, …), or (token, …) for those in `unlayered`.
    token_columns : mapping of str to ndarray, shape (token,)
        ``position``, ``token_id``, ``char_start``, ``char_end``, ``role``, ``turn``, ``generated``; −1 where unknown.
    role_names : tuple of str
        The names of roles by their code in ``role``. Without them the codes mean what the caller says.
    prompts : mapping of str to ndarray
        Variable to (layer, prompt, …), or (prompt, …) for those in `unlayered`.
    prompt_columns : mapping of str to Column or sequence, shape (prompt,)
        The user's own columns, as `parse_column` takes them.
    unlayered : frozenset of str
        Variables without a layer axis.
    stored_dtype : mapping of str to str
        The dtype of a variable at its source where numpy has no such dtype: ``bfloat16`` for float32 arrays that hold its numbers.
    site_attributes : mapping of str to mapping
        What is noted in the arrays of a site, or of one variable, see ``docs/format.md``: ``site_path``, ``num_heads``, ``site_layers``,
        ``over``, ``sae``.

    Raises
    ------
    InvalidArgumentError
        The arrays do not fit together; the message names all problems.
    """

    sha256: Sequence[str]
    text: Sequence[str] | None = None
    prompt_length: Array | None = None
    n_tokens: Array | None = None
    layers: tuple[int, ...] = ()
    tokens: Mapping[str, Array] = field(default_factory=dict)
    token_columns: Mapping[str, Array] = field(default_factory=dict)
    role_names: tuple[str, ...] = ()
    prompts: Mapping[str, Array] = field(default_factory=dict)
    prompt_columns: Mapping[str, Column | Sequence[Any] | Array] = field(default_factory=dict)
    unlayered: frozenset[str] = frozenset()
    stored_dtype: Mapping[str, str] = field(default_factory=dict)
    site_attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = validate_batch(self)
        if problems:
            raise InvalidArgumentError("these activations do not fit together: " + "; ".join(problems))

    @property
    def nbytes(self) -> int:
        """Bytes of all activations (not of the columns)."""
        return sum(a.nbytes for a in (*self.tokens.values(), *self.prompts.values()))

    @property
    def held_nbytes(self) -> int:
        """Approximate bytes of memory that the columns take: texts may take more than pooled activations."""
        texts = sum(map(len, self.text or ()))
        return texts + sum(map(_held_nbytes, (*self.token_columns.values(), *self.prompt_columns.values())))

    def take(self, start: int, stop: int) -> TokenBatch:
        """The prompts from `start` up to, but without, `stop`; the arrays are views of those of this batch."""
        rows = slice(start, stop)
        bounds = offsets_of(self.n_tokens) if self.n_tokens is not None else np.zeros(len(self.sha256) + 1, np.int64)
        tokens = slice(int(bounds[start]), int(bounds[stop]))

        def cut(name: str, array: Array, along: slice) -> Array:
            return array[along] if name in self.unlayered else array[:, along]

        return TokenBatch(
            sha256=self.sha256[rows],
            text=None if self.text is None else self.text[rows],
            prompt_length=None if self.prompt_length is None else self.prompt_length[rows],
            n_tokens=None if self.n_tokens is None else self.n_tokens[rows],
            layers=self.layers,
            tokens={name: cut(name, array, tokens) for name, array in self.tokens.items()},
            token_columns={name: column[tokens] for name, column in self.token_columns.items()},
            role_names=self.role_names,
            prompts={name: cut(name, array, rows) for name, array in self.prompts.items()},
            prompt_columns={name: column[rows] for name, column in self.prompt_columns.items()},
            unlayered=self.unlayered,
            stored_dtype=self.stored_dtype,
            site_attributes=self.site_attributes,
        )


def _held_nbytes(column: Column | Sequence[Any] | Array) -> int:
    if isinstance(column, Column):
        return column.nbytes
    values = np.asarray(column)
    return sum(map(len, map(str, column))) if values.dtype == object else values.nbytes


def validate_batch(batch: TokenBatch) -> list[str]:
    """All problems of a batch whose arrays do not fit together; empty if they fit."""
    problems: list[str] = []
    n = len(batch.sha256)
    if not n:
        problems.append("there is no prompt")
    if len(set(batch.sha256)) != n:
        problems.append("a prompt occurs twice")
    if list(batch.layers) != sorted(set(batch.layers)) or (batch.layers and batch.layers[0] < 0):
        problems.append(f"layers {batch.layers!r} are not ascending, unique and at least 0")
    columns = {"text": batch.text, "prompt_length": batch.prompt_length, "n_tokens": batch.n_tokens, **batch.prompt_columns}
    for name, column in columns.items():
        if column is not None and len(column) != n:
            problems.append(f"{name} has {len(column)} values for {n} prompts")
    total = 0
    if batch.n_tokens is not None:
        counts = np.asarray(batch.n_tokens)
        total = int(counts.sum())
        if len(counts) and counts.min() < 1:
            problems.append(f"prompt number {int(np.argmin(counts))} has no tokens")
    elif batch.tokens or batch.token_columns:
        problems.append("token arrays were given without n_tokens")
    for name, column in batch.token_columns.items():
        if len(column) != total:
            problems.append(f"{name} has {len(column)} rows but n_tokens sums to {total}")
    codes = batch.token_columns.get("role")
    if batch.role_names and codes is not None and len(codes) and int(np.max(codes)) >= len(batch.role_names):
        problems.append(f"role holds the code {int(np.max(codes))}, but there are {len(batch.role_names)} role_names")
    for values, rows, counted in ((batch.tokens, total, f"n_tokens sums to {total}"), (batch.prompts, n, f"there are {n} prompts")):
        for name, array in values.items():
            axis = 0 if name in batch.unlayered else 1
            if axis and (array.ndim < 2 or array.shape[0] != len(batch.layers)):
                problems.append(f"{name} has shape {array.shape} for {len(batch.layers)} layers")
            elif array.ndim < axis + (1 if name in SCALARS else 2) or 0 in array.shape[axis + 1 :]:
                problems.append(f"{name} has shape {array.shape}, in which a row holds no values")
            elif array.shape[axis] != rows:
                problems.append(f"{name} has shape {array.shape} but {counted}")
    return problems
