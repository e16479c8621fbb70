"""Headers and tensors of safetensors files, read by ranges. The format itself is in `lmprobe_zarr.safetensors_file`."""

from __future__ import annotations

import numpy as np

from lmprobe_zarr.bridges.files import Files, Want
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.safetensors_file import Header, Tensor, header_length, itemsize_of, parse_header, widen_bfloat16
from lmprobe_zarr.typing import Array

__all__ = ["read_header", "read_tensor"]


def read_header(files: Files, key: str, *, size: int | None = None) -> tuple[Header, bytes]:
    """The header of a file, and the first bytes of the file, which may already contain small tensors.

    Parameters
    ----------
    files : Files
        The folder or prefix.
    key : str
        The file.
    size : int, optional
        Its length, if known from a listing.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    CorruptFileError
        It is damaged, cut off, or not a safetensors file.
    """
    head, length = files.head(key)
    size = length if length is not None else size
    try:
        needed = header_length(head)
        if size is not None and needed > size:
            raise ValueError(f"it has {size} bytes and a header of {needed}")
        if needed > len(head):
            rest = bytearray(needed - len(head))
            files.fill(key, [Want(len(head), memoryview(rest))])
            head += bytes(rest)
        header = parse_header(head[:needed])
        if size is not None and header.size != size:
            raise ValueError(f"it has {size} bytes, and its header says {header.size}")
    except ValueError as error:
        raise CorruptFileError(f"{files.url}/{key} is damaged: {error}") from error
    return header, head


def read_tensor(files: Files, key: str, tensor: Tensor) -> tuple[Array, str]:
    """A whole tensor, and its dtype in the file; bfloat16 is read as float32.

    Raises
    ------
    CorruptFileError
        The file ends too early, or the dtype is unknown.
    """
    if itemsize_of(tensor.dtype) is None:
        raise CorruptFileError(f"{files.url}/{key} holds values of {tensor.dtype}, a dtype that cannot be read here")
    values = np.empty(tensor.shape, "uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
    if values.size:
        files.fill(key, [Want(tensor.start, values.reshape(-1).view(np.uint8).data)])
    return (widen_bfloat16(values) if tensor.dtype == "bfloat16" else values), tensor.dtype
