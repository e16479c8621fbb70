"""Whether the weights of a model are finite; they are examined only where what was computed is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from lmprobe_zarr.batch import SCALARS
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.wrappers import broken_weights

__all__ = ["FiniteWeights"]


def _is_finite(name: str, tensor: torch.Tensor, prompts: int) -> bool:
    if name in SCALARS:
        # The first token of a prompt has no probability, which is NaN.
        return int(torch.isnan(tensor).sum()) <= prompts
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


@dataclass(slots=True)
class FiniteWeights:
    """What is known of the weights of one model in one run."""

    loaded: LoadedModel
    known: set[str] = field(default_factory=set)

    def check(self, values: Iterable[tuple[str, torch.Tensor]], prompts: int, layer: int | None = None) -> None:
        """Raise if values are NaN or infinite because a weight is.

        What only the computation makes so is kept, and counted as it is stored.

        Parameters
        ----------
        values : iterable of (str, Tensor)
            By variable.
        prompts : int
            Whose values these are.
        layer : int, optional
            The block that computed them, where each has its weights only while it is its turn.
        """
        what = "" if layer is None else str(layer)
        if what in self.known or all(_is_finite(name, tensor, prompts) for name, tensor in values):
            return
        loaded, blocks = self.loaded, self.loaded.located.blocks
        with running(loaded.turn):
            found = broken_weights(loaded.module if layer is None else blocks[layer])
        if found is None:
            self.known.add(what)
            return
        name, wrong, size = found
        if layer is None:
            part = loaded.module.get_submodule(name.rpartition(".")[0])
            layer = next((i for i, block in enumerate(blocks) if any(each is part for each in block.modules())), None)
        else:
            name = f"{_path_of(loaded.module, blocks[layer])}.{name}"
        where = "" if layer is None else f" of layer {layer}"
        raise InvalidArgumentError(
            f"{wrong} of the {size} values of the weight {name!r}{where} of {loaded.name!r} are NaN or infinite, and so is what is "
            "computed with it: load the model again, or take only layers before it"
        )


def _path_of(module: nn.Module, block: nn.Module) -> str:
    return next((name for name, part in module.named_modules() if part is block), "")
