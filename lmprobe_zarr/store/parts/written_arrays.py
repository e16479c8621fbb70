"""One variable of a part that is being written: rows that fill chunks, or chunks that are moved from another part."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from lmprobe_zarr.batch import SCALARS, count_odd
from lmprobe_zarr.errors import CorruptPartError
from lmprobe_zarr.storage import run_all
from lmprobe_zarr.store.format import ArrayInfo, block_nbytes_of, encode_body
from lmprobe_zarr.store.parts.chunk_files import ChunkFiles, FileWriter
from lmprobe_zarr.store.parts.stored_array import StoredArray
from lmprobe_zarr.typing import Array

__all__ = ["MovedArray", "RowBuffer"]


class ChunkWriter(FileWriter, Protocol):
    """What writes a part: its files, or in format 1 a file for each chunk."""

    version: int

    def write_chunk(self, key: str, info: ArrayInfo, layer: int, block: int, values: Array) -> None:
        """Write one chunk of a layer as a file."""


class RowBuffer:
    """Holds rows of one variable until a chunk is full, and then writes one chunk per layer."""

    def __init__(self, writer: ChunkWriter, key: str, info: ArrayInfo) -> None:
        self.writer, self.key, self.info = writer, key, info
        self.capacity = info.rows_per_chunk
        self.layers = info.shape[0] if info.layered else 1
        self.filled = 0
        self.blocks = 0
        self.held: Array | None = None
        self.odd = (0, 0)
        # Scalars are not counted: the probability of a first token is NaN, and a single number is no row that could be all zeros.
        self.counted = np.dtype(info.dtype).kind == "f" and key.partition("/")[2] not in SCALARS
        self.files: ChunkFiles | None = None  # known once it is known how many rows a chunk has

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of the rows that are held."""
        return 0 if self.held is None else self.held[:, : self.filled].nbytes

    def append(self, values: Array) -> None:
        """Take rows; `values` has shape (layer, row, …)."""
        start, total = 0, values.shape[1]
        while start < total:
            if not self.filled and total - start >= self.capacity:
                self._flush(values[:, start : start + self.capacity])  # a whole chunk: no copy
                start += self.capacity
                continue
            if self.held is None:
                self.held = np.empty((self.layers, self.capacity, *self.info.row_shape), self.info.dtype)
            count = min(total - start, self.capacity - self.filled)
            self.held[:, self.filled : self.filled + count] = values[:, start : start + count]
            self.filled, start = self.filled + count, start + count
            if self.filled == self.capacity:
                self._flush(self.held)
                self.filled = 0

    def _flush(self, values: Array) -> None:
        if self.writer.version > 1:
            if self.files is None:
                self.files = ChunkFiles(self.writer, self.key, self.info, block_nbytes_of(self.info))
            self.files.begin()
        odd = [(0, 0)] * self.layers
        run_all([partial(self._write, layer, values, odd) for layer in range(self.layers)], self.writer.storage.pace)
        self.odd = self.odd[0] + sum(counts[0] for counts in odd), self.odd[1] + sum(counts[1] for counts in odd)
        self.blocks += 1

    def _write(self, layer: int, values: Array, odd: list[tuple[int, int]]) -> None:
        rows = values[layer : layer + 1] if self.info.layered else values[0]
        if self.files is None:
            self.writer.write_chunk(self.key, self.info, layer, self.blocks, rows)
        else:
            self.files.write(layer, encode_body(rows, self.info, self.files.block_nbytes))
        if self.counted:
            odd[layer] = count_odd(rows, self.info.row_shape)

    def finish(self) -> ArrayInfo:
        """Write the remaining rows; returns the final metadata of the array."""
        rows = self.blocks * self.capacity + self.filled
        axis = self.info.sample_axis
        chunk_rows = self.capacity if self.blocks else self.filled
        self.info = replace(
            self.info,
            shape=(*self.info.shape[:axis], rows, *self.info.shape[axis + 1 :]),
            chunks=(*self.info.chunks[:axis], chunk_rows, *self.info.chunks[axis + 1 :]),
        )
        if self.filled and self.held is not None:
            self._flush(self.held[:, : self.filled])
        self.held = None
        if self.files is not None:
            self.info = replace(self.info, shard_blocks=self.files.end())
        return self.info


class MovedArray:
    """One variable of another part with the same prompts: its chunks as they are stored there, checked and not decoded."""

    def __init__(self, writer: ChunkWriter, key: str, source: StoredArray, odd: tuple[int, int]) -> None:
        self.writer, self.source, self.odd = writer, source, odd
        self.info = replace(source.info, shard_blocks=0)
        self.layers = self.info.shape[0] if self.info.layered else 1
        self.files = ChunkFiles(writer, key, self.info, source.where.block_nbytes)
        self.waiting_nbytes = 0

    def finish(self) -> ArrayInfo:
        """Move all chunks; returns the final metadata of the array."""
        pace = (self.source if self.writer.storage.is_local else self.writer).storage.pace
        for block in range(self.info.n_blocks):
            self.files.begin()
            run_all([partial(self._move, layer, block) for layer in range(self.layers)], pace)
        self.info = replace(self.info, shard_blocks=self.files.end())
        return self.info

    def _move(self, layer: int, block: int) -> None:
        try:
            data = self.source.where.read_chunk(layer, block)
        except CorruptPartError:
            # It may be whole but for what stands around its blocks, or come from the table of blocks alone.
            values = self.source.read_chunk(layer, block)
            rows = values[None] if self.info.layered else values
            self.files.write(layer, encode_body(rows, self.info, self.files.block_nbytes))
        else:
            self.files.write(layer, data[:-4], bytes(data[-4:]))
