"""Frames of blosc (version 1): checked before blosc decodes them, and decoded in part, so that a few rows do not cost a whole chunk.

A frame is a header of 16 bytes, the place of each block as int32, and the blocks, each of which is decoded by itself. Neighbouring blocks
behind a new header are a frame again. This is how part of a chunk is decoded, since numcodecs has no function for it. The layout is that
of ``README_CHUNK_FORMAT.rst`` in c-blosc.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import numpy as np
from numcodecs import blosc

__all__ = ["Frame", "check_frame", "decode_range", "header_of", "in_one_thread", "in_order"]

_HEADER: Final = struct.Struct("<4B3I")  # version, version of the codec, flags, typesize; bytes decoded, of a block, of the frame
_COPIED: Final = 2  # flag: stored as it was, right behind the header
_UNSPLIT: Final = 16  # flag: the bytes of the items of a block are compressed together, as those of a shorter last block always are
_FILTERS: Final = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 4}  # flags
_LZ4: Final = 1 << 5  # flag


def check_frame(frame: memoryview, *, exactly: int | None = None, at_most: int = 0) -> None:
    """Raise ValueError where a frame would make blosc read or write out of bounds, since blosc trusts the header.

    Parameters
    ----------
    frame : memoryview
        The frame to decode.
    exactly, at_most : int
        How many decoded bytes its header may state.
    """
    if len(frame) < _HEADER.size:
        raise ValueError("no header")
    *_, flags, _, decoded, _, encoded = _HEADER.unpack_from(frame)
    if encoded != len(frame) or (flags & _COPIED and encoded != decoded + _HEADER.size):
        raise ValueError("another length in the header")
    if (decoded > at_most) if exactly is None else (decoded != exactly):
        raise ValueError("another size in the header")


def decode_range(frame: memoryview, start: int, stop: int, room: memoryview) -> memoryview:
    """Bytes `start` to `stop` of a decoded frame, of which only the blocks that hold them are decoded.

    Parameters
    ----------
    frame : memoryview
        One that `check_frame` accepts.
    start, stop : int
        Places within the decoded bytes.
    room : memoryview of bytes
        A buffer of the size of all decoded bytes. The result is a view of it, or of the frame.

    Raises
    ------
    ValueError, RuntimeError
        The frame is damaged.
    """
    header = Frame.of(frame)
    decoded, block = header.decoded, header.block_nbytes
    if header.is_copied:
        return frame[_HEADER.size + start : _HEADER.size + stop]
    if not block:
        raise ValueError("blocks of no bytes")
    places = np.frombuffer(frame, "<i4", -(-decoded // block), _HEADER.size)
    # Where several threads compressed the frame, its blocks are in the order in which they were ready.
    bounds = sorted([*places.tolist(), len(frame)])
    if bounds[0] < _HEADER.size + places.nbytes or bounds[-1] > len(frame):
        raise ValueError("blocks that lie elsewhere")
    ends = dict(pairwise(bounds))
    first, last = start // block, -(-stop // block)
    if 2 * (last - first) > len(places):  # copying so many blocks costs as much as decoding the others
        blosc.decompress(frame, room)
        return room[start:stop]
    held = min(last * block, decoded) - first * block
    blocks = [frame[place : ends[place]] for place in places[first:last].tolist()]
    with in_one_thread():
        blosc.decompress(b"".join([header_of(header.head, [len(each) for each in blocks], block, held), *blocks]), room[:held])
    return room[start - first * block : stop - first * block]


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Let blosc work in the caller's thread alone, where it would start threads of its own.

    It does so in the main thread only, whatever the size: half a megabyte is decoded in two thirds of the time without them, and they are
    in the way where several chunks are worked on at the same time. No other thread changes the setting, so none is restored wrongly.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, blosc.use_threads = blosc.use_threads, False
    try:
        yield
    finally:
        blosc.use_threads = before


class Frame(NamedTuple):
    """What the header of a frame says.

    Parameters
    ----------
    head : int
        Its first four bytes, versions, flags and typesize, as a little-endian number.
    decoded, block_nbytes : int
        Bytes of the frame and of a block, decoded.
    """

    head: int
    decoded: int
    block_nbytes: int

    @classmethod
    def of(cls, frame: memoryview) -> Frame:
        """The header of a frame that blosc made."""
        *_, decoded, block, _ = _HEADER.unpack_from(frame)
        return cls(int.from_bytes(frame[:4], "little"), decoded, block)

    @property
    def is_copied(self) -> bool:
        """Whether the bytes stand behind the header as they were."""
        return bool(self.head >> 16 & _COPIED)

    def is_of(self, shuffle: str, itemsize: int) -> bool:
        """Whether its head is one that our writer's blosc makes: lz4 with that filter, of items of that size."""
        flags = _FILTERS[shuffle] | _LZ4
        return self.head & ~((_COPIED | _UNSPLIT) << 16) == int.from_bytes(bytes([2, 1, flags, itemsize]), "little")

    def first_byte(self, n_blocks: int) -> int:
        """Where the first of its blocks begins."""
        return _HEADER.size + (0 if self.is_copied else 4 * n_blocks)

    def bounds(self, frame: memoryview, block_nbytes: int) -> list[int]:
        """Where its blocks begin, and its end; of a frame that was copied, as if it had blocks of `block_nbytes`."""
        if self.is_copied:
            return [*range(_HEADER.size, len(frame), block_nbytes), len(frame)]
        places = np.frombuffer(frame, "<i4", -(-self.decoded // self.block_nbytes), _HEADER.size)
        return [*places.tolist(), len(frame)]


def in_order(frame: bytes) -> bytes:
    """The same frame with its blocks in their order: where several threads compress, they are in the order in which they were ready."""
    header = Frame.of(memoryview(frame))
    if header.is_copied:
        return frame
    bounds = header.bounds(memoryview(frame), header.block_nbytes)
    if bounds == sorted(bounds):
        return frame
    ends = dict(pairwise(sorted(bounds)))
    blocks = [frame[place : ends[place]] for place in bounds[:-1]]
    first = header.first_byte(len(blocks))
    places = first + np.cumsum([0, *(len(block) for block in blocks[:-1])])
    return b"".join([frame[: _HEADER.size], places.astype("<i4").tobytes(), *blocks])


def header_of(head: int, lengths: Sequence[int], block_nbytes: int, decoded: int) -> bytes:
    """What stands before some blocks of a frame, end to end, so that they are a frame again.

    Parameters
    ----------
    head : int
        As in `Frame`, of the frame that they are from; one that was not copied.
    lengths : sequence of int
        Of each block, in their order. A shorter last one of the frame may stand alone.
    block_nbytes : int
        Decoded bytes of each but a shorter last one.
    decoded : int
        Decoded bytes of all together.
    """
    version, codec, flags, typesize = head.to_bytes(4, "little")
    if len(lengths) == 1 and decoded < block_nbytes:
        # Alone it is no rest after whole blocks, by which blosc would recognise how it is coded.
        flags, block_nbytes = flags | _UNSPLIT, decoded
    places = [*accumulate(lengths, initial=_HEADER.size + 4 * len(lengths))]
    header = _HEADER.pack(version, codec, flags, typesize, decoded, block_nbytes, places.pop())
    return header + np.array(places, "<i4").tobytes()
