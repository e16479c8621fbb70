"""Variables of one batch, as tensors on a device, to batches for a store: copies to the host, and numpy's dtypes. Never runs a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.extraction.models.captured import Collected
from lmprobe_zarr.extraction.models.outputs import perplexity_of
from lmprobe_zarr.extraction.models.token_batches import Kept, token_batches
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Copying", "batches_of", "copy_to_host"]

# The dtypes that numpy has too.
NUMPY_DTYPES: Final = (torch.float32, torch.float16, torch.float64, torch.int32)


@dataclass(slots=True)
class Copying:
    """One batch whose arrays are being copied to the host; `arrived` is the CUDA event after the copies, None without CUDA."""

    rows: Ints
    tokens: dict[str, torch.Tensor]
    prompts: dict[str, torch.Tensor]
    arrived: Any


def copy_to_host(collected: Collected, rows: Ints) -> Copying:
    """Start copying all variables of a batch to the host. On CUDA this uses pinned memory and does not wait."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    tokens = {name: copied(tensor) for name, tensor in collected.tokens.items()}
    prompts = {name: copied(tensor) for name, tensor in collected.prompts.items()}
    arrived: Any = None
    device = next((t.device for t in (*collected.tokens.values(), *collected.prompts.values()) if t.device.type == "cuda"), None)
    if device is not None:
        with torch.cuda.device(device):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
    return Copying(rows, tokens, prompts, arrived)


def _to_numpy(tensors: dict[str, torch.Tensor], stored: dict[str, str]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in NUMPY_DTYPES:
            arrays[name] = tensor.numpy()
        else:
            # numpy has no bfloat16. float32 holds its values exactly; widening after the copy moves half the bytes.
            stored[name] = str(tensor.dtype).removeprefix("torch.")
            arrays[name] = tensor.float().numpy()
    return arrays


def batches_of(copying: Copying, tokenized: TokenizedPrompts, kept: Kept) -> Iterator[TokenBatch]:
    """The batches of what has arrived on the host."""
    part = tokenized.take(copying.rows)
    stored: dict[str, str] = {}
    levels = {"tokens": _to_numpy(copying.tokens, stored), "prompts": _to_numpy(copying.prompts, stored)}
    if kept.outputs.perplexity:
        levels["prompts"]["perplexity"], levels["tokens"]["token_perplexity"] = perplexity_of(
            levels["tokens"]["token_log_prob"], part.lengths
        )  # fmt: skip
    return token_batches(part, levels, stored, kept)
