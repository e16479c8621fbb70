"""What is missing → run the model → write → commit. The one place that knows both models and stores."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmprobe_zarr import config
from lmprobe_zarr.batch import Precision, TokenBatch, describe_layers, pool_ragged, round_bits, split_variable
from lmprobe_zarr.display import format_bytes
from lmprobe_zarr.errors import CorruptPartError, MissingPromptsError, NoSpaceError, ReadOnlyError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.columns import annotate_found, columns_by_prompt, with_columns
from lmprobe_zarr.extraction.lookup import Lookup, group_of, load, look_up, look_up_loaded, settle_dtype
from lmprobe_zarr.extraction.models import Prompts, TokenizedPrompts
from lmprobe_zarr.extraction.plan import ExtractPlan, ExtractStats
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.extraction.shares import Share, cut_shares
from lmprobe_zarr.extraction.work import Work, plan_work
from lmprobe_zarr.log import cache_logger, warn
from lmprobe_zarr.progress import progress_bar
from lmprobe_zarr.store import PART_BYTES, PART_SECONDS, Ingest, Store, ambiguous, part_bytes_within
from lmprobe_zarr.store.format import GroupInfo
from lmprobe_zarr.store.parts import blocks_of, read_values
from lmprobe_zarr.tasks import run_on_client, stop_if_cancelled
from lmprobe_zarr.typing import Array

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import LoadedModel

__all__ = ["Keeping", "ModelMemory", "Outcome", "Running", "carry_out", "keeping_of"]

# So many are left out one by one; more than that is no accident.
DAMAGED_PARTS: Final = 100


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
    return Keeping(precision=precision, part_bytes=part_bytes_within(limit, part_bytes), limit=limit)


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
    per_prompt = columns_by_prompt(columns or {}, looked.prompts)
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
            annotate_found(request.store, looked, work.missing, per_prompt)
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
                    ingest.put(with_columns(batch, rows, per_prompt, running.store_text))
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
