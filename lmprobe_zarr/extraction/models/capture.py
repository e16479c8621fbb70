"""Tokenized prompts to an iterator of `TokenBatch`: checks, batches, copies to the host. Never a path, a store or a tokenizer.

Without logits or perplexity only the model's body runs, up to the deepest layer asked for. With them the whole model runs, so that its
logits are scaled and capped as it does itself; but its head sees no padding, and where that is enough only the last token of every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lmprobe_zarr.batch import (
    ALL,
    NO_OUTPUTS,
    LayerSpec,
    Outputs,
    Sites,
    SitesSpec,
    TokenBatch,
    describe_layers,
    offsets_of,
    parse_poolings,
    parse_sites,
    resolve_layers,
    row_bytes,
)
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.extraction.models.batching import (
    LOGIT_BYTES,
    Windows,
    check_batch_sizes,
    default_batch_tokens,
    free_memory,
    most_prompts_with_logits,
)
from lmprobe_zarr.extraction.models.by_block import run_by_block
from lmprobe_zarr.extraction.models.captured import CaptureRequest
from lmprobe_zarr.extraction.models.check import check_model
from lmprobe_zarr.extraction.models.conduct import Conduct
from lmprobe_zarr.extraction.models.continuing import StoredRows, forms_for
from lmprobe_zarr.extraction.models.copying import Copying, batches_of, copy_to_host
from lmprobe_zarr.extraction.models.finite import FiniteWeights
from lmprobe_zarr.extraction.models.forward import ModelCall
from lmprobe_zarr.extraction.models.loaded_model import LoadedModel
from lmprobe_zarr.extraction.models.outputs import gives_raw_scores, head_width
from lmprobe_zarr.extraction.models.paired import PairedBody
from lmprobe_zarr.extraction.models.passes import Job, Known, Progress
from lmprobe_zarr.extraction.models.places import places_of
from lmprobe_zarr.extraction.models.prediction import check_head, no_prediction
from lmprobe_zarr.extraction.models.scratch import ScratchPlace
from lmprobe_zarr.extraction.models.streamed import explained
from lmprobe_zarr.extraction.models.structure import evaluating, input_embeddings
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, check_vocabulary, outside_vocabulary, too_long
from lmprobe_zarr.extraction.models.turns import running
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.typing import Ints

__all__ = ["Progress", "run"]


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
    scratch: ScratchPlace | None = None,
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
    scratch : ScratchPlace, optional
        Where a model whose weights are streamed keeps what it has computed so far.

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
    with explained(loaded.name, loaded.streamed):
        conduct = check_model(loaded) if len(tokenized) else Conduct()
    if outputs.needs_head and conduct.causal is False:
        raise no_prediction(loaded.name, f"{type(loaded.module).__name__}, whose tokens see those after them")
    if conduct.padding == "single":
        batch_prompts = 1
    if batch_prompts is not None:
        most = batch_prompts if most is None else min(most, batch_prompts)
    nbytes = collected.prompt + collected.token * tokenized.lengths

    def cut(places: Ints) -> list[Ints]:
        if windows is None:
            return [places] if len(places) else []
        bounds = windows.cut(nbytes[places], tokenized.run_lengths[places], batch_tokens, most)
        return [places[first:last] for first, last in bounds]

    job = Job(
        loaded=loaded, conduct=conduct, call=ModelCall.of(loaded, request, conduct), request=request, tokenized=tokenized,
        starts=offsets_of(tokenized.lengths),
        batch_tokens=batch_tokens, batch_prompts=most, cut=cut, progress=progress, after_window=after_window,
    )  # fmt: skip
    if loaded.streamed is not None:
        return run_by_block(job, loaded.streamed, scratch, nbytes, start)
    return _run_all(job, _known(job, start))


def _known(job: Job, start: StoredRows | None) -> Known | None:
    """What is known of the blocks up to a stored layer, if the model can be continued from there."""
    if start is None or not len(job.tokenized):
        return None
    forms = forms_for(job.loaded, job.conduct, start.layer, head=job.request.outputs.needs_head)
    if forms is None:
        cache_logger().info("[cache] %r is run from its first block: it cannot be continued from layer %d", job.loaded.name, start.layer)
        return None
    return Known(start, forms, job.loaded)


def _run_all(job: Job, known: Known | None) -> Iterator[TokenBatch]:
    loaded, tokenized, batch_tokens = job.loaded, job.tokenized, job.batch_tokens
    weights = FiniteWeights(loaded)

    kept = job.request.kept(loaded.num_layers)

    def finished(copying: Copying) -> Iterator[TokenBatch]:
        if copying.arrived is not None:
            copying.arrived.synchronize()
        weights.check((*copying.tokens.items(), *copying.prompts.items()), len(copying.rows))
        return batches_of(copying, tokenized, kept)

    for window in job.cut(np.arange(len(tokenized))):
        left = job.in_order(window)
        previous: Copying | None = None
        while len(left):
            rows = job.next_batch(left, batch_tokens)
            held = None if known is None else known.of([tokenized.sha256[i] for i in rows], tokenized.lengths[rows])
            collected = job.collect(job.call, job.request, rows, held)
            if collected is None:
                batch_tokens = job.halved(rows)
                free_memory(loaded.device)
                continue
            copying = copy_to_host(collected, rows)
            del collected
            left = left[len(rows) :]
            # The previous batch is converted while the device works on this one.
            if previous is not None:
                yield from finished(previous)
            previous = copying if copying.arrived is not None else None
            if job.progress is not None:
                job.progress(len(rows), int(tokenized.lengths[rows].sum()))
            if previous is None:
                yield from finished(copying)
        if previous is not None:
            yield from finished(previous)
        if job.after_window is not None:
            job.after_window()


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
