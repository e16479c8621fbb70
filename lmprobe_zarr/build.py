"""What is missing → run the model → write → commit. The one place that knows both models and stores."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config, extraction
from lmprobe_zarr.batch import TokenBatch
from lmprobe_zarr.cluster import check_client, is_in_process, run_on_client, stop_if_cancelled
from lmprobe_zarr.errors import CorruptPartError, InvalidArgumentError, MissingPromptsError, NoSpaceError, ReadOnlyError
from lmprobe_zarr.extraction import Prompts, TokenizedPrompts
from lmprobe_zarr.ingest import PART_BYTES, PART_SECONDS, Ingest
from lmprobe_zarr.layers import LayerSpec, describe_layers
from lmprobe_zarr.log import cache_logger, warn
from lmprobe_zarr.missing import (
    Lookup,
    Request,
    Work,
    check_request,
    group_of,
    load,
    look_up,
    look_up_loaded,
    plan_work,
    settle_dtype,
)
from lmprobe_zarr.plan import ExtractPlan, ExtractStats, format_bytes
from lmprobe_zarr.pooling import pool_ragged
from lmprobe_zarr.precision import Precision, round_bits
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.reread import blocks_of, read_values
from lmprobe_zarr.schema import GroupInfo, Provenance, split_variable, validate_column_names
from lmprobe_zarr.shares import Share, cut_shares, sendable
from lmprobe_zarr.sites import Outputs
from lmprobe_zarr.store import Place, Store, ambiguous, open_store
from lmprobe_zarr.writer import as_column

if TYPE_CHECKING:
    import torch

    from lmprobe_zarr.extraction import LoadedModel


__all__ = [
    "ExtractPlan",
    "ExtractStats",
    "Keeping",
    "ModelMemory",
    "Outcome",
    "Running",
    "carry_out",
    "extract",
    "keeping_of",
    "plan_extract",
]

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Columns = Mapping[str, Sequence[Any] | Array]
LogitsPositions = Literal["last_token", "all"]

# So many are left out one by one; more than that is no accident.
DAMAGED_PARTS: Final = 100


def plan_extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Place = None,
    layers: LayerSpec = "all",
    sites: str | Sequence[str] = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    keep_tokens: bool = False,
    perplexity: bool = False,
    logits: LogitsPositions | None = None,
    logits_top_k: int | None = None,
    router: bool = False,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    storage_dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    refresh: bool = False,
    provenance: Provenance | None = None,
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ExtractPlan:
    """What `extract` would do with the same arguments; loads a tokenizer at most, and writes nothing.

    Parameters
    ----------
    model, prompts, store, layers, sites, pooling, keep_tokens, perplexity, logits, logits_top_k
        As for `extract`.
    router, name, tokenizer, revision, dtype, storage_dtype, keep_bits, overflow, max_length
        As for `extract`.
    truncation, refresh, provenance, modules, trust_remote_code
        As for `extract`.

    Returns
    -------
    ExtractPlan
        Prompts found and missing, tokens, bytes, free space; prints as a table.

    Raises
    ------
    As `extract` does before it loads the model.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    keeping = keeping_of(opened, storage_dtype, keep_bits, overflow)
    request = check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        outputs=Outputs(perplexity=perplexity, logits=logits, top_k=logits_top_k, router=router), tokenizer=tokenizer, revision=revision,
        dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh, provenance=provenance, modules=modules,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    loaded = None if request.by_name else load(request, device="auto", device_map=None)
    looked = look_up(request) if loaded is None else look_up_loaded(request, loaded)
    return plan_work(request, looked, loaded, precision=keeping.precision)[0]


def extract(
    model: str | os.PathLike[str] | torch.nn.Module,
    prompts: Iterable[Any],
    *,
    store: Place = None,
    layers: LayerSpec = "all",
    sites: str | Sequence[str] = ("resid",),
    pooling: str | Sequence[str] = ("last_token",),
    keep_tokens: bool = False,
    perplexity: bool = False,
    logits: LogitsPositions | None = None,
    logits_top_k: int | None = None,
    router: bool = False,
    coords: Columns | None = None,
    name: str | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: Any = "auto",
    storage_dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    device: Any = "auto",
    device_map: Any = None,
    batch_tokens: int | None = None,
    batch_prompts: int | None = None,
    max_length: int | None = None,
    truncation: bool = False,
    refresh: bool = False,
    provenance: Provenance | None = None,
    modules: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    store_text: bool = True,
    part_bytes: int = PART_BYTES,
    part_seconds: float = PART_SECONDS,
    client: Any = None,
    progress: bool = True,
) -> ExtractStats:
    """Run a model over the prompts that are not stored yet, and store their activations.

    Parameters
    ----------
    model : str, path or torch Module
        A hub id, a folder that ``save_pretrained`` wrote, or a loaded model (PEFT, quantised, edited in memory; then `name` and
        `tokenizer` too).
    prompts : iterable of str, of chats, or of token ids
        One kind per call. A chat is a list of ``{"role", "content"}``, rendered by the tokenizer's template; its text and hash are
        those of what was rendered. Prompts that occur twice are run once.
    store : Store, path or URL, or a sequence of these, optional
        Where to; None is the default root, ``$LMPROBE_CACHE_DIR/.zarr``.
    layers : "all", "middle", "last", int, sequence of int or slice
        Negative numbers count from the end. Nothing behind the deepest layer is computed.
    sites : str or sequence of {"resid", "attn", "mlp", "embed"}
        Where in each block: its output, its attention's or its MLP's contribution, or (once) its embeddings.
    pooling : str or sequence of {"last_token", "first_token", "mean", "max", "min"}
        What is stored per prompt, as ``<site>_<pooling>``; may be empty where tokens are kept.
    keep_tokens : bool
        Whether every token is stored too, as ``<site>``.
    perplexity : bool
        Whether the perplexity of every prompt (``perplexity``: mean, least, greatest of its tokens') and of every token
        (``token_perplexity``, ``token_log_prob``) is stored too, from the same pass.
    logits : {"last_token", "all"}, optional
        Which of the head's logits are stored too, as ``logits_last_token`` or, for every token, ``logits``.
    logits_top_k : int, optional
        Only so many of them, the largest, with their token ids (``…_top_k_values``, ``…_top_k_indices``). More that are stored serve fewer.
    router : bool
        Whether the raw scores of every expert are stored too, as ``router(layer, token, expert)``, for mixtures of experts.
    coords : mapping of str to sequence, optional
        Columns aligned with `prompts`, such as ``{"label": y}``. For prompts that are stored already, new values are added as an
        annotation.
    name : str, optional
        Name in the store; by default the hub id or the folder's own name.
    tokenizer : tokenizer, folder or hub id, optional
        By default the model's own. One that is given is known by its content, so even an equal one makes another group.
    revision : str, optional
        Branch, tag or commit of a hub model.
    dtype : "auto", str or torch.dtype
        What to compute in, and store; ``"auto"`` is what the model's configuration names.
    storage_dtype : {"float16", "bfloat16", "float32"}, optional
        What activations are stored with; None as they are computed. The cache's own setting where the store is the default one.
    keep_bits : int, optional
        Rounds what is stored to so many bits of the fraction, which makes it smaller; see `lmprobe_zarr.precision.Precision`.
    overflow : {"bfloat16", "raise"}, optional
        What happens to values beyond the range of float16: stored with bfloat16's precision (None too), or an error. Never infinity.
    device, device_map : optional
        ``"auto"`` takes CUDA, then MPS, then the CPU; a device map spreads the model as in transformers.
    batch_tokens : int, optional
        Padded tokens per batch; None chooses by device. Halved by itself when the device runs out of memory.
    batch_prompts : int, optional
        Prompts per batch at most.
    max_length : int, optional
        Longest prompt in tokens; None is the model's context window.
    truncation : bool
        Whether longer prompts are cut; otherwise they are an error. Part of the provenance.
    refresh : bool
        Run the model on all prompts, stored or not; the new activations win.
    provenance : mapping, optional
        Fields of your own, such as ``{"steering": "v3"}``, become part of the group: needed for models with hooks, which cannot be
        told apart otherwise. Fixed fields, such as ``revision``, choose between stored groups where what is known here does not.
    modules : mapping, optional
        For unknown architectures, ``{"layers": "model.layers", "attn": "self_attn", "mlp": "mlp"}``.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    store_text : bool
        False leaves the texts out of the store; prompts are still found by text or hash.
    part_bytes, part_seconds : int, float
        When to commit: an interruption loses at most this much.
    client : distributed.Client, optional
        Whose workers run the model, each on its share of the missing prompts; they load it once per process and write straight to the
        store, which they must reach under the same name. The model and a tokenizer are then named, not given as objects. What a worker
        that dies had committed is kept, and another one runs the rest of its share.
    progress : bool
        A bar on terminals and in notebooks.

    Returns
    -------
    ExtractStats

    Raises
    ------
    InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, PromptTooLongError
        Something does not fit; raised before anything is run or written.
    ModelNotFoundError, UnknownArchitectureError, MissingDependencyError
        The model cannot be loaded, or its blocks are not found.
    AmbiguousProvenanceError
        Several stored groups fit what is known of the model.
    NoSpaceError
        The missing activations would not fit; or the medium became full, then what was committed is whole.
    NumberRangeError
        A value lies beyond the range of float16, and ``overflow="raise"``.
    UnreachableError
        Workers died again and again over the same prompts.
    ReadOnlyError, DeviceMemoryError

    Warns
    -----
    CacheWarning
        The cache's limit is smaller than what is asked for; or a damaged part is left out, and its prompts are run again.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    keeping = keeping_of(opened, storage_dtype, keep_bits, overflow, part_bytes)
    request = check_request(
        model=model, prompts=prompts, store=opened, layers=layers, sites=sites, pooling=pooling, keep_tokens=keep_tokens, name=name,
        outputs=Outputs(perplexity=perplexity, logits=logits, top_k=logits_top_k, router=router), tokenizer=tokenizer, revision=revision,
        dtype=dtype, max_length=max_length, truncation=truncation, refresh=refresh, provenance=provenance, modules=modules,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    running = Running(
        device=device, device_map=device_map, batch_tokens=batch_tokens, batch_prompts=batch_prompts, part_seconds=part_seconds,
        store_text=store_text, progress=progress,
    )  # fmt: skip
    if client is not None:
        check_client(client)
        request = sendable(request)
        if not is_in_process(client):
            for one in opened.stack:
                one.storage.check_reach()  # here, since a worker that cannot even unpack its task tells nobody
    return carry_out(request, keeping, running, columns=_check_columns(coords, len(request.given)), client=client).stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How a store keeps what is extracted.

    Parameters
    ----------
    precision : Precision
    part_bytes : int
        Bytes of activations in one part, at most.
    limit : int, optional
        Bytes that the store is to hold at most; 0 where nothing is to be stored.
    """

    precision: Precision
    part_bytes: int = PART_BYTES
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How an extraction runs; see `extract`. `watch` is called after every batch, and may raise."""

    device: Any = "auto"
    device_map: Any = None
    batch_tokens: int | None = None
    batch_prompts: int | None = None
    part_seconds: float = PART_SECONDS
    store_text: bool = True
    progress: bool = True
    watch: Callable[[], None] | None = None


@dataclass(slots=True)
class ModelMemory:
    """The model that was loaded last, for whoever asks again: loading takes longer than running it on a few prompts."""

    loaded: LoadedModel | None = None
    asked: tuple[Any, ...] = ()

    def load(self, request: Request, running: Running, looked: Lookup | None) -> LoadedModel:
        """The model of a request, loaded only where it is another one, or has changed since."""
        asked = (
            request.model if request.by_name else id(request.model), request.name, request.revision, str(request.dtype), request.kind,
            request.max_length, request.truncation, str(running.device), str(running.device_map), request.outputs.needs_head,
            id(request.tokenizer) if request.tokenizer is not None else None, repr(request.modules), repr(request.own_provenance),
        )  # fmt: skip
        known = looked.identity.provenance if looked is not None and looked.identity is not None else {}
        same = self.loaded is not None and all(
            field == "compute_dtype" or self.loaded.provenance.get(field) == value for field, value in known.items()
        )
        # An object may have been edited since, which only loading it again, that is, looking at its weights, would show.
        if self.loaded is None or asked != self.asked or not same or not request.by_name:
            self.loaded = None  # its memory is free before the next one takes its own
            self.loaded, self.asked = load(request, device=running.device, device_map=running.device_map), asked
        return self.loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an extraction did, and under which names what was asked for can be read.

    Parameters
    ----------
    stats : ExtractStats
    prompts : Prompts
        The different prompts, and where each given one stands among them.
    layers : tuple of int
        Layers asked for.
    group : GroupInfo
        The group that holds them.
    elsewhere : object, optional
        What serves the call instead of a store.
    """

    stats: ExtractStats
    prompts: Prompts
    layers: tuple[int, ...]
    group: GroupInfo
    elsewhere: Any = None


def keeping_of(
    store: Store,
    dtype: str | None = None,
    keep_bits: int | None = None,
    overflow: str | None = None,
    part_bytes: int = PART_BYTES,
) -> Keeping:
    """How a store keeps things: the call's arguments, and for the default store the cache's settings where they say nothing.

    Where a limit is set, parts are at most a fiftieth of it, so that eviction frees about what it is asked to.
    """
    setting = config.cache_precision() if store.is_default else Precision()
    precision = Precision(
        dtype=dtype or setting.dtype,
        keep_bits=setting.keep_bits if keep_bits is None else keep_bits,
        overflow=overflow or setting.overflow,
    )
    limit = config.cache_limit() if store.is_default else None
    return Keeping(precision=precision, part_bytes=min(part_bytes, max(1, limit // 50)) if limit else part_bytes, limit=limit)


def carry_out(request: Request, keeping: Keeping, running: Running, **options: Any) -> Outcome:
    """Look up what is asked for, run the model on what is missing, and store that; see `_carry_out` for the options.

    A part that turns out to be damaged on the way is left out, with a warning: the model makes up for it.
    """
    for _ in range(DAMAGED_PARTS):
        try:
            return _carry_out(request, keeping, running, **options)
        except CorruptPartError as error:
            request.store.set_aside(error)
    return _carry_out(request, keeping, running, **options)


def _carry_out(
    request: Request,
    keeping: Keeping,
    running: Running,
    *,
    columns: Mapping[str, Array] | None = None,
    sink: Store | None = None,
    memory: ModelMemory | None = None,
    cache_only: bool = False,
    elsewhere: Callable[[Prompts, tuple[int, ...]], Any] | None = None,
    client: Any = None,
) -> Outcome:
    """Look up what is asked for, run the model on what is missing, and store that.

    Parameters
    ----------
    request : Request
    keeping : Keeping
    running : Running
    columns : mapping of str to ndarray, optional
        One value per given prompt.
    sink : Store, optional
        Where new values go instead of the store that is looked into.
    memory : ModelMemory, optional
        Where the model is kept for the next call.
    cache_only : bool
        Whether missing prompts are an error.
    elsewhere : callable, optional
        Asked where prompts are missing, with all prompts and the layers, before the model is: what it returns, if anything, serves the
        whole call.
    client : distributed.Client, optional
        Whose workers do what is to be done.

    Raises
    ------
    MissingPromptsError
        Prompts are missing, and `cache_only` says not to run the model.
    others
        As `extract` does.
    """
    began = time.perf_counter()
    target, memory = sink or request.store, memory or ModelMemory()
    loaded = None
    if not request.by_name:
        request = replace(request, dtype="auto") if request.dtype is None else request
        loaded = memory.load(request, running, None)
    looked = look_up(request) if loaded is None else look_up_loaded(request, loaded)
    per_prompt = _columns_by_prompt(columns or {}, looked.prompts)
    plan, work = plan_work(request, looked, loaded, precision=keeping.precision)
    if len(work.missing) and elsewhere is not None and (served := elsewhere(looked.prompts, plan.layers)) is not None:
        whole = replace(plan, found=plan.prompts, tokens=0, nbytes=0)
        nameless = looked.group or GroupInfo(model=plan.model)
        stats = replace(_stats(whole, nameless, model_loaded=False), seconds=time.perf_counter() - began)
        return Outcome(stats=stats, prompts=looked.prompts, layers=plan.layers, group=nameless, elsewhere=served)
    if cache_only and len(work.missing):
        raise _not_cached(request, looked, work)
    if len(work.missing) or work.derived:
        _check_may_store(target, keeping)
        if sink is None:
            _check_space(plan)
            _check_limit(plan, keeping)
    if len(work.missing) and loaded is None and client is None:
        request = settle_dtype(request, looked)
        loaded = memory.load(request, running, looked)
        looked = look_up_loaded(request, loaded, looked)
        # Only now is the whole provenance known; what was found may be another's.
        plan, work = plan_work(request, looked, loaded, work, precision=keeping.precision)
    if looked.view is not None:
        found = np.setdiff1d(np.arange(len(looked.prompts)), work.missing)
        request.store.mark_used(looked.view.parts_with(looked.view.find([looked.prompts.sha256[i] for i in found])))
        if sink is None:
            _annotate_found(request.store, looked, work.missing, per_prompt)
    spread = client is not None and bool(len(work.missing) or work.derived)
    group = looked.group or (None if loaded is None else group_of(loaded))
    if spread:
        shares = cut_shares(request, looked, work, per_prompt, workers=max(1, len(client.nthreads())))
        stats, group = _run_on_workers(client, shares, plan, work, keeping, running)
    else:
        assert group is not None  # noqa: S101 — either all is found, so in a group, or the model is loaded
        stats = _stats(plan, group, model_loaded=loaded is not None)
    if not spread and (work.tokenized is not None or work.derived):
        ingest = Ingest(
            target, group, part_bytes=keeping.part_bytes, part_seconds=running.part_seconds, precision=keeping.precision,
            recorded={} if loaded is None else loaded.recorded,
        )  # fmt: skip
        with progress_bar(plan.tokens, description="extract", unit="tok", enabled=running.progress and plan.tokens > 0) as advance, ingest:
            for batch in _pooled_from_tokens(looked, work, plan.layers):
                ingest.put(batch)
            if loaded is not None and work.tokenized is not None:
                rows = {digest: row for row, digest in enumerate(looked.prompts.sha256)}
                for batch in _run(request, running, loaded, work.tokenized, plan.layers, advance):
                    ingest.put(_with_columns(batch, rows, per_prompt, running.store_text))
        extracted = 0 if work.tokenized is None else len(work.tokenized)
        stats = replace(
            stats,
            extracted=extracted,
            nbytes=ingest.nbytes,
            parts=len(ingest.parts),
            tokens=plan.tokens,
            not_finite=ingest.not_finite,
            blank=ingest.blank,
        )
    done = replace(stats, seconds=time.perf_counter() - began)
    cache_logger().info(
        "[cache] %s: %d hits, %d misses, layers %s, %s, %.2f s",
        done.model, done.found, done.prompts - done.found, describe_layers(plan.layers), ", ".join(plan.variables), done.seconds,
    )  # fmt: skip
    return Outcome(stats=done, prompts=looked.prompts, layers=plan.layers, group=group)


# -------------------------------------------------------------------------------------------------------- on many workers


@dataclass(slots=True)
class _Worker:
    """What a worker's process keeps between its tasks. They take turns: the hooks of two runs on one model would mix."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    model: ModelMemory = field(default_factory=ModelMemory)
    store: Store | None = None


@functools.cache
def _this_worker(pid: int) -> _Worker:  # noqa: ARG001 — what was loaded before a fork stays with whoever loaded it
    return _Worker()


def _run_share(share: Share, keeping: Keeping, running: Running) -> tuple[ExtractStats, GroupInfo]:
    """A worker's task: as if its prompts were all that was asked for, so what a predecessor has committed is found and left."""
    worker, store = _this_worker(os.getpid()), share.request.store
    with worker.turn:
        kept = worker.store
        if kept is None or (kept.where, kept.mode, kept.is_default) != (store.where, store.mode, store.is_default):
            worker.store = kept = store  # one that is kept knows the parts already
        request = replace(share.request, store=kept)
        outcome = carry_out(request, keeping, running, columns=share.columns, memory=worker.model)
    return outcome.stats, outcome.group


def _run_on_workers(
    client: Any, shares: list[Share], plan: ExtractPlan, work: Work, keeping: Keeping, running: Running
) -> tuple[ExtractStats, GroupInfo]:
    """The work on the workers of a client: statistics as if it was done here."""
    # Limits were checked for all together; only the client talks to people.
    options = replace(keeping, limit=None), replace(running, progress=False, watch=stop_if_cancelled)
    starts = [functools.partial(client.submit, _run_share, share, *options, pure=False) for share in shares]
    with progress_bar(plan.tokens, description="extract", unit="tok", enabled=running.progress and plan.tokens > 0) as advance:
        done = run_on_client(client, starts, 2 * max(1, len(client.nthreads())), lambda number: advance(shares[number].tokens))
    groups = {group.name: group for _, group in done}
    if len(groups) > 1:
        raise ambiguous(list(groups.values()), plan.url)
    group = next(iter(groups.values()))
    return replace(
        _stats(plan, group, model_loaded=any(one.model_loaded for one, _ in done)),
        extracted=len(work.missing),
        tokens=plan.tokens,
        nbytes=sum(one.nbytes for one, _ in done),
        parts=sum(one.parts for one, _ in done),
        not_finite=sum(one.not_finite for one, _ in done),
        blank=sum(one.blank for one, _ in done),
    ), group


def _not_cached(request: Request, looked: Lookup, work: Work) -> MissingPromptsError:
    prompts = looked.prompts
    texts = prompts.text or tuple(prompts.sha256)
    shown = ", ".join(f"number {int(prompts.first[i])} ({texts[i][:40]!r})" for i in work.missing[:3])
    return MissingPromptsError(
        f"{len(work.missing)} of {len(prompts)} prompts are not in {request.store.where} with all that is asked for: {shown}; "
        "extract them first, or leave out cache_only=True"
    )


def _run(
    request: Request,
    running: Running,
    loaded: LoadedModel,
    tokenized: TokenizedPrompts,
    layers: tuple[int, ...],
    advance: Callable[[int], None],
) -> Iterator[TokenBatch]:
    """What the model gives; where they cost nothing more, with the layers that are passed on the way."""

    def ran(_prompts: int, tokens: int) -> None:
        advance(tokens)
        if running.watch is not None:
            running.watch()

    return extraction.run(
        loaded,
        tokenized,
        layers=request.kept_layers(layers) or "all",
        sites=request.sites,
        poolings=request.poolings,
        keep_tokens=request.keep_tokens,
        outputs=request.outputs,
        batch_tokens=running.batch_tokens,
        batch_prompts=running.batch_prompts,
        progress=ran,
    )


def _pooled_from_tokens(looked: Lookup, work: Work, layers: tuple[int, ...]) -> Iterator[TokenBatch]:
    """Poolings that were not stored, of prompts whose tokens are."""
    view = looked.view
    if view is None:
        return
    stored = view.variables("tokens")
    for names, places in work.derived.items():
        rows = view.find([looked.prompts.sha256[i] for i in places])
        counts = view.token_counts()[rows]
        sites = dict.fromkeys(split_variable(name)[0] for name in names)
        weight = sum(int(np.prod(stored[site].row_shape)) * 4 * max(1, len(layers)) for site in sites)
        for block in blocks_of(counts * weight):
            tokens = {site: read_values(view, "tokens", site, rows[block], layers) for site in sites}
            arrays, dtypes = {}, {}
            for name in names:
                site, pooling = split_variable(name)
                dtype = str(stored[site].attributes.get("stored_dtype", stored[site].dtype))
                pooled = pool_ragged(tokens[site], counts[block], str(pooling))
                # As the model would have given it: a mean of bfloat16 numbers is one again.
                arrays[name], dtypes[name] = (round_bits(pooled, 7) if dtype == "bfloat16" else pooled), dtype
            yield TokenBatch(
                sha256=[looked.prompts.sha256[i] for i in places[block]],
                layers=layers,
                prompts=arrays,
                unlayered=frozenset(name for name in names if not stored[split_variable(name)[0]].layered),
                stored_dtype=dtypes,
            )


# -------------------------------------------------------------------------------------------------------------- checking


def _check_columns(coords: Columns | None, n_prompts: int) -> dict[str, Array]:
    validate_column_names(coords or {})
    columns = {}
    for name, values in (coords or {}).items():
        column = as_column(name, values.detach().cpu().numpy() if hasattr(values, "detach") else values)
        if len(column) != n_prompts:
            raise InvalidArgumentError(
                f"coords[{name!r}] has {len(column)} values for {n_prompts} prompts: give one per prompt, in their order"
            )
        columns[name] = column
    return columns


def _columns_by_prompt(columns: Mapping[str, Array], prompts: Prompts) -> dict[str, Array]:
    """One value per different prompt; a prompt that occurs twice must have the same value twice."""
    for name, values in columns.items():
        expected = values[prompts.first][prompts.row]
        same = (values == expected) | ((values != values) & (expected != expected))  # NaN equals NaN here
        if not np.all(same):
            i = int(np.argmin(same))
            first = int(prompts.first[prompts.row[i]])
            raise InvalidArgumentError(
                f"coords[{name!r}] gives the same prompt two values: {values[first]!r} at number {first}, {values[i]!r} at number {i}"
            )
    return {name: values[prompts.first] for name, values in columns.items()}


def _check_may_store(target: Store, keeping: Keeping) -> None:
    if keeping.limit == 0:
        raise ReadOnlyError(
            f"nothing is stored in {target.url}, because the cache's limit is 0: set_cache_limit(None), or unset LMPROBE_CACHE_MAX_GB"
        )
    target.check_writable()


def _check_limit(plan: ExtractPlan, keeping: Keeping) -> None:
    if keeping.limit and plan.needed_bytes > keeping.limit:
        warn(
            f"these {plan.prompts} prompts take {format_bytes(plan.needed_bytes)}, and the cache's limit is {format_bytes(keeping.limit)}: "
            f"evict() will take some of them again; set_cache_limit({plan.needed_bytes / config.GB:.3g}) or more keeps them"
        )


def _check_space(plan: ExtractPlan) -> None:
    if not plan.fits and plan.free_bytes is not None:
        raise NoSpaceError(
            f"{plan.missing} prompts need {format_bytes(plan.nbytes)} in {plan.url}, which has {format_bytes(plan.free_bytes)} free\n"
            "take fewer layers or prompts, leave tokens out (keep_tokens=False), use a smaller dtype, or give another store"
        )


# --------------------------------------------------------------------------------------------------------------- writing


def _with_columns(batch: TokenBatch, rows: Mapping[str, int], columns: Mapping[str, Array], store_text: bool) -> TokenBatch:
    chosen = np.array([rows[digest] for digest in batch.sha256])
    return replace(
        batch,
        prompt_columns={name: values[chosen] for name, values in columns.items()},
        text=batch.text if store_text else None,
    )


def _annotate_found(store: Store, looked: Lookup, missing: Ints, columns: Mapping[str, Array]) -> None:
    """Write the columns of prompts that are stored already, where they are new or differ."""
    if not columns or looked.view is None:
        return
    view = looked.view
    found = np.setdiff1d(np.arange(len(looked.prompts)), missing)
    rows = view.find([looked.prompts.sha256[i] for i in found])
    known = view.columns("prompts")
    changes: dict[str, tuple[Ints, list[Any]]] = {}
    for name, values in columns.items():
        wanted = values[found]
        changed = np.ones(len(found), bool)
        if name in known:
            array = view.source("prompts", name, rows, ())
            stored = array.read(np.zeros(1, np.int64), slice(0, len(rows)))[0]
            there = view.covers("prompts", name, rows, ())[0]
            alike = (stored == wanted) | ((stored != stored) & (wanted != wanted))  # NaN equals NaN here too
            changed = ~(there & np.asarray(alike, bool))
        if changed.any():
            changes[name] = rows[changed], wanted[changed].tolist()
    store.write_columns(view, changes)


def _stats(plan: ExtractPlan, group: GroupInfo, *, model_loaded: bool) -> ExtractStats:
    return ExtractStats(
        model=plan.model,
        group=group.name,
        prompts=plan.prompts,
        found=plan.found,
        derived=plan.derived,
        extracted=0,
        tokens=0,
        nbytes=0,
        parts=0,
        model_loaded=model_loaded,
        seconds=0.0,
    )
