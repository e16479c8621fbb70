"""`ArrayFiles`, where the chunks and blocks of one array lie, with their lengths and checksums. Decodes nothing.

An array of format 1 has its chunks in the part's table of files. One of format 2 has tables of its own, which are read at their first use,
and of which those used last are kept for all arrays of the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError, PartGoneError
from lmprobe_zarr.storage import KeptReads, Storage
from lmprobe_zarr.store.format import (
    BLOCK_TABLE,
    CHUNK_TABLE,
    ArrayInfo,
    ArrayTables,
    BlockTable,
    ChunkTable,
    block_record,
    block_table_nbytes,
    chunk_table_nbytes,
    crc32c,
    is_intact,
    lengths_in_index,
    shard_index,
)
from lmprobe_zarr.store.parts.kept_chunks import kept_table
from lmprobe_zarr.typing import Buffer

__all__ = ["ArrayFiles", "ChunkPlace"]

T = TypeVar("T")
_UNKNOWN: Final = (-1, -1)


class ChunkPlace(NamedTuple):
    """A chunk in its file: name of the file, where it begins there, its length with its checksum, and that checksum."""

    file: str
    start: int
    length: int
    checksum: int


@dataclass(frozen=True, eq=False)
class ArrayFiles:
    """The files of one array of one part.

    Parameters
    ----------
    storage : Storage
        The place of the store.
    path : str
        Key of the array's folder.
    info : ArrayInfo
        Its metadata.
    files : mapping of str to (int, int)
        The part's table of files, by their keys below the part; only this array's are used.
    tables : ArrayTables, optional
        What the part's document says of the array's own tables; None where its chunks are in `files`.
    kept : KeptReads, optional
        What is kept on this machine of the part's files.
    """

    storage: Storage
    path: str
    info: ArrayInfo
    files: Mapping[str, Sequence[int]]
    tables: ArrayTables | None = None
    kept: KeptReads | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Only this array's entries are sent to another process.
        names = self.info.file_names() if self.tables is None else (CHUNK_TABLE, BLOCK_TABLE)
        files = {key: self.files[key] for key in (f"{self.name}/{name}" for name in names) if key in self.files}
        return ArrayFiles, (self.storage, self.path, self.info, files, self.tables, self.kept)

    @functools.cached_property
    def part(self) -> str:
        """Key of the folder of its part."""
        return self.path.rsplit("/", 2)[0]

    @functools.cached_property
    def name(self) -> str:
        """Key of the array's folder below that of the part."""
        return "/".join(self.path.rsplit("/", 2)[1:])

    @property
    def has_blocks(self) -> bool:
        """Whether blocks of a chunk can be read alone."""
        return self.block_nbytes > 0

    @functools.cached_property
    def block_nbytes(self) -> int:
        """Decoded bytes of a block; 0 where blocks cannot be read alone."""
        return 0 if self.tables is None else self.tables.block_nbytes

    def chunk(self, layer: int, block: int) -> ChunkPlace:
        """Where a chunk lies; of one that the part's table does not name, with a length of −1.

        Raises
        ------
        CorruptPartError
            The table of chunks is missing or damaged.
        PartGoneError
        """
        if self.tables is None:
            file = self.info.chunk_key(layer, block)
            return ChunkPlace(file, 0, *self.files.get(f"{self.name}/{file}", _UNKNOWN))
        table = self._chunks_in_document or self.chunk_table()
        if not self.info.shard_blocks:
            return ChunkPlace(self.info.chunk_key(layer, block), 0, *table.entry(layer, block))
        return ChunkPlace(self.info.file_of(layer, block), table.place(layer, block), *table.entry(layer, block))

    def read_chunk(self, layer: int, block: int) -> Buffer:
        """A chunk as it is stored, with its checksum, which is verified; errors as of `chunk`."""
        place = self.chunk(layer, block)
        end = place.start + place.length
        data = self.fetch(place.file, lambda key: self.storage.read_ranges(key, [(place.start, end)]))[0] if place.length > 0 else b""
        if not is_intact("c.", data, place[2:]):
            raise self.corrupt(self.info.chunk_key(layer, block), "does not hold what the part's table says of it")
        return data

    @functools.cached_property
    def _chunks_in_document(self) -> ChunkTable | None:
        """The table of chunks where it stands in the part's document."""
        return None if self.tables is None or self.tables.chunks is None else ChunkTable(self.tables.chunks, self.info)

    @property
    def keeps_chunk_table(self) -> bool:
        """Whether it needs no request to know where chunks lie."""
        if self.tables is None or self.tables.chunks is not None:
            return True
        return self.kept is not None and self.kept.holds(f"{self.name}/{CHUNK_TABLE}", 0, chunk_table_nbytes(self.info))

    def chunk_table(self) -> ChunkTable:
        """The table of chunks of an array that has one."""
        return self._chunks_in_document or ChunkTable(self._read_table(CHUNK_TABLE, chunk_table_nbytes(self.info)), self.info)

    def block_table(self) -> BlockTable:
        """The table of blocks of an array that has one."""
        held = self._tables
        data = self._read_table(BLOCK_TABLE, block_table_nbytes(self.info, held.block_nbytes)) if held.blocks is None else held.blocks
        return BlockTable(data, self.info, held.block_nbytes)

    @property
    def _tables(self) -> ArrayTables:
        if self.tables is None:
            raise TypeError(f"{self.path} has no tables of its own")
        return self.tables

    def _read_table(self, name: str, expected: int) -> Buffer:
        length, checksum = self.files.get(f"{self.name}/{name}", _UNKNOWN)
        if length != expected:
            raise self.corrupt(name, f"should have {expected} bytes, and the part's document says {length}")

        def read() -> Buffer:
            kept, key = self.kept, f"{self.name}/{name}"
            if kept is not None and (held := kept.read_bytes(key, 0, length)) is not None:
                if crc32c(held) == checksum:
                    return held
                kept.distrust(key, 0, length)
            data = self.fetch(name, self.storage.read)
            if len(data) != length:
                raise self.corrupt(name, f"has {len(data)} bytes instead of {length}")
            if crc32c(data) != checksum:
                raise self.corrupt(name, "does not hold its checksum")
            if kept is not None:
                kept.keep(key, 0, length, (data,))
            return data

        return kept_table((self.storage.url, self.path, name, length, checksum), read)

    # ------------------------------------------------------------------------------------------------------------ files

    def file_sizes(self) -> dict[str, int]:
        """Length of every file with chunks of an array that has tables, by name; errors as of `chunk`."""
        return self.chunk_table().file_sizes()

    def is_intact(self, file: str, data: Buffer) -> bool:
        """Whether a file of an array that has tables holds what it was committed with."""
        return not self.damaged_chunks(file, data)

    def damaged_chunks(self, file: str, data: Buffer) -> list[tuple[int, int]]:
        """Layer and number of each chunk in a file that is not as it was committed; all of them where only its length or index is wrong."""
        info, view = self.info, memoryview(data)
        layer, shard = self.numbers_of(file)
        blocks = range(shard * info.blocks_per_file, min((shard + 1) * info.blocks_per_file, info.n_blocks))
        entries = self._entries(layer, blocks, view)
        if entries is None:
            return [(layer, block) for block in blocks]
        bad, end = [], 0
        for block, entry in zip(blocks, entries, strict=True):
            start, end = end, end + entry[0]
            if not is_intact("c.", view[start:end], entry):
                bad.append((layer, block))
        index = shard_index([entry[0] for entry in entries], info.shard_blocks) if info.shard_blocks else b""
        return bad if bad or view[end:] == index else [(layer, block) for block in blocks]

    def _entries(self, layer: int, blocks: range, view: memoryview) -> list[tuple[int, int]] | None:
        """Length and checksum of chunks of one file; where the table of chunks is damaged, what is known without it."""
        try:
            table = self.chunk_table()
        except CorruptPartError:
            lengths = self._lengths_without_table(layer, blocks, view)
            if lengths is None or min(lengths) < 4:
                return None
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            return [(n, int.from_bytes(view[end - 4 : end], "little")) for n, end in zip(lengths, ends, strict=True)]
        return [table.entry(layer, block) for block in blocks]

    def _lengths_without_table(self, layer: int, blocks: range, view: memoryview) -> list[int] | None:
        """Lengths of the chunks of one file where the table of chunks is damaged: by that of blocks, or by the shard's index."""
        if self.has_blocks:
            with suppress(CorruptPartError):
                table = self.block_table()
                return [int(table.record(layer, block)[0]) for block in blocks]
        if not self.info.shard_blocks:
            return [len(view)]
        nbytes = self.info.shard_index_nbytes
        return lengths_in_index(view[-nbytes:], len(blocks)) if len(view) >= nbytes else None

    def numbers_of(self, file: str) -> tuple[int, int]:
        """Layer and number of a file, by its name."""
        numbers = [int(digits) for digits in file.split(".")[1:]]
        return (numbers[0], numbers[1]) if self.info.layered else (0, numbers[0])

    def remade_table(self, name: str) -> bytes | None:
        """A table that is lost or damaged, made again from the files of the chunks; None where it would not be what was committed."""
        held, info = self._tables, self.info
        lengths = self._lengths_of_chunks(lost=name)
        if lengths is None:
            return None
        made = bytearray()
        for layer in range(info.shape[0] if info.layered else 1):
            for block in range(info.n_blocks):
                first = info.first_in_shard(block)
                start = sum(lengths[layer, other] for other in range(first, block))
                key = f"{self.path}/{info.file_of(layer, block)}"
                try:
                    data = self.storage.read_ranges(key, [(start, start + lengths[layer, block])])[0]
                except FileNotFoundError:
                    return None
                if len(data) != lengths[layer, block] or len(data) < 4:
                    return None
                if name == CHUNK_TABLE:
                    made += len(data).to_bytes(4, "little") + bytes(memoryview(data)[-4:])
                else:
                    record = block_record(memoryview(data)[:-4], info, held.block_nbytes)
                    if record is None:
                        return None
                    made += record.tobytes()
        entry = self.files.get(f"{self.name}/{name}", _UNKNOWN)
        return bytes(made) if (len(made), crc32c(bytes(made))) == tuple(entry) else None

    def _lengths_of_chunks(self, lost: str) -> dict[tuple[int, int], int] | None:
        """Length of each chunk without one of the tables: by the other, by the files where each holds one chunk, or by their indexes."""
        info = self.info
        every = [(layer, block) for layer in range(info.shape[0] if info.layered else 1) for block in range(info.n_blocks)]
        try:
            if lost == BLOCK_TABLE:
                chunks = self.chunk_table()
                return {at: chunks.entry(*at)[0] for at in every}
            if self.has_blocks:
                blocks = self.block_table()
                return {at: int(blocks.record(*at)[0]) for at in every}
        except CorruptPartError:
            pass
        sizes = self.storage.sizes(self.path, info.file_names())
        if not info.shard_blocks:
            return {at: sizes.get(info.file_of(*at), 0) for at in every}
        found: dict[tuple[int, int], int] = {}
        for layer, block in every:
            if block != info.first_in_shard(block):
                continue
            file, n = info.file_of(layer, block), min(info.shard_blocks, info.n_blocks - block)
            end = sizes.get(file, 0)
            if end < info.shard_index_nbytes:
                return None
            tail = self.storage.read_ranges(f"{self.path}/{file}", [(end - info.shard_index_nbytes, end)])[0]
            lengths = lengths_in_index(tail, n)
            if lengths is None:
                return None
            found |= {(layer, block + i): length for i, length in enumerate(lengths)}
        return found

    def corrupt(self, file: str, what: str) -> CorruptPartError:
        """The error for a file that is damaged."""
        variable = self.path.rpartition("/")[2]
        kind = "chunk " if file.startswith("c.") else ""
        return CorruptPartError.of(
            self.storage.url,
            self.part,
            f"part {self.part!r} of {self.storage.url} is damaged: {kind}{file} of {variable!r} {what}\n"
            + (
                "nothing was read from it; repair() removes it and lists its prompts, or extract them again with refresh=True"
                if kind
                else "nothing was read from it; repair() writes the table again where the chunks are whole"
            ),
        )

    def fetch(self, file: str, call: Callable[[str], T]) -> T:
        """The result of a call for a file of the array; its errors name the part."""
        try:
            return call(f"{self.path}/{file}")
        except FileNotFoundError as error:
            if not self.storage.is_file(f"{self.part}/zarr.json"):
                raise PartGoneError(
                    f"part {self.part!r} of {self.storage.url} was deleted after this view was opened: open the store again"
                ) from error
            raise self.corrupt(file, "is missing") from error
        except OSError as error:
            if isinstance(error, LmprobeZarrError | PermissionError):
                raise
            raise self.corrupt(file, f"cannot be read ({error.strerror or error})") from error
