"""Hooks on a model's modules: they hand activations over, keep padding from the head, and stop the pass where nothing more is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lmprobe_zarr.errors import UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.captured import Collected
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.outputs import raw_scores
from lmprobe_zarr.extraction.models.structure import first_tensor, input_tensor

__all__ = ["DeepestLayerDoneError", "register_hooks"]


class DeepestLayerDoneError(Exception):
    """Raised in the last hook that is needed, so that the layers after it and the head are not computed."""


class _Turns:
    """Which layer a call of a module belongs to: a module that stands for several layers is called once for each, in their order."""

    def __init__(self, modules: Mapping[int | None, nn.Module], name: str) -> None:
        self._name = name
        self._layers: dict[int, list[int | None]] = {}
        self._calls: dict[int, int] = {}
        for layer, module in modules.items():
            self._layers.setdefault(id(module), []).append(layer)

    def next(self, module: nn.Module) -> int | None:
        """The layer of the call that is being made."""
        layers, number = self._layers[id(module)], self._calls.get(id(module), 0)
        if number >= len(layers):
            times = "once" if len(layers) == 1 else f"{len(layers)} times"
            where = "" if layers[0] is None else f" of layer {layers[0]}"
            raise UnknownArchitectureError(
                f"the module at site {self._name!r}{where} ({type(module).__name__}) is called more than {times} in "
                "one pass, and which values are those of the layer is not clear"
            )
        self._calls[id(module)] = number + 1
        return layers[number]


def register_hooks(loaded: LoadedModel, collected: Collected, stack: ExitStack) -> None:
    """Register hooks at every requested site; closing the stack removes them.

    The last hook that is reached stops the pass, unless the head is needed.
    """
    request, located = collected.request, loaded.located

    def keep(site: str, place: Place) -> tuple[Callable[..., None], Callable[..., None]]:
        turns, wanted = _Turns(place.modules, site), {layer for name, layer in request.wanted if name == site}

        def take(module: nn.Module, values: Any) -> None:
            layer = turns.next(module)
            if layer in wanted:
                scale = 1.0 if layer is None else place.scales.get(layer, 1.0)
                added = values if scale == 1 else first_tensor(values)
                collected.take(site, layer, added if scale == 1 or added is None else added * scale)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(module, input_tensor(args, kwargs))

        def after(module: nn.Module, _args: Any, output: Any) -> None:
            take(module, output)

        return before, after

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if ("embed", None) not in collected.seen:
            collected.take("embed", None, input_tensor(args, kwargs))
        if request.stops and request.deepest is None:
            raise DeepestLayerDoneError

    def score(turns: _Turns) -> Callable[..., None]:
        def hook(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            scores = raw_scores(gate, (*args, *kwargs.values()), output if request.routers_raw else None)
            collected.take("router", turns.next(gate), scores)

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

    def stop(turns: _Turns, deepest: int) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if turns.next(module) == deepest:
                raise DeepestLayerDoneError

        return hook

    def hand_on(_module: nn.Module, _args: Any, output: Any) -> None:
        collected.hand_on(output)

    handles = []
    if "embed" in request.places:
        handles.append(located.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    for site, place in request.places.items():
        if site == "embed":
            continue
        before, after = keep(site, place)
        kept: tuple[int | None, ...] = request.layers_of(site) if place.layered else (None,)
        for module in {id(place.modules[layer]): place.modules[layer] for layer in kept}.values():
            if place.given:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
    turns = _Turns({layer: located.routers[layer].gate for layer in request.routers}, "router")
    for layer in request.routers:
        router = located.routers[layer]
        if layer == next(other for other in request.routers if located.routers[other].gate is router.gate):
            handles.append(router.gate.register_forward_hook(score(turns), with_kwargs=True))
        if router.around is not None:
            handles.append(router.around.register_forward_hook(score_unseen(layer), with_kwargs=True))
    if request.ends is not None:
        handles.append(located.blocks[request.ends].register_forward_hook(hand_on))
    if request.stops and request.deepest is not None:
        ends = stop(_Turns(dict(enumerate(located.blocks)), "resid"), request.deepest)
        handles.append(located.blocks[request.deepest].register_forward_hook(ends))
    elif request.outputs.needs_head and located.head is not None:
        handles.append(located.head.register_forward_pre_hook(leave_padding_out))
    for handle in handles:
        stack.callback(handle.remove)
