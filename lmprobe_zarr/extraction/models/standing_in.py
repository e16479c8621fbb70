"""Blocks that are not computed: they give rows that are known already, and the model's own forward goes on from there.

So masks, rotary embeddings, final norm, head, scaling and caps are those of the model, whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Forms", "form_of", "standing_in"]

#: What a block returns beside its rows, by the identity of the module: None for a bare tensor, otherwise the entries of its tuple.
Forms = dict[int, tuple[Any, ...] | None]


def form_of(output: Any) -> tuple[Any, ...] | None:
    """The form of what a block returned; None where it is the rows alone. Tensors beside the rows are not kept."""
    if not isinstance(output, tuple | list):
        return None
    return tuple(None if isinstance(entry, torch.Tensor) else entry for entry in output)


@contextmanager
def standing_in(blocks: Sequence[nn.Module], rows: torch.Tensor, forms: Forms) -> Iterator[None]:
    """Inside, each of the blocks returns `rows` and computes nothing.

    Parameters
    ----------
    blocks : sequence of Module
        All that come before the first block that is to be computed: only what the last of them returns matters.
    rows : Tensor
        As the last of them would return it.
    forms : dict
        What each of them returns beside its rows, as `form_of` found it in a pass that computed them.
    """
    own = [(block, vars(block).get("forward")) for block in {id(block): block for block in blocks}.values()]

    def forward_of(form: tuple[Any, ...] | None) -> Any:
        output = rows if form is None else (rows, *form[1:])
        return lambda *_, **__: output

    try:
        for block, _ in own:
            block.forward = forward_of(forms.get(id(block)))
        yield
    finally:
        for block, before in own:
            vars(block).pop("forward", None)
            if before is not None:
                block.forward = before
