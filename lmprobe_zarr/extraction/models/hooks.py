"""Hooks on a model's modules: they hand activations over, keep padding from the head, and stop the pass where nothing more is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lmprobe_zarr.extraction.models.captured import Collected
from lmprobe_zarr.extraction.models.loading import LoadedModel
from lmprobe_zarr.extraction.models.outputs import raw_scores

__all__ = ["DeepestLayerDoneError", "evaluating", "register_hooks"]


class DeepestLayerDoneError(Exception):
    """Raised in the last hook that is needed, so that the layers after it and the head are not computed."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, so no dropout; afterwards every submodule has its own mode back."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def register_hooks(loaded: LoadedModel, collected: Collected, stack: ExitStack) -> None:
    """Register hooks at every requested site; closing the stack removes them.

    The last hook that is reached stops the pass, unless the head is needed.
    """
    request, located = collected.request, loaded.located
    stops = not request.outputs.needs_head
    outputs = {"resid": located.blocks, "attn": located.attn, "mlp": located.mlp}

    def keep(site: str, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            collected.take(site, layer, output)

        return hook

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        collected.take("embed", None, args[0] if args else kwargs["hidden_states"])
        if stops and request.deepest is None:
            raise DeepestLayerDoneError

    def score(layer: int) -> Callable[..., None]:
        def hook(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            collected.take("router", layer, raw_scores(gate, (*args, *kwargs.values()), output if request.routers_raw else None))

        return hook

    def score_unseen(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            # Some models use the weights of their gate and never call it.
            if ("router", layer) not in collected.seen:
                collected.take("router", layer, raw_scores(located.routers[layer].gate, (*args, *kwargs.values())))

        return hook

    def leave_padding_out(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != (len(collected.padded.lengths), collected.padded.longest):
            return None
        return (hidden.flatten(0, 1).index_select(0, collected.padded.index(request.head_rows, hidden.device))[None], *args[1:])

    def stop(*_: Any) -> None:
        raise DeepestLayerDoneError

    handles = []
    if "embed" in request.sites:
        handles.append(located.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    for site in request.sites:
        parts = outputs.get(site)
        if parts is not None:
            handles += [parts[layer].register_forward_hook(keep(site, layer)) for layer in request.layers]
    for layer in request.routers:
        router = located.routers[layer]
        handles.append(router.gate.register_forward_hook(score(layer), with_kwargs=True))
        if router.around is not None:
            handles.append(router.around.register_forward_hook(score_unseen(layer), with_kwargs=True))
    if stops and request.deepest is not None:
        handles.append(located.blocks[request.deepest].register_forward_hook(stop))
    elif not stops and located.head is not None:
        handles.append(located.head.register_forward_pre_hook(leave_padding_out))
    for handle in handles:
        stack.callback(handle.remove)
