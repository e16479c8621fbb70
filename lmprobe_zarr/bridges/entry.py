"""Records of what a foreign cache holds, and the protocols that bridges implement: `Source` and `LazySource`. No files and no store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.batch import HASH_DIGITS, TokenBatch, offsets_of
from lmprobe_zarr.store.format import Level

__all__ = ["Entry", "Held", "LazySource", "Piece", "Skipped", "Source", "batch_of", "held_dtype", "rows_of"]
#: What an entry may hold by token that is a column and no variable.
TOKEN_COLUMNS: Final = frozenset({"token_id", "generated"})


def held_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds every value of a foreign dtype exactly."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One variable of an entry, in one dtype.

    Parameters
    ----------
    level : {"prompts", "tokens"}
        One row per prompt, or one per token.
    variable : str
        Its name in a store. ``token_id`` and ``generated`` are allowed too and become columns.
    layers : tuple of int, optional
        Ascending; None for a variable without layers.
    dtype : str
        The dtype in the foreign file; may be ``bfloat16``.
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
        """An uninitialised array, shape (layer, row, …); a variable without layers gets one layer."""
        return np.empty((1 if self.layers is None else len(self.layers), rows, *self.row_shape), held_dtype(self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a foreign cache holds of one prompt.

    Parameters
    ----------
    name : str
        Names the entry in messages.
    sha256 : str
        The prompt's digest; if only the hash is known, `lmprobe_zarr.batch.digest_of_hash` of it.
    text : str, optional
        The prompt, if it is known.
    n_tokens : int, optional
        Tokens of the prompt, without padding. None if unknown; then there are no token variables.
    holds : tuple of Held
        What can be imported. Entries that hold the same share this tuple.
    notes : tuple of str
        What cannot be imported, and why.
    place : object
        Where the bridge finds the entry again; only the bridge uses it.
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
        """The prompt's hash."""
        return self.sha256[:HASH_DIGITS]

    @property
    def nbytes(self) -> int:
        """Bytes of all its activations in memory."""
        return sum(held.row_nbytes * (1 if held.level == "prompts" else self.n_tokens or 0) for held in self.holds)

    def covering(self, level: Level, variable: str, layers: tuple[int, ...] | None) -> tuple[Held, ...] | None:
        """What to read for some layers of a variable; None if one of them is missing.

        `layers` is None for a variable without layers. If the layers differ in dtype, there is one `Held` for each dtype.
        """
        found = [held for held in self.holds if (held.level, held.variable) == (level, variable)]
        if layers is None:
            return tuple(held for held in found if held.layers is None)[:1] or None
        available = [(held, tuple(i for i in layers if i in (held.layers or ()))) for held in found]
        if set(layers) - {i for _, some in available for i in some}:
            return None
        return tuple(replace(held, layers=tuple(sorted(some))) for held, some in available if some)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """An entry, file or folder that cannot be imported at all.

    Parameters
    ----------
    name : str
        Names it in messages.
    reason : str
        Why not. Equal reasons have equal texts, because they are counted.
    detail : str
        More about this case.
    """

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one entry, variable and layer, and the array to read them into.

    Parameters
    ----------
    entry : Entry
    held : Held
        The variable.
    layer : int or None
        None for a variable without layers.
    start, stop : int
        The rows: tokens of the prompt; 0 and 1 for a value per prompt.
    out : ndarray, shape (stop - start, …)
        Contiguous, of the dtype that `held_dtype` gives.
    """

    entry: Entry
    held: Held
    layer: int | None
    start: int
    stop: int
    out: npt.NDArray[Any]


def batch_of(entries: Sequence[Entry], arrays: Mapping[Held, npt.NDArray[Any]]) -> TokenBatch:
    """Values that were read of some entries, as one batch.

    Parameters
    ----------
    entries : sequence of Entry
        In the order of the rows.
    arrays : mapping of Held to ndarray, shape (layer, row, …)
        As made by `Held.empty`, with the rows of the entries end to end.
    """
    named: dict[Level, dict[str, npt.NDArray[Any]]] = {"prompts": {}, "tokens": {}}
    columns: dict[str, npt.NDArray[Any]] = {}
    for held, array in arrays.items():
        values = array[0] if held.layers is None else array
        if held.variable in TOKEN_COLUMNS:
            columns[held.variable] = values
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
    """The first row of each entry in a batch, and the end of the last, by level."""
    return {"tokens": offsets_of([entry.n_tokens or 0 for entry in entries]), "prompts": np.arange(len(entries) + 1)}


class Source(Protocol):
    """Activations in a foreign format, as an importer sees them."""

    @property
    def url(self) -> str:
        """The folder or URL, for messages."""
        ...

    def entries(self) -> Iterator[Entry | Skipped]:
        """All entries, described from file headers; no activations are read."""
        ...

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Read some variables and layers of some entries, as one batch.

        Parameters
        ----------
        entries : sequence of Entry
            Each holds all of `holds`; either all have a text, or none has.
        holds : sequence of Held
            All have the same layers, or no layers.

        Raises
        ------
        CorruptFileError
            A file has changed since it was described, or is damaged.
        """
        ...


class LazySource(Protocol):
    """A source whose rows can be read one by one, so that it can be opened where it lies."""

    @property
    def url(self) -> str:
        """The folder or URL, for messages."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine."""
        ...

    def entries(self) -> Iterator[Entry | Skipped]:
        """As for `Source`."""
        ...

    def read_pieces(self, entry: Entry, pieces: Sequence[Piece]) -> None:
        """Read rows of one entry into arrays, and no others.

        Raises
        ------
        CorruptFileError
            A file has changed since it was described, or is damaged.
        """
        ...
