"""Variables of one batch, as tensors on a device, to batches for a store: copies to the host, numpy dtypes, what is noted of the sites.

Never runs a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from lmprobe_zarr.batch import TokenBatch, positions_of, split_variable
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.outputs import perplexity_of
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Copying", "copy_to_host", "token_batches"]

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


def token_batches(copying: Copying, tokenized: TokenizedPrompts, request: CaptureRequest, num_layers: int) -> Iterator[TokenBatch]:
    """One batch for every set of layers that variables are in; those without layers come with the first."""
    part = tokenized.take(copying.rows)
    stored: dict[str, str] = {}
    columns: dict[str, Array] = {}
    if request.token_level:
        columns = {"position": positions_of(part.lengths), "token_id": part.token_ids, **part.columns}
        if part.char_start is not None and part.char_end is not None:
            columns |= {"char_start": part.char_start, "char_end": part.char_end}
    levels = {"tokens": _to_numpy(copying.tokens, stored), "prompts": _to_numpy(copying.prompts, stored)}
    if request.outputs.perplexity:
        levels["prompts"]["perplexity"], levels["tokens"]["token_perplexity"] = perplexity_of(
            levels["tokens"]["token_log_prob"], part.lengths
        )  # fmt: skip
    flat = {name for _, name, layered in request.outputs.variables() if not layered}
    flat |= {name for arrays in levels.values() for name in arrays if _is_outside(request, split_variable(name)[0])}
    # The router's own last: its layers are those that have one.
    names = sorted((name for arrays in levels.values() for name in arrays if name not in flat), key="router".__eq__)
    layers_of = {name: request.layers_of(split_variable(name)[0]) for name in names}
    kinds = list(dict.fromkeys(layers_of.values())) or [()]
    for number, layers in enumerate(kinds):
        held = {
            level: {name: array for name, array in arrays.items() if layers_of.get(name) == layers or (number == 0 and name in flat)}
            for level, arrays in levels.items()
        }
        kept = {*held["tokens"], *held["prompts"]}
        by_token = bool(held["tokens"]) or (request.token_level and number == 0)
        yield TokenBatch(
            sha256=part.sha256,
            text=part.text,
            prompt_length=part.lengths,
            n_tokens=part.lengths if by_token else None,
            layers=layers,
            tokens=held["tokens"],
            token_columns=columns if by_token else {},
            role_names=part.role_names if by_token else (),
            prompts=held["prompts"],
            unlayered=frozenset(kept & flat),
            stored_dtype={name: dtype for name, dtype in stored.items() if name in kept},
            site_attributes=_site_attributes(request, {split_variable(name)[0] for name in kept}, num_layers)
            | _part_attributes(request, kept),
        )


def _part_attributes(request: CaptureRequest, names: set[str]) -> dict[str, dict[str, Any]]:
    """What is noted of the variables that are pooled over a part of the tokens."""
    described = {name: request.parts.get(split_variable(name)[2], "") for name in sorted(names)}
    return {name: {"over": text} for name, text in described.items() if text}


def _is_outside(request: CaptureRequest, site: str) -> bool:
    """Whether a variable is of a site that has no layers."""
    return site in request.places and not request.places[site].layered


def _site_attributes(request: CaptureRequest, sites: set[str], num_layers: int) -> dict[str, dict[str, Any]]:
    """What is noted of the sites in their arrays: the path that the caller named, the heads, and the layers of the model that have it."""
    found: dict[str, dict[str, Any]] = {}
    for site in sorted(sites):
        place = request.places.get(site)
        has = request.routers_of_model if site == "router" else () if place is None else place.layers
        noted: dict[str, Any] = {}
        if place is not None and place.path:
            noted["site_path"] = place.path
        if place is not None and place.heads:
            noted["num_heads"] = place.heads
        if has and len(has) < num_layers:
            noted["site_layers"] = list(has)
        if noted:
            found[site] = noted
    return found
