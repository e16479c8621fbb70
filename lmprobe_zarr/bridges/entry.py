"""What a foreign place holds, and what every bridge can be asked: records and one protocol. No files and no store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import HASH_DIGITS, TokenBatch, offsets_of
from lmprobe_zarr.store.format import Level

__all__ = ["Entry", "Held", "Skipped", "Source", "batch_of", "held_dtype", "rows_of"]


def held_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds values of a dtype exactly."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One variable of an entry, in one dtype.

    Parameters
    ----------
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    variable : str
        As it is named in a store; ``token_id`` too, which becomes a column.
    layers : tuple of int, optional
        Ascending; None for a variable without layers.
    dtype : str
        Dtype in the foreign file, ``bfloat16`` included.
    row_shape : tuple of int
        Shape of one row.
    """

    level: Level
    variable: str
    layers: tuple[int, ...] | None
    dtype: str
    row_shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row in memory, over all layers."""
        per_layer = int(np.prod(self.row_shape, dtype=np.int64)) * held_dtype(self.dtype).itemsize
        return per_layer * (1 if self.layers is None else len(self.layers))

    def empty(self, rows: int) -> npt.NDArray[Any]:
        """An array for that many rows, shape (layer, row, …), one layer where there are none."""
        return np.empty((1 if self.layers is None else len(self.layers), rows, *self.row_shape), held_dtype(self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a foreign place holds of one prompt.

    Parameters
    ----------
    name : str
        Where it lies, for messages.
    sha256 : str
        The prompt's whole digest, or see `digest_of_hash`.
    text : str, optional
        The prompt, where it is known.
    n_tokens : int, optional
        Tokens of the prompt, without padding; None where unknown, and then there are no token variables.
    holds : tuple of Held
        What there is. Entries that hold the same share this tuple.
    notes : tuple of str
        What of it cannot come over, and why.
    place : object
        For the bridge to find it again.
    """

    name: str
    sha256: str
    text: str | None
    n_tokens: int | None
    holds: tuple[Held, ...]
    notes: tuple[str, ...] = ()
    place: Any = field(default=None, repr=False)

    @property
    def hash(self) -> str:
        """The label of the prompt."""
        return self.sha256[:HASH_DIGITS]

    @property
    def nbytes(self) -> int:
        """Bytes of its activations in memory."""
        return sum(held.row_nbytes * (1 if held.level == "prompts" else self.n_tokens or 0) for held in self.holds)

    def covering(self, level: Level, variable: str, layers: tuple[int, ...] | None) -> tuple[Held, ...] | None:
        """What to read for some layers of a variable (None for one without layers); None where not all of it is there.

        More than one where the layers differ in dtype; each is to be read by itself.
        """
        found = [held for held in self.holds if (held.level, held.variable) == (level, variable)]
        if layers is None:
            return tuple(held for held in found if held.layers is None)[:1] or None
        parts = [(held, tuple(i for i in layers if i in (held.layers or ()))) for held in found]
        if set(layers) - {i for _, some in parts for i in some}:
            return None
        return tuple(replace(held, layers=tuple(sorted(some))) for held, some in parts if some)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something that cannot come over at all.

    Parameters
    ----------
    name : str
        What it is.
    reason : str
        Why not; the same words for the same reason, so that they can be counted.
    detail : str
        More of this one.
    """

    name: str
    reason: str
    detail: str = ""


def batch_of(entries: Sequence[Entry], arrays: Mapping[Held, npt.NDArray[Any]]) -> TokenBatch:
    """What was read of some entries as one batch.

    Parameters
    ----------
    entries : sequence of Entry
        Whose.
    arrays : mapping of Held to ndarray, shape (layer, row, …)
        As `Held.empty` makes them, the rows of the entries end to end.
    """
    named: dict[Level, dict[str, npt.NDArray[Any]]] = {"prompts": {}, "tokens": {}}
    columns: dict[str, npt.NDArray[Any]] = {}
    for held, array in arrays.items():
        values = array[0] if held.layers is None else array
        if held.variable == "token_id":
            columns["token_id"] = values
        else:
            named[held.level][held.variable] = values
    by_token = any(held.level == "tokens" for held in arrays)
    return TokenBatch(
        sha256=[entry.sha256 for entry in entries],
        text=None if entries[0].text is None else [entry.text or "" for entry in entries],
        prompt_length=np.array([-1 if entry.n_tokens is None else entry.n_tokens for entry in entries], np.int64),
        n_tokens=np.array([entry.n_tokens or 0 for entry in entries], np.int64) if by_token else None,
        layers=next((held.layers for held in arrays if held.layers is not None), ()),
        tokens=named["tokens"],
        token_columns=columns,
        prompts=named["prompts"],
        unlayered=frozenset(held.variable for held in arrays if held.layers is None),
        stored_dtype={held.variable: "bfloat16" for held in arrays if held.dtype == "bfloat16"},
    )


def rows_of(entries: Sequence[Entry]) -> dict[Level, npt.NDArray[np.int64]]:
    """Where the rows of each entry begin in a batch, and the end of all, by level."""
    return {"tokens": offsets_of([entry.n_tokens or 0 for entry in entries]), "prompts": np.arange(len(entries) + 1)}


class Source(Protocol):
    """A foreign format in one place. This is all that an importer needs to know of it."""

    @property
    def url(self) -> str:
        """Where it lies."""
        ...

    def entries(self) -> Iterator[Entry | Skipped]:
        """Everything there is, from headers alone; no activations are read."""
        ...

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Some of what some entries hold, as one batch.

        Parameters
        ----------
        entries : sequence of Entry
            All with each of `holds` among what they hold; either all with a text or none.
        holds : sequence of Held
            All with the same layers, or without layers.

        Raises
        ------
        CorruptFileError
            A file is not what its header said.
        """
        ...
