"""TODO: lmprobe_zarr/store/format/chunk.py."""

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
from lmprobe_zarr.typing import Array, Buffer

__all__ = ["TEXT_BYTES", "encode_chunk", "file_entry", "is_intact"]

_SHUFFLES: Final = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
CRC: Final = struct.Struct("<I")
TEXT_BYTES: Final = 2**28  # of all texts in one chunk


def encode_chunk(values: Array, info: ArrayInfo) -> tuple[Buffer, bytes]:
    """The bytes of one chunk file, in two pieces: the body, which may be the values themselves, and its crc32c.

    Parameters
    ----------
    values : ndarray, shape `info.chunks` or shorter along the sample axis
        A last, shorter chunk is filled up with the fill value, as Zarr stores chunks at full size.
    info : ArrayInfo
        Says the dtype and the codecs.
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
        body = blosc.compress(body, cname, 5, _SHUFFLES[info.shuffle], 0, 1 if info.dtype == "string" else np.dtype(info.dtype).itemsize)
    checksum = CRC.pack(google_crc32c.value(body))
    return body if isinstance(body, bytes) else body.data, checksum


def file_entry(data: bytes, *, chunk: bool) -> tuple[int, int]:
    """Length and crc32c of a file as a part's table has them; see `schema.PartInfo.files`."""
    return len(data), CRC.unpack(data[-4:])[0] if chunk else google_crc32c.value(data)


def is_intact(name: str, data: Buffer, entry: Sequence[int]) -> bool:
    """Whether a file of a part is what its commit says, by its name and its entry in the part's table."""
    chunk = name.rpartition("/")[2].startswith("c.")
    if len(data) != entry[0] or (chunk and len(data) < 4):
        return False
    body = memoryview(data)[:-4] if chunk else memoryview(data)
    checksum = int(google_crc32c.value(np.frombuffer(body, np.uint8))) if len(body) else 0
    return checksum == entry[1] and (not chunk or CRC.unpack(bytes(data[-4:]))[0] == entry[1])
