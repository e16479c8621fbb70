"""One forward pass over one padded batch: how the model is called, and what the hooks collected.

Batches are padded on the right, whatever the tokenizer's padding side. Where no token sees those after it, padding on the right changes
nothing, needs no mask, and leaves every token at the position that it has alone. How prompts may share a batch is the model's `Conduct`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lmprobe_zarr.batch import describe_layers
from lmprobe_zarr.errors import UnknownArchitectureError
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected, PaddedBatch
from lmprobe_zarr.extraction.models.conduct import Conduct
from lmprobe_zarr.extraction.models.head import BodyDoneError, HeadInSlices, SlicedHead, slice_tokens
from lmprobe_zarr.extraction.models.hooks import DeepestLayerDoneError, register_hooks
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.loading_report import quiet_logging
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.standing_in import Forms, standing_in
from lmprobe_zarr.extraction.models.structure import evaluating, original_attention
from lmprobe_zarr.extraction.models.tensor_bits import without_gradients
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.window import rope_kind, rope_settings
from lmprobe_zarr.extraction.models.wrappers import uncompiled
from lmprobe_zarr.typing import Ints

__all__ = ["KnownRows", "ModelCall", "as_run", "lengths_that_matter", "run_forward_pass"]

# These scalings of rotary positions depend on the longest prompt of the batch, once it exceeds the original window.
LENGTH_SCALINGS: Final = ("dynamic", "longrope", "su")


# The model that this thread runs.
_HERE: Final = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """Which module is called, with which arguments, and which prompts may share a batch.

    Parameters
    ----------
    module : Module
        The whole model where its head is needed, its body otherwise.
    takes_mask, takes_cache : bool
        Whether it takes ``attention_mask``, and ``use_cache=False``.
    conduct : Conduct
    uniform_above : int or None
        Prompts of more tokens share a batch only with prompts of the same length.
    rotary : tuple of Module
        Rotary embeddings that depend on the longest prompt of a batch.
    slices : HeadInSlices
        Whether the head can be run in slices of tokens.
    """

    module: nn.Module
    takes_mask: bool
    takes_cache: bool
    conduct: Conduct
    uniform_above: int | None
    rotary: tuple[nn.Module, ...] = ()
    slices: HeadInSlices = field(default_factory=HeadInSlices)

    @staticmethod
    def of(loaded: LoadedModel, request: CaptureRequest, conduct: Conduct) -> ModelCall:
        """How a model is called for a request."""
        whole = loaded.located.whole if request.outputs.needs_head else None
        module = whole if whole is not None else loaded.module if conduct.whole else loaded.located.body
        names = inspect.signature(module.forward).parameters
        takes_mask = "attention_mask" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
        config = getattr(loaded.located.body, "config", None)
        uniform, rotary = lengths_that_matter(loaded.located.body, config)
        if conduct.padding in ("equal", "single") or conduct.extra_rows:
            uniform = 0
        takes_cache = "use_cache" in names and not conduct.cache
        return ModelCall(
            module=module, takes_mask=takes_mask, takes_cache=takes_cache, conduct=conduct, uniform_above=uniform, rotary=rotary
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRows:
    """Rows of one batch that need not be computed.

    Parameters
    ----------
    layer : int
        The block that they come from; it and those before it do not run.
    rows : Tensor, (token, hidden)
        One prompt after the other, without padding, in the dtype that the block gives.
    forms : dict
        What these blocks return beside their rows.
    """

    layer: int
    rows: torch.Tensor
    forms: Forms

    def padded(self, batch: PaddedBatch, device: torch.device) -> torch.Tensor:
        """The rows as the block would return them: (batch, longest, hidden). Padding is zero, and no token sees it."""
        found = torch.zeros((len(batch.lengths) * batch.longest, self.rows.shape[-1]), dtype=self.rows.dtype, device=device)
        found[batch.index("tokens", device)] = self.rows.to(device)
        return found.view(len(batch.lengths), batch.longest, -1)


def lengths_that_matter(body: nn.Module, config: Any) -> tuple[int | None, tuple[nn.Module, ...]]:
    """From which length on values depend on the longest prompt of the batch, and the modules that keep the longest prompt so far."""
    settings = rope_settings({name: getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")})
    starts = []
    for each in settings.values():
        if rope_kind(each) in LENGTH_SCALINGS:
            names = ("original_max_position_embeddings", *(("max_position_embeddings",) if rope_kind(each) == "dynamic" else ()))
            found = [value for name in names for value in (each.get(name), getattr(config, name, None)) if isinstance(value, int)]
            starts.append(min(found, default=0))
    if not starts:
        return None, ()
    return min(starts), tuple(part for part in body.modules() if hasattr(part, "original_max_seq_len"))


def _forget_lengths(rotary: Sequence[nn.Module]) -> None:
    """Set rotary embeddings back to those of short prompts. A dynamic one keeps what the longest prompt so far needed."""
    for part in rotary:
        start: Any = part.original_max_seq_len
        for name in [name for name in part._buffers if name.endswith("inv_freq") and not name.endswith("original_inv_freq")]:
            prefix = name.removesuffix("inv_freq")
            first, cached = getattr(part, f"{prefix}original_inv_freq", None), f"{prefix}max_seq_len_cached"
            longest: Any = getattr(part, cached, None)
            if isinstance(first, torch.Tensor) and longest is not None and longest > start:
                held = part._buffers[name]
                part._buffers[name] = first if held is None else first.to(held.device)
                setattr(part, cached, start)


def _sliced(loaded: LoadedModel, call: ModelCall, collected: Collected, options: dict[str, Any]) -> tuple[SlicedHead, int] | None:
    """What runs the head in slices, and how many tokens each has; None where all logits are computed at once."""
    step = slice_tokens(collected, loaded.located.head, loaded.vocab_size)
    if step is None or call.slices.allowed is False or isinstance(call.module, PairedBody):
        return None
    sliced = SlicedHead(whole=call.module, body=loaded.located.body, collected=collected, options=options, device=loaded.device)
    if call.slices.allowed is None:
        call.slices.allowed = sliced.agrees()
    return (sliced, step) if call.slices.allowed else None


@contextmanager
def as_run(loaded: LoadedModel) -> Iterator[None]:
    """Inside, a model computes as its passes are run: in evaluation mode, uncompiled, without gradients, and for one caller at a time.

    Inside of itself it does nothing: going through all modules of a model takes longer than a small pass over one block.
    """
    if getattr(_HERE, "module", None) is loaded.module:
        yield
        return
    with (
        running(loaded.turn), evaluating(loaded.module), uncompiled(loaded.module), original_attention(loaded.module),
        without_gradients(loaded.module),
        quiet_logging(),  # GPT-2 warns about a missing mask, which a causal model does not need here
    ):  # fmt: skip
        before, _HERE.module = getattr(_HERE, "module", None), loaded.module
        try:
            yield
        finally:
            _HERE.module = before


def run_forward_pass(
    loaded: LoadedModel,
    call: ModelCall,
    request: CaptureRequest,
    ids: Sequence[Ints],
    *,
    encoder_ids: Sequence[Ints] | None = None,
    parts: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    pad_id: int | None = None,
    known: KnownRows | None = None,
) -> Collected:
    """The activations of one batch, given as the token ids of each prompt, and of its encoder's prompt where there is one.

    `parts` are the masks of the parts of all these tokens that are pooled, and `pad_id` is the token id of the padding, if it is not the
    model's. With `known`, the pass goes on from there.

    Raises
    ------
    UnknownArchitectureError
        The model ran without calling a module that was named for a site.
    """
    lengths = np.array([len(i) for i in ids], np.int64)
    longest = int(lengths.max())
    padded = np.full((len(ids), longest), loaded.pad_id if pad_id is None else pad_id, np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    collected = Collected(
        request, PaddedBatch(lengths, longest, np.concatenate(ids), parts or {}), on_host=loaded.spread, layout=call.conduct.layout
    )
    options: dict[str, Any] = {"use_cache": False} if call.takes_cache else {}
    if call.takes_mask and call.conduct.padding == "masked" and lengths.min() < longest:
        options["attention_mask"] = collected.padded.index("mask", loaded.device)[..., 0].to(torch.int64)
    with ExitStack() as stack:
        stack.enter_context(as_run(loaded))
        _forget_lengths(call.rotary)
        if isinstance(call.module, PairedBody):
            assert encoder_ids is not None  # noqa: S101 - otherwise the encoder would read what the decoder does
            stack.enter_context(call.module.reading(encoder_ids, loaded.pad_id if pad_id is None else pad_id))
        sliced = _sliced(loaded, call, collected, options)
        register_hooks(loaded, collected, stack)
        if known is not None:
            rows = known.padded(collected.padded, loaded.device)
            stack.enter_context(standing_in(loaded.located.blocks[: known.layer + 1], rows, known.forms))
        if sliced is not None:
            stack.enter_context(sliced[0].hooks)
            sliced[0].stop_after_body()
        stack.enter_context(suppress(DeepestLayerDoneError))
        with suppress(BodyDoneError):
            output = call.module(input_ids=torch.from_numpy(padded).to(loaded.device), **options)
            if request.outputs.needs_head:
                collected.take_logits(output)
        if sliced is not None:
            sliced[0].run(sliced[1])
    wanted = request.wanted
    absent = wanted - collected.seen
    if absent:
        raise _not_called(absent, wanted)
    return collected


def _not_called(absent: set[tuple[str, int | None]], wanted: set[tuple[str, int | None]]) -> UnknownArchitectureError:
    layers = sorted(layer for _, layer in absent if layer is not None)
    called = sorted({layer for _, layer in wanted - absent if layer is not None} - set(layers))
    if layers and called:
        return UnknownArchitectureError(
            f"layers {describe_layers(layers)} are not called for token ids alone: leave them out, layers={called!r}"
        )
    first = min(map(str, absent))
    return UnknownArchitectureError(f"the model ran without calling {first} ({len(absent)} in all): name the right ones with modules=")
