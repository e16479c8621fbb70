"""Uncompressed arrays in foreign files, read by ranges: one file per array, or one file per chunk. Never whole files, never a store."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from lmprobe_zarr.bridges.files import Files, Want
from lmprobe_zarr.errors import CorruptFileError, NotAStoreError
from lmprobe_zarr.safetensors_file import itemsize_of, widen_bfloat16
from lmprobe_zarr.typing import Array

__all__ = ["RawArray", "open_file_array", "open_zarr_array", "read_json", "size_of"]
JSON_BYTES: Final = 2**26
#: What an array of each version of Zarr says that its chunks are, if they hold nothing but the values.
_RAW_CODECS: Final = ([{"name": "bytes", "configuration": {"endian": "little"}}], [{"name": "bytes"}])


@dataclass(frozen=True, slots=True, kw_only=True)
class RawArray:
    """An array in row-major order, in one file or cut into chunks of one file each.

    Parameters
    ----------
    files : Files
        The folder or prefix.
    key : str
        The file; of chunks, what their names begin with.
    dtype : str
        A numpy dtype, or ``bfloat16``. Values are little-endian.
    shape : tuple of int
    start : int
        The byte of the file at which the values start.
    chunks : tuple of int, optional
        Shape of a chunk; None for an array in one file.
    separator : str
        Between the numbers in the name of a chunk.
    """

    files: Files
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    chunks: tuple[int, ...] | None = None
    separator: str = "/"

    def rows(self, at: tuple[int, ...], start: int, stop: int) -> Array:
        """The rows `start` to `stop` along the axis after those that `at` gives an index of, shape (stop - start, …).

        bfloat16 is read as float32.

        Raises
        ------
        CorruptFileError
            A file is missing or ends too early.
        """
        axis = len(at)
        grid = self.shape if self.chunks is None else self.chunks
        row = math.prod(self.shape[axis + 1 :])
        out = np.empty((max(0, stop - start), *self.shape[axis + 1 :]), "uint16" if self.dtype == "bfloat16" else self.dtype)
        flat = out.reshape(-1).view(np.uint8)
        itemsize, length = itemsize_of(self.dtype) or 0, grid[axis]
        for number in range(start // length, -(-stop // length)) if out.size else ():
            low, high = max(start, number * length), min(stop, (number + 1) * length)
            within = 0
            for index, extent in zip(at, grid, strict=False):
                within = within * extent + index % extent
            begin = self.start + (within * length + low - number * length) * row * itemsize
            numbers = [
                *(index // extent for index, extent in zip(at, grid, strict=False)),
                number,
                *itertools.repeat(0, len(grid) - axis - 1),
            ]
            key = self.key if self.chunks is None else self.key + self.separator.join(map(str, numbers))
            try:
                self.files.fill(key, [Want(begin, flat[(low - start) * row * itemsize : (high - start) * row * itemsize].data)])
            except FileNotFoundError as error:
                raise CorruptFileError(
                    f"{self.files.url}/{key} is missing: its values are not there, and are not taken for zeros"
                ) from error
        return widen_bfloat16(out) if self.dtype == "bfloat16" else out

    def read(self) -> Array:
        """The whole array, for small ones.

        Raises
        ------
        CorruptFileError
            A file is missing or ends too early.
        """
        return self.rows((), 0, self.shape[0])


def size_of(files: Files, key: str) -> int:
    """Bytes of a file.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    CorruptFileError
        It is no regular file, or a link that leads out of the folder; or its size cannot be found.
    """
    head, size = files.head(key)
    if size is None and len(head) < files.head_bytes:
        return len(head)
    folder, _, name = key.rpartition("/")
    sizes = [size] if size is not None else [item.size for item in files.list(folder) if item.name == name]
    if not sizes or sizes[0] is None:
        raise CorruptFileError(f"{files.url}/{key} has a size that cannot be found")
    return sizes[0]


def read_json(files: Files, key: str) -> dict[str, Any]:
    """A JSON object of a file.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    CorruptFileError
        It holds something else.
    """
    try:
        found = json.loads(files.read(key, at_most=JSON_BYTES))
    except ValueError as error:
        raise CorruptFileError(f"{files.url}/{key} is damaged: it holds no JSON") from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{files.url}/{key} is damaged: it holds no JSON object")
    return found


def open_file_array(files: Files, key: str, dtype: str, shape: Sequence[int]) -> RawArray:
    """An array that fills a file without a header, as ``numpy.memmap`` writes one.

    Raises
    ------
    CorruptFileError
        The file is missing, or has another size.
    """
    needed = math.prod(shape) * (itemsize_of(dtype) or 0)
    try:
        size = size_of(files, key)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{files.url}/{key} is missing") from error
    if size != needed:
        raise CorruptFileError(f"{files.url}/{key} has {size} bytes, and {tuple(shape)} values of {dtype} have {needed}")
    return RawArray(files=files, key=key, dtype=dtype, shape=tuple(shape))


def open_zarr_array(files: Files, folder: str) -> RawArray:
    """An uncompressed Zarr array of version 2 or 3, described from its document.

    Zarr itself reads a missing chunk as the fill value; here it is an error, because such values were never stored.

    Raises
    ------
    NotAStoreError
        There is no array.
    CorruptFileError
        Its document is damaged, or its chunks are compressed or sharded.
    """
    document, where = None, ""
    for name in ("zarr.json", ".zarray"):
        try:
            document, where = read_json(files, f"{folder}/{name}"), f"{files.url}/{folder}/{name}"
            break
        except FileNotFoundError:
            continue
    if document is None:
        raise NotAStoreError(f"{files.url}/{folder} is no Zarr array: it has no zarr.json and no .zarray")
    try:
        shape = tuple(int(n) for n in document["shape"])
        if where.endswith("zarr.json"):
            chunks = tuple(int(n) for n in document["chunk_grid"]["configuration"]["chunk_shape"])
            dtype, encoding = str(document["data_type"]), document["chunk_key_encoding"]
            separator = encoding.get("configuration", {}).get("separator", "/" if encoding["name"] == "default" else ".")
            prefix = f"c{separator}" if encoding["name"] == "default" else ""
            is_raw = document["codecs"] in _RAW_CODECS and not document.get("storage_transformers")
        else:
            chunks, prefix = tuple(int(n) for n in document["chunks"]), ""
            dtype, separator = np.dtype(document["dtype"]).name, document.get("dimension_separator", ".")
            is_raw = not document["compressor"] and not document["filters"] and document["order"] == "C" and document["dtype"][0] in "<|"
        fits = len(chunks) == len(shape) and min((*shape, *chunks), default=-1) >= 0 and 0 not in chunks and separator in {"/", "."}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{where} is damaged: it describes no array") from error
    if not fits or itemsize_of(dtype) is None:
        raise CorruptFileError(f"{where} describes no array that can be read here: {dtype} of shape {shape} in chunks of {chunks}")
    if not is_raw:
        raise CorruptFileError(f"{where} describes compressed or sharded chunks, which HalluLens does not write")
    return RawArray(files=files, key=f"{folder}/{prefix}", dtype=dtype, shape=shape, chunks=chunks, separator=separator)
