"""Frames of blosc (version 1): checked before blosc decodes them, and decoded in part, so that a few rows do not cost a whole chunk.

A frame is a header of 16 bytes, the place of each block as int32, and the blocks, each of which is decoded by itself. Neighbouring blocks
behind a new header are a frame again. This is how part of a chunk is decoded, since numcodecs has no function for it. The layout is that
of ``README_CHUNK_FORMAT.rst`` in c-blosc.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

import numpy as np
from numcodecs import blosc

__all__ = ["check_frame", "decode_range"]

_HEADER: Final = struct.Struct("<4B3I")  # version, version of the codec, flags, typesize; bytes decoded, of a block, of the frame
_COPIED: Final = 2  # flag: stored as it was, right behind the header


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
    version, codec, flags, typesize, decoded, block, _ = _HEADER.unpack_from(frame)
    if flags & _COPIED:
        return frame[_HEADER.size + start : _HEADER.size + stop]
    if not block:
        raise ValueError("blocks of no bytes")
    places = np.frombuffer(frame, "<i4", -(-decoded // block), _HEADER.size)
    # Where several threads compressed the frame, its blocks are in the order in which they were ready.
    bounds = sorted([*places.tolist(), len(frame)])
    if bounds[0] < _HEADER.size + places.nbytes or bounds[-1] > len(frame):
        raise ValueError("blocks that lie elsewhere")
    ends = dict(pairwise(bounds))
    # A shorter last block is coded differently. Blosc recognises it as the rest after whole blocks, so it is never decoded alone.
    first = min(start // block, max(decoded // block - 1, 0))
    last = -(-stop // block)
    if 2 * (last - first) > len(places):  # copying so many blocks costs as much as decoding the others
        blosc.decompress(frame, room)
        return room[start:stop]
    held = min(last * block, decoded) - first * block
    blocks = [frame[place : ends[place]] for place in places[first:last].tolist()]
    length = _HEADER.size + 4 * len(blocks)
    new = [length, *(length + np.cumsum([len(each) for each in blocks])).tolist()]
    header = _HEADER.pack(version, codec, flags, typesize, held, block, new[-1])
    blosc.decompress(b"".join([header, np.array(new[:-1], "<i4").tobytes(), *blocks]), room[:held])
    return room[start - first * block : stop - first * block]
