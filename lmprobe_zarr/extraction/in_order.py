"""`InOrder`: puts batches, whose prompts are sorted by length, back into the order of the prompts. Knows no model and no store.

A window of prompts is held in memory up to a number of bytes, beyond it in a scratch file without a name. Its prompts are gathered by
whoever takes them: the thread that writes, while the next window fills.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from lmprobe_zarr.batch import TokenBatch, concat_ranges, offsets_of
from lmprobe_zarr.errors import NoSpaceError
from lmprobe_zarr.store.parts import shape_of
from lmprobe_zarr.typing import Array, Ints

__all__ = ["SLICE_BYTES", "InOrder"]

# What is handed on at once. A few of these wait for the writer.
SLICE_BYTES: Final = 8 << 20


class InOrder:
    """Takes batches in any order, and hands their prompts on in order at the end of each window.

    Use it as a context. Where the source of the batches fails or is interrupted, leaving it hands on what has arrived.

    Parameters
    ----------
    put : callable
        Takes an iterator over a window's batches of prompts in order. Each batch is gathered when the iterator is asked for it, on any
        thread.
    places : mapping of str to int
        The place of each prompt, by digest.
    memory : int
        Bytes of activations of a window that are held in memory.
    folder : str, optional
        Where scratch files go; None for the system's folder of temporary files.
    """

    def __init__(
        self, put: Callable[[Iterator[TokenBatch]], None], places: Mapping[str, int], *, memory: int, folder: str | None = None
    ) -> None:
        self._put, self._places, self._memory, self._folder = put, places, memory, folder
        self._held: dict[Hashable, list[TokenBatch]] = {}
        self._nbytes = 0
        self._scratch = _Scratch(folder)
        self._used: list[_Scratch] = []
        self._ready: list[Iterator[TokenBatch]] = []
        self._failed = False

    def take(self, batch: TokenBatch) -> None:
        """Hold a batch.

        Raises
        ------
        NoSpaceError
            It does not fit into memory, and the scratch file cannot be written.
        """
        kind = shape_of(batch)
        if self._nbytes + batch.nbytes > self._memory and self._nbytes:
            batch = self._scratch.spill(batch)
        else:
            self._nbytes += batch.nbytes
        self._held.setdefault(kind, []).append(batch)

    def flush(self) -> None:
        """Hand on everything that is held, in order."""
        if self._held:
            held, scratch = list(self._held.values()), self._scratch
            # An interruption in between loses the window, which the next call computes again; it never hands it on twice.
            self._held, self._nbytes, self._scratch = {}, 0, _Scratch(self._folder)
            self._used = [used for used in self._used if used.is_open] + [scratch]
            self._ready.append(_in_order(held, self._places, scratch))
        try:
            while self._ready:
                self._put(self._ready[0])
                self._ready.pop(0)
        except Exception:
            # Of the writing. After an interruption, leaving the context puts the same iterator again, which gives what is left of it.
            self._failed = True
            raise

    def close(self) -> None:
        """Close the scratch files. What was handed on and not taken cannot be gathered any more: taking it raises `ValueError`."""
        for scratch in (*self._used, self._scratch):
            scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._failed:
            self.flush()


def _in_order(kinds: Sequence[list[TokenBatch]], places: Mapping[str, int], scratch: _Scratch) -> Iterator[TokenBatch]:
    """The batches of a window in order, one kind after the other; its scratch file is closed at the end."""
    try:
        for batches in kinds:
            yield from _ordered(batches, places, scratch)
    finally:
        scratch.close()


def _ordered(batches: list[TokenBatch], places: Mapping[str, int], scratch: _Scratch) -> Iterator[TokenBatch]:
    if len(batches) == 1 and not scratch.is_used:
        yield batches[0]  # rows of a batch are in order
        return
    first = batches[0]
    sizes = [len(batch.sha256) for batch in batches]
    number = np.repeat(np.arange(len(batches)), sizes)
    row = concat_ranges(np.zeros(len(sizes), np.int64), sizes)
    order = np.argsort([places[digest] for batch in batches for digest in batch.sha256], kind="stable")
    number, row = number[order], row[order]
    counts = [np.ones(len(b.sha256), np.int64) if b.n_tokens is None else np.asarray(b.n_tokens, np.int64) for b in batches]
    tokens = np.array([counts[j][i] for j, i in zip(number.tolist(), row.tolist(), strict=True)], np.int64)
    starts = [offsets_of(each) for each in counts]
    weights = tokens * _row_nbytes(first.tokens, sum(map(int, counts[0]))) + _row_nbytes(first.prompts, sizes[0])
    for start, stop in _slices(weights):
        chosen = [(j, np.flatnonzero(number[start:stop] == j)) for j in np.unique(number[start:stop]).tolist()]
        by_prompt = [(j, at, row[start:stop][at]) for j, at in chosen]
        lengths = tokens[start:stop]
        ends = offsets_of(lengths)
        by_token = [
            (j, concat_ranges(ends[:-1][at], lengths[at]), concat_ranges(starts[j][rows], lengths[at])) for j, at, rows in by_prompt
        ]
        runs = [(j, list(zip(_ranges(ends[at], lengths[at]), _ranges(starts[j][r], lengths[at]), strict=True))) for j, at, r in by_prompt]
        gathered = _Gathered(batches, scratch, by_prompt, by_token, runs, stop - start, int(ends[-1]))
        yield replace(
            first,
            sha256=gathered.listed([batch.sha256 for batch in batches]),
            text=None if first.text is None else gathered.listed([batch.text for batch in batches]),
            prompt_length=None if first.prompt_length is None else gathered.column([b.prompt_length for b in batches], by_prompt),
            n_tokens=None if first.n_tokens is None else lengths,
            tokens={name: gathered.variable("tokens", name) for name in first.tokens},
            token_columns={n: gathered.column([b.token_columns[n] for b in batches], by_token) for n in first.token_columns},
            prompts={name: gathered.variable("prompts", name) for name in first.prompts},
            prompt_columns={n: gathered.column([b.prompt_columns[n] for b in batches], by_prompt) for n in first.prompt_columns},
        )


@dataclass(slots=True)
class _Scratch:
    """A file without a name for the arrays of a window that find no room in memory. It is made when the first of them comes."""

    folder: str | None
    _file: IO[bytes] | None = None
    _spilled: dict[int, _Spilled] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return self._file is not None

    @property
    def is_used(self) -> bool:
        """Whether arrays of the window are in the file, which may be closed again: what stands for them holds no values."""
        return bool(self._spilled)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def spill(self, batch: TokenBatch) -> TokenBatch:
        """The batch with arrays that stand for values in the file."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, prefix="lmprobe-zarr-")  # noqa: SIM115 — closed by close
            return replace(
                batch,
                tokens={name: self._written(self._file, array) for name, array in batch.tokens.items()},
                prompts={name: self._written(self._file, array) for name, array in batch.prompts.items()},
            )
        except OSError as error:
            raise NoSpaceError(
                f"the activations of one window do not fit into memory, and its scratch file in {self.folder or tempfile.gettempdir()} "
                f"cannot be written ({error}): free some space there, or use a smaller batch_tokens="
            ) from error

    def values(self, array: Array) -> Array:
        """The values of an array of the window, in memory or in the file."""
        spilled = self._spilled.get(id(array))
        return array if spilled is None else spilled.mapped()

    def _written(self, file: IO[bytes], array: Array) -> Array:
        offset = file.seek(0, 2)
        file.write(np.ascontiguousarray(array).view(np.uint8).data)
        # An array of the same shape and dtype that takes no memory, so that a batch is checked as ever.
        stand_in = np.broadcast_to(np.zeros((), array.dtype), array.shape)
        self._spilled[id(stand_in)] = _Spilled(file, offset, array.shape, array.dtype, stand_in)
        return stand_in


@dataclass(frozen=True, slots=True)
class _Spilled:
    """An array in the scratch file."""

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    dtype: Any
    stand_in: Array  # held, so that its id stays its own

    def mapped(self) -> Array:
        """The array, mapped anew for each slice of prompts, so that no more of the file counts as memory."""
        self.file.flush()
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape))


Rows = list[tuple[int, Ints, Ints]]
Runs = list[tuple[int, list[tuple[slice, slice]]]]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """One slice of prompts, gathered from the batches that hold them: from which batch, to which places, from which rows.

    The tokens of a prompt are next to each other in both, so `runs` has a slice for each, which is copied as a whole.
    """

    batches: list[TokenBatch]
    scratch: _Scratch
    by_prompt: Rows
    by_token: Rows
    runs: Runs
    n_prompts: int
    n_tokens: int

    def variable(self, level: str, name: str) -> Array:
        total = self.n_prompts if level == "prompts" else self.n_tokens
        axis = 0 if name in self.batches[0].unlayered else 1
        arrays = [(batch.prompts if level == "prompts" else batch.tokens)[name] for batch in self.batches]
        shape = list(arrays[0].shape)
        shape[axis] = total
        found = np.empty(shape, arrays[0].dtype)
        at_rows, by_prompt = found.swapaxes(0, axis), [(j, [(there, here)]) for j, there, here in self.by_prompt]
        for j, pairs in by_prompt if level == "prompts" else self.runs:
            values = self.scratch.values(arrays[j]).swapaxes(0, axis)
            for there, here in pairs:
                at_rows[there] = values[here]
        return found

    def column(self, columns: list[Any], rows: Rows) -> Array:
        total = self.n_prompts if rows is self.by_prompt else self.n_tokens
        found = np.empty(total, np.asarray(columns[0]).dtype)
        for j, there, here in rows:
            found[there] = np.asarray(columns[j])[here]
        return found

    def listed(self, columns: list[Any]) -> list[str]:
        found = [""] * self.n_prompts
        for j, there, here in self.by_prompt:
            for place, row in zip(there.tolist(), here.tolist(), strict=True):
                found[place] = columns[j][row]
        return found


def _ranges(starts: Ints, lengths: Ints) -> Iterator[slice]:
    return map(slice, starts.tolist(), (starts + lengths).tolist())


def _row_nbytes(arrays: Mapping[str, Array], rows: int) -> int:
    """Bytes of one row of all these arrays together."""
    return sum(array.nbytes for array in arrays.values()) // max(1, rows)


def _slices(weights: Ints) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(weights)
    start = 0
    while start < len(weights):
        stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + SLICE_BYTES, side="right")))
        yield start, stop
        start = stop
