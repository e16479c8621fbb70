"""One forward pass over one padded batch: how the model is called, and what the hooks collected.

Batches are padded on the right, whatever the tokenizer's padding side. In a causal model no token sees those after it, so padding on the
right changes nothing, needs no mask, and leaves every token at the position that it has alone; encoders get the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lmprobe_zarr.batch import LAYERED_SITES
from lmprobe_zarr.errors import UnknownArchitectureError
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected, PaddedBatch
from lmprobe_zarr.extraction.models.hooks import DeepestLayerDoneError, evaluating, register_hooks
from lmprobe_zarr.extraction.models.loading import LoadedModel
from lmprobe_zarr.extraction.models.loading_report import quiet_logging
from lmprobe_zarr.extraction.models.tensor_bits import without_gradients
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.typing import Ints

__all__ = ["ModelCall", "run_forward_pass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """Which module is called, with which arguments, and which prompts may share a batch.

    Parameters
    ----------
    module : Module
        The whole model where its head is needed, its body otherwise.
    takes_mask, takes_cache : bool
        Whether it takes ``attention_mask`` and ``use_cache``.
    uniform_above : int or None
        Prompts of more tokens share a batch only with prompts of the same length.
    """

    module: nn.Module
    takes_mask: bool
    takes_cache: bool
    uniform_above: int | None

    @staticmethod
    def of(loaded: LoadedModel, request: CaptureRequest) -> ModelCall:
        """How a model is called for a request."""
        module = loaded.located.whole if request.outputs.needs_head and loaded.located.whole is not None else loaded.located.body
        names = inspect.signature(module.forward).parameters
        takes_mask = "attention_mask" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
        config = getattr(loaded.located.body, "config", None)
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        uniform = None
        if kind in {"dynamic", "longrope"}:
            # These rotary embeddings depend on the longest prompt of the batch, once it exceeds the original window.
            uniform = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or 0
        elif not takes_mask and not loaded.located.causal:
            uniform = 0
        return ModelCall(module=module, takes_mask=takes_mask, takes_cache="use_cache" in names, uniform_above=uniform)


def run_forward_pass(loaded: LoadedModel, call: ModelCall, request: CaptureRequest, ids: Sequence[Ints]) -> Collected:
    """The activations of one batch, given as the token ids of each prompt.

    Raises
    ------
    UnknownArchitectureError
        The model ran without calling a module that was named for a site.
    """
    lengths = np.array([len(i) for i in ids], np.int64)
    longest = int(lengths.max())
    padded = np.full((len(ids), longest), loaded.pad_id, np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    collected = Collected(request, PaddedBatch(lengths, longest, np.concatenate(ids)), on_host=loaded.spread)
    options: dict[str, Any] = {"use_cache": False} if call.takes_cache else {}
    if call.takes_mask and not loaded.located.causal and lengths.min() < longest:
        options["attention_mask"] = collected.padded.index("mask", loaded.device)[..., 0].to(torch.int64)
    with ExitStack() as stack:
        stack.enter_context(running(loaded.located.body))
        stack.enter_context(evaluating(loaded.module))
        stack.enter_context(without_gradients(loaded.module))
        # GPT-2 warns about a missing mask, which a causal model does not need here.
        stack.enter_context(quiet_logging())
        register_hooks(loaded, collected, stack)
        stack.enter_context(suppress(DeepestLayerDoneError))
        output = call.module(input_ids=torch.from_numpy(padded).to(loaded.device), **options)
        if request.outputs.needs_head:
            collected.take_logits(output)
    wanted: set[tuple[str, int | None]] = {(site, layer) for site in request.sites if site in LAYERED_SITES for layer in request.layers}
    wanted |= {(site, None) for site in request.sites if site not in LAYERED_SITES} | {("router", layer) for layer in request.routers}
    absent = sorted(map(str, wanted - collected.seen))
    if absent:
        raise UnknownArchitectureError(
            f"the model ran without calling {absent[0]} ({len(absent)} in all): name the right ones with modules="
        )
    return collected
