"""What each pooling computes on padded tensors: the twin of `pool_ragged` for what a model returns. Never files or stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

__all__ = ["POOL_PADDED", "Index"]

# Gives rows of the padded batch, flat, by a pooling's name; or the ``mask`` of real tokens, shape (batch, longest, 1).
Index = Callable[[str, torch.device], torch.Tensor]


def _last_token(hidden: torch.Tensor, index: Index) -> torch.Tensor:
    return hidden.flatten(0, 1).index_select(0, index("last_token", hidden.device))


def _first_token(hidden: torch.Tensor, index: Index) -> torch.Tensor:
    return hidden.flatten(0, 1).index_select(0, index("first_token", hidden.device))


def _mean(hidden: torch.Tensor, index: Index) -> torch.Tensor:
    mask = index("mask", hidden.device)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counts = mask.sum(dim=1).to(wide)
    return (hidden.masked_fill(~mask, 0).sum(dim=1, dtype=wide) / counts).to(hidden.dtype)


def _max(hidden: torch.Tensor, index: Index) -> torch.Tensor:
    return hidden.masked_fill(~index("mask", hidden.device), -torch.inf).amax(dim=1)


def _min(hidden: torch.Tensor, index: Index) -> torch.Tensor:
    return hidden.masked_fill(~index("mask", hidden.device), torch.inf).amin(dim=1)


# Each takes (batch, longest, width) and gives (batch, width). The keys are those of `lmprobe_zarr.batch.POOLINGS`; a test compares them.
POOL_PADDED: Final[Mapping[str, Callable[[torch.Tensor, Index], torch.Tensor]]] = {
    "last_token": _last_token,
    "first_token": _first_token,
    "mean": _mean,
    "max": _max,
    "min": _min,
}
