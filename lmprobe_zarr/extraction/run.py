"""The steps of an extraction from request to outcome: look up, decide, fill; in this process, or on the workers of a client.

`prepare` changes nothing. Only `complete` runs the model and changes the store.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Final, TypeVar

from lmprobe_zarr import config
from lmprobe_zarr.batch import Prompts, describe_layers
from lmprobe_zarr.display import format_bytes, progress_bar
from lmprobe_zarr.errors import CorruptPartError, MissingPromptsError, NoSpaceError, ReadOnlyError
from lmprobe_zarr.extraction.columns import annotate
from lmprobe_zarr.extraction.fill import Written, fill_here
from lmprobe_zarr.extraction.interruption import note_loading, note_lookup, note_workers
from lmprobe_zarr.extraction.lookup import load_and_look_up, look_up
from lmprobe_zarr.extraction.model_choice import ModelMemory
from lmprobe_zarr.extraction.options import Keeping, Options
from lmprobe_zarr.extraction.plan import ExtractPlan, ExtractStats, describe_elsewhere
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.extraction.shares import Share, cut_shares
from lmprobe_zarr.extraction.weights import ChosenWeights, check_weights_choice, choose_weights
from lmprobe_zarr.extraction.work import Work, decide
from lmprobe_zarr.log import cache_logger, warn
from lmprobe_zarr.store import Store, ambiguous
from lmprobe_zarr.store.format import GroupInfo, describe_unrecorded
from lmprobe_zarr.tasks import run_on_client, stop_if_cancelled

__all__ = ["Outcome", "carry_out", "complete", "prepare", "without_damaged_parts"]

T = TypeVar("T")

# At most this many damaged parts are skipped in one call; more is an error.
DAMAGED_PARTS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an extraction did, and the names by which the requested activations can be read.

    Parameters
    ----------
    stats : ExtractStats
    prompts : Prompts
        The distinct prompts, and the index of each given prompt among them.
    layers : tuple of int
        Requested layers.
    group : GroupInfo
        The group that holds them.
    num_layers : int
        How many layers the model has.
    """

    stats: ExtractStats
    prompts: Prompts
    layers: tuple[int, ...]
    group: GroupInfo
    num_layers: int


def carry_out(request: Request, options: Options) -> Outcome:
    """Look the request up, run the model on what is missing, and store the result.

    Raises
    ------
    MissingPromptsError
        Prompts are missing, and ``options.cache_only`` forbids running the model.
    others
        As `lmprobe_zarr.extract` does.
    """
    return without_damaged_parts(request.store, lambda: complete(prepare(request, options), options))


def without_damaged_parts(store: Store, attempt: Callable[[], T]) -> T:
    """What `attempt` returns. When it meets a damaged part, the part is skipped with a warning, and `attempt` is called again."""
    for _ in range(DAMAGED_PARTS):
        try:
            return attempt()
        except CorruptPartError as error:
            store.set_aside(error)
    return attempt()


def prepare(request: Request, options: Options) -> Work:
    """The work that a request needs: look up, then decide. Loads a tokenizer at most, unless the model is an object."""
    check_weights_choice(options.weights, request, options.device_map)
    with note_lookup():
        lookup = look_up(request, options.memory, options.device, options.device_map)
        return decide(lookup, options.keeping.precision, weights=choose_weights(lookup, options))


def complete(work: Work, options: Options) -> Outcome:
    """Do the work, if it is allowed: load the model, run it, store the result.

    Raises
    ------
    As `carry_out` does.
    """
    _check(work, options)
    if len(work.lookup.missing) and work.lookup.loaded is None and options.client is None:
        weights = ChosenWeights(streamed=work.plan.weights == "streamed", why=work.plan.weights_why)
        if weights.streamed:
            cache_logger().info("[cache] the weights of %r are streamed, one block at a time (%s)", work.plan.model, weights.why)
        with note_loading(work):
            lookup = load_and_look_up(work.lookup, options.memory, options.device, options.device_map, stream=weights.streamed)
        work = decide(lookup, options.keeping.precision, before=work, weights=weights)
    _note_unknown(work)
    _warn_of_precision(work, options)
    _update_found(work, options)
    if not work.changes_store:
        stats, group = _stats(work, work.lookup.makes_group), work.lookup.makes_group
    elif options.client is not None:
        with note_workers():
            stats, group = _fill_on_workers(work, options)
    else:
        written, group = fill_here(work, options), work.lookup.makes_group
        stats = _stats(work, group, written)
    return _outcome(work, stats, group)


# -------------------------------------------------------------------------------------------------- before anything is done


def _check(work: Work, options: Options) -> None:
    """Raise if the work is not allowed; warn if eviction will remove some of its result."""
    if options.cache_only and len(work.lookup.missing):
        raise _not_cached(work, options)
    if not work.changes_store:
        return
    _check_may_store(options.sink or work.lookup.request.store, options.keeping)
    # Of answers that are still to be written nobody knows the size: the bound alone is no reason to refuse or to warn.
    if options.sink is None and not work.plan.to_generate:
        _check_space(work.plan)
        _check_limit(work.plan, options.keeping)


def _warn_of_precision(work: Work, options: Options) -> None:
    """Warn if prompts would be stored with another precision than those before them, and nobody asked for it: a probe can see it."""
    lookup = work.lookup
    if options.keeping.precision.dtype is not None or options.sink is not None or not len(lookup.missing):
        return
    if held := lookup.held_dtypes - {work.plan.dtype} if work.plan.dtype not in lookup.held_dtypes else set():
        warn(
            f"what is extracted now is stored as {work.plan.dtype}, and what {lookup.request.store.where} has of this model "
            f"as {' and '.join(sorted(held))}: a probe may tell them apart by that. Give storage_dtype={min(held)!r} to store all of them "
            f"alike, or storage_dtype={work.plan.dtype!r} if this is what you want"
        )


def _not_cached(work: Work, options: Options) -> MissingPromptsError:
    missing, prompts, store = work.lookup.missing, work.lookup.prompts, work.lookup.request.store
    texts = prompts.text or tuple(prompts.sha256)
    examples = ", ".join(f"number {int(prompts.first[i])} ({texts[i][:40]!r})" for i in missing[:3])
    place = "the cache, which cannot be opened," if store is options.sink else store.where
    hint = describe_elsewhere(work.plan, open_dtype=False)
    return MissingPromptsError(
        f"{len(missing)} of {len(prompts)} prompts are not in {place} with all that is asked for: {examples}; "
        f"extract them first, or leave out cache_only=True{chr(10) if hint else ''}{hint}"
    )


def _check_may_store(target: Store, keeping: Keeping) -> None:
    if keeping.limit == 0:
        raise ReadOnlyError(
            f"nothing is stored in {target.url}, because the cache's limit is 0: set_cache_limit(None), or unset LMPROBE_CACHE_MAX_GB"
        )
    target.check_writable()


def _check_space(plan: ExtractPlan) -> None:
    if not plan.fits and plan.free_bytes is not None:
        raise NoSpaceError(
            f"{plan.missing} prompts need {format_bytes(plan.nbytes)} in {plan.url}, which has {format_bytes(plan.free_bytes)} free\n"
            "take fewer layers or prompts, leave tokens out (keep_tokens=False), use a smaller dtype, or give another store"
        )


def _check_limit(plan: ExtractPlan, keeping: Keeping) -> None:
    if keeping.limit and plan.needed_bytes > keeping.limit:
        warn(
            f"these {plan.prompts} prompts take {format_bytes(plan.needed_bytes)}, and the cache's limit is {format_bytes(keeping.limit)}: "
            f"evict() will take some of them again; set_cache_limit({plan.needed_bytes / config.GB:.3g}) or more keeps them"
        )


# --------------------------------------------------------------------------------------------- what is stored, and the result


def _note_unknown(work: Work) -> None:
    """Log, once for each opened store, what the group does not record; warn if the model runs on prompts that another group holds."""
    lookup, plan = work.lookup, work.plan
    if lookup.unknown and lookup.request.store.note_once(f"unknown {plan.group}"):
        cache_logger().warning(
            "[cache] group %r serves %r although it does not record %s: that is taken on your word", plan.group, plan.model,
            describe_unrecorded(plan.unknown),
        )  # fmt: skip
    if plan.in_lmprobe and lookup.request.store.note_once("lmprobe"):
        cache_logger().warning(
            "[cache] %d of %d prompts that the model runs on are among lmprobe's own entries beside %s, which serve a Probe where they "
            "hold all that it needs; import_safetensors(…, as_model=…) imports them", plan.in_lmprobe, plan.missing, plan.url,
        )  # fmt: skip
    if not lookup.unknown and (message := describe_elsewhere(plan, open_dtype=lookup.request.choice.dtype == "auto")):
        warn(message)


def _update_found(work: Work, options: Options) -> None:
    """Record the use of stored prompts, and write the caller's columns of them."""
    lookup = work.lookup
    if lookup.view is None:
        return
    store, rows = lookup.request.store, lookup.found_rows
    store.mark_used(lookup.view.parts_with(rows))
    if options.sink is None:
        annotate(store, lookup.view, rows, {name: values[lookup.found] for name, values in work.columns.items()})


def _stats(work: Work, group: GroupInfo, written: Written | None = None) -> ExtractStats:
    """Statistics of finished work; `written` is None if all was found."""
    plan = work.plan
    return ExtractStats(
        model=plan.model,
        group=group.name,
        prompts=plan.prompts,
        found=plan.found,
        derived=plan.derived,
        extracted=plan.missing,
        tokens=plan.tokens - plan.to_generate * plan.max_new_tokens + (0 if written is None else written.generated_tokens),
        model_loaded=work.lookup.loaded is not None,
        seconds=time.perf_counter() - work.lookup.began,
        unknown=work.lookup.unknown,
        repeats=0 if work.lookup.answers is not None else len(work.lookup.prompts.row) - len(work.lookup.prompts),
        **asdict(written or Written()),
    )


def _outcome(work: Work, stats: ExtractStats, group: GroupInfo) -> Outcome:
    layers = work.lookup.layers
    cache_logger().info(
        "[cache] %s: %d hits, %d misses, layers %s, %s, %.2f s",
        stats.model, stats.found, stats.prompts - stats.found, describe_layers(layers), ", ".join(work.plan.variables), stats.seconds,
    )  # fmt: skip
    return Outcome(stats=stats, prompts=work.lookup.prompts, layers=layers, group=group, num_layers=work.lookup.num_layers)


# -------------------------------------------------------------------------------------------------------- on many workers


@dataclass(slots=True)
class _Worker:
    """What a worker's process keeps between tasks. Tasks run one at a time, since the hooks of two runs on one model would interfere."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    memory: ModelMemory = field(default_factory=ModelMemory)
    store: Store | None = None


@functools.cache
def _this_worker(pid: int) -> _Worker:  # noqa: ARG001 — each process, forked ones too, has its own
    return _Worker()


def _run_share(share: Share, options: Options) -> tuple[ExtractStats, GroupInfo]:
    """A worker's task. It looks its prompts up again, so that what a dead worker committed is not run a second time."""
    worker, store = _this_worker(os.getpid()), share.request.store
    with worker.turn:
        kept = worker.store
        if kept is None or (kept.where, kept.mode, kept.is_default) != (store.where, store.mode, store.is_default):
            worker.store = kept = store  # a store that is kept has read its parts already
        outcome = carry_out(replace(share.request, store=kept), replace(options, memory=worker.memory))
    return outcome.stats, outcome.group


def _fill_on_workers(work: Work, options: Options) -> tuple[ExtractStats, GroupInfo]:
    """Do the work on the workers of a client; the statistics are those of the whole extraction."""
    client, tokens = options.client, work.plan.tokens
    shares = cut_shares(work, workers=max(1, len(client.nthreads())))
    # The limit was checked for all shares together, and only this process shows progress.
    worker_options = replace(
        options, client=None, memory=ModelMemory(), progress=False, watch=stop_if_cancelled, keeping=replace(options.keeping, limit=None)
    )
    starts = [functools.partial(client.submit, _run_share, share, worker_options, pure=False) for share in shares]
    with progress_bar(tokens, description="extract", unit="tok", enabled=options.progress and tokens > 0) as advance:
        done = run_on_client(client, starts, 2 * max(1, len(client.nthreads())), lambda number: advance(shares[number].tokens))
    groups = {group.name: group for _, group in done}
    if len(groups) > 1:
        raise ambiguous(list(groups.values()), work.plan.url)
    group = next(iter(groups.values()))
    written = Written(
        nbytes=sum(stats.nbytes for stats, _ in done),
        parts=sum(stats.parts for stats, _ in done),
        not_finite=sum(stats.not_finite for stats, _ in done),
        blank=sum(stats.blank for stats, _ in done),
        generated=sum(stats.generated for stats, _ in done),
        generated_tokens=sum(stats.generated_tokens for stats, _ in done),
    )
    return replace(_stats(work, group, written), model_loaded=any(stats.model_loaded for stats, _ in done)), group
