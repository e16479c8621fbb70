"""Tokenized prompts to an iterator of `TokenBatch`: checks, batches, copies to the host. Never a path, a store or a tokenizer.

Without logits or perplexity only the model's body runs, up to the deepest layer asked for. With them the whole model runs, so that its
logits are scaled and capped as it does itself; but its head sees no padding, and where that is enough only the last token of every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from lmprobe_zarr.batch import (
    ALL,
    NO_OUTPUTS,
    SCALARS,
    LayerSpec,
    Outputs,
    Sites,
    SitesSpec,
    TokenBatch,
    concat_ranges,
    describe_layers,
    offsets_of,
    parse_poolings,
    parse_sites,
    resolve_layers,
    row_bytes,
    shorten,
)
from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.batching import (
    LOGIT_BYTES,
    Windows,
    check_batch_sizes,
    default_batch_tokens,
    free_memory,
    is_out_of_memory,
    most_prompts_with_logits,
    next_batch,
)
from lmprobe_zarr.extraction.models.captured import CaptureRequest, Collected
from lmprobe_zarr.extraction.models.check import check_model
from lmprobe_zarr.extraction.models.conduct import Conduct
from lmprobe_zarr.extraction.models.continuing import StoredRows, forms_for, is_rounded
from lmprobe_zarr.extraction.models.forward import KnownRows, ModelCall, run_forward_pass
from lmprobe_zarr.extraction.models.loading import LoadedModel, check_head, no_prediction
from lmprobe_zarr.extraction.models.outputs import gives_raw_scores, head_width, perplexity_of
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.places import places_of
from lmprobe_zarr.extraction.models.standing_in import Forms
from lmprobe_zarr.extraction.models.structure import evaluating, input_embeddings
from lmprobe_zarr.extraction.models.token_batches import Kept, token_batches
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, check_vocabulary, outside_vocabulary, too_long
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.extraction.models.wrappers import broken_weights
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.typing import Array, Ints

__all__ = ["Progress", "run"]

Progress = Callable[[int, int], None]

# The dtypes that numpy has too.
NUMPY_DTYPES: Final = (torch.float32, torch.float16, torch.float64, torch.int32)


def run(
    loaded: LoadedModel,
    tokenized: TokenizedPrompts,
    *,
    layers: LayerSpec = "all",
    sites: SitesSpec | Sites = ("resid",),
    poolings: str | Sequence[str] = ("last_token",),
    parts: Mapping[str, str] | None = None,
    keep_tokens: bool = False,
    outputs: Outputs = NO_OUTPUTS,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    progress: Progress | None = None,
    windows: Windows | None = None,
    after_window: Callable[[], None] | None = None,
    start: StoredRows | None = None,
) -> Iterator[TokenBatch]:
    """The activations of every prompt, batch by batch, the longest prompts of each window first.

    Parameters
    ----------
    loaded : LoadedModel
    tokenized : TokenizedPrompts
    layers : LayerSpec
        Nothing after the deepest of them is computed, unless `outputs` need the head. Ignored where no variable has layers. The
        router is taken from those layers that have one.
    sites : Sites, or as for `lmprobe_zarr.batch.parse_sites`
        May be empty where `outputs` are asked for.
    poolings : sequence of {"last_token", "first_token", "mean", "max", "min"}
        Pooled on the device; variables ``<site>_<pooling>``, (layer, prompt, hidden).
    parts : mapping of str to str, optional
        Which parts of the tokens are pooled, with what is noted of each: `ALL`, and names of ``tokenized.parts``, whose variables are
        ``<site>_<pooling>_<part>``. By default all tokens. NaN where a prompt has no token in a part.
    keep_tokens : bool
        Whether every token is kept too; variables ``<site>``, (layer, token, hidden).
    outputs : Outputs
        What else to keep from the same forward pass; :mod:`lmprobe_zarr.batch` lists the names. Logits and router scores have the
        model's dtype, perplexities and log-probabilities are float32.
    batch_tokens : int, optional
        Padded tokens per batch: prompts × longest. A prompt longer than that is run alone. For None, see :func:`default_batch_tokens`.
    batch_prompts : int, optional
        Prompts per batch at most.
    progress : callable, optional
        Called with the number of prompts and of tokens of every batch.
    windows : Windows, optional
        How many consecutive prompts are sorted by length at a time; by default all.
    after_window : callable, optional
        Called when all batches of a window have been taken.
    start : StoredRows, optional
        What is known of a layer before all that are asked for. The blocks up to it do not run, where the model can be run so and the
        values are as it computed them; otherwise they do.

    Yields
    ------
    TokenBatch
        Float32, float16 and float64 as the model computed them; bfloat16 as float32 of the same values, named in ``stored_dtype``.
        Variables that are in other layers than the first come in batches of their own, directly after it, with the same prompts and
        columns.

    Raises
    ------
    DeviceMemoryError
        The device cannot hold a single prompt. Batches that do not fit are halved, and so are all that follow.
    UnknownArchitectureError
        A site or a router that is not known for this model.
    InvalidArgumentError, LayerOutOfRangeError
        Arguments out of range, a model without the head that is needed, or layers without a router. Raised by the call itself, not at
        the first batch.
    InvalidArgumentError
        A weight is NaN or infinite, and so is what was computed with it; raised by the batch that shows it.
    PromptTooLongError
        A prompt has more tokens than the model has positions.
    """
    names, outputs = parse_sites(sites, outputs)
    pooled = parse_poolings(poolings if isinstance(poolings, str) else tuple(poolings))
    if outputs and not pooled and not keep_tokens:
        names = Sites()  # no site would be kept
    # numpy numbers and arrays are accepted too.
    chosen = resolve_layers(layers.tolist() if isinstance(layers, np.ndarray | np.generic) else layers, loaded.num_layers)
    places = places_of(loaded, names, chosen)
    request = CaptureRequest(
        layers=chosen if names.any_layered else (),
        places=places,
        poolings=pooled,
        parts={ALL: ""} if parts is None else parts,
        keep_tokens=keep_tokens and bool(names),
        outputs=outputs,
        routers=tuple(layer for layer in chosen if layer in loaded.located.routers) if outputs.router else (),
        routers_of_model=loaded.router_layers if outputs.router else (),
    )
    _check(loaded, tokenized, request, batch_tokens, batch_prompts)
    _check_outputs(loaded, tokenized, request, chosen)
    if request.routers:
        gate, dtype = loaded.located.routers[request.routers[0]].gate, getattr(torch, loaded.dtype)
        with running(loaded.turn), evaluating(gate):
            request = replace(request, routers_raw=gives_raw_scores(gate, loaded.hidden_size, dtype, loaded.device, loaded.name))
    width = head_width(loaded.located.head, loaded.vocab_size) or 0
    most = None
    collected = row_bytes(
        layers=max(len(request.layers), len(request.routers)), hidden_size=loaded.hidden_size or 0, dtype=loaded.dtype, sites=names,
        pooling=pooled, keep_tokens=request.keep_tokens, outputs=outputs, vocab_size=width, experts=loaded.num_experts,
        parts=len(request.parts), widths={site: place.width for site, place in places.items() if place.width},
        site_layers={site: len(request.layers_of(site)) for site, place in places.items() if place.layered},
    )  # fmt: skip
    if batch_tokens is None:
        weight = collected.token
        if outputs.needs_head and request.head_rows == "tokens":
            weight += LOGIT_BYTES * width
        elif outputs.needs_head:
            most = most_prompts_with_logits(width)
        batch_tokens = default_batch_tokens(loaded.device.type, weight)
    conduct = check_model(loaded) if len(tokenized) else Conduct()
    if outputs.needs_head and conduct.causal is False:
        raise no_prediction(loaded.name, f"{type(loaded.module).__name__}, whose tokens see those after them")
    if conduct.padding == "single":
        batch_prompts = 1
    if batch_prompts is not None:
        most = batch_prompts if most is None else min(most, batch_prompts)
    call = ModelCall.of(loaded, request, conduct)
    forms = None
    if start is not None and len(tokenized):
        forms = forms_for(loaded, conduct, start.layer, head=outputs.needs_head)
        if forms is None:
            cache_logger().info("[cache] %r is run from its first block: it cannot be continued from layer %d", loaded.name, start.layer)
    known = _Known(start, forms, loaded) if start is not None and forms is not None else None
    nbytes = collected.prompt + collected.token * tokenized.lengths
    bounds = [(0, len(tokenized))] if windows is None else windows.cut(nbytes, tokenized.run_lengths, batch_tokens, most)
    return _run_all(loaded, call, tokenized, request, batch_tokens, most, progress, bounds, after_window, known)


def _run_all(
    loaded: LoadedModel,
    call: ModelCall,
    tokenized: TokenizedPrompts,
    request: CaptureRequest,
    budget: int,
    most: int | None,
    progress: Progress | None,
    windows: list[tuple[int, int]],
    after_window: Callable[[], None] | None,
    known: _Known | None,
) -> Iterator[TokenBatch]:
    starts = offsets_of(tokenized.lengths)
    weights = _Weights()
    kept = request.kept(loaded.num_layers)

    def batches(copying: _Copying) -> Iterator[TokenBatch]:
        if copying.arrived is not None:
            copying.arrived.synchronize()
        _check_finite(loaded, copying, weights)
        return _batches_of(copying, tokenized, kept)

    for start, stop in windows:
        # The longest prompts come first, so that memory runs out early. A model whose state grows with the longest prompt so far needs them
        # in ascending order.
        lengths = tokenized.run_lengths[start:stop]
        order = start + np.argsort(lengths if call.uniform_above is not None else -lengths, kind="stable")
        done = 0
        previous: _Copying | None = None
        while done < len(order):
            count = next_batch(tokenized.run_lengths[order[done:]], budget, call.uniform_above, most)
            rows = np.sort(order[done : done + count])
            copying = _run_batch(loaded, call, request, tokenized, starts, rows, known)
            if copying is None:
                budget = max(1, count * int(tokenized.run_lengths[rows].max()) // 2)
                free_memory(loaded.device)
                continue
            done += count
            # The previous batch is converted while the device works on this one.
            if previous is not None:
                yield from batches(previous)
            previous = copying if copying.arrived is not None else None
            if progress is not None:
                progress(count, int(tokenized.lengths[rows].sum()))
            if previous is None:
                yield from batches(copying)
        if previous is not None:
            yield from batches(previous)
        if after_window is not None:
            after_window()


def _run_batch(
    loaded: LoadedModel,
    call: ModelCall,
    request: CaptureRequest,
    tokenized: TokenizedPrompts,
    starts: Ints,
    rows: Ints,
    known: _Known | None,
) -> _Copying | None:
    """One batch, or None where the device has too little memory for it. Nothing of it is referenced after the return."""
    ids = [tokenized.token_ids[starts[i] : starts[i + 1]] for i in rows]
    read = None if tokenized.encoder_ids is None else [tokenized.encoder_ids[i] for i in rows]
    places = concat_ranges(starts[rows], tokenized.lengths[rows]) if tokenized.parts else None
    parts = {name: mask[places] for name, mask in tokenized.parts.items()}
    held = None if known is None else known.of([tokenized.sha256[i] for i in rows], tokenized.lengths[rows])
    try:
        return _copy_to_host(run_forward_pass(loaded, call, request, ids, encoder_ids=read, parts=parts, known=held), rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            number = int(tokenized.first[rows[0]])
            raise DeviceMemoryError(
                f"prompts[{number}] {shorten(tokenized.text[rows[0]])} with {len(ids[0])} tokens does not fit into the memory "
                f"of {str(loaded.device)!r}: "
                "use a smaller dtype or fewer layers, device_map='auto', or truncation=True with max_length="
            ) from error
        return None


@dataclass(slots=True)
class _Known:
    """The stored rows of each batch, as long as they are what the model computed."""

    start: StoredRows
    forms: Forms
    loaded: LoadedModel

    def of(self, digests: Sequence[str], lengths: Ints) -> KnownRows | None:
        """The rows of some prompts; None where one has other tokens, is not finite or was rounded, so that the whole pass runs."""
        values = self.start.read(digests)
        dtype = self.loaded.dtype
        if len(values) != int(lengths.sum()) or not np.isfinite(values).all():
            return None
        # Prompt by prompt: one that was stored exactly would hide that another was rounded.
        if any(is_rounded(own, dtype) for own in np.split(values, offsets_of(lengths)[1:-1])):
            return None
        rows = torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
        return KnownRows(layer=self.start.layer, rows=rows, forms=self.forms)


def _check_outputs(loaded: LoadedModel, tokenized: TokenizedPrompts, request: CaptureRequest, chosen: tuple[int, ...]) -> None:
    outputs = request.outputs
    if outputs.needs_head:
        check_head(loaded)
        width = head_width(loaded.located.head, loaded.vocab_size)
        if outputs.top_k is not None and width is not None and outputs.top_k > width:
            raise InvalidArgumentError(f"top_k={outputs.top_k} is more than the {width} logits of {loaded.name!r}: give at most {width}")
        if outputs.perplexity:
            check_vocabulary(tokenized, width)
    if outputs.router and not loaded.router_layers:
        raise UnknownArchitectureError(
            f"{loaded.name!r} has no router that is known: leave router out, or name it where it is a mixture of experts, "
            "modules={'layers': '…', 'router': 'mlp.gate'}"
        )
    if outputs.router and not request.routers:
        raise InvalidArgumentError(
            f"layers {describe_layers(chosen)} of {loaded.name!r} have no router: leave router out, or ask for layers among "
            f"{describe_layers(loaded.router_layers)}"
        )


def _check_encoder_vocabulary(tokenized: TokenizedPrompts, body: PairedBody) -> None:
    vocabulary = getattr(input_embeddings(body.encoder), "num_embeddings", None)
    for row, ids in enumerate(tokenized.encoder_ids or ()):
        if isinstance(vocabulary, int) and ids.max() >= vocabulary:
            raise outside_vocabulary(int(tokenized.first[row]), int(ids.max()), vocabulary)


def _check(
    loaded: LoadedModel, tokenized: TokenizedPrompts, request: CaptureRequest, batch_tokens: int | None, batch_prompts: int | None
) -> None:
    if not request.keep_tokens and not request.poolings and not request.outputs:
        raise InvalidArgumentError("nothing would be kept: give a pooling, keep_tokens=True or outputs=")
    check_batch_sizes(batch_tokens, batch_prompts)
    check_vocabulary(tokenized, loaded.vocab_size)
    body = loaded.located.body
    if isinstance(body, PairedBody):
        _check_encoder_vocabulary(tokenized, body)
    if loaded.window.fixed and loaded.window.tokens is not None and len(tokenized) and tokenized.lengths.max() > loaded.window.tokens:
        row = int(tokenized.lengths.argmax())
        raise too_long(int(tokenized.first[row]), tokenized.text[row], int(tokenized.lengths[row]), loaded.window.tokens, loaded.window)


@dataclass(slots=True)
class _Copying:
    """One batch whose arrays are being copied to the host; `arrived` is the CUDA event after the copies, None without CUDA."""

    rows: Ints
    tokens: dict[str, torch.Tensor]
    prompts: dict[str, torch.Tensor]
    arrived: Any


def _copy_to_host(collected: Collected, rows: Ints) -> _Copying:
    """Start copying all variables of a batch to the host. On CUDA this uses pinned memory and does not wait."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    tokens = {name: copied(tensor) for name, tensor in collected.tokens.items()}
    prompts = {name: copied(tensor) for name, tensor in collected.prompts.items()}
    arrived: Any = None
    device = next((t.device for t in (*collected.tokens.values(), *collected.prompts.values()) if t.device.type == "cuda"), None)
    if device is not None:
        with torch.cuda.device(device):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
    return _Copying(rows, tokens, prompts, arrived)


def _to_numpy(tensors: dict[str, torch.Tensor], stored: dict[str, str]) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in NUMPY_DTYPES:
            arrays[name] = tensor.numpy()
        else:
            # numpy has no bfloat16. float32 holds its values exactly; widening after the copy moves half the bytes.
            stored[name] = str(tensor.dtype).removeprefix("torch.")
            arrays[name] = tensor.float().numpy()
    return arrays


@dataclass(slots=True)
class _Weights:
    """Whether the weights of the model are known to be finite. They are examined only where values are not."""

    finite: bool = False


def _is_finite(name: str, tensor: torch.Tensor, prompts: int) -> bool:
    if name in SCALARS:
        # The first token of a prompt has no probability, which is NaN.
        return int(torch.isnan(tensor).sum()) <= prompts
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


def _check_finite(loaded: LoadedModel, copying: _Copying, weights: _Weights) -> None:
    """Raise if values are NaN or infinite because a weight is. What only the computation makes so is kept, and counted as it is stored."""
    values = (*copying.tokens.items(), *copying.prompts.items())
    if weights.finite or all(_is_finite(name, tensor, len(copying.rows)) for name, tensor in values):
        return
    with running(loaded.turn):
        found = broken_weights(loaded.module)
    weights.finite = found is None
    if found is not None:
        name, wrong, size = found
        part = loaded.module.get_submodule(name.rpartition(".")[0])
        layer = next((i for i, block in enumerate(loaded.located.blocks) if any(each is part for each in block.modules())), None)
        where = "" if layer is None else f" of layer {layer}"
        raise InvalidArgumentError(
            f"{wrong} of the {size} values of the weight {name!r}{where} of {loaded.name!r} are NaN or infinite, and so is what is "
            "computed with it: load the model again, or take only layers before it"
        )


def _batches_of(copying: _Copying, tokenized: TokenizedPrompts, kept: Kept) -> Iterator[TokenBatch]:
    """The batches of what has arrived on the host."""
    part = tokenized.take(copying.rows)
    stored: dict[str, str] = {}
    levels = {"tokens": _to_numpy(copying.tokens, stored), "prompts": _to_numpy(copying.prompts, stored)}
    if kept.outputs.perplexity:
        levels["prompts"]["perplexity"], levels["tokens"]["token_perplexity"] = perplexity_of(
            levels["tokens"]["token_log_prob"], part.lengths
        )  # fmt: skip
    return token_batches(part, levels, stored, kept)
