"""Named arrays and texts as the bytes of one safetensors file. Knows neither what they mean nor where files are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmprobe_zarr.errors import NotAProbeError
from lmprobe_zarr.safetensors_file import Tensor, encode, header_length, itemsize_of, parse_header
from lmprobe_zarr.typing import Array

__all__ = ["LARGEST_HEADER", "pack_tensors", "parse_json", "unpack_tensors"]

#: Bytes. A header holds names and shapes only, so real ones are far smaller; parsed, it may take some 30 times as much memory.
LARGEST_HEADER = 4 << 20


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
    for name, array in tensors.items():
        if itemsize_of(array.dtype.name) is None:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which safetensors has no name for")
    return b"".join(encode({name: (array, array.dtype.name) for name, array in tensors.items()}, metadata))


def unpack_tensors(data: bytes, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays, each its own copy, and the metadata of a safetensors file.

    Memory is bounded by the size of `data`: every array must be inside it.

    Parameters
    ----------
    data : bytes
    where : str
        Name of the file in messages.

    Raises
    ------
    NotAProbeError
        The bytes are no such file, or it is cut off or damaged.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or data[8:9] != b"{" or length > LARGEST_HEADER:
        remedy = "pickles, such as lmprobe's own probes, are never loaded" if data[:1] == b"\x80" else "give a file that save wrote"
        raise NotAProbeError(f"{where} is not a saved probe, which is a safetensors file: {remedy}")
    if length > len(data) - 8:
        raise NotAProbeError(f"{where} is cut off: its header has {length} bytes, of which {len(data) - 8} are there")
    try:
        header = parse_header(data[: header_length(data)])
    except ValueError as error:
        raise NotAProbeError(f"{where} is damaged: {error}") from error
    if header.size != len(data):
        raise NotAProbeError(f"{where} is cut off or damaged: it has {len(data)} bytes where its header says {header.size}")
    return {name: _array(data, name, tensor, where) for name, tensor in header.tensors.items()}, dict(header.metadata)


def _array(data: bytes, name: str, tensor: Tensor, where: str) -> Array:
    # numpy refuses even an empty array if the product of its other axes is too large.
    if tensor.dtype == "bfloat16" or itemsize_of(tensor.dtype) is None or math.prod(size or 1 for size in tensor.shape) >= 2**58:
        raise NotAProbeError(f"{where} is damaged: tensor {name[:80]!r} has shape {tensor.shape} and dtype {tensor.dtype}")
    little = np.dtype(tensor.dtype).newbyteorder("<")
    return np.frombuffer(data[tensor.start : tensor.stop], little).reshape(tensor.shape).astype(little.newbyteorder("="))


def parse_json(text: bytes | str, where: str) -> Any:
    """The value of a JSON text, which must be strict: no NaN, and no name twice in one object.

    Raises
    ------
    NotAProbeError
        The text is not strict JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise NotAProbeError(f"{where} is damaged: its header is no JSON document ({error})") from error


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse_constant(number)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
