"""What a forward pass keeps: the request, the padded batch, and the activations as the hooks hand them over.

Pooling and the removal of padding happen here, on the device. Never runs a model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmprobe_zarr.batch import ALL, NO_OUTPUTS, Outputs, concat_ranges, offsets_of, pooled_name, split_variable
from lmprobe_zarr.errors import UnknownArchitectureError
from lmprobe_zarr.extraction.models.architectures import Place
from lmprobe_zarr.extraction.models.conduct import Layout
from lmprobe_zarr.extraction.models.outputs import KeptLogits
from lmprobe_zarr.extraction.models.padded_pooling import POOL_PADDED
from lmprobe_zarr.extraction.models.structure import first_tensor
from lmprobe_zarr.extraction.models.token_batches import Kept, KeptSite
from lmprobe_zarr.typing import Array, Ints

__all__ = ["CaptureRequest", "Collected", "PaddedBatch", "logits_of"]


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits in the output of a model; None where there are none."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else None)
    return logits if isinstance(logits, torch.Tensor) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """What is kept of a forward pass.

    Parameters
    ----------
    layers : tuple of int
        Of sites inside of the blocks. A layer that lacks a site is left out of it.
    places : mapping of str to Place
        The sites.
    poolings : tuple of str
    parts : mapping of str to str
        The parts of the tokens that are pooled, by name, with what is noted of each: all, or those in a mask of the batch.
    keep_tokens : bool
    outputs : Outputs
    routers : tuple of int
        Layers whose router is kept.
    routers_of_model : tuple of int
        All layers that have one.
    routers_raw : bool
        Whether the output of the gate module already is the raw scores.
    ends : int, optional
        The block after which the pass ends, and whose rows of all tokens are handed on, so that a later pass goes on from them.
    """

    layers: tuple[int, ...]
    places: Mapping[str, Place]
    poolings: tuple[str, ...]
    keep_tokens: bool
    outputs: Outputs = NO_OUTPUTS
    parts: Mapping[str, str] = field(default_factory=lambda: {ALL: ""})
    routers: tuple[int, ...] = ()
    routers_of_model: tuple[int, ...] = ()
    routers_raw: bool = True
    ends: int | None = None

    @property
    def head_rows(self) -> str:
        """The tokens that the head must see, as a name for `PaddedBatch.index`."""
        return "tokens" if self.outputs.perplexity or self.outputs.logits == "all" else "last_token"

    @property
    def token_level(self) -> bool:
        """Whether anything is kept per token."""
        return self.keep_tokens or self.outputs.token_level

    def layers_of(self, site: str) -> tuple[int, ...]:
        """The layers that are kept of a site, ascending; none where it is outside of the blocks."""
        if site == "router":
            return self.routers
        modules = self.places[site].modules
        return tuple(layer for layer in self.layers if layer in modules)

    @property
    def wanted(self) -> set[tuple[str, int | None]]:
        """Every site with every layer that is kept of it; None for the layer of one outside of the blocks."""
        found: set[tuple[str, int | None]] = {("router", layer) for layer in self.routers}
        for site, place in self.places.items():
            found |= {(site, layer) for layer in self.layers_of(site)} if place.layered else {(site, None)}
        return found

    @property
    def deepest(self) -> int | None:
        """The last block that is needed; None if no block is."""
        return max((layer for _, layer in self.wanted if layer is not None), default=None) if self.ends is None else self.ends

    @property
    def stops(self) -> bool:
        """Whether nothing after the deepest layer is needed: neither the head, nor another module outside of the blocks."""
        outside = any(not place.layered and site != "embed" for site, place in self.places.items())
        return not self.outputs.needs_head and not outside

    def kept(self, num_layers: int) -> Kept:
        """The same for what hands the values on, of a model with this many layers."""
        sites = {
            site: KeptSite(layers=self.layers_of(site), layered=at.layered, of_model=at.layers, path=at.path, heads=at.heads)
            for site, at in self.places.items()
        }
        if self.outputs.router:
            sites["router"] = KeptSite(layers=self.routers, of_model=self.routers_of_model)
        return Kept(sites=sites, outputs=self.outputs, parts=self.parts, token_level=self.token_level, num_layers=num_layers)


@dataclass(slots=True)
class PaddedBatch:
    """One batch as the model sees it, and where its tokens are among its (batch × longest) rows."""

    lengths: Ints
    longest: int
    token_ids: Ints
    parts: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    copies: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def index(self, what: str, device: torch.device) -> torch.Tensor:
        """An index of this batch on a device, made once.

        Among the padded rows: ``tokens``, and the ``last_token`` or ``first_token`` of every prompt. The ``mask`` has the shape (batch,
        longest, 1). Among the tokens without padding, end to end: the rows of the ``firsts`` and ``lasts``. ``ids`` are the token ids.
        """
        if (what, device) not in self.copies:
            starts = np.arange(len(self.lengths), dtype=np.int64) * self.longest
            if what == "mask":
                values: Array = (np.arange(self.longest) < self.lengths[:, None])[..., None]
            elif what == "tokens":
                values = concat_ranges(starts, self.lengths)
            elif what == "ids":
                values = self.token_ids
            elif what in ("firsts", "lasts"):
                values = offsets_of(self.lengths)[:-1] + (self.lengths - 1 if what == "lasts" else 0)
            else:
                values = starts + (self.lengths - 1 if what == "last_token" else 0)
            self.copies[what, device] = torch.from_numpy(values).to(device)
        return self.copies[what, device]

    def _index_of_part(self, part: str, what: str, device: torch.device) -> torch.Tensor:
        """As `index`, of one part of the tokens; and ``none``, the prompts that have no token in it, whose last and first is any row."""
        key = f"{what} of {part}", device
        if key not in self.copies:
            mask = np.zeros((len(self.lengths), self.longest), bool)
            mask[np.arange(self.longest) < self.lengths[:, None]] = self.parts[part]
            starts = np.arange(len(self.lengths), dtype=np.int64) * self.longest
            values: Array
            if what == "mask":
                values = mask[..., None]
            elif what == "none":
                values = np.flatnonzero(~mask.any(axis=1))
            elif what == "last_token":
                values = starts + self.longest - 1 - mask[:, ::-1].argmax(axis=1)
            else:
                values = starts + mask.argmax(axis=1)
            self.copies[key] = torch.from_numpy(values).to(device)
        return self.copies[key]

    def pool(self, hidden: torch.Tensor, pooling: str, part: str = ALL) -> torch.Tensor:
        """(batch, longest, width) to (batch, width), as `lmprobe_zarr.batch.pool_ragged` does it; NaN where a prompt has no such token."""
        if part == ALL:
            return POOL_PADDED[pooling](hidden, self.index)
        pooled = POOL_PADDED[pooling](hidden, functools.partial(self._index_of_part, part))
        return pooled.index_fill(0, self._index_of_part(part, "none", hidden.device), torch.nan)


@dataclass(slots=True)
class Collected:
    """The activations of one batch as the hooks hand them over, layer by layer, in one buffer per variable.

    Everything is copied at once, because some models (Falcon) later write into the tensors that their modules returned.
    """

    request: CaptureRequest
    padded: PaddedBatch
    on_host: bool
    layout: Layout = field(default_factory=Layout)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: set[tuple[str, int | None]] = field(default_factory=set)
    handed_on: torch.Tensor | None = None

    def hand_on(self, output: Any) -> None:
        """Keep the rows that a block returns, one prompt after the other, beside all that is requested.

        Raises
        ------
        UnknownArchitectureError
            As `take` does.
        """
        hidden = self._by_token("resid", output)
        self.handed_on = hidden.flatten(0, 1).index_select(0, self.padded.index("tokens", hidden.device))

    def take(self, site: str, layer: int | None, output: Any) -> None:
        """Keep the output of a module: its tokens, its poolings, or both.

        Raises
        ------
        UnknownArchitectureError
            It has another shape than a row for every token.
        """
        hidden = self._by_token(site, output)
        self.seen.add((site, layer))
        if self.request.keep_tokens or site == "router":
            flat, wanted = hidden.flatten(0, 1), self.padded.index("tokens", hidden.device)
            room = self._room(self.tokens, site, layer, (len(wanted), flat.shape[1]), flat)
            if room is None:
                self._put(self.tokens, site, layer, flat.index_select(0, wanted))
            else:
                torch.index_select(flat, 0, wanted, out=room)
        for pooling in self.request.poolings if site != "router" else ():
            for part in self.request.parts:
                self._put(self.prompts, pooled_name(site, pooling, part), layer, self.padded.pool(hidden, pooling, part))

    def _by_token(self, site: str, output: Any) -> torch.Tensor:
        """The output of a module as (batch, longest, width)."""
        batch, longest = len(self.padded.lengths), self.padded.longest
        found = first_tensor(output)
        place = self.request.places.get(site)
        if found is not None and place is not None and place.token_axis is not None and found.ndim > 3:
            found = found.movedim(place.token_axis, 1).flatten(2)
        hidden = None if found is None else self.layout.apply(found, batch, longest)
        if hidden is not None and hidden.ndim == 3 and hidden.shape[:2] == (1, longest):
            hidden = hidden.expand(batch, -1, -1)  # one row per position for all prompts, as embeddings of positions are
        # Older OPT runs its MLP on (batch × longest, width).
        if hidden is None or hidden.ndim not in {2, 3} or hidden.shape[:-1].numel() != batch * longest:
            got = type(output).__name__ if found is None else tuple(found.shape)
            raise UnknownArchitectureError(
                f"the module at site {site!r} gives {got}, not (batch {batch}, token {longest}, hidden): name the right one with modules="
            )
        return hidden.reshape(batch, longest, hidden.shape[-1])

    def take_logits(self, output: Any) -> None:
        """Keep the requested parts of the whole model's output."""
        padded, logits = self.padded, logits_of(output)
        every = self.request.head_rows == "tokens"
        wanted, cells = len(padded.token_ids) if every else len(padded.lengths), len(padded.lengths) * padded.longest
        if logits is None or logits.ndim < 2 or logits.shape[:-1].numel() not in {wanted, cells}:
            got = type(output).__name__ if logits is None else tuple(logits.shape)
            raise UnknownArchitectureError(
                f"the model gives {got} where logits of (batch {len(padded.lengths)}, token {padded.longest}, vocab) were expected: "
                "leave logits and perplexity out"
            )
        rows = logits.reshape(-1, logits.shape[-1])
        if len(rows) != wanted:
            # The hook on the head was not called, so the head computed the padding too.
            rows = rows.index_select(0, padded.index(self.request.head_rows, rows.device))
        kept = self.keep_logits()
        kept.add(0, rows)
        self.put_logits(kept)

    def keep_logits(self) -> KeptLogits:
        """What takes the logits of this batch, a slice of tokens after another."""
        every = self.request.head_rows == "tokens"
        return KeptLogits(self.request.outputs, every, self.padded.index)

    def put_logits(self, kept: KeptLogits) -> None:
        """Keep what was made of the logits."""
        tokens, prompts = kept.variables()
        for buffers, found in ((self.tokens, tokens), (self.prompts, prompts)):
            for name, rows in found.items():
                self._put(buffers, name, None, rows)

    def _put(self, buffers: dict[str, torch.Tensor], variable: str, layer: int | None, rows: torch.Tensor) -> None:
        if layer is None:
            buffers[variable] = rows.cpu() if self.on_host else rows
            return
        buffer = self._buffer(buffers, variable, tuple(rows.shape), rows)
        if buffer.dtype != rows.dtype:
            # A model may compute some layers in a higher precision than the others.
            buffer = buffers[variable] = buffer.to(torch.promote_types(buffer.dtype, rows.dtype))
        buffer[self._layers(variable).index(layer)].copy_(rows)

    def _layers(self, variable: str) -> tuple[int, ...]:
        return self.request.layers_of(split_variable(variable)[0])

    def _buffer(self, buffers: dict[str, torch.Tensor], variable: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if variable not in buffers:
            home = torch.device("cpu") if self.on_host else like.device
            buffers[variable] = torch.empty((len(self._layers(variable)), *shape), dtype=like.dtype, device=home)
        return buffers[variable]

    def _room(
        self, buffers: dict[str, torch.Tensor], variable: str, layer: int | None, shape: tuple[int, ...], like: torch.Tensor
    ) -> torch.Tensor | None:
        """The place of a layer in its buffer, where rows can be gathered without a further copy: same device and dtype. Otherwise None."""
        if layer is None:
            return None
        buffer = self._buffer(buffers, variable, shape, like)
        alike = buffer.dtype == like.dtype and buffer.device == like.device
        return buffer[self._layers(variable).index(layer)] if alike else None
