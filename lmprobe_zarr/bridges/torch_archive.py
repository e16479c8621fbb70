"""Tensors in files of ``torch.save``, described without torch and without unpickling: the pickle in them is only disassembled.

Such a file is a ZIP archive whose records are stored as they are: ``data.pkl`` says which tensor is where, and ``data/0``, ``data/1``, …
hold the values. Of the pickle, a handful of operations is followed that build a dictionary of numbers, texts and tensors; any other
operation, and any name but those of tensors, is an error. Nothing that a file names is imported or called.

Source: ``torch/serialization.py`` (torch.save since 1.6), ``pickletools`` of Python.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, Final

from lmprobe_zarr.bridges.files import Files, Want
from lmprobe_zarr.bridges.raw_arrays import RawArray, size_of
from lmprobe_zarr.errors import CorruptFileError
from lmprobe_zarr.safetensors_file import itemsize_of

__all__ = ["read_archive"]
PICKLE_BYTES: Final = 2**20
_DTYPES: Final = {
    "torch HalfStorage": "float16", "torch BFloat16Storage": "bfloat16", "torch FloatStorage": "float32", "torch DoubleStorage": "float64",
    "torch LongStorage": "int64", "torch IntStorage": "int32",
}  # fmt: skip
_TENSOR: Final = "torch._utils _rebuild_tensor_v2"
_DICT: Final = "collections OrderedDict"
_VALUES: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as the pickle describes it."""

    storage: tuple[Any, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ranged(io.RawIOBase):
    """A file that is read by ranges, for `zipfile`."""

    def __init__(self, files: Files, key: str, size: int) -> None:
        self.files, self.key, self.size, self.at = files, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.at))
        if count:
            self.files.fill(self.key, [Want(self.at, view[:count])])
        self.at += count
        return count


def read_archive(files: Files, key: str, *, size: int | None = None) -> dict[str, Any]:
    """What a file of ``torch.save`` holds, if it is a dictionary: numbers and texts, and each tensor as a `RawArray`.

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
        It is damaged or cut off, holds something else, or is a pickle that would run code.
    """
    where = f"{files.url}/{key}"
    size = size_of(files, key) if size is None else size
    try:
        with zipfile.ZipFile(io.BufferedReader(_Ranged(files, key, size))) as archive:
            records = {info.filename: info for info in archive.infolist()}
            (pickled,) = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
            folder = pickled.removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()) or records[pickled].file_size > PICKLE_BYTES:
                raise ValueError("its records are compressed, or its pickle is larger than torch's are")
            if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its values are not little-endian")
            found = _disassemble(archive.read(pickled))
            return {name: _located(files, key, size, records, folder, value) for name, value in found.items()}
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError, struct.error, NotImplementedError, EOFError) as error:
        raise CorruptFileError(f"{where} is damaged, or no dictionary of tensors that torch saved: {str(error)[:120]}") from error


def _disassemble(data: bytes) -> dict[str, Any]:
    """The dictionary that a pickle would build, with a `_Tensor` for each tensor."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        taken = stack[marks[-1] :]
        del stack[marks.pop() :]
        return taken

    for operation, given, _ in pickletools.genops(data):
        argument: Any = given
        name = operation.name
        if name in {"PROTO", "STOP"}:
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name in _VALUES:
            stack.append(argument)
        elif name in {"NEWFALSE", "NEWTRUE"}:
            stack.append(name == "NEWTRUE")
        elif name == "GLOBAL":
            if argument not in {_TENSOR, _DICT, *_DTYPES}:
                raise ValueError(f"it names {argument}, which is no tensor")
            stack.append(_Name(argument))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in {"BINPUT", "LONG_BINPUT"}:
            memo[argument] = stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack.append(tuple(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_Tensor(*arguments[:4]) if function == _Name(_TENSOR) else {})
        elif name == "SETITEM":
            value, item = stack.pop(), stack.pop()
            stack[-1][item] = value
        elif name == "SETITEMS":
            pairs = since_mark()
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        else:
            raise ValueError(f"its pickle has the operation {name}, which a dictionary of tensors does not need")
    if len(stack) != 1 or not isinstance(stack[0], dict) or not all(isinstance(item, str) for item in stack[0]):
        raise ValueError("it holds no dictionary")
    return stack[0]


def _located(files: Files, key: str, size: int, records: dict[str, zipfile.ZipInfo], folder: str, value: Any) -> Any:
    """A tensor as an array in the file; other values as they are."""
    if not isinstance(value, _Tensor):
        return value
    kind, storage, number, _, count = value.storage
    if kind != "storage" or not isinstance(storage, _Name):
        raise ValueError("it holds a tensor without a storage")
    dtype, record = _DTYPES[storage.name], records[f"{folder}data/{number}"]
    itemsize, shape = itemsize_of(dtype) or 0, tuple(int(n) for n in value.shape)
    plain = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if any(n < 0 for n in (*shape, value.offset)) or tuple(value.strides) != plain:
        raise ValueError(f"it holds a tensor of shape {shape} with strides {value.strides}: expected one without gaps")
    # A tensor may claim more values than its record has bytes, and a record more than the file.
    if record.file_size != count * itemsize or value.offset + math.prod(shape) > count:
        raise ValueError(f"a tensor of shape {shape} needs more than the {record.file_size} bytes that are there")
    header = bytearray(_LOCAL_HEADER.size)
    files.fill(key, [Want(record.header_offset, memoryview(header))])
    magic, n_name, n_extra = _LOCAL_HEADER.unpack(header)
    begin = record.header_offset + len(header) + n_name + n_extra
    if magic != b"PK\x03\x04" or begin + record.file_size > size:
        raise ValueError(f"the record {record.filename} is not where the archive says")
    return RawArray(files=files, key=key, dtype=dtype, shape=shape, start=begin + value.offset * itemsize)
