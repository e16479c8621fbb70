"""What the cache holds and how large it is, in the calls that lmprobe's users know. Reads metadata only, never activations.

The cache is the default store (see `lmprobe_zarr.config`) unless a call names another place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from lmprobe_zarr import config
from lmprobe_zarr.batch import POOLINGS
from lmprobe_zarr.bridges import LegacyModel
from lmprobe_zarr.bridges.entry import Entry as LegacyEntry
from lmprobe_zarr.cache.info import CachedPrompt, CachedPromptInfo, CacheInfo, ModelCacheInfo, ReadsInfo
from lmprobe_zarr.cache.place import lmprobe_entries, open_cache, place_name
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.storage import ReadCache
from lmprobe_zarr.store import GivenProvenance, Model, Place, Store, ambiguous, parse_provenance
from lmprobe_zarr.store.format import LEVELS, GroupInfo, unrecorded_fields
from lmprobe_zarr.store.parts import View, committed_at, read_values
from lmprobe_zarr.store.upkeep import EvictionEntry

__all__ = ["cache_info", "discover_cached", "list_cached_prompts"]


def cache_info(model: Model | None = None, *, store: Place = None, legacy: str = "auto") -> CacheInfo:
    """What the cache holds, by model.

    Reads metadata only: one listing per group and one small document per part, however many prompts there are.

    Parameters
    ----------
    model : str or path, optional
        Only this model: its name in the store, its hub id or its folder.
    store : Store, path or URL, or a sequence of these, optional
        Another place than the cache.
    legacy : {"auto", "never"}
        Whether lmprobe's own entries beside the cache are listed separately.

    Returns
    -------
    CacheInfo
        Prints as a table.

    Raises
    ------
    AccessDeniedError, UnreachableError
    """
    old = lmprobe_entries(store, legacy)
    older = () if old is None else tuple(_describe_legacy(held) for held in old.models(model))
    opened = open_cache(store, "r")
    limit = config.cache_limit() if opened is None or opened.is_default else None
    reads = _describe_reads() if store is None else None
    if opened is None:
        return CacheInfo(url=place_name(store), limit_bytes=limit, legacy=older, reads=reads)
    described = _describe_groups(opened.own, model)
    lower = () if opened.below is None else opened.below.stack
    return CacheInfo(
        url=opened.url,
        models=described,
        legacy=older,
        below=tuple(CacheInfo(url=lower_store.url, models=_describe_groups(lower_store.own, model)) for lower_store in lower),
        limit_bytes=limit,
        oldest=min((info.oldest for info in described if info.oldest), default=None),
        newest=max((info.newest for info in described if info.newest), default=None),
        reads=reads,
    )


def _describe_reads() -> ReadsInfo:
    try:
        folder = config.read_cache_folder()
    except InvalidArgumentError:
        return ReadsInfo(folder="")
    kept, size = config.read_cache(), ReadCache(folder, 0).size()
    return ReadsInfo(folder=folder, size_bytes=size.nbytes, entries=size.entries, limit_bytes=None if kept is None else kept.limit)


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


def _describe_groups(store: Store, model: Model | None) -> tuple[ModelCacheInfo, ...]:
    """What one root holds of one model, or of all; the largest group first."""
    groups = store.matching(model, whole=False)
    described = [_describe_group(store, info, entries) for info in groups if (entries := store.entries(info))]
    return tuple(sorted(described, key=lambda info: (-info.size_bytes, info.model_name)))


def _describe_group(store: Store, info: GroupInfo, entries: list[EvictionEntry]) -> ModelCacheInfo:
    view = store.view(info, whole=False)
    names = {level: tuple(view.variables(level)) for level in LEVELS}
    pooled = [name for name in names["prompts"] if name.endswith(tuple(f"_{pooling}" for pooling in POOLINGS)) and "logits" not in name]
    every = (*names["prompts"], *names["tokens"])
    return ModelCacheInfo(
        model_name=info.model,
        group=info.name,
        size_bytes=sum(entry.nbytes for entry in entries),
        num_prompts=len(view),
        num_layers=len(view.all_layers()),
        num_parts=len(view.parts),
        num_annotations=sum(not note.info.is_tombstone for note in view.annotations),
        columns=tuple(sorted({key.partition("/")[2] for part in view.owners for key in part.info.own_columns})),
        variables=every,
        has_pooled=bool(pooled),
        has_tokens="resid" in names["tokens"],
        has_perplexity="perplexity" in every,
        has_logits=any(name.startswith("logits") for name in every),
        has_router="router" in every,
        oldest=_moment(min(entry.committed for entry in entries)),
        newest=_moment(max(entry.touched for entry in entries)),
        unknown=unrecorded_fields(info.provenance),
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def discover_cached(
    model: Model,
    prompt: Any,
    *,
    store: Place = None,
    provenance: GivenProvenance = None,
    group: str | None = None,
    legacy: str = "auto",
) -> CachedPromptInfo | None:
    """What is stored of a prompt; None if nothing is.

    Parameters
    ----------
    model : str or path
        Name of the model in the store, its hub id, or the folder that it was loaded from.
    prompt : str or sequence of int
        Text, hash or token ids.
    store : Store, path or URL, or a sequence of these, optional
        Another place than the cache.
    provenance, group : optional
        Choose between several groups of one model. ``provenance="any"``, or the name of a group, says that a group of the folder's name
        which does not record its weights, such as an imported one, is of this model.
    legacy : {"auto", "never"}
        Whether lmprobe's own entries beside the cache are searched if the store does not hold the prompt.

    Returns
    -------
    CachedPromptInfo, optional
        Layers, poolings, perplexity, logits; None if nothing is stored.

    Raises
    ------
    AmbiguousProvenanceError
        Several groups of the model hold the prompt; the message names the fields in which they differ.
    """
    old = lmprobe_entries(store, legacy)
    found = [(view, row) for view in _views_of(model, store, provenance, group) if (row := view.locate(prompt)) is not None]
    fields, any_provenance = parse_provenance(provenance)
    if any_provenance:
        found = sorted(found, key=lambda pair: len(unrecorded_fields(pair[0].group.provenance)))[:1]
    if len(found) > 1:
        raise ambiguous([view.group for view, _ in found], found[0][0].storage.url)
    if found:
        return _describe_prompt(*found[0])
    if old is None or not isinstance(prompt, str) or fields or group:
        return None
    entry = old.find(model, [prompt])[0]
    return None if entry is None else _describe_entry(entry.entry)


def _views_of(model: Model, store: Place, provenance: GivenProvenance, group: str | None) -> list[View]:
    """The views of all groups that match."""
    opened = open_cache(store, "r")
    if opened is None:
        return []
    return [opened.view(info, whole=False) for info in opened.matching(model, provenance, group, whole=False)]


def _describe_entry(entry: LegacyEntry) -> CachedPromptInfo:
    """Describe an entry of lmprobe's under the store's names."""
    held: dict[str, set[int]] = {}
    for array in entry.holds:
        if array.variable != "token_id":
            held.setdefault(array.variable, set()).update(array.layers or ())
    every = {name: sorted(layers) for name, layers in held.items()}
    widths = [array.row_shape[-1] for array in entry.holds if array.variable.endswith("top_k_values")]
    return CachedPromptInfo(
        **_facts(every), raw_layers=every.get("resid", []), logits_top_k=max(widths, default=None), num_tokens=entry.n_tokens
    )


def _facts(every: dict[str, list[int]]) -> dict[str, Any]:
    """Fields of a `CachedPromptInfo` that follow from the names of the stored variables."""
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
                held[level][name] = [layer for layer, is_held in zip(layers, there, strict=True) if is_held] if array.layered else []
    every = {**held["prompts"], **held["tokens"]}
    widths = [int(view.row_lengths(level, n, rows)[0]) for level in LEVELS for n in held[level] if n.endswith("top_k_values")]
    top_k = max(widths, default=None)
    return CachedPromptInfo(
        **_facts(every), raw_layers=every.get("resid", []), logits_top_k=top_k, num_tokens=_count_of(view, row), group=view.group.name
    )


def _count_of(view: View, row: int) -> int | None:
    """Number of tokens of a prompt when the model was run on it; if that was not recorded, the number of stored tokens."""
    rows = np.array([row])
    if "prompt_length" in view.columns("prompts"):
        length = int(read_values(view, "prompts", "prompt_length", rows, ())[0])
        if length > 0:
            return length
    kept = int(view.token_counts()[row])
    return kept or None


def list_cached_prompts(
    model: Model, *, store: Place = None, provenance: GivenProvenance = None, group: str | None = None, legacy: str = "auto"
) -> list[CachedPrompt]:
    """The prompts of a model in the cache, each once, in the order in which they first appear.

    Prompts of all matching groups come first, then those that only lmprobe's own entries beside the cache hold.

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
        for cached in _list_view(view):
            listed.setdefault(cached.hash, cached)
    fields, _ = parse_provenance(provenance)
    old = None if fields or group else lmprobe_entries(store, legacy)
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
        for row in member[member >= 0].tolist():
            since[row] = moment
    return [
        CachedPrompt(hash=label, prompt=text or None, num_tokens=int(count) or None, cached_at=moment)
        for label, text, count, moment in zip(view.hashes.tolist(), texts.tolist(), lengths.tolist(), since, strict=True)
    ]
