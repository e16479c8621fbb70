"""The safetensors files of a model's folder, from their headers: which tensors there are, and where. Never torch, or a tensor's values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmprobe_zarr.errors import ModelNotFoundError
from lmprobe_zarr.safetensors_file import Header, Tensor, header_length, itemsize_of, parse_header

__all__ = ["WeightFiles", "weight_files"]

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The tensors of a model's files.

    Parameters
    ----------
    folder : Path
    files, tensors : mapping of str
        By tensor: the name of its file, and its dtype, shape and place there.
    """

    folder: Path
    files: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def nbytes_in(self, dtype: str) -> int:
        """Bytes of all tensors in memory, where those of floating-point numbers have a dtype."""
        size = itemsize_of(dtype) or 4
        return sum(
            math.prod(tensor.shape) * size if tensor.dtype.startswith(("float", "bfloat")) else tensor.stop - tensor.start
            for tensor in self.tensors.values()
        )


def weight_files(folder: Path) -> WeightFiles | None:
    """The tensors in a folder; None where its weights are in another format, or not there.

    Raises
    ------
    ModelNotFoundError
        A file is missing, is damaged or lacks a tensor that the index says it has.
    """
    if (folder / SINGLE).is_file():
        header = _header(folder / SINGLE)
        return WeightFiles(folder, dict.fromkeys(header.tensors, SINGLE), header.tensors)
    if not (folder / INDEX).is_file():
        return None
    try:
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{str(folder / INDEX)!r} cannot be read ({error!r}): download the model again") from error
    if strange := [file for file in files.values() if Path(file).name != file]:
        raise ModelNotFoundError(f"{str(folder / INDEX)!r} names {strange[0]!r}, which is no file in its folder: download the model again")
    headers = {file: _header(folder / file) for file in dict.fromkeys(files.values())}
    lost = next((name for name, file in files.items() if name not in headers[file].tensors), None)
    if lost is not None:
        raise ModelNotFoundError(
            f"the weights are not complete: {str(folder / files[lost])!r} lacks the tensor {lost!r}; download the model again"
        )
    return WeightFiles(folder, files, {name: headers[file].tensors[name] for name, file in files.items()})


def _header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            header = parse_header(head + file.read(header_length(head) - len(head)))
            size = file.seek(0, 2)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"the weights are not complete: {str(path)!r} is missing; download the model again") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{str(path)!r} cannot be read ({error}): download the model again") from error
    if size != header.size:
        raise ModelNotFoundError(f"{str(path)!r} has {size} bytes, and its header says {header.size}: download the model again")
    return header
