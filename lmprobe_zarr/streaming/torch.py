"""Activations as torch tensors: arrays, and batches that ``torch.utils.data.DataLoader`` takes.

Imports torch, so it is imported only where a caller chooses torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.utils.data import IterableDataset

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.store.parts import as_stored
from lmprobe_zarr.streaming.batches import Batches, cast_batch
from lmprobe_zarr.streaming.memory import ReusedMemory
from lmprobe_zarr.streaming.source import stored_dtype
from lmprobe_zarr.typing import Array

__all__ = ["TorchBatches", "as_tensor", "parse_torch_dtype"]
_PLAIN = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class TorchBatches(Batches, IterableDataset[Any]):
    """`Batches` of tensors. Iterate it directly, or with ``DataLoader(batches, batch_size=None, num_workers=…)``.

    Workers take turns: each reads its own blocks, and together they give as many batches as one would.
    """

    def _convert(self, batch: Array, reused: ReusedMemory) -> torch.Tensor:
        wanted: Any = self.dtype
        if wanted in _PLAIN:
            return torch.from_numpy(cast_batch(batch, np.dtype(_PLAIN[wanted]), reused))
        given = torch.from_numpy(batch)
        if wanted != torch.bfloat16:
            return given.to(wanted)
        return torch.from_numpy(reused.empty(batch.shape, np.int16)).view(torch.bfloat16).copy_(given)

    def _label(self, values: Array) -> Any:
        return torch.from_numpy(values) if values.dtype.kind in "biuf" else values


def parse_torch_dtype(dtype: Any, values: np.dtype[Any]) -> torch.dtype:
    """The dtype of the tensors; for None that of the values.

    Raises
    ------
    InvalidArgumentError
        `dtype` is no floating-point dtype of torch.
    """
    if dtype is None:
        return torch.from_numpy(np.empty(0, values)).dtype
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype if isinstance(dtype, str) else np.dtype(dtype).name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(f"dtype={dtype!r}: give float16, float32, float64 or bfloat16, by name or as a torch.dtype")
    return found


def as_tensor(array: xr.DataArray, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    """The values of an array as a tensor; see `lmprobe_zarr.accessor.ArrayAccessor.to_torch`."""
    variable = as_stored(array.variable)
    values: Array = np.asarray(variable.values, order="C")
    if not values.flags.writeable:
        values = values.copy()  # torch has no read-only tensors
    stored = stored_dtype(xr.Variable(variable.dims, values, variable.attrs)) if dtype is None else None
    dtype = getattr(torch, stored) if stored is not None else dtype
    try:
        return torch.from_numpy(values).to(device=device, dtype=dtype)
    except (TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InvalidArgumentError(
            f"values cannot be made a tensor with dtype={dtype!r:.40} and device={device!r:.40} ({str(error).splitlines()[0]:.100}): "
            "give dtype=torch.float32 or another of torch, and a device that there is, such as 'cpu'"
        ) from error
