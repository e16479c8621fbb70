"""How a model has to be run, as the check of it has seen: which prompts may share a batch, and how its blocks lay their rows out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

__all__ = ["Conduct", "Layout", "Padding"]

Padding = Literal["unmasked", "masked", "equal", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the rows of a block's output are arranged; the default is (batch, token, hidden).

    Parameters
    ----------
    sequence_first : bool
        (token, batch, hidden), as in XLNet.
    stream : int or None
        (stream, batch, token, hidden), as in Gemma 3n: the index of the stream that is the residual stream.
    leading : int
        Rows before those of the prompt, which the model adds itself. Rows after them need no number: they are left out.
    """

    sequence_first: bool = False
    stream: int | None = None
    leading: int = 0

    def apply(self, hidden: torch.Tensor, batch: int, longest: int) -> torch.Tensor:
        """The same rows as (batch, token, hidden), if they have this layout."""
        if self.stream is not None and hidden.ndim == 4:
            hidden = hidden[self.stream]
        if self.sequence_first and hidden.ndim == 3 and hidden.shape[1] == batch:
            hidden = hidden.transpose(0, 1)
        if hidden.ndim == 3 and hidden.shape[0] == batch and hidden.shape[1] > longest:
            hidden = hidden[:, self.leading : self.leading + longest]
        return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a model is run.

    Parameters
    ----------
    padding : {"unmasked", "masked", "equal", "single"}
        Prompts of different lengths are padded on the right without a mask; or with one; or only prompts of the same length share a batch;
        or every prompt runs alone.
    layout : Layout
    whole : bool
        Whether the model is called as a whole, because its body alone computes other values.
    cache : bool
        Whether the cache of keys and values is left as the model has it, because it computes other values without (repeated blocks that
        share a place in the cache).
    causal : bool or None
        Whether no token sees those after it; None where that was not examined.
    extra_rows : bool
        Whether blocks work on more rows than the prompt has tokens.
    layers : tuple of int
        Those that a pass over token ids calls; without layers that need an image, for example.
    """

    padding: Padding = "unmasked"
    layout: Layout = field(default_factory=Layout)
    whole: bool = False
    cache: bool = False
    causal: bool | None = None
    extra_rows: bool = False
    layers: tuple[int, ...] = ()
