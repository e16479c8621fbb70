"""A fingerprint of every weight that a model holds in memory, the same on every device. Integers only; never a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Final

import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError

__all__ = ["weights_fingerprint"]

# Elements at a time: 8 MiB of int64, and as much again for the product.
CHUNK: Final = 1 << 20
# splitmix64's constants, as signed 64-bit numbers.
SPREAD: Final = 0x9E3779B97F4A7C15 - (1 << 64)
MIX: Final = 0xBF58476D1CE4E5B9 - (1 << 64)


def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd numbers that look random, one per place in a chunk: shape (CHUNK,), int64.

    An odd number has an inverse modulo 2⁶⁴, so no change of a single value leaves the sum of the products as it was.
    """
    places = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * SPREAD
    return ((places ^ ((places >> 30) & ((1 << 34) - 1))) * MIX) | 1


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits of a tensor as a flat tensor of integers."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0:
        return flat.view(torch.int32)
    return flat


def _chunk_sums(tensor: torch.Tensor, multipliers: torch.Tensor) -> Iterator[torch.Tensor]:
    words = _words(tensor)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        # Integer products and sums wrap around in the same way everywhere, in whatever order they are added.
        yield part.mul_(multipliers[: part.numel()]).sum()


def weights_fingerprint(module: nn.Module) -> str:
    """``bits:…`` over the raw bits, name, shape and dtype of every parameter and buffer.

    Any edit of any weight changes it; where the weights lie does not. Memory beside the model: two chunks of 8 MiB, and one tensor where it
    is not contiguous.

    Raises
    ------
    InvalidArgumentError
        Weights that are not in memory (offloaded to disk or CPU by accelerate).
    """
    digest = hashlib.sha256()
    multipliers: dict[torch.device, torch.Tensor] = {}
    with torch.no_grad():
        for name, tensor in sorted(chain(module.named_parameters(), module.named_buffers()), key=lambda pair: pair[0]):
            if tensor.device.type == "meta":
                raise InvalidArgumentError(
                    f"the weight {name!r} is offloaded, so the model cannot be told from an edited one: "
                    "load it without offloading, or give its folder"
                )
            if tensor.device not in multipliers:
                multipliers[tensor.device] = _multipliers(tensor.device)
            sums = list(_chunk_sums(tensor, multipliers[tensor.device]))
            digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            if sums:
                digest.update(torch.stack(sums).cpu().numpy().astype("<i8").tobytes())
    return "bits:" + digest.hexdigest()
