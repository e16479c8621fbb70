"""The safetensors files of a model, read a tensor at a time by plain reads: nothing is mapped, so only what is used counts as memory.

Never a module of a model, a store, or the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import torch

from lmprobe_zarr.errors import ModelNotFoundError
from lmprobe_zarr.extraction.models.weight_files import WeightFiles
from lmprobe_zarr.safetensors_file import Tensor

__all__ = ["Checkpoint", "raw_bytes"]

# What is read at once where values change their dtype or their device on the way.
STAGED_BYTES: Final = 16 << 20


@dataclass(slots=True)
class Checkpoint:
    """The tensors of a model's files.

    Parameters
    ----------
    weights : WeightFiles
    nbytes_read : int
        Bytes of tensors that were read so far.
    """

    weights: WeightFiles
    nbytes_read: int = 0
    _states: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The dtype, shape and place of each tensor."""
        return self.weights.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self.weights.folder / self.weights.files[name]

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
                f"the tensor {name!r} in {str(self.path(name))!r} has the dtype {self.tensors[name].dtype!r}, which is that "
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
            It has another shape, its file is shorter than it says, or has changed since it was first read: then blocks of two models would
            be mixed.
        """
        entry, dtype = self.tensors[name], self.dtype(name)
        path = self.path(name)
        if tuple(room.shape) != entry.shape:
            raise ModelNotFoundError(f"the tensor {name!r} in {str(path)!r} has the shape {list(entry.shape)}, not {list(room.shape)}")
        try:
            with path.open("rb", buffering=0) as file:
                self._check_unchanged(path, os.fstat(file.fileno()))
                file.seek(entry.start)
                if room.device.type == "cpu" and room.dtype == dtype and room.is_contiguous():
                    _fill(file, raw_bytes(room))
                else:
                    _fill_staged(file, room, dtype)
        except (OSError, EOFError) as error:
            raise ModelNotFoundError(
                f"the tensor {name!r} cannot be read from {str(path)!r} ({error}): download the model again"
            ) from error
        self.nbytes_read += entry.stop - entry.start

    def _check_unchanged(self, path: Path, found: os.stat_result) -> None:
        state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        if self._states.setdefault(path.name, state) != state:
            raise ModelNotFoundError(f"{str(path)!r} was changed while its model was running: call again, and leave the folder as it is")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


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
