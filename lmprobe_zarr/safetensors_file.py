"""The safetensors format: parses headers of untrusted files, and writes files. Needs neither torch nor safetensors.

A file consists of eight bytes (length of the header, little-endian), the header (a JSON object: tensor name to dtype, shape and byte
range) and the tensors, end to end. numpy has no bfloat16, so it is read as float32, which holds it exactly.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.typing import Array

__all__ = ["Header", "Tensor", "encode", "header_length", "itemsize_of", "narrow_bfloat16", "parse_header", "widen_bfloat16"]
# The format allows 100 MB, but parsing that would take a gigabyte of memory. This is enough for 100,000 tensors.
HEADER_BYTES: Final = 16 * 2**20
# Equal headers are parsed once, because all prompts of the same length have equal ones. Longer headers are not kept.
REMEMBERED_BYTES: Final = 2**16
ALIGNMENT: Final = 8
_LENGTH: Final = struct.Struct("<Q")
_NAMES: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_CODES: Final[Mapping[str, str]] = {name: code for code, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's dtype and shape, and its bytes in the file.

    Parameters
    ----------
    dtype : str
        Name of the numpy dtype, or ``bfloat16``; for an unknown dtype, the format's code.
    shape : tuple of int
    start, stop : int
        First byte, and the byte after the last, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """The parsed header of a file.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        By name, in the order of the header.
    metadata : mapping of str to str
        The ``__metadata__``.
    size : int
        Bytes of the whole file.
    raw : bytes
        The bytes of the length and the header, to notice a file that was replaced.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    raw: bytes = b""


def itemsize_of(dtype: str) -> int | None:
    """Bytes of one value; None for an unknown dtype."""
    if dtype == "bfloat16":
        return 2
    return np.dtype(dtype).itemsize if dtype in _CODES else None


def header_length(head: bytes) -> int:
    """Bytes of the header and its length field, from the first eight bytes of a file.

    Raises
    ------
    ValueError
        There are fewer than eight bytes, or the length is impossible.
    """
    if len(head) < _LENGTH.size:
        raise ValueError(f"it has {len(head)} bytes, which is too few for a safetensors file" if head else "it is empty")
    (length,) = _LENGTH.unpack_from(head)
    if not 2 <= length <= HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    return _LENGTH.size + int(length)


def parse_header(raw: bytes) -> Header:
    """The header of a file.

    Parameters
    ----------
    raw : bytes
        The first bytes of the file, exactly `header_length` of them.

    Raises
    ------
    ValueError
        The header violates the format: it is not a JSON object, has a name twice, or has a tensor whose bytes overlap another's, leave
        a gap, or do not match its dtype and shape.
    """
    return _parse_remembered(raw) if len(raw) <= REMEMBERED_BYTES else _parse(raw)


def _parse(raw: bytes) -> Header:
    try:
        return _read(raw, json.loads(raw[_LENGTH.size :], object_pairs_hook=_object, parse_constant=_no_constant))
    except (RecursionError, UnicodeDecodeError) as error:  # RecursionError may also come from formatting a message
        raise ValueError(f"its header is not JSON ({type(error).__name__})") from error


def _read(raw: bytes, document: object) -> Header:
    if not isinstance(document, dict):
        raise ValueError(f"its header is a JSON {type(document).__name__}, not an object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not an object of texts")
    tensors = {name: _parse_tensor(name, value, len(raw)) for name, value in document.items()}
    end = len(raw)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"tensor {name[:80]!r} begins at byte {tensor.start}, expected {end}")
        end = tensor.stop
    return Header(tensors, metadata, end, raw)


_parse_remembered = functools.lru_cache(maxsize=256)(_parse)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} occurs twice")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"its header holds {name}")


def _parse_tensor(name: str, value: object, base: int) -> Tensor:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], _numbers(name, value["shape"]), _numbers(name, value["data_offsets"])
    if not isinstance(code, str) or len(offsets) != 2 or len(shape) > 32:
        raise ValueError(f"tensor {name[:80]!r} has dtype {str(code)[:20]!r}, {len(shape)} dimensions, {len(offsets)} offsets")
    start, stop = offsets
    dtype = _NAMES.get(code, code[:20])
    size = itemsize_of(dtype)
    if stop < start or (size is not None and stop - start != math.prod(shape) * size):
        raise ValueError(f"tensor {name[:80]!r} of {code[:20]} {list(shape)} has {stop - start} bytes")
    return Tensor(dtype, shape, base + start, base + stop)


def _numbers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**53 for v in values):
        raise ValueError(f"tensor {name[:80]!r} has lengths {str(values)[:80]}")
    return tuple(values)


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    # Values that are exact already keep all bits, including the payload of a NaN.
    inexact = np.where(np.isnan(values), quiet, rounded)
    return np.where(bits & 0xFFFF == 0, bits >> 16, inexact).astype(np.uint16)


def encode(tensors: Mapping[str, tuple[Array, str]], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """A file, as buffers to write one after the other.

    Parameters
    ----------
    tensors : mapping of str to (ndarray, str)
        By name: values and the dtype to write, which is that of the values, or ``bfloat16`` for float32.
    metadata : mapping of str to str, optional
        The ``__metadata__``.
    """
    document: dict[str, Any] = {} if not metadata else {"__metadata__": dict(metadata)}
    buffers: list[bytes | memoryview] = []
    place = 0
    # Wide values first, as every writer of the format does, so that all tensors are aligned.
    for name, (values, dtype) in sorted(tensors.items(), key=lambda item: (-(itemsize_of(item[1][1]) or 0), item[0])):
        array = narrow_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, np.dtype(dtype).newbyteorder("<"))
        shape, array = list(np.shape(values)), np.ascontiguousarray(array)
        document[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
        if array.nbytes:
            buffers.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return [_LENGTH.pack(len(text)) + text, *buffers]
