"""`LoadedModel`: a model and its tokenizer, ready to run, with the provenance that distinguishes its activations. Never a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lmprobe_zarr.extraction.models.architectures import Located
from lmprobe_zarr.extraction.models.identity import Provenance
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.streamed import StreamedBlocks
from lmprobe_zarr.extraction.models.tokenizing import DecoderStart
from lmprobe_zarr.extraction.models.window import Window

__all__ = ["LoadedModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that :func:`~lmprobe_zarr.extraction.run` can run.

    Parameters
    ----------
    module : torch Module
        The model as loaded or as given.
    tokenizer : transformers tokenizer
    name : str
        Its name in a store.
    located : Located
        Its body, blocks, sites, routers and head.
    num_layers : int
        Blocks.
    hidden_size : int or None
        Width of the residual stream; None where the configuration does not say.
    window : Window
        The most tokens that it takes at once.
    vocab_size : int or None
    dtype : str
        The dtype that it computes in.
    device : torch.device
        The device of the token ids; that of the whole model unless `device_map` spread it.
    spread : bool
        Whether its blocks and its head lie on several devices.
    predicts_next : bool
        Whether its head, if it has one, predicts every next token from those before it.
    num_experts : int or None
        How many experts its routers choose from; None where it has none, or the configuration does not say.
    pad_id : int
        The token id that pads shorter prompts of a batch; no token of a prompt sees it.
    decoder_start : DecoderStart, optional
        For the decoder of an encoder-decoder, what it reads first.
    streamed : StreamedBlocks, optional
        What reads the weights of its blocks, where these are not all in memory.
    provenance : dict
        Every field; see :mod:`lmprobe_zarr.extraction.models.identity`.
    recorded : dict
        Recorded only, not part of the identity: attention implementation, device, library versions, what was found where.
    checked : dict
        What `lmprobe_zarr.extraction.models.check` has seen of this model.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    located: Located
    num_layers: int
    hidden_size: int | None
    window: Window
    vocab_size: int | None
    dtype: str
    device: torch.device
    spread: bool = False
    predicts_next: bool = False
    num_experts: int | None = None
    pad_id: int = 0
    decoder_start: DecoderStart | None = None
    streamed: StreamedBlocks | None = None
    provenance: Provenance = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> str:
        """Which modules give its sites, as text."""
        return ", ".join(f"{site}={path}" for site, path in self.located.paths.items())

    @property
    def context_length(self) -> int | None:
        """The most tokens that it takes at once; None where it has no limit, or it is unknown."""
        return self.window.tokens

    @property
    def turn(self) -> nn.Module:
        """The module whose turn a pass takes. An encoder that is run by itself and with its decoder has hooks for one of them at a time."""
        body = self.located.body
        return body.encoder if isinstance(body, PairedBody) else body

    @property
    def router_layers(self) -> tuple[int, ...]:
        """The layers that have a router, ascending; none in a dense model."""
        return tuple(sorted(self.located.routers))

    def close(self) -> None:
        """Nothing: the model is in this process, which frees it with the last reference."""
