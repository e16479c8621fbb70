"""The bytes of one chunk file and their checksum: bytes or vlen-utf8, then blosc, then crc32c. Never reads or writes a file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import google_crc32c
import numpy as np
from numcodecs import blosc
from numcodecs.vlen import VLenUTF8

from lmprobe_zarr.batch import fill_value
from lmprobe_zarr.store.format.array import ArrayInfo
from lmprobe_zarr.store.format.blosc_frame import in_order
from lmprobe_zarr.typing import Array, Buffer

__all__ = ["CRC", "TEXT_BYTES", "crc32c", "encode_body", "encode_chunk", "file_entry", "holds_checksum", "is_intact"]

_SHUFFLES: Final = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
CRC: Final = struct.Struct("<I")
TEXT_BYTES: Final = 2**28  # the most that the texts of one chunk may have


def encode_chunk(values: Array, info: ArrayInfo) -> tuple[Buffer, bytes]:
    """The bytes of one chunk file, in two pieces: the body, as `encode_body` makes it, and its crc32c."""
    body = encode_body(values, info)
    return body, CRC.pack(crc32c(body))


def encode_body(values: Array, info: ArrayInfo, block_nbytes: int = 0) -> Buffer:
    """The bytes of one chunk without its checksum, which may be the values themselves.

    Parameters
    ----------
    values : ndarray, shape `info.chunks` or shorter along the sample axis
        A shorter last chunk is filled up with the fill value, as Zarr stores chunks at full size.
    info : ArrayInfo
        Gives the dtype and the codecs.
    block_nbytes : int
        Decoded bytes of a block, in their order; 0 for those that blosc chooses.
    """
    missing = info.rows_per_chunk - values.shape[info.sample_axis]
    if missing:
        shape = (*values.shape[: info.sample_axis], missing, *values.shape[info.sample_axis + 1 :])
        # Not np.pad, which would fill an array of texts with numpy's own strings.
        values = np.concatenate([values, np.full(shape, fill_value(info.dtype), values.dtype)], axis=info.sample_axis)
    body: Any
    if info.dtype == "string":
        body = bytes(VLenUTF8().encode(values.astype(object)))
        cname = b"zstd"
    else:
        body = np.ascontiguousarray(values, np.dtype(info.dtype).newbyteorder("<")).reshape(-1).view(np.uint8)
        cname = b"lz4"
    if info.shuffle is not None:
        itemsize = 1 if info.dtype == "string" else np.dtype(info.dtype).itemsize
        # Blosc multiplies the size that it is given by the item's, where lz4 compresses the bytes of items apart.
        body = blosc.compress(body, cname, 5, _SHUFFLES[info.shuffle], block_nbytes // itemsize, itemsize)
        body = in_order(body) if block_nbytes else body
    return body if isinstance(body, bytes) else body.data


def file_entry(data: bytes, *, chunk: bool) -> tuple[int, int]:
    """Length and crc32c of a file, as they stand in a part's table; see `PartInfo.files`."""
    return len(data), CRC.unpack(data[-4:])[0] if chunk else google_crc32c.value(data)


def holds_checksum(body: Buffer, tail: Buffer, checksum: int) -> bool:
    """Whether a chunk's body has the checksum that the part's table gives for it, and its last four bytes give the same."""
    return crc32c(body) == checksum and CRC.unpack(tail)[0] == checksum


def is_intact(name: str, data: Buffer, entry: Sequence[int]) -> bool:
    """Whether a file of a part has the length and the checksum that stand in the part's table."""
    length, checksum = entry
    if len(data) != length:
        return False
    if not name.rpartition("/")[2].startswith("c."):
        return crc32c(data) == checksum
    whole = memoryview(data)
    return length >= CRC.size and holds_checksum(whole[: -CRC.size], whole[-CRC.size :], checksum)


def crc32c(data: Buffer | Array) -> int:
    """The checksum of some bytes."""
    return int(google_crc32c.value(data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8))) if len(data) else 0
