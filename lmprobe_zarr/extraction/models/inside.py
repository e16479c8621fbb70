"""The places inside of one traced block that no name tells, found in the values that its modules are given and return."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import torch
from torch import nn

from lmprobe_zarr.extraction.models.architectures import Site
from lmprobe_zarr.extraction.models.structure import Call, Part

__all__ = ["inside_of"]

# How far two tensors of one value may differ, relative to their norm; and how far the stream may be from a sum, relative to what was added.
ALIKE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}
ALIKE_COARSE: Final = 2e-2
SUM: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
SUM_COARSE: Final = 0.5
# Modules between a projection and the sum: norms, dropout.
BETWEEN: Final = 4
ATTENTION: Final = re.compile(r"att", re.IGNORECASE)
OTHER_MIXERS: Final = re.compile(r"linear_?att|mamba|ssm|rwkv|delta|conv|recurrent|retention|mixer2|lightning", re.IGNORECASE)


def inside_of(call: Call, attn: Site | None, mlp: Site | None) -> dict[str, str]:
    """The paths in a block of the modules whose input the three sites are."""
    found = {}
    places = {id(part.module): place for place, part in enumerate(call.parts)}
    counts = Counter(id(part.module) for part in call.parts)

    def place_of(site: Site | None) -> int | None:
        return None if site is None or counts[id(site.module)] != 1 else places[id(site.module)]

    mixed, projected = place_of(attn), place_of(mlp)
    if mixed is not None:
        heads = _projection(call, mixed)
        if heads is not None and _is_attention(call.parts[mixed], heads):
            found["heads"] = heads.path
        between = _between(call, mixed, 1.0 if attn is None else attn.scale) if projected is not None else None
        if between is not None:
            found["resid_mid"] = between.path
    if projected is not None and (neurons := _projection(call, projected)) is not None:
        found["neurons"] = neurons.path
    return found


def _is_attention(mixer: Part, projection: Part) -> bool:
    """Whether a token mixer is attention, and not Mamba, linear attention or a convolution."""
    names = f"{mixer.path} {type(mixer.module).__name__} {projection.path}"
    return bool(ATTENTION.search(names)) and not OTHER_MIXERS.search(names)


def _projection(call: Call, place: int) -> Part | None:
    """The projection that the output of a module comes from, straight or through a norm; None where something else computes it."""
    target = call.parts[place].output
    for _ in range(BETWEEN):
        # The innermost module that returns this value returns it first.
        same = [part for part in call.parts[: place + 1] if _alike(part.output, target)]
        if not same:
            return None
        found = next((part for part in same if _is_projection(part.module) and part.given is not None), None)
        if found is not None:
            return found
        if _has_matrix(same[0].module):
            return None
        target = same[0].given
    return None


def _is_projection(module: nn.Module) -> bool:
    """Whether a module is a matrix product: plain, quantised, or with an adapter around it."""
    weight = getattr(module, "weight", None)
    inner = getattr(module, "base_layer", None)
    named = re.search("Linear|Conv1D", type(module).__name__) is not None
    plain = isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
    return named or plain or (isinstance(inner, nn.Module) and _is_projection(inner))


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _between(call: Call, place: int, scale: float) -> Part | None:
    """The outermost module that is given the residual stream with what attention added, and without what the MLP adds."""
    added, given = call.parts[place].output, call.given
    if added is None or given is None or added.numel() != given.numel():
        return None
    stream, added = given.float(), scale * added.reshape(given.shape).float()
    state = stream + added
    near = SUM.get(given.dtype, SUM_COARSE) * float(added.norm())
    found = [
        part
        for part in call.parts[place + 1 :]
        if part.given is not None
        and part.given.numel() == state.numel()
        and part.given.shape[-1] == state.shape[-1]
        and float((part.given.reshape(state.shape).float() - state).norm()) <= near
        and not isinstance(part.module, nn.Identity | nn.Dropout)
    ]
    return min(found, key=lambda part: part.path.count("."), default=None)


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.numel() != other.numel() or one.shape[-1] != other.shape[-1]:
        return False
    far = float((one.reshape(other.shape).float() - other.float()).norm())
    return far <= ALIKE.get(other.dtype, ALIKE_COARSE) * float(other.float().norm())
