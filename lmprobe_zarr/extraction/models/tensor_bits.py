"""Digests of tensors by their raw bits, the same on every device and in every memory order. Never a name of a module, or a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError
from lmprobe_zarr.extraction.models.batching import is_out_of_memory

__all__ = ["CHUNK", "TensorBits", "inner_tensors", "without_gradients"]

# Elements of one sum: 8 MiB of int64, and as much again for the product.
CHUNK: Final = 1 << 20
# Elements at a time on a processor, so that what is multiplied stays in its caches. A sum does not depend on it.
CACHED: Final = 1 << 17
# splitmix64's constants, as signed 64-bit numbers.
SPREAD: Final = 0x9E3779B97F4A7C15 - (1 << 64)
MIX: Final = 0xBF58476D1CE4E5B9 - (1 << 64)


def _multipliers(device: torch.device) -> torch.Tensor:
    """Pseudo-random odd numbers, one per place in a chunk: shape (CHUNK,), int64.

    An odd number has an inverse modulo 2⁶⁴, so a change of a single value always changes the sum of the products.
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
    words, step = _words(tensor), CACHED if tensor.device.type == "cpu" else CHUNK
    for start in range(0, words.numel(), CHUNK):
        sums = []
        for at in range(start, min(start + CHUNK, words.numel()), step):
            part = words[at : min(at + step, start + CHUNK)].to(torch.int64)
            sums.append(part.mul_(multipliers[at - start : at - start + part.numel()]).sum())
        # Integer products and sums wrap around, so the result is the same on every device and in every order.
        yield torch.stack(sums).sum()


def inner_tensors(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any] | None:
    """The tensors that a tensor of a class of its own, such as a quantised one, is made of, by name, and its settings.

    None for a tensor that has its values itself.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return None
    names, settings = flatten()
    return {name: getattr(tensor, name) for name in names}, settings


def without_gradients(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """``torch.inference_mode``, or ``torch.no_grad`` where weights are made of other tensors, which inference mode does not support."""
    weights = (tensor for part in module.modules() for tensor in (*part._parameters.values(), *part._buffers.values()))
    made = any(hasattr(tensor, "__tensor_flatten__") for tensor in weights)
    return torch.no_grad() if made else torch.inference_mode()


class TensorBits:
    """Digests of many tensors. Keeps the multipliers of each device."""

    def __init__(self) -> None:
        self.multipliers: dict[torch.device, torch.Tensor] = {}

    def digest(self, name: str, tensor: torch.Tensor, describe: Callable[[str, Any], Any]) -> list[Any]:
        """Shape, dtype and a digest of the raw bits; of a tensor that is made of others, those of each.

        Parameters
        ----------
        name : str
            For messages.
        tensor : Tensor
        describe : callable
            Makes JSON of the settings of a tensor that is made of others, from a name and a value.

        Raises
        ------
        InvalidArgumentError
            The values are not in memory, or of a class that does not give them.
        """
        try:
            inner = inner_tensors(tensor)
            if inner is not None:
                kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
                held = {each: self.digest(f"{name}.{each}", part, describe) for each, part in inner[0].items()}
                return [
                    kind,
                    list(tensor.shape),
                    str(tensor.dtype),
                    held,
                    json.dumps(describe(name, inner[1]), sort_keys=True, default=str),
                ]
            if tensor.device.type == "meta":
                raise InvalidArgumentError(
                    f"the weight {name!r} has no values here: it is on the device 'meta', because it is offloaded or was never loaded. "
                    "Load the model without offloading, or give its folder"
                )
            if tensor.device not in self.multipliers:
                self.multipliers[tensor.device] = _multipliers(tensor.device)
            sums = list(_chunk_sums(tensor, self.multipliers[tensor.device]))
            bits = torch.stack(sums).cpu().numpy().astype("<i8").tobytes() if sums else b""
        except (NotImplementedError, RuntimeError, TypeError, AttributeError, MemoryError) as error:
            if isinstance(error, DeviceMemoryError):
                raise
            if is_out_of_memory(error):
                raise DeviceMemoryError(
                    f"the weight {name!r} cannot be read, because {str(tensor.device)!r} has too little free memory: free some, or take a "
                    "smaller dtype"
                ) from error
            raise InvalidArgumentError(
                f"the weight {name!r} is a {type(tensor).__module__}.{type(tensor).__qualname__}, whose values cannot be read "
                f"({str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__}), so the model cannot be "
                "distinguished from an edited one: give its folder or hub id, or a model whose weights can be read"
            ) from error
        return [list(tensor.shape), str(tensor.dtype), hashlib.sha256(bits).hexdigest()]
