"""`RowSource`: what an importer needs to say of files in which the rows of each prompt, variable and layer can be read alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.bridges.entry import Entry, Held, Piece, Skipped, batch_of, rows_of
from lmprobe_zarr.bridges.files import map_files
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.typing import Array

__all__ = ["RowSource"]


class RowSource(ABC):
    """A `Source` that can also be read in place: a class of its own says what there is, and reads rows of one prompt and layer."""

    is_local = True

    @property
    @abstractmethod
    def url(self) -> str:
        """The folder or URL, for messages."""

    @abstractmethod
    def entries(self) -> Iterator[Entry | Skipped]:
        """All entries; no activations are read."""

    @abstractmethod
    def rows(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int) -> Array:
        """Some rows of one variable and layer, shape (stop - start, …), in any dtype that `held.dtype` is exact in. Called from threads.

        Raises
        ------
        CorruptFileError
            A file has changed since it was described, or is damaged.
        """

    def read(self, entries: Sequence[Entry], holds: Sequence[Held]) -> TokenBatch:
        """Some of what some entries hold, as one batch; see `entry.Source`."""
        bounds = rows_of(entries)
        arrays = {held: held.empty(int(bounds[held.level][-1])) for held in holds}
        # One prompt after the other: some files keep all layers of a few prompts in one compressed chunk.
        jobs = (
            (entry, held, layer, 0, int(stop - start), array[j, start:stop])
            for i, entry in enumerate(entries)
            for held, array in arrays.items()
            for start, stop in [bounds[held.level][i : i + 2]]
            for j, layer in enumerate((None,) if held.layers is None else held.layers)
        )
        for _ in map_files(lambda job: self._fill(*job), jobs, local=self.is_local):
            pass
        return batch_of(entries, arrays)

    def read_pieces(self, entry: Entry, pieces: Sequence[Piece]) -> None:
        """Read rows of one entry into arrays; see `entry.LazySource`."""
        for piece in pieces:
            self._fill(entry, piece.held, piece.layer, piece.start, piece.stop, piece.out)

    def _fill(self, entry: Entry, held: Held, layer: int | None, start: int, stop: int, out: Array) -> None:
        values = self.rows(entry, held, layer, start, stop)
        if values.shape != out.shape:
            raise CorruptFileError(
                f"{self.url}: {entry.name} has rows of shape {values.shape} for {held.variable!r}, and {out.shape} was described"
            )
        out[...] = values
