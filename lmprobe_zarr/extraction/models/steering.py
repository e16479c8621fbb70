"""Hooks that change the residual stream of a loaded model along one direction per layer. Never xarray, a store or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import locate
from lmprobe_zarr.extraction.models.passing import Passing
from lmprobe_zarr.extraction.models.structure import first_tensor, text_settings
from lmprobe_zarr.extraction.models.wrappers import unwrapped
from lmprobe_zarr.typing import Floats

__all__ = ["Push", "steered"]


@dataclass(frozen=True, slots=True)
class Push:
    """What is done in one layer.

    Parameters
    ----------
    direction : ndarray of float64, shape (hidden,)
        Of length 1.
    amount : float
        In units of the activations; a share for "ablate".
    """

    direction: Floats
    amount: float


@contextmanager
def steered(
    model: nn.Module, pushes: Mapping[int, Push], mode: str, tokens: slice | str, modules: Mapping[str, str] | None
) -> Iterator[None]:
    """A model whose blocks push their outputs; their hooks are removed at the end.

    Raises
    ------
    UnknownArchitectureError
        The blocks were not found.
    InvalidArgumentError
        A layer that the model does not have, or directions of another width than the model's.
    """
    inside = unwrapped(model)
    located = locate(inside, modules)
    blocks = located.blocks
    beyond = [layer for layer in pushes if not 0 <= layer < len(blocks)]
    if beyond:
        raise InvalidArgumentError(f"the model has layers 0 to {len(blocks) - 1}, and directions are of layer {beyond[0]}: leave it out")
    hidden = getattr(text_settings(inside), "hidden_size", None)
    width = len(next(iter(pushes.values())).direction)
    if isinstance(hidden, int) and hidden != width:
        raise InvalidArgumentError(
            f"directions are {width} wide and the model is {hidden} wide: they are of another model, fit them on its own activations"
        )
    passing = Passing(blocks)
    with ExitStack() as stack:
        stack.callback(located.body.register_forward_pre_hook(passing.begin, with_kwargs=True).remove)
        for module in dict.fromkeys(blocks):
            stack.callback(module.register_forward_hook(_hook(passing, pushes, mode, tokens)).remove)
        yield


def _hook(passing: Passing, pushes: Mapping[int, Push], mode: str, tokens: slice | str) -> Callable[..., Any]:
    on_device: dict[tuple[int, torch.device], torch.Tensor] = {}

    def push(module: nn.Module, _args: Any, output: Any) -> Any:
        layer = passing.layer(module)
        rows = first_tensor(output)
        if layer not in pushes:
            return output
        if rows is None:
            raise UnknownArchitectureError(f"layer {layer} ({type(module).__name__}) returns no activations that could be steered")
        wanted = pushes[layer]
        if rows.shape[-1] != len(wanted.direction):
            raise InvalidArgumentError(f"directions are {len(wanted.direction)} wide and layer {layer} is {rows.shape[-1]} wide")
        places = _places(rows.shape[-2], passing.before, tokens)
        if not len(places):
            return output
        key = layer, rows.device
        if key not in on_device:
            on_device[key] = torch.from_numpy(wanted.direction).to(rows.device, torch.float32)
        changed = _pushed(rows, places, on_device[key], wanted.amount, mode)
        if isinstance(output, torch.Tensor):
            return changed
        if isinstance(output, tuple):
            return (changed, *output[1:])
        if isinstance(output, list):
            return [changed, *output[1:]]
        first = next(iter(output))
        output[first] = changed
        return output

    return push


def _places(n: int, before: int, tokens: slice | str) -> range:
    """Which tokens of a pass, of which `before` came in earlier ones."""
    if tokens == "all":
        return range(n)
    if tokens == "generated":
        return range(n if before else 0)
    assert isinstance(tokens, slice)  # noqa: S101  (checked by the caller)
    start, stop, _ = tokens.indices(before + n)
    return range(max(start - before, 0), max(stop - before, 0))


def _pushed(rows: torch.Tensor, places: range, direction: torch.Tensor, amount: float, mode: str) -> torch.Tensor:
    part = rows[..., places.start : places.stop, :]
    if mode == "add":
        new = part + (amount * direction).to(rows.dtype)
    else:
        # In float32, since a projection of 16 bits would leave a rest.
        wide = part.to(torch.promote_types(rows.dtype, torch.float32))
        along = direction.to(wide.dtype)
        held = (wide @ along)[..., None]
        new = (wide + ((amount - held) if mode == "clamp" else -amount * held) * along).to(rows.dtype)
    if len(places) == rows.shape[-2]:
        return new
    changed = rows.clone()
    changed[..., places.start : places.stop, :] = new
    return changed
