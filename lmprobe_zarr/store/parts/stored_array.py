"""`StoredArray`, one array of one part: its chunks checked and decoded into arrays. Knows no prompt.

Chunks are read by key and decoded straight into the output array. That is faster than a general reader, and a missing chunk is an error,
never fill values. Where a part has a table of blocks, a few rows cost the blocks that hold them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from numcodecs.vlen import VLenUTF8

from lmprobe_zarr.batch import concat_ranges
from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError
from lmprobe_zarr.storage import KeptReads, Storage, empty_aligned
from lmprobe_zarr.store.format import (
    BLOCK_TABLE,
    TEXT_BYTES,
    ArrayInfo,
    ArrayTables,
    Frame,
    check_frame,
    crc32c,
    decode_range,
    header_of,
    holds_checksum,
    in_one_thread,
)
from lmprobe_zarr.store.parts.array_files import ArrayFiles, ChunkPlace
from lmprobe_zarr.store.parts.kept_chunks import is_wanted_whole, kept_chunk
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Rows", "StoredArray"]

#: Rows of a chunk: a range, or their numbers.
Rows = slice | Ints
#: A block: its number in the chunk, where it begins and ends in the file, and its checksum.
_Bounds = tuple[int, int, int, int]
_room = threading.local()
#: What an encoded chunk or block may have beyond its decoded bytes: blosc stores as it is what would grow.
_OVERHEAD: Final = 2**10


@dataclass(frozen=True, eq=False)
class StoredArray:
    """One array of one part in a storage.

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
    noted : bool
        Whether a reading of it is noted as a use of the part.
    tables : ArrayTables, optional
        What the part's document says of the array's own tables; None where its chunks are in `files`.
    kept : KeptReads, optional
        What is kept on this machine of the part's files. It is used only after it was compared with the checksum that the part's tables
        have for it, and only what was compared is kept.
    """

    storage: Storage
    path: str
    info: ArrayInfo
    files: Mapping[str, Sequence[int]]
    noted: bool = False
    tables: ArrayTables | None = None
    kept: KeptReads | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.where, self.noted)

    @functools.cached_property
    def where(self) -> ArrayFiles:
        """Where its chunks and blocks lie."""
        return ArrayFiles(self.storage, self.path, self.info, self.files, self.tables, self.kept)

    @functools.cached_property
    def part(self) -> str:
        """Key of the folder of its part."""
        return self.where.part

    @functools.cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.info.row_shape

    @functools.cached_property
    def row_nbytes(self) -> int:
        """Bytes of one row; of texts, what its pointers take."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @functools.cached_property
    def nbytes_of_chunk(self) -> int:
        """Bytes of one decoded chunk; of texts, what its pointers take."""
        return math.prod(self._chunk_shape) * self.dtype.itemsize

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in memory; strings are objects."""
        return np.dtype(object if self.info.dtype == "string" else self.info.dtype)

    def work_of(self, rows: Rows) -> int:
        """What reading some rows of a chunk takes of a thread, in bytes of a whole chunk.

        Of reading blocks much is Python, which threads do not share. Measured: two threads paid from 2 to 4 MiB on where blocks are
        decoded, and not with 16 MiB where they are only read.
        """
        size = self.where.block_nbytes
        if not size:
            return self.nbytes_of_chunk
        nbytes = (rows.stop - rows.start) * self.row_nbytes + size if isinstance(rows, slice) else len(rows) * max(size, self.row_nbytes)
        return min(self.nbytes_of_chunk, nbytes) // (8 if self.info.shuffle else 128)

    def keeps_chunk(self, layer: int, block: int) -> bool:
        """Whether a chunk is kept on this machine, so that reading it needs no request."""
        if self.kept is None or not self.where.keeps_chunk_table:
            return False
        try:
            place = self.where.chunk(layer, block)
        except (LmprobeZarrError, OSError):
            return False  # who reads the chunk gets the error
        return self.kept.holds(f"{self.where.name}/{place.file}", place.start, place.start + place.length)

    def _scratch(self, nbytes: int | None = None, what: str = "decoded") -> Array:
        """A buffer, by default for one chunk, valid until this thread's next call: reusing it saves the page faults of a new allocation."""
        nbytes = self.nbytes_of_chunk if nbytes is None else nbytes
        room: Array | None = getattr(_room, what, None)
        if room is None or len(room) < nbytes:
            room = empty_aligned((nbytes,), np.dtype(np.uint8))
            setattr(_room, what, room)
        return room[:nbytes]

    def read_chunk(self, layer: int, block: int, out: Array | None = None) -> Array:
        """One decoded chunk, shape (rows_per_chunk, …) without the layer axis.

        Parameters
        ----------
        layer, block : int
            Which stored layer, which chunk of rows.
        out : ndarray, optional
            Contiguous, of the array's dtype and the chunk's size: decoded into directly, and returned.

        Raises
        ------
        CorruptPartError
            The chunk is missing, truncated or changed.
        PartGoneError
            The whole part has been deleted since it was opened.
        """
        try:
            return self._read_whole(layer, block, out)
        except CorruptPartError:
            # Where only the table of chunks, the checksum of the chunk or what stands before its blocks is damaged, nothing is lost.
            every = slice(0, self.info.rows_per_chunk)
            found = self._read_by_blocks(layer, block, every, only=True) if self.where.has_blocks and np.little_endian else None
            if found is None:
                raise
        if out is None:
            return found.copy()
        out[:] = found
        return out

    def _read_whole(self, layer: int, block: int, out: Array | None) -> Array:
        key, place = self.info.chunk_key(layer, block), self.where.chunk(layer, block)
        is_text = self.info.dtype == "string"
        if self.info.shuffle is None and not is_text and np.little_endian:
            return self._read_raw(key, place, empty_aligned(self._chunk_shape, self.dtype) if out is None else out)
        # Texts are decoded as a whole, so every read of some is one of the whole chunk.
        body = self._read_kept(key, place) if is_text else self._read_body(key, place)
        try:
            return self._decode(body, out)
        except (ValueError, RuntimeError, UnicodeDecodeError) as error:
            raise self.corrupt(key, f"cannot be decoded ({error})") from error

    def read_rows(self, layer: int, block: int, rows: Rows) -> Array:
        """Some rows of one chunk, shape (row, …), valid until this thread reads another.

        Only the blocks of these rows are read, where the part has a table of blocks and they are few. Otherwise the whole chunk is read
        and checked, and the blocks between the first and the last row are decoded. Errors are those of `read_chunk`.
        """
        if self.info.dtype == "string":
            return self.read_chunk(layer, block)[rows]
        if (rows.stop <= rows.start) if isinstance(rows, slice) else not len(rows):
            return np.empty((0, *self.row_shape), self.dtype)
        if not self.where.has_blocks or not np.little_endian:
            return self._read_some(layer, block, rows)
        # Where one of both ways is damaged, the other is left.
        try:
            found = self._read_by_blocks(layer, block, rows)
        except CorruptPartError as error:
            try:
                return self._read_some(layer, block, rows)
            except CorruptPartError:
                raise error from None
        if found is not None:
            return found
        try:
            return self._read_some(layer, block, rows)
        except CorruptPartError:
            found = self._read_by_blocks(layer, block, rows, only=True)
            if found is None:
                raise
            return found

    def damaged_rows(self, layer: int, block: int) -> list[slice]:
        """The rows of a chunk that cannot be read in any way."""
        every = slice(0, self.info.rows_per_chunk)
        try:
            self._read_whole(layer, block, None)
        except CorruptPartError:
            if not self.where.has_blocks or not np.little_endian:
                return [every]
        else:
            return []  # its file is damaged elsewhere: in another chunk of the shard, or in the shard's index
        each, found = max(1, self.where.block_nbytes // self.row_nbytes), []
        for start in range(0, every.stop, each):
            rows = slice(start, min(start + each, every.stop))
            try:
                if self._read_by_blocks(layer, block, rows, only=True) is None:
                    return [every]
            except CorruptPartError:
                found.append(rows)
        return found

    def _read_some(self, layer: int, block: int, rows: Rows) -> Array:
        """Some rows from the whole chunk."""
        if isinstance(rows, slice):
            return self._read_range(layer, block, rows)
        start, stop = int(rows.min()), int(rows.max()) + 1
        return self._read_range(layer, block, slice(start, stop))[rows - start]

    def _read_range(self, layer: int, block: int, rows: slice) -> Array:
        """Neighbouring rows, from the whole chunk."""
        room = self._scratch()
        key = self.info.chunk_key(layer, block)
        nbytes = len(room) // self.info.rows_per_chunk
        if self.info.shuffle is None and self.storage.is_slow and np.little_endian:
            body = self._read_kept(key, self.where.chunk(layer, block))
            if len(body) != len(room):
                raise self.corrupt(key, f"holds {len(body)} bytes instead of {len(room)}")
            return np.frombuffer(body, self.dtype).reshape(self._chunk_shape)[rows]
        if self.info.shuffle is None or not np.little_endian:
            return self.read_chunk(layer, block, room.view(self.dtype).reshape(self._chunk_shape))[rows]
        body = self._read_kept(key, self.where.chunk(layer, block))
        try:
            check_frame(body, exactly=len(room))
            values = decode_range(body, rows.start * nbytes, rows.stop * nbytes, room.data)
        except (ValueError, RuntimeError) as error:
            raise self.corrupt(key, f"cannot be decoded ({error})") from error
        return np.frombuffer(values, self.dtype).reshape(-1, *self.row_shape)

    # ----------------------------------------------------------------------------------------------------------- blocks

    def _read_by_blocks(self, layer: int, block: int, rows: Rows, *, only: bool = False) -> Array | None:
        """Some rows from the blocks that hold them; None where the whole chunk is the better way, unless `only` this one is left."""
        size, nbytes = self.where.block_nbytes, self.row_nbytes
        n_blocks = -(-self.nbytes_of_chunk // size)
        if isinstance(rows, slice):
            # All that a last chunk holds: a read of a whole layer never needs the table of blocks.
            if not only and rows.start == 0 and rows.stop + block * self.info.rows_per_chunk == self.info.shape[self.info.sample_axis]:
                return None
            wanted = np.arange(rows.start * nbytes // size, -(-rows.stop * nbytes // size))
        else:
            wanted = _blocks_of_rows(rows, nbytes, size, n_blocks)
        # What the rest of a chunk costs to decode is about what it costs to read it in pieces.
        if 4 * len(wanted) > 3 * n_blocks and not only:
            return None
        if not only and self.storage.sends_whole_files and not self.info.shard_blocks:
            return None
        is_whole = self.storage.is_slow and not only and is_wanted_whole((self.storage.url, self.path, layer, block))
        if is_whole and self.kept is None:
            return None
        try:
            table = self.where.block_table()
        except CorruptPartError:
            return None  # the chunk has a checksum of its own, in the other table
        start, record = table.place(layer, block), table.record(layer, block)
        if is_whole and not self._holds_blocks_only(layer, block, wanted, start, record):
            return None
        data = self._fetch_blocks(layer, block, wanted, start, record)
        if isinstance(rows, slice):
            begin = rows.start * nbytes - int(wanted[0]) * size
            return np.frombuffer(data[begin : begin + (rows.stop - rows.start) * nbytes], self.dtype).reshape(-1, *self.row_shape)
        held = rows * nbytes // size
        begins = (wanted.searchsorted(held) - held) * size + rows * nbytes
        if size % nbytes == 0:
            return np.frombuffer(data, self.dtype).reshape(-1, *self.row_shape).take(begins // nbytes, axis=0)
        taken = np.frombuffer(b"".join([data[begin : begin + nbytes] for begin in begins.tolist()]), self.dtype)
        return taken.reshape(-1, *self.row_shape)

    def _fetch_blocks(self, layer: int, block: int, wanted: Ints, start: int, record: npt.NDArray[np.uint32]) -> memoryview:
        """The decoded bytes of some blocks of a chunk, end to end; each is checked."""
        key, size = self.info.chunk_key(layer, block), self.where.block_nbytes
        lengths = record[2::2].astype(np.int64)
        head = int(record[1])
        frame = None if self.info.shuffle is None else Frame(head, self.nbytes_of_chunk, size)
        if frame is not None and self.info.shuffle is not None and not frame.is_of(self.info.shuffle, self.dtype.itemsize):
            raise self.corrupt(key, "has another header in the table of blocks")
        begins, stops = _bounds_of_blocks(record, frame, start)
        begins, stops = begins[wanted], stops[wanted]
        # Blocks that follow one another are one range.
        cuts = np.flatnonzero(wanted[1:] != wanted[:-1] + 1) + 1
        firsts, lasts = np.append(0, cuts), np.append(cuts, len(wanted)) - 1
        ranges = list(zip(begins[firsts].tolist(), stops[lasts].tolist(), strict=True))
        numbers, checksums, sizes = wanted.tolist(), record[3::2][wanted].tolist(), lengths[wanted].tolist()
        # Read to where blosc looks for them, behind the header of a frame.
        is_frame = frame is not None and not frame.is_copied
        decoded = (len(numbers) - 1) * size + min(self.nbytes_of_chunk - numbers[-1] * size, size)
        if sum(sizes) > decoded + _OVERHEAD * len(sizes):
            raise self.where.corrupt(BLOCK_TABLE, f"has blocks of {max(sizes)} bytes, more than they can have")
        header = header_of(head, sizes, size, decoded) if is_frame else b""
        room = self._scratch(len(header) + sum(sizes), "encoded")
        data = room[len(header) :]
        file, held = self.info.file_of(layer, block), frozenset[int]()
        if self.kept is not None:
            bounds = [*zip(numbers, begins.tolist(), stops.tolist(), checksums, strict=True)]
            held = self._read_kept_blocks(file, (start, start + int(record[0])), bounds, data.data)
        if held:
            found = self._fill_others(file, bounds, held, data.data)
        else:
            read = functools.partial(self.storage.fill_ranges, ranges=ranges, target=data.data)
            found = self.where.fetch(file, read)
        place = 0
        for number, length, checksum in zip(numbers, sizes, checksums, strict=True):
            place += length
            if place > found:
                raise self.corrupt(key, f"ends in block {number}, or before it")
            if number not in held and crc32c(data[place - length : place]) != checksum:
                raise self.corrupt(key, f"does not hold the checksum of block {number}")
            if not is_frame and length != min(size, self.nbytes_of_chunk - number * size):
                raise self.corrupt(key, f"has another size of block {number} in its table")
        if self.kept is not None:
            self._keep_blocks(file, bounds, held, data.data)
        if not is_frame:
            return data.data
        room[: len(header)] = np.frombuffer(header, np.uint8)
        target = self._scratch()[:decoded]
        try:
            with in_one_thread():
                blosc.decompress(room, target)
        except (ValueError, RuntimeError) as error:
            raise self.corrupt(key, f"cannot be decoded ({error})") from error
        return target.data

    # ----------------------------------------------------------------------------------------------- kept on this machine

    def _holds_blocks_only(self, layer: int, block: int, wanted: Ints, start: int, record: npt.NDArray[np.uint32]) -> bool:
        """Whether some blocks are kept on this machine and their chunk is not, so that reading the chunk would need a request."""
        file = f"{self.where.name}/{self.info.file_of(layer, block)}"
        if self.kept is None or self.kept.holds(file, start, start + int(record[0])):
            return False
        frame = None if self.info.shuffle is None else Frame(int(record[1]), self.nbytes_of_chunk, self.where.block_nbytes)
        begins, stops = _bounds_of_blocks(record, frame, start)
        return all(map(functools.partial(self.kept.holds, file), begins[wanted].tolist(), stops[wanted].tolist()))

    def _read_kept_blocks(self, file: str, chunk: tuple[int, int], bounds: Sequence[_Bounds], target: memoryview) -> frozenset[int]:
        """Fill `target` with the blocks that are kept alone or in their chunk, each at its place; their numbers. Each is checked."""
        kept, key, held = self.kept, f"{self.where.name}/{file}", set[int]()
        if kept is None:
            return frozenset()
        place, is_chunk_kept = 0, kept.holds(key, *chunk)
        for number, begin, end, checksum in bounds:
            room = target[place : place + end - begin]
            place += end - begin
            for source, skip in (((begin, end), 0), (chunk, begin - chunk[0])):
                if number in held or (source == chunk and not is_chunk_kept) or not kept.read(key, *source, [room], skip=skip):
                    continue
                if crc32c(room) == checksum:
                    held.add(number)
                else:
                    kept.distrust(key, *source)
        return frozenset(held)

    def _fill_others(self, file: str, bounds: Sequence[_Bounds], held: frozenset[int], target: memoryview) -> int:
        """Fill `target` with the blocks that are not held, each at its place; returns how far it is filled."""
        missing = [(begin, end) for number, begin, end, _ in bounds if number not in held]
        read = functools.partial(self.storage.read_ranges, ranges=missing)
        found, place = iter(self.where.fetch(file, read) if missing else ()), 0
        for number, begin, end, _ in bounds:
            if number not in held:
                data = next(found)
                target[place : place + len(data)] = data
                if len(data) < end - begin:
                    return place + len(data)
            place += end - begin
        return place

    def _keep_blocks(self, file: str, bounds: Sequence[_Bounds], held: frozenset[int], data: memoryview) -> None:
        """Keep the blocks that were fetched and checked."""
        place = 0
        for number, begin, end, _ in bounds:
            if self.kept is not None and number not in held:
                self.kept.keep(f"{self.where.name}/{file}", begin, end, (data[place : place + end - begin],))
            place += end - begin

    def _read_kept_body(self, place: ChunkPlace) -> memoryview | None:
        """As `_read_body`, of a chunk that is kept; None where it is not."""
        key, bounds = f"{self.where.name}/{place.file}", (place.start, place.start + place.length)
        if self.kept is None or place.length < 4 or not self.kept.holds(key, *bounds):
            return None
        data = memoryview(self._scratch(place.length, "encoded").data)
        if not self.kept.read(key, *bounds, [data]):
            return None
        if holds_checksum(data[:-4], data[-4:], place.checksum):
            return data[:-4]
        self.kept.distrust(key, *bounds)
        return None

    def _read_kept_raw(self, place: ChunkPlace, body: memoryview) -> bool:
        """Whether a chunk that is not encoded is kept; `body` is filled with it."""
        key, bounds, tail = f"{self.where.name}/{place.file}", (place.start, place.start + place.length), memoryview(bytearray(4))
        if self.kept is None or place.length != len(body) + 4 or not self.kept.read(key, *bounds, [body, tail]):
            return False
        if holds_checksum(body, tail, place.checksum):
            return True
        self.kept.distrust(key, *bounds)
        return False

    def _keep(self, place: ChunkPlace, *data: memoryview) -> None:
        """Keep a chunk whose checksum was verified."""
        if self.kept is not None:
            self.kept.keep(f"{self.where.name}/{place.file}", place.start, place.start + place.length, data)

    # ----------------------------------------------------------------------------------------------------------- chunks

    def _read_kept(self, key: str, place: ChunkPlace) -> memoryview:
        """As `_read_body`, from what an earlier read of this process has kept, where a place is slow."""
        if not self.storage.is_slow:
            return self._read_body(key, place)
        where = (self.storage.url, self.path, *place)
        return memoryview(kept_chunk(where, lambda: bytes(self._read_body(key, place))))

    def _fetch_chunk(self, place: ChunkPlace) -> memoryview:
        """The bytes of a chunk, valid until this thread reads another."""
        if not self.info.shard_blocks:
            return memoryview(self.where.fetch(place.file, self.storage.read_view))
        if place.length > self.nbytes_of_chunk + _OVERHEAD:
            raise self.where.corrupt(place.file, f"should hold {place.length} bytes of one chunk, more than it can have")
        room = self._scratch(place.length, "encoded")
        read = functools.partial(self.storage.fill_ranges, ranges=[(place.start, place.start + place.length)], target=room.data)
        return memoryview(room.data)[: self.where.fetch(place.file, read)]

    def _read_body(self, key: str, place: ChunkPlace) -> memoryview:
        """The encoded bytes of a chunk, with their checksum verified; valid until this thread reads another."""
        held = None if self.kept is None else self._read_kept_body(place)
        if held is not None:
            return held
        data = self._fetch_chunk(place)
        if len(data) != place.length or place.length < 4:
            raise self.corrupt(key, f"has {len(data)} bytes instead of {place.length}")
        body = data[:-4]
        if not holds_checksum(body, data[-4:], place.checksum):
            raise self.corrupt(key, "does not hold its checksum")
        self._keep(place, data)
        return body

    def _read_raw(self, key: str, place: ChunkPlace, out: Array) -> Array:
        """A chunk that is not encoded, read from the file into the array without a copy in between."""
        body, tail = out.reshape(-1).view(np.uint8), bytearray(4)
        if self.kept is not None and self._read_kept_raw(place, body.data):
            return out
        if self.info.shard_blocks and self.storage.is_local:
            end = place.start + len(body)
            read = functools.partial(self.storage.fill_ranges, ranges=[(place.start, end)], target=body.data)
            found = self.where.fetch(place.file, read)
            read = functools.partial(self.storage.fill_ranges, ranges=[(end, end + 4)], target=memoryview(tail))
            found += self.where.fetch(place.file, read)
        elif self.info.shard_blocks:
            data = self._fetch_chunk(place)
            found = len(data)
            if found == len(body) + 4:
                body[:], tail[:] = np.frombuffer(data[:-4], np.uint8), data[-4:]
        else:
            found = self.where.fetch(place.file, lambda path: self.storage.read_into(path, body.data, memoryview(tail)))
        if found != place.length or place.length != len(body) + 4:
            raise self.corrupt(key, f"has {found} bytes instead of {place.length}")
        if not holds_checksum(body.data, memoryview(tail), place.checksum):
            raise self.corrupt(key, "does not hold its checksum")
        self._keep(place, body.data, memoryview(tail))
        return out

    def corrupt(self, key: str, what: str) -> CorruptPartError:
        """The error for a chunk that is damaged."""
        return self.where.corrupt(key, what)

    @functools.cached_property
    def _chunk_shape(self) -> tuple[int, ...]:
        return (self.info.rows_per_chunk, *self.info.row_shape)

    def _decode(self, body: memoryview, out: Array | None) -> Array:
        shape = self._chunk_shape
        if self.info.dtype == "string":
            if self.info.shuffle:
                check_frame(body, at_most=TEXT_BYTES + 4 * shape[0] + 4)
                body = memoryview(blosc.decompress(body))
            if int.from_bytes(body[:4], "little") != shape[0]:
                raise ValueError("another number of texts")
            texts = VLenUTF8().decode(body)
            if texts.shape != shape:
                raise ValueError(f"{texts.shape} texts instead of {shape}")
            return np.asarray(texts, object)
        target = np.empty(shape, self.dtype) if out is None else out
        if self.info.shuffle is None:  # only on big-endian machines
            if len(body) != target.nbytes:
                raise ValueError(f"{len(body)} bytes instead of {target.nbytes}")
            target.reshape(-1).view(np.uint8)[:] = np.frombuffer(body, np.uint8)
        else:
            check_frame(body, exactly=target.nbytes)
            blosc.decompress(body, target)
        return target if np.little_endian else target.byteswap(inplace=True)


def _bounds_of_blocks(record: npt.NDArray[np.uint32], frame: Frame | None, start: int) -> tuple[Ints, Ints]:
    """Where each block of a chunk begins and ends in its file, if the chunk begins at `start`."""
    lengths = record[2::2].astype(np.int64)
    stops = lengths.cumsum() + (start + (0 if frame is None else frame.first_byte(len(lengths))))
    return stops - lengths, stops


def _blocks_of_rows(rows: Ints, nbytes: int, size: int, n_blocks: int) -> Ints:
    """The blocks that hold some rows, ascending."""
    first, last = rows * nbytes // size, (rows * nbytes + nbytes - 1) // size
    if nbytes <= size:  # a row lies in two blocks at most
        held = np.zeros(n_blocks, bool)
        held[first] = held[last] = True
        return np.flatnonzero(held)
    return np.unique(concat_ranges(first, last - first + 1))


def _restore(where: ArrayFiles, noted: bool) -> StoredArray:
    return StoredArray(where.storage, where.path, where.info, where.files, noted, where.tables, where.kept)
