"""Named arrays and texts in one safetensors file, in memory. Never what they mean, and never a place where files lie.

The format: the length of the header in bytes as a little-endian uint64; the header, a JSON object from name to ``{"dtype",
"shape", "data_offsets"}`` and from ``__metadata__`` to an object of texts; the values, little-endian, in C order, without a gap.

Source: https://github.com/huggingface/safetensors#format. Its own package is not needed: it is an optional one here, and ours
also bounds what a hostile file can make it do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr.errors import NotAProbeError

__all__ = ["LARGEST_HEADER", "pack_tensors", "parse_json", "unpack_tensors"]

Array = npt.NDArray[Any]

_METADATA = "__metadata__"
#: Bytes. A header holds names and shapes, so that even a large one is small; parsed, it may take some 30 times as much.
LARGEST_HEADER = 4 << 20
_MOST_DIMENSIONS = 8
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def pack_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """One safetensors file.

    Parameters
    ----------
    tensors : mapping of name to ndarray
        Truth values, whole numbers or floats of at most 64 bits, of any byte order.
    metadata : mapping of str to str

    Raises
    ------
    TypeError
        An array of another dtype.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    values: list[bytes] = []
    end = 0
    # The widest first, so that each lies where a reader may use it in place.
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        little = array.dtype.newbyteorder("<")
        if little not in _NAMES:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which safetensors has no name for")
        values.append(array.astype(little, copy=False).tobytes())
        entries[name] = {"dtype": _NAMES[little], "shape": list(array.shape), "data_offsets": [end, end + len(values[-1])]}
        end += len(values[-1])
    header = json.dumps(entries, allow_nan=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *values])


def unpack_tensors(data: bytes, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays, each its own copy, and the metadata of a safetensors file.

    Memory is bounded by the size of `data`: every array must lie in it.

    Parameters
    ----------
    data : bytes
    where : str
        What the file is called in messages.

    Raises
    ------
    NotAProbeError
        It is no such file, or it is cut off or damaged.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or data[8:9] != b"{" or length > LARGEST_HEADER:
        remedy = "pickles, such as lmprobe's own probes, are never loaded" if data[:1] == b"\x80" else "give a file that save wrote"
        raise NotAProbeError(f"{where} is not a saved probe, which is a safetensors file: {remedy}")
    if length > len(data) - 8:
        raise NotAProbeError(f"{where} is cut off: its header has {length} bytes, of which {len(data) - 8} are there")
    entries = parse_json(data[8 : 8 + length], where)
    metadata = entries.pop(_METADATA, {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise NotAProbeError(f"{where} is damaged: its header is no table of tensors with texts as metadata")
    values = memoryview(data)[8 + length :]
    tensors: dict[str, Array] = {}
    spans = []
    for name, entry in entries.items():
        dtype, shape, start, end = _entry(name, entry, where)
        if not start <= end <= len(values) or end - start != math.prod(shape) * dtype.itemsize:
            raise NotAProbeError(
                f"{where} is cut off or damaged: tensor {name[:80]!r} of shape {shape} and {dtype} lies at bytes {start} to {end} "
                f"of {len(values)}"
            )
        tensors[name] = np.frombuffer(values[start:end], dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))
        spans.append((start, end))
    spans.sort()
    if [start for start, _ in spans] != [0, *(end for _, end in spans)][: len(spans)] or (spans[-1][1] if spans else 0) != len(values):
        raise NotAProbeError(f"{where} is damaged: its tensors overlap, or do not fill the {len(values)} bytes behind its header")
    return tensors, metadata


def _entry(name: str, entry: Any, where: str) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if isinstance(dtype, str) and dtype in _DTYPES and shape is not None and offsets is not None and len(offsets) == 2:
            # numpy refuses an empty array whose other axes are too long together.
            if math.prod(size or 1 for size in shape) >= 2**58:
                raise NotAProbeError(f"{where} is damaged: tensor {name[:80]!r} has shape {shape}")
            return np.dtype(_DTYPES[dtype]), shape, offsets[0], offsets[1]
    raise NotAProbeError(f"{where} is damaged: its header does not describe tensor {name[:80]!r}")


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        return None
    return tuple(value)


def parse_json(text: bytes | str, where: str) -> Any:
    """The value of a JSON text, which must be strict: no NaN, and no name twice in one object.

    Raises
    ------
    NotAProbeError
        It is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise NotAProbeError(f"{where} is damaged: its header is no JSON document ({error})") from error


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse_constant(number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
