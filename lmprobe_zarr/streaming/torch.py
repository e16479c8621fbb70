"""Batches as torch tensors, of a kind that ``torch.utils.data.DataLoader`` takes. Imported only where torch is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.streaming.batches import Batches, cast_batch
from lmprobe_zarr.streaming.memory import Reused
from lmprobe_zarr.typing import Array

__all__ = ["TorchBatches", "parse_torch_dtype"]
_PLAIN = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class TorchBatches(Batches, IterableDataset[Any]):
    """`Batches` of tensors: to be iterated as it is, or by ``DataLoader(batches, batch_size=None, num_workers=…)``.

    Workers take turns: each reads blocks of its own, and all together give as many batches as one would.
    """

    def _convert(self, batch: Array, reused: Reused) -> torch.Tensor:
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
    """The dtype that tensors have; None keeps that of the values.

    Raises
    ------
    InvalidArgumentError
        It is no floating-point dtype of torch.
    """
    if dtype is None:
        return torch.from_numpy(np.empty(0, values)).dtype
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype if isinstance(dtype, str) else np.dtype(dtype).name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(f"dtype={dtype!r}: give float16, float32, float64 or bfloat16, by name or as a torch.dtype")
    return found
