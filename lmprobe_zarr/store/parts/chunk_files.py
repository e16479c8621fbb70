"""`ChunkFiles`: encoded chunks of one array, written to files or shards, and the tables of what was written. Encodes nothing."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Protocol

import numpy as np

from lmprobe_zarr.storage import PieceWriter, Storage, run_all
from lmprobe_zarr.store.format import CRC, ArrayInfo, block_record, body_checksum, crc32c, shard_index
from lmprobe_zarr.typing import Array, Buffer, Ints

__all__ = ["ChunkFiles", "FileWriter"]


class FileWriter(Protocol):
    """What writes the files of a part."""

    storage: Storage
    shard_bytes: int

    def write_file(self, name: str, data: Buffer | tuple[Buffer, ...]) -> None:
        """Write a file of the part."""

    def note_file(self, name: str) -> None:
        """Remember that a file was begun."""

    def open_shard(self, name: str) -> PieceWriter:
        """A file of the part that is written piece by piece."""


class ChunkFiles:
    """Writes the chunks of one array, one chunk of rows after the other, all layers of it at the same time.

    Parameters
    ----------
    writer : FileWriter
    key : str
        The array's key below the part.
    info : ArrayInfo
        Gives layers and chunks; not yet how many rows there are.
    block_nbytes : int
        Decoded bytes of the blocks in a chunk; 0 for none that can be read alone.

    Attributes
    ----------
    blocks : int
        Chunks of rows so far.
    """

    def __init__(self, writer: FileWriter, key: str, info: ArrayInfo, block_nbytes: int) -> None:
        self.writer, self.key, self.info, self.block_nbytes = writer, key, info, block_nbytes
        self.layers = info.shape[0] if info.layered else 1
        self.blocks = 0
        self._lengths: list[Ints] = []  # of each chunk of rows: length and crc32c by layer
        self._records: list[list[Array | None]] = []  # and the numbers of its blocks
        self._index_nbytes = 0
        self._shard_blocks = writer.shard_bytes // max(1, info.chunk_nbytes)
        self._shards: list[PieceWriter] = []

    def begin(self) -> None:
        """Make room for the next chunk of each layer, and open the next shards where the last ones are full."""
        self._lengths.append(np.zeros((self.layers, 2), np.int64))
        self._records.append([None] * self.layers)
        if self._shard_blocks > 1 and self.blocks % self._shard_blocks == 0:
            self._end_shards()
            file = self.blocks // self._shard_blocks
            names = [f"{self.key}/{self.info.file_name(layer, file)}" for layer in range(self.layers)]
            self._shards = [self.writer.open_shard(name) for name in names]
        self.blocks += 1

    def write(self, layer: int, body: Buffer, checksum: bytes | None = None) -> None:
        """Write the chunk of one layer, with its checksum where it is known; layers may be written by several threads."""
        record = block_record(body, self.info, self.block_nbytes) if self.block_nbytes else None
        if checksum is None:
            checksum = CRC.pack(crc32c(body) if record is None else body_checksum(body, record))
        if self._shards:
            self._shards[layer].append((body, checksum))
            self.writer.note_file(f"{self.key}/{self.info.file_name(layer, 0)}")
        else:
            self.writer.write_file(f"{self.key}/{self.info.file_name(layer, self.blocks - 1)}", (body, checksum))
        self._lengths[-1][layer] = memoryview(body).nbytes + len(checksum), int.from_bytes(checksum, "little")
        self._records[-1][layer] = record

    def end(self) -> int:
        """Make the last shards whole; returns how many chunks of rows lie in a shard, 0 where each is a file."""
        self._end_shards()
        return min(self._shard_blocks, self.blocks) if self._shard_blocks > 1 and self.blocks > 1 else 0

    def _end_shards(self) -> None:
        """Append their index to the open shards, and make them whole. A shard of a single chunk, the only one, is its chunk and no more."""
        if not self._shards:
            return
        first = (self.blocks - 1) // self._shard_blocks * self._shard_blocks
        whole = min(self._shard_blocks, self.blocks)  # the only shard has no more room than it needs
        lengths = np.array(self._lengths[first : self.blocks])[:, :, 0]

        def end(layer: int) -> None:
            if whole > 1:
                self._shards[layer].append(shard_index(lengths[:, layer].tolist(), whole))
            self._shards[layer].close()

        run_all([partial(end, layer) for layer in range(self.layers)], self.writer.storage.pace)
        if whole > 1:
            self._index_nbytes += self.layers * (16 * whole + 4)
        self._shards = []

    def tables(self) -> tuple[int, bytes, bytes]:
        """Bytes of all files with chunks, the table of chunks, and that of blocks, which is empty where there are none."""
        chunks = np.array(self._lengths).swapaxes(0, 1)
        records = [record for layer in range(self.layers) for block in self._records if (record := block[layer]) is not None]
        if len(records) < self.blocks * self.layers:
            self.block_nbytes = 0  # blosc has made other blocks in some chunk
        blocks = b"".join(record.tobytes() for record in records) if self.block_nbytes else b""
        return int(chunks[:, :, 0].sum()) + self._index_nbytes, chunks.astype("<u4").tobytes(), blocks

    def abort(self) -> None:
        """Give up the shards that are being written."""
        for shard in self._shards:
            with suppress(Exception):  # the others must be given up too; `gc` finds what stays
                shard.abort()
