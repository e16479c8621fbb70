"""The safetensors files of a model, read a tensor at a time by plain reads: nothing is mapped, so that no more than is used counts as memory.

Never a module of a model, a store, or the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from lmprobe_zarr.errors import ModelNotFoundError
from lmprobe_zarr.safetensors_file import Header, Tensor, header_length, parse_header

__all__ = ["Checkpoint", "open_checkpoint", "raw_bytes"]

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
# What is read at once where values change their dtype or their device on the way.
STAGED_BYTES: Final = 16 << 20


@dataclass(slots=True)
class Checkpoint:
    """The tensors of a model's files.

    Parameters
    ----------
    folder : Path
    files, tensors : mapping of str
        The file of each tensor, and its dtype, shape and place there.
    nbytes_read : int
        Bytes of tensors that were read so far.
    """

    folder: Path
    files: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    nbytes_read: int = field(default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor as it is stored.

        Raises
        ------
        ModelNotFoundError
            It has a dtype of packed numbers.
        """
        found = getattr(torch, self.tensors[name].dtype, None)
        if not isinstance(found, torch.dtype):
            raise ModelNotFoundError(
                f"the tensor {name!r} in {str(self.folder / self.files[name])!r} has the dtype {self.tensors[name].dtype!r}, which is that "
                "of a quantised model, and its blocks cannot be read one at a time: give weights='loaded'"
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU."""
        found = torch.empty(self.tensors[name].shape, dtype=self.dtype(name))
        self.read_into(name, found)
        return found

    def read_into(self, name: str, room: torch.Tensor) -> None:
        """Read a tensor into one of the same shape, whose dtype and device it gets.

        Raises
        ------
        ModelNotFoundError
            It has another shape, or its file is shorter than it says.
        """
        entry, dtype = self.tensors[name], self.dtype(name)
        path = self.folder / self.files[name]
        if tuple(room.shape) != entry.shape:
            raise ModelNotFoundError(f"the tensor {name!r} in {str(path)!r} has the shape {list(entry.shape)}, not {list(room.shape)}")
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                if room.device.type == "cpu" and room.dtype == dtype and room.is_contiguous():
                    _fill(file, raw_bytes(room))
                else:
                    _fill_staged(file, room, dtype)
        except (OSError, EOFError) as error:
            raise ModelNotFoundError(f"the tensor {name!r} cannot be read from {str(path)!r} ({error}): download the model again") from error
        self.nbytes_read += entry.stop - entry.start


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _fill(file: BinaryIO, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"it ends {len(memory) - done} bytes too early")
        done += count


def _fill_staged(file: BinaryIO, room: torch.Tensor, dtype: torch.dtype) -> None:
    """Read slice by slice, and convert each on its way into the room."""
    flat = room.view(-1)
    step = max(1, STAGED_BYTES // dtype.itemsize)
    staged = torch.empty(min(step, flat.numel()), dtype=dtype)
    for start in range(0, flat.numel(), step):
        part = staged[: min(step, flat.numel() - start)]
        _fill(file, raw_bytes(part))
        flat[start : start + len(part)].copy_(part)


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


def open_checkpoint(folder: Path) -> Checkpoint | None:
    """The tensors of the safetensors files in a folder, from their headers; None where its weights are in another format, or not there.

    Raises
    ------
    ModelNotFoundError
        A file is missing, is damaged or lacks a tensor that the index says it has.
    """
    if (folder / SINGLE).is_file():
        header = _header(folder / SINGLE)
        return Checkpoint(folder, dict.fromkeys(header.tensors, SINGLE), header.tensors)
    if not (folder / INDEX).is_file():
        return None
    try:
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelNotFoundError(f"{str(folder / INDEX)!r} cannot be read ({error!r}): download the model again") from error
    if strange := [file for file in files.values() if Path(file).name != file]:
        raise ModelNotFoundError(f"{str(folder / INDEX)!r} names the file {strange[0]!r}, which is not in its folder: download the model again")
    headers = {file: _header(folder / file) for file in dict.fromkeys(files.values())}
    lost = next((name for name, file in files.items() if name not in headers[file].tensors), None)
    if lost is not None:
        raise ModelNotFoundError(
            f"the weights are not complete: {str(folder / files[lost])!r} lacks the tensor {lost!r}; download the model again"
        )
    return Checkpoint(folder, files, {name: headers[file].tensors[name] for name, file in files.items()})
