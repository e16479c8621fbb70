"""The cache as lmprobe's users know it: what is in it, how large it is, what leaves it. Reads metadata only, never activations.

The cache is the default store (see `lmprobe_zarr.config`) unless a call names another place.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmprobe_zarr import config, extraction
from lmprobe_zarr.bridges.entry import Entry as LegacyEntry
from lmprobe_zarr.errors import InvalidArgumentError, StoreNotFoundError
from lmprobe_zarr.holdings import CachedPrompt, CachedPromptInfo, CacheInfo, ModelCacheInfo
from lmprobe_zarr.legacy import LegacyCache, LegacyModel, beside
from lmprobe_zarr.log import cache_logger
from lmprobe_zarr.maintenance import Entry, EvictPlan, committed_at, plan_evict, remove_entries
from lmprobe_zarr.pooling import POOLINGS
from lmprobe_zarr.reread import read_values
from lmprobe_zarr.schema import LEVELS, GroupInfo, Provenance
from lmprobe_zarr.storage import open_storage
from lmprobe_zarr.store import Mode, Place, Store, ambiguous, open_store
from lmprobe_zarr.view import View

__all__ = [
    "CacheInfo",
    "CachedPrompt",
    "CachedPromptInfo",
    "EvictPlan",
    "ModelCacheInfo",
    "cache_info",
    "clear_cache",
    "discover_cached",
    "evict",
    "list_cached_prompts",
]

# Nothing that was committed or used so lately leaves a place that others may be using, in seconds.
MIN_AGE: Final = 600.0


# ------------------------------------------------------------------------------------------------------------ looking in


def _open(place: Place, mode: Mode) -> Store | None:
    """The store of a place, None where there is none yet."""
    if isinstance(place, Store):
        return place
    try:
        opened = open_store(place, "r")
    except StoreNotFoundError:
        # Nothing has been written yet; there may still be something below to read.
        opened = open_store(place)
        return None if opened.below is None else opened
    # A backend that is read-only stays so, whatever is wanted of it.
    return opened if mode == "r" else open_store(place, mode)


@dataclass(frozen=True, slots=True)
class _Model:
    """Which model is meant: its name in a store, and of a folder of this machine its weights too, since many folders share a name."""

    name: str
    provenance: Provenance

    @staticmethod
    def of(model: str) -> _Model:
        path = Path(model).expanduser()
        with suppress(OSError, ValueError):
            if (path / "config.json").is_file():
                known = extraction.identify(model, memory=config.weights_memory()).provenance
                return _Model(extraction.model_name(model), {k: v for k, v in known.items() if k == "weights"})
            if path.is_absolute():
                return _Model(path.name, {})  # a folder that is gone went by the same name
        return _Model(model, {})

    def groups(self, store: Store) -> list[GroupInfo]:
        """Its groups in a store."""
        return store.matching(self.name, self.provenance, whole=False)


def _where(place: Place) -> str:
    """How a place is named, whether or not a store lies there."""
    given: Any = config.cache_backend() if place is None else place
    last = given[-1] if isinstance(given, (list, tuple)) else given
    if last is None:
        return str(config.default_root())
    if isinstance(last, Store):
        return last.url
    return open_storage(last).url if place is not None else str(last)


def cache_info(model: str | None = None, *, store: Place = None, legacy: str = "auto") -> CacheInfo:
    """What the cache holds, by model.

    Only metadata are read: one list per group and one small document per part, however many prompts there are.

    Parameters
    ----------
    model : str, optional
        Only this model.
    store : Store, path or URL, or a sequence of these, optional
        Another place than the cache.
    legacy : {"auto", "never"}
        Whether lmprobe's own entries beside the cache are shown too, apart.

    Returns
    -------
    CacheInfo
        Prints as a table.

    Raises
    ------
    AccessDeniedError, UnreachableError
    """
    old = _lmprobes(store, legacy)
    older = () if old is None else tuple(_describe_legacy(one) for one in old.models() if model in (None, one.name))
    opened = _open(store, "r")
    limit = config.cache_limit() if opened is None or opened.is_default else None
    if opened is None:
        return CacheInfo(url=_where(store), limit_bytes=limit, legacy=older)
    described = _describe_groups(opened.own, model)
    lower = () if opened.below is None else opened.below.stack
    return CacheInfo(
        url=opened.url,
        models=described,
        legacy=older,
        below=tuple(CacheInfo(url=one.url, models=_describe_groups(one.own, model)) for one in lower),
        limit_bytes=limit,
        oldest=min((one.oldest for one in described if one.oldest), default=None),
        newest=max((one.newest for one in described if one.newest), default=None),
    )


def _lmprobes(place: Place, legacy: str) -> LegacyCache | None:
    """Lmprobe's own entries around the cache; none around a place that a call names."""
    if legacy not in ("auto", "never"):
        raise InvalidArgumentError(f"legacy={legacy!r} is unknown: use 'auto' or 'never'")
    return None if legacy == "never" or place is not None else beside(open_store(None, "a"))


def _describe_legacy(model: LegacyModel) -> ModelCacheInfo:
    names = {held.variable for held in model.holds}
    return ModelCacheInfo(
        model_name=model.name,
        group=model.folder,
        size_bytes=model.nbytes,
        num_prompts=model.prompts,
        num_layers=model.layers,
        variables=tuple(sorted(names)),
        has_pooled=any(name in names for name in (f"resid_{pooling}" for pooling in POOLINGS)),
        has_tokens="resid" in names,
        has_perplexity="perplexity" in names,
        has_logits=any(name.startswith("logits") for name in names),
        has_router="router" in names,
    )


def _describe_groups(store: Store, model: str | None) -> tuple[ModelCacheInfo, ...]:
    """What a store without anything below it holds, of one model or all; the largest first."""
    groups = list(store.groups(whole=False).values()) if model is None else _Model.of(model).groups(store)
    described = [_describe_group(store, info, entries) for info in groups if (entries := store.entries(info))]
    return tuple(sorted(described, key=lambda one: (-one.size_bytes, one.model_name)))


def _describe_group(store: Store, info: GroupInfo, entries: list[Entry]) -> ModelCacheInfo:
    view = store.view(info, whole=False)
    names = {level: tuple(view.variables(level)) for level in LEVELS}
    pooled = [name for name in names["prompts"] if name.endswith(tuple(f"_{pooling}" for pooling in POOLINGS)) and "logits" not in name]
    every = (*names["prompts"], *names["tokens"])
    return ModelCacheInfo(
        model_name=info.model,
        group=info.name,
        size_bytes=sum(entry.nbytes for entry in entries),
        num_prompts=len(view),
        num_layers=len({*view.layers("prompts"), *view.layers("tokens")}),
        num_parts=len(view.parts),
        variables=every,
        has_pooled=bool(pooled),
        has_tokens="resid" in names["tokens"],
        has_perplexity="perplexity" in every,
        has_logits=any(name.startswith("logits") for name in every),
        has_router="router" in every,
        oldest=_moment(min(entry.committed for entry in entries)),
        newest=_moment(max(entry.touched for entry in entries)),
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def discover_cached(
    model: str,
    prompt: Any,
    *,
    store: Place = None,
    provenance: Provenance | None = None,
    group: str | None = None,
    legacy: str = "auto",
) -> CachedPromptInfo | None:
    """What is stored of a prompt, or None where nothing is.

    Parameters
    ----------
    model : str
        Name of the model in the store, or the folder that it was loaded from.
    prompt : str or sequence of int
        Text, hash or token ids.
    store : Store, path or URL, or a sequence of these, optional
        Another place than the cache.
    provenance, group : optional
        Choose between several groups of one model.
    legacy : {"auto", "never"}
        Whether lmprobe's own entries beside the cache are looked at where the store holds nothing of the prompt.

    Returns
    -------
    CachedPromptInfo, optional
        Layers, poolings, perplexity, logits; None where nothing is stored.

    Raises
    ------
    AmbiguousProvenanceError
        Several groups of the model hold the prompt; names the fields in which they differ.
    """
    old = _lmprobes(store, legacy)
    found = [(view, row) for view in _views_of(model, store, provenance, group) if (row := view.locate(prompt)) is not None]
    if len(found) > 1:
        raise ambiguous([view.group for view, _ in found], found[0][0].storage.url)
    if found:
        return _describe_prompt(*found[0])
    if old is None or not isinstance(prompt, str) or provenance or group:
        return None
    entry = old.find(model, [prompt])[0]
    return None if entry is None else _describe_entry(entry.entry)


def _views_of(model: str, store: Place, provenance: Provenance | None, group: str | None) -> list[View]:
    """The views of all groups that may be meant."""
    opened = _open(store, "r")
    if opened is None:
        return []
    meant = _Model.of(model)
    infos = opened.matching(meant.name, {**meant.provenance, **(provenance or {})}, group, whole=False)
    return [opened.view(info, whole=False) for info in infos]


def _describe_entry(entry: LegacyEntry) -> CachedPromptInfo:
    """An entry of lmprobe's in our words."""
    held: dict[str, set[int]] = {}
    for one in entry.holds:
        if one.variable != "token_id":
            held.setdefault(one.variable, set()).update(one.layers or ())
    every = {name: sorted(layers) for name, layers in held.items()}
    widths = [one.row_shape[-1] for one in entry.holds if one.variable.endswith("top_k_values")]
    return CachedPromptInfo(
        **_facts(every), raw_layers=every.get("resid", []), logits_top_k=max(widths, default=None), num_tokens=entry.n_tokens
    )


def _facts(every: dict[str, list[int]]) -> dict[str, Any]:
    """What follows from the names of what is stored of a prompt."""
    return {
        "pooled": {pooling: every[f"resid_{pooling}"] for pooling in POOLINGS if f"resid_{pooling}" in every},
        "has_perplexity": "perplexity" in every,
        "has_token_perplexity": "token_perplexity" in every,
        "has_logits": any(name.startswith("logits") for name in every),
        "router_layers": every.get("router", []),
        "variables": every,
    }


def _describe_prompt(view: View, row: int) -> CachedPromptInfo:
    rows = np.array([row])
    held: dict[str, dict[str, list[int]]] = {}
    for level in LEVELS:
        layers = view.layers(level)
        held[level] = {}
        for name, array in view.variables(level).items():
            there = view.covers(level, name, rows, layers)[:, 0]
            if there.any():
                held[level][name] = [layer for layer, held_ in zip(layers, there, strict=True) if held_] if array.layered else []
    every = {**held["prompts"], **held["tokens"]}
    widths = [int(view.row_lengths(level, n, rows)[0]) for level in LEVELS for n in held[level] if n.endswith("top_k_values")]
    top_k = max(widths, default=None)
    return CachedPromptInfo(
        **_facts(every), raw_layers=every.get("resid", []), logits_top_k=top_k, num_tokens=_count_of(view, row), group=view.group.name
    )


def _count_of(view: View, row: int) -> int | None:
    """Tokens of a prompt: as it was run, else as many as are kept."""
    rows = np.array([row])
    if "prompt_length" in view.columns("prompts"):
        length = int(read_values(view, "prompts", "prompt_length", rows, ())[0])
        if length > 0:
            return length
    kept = int(view.token_counts()[row])
    return kept or None


def list_cached_prompts(
    model: str, *, store: Place = None, provenance: Provenance | None = None, group: str | None = None, legacy: str = "auto"
) -> list[CachedPrompt]:
    """The prompts of a model in the cache, each once, in the order of first appearance; the same arguments as `discover_cached`.

    Those of all groups that match; and behind them those that only lmprobe's own entries beside the cache hold.

    Parameters
    ----------
    model, store, provenance, group, legacy
        As for `discover_cached`.

    Returns
    -------
    list of CachedPrompt
    """
    listed: dict[str, CachedPrompt] = {}
    for view in _views_of(model, store, provenance, group):
        for one in _list_view(view):
            listed.setdefault(one.hash, one)
    old = None if provenance or group else _lmprobes(store, legacy)
    for label, text in {}.items() if old is None else old.texts(model).items():
        listed.setdefault(label, CachedPrompt(hash=label, prompt=text, num_tokens=None, cached_at=""))
    return list(listed.values())


def _list_view(view: View) -> list[CachedPrompt]:
    rows = np.arange(len(view))
    columns = view.columns("prompts")
    texts = read_values(view, "prompts", "text", rows, ()) if "text" in columns else np.full(len(view), "", object)
    lengths = read_values(view, "prompts", "prompt_length", rows, ()) if "prompt_length" in columns else np.full(len(view), -1)
    lengths = np.where(lengths > 0, lengths, view.token_counts())
    since = [""] * len(view)
    for part, member in zip(reversed(view.parts), reversed(view.members[: len(view.parts)]), strict=True):
        moment = _moment(committed_at(part.info)).isoformat(timespec="seconds")
        for row in member.tolist():
            since[row] = moment
    return [
        CachedPrompt(hash=label, prompt=text or None, num_tokens=int(count) or None, cached_at=moment)
        for label, text, count, moment in zip(view.hashes.tolist(), texts.tolist(), lengths.tolist(), since, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------ taking out


def _may_remove(place: Place, opened: Store) -> None:
    """Raise where a remote root would be emptied that the call does not name."""
    if place is None and not opened.storage.is_local:
        raise InvalidArgumentError(
            f"the cache's place {opened.url} is remote, and others may use it: name it in the call to delete anything there"
        )
    opened.check_writable()


def _check_age(min_age: float | None, opened: Store) -> float:
    if min_age is None:
        return 0.0 if opened.url == open_storage(config.default_root()).url else MIN_AGE
    if isinstance(min_age, bool) or not isinstance(min_age, (int, float, np.number)) or not 0 <= min_age < float("inf"):
        raise InvalidArgumentError(f"min_age={min_age!r} is no age: give seconds, at least 0")
    return float(min_age)


def evict(url: Place = None, *, max_gb: float | None = None, min_age: float | None = None, dry_run: bool = False) -> EvictPlan | None:
    """Remove the least recently used parts until the cache is within its limit.

    A part becomes invisible before its bytes go; views that are open and still need it raise `PartGoneError`.

    Parameters
    ----------
    url : path, URL or Store, or a sequence of these, optional
        Another place than the cache; of several the last, the others are only read. A remote place is evicted only when it is named here.
    max_gb : float, optional
        The limit in GB of 1024³ bytes; by default that of `set_cache_limit` or ``$LMPROBE_CACHE_MAX_GB``, for the cache only.
    min_age : float, optional
        Seconds for which a part is safe after its commit or last use; by default 0 in the local default root, 600 elsewhere.
    dry_run : bool
        Only say what would go.

    Returns
    -------
    EvictPlan or None
        What went; None where there is no limit, no store, or the cache's place is remote.

    Raises
    ------
    InvalidArgumentError
        A place is named without `max_gb`, or a number is negative.
    ReadOnlyError
    """
    log = cache_logger()
    limit = config.cache_limit() if url is None else None
    if max_gb is not None:
        limit = config.bytes_of("max_gb", max_gb)
    elif url is not None:
        raise InvalidArgumentError(f"how much may stay in {_where(url)} was not said: give max_gb=")
    elif not limit:
        # No limit; or 0, which means to store nothing, not to forget everything.
        log.info("[cache] evict: no limit is set, so nothing goes")
        return None
    opened = _open(url, "a")
    if opened is None:
        return None
    opened = opened.own
    if url is None and not opened.storage.is_local:
        log.warning("[cache] evict: %s is remote, and is evicted only when the call names it", opened.url)
        return None
    _may_remove(url, opened)
    began = time.perf_counter()
    age = _check_age(min_age, opened)
    entries = [entry for info in opened.groups(whole=False).values() for entry in opened.entries(info)]
    # What lies behind a link takes its space elsewhere, and is not ours to remove.
    entries = [entry for entry in entries if not opened.storage.leads_out(entry.part.path)]
    plan = plan_evict(entries, limit or 0, min_age=age)
    if dry_run:
        return plan
    gone = remove_entries(opened.storage, plan.entries, min_age=age)
    for entry in gone:
        opened.forget(entry.part.path)
    if len(gone) < len(plan.entries):
        stayed = sum(entry.nbytes for entry in plan.entries) - sum(entry.nbytes for entry in gone)
        plan = EvictPlan(
            entries=tuple(gone), freed=plan.freed - stayed, kept=plan.kept + stayed, limit=plan.limit, protected=plan.protected + stayed
        )
    log.log(30 if not plan.fits else 20, "[cache] evict: %s, %.2f s", plan, time.perf_counter() - began)
    return plan


def clear_cache(model: str | None = None, *, url: Place = None, legacy: bool = False) -> int:
    """Delete all cached activations. This cannot be undone.

    Parameters
    ----------
    model : str, optional
        Only those of this model.
    url : path, URL or Store, or a sequence of these, optional
        Another place than the cache; of several the last, the others are only read. A remote place is cleared only when it is named here.
    legacy : bool
        Whether lmprobe's own entries beside the store go too; otherwise the log says that they remain.

    Returns
    -------
    int
        Entries deleted: parts and annotations, and with `legacy` lmprobe's prompts.

    Raises
    ------
    InvalidArgumentError
        The cache's place is remote and the call does not name it.
    ReadOnlyError
    """
    log = cache_logger()
    opened = _open(url, "a")
    count = 0
    if opened is not None:
        opened = opened.own
        _may_remove(url, opened)
        for info in opened.groups(whole=False).values() if model is None else _Model.of(model).groups(opened):
            entries = opened.entries(info)
            # The hidden ones first: they must not show again when what replaced them goes.
            gone = remove_entries(opened.storage, sorted(entries, key=lambda entry: not entry.hidden))
            for entry in gone:
                opened.forget(entry.part.path)
            opened.drop_empty_group(info)
            count += len(gone)
    old = _lmprobes(url, "auto")
    if old is not None and legacy:
        if not old.storage.is_local:
            raise InvalidArgumentError(
                f"lmprobe's own entries in {old.storage.url} are remote, and others may use them: delete them there yourself"
            )
        count += old.clear(model)
    elif old is not None and (left := sum(one.prompts for one in old.models() if model in (None, one.name))):
        log.info("[cache] clear: %d entries of lmprobe's own remain in %s; legacy=True deletes them too", left, old.storage.url)
    log.info("[cache] clear: %d entries deleted in %s", count, _where(url))
    return count
