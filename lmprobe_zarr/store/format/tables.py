"""Tables of an array's chunks and of the blocks in them: what a part of format 2 says of them, and the tables as numbers. No I/O.

A chunk table gives the length and the crc32c of every chunk, a block table those of every block in every chunk, so that a block can be
read and checked without the rest of its chunk. Both are little-endian uint32 in C order. The places of chunks in a shard and of blocks in
a chunk follow from the lengths.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from lmprobe_zarr.store.format.array import ArrayInfo
from lmprobe_zarr.store.format.blosc_frame import Frame
from lmprobe_zarr.store.format.crc import crc32c_of_pieces
from lmprobe_zarr.store.format.names import Json
from lmprobe_zarr.typing import Buffer

__all__ = [
    "BLOCK_TABLE",
    "CHUNK_TABLE",
    "INLINE_BYTES",
    "ArrayTables",
    "BlockTable",
    "ChunkTable",
    "block_nbytes_of",
    "block_record",
    "block_table_nbytes",
    "body_checksum",
    "chunk_table_nbytes",
    "lengths_in_index",
    "parse_tables",
    "shard_index",
    "tables_document",
]

Words = npt.NDArray[np.uint32]
#: Names of the files beside an array's ``zarr.json``, for tables that do not stand in the part's document.
CHUNK_TABLE: Final = "chunk_table"
BLOCK_TABLE: Final = "block_table"
#: Tables of at most so many bytes stand in the document: another file would cost more than they do.
INLINE_BYTES: Final = 1024
#: Blosc makes no smaller blocks of what lz4 compresses.
_BLOCK_BYTES: Final = 2**16
_LARGEST_BLOCK: Final = 2**18
_WORD: Final = 4
#: Chunks that one array of a part may have: a document cannot make a reader count further.
_MOST_CHUNKS: Final = 2**20
_INDEX_ENTRY: Final = struct.Struct("<2Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayTables:
    """What a part's document says of the tables of one array.

    Parameters
    ----------
    nbytes : int
        Bytes of all files that hold its chunks.
    chunks : bytes, optional
        The chunk table; None where it is the file ``chunk_table`` beside the array's document.
    block_nbytes : int
        Decoded bytes of a block; 0 where there is no block table.
    blocks : bytes, optional
        The block table; None where it is the file ``block_table``, or where there is none.
    """

    nbytes: int
    chunks: bytes | None
    block_nbytes: int = 0
    blocks: bytes | None = None


def block_nbytes_of(info: ArrayInfo) -> int:
    """Decoded bytes of the blocks that a writer makes; 0 where a chunk is so small, or a single row, that reading a part gains nothing.

    Whole rows where blosc lets us choose: it makes no blocks below 64 KiB.
    """
    if info.dtype == "string" or info.rows_per_chunk == 1 or info.chunk_nbytes <= 2 * _BLOCK_BYTES:
        return 0
    row = info.chunk_nbytes // info.rows_per_chunk
    whole = -(-_BLOCK_BYTES // row) * row
    nbytes = whole if whole <= _LARGEST_BLOCK else _BLOCK_BYTES
    return nbytes if nbytes < info.chunk_nbytes else 0  # a single row may be one block


def _blocks_per_chunk(info: ArrayInfo, block_nbytes: int) -> int:
    return -(-info.chunk_nbytes // block_nbytes)


def chunk_table_nbytes(info: ArrayInfo) -> int:
    """Bytes of an array's chunk table."""
    return 2 * _WORD * info.n_chunks


def block_table_nbytes(info: ArrayInfo, block_nbytes: int) -> int:
    """Bytes of an array's block table."""
    return _WORD * (2 + 2 * _blocks_per_chunk(info, block_nbytes)) * info.n_chunks


class _Table:
    """Numbers of every chunk of an array, of which the first is the chunk's length."""

    __slots__ = ("info", "words")

    def __init__(self, data: Buffer, info: ArrayInfo, n_words: int) -> None:
        self.info = info
        self.words: Words = np.frombuffer(data, "<u4").reshape(-1, info.n_blocks, n_words)

    def place(self, layer: int, block: int) -> int:
        """Where a chunk begins in its file."""
        first = self.info.first_in_shard(block)
        return int(self.words[layer, first:block, 0].sum(dtype=np.int64)) if first < block else 0


class ChunkTable(_Table):
    """Length and crc32c of every chunk of an array.

    Parameters
    ----------
    data : bytes
        Of the length that `chunk_table_nbytes` gives.
    info : ArrayInfo
    """

    __slots__ = ()

    def __init__(self, data: Buffer, info: ArrayInfo) -> None:
        super().__init__(data, info, 2)

    def entry(self, layer: int, block: int) -> tuple[int, int]:
        """Length and crc32c of a chunk."""
        length, checksum = self.words[layer, block].tolist()
        return length, checksum

    def file_sizes(self) -> dict[str, int]:
        """Length of every file that holds chunks, by its name in the array's folder."""
        lengths = self.words[:, :, 0].astype(np.int64)
        found: dict[str, int] = {}
        for layer, of_layer in enumerate(lengths):
            for shard, block in enumerate(range(0, self.info.n_blocks, self.info.blocks_per_file)):
                name = self.info.file_name(layer, shard)
                found[name] = int(of_layer[block : block + self.info.blocks_per_file].sum()) + self.info.shard_index_nbytes
        return found


class BlockTable(_Table):
    """Of every chunk of an array its length, the first four bytes of its blosc header, and length and crc32c of every block.

    Parameters
    ----------
    data : bytes
        Of the length that `block_table_nbytes` gives.
    info : ArrayInfo
    block_nbytes : int
        Decoded bytes of a block.
    """

    __slots__ = ()

    def __init__(self, data: Buffer, info: ArrayInfo, block_nbytes: int) -> None:
        super().__init__(data, info, 2 + 2 * _blocks_per_chunk(info, block_nbytes))

    def record(self, layer: int, block: int) -> Words:
        """The numbers of one chunk."""
        record: Words = self.words[layer, block]
        return record


def block_record(body: Buffer, info: ArrayInfo, block_nbytes: int) -> Words | None:
    """The numbers of one chunk in a block table; None where its frame has other blocks.

    Parameters
    ----------
    body : bytes-like
        The encoded chunk without its checksum.
    info : ArrayInfo
    block_nbytes : int
        Decoded bytes of a block.
    """
    data = memoryview(body)
    n = _blocks_per_chunk(info, block_nbytes)
    record = np.zeros(2 + 2 * n, "<u4")
    if info.shuffle is None:
        head, bounds = 0, [*range(0, len(data), block_nbytes), len(data)]
    else:
        frame = Frame.of(data)
        if not frame.is_copied and frame.block_nbytes != block_nbytes:
            return None
        head, bounds = frame.head, frame.bounds(data, block_nbytes)
    if len(bounds) != n + 1 or bounds != sorted(bounds):
        return None
    record[:2] = len(data) + _WORD, head
    record[2::2] = np.diff(bounds)
    array = np.frombuffer(data, np.uint8)
    record[3::2] = [google_crc32c.value(array[a:b]) for a, b in pairwise(bounds)]
    return record


def body_checksum(body: Buffer, record: Words) -> int:
    """The crc32c of a chunk's body, from its numbers in a block table: only what stands before the blocks is read."""
    data = memoryview(body)
    lengths, checksums = record[2::2].tolist(), record[3::2].tolist()
    first = len(data) - sum(lengths)
    return crc32c_of_pieces([(google_crc32c.value(bytes(data[:first])), first), *zip(checksums, lengths, strict=True)])


def shard_index(lengths: Sequence[int], blocks_per_file: int) -> bytes:
    """The index of a shard, as ``sharding_indexed`` has it: place and length of every chunk, and the crc32c of that."""
    index, place = bytearray(), 0
    for length in lengths:
        index += _INDEX_ENTRY.pack(place, length)
        place += length
    index += b"\xff" * (_INDEX_ENTRY.size * (blocks_per_file - len(lengths)))  # rows beyond the end of the array
    return bytes(index) + struct.pack("<I", google_crc32c.value(bytes(index)))


def lengths_in_index(index: Buffer, n_chunks: int) -> list[int] | None:
    """Lengths of the chunks of a shard by its index; None where that is damaged, or is not one that `shard_index` makes."""
    entries = np.frombuffer(index, "<u8", len(index) // _INDEX_ENTRY.size * 2).reshape(-1, 2)
    lengths: list[int] = entries[:n_chunks, 1].tolist()
    is_ours = max(lengths, default=0) < 2**32 and shard_index(lengths, len(entries)) == bytes(index)
    return lengths if is_ours else None


# ------------------------------------------------------------------------------------------------------------- document


def tables_document(tables: Mapping[str, ArrayTables]) -> Json:
    """What a part's document says of the tables, by the keys of the arrays."""
    return {
        key: {
            "nbytes": table.nbytes,
            CHUNK_TABLE: _text(table.chunks),
            "block_nbytes": table.block_nbytes,
            **({BLOCK_TABLE: _text(table.blocks)} if table.block_nbytes else {}),
        }
        for key, table in tables.items()
    }


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def parse_tables(document: Any, arrays: Mapping[str, ArrayInfo]) -> dict[str, ArrayTables]:
    """What a part's document says of tables.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError
        It contradicts the arrays, or is malformed.
    """
    found: dict[str, ArrayTables] = {}
    for key, described in document.items():
        info = arrays[key]
        nbytes, block_nbytes = described["nbytes"], described["block_nbytes"]
        if type(nbytes) is not int or type(block_nbytes) is not int or not 0 <= nbytes < 2**53:
            raise ValueError(f"{key} has lengths that cannot be")
        if info.dtype == "string" or info.n_chunks > _MOST_CHUNKS:
            raise ValueError(f"{key} has a chunk table, and is an array of {info.n_chunks} chunks of {info.dtype}")
        if block_nbytes and not _BLOCK_BYTES <= block_nbytes < info.chunk_nbytes:
            raise ValueError(f"{key} has blocks of {block_nbytes} bytes in chunks of {info.chunk_nbytes}")
        chunks = _table(described[CHUNK_TABLE], key, chunk_table_nbytes(info))
        blocks = _table(described[BLOCK_TABLE], key, block_table_nbytes(info, block_nbytes)) if block_nbytes else None
        found[key] = ArrayTables(nbytes=nbytes, chunks=chunks, block_nbytes=block_nbytes, blocks=blocks)
    sharded = [key for key, info in arrays.items() if info.shard_blocks and key not in found]
    if sharded:
        raise ValueError(f"{sharded[0]} has shards and no table of chunks")
    return found


def _table(text: object, key: str, expected: int) -> bytes | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"a table of {key} is no text")
    data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    if len(data) != expected:
        raise ValueError(f"a table of {key} has {len(data)} bytes instead of {expected}")
    return data
