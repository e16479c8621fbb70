"""Where a pass of a model is that somebody else runs, as hooks on its blocks see it. Never what is done there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["Passing"]


class Passing:
    """Where a pass is: which layer comes next of a module that stands for several, and how many tokens came before."""

    def __init__(self, blocks: tuple[nn.Module, ...]) -> None:
        self._layers: dict[int, list[int]] = {}
        for layer, block in enumerate(blocks):
            self._layers.setdefault(id(block), []).append(layer)
        self._calls: dict[int, int] = {}
        self.before = 0

    def begin(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        """A pass begins."""
        self._calls = {}
        cache: Any = kwargs.get("past_key_values")
        self.before = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0

    def layer(self, module: nn.Module) -> int:
        """The layer of the call that is being made."""
        layers, number = self._layers[id(module)], self._calls.get(id(module), 0)
        self._calls[id(module)] = number + 1
        return layers[number % len(layers)]
