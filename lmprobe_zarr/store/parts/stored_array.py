"""`StoredArray`, one array of one part: its chunks checked and decoded into arrays, several at a time. Knows no prompt.

Chunks are read by key and decoded straight into the output array. That is faster than a general reader, and a missing chunk is an error,
never fill values.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numcodecs import blosc
from numcodecs.vlen import VLenUTF8

from lmprobe_zarr.batch import copy_rows, fill_value
from lmprobe_zarr.errors import CorruptPartError, LmprobeZarrError, PartGoneError
from lmprobe_zarr.storage import Storage, empty_aligned, run_all
from lmprobe_zarr.store.format import TEXT_BYTES, ArrayInfo, check_frame, decode_range, holds_checksum
from lmprobe_zarr.store.parts.columns import decode_column
from lmprobe_zarr.store.parts.kept_chunks import kept_chunk
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Piece", "StoredArray", "read_pieces"]
T = TypeVar("T")
Rows = slice | Ints
_room = threading.local()
#: Chunks of a local disk that together have fewer bytes are read by the caller's thread: another one takes some 50 microseconds to start.
_ALONE: Final = 2**18


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
    """

    storage: Storage
    path: str
    info: ArrayInfo
    files: Mapping[str, Sequence[int]]
    noted: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Only this array's entries are sent to another process.
        files = {key: self.files[key] for key in map(self._file_key, self.info.chunk_keys()) if key in self.files}
        return StoredArray, (self.storage, self.path, self.info, files, self.noted)

    def _file_key(self, chunk: str) -> str:
        return f"{self._name}/{chunk}"

    @functools.cached_property
    def part(self) -> str:
        """Key of the folder of its part."""
        return self.path.rsplit("/", 2)[0]

    @functools.cached_property
    def _name(self) -> str:
        return "/".join(self.path.rsplit("/", 2)[1:])

    @functools.cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.info.row_shape

    @functools.cached_property
    def nbytes_of_chunk(self) -> int:
        """Bytes of one decoded chunk; of texts, what its pointers take."""
        return math.prod(self._chunk_shape) * self.dtype.itemsize

    @functools.cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in memory; strings are objects."""
        return np.dtype(object if self.info.dtype == "string" else self.info.dtype)

    def _scratch(self) -> Array:
        """A buffer for one chunk, valid until this thread's next call: reusing it saves the page faults of a new allocation."""
        nbytes = self.nbytes_of_chunk
        room: Array = getattr(_room, "bytes", np.empty(0, np.uint8))
        if len(room) < nbytes:
            room = _room.bytes = empty_aligned((nbytes,), np.dtype(np.uint8))
        return room[:nbytes]

    def corrupt(self, key: str, what: str) -> CorruptPartError:
        """The error for a chunk that is damaged."""
        variable = self.path.rpartition("/")[2]
        return CorruptPartError.of(
            self.storage.url,
            self.part,
            f"part {self.part!r} of {self.storage.url} is damaged: chunk {key} of {variable!r} {what}\n"
            "nothing was read from it; extract its prompts again with refresh=True",
        )

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
        key = self.info.chunk_key(layer, block)
        is_text = self.info.dtype == "string"
        if self.info.shuffle is None and not is_text and np.little_endian:
            return self._read_raw(key, empty_aligned(self._chunk_shape, self.dtype) if out is None else out)
        # Texts are decoded as a whole, so every read of some is one of the whole chunk.
        body = self._read_kept(key) if is_text else self._read_body(key)
        try:
            return self._decode(body, out)
        except (ValueError, RuntimeError, UnicodeDecodeError) as error:
            raise self.corrupt(key, f"cannot be decoded ({error})") from error

    def read_rows(self, layer: int, block: int, rows: slice) -> Array:
        """Some rows of one chunk, shape (row, …), valid until this thread reads another.

        The whole chunk is checked, but only the blocks of these rows are decoded. Errors are those of `read_chunk`.
        """
        if self.info.dtype == "string":
            return self.read_chunk(layer, block)[rows]
        room = self._scratch()
        key = self.info.chunk_key(layer, block)
        nbytes = len(room) // self.info.rows_per_chunk
        if self.info.shuffle is None and self.storage.is_slow and np.little_endian:
            body = self._read_kept(key)
            if len(body) != len(room):
                raise self.corrupt(key, f"holds {len(body)} bytes instead of {len(room)}")
            return np.frombuffer(body, self.dtype).reshape(self._chunk_shape)[rows]
        if self.info.shuffle is None or not np.little_endian:
            return self.read_chunk(layer, block, room.view(self.dtype).reshape(self._chunk_shape))[rows]
        body = self._read_kept(key)
        try:
            check_frame(body, exactly=len(room))
            values = decode_range(body, rows.start * nbytes, rows.stop * nbytes, room.data)
        except (ValueError, RuntimeError) as error:
            raise self.corrupt(key, f"cannot be decoded ({error})") from error
        return np.frombuffer(values, self.dtype).reshape(-1, *self.row_shape)

    def _read_kept(self, key: str) -> memoryview:
        """As `_read_body`, from what an earlier read of this process has kept, where a place is slow."""
        if not self.storage.is_slow:
            return self._read_body(key)
        where = (self.storage.url, self.path, key, *self.files.get(self._file_key(key), ()))
        return memoryview(kept_chunk(where, lambda: bytes(self._read_body(key))))

    def _read_body(self, key: str) -> memoryview:
        """The encoded bytes of a chunk, with their checksum verified; valid until this thread reads another."""
        length, checksum = self.files.get(self._file_key(key), (-1, -1))
        data = memoryview(self._fetch(key, self.storage.read_view))
        if len(data) != length or length < 4:
            raise self.corrupt(key, f"has {len(data)} bytes instead of {length}")
        body = data[:-4]
        if not holds_checksum(body, data[-4:], checksum):
            raise self.corrupt(key, "does not hold its checksum")
        return body

    def _read_raw(self, key: str, out: Array) -> Array:
        """A chunk that is not encoded, read from the file into the array without a copy in between."""
        length, checksum = self.files.get(self._file_key(key), (-1, -1))
        body, tail = out.reshape(-1).view(np.uint8), bytearray(4)
        found = self._fetch(key, lambda path: self.storage.read_into(path, body.data, memoryview(tail)))
        if found != length or length != len(body) + 4:
            raise self.corrupt(key, f"has {found} bytes instead of {length}")
        if not holds_checksum(body.data, memoryview(tail), checksum):
            raise self.corrupt(key, "does not hold its checksum")
        return out

    def _fetch(self, key: str, call: Callable[[str], T]) -> T:
        """The result of a call for a chunk's file; its errors name the part."""
        try:
            return call(f"{self.path}/{key}")
        except FileNotFoundError as error:
            if not self.storage.is_file(f"{self.part}/zarr.json"):
                raise PartGoneError(
                    f"part {self.part!r} of {self.storage.url} was deleted after this view was opened: open the store again"
                ) from error
            raise self.corrupt(key, "is missing") from error
        except OSError as error:
            if isinstance(error, LmprobeZarrError | PermissionError):
                raise
            raise self.corrupt(key, f"cannot be read ({error.strerror or error})") from error

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


class Piece(NamedTuple):
    """Rows of one chunk and their place in the output: ``out[target] = chunk[rows]``, where `out` is of one layer.

    Rows shorter than `row_shape` are filled up.

    `column` is the dtype in which a column of the user's is shown; None for any other array, whose values are taken as they are stored.
    The output may have a wider dtype: each chunk is converted by the thread that reads it, while it is in the cache.
    """

    array: StoredArray
    layer: int
    block: int
    rows: Rows
    out: Array
    target: Rows
    row_shape: tuple[int, ...]
    column: np.dtype[Any] | None = None


def read_pieces(pieces: Sequence[Piece], columns: tuple[Any, ...]) -> None:
    """Read chunks into arrays, several at a time where they are large enough.

    Parameters
    ----------
    pieces : sequence of Piece
        What to read; no two write the same rows.
    columns : tuple
        Index of the axes after the first; empty for everything.

    Raises
    ------
    CorruptPartError, PartGoneError
        See `StoredArray.read_chunk`; the first one found.
    """
    local = all(piece.array.storage.is_local for piece in pieces)
    if len(pieces) == 1 or (local and sum(piece.array.nbytes_of_chunk for piece in pieces) < _ALONE):
        for piece in pieces:
            _read_piece(piece, columns)
    else:
        run_all([functools.partial(_read_piece, piece, columns) for piece in pieces], local=local)


def _read_piece(piece: Piece, columns: tuple[Any, ...]) -> None:
    chunk_rows, out = piece.array.info.rows_per_chunk, piece.out
    if isinstance(piece.rows, slice) and isinstance(piece.target, slice) and not columns:
        target = out[piece.target]
        whole = piece.rows.start == 0 and piece.rows.stop == chunk_rows
        if (
            whole
            and target.shape[1:] == piece.array.row_shape
            and target.dtype == piece.array.dtype
            and target.flags.c_contiguous
            and target.dtype != object
            and target.dtype.kind not in "mM"
        ):
            piece.array.read_chunk(piece.layer, piece.block, target)
            return
    chunk = _chunk_rows(piece)
    if piece.column is not None:
        try:
            chunk = decode_column(chunk, piece.array.info, piece.column)
        except ValueError as error:
            raise piece.array.corrupt(piece.array.info.chunk_key(piece.layer, piece.block), f"cannot be decoded ({error})") from error
    if piece.array.row_shape != piece.row_shape:
        filled = np.full((len(chunk), *piece.row_shape), fill_value(chunk.dtype), chunk.dtype)
        filled[(slice(None), *map(slice, piece.array.row_shape))] = chunk
        chunk = filled
    copy_rows(chunk, out, piece.target, columns)


def _chunk_rows(piece: Piece) -> Array:
    rows = piece.rows
    if isinstance(rows, slice):
        return piece.array.read_rows(piece.layer, piece.block, rows)
    start, stop = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
    return piece.array.read_rows(piece.layer, piece.block, slice(start, stop))[rows - start]
