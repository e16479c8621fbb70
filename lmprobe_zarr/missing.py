"""What is asked for, what is stored, and so what is missing. Knows models and stores; runs and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config, extraction
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.extraction import ModelIdentity, Prompts, TokenizedPrompts
from lmprobe_zarr.layers import LayerSpec, resolve_layers
from lmprobe_zarr.plan import ExtractPlan
from lmprobe_zarr.pooling import parse_poolings
from lmprobe_zarr.schema import GroupInfo, Level, Provenance
from lmprobe_zarr.sites import LAYERED_SITES, parse_sites, row_bytes
from lmprobe_zarr.store import Store, ambiguous
from lmprobe_zarr.view import View

if TYPE_CHECKING:
    from lmprobe_zarr.extraction import LoadedModel

__all__ = ["Lookup", "Request", "Work", "check_request", "group_of", "load", "look_up", "look_up_loaded", "plan_work"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, checked, with the model and the prompts as the caller gave them."""

    model: Any
    given: list[Any]
    kind: extraction.PromptKind
    store: Store
    layers: LayerSpec
    sites: tuple[str, ...]
    poolings: tuple[str, ...]
    keep_tokens: bool
    name: str | None
    tokenizer: Any
    revision: str | None
    dtype: Any
    max_length: int | None
    truncation: bool
    refresh: bool
    provenance: Provenance
    modules: Mapping[str, str] | None
    trust_remote_code: bool

    @property
    def by_name(self) -> bool:
        """Whether the model is named, so that it need not be loaded to be known."""
        return isinstance(self.model, (str, os.PathLike))

    @property
    def own_provenance(self) -> dict[str, Any]:
        """The fields of the caller's own, such as ``steering``: they become part of the group."""
        return {name: value for name, value in self.provenance.items() if name not in extraction.PROVENANCE_FIELDS}

    def wanted(self, layers: tuple[int, ...]) -> list[tuple[Level, str, tuple[int, ...]]]:
        """Every variable asked for: its level, its name and its layers."""
        found: list[tuple[Level, str, tuple[int, ...]]] = []
        for site in self.sites:
            held = layers if site in LAYERED_SITES else ()
            found += [("prompts", f"{site}_{pooling}", held) for pooling in self.poolings]
            found += [("tokens", site, held)] if self.keep_tokens else []
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What is asked for, and the stored group that may hold it already."""

    identity: ModelIdentity | None
    prompts: Prompts
    group: GroupInfo | None
    view: View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Places among the different prompts of those that are missing, and their tokens (None where none is)."""

    missing: Ints
    tokenized: TokenizedPrompts | None


def check_request(
    *,
    model: Any,
    prompts: Iterable[Any],
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    provenance: Provenance | None,
    **rest: Any,
) -> Request:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of prompts")
    given = list(prompts)
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    names = parse_sites(sites)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling or ()))
    if not poolings and not rest["keep_tokens"]:
        raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
    kind = extraction.prompts_kind(given)
    return Request(model=model, given=given, kind=kind, sites=names, poolings=poolings, provenance=dict(provenance or {}), **rest)


# ------------------------------------------------------------------------------------------------------------ looking up


def look_up(request: Request) -> Lookup:
    """The stored group of a named model, from what is known of it without loading it."""
    identity = _identify(request)
    group = _find_group(request, identity)
    if identity.num_layers is None and group is None:
        # A hub model that this machine has never seen: its configuration comes with its tokenizer.
        _tokenizer(request)
        identity = _identify(request)
        group = _find_group(request, identity)
    tokenizer = _tokenizer(request) if request.kind == "chat" else None
    prompts = extraction.parse_prompts(request.given, tokenizer=tokenizer)
    return Lookup(identity=identity, prompts=prompts, group=group, view=None if group is None else request.store.view(group))


def _find_group(request: Request, identity: ModelIdentity) -> GroupInfo | None:
    known = {**identity.provenance, **request.provenance}
    # A group with fields of somebody's own, such as a steering vector, is meant only by who names them.
    fixed = {*extraction.PROVENANCE_FIELDS, *request.own_provenance}
    found = [info for info in request.store.matching(identity.name, known) if fixed.issuperset(info.provenance)]
    if len(found) > 1:
        raise ambiguous(found, request.store.url)
    return found[0] if found else None


def _identify(request: Request) -> ModelIdentity:
    return extraction.identify(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision, dtype=request.dtype,
        prompts_kind=request.kind, max_length=request.max_length, truncation=request.truncation, memory=config.weights_memory(),
        modules=request.modules, provenance=request.own_provenance,
    )  # fmt: skip


def look_up_loaded(request: Request, loaded: LoadedModel, before: Lookup | None = None) -> Lookup:
    """The stored group of a loaded model, all of whose provenance is known."""
    group = group_of(loaded)
    prompts = before.prompts if before is not None and request.kind != "ids" else None
    prompts = prompts or extraction.parse_prompts(request.given, tokenizer=loaded.tokenizer)
    stored = request.store.groups().get(group.name)
    view = None if stored is None else request.store.view(stored)
    return Lookup(identity=before.identity if before else None, prompts=prompts, group=stored, view=view)


def group_of(loaded: LoadedModel) -> GroupInfo:
    return GroupInfo(model=loaded.name, provenance=loaded.provenance, num_layers=loaded.num_layers, hidden_size=loaded.hidden_size)


def _tokenizer(request: Request) -> Any:
    if request.tokenizer is not None and not isinstance(request.tokenizer, (str, os.PathLike)):
        return request.tokenizer
    source = request.model if request.tokenizer is None else request.tokenizer
    return extraction.load_tokenizer(source, revision=request.revision, trust_remote_code=request.trust_remote_code)


def load(request: Request, *, device: Any, device_map: Any) -> LoadedModel:
    """The model, with all of its provenance."""
    return extraction.load_model(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision, dtype=request.dtype, device=device,
        device_map=device_map, trust_remote_code=request.trust_remote_code, modules=request.modules, prompts_kind=request.kind,
        max_length=request.max_length, truncation=request.truncation, memory=config.weights_memory(), provenance=request.own_provenance,
    )  # fmt: skip


def plan_work(request: Request, looked: Lookup, loaded: LoadedModel | None, before: Work | None = None) -> tuple[ExtractPlan, Work]:
    """The plan, and the work that it means."""
    prompts, known = looked.prompts, loaded or looked.identity
    assert known is not None  # noqa: S101 — a model is named or loaded
    depth = known.num_layers or (looked.group.num_layers if looked.group else None)
    if depth is None:
        raise InvalidArgumentError(
            f"how many layers {known.name!r} has is not known without its configuration: check the name, or go online"
        )
    layers = resolve_layers(request.layers, depth) if set(request.sites) & set(LAYERED_SITES) else ()
    missing = _missing(request, looked.view, prompts, layers)
    if before is not None and np.array_equal(before.missing, missing):
        tokenized = before.tokenized
    else:
        tokenized = _tokenize(request, prompts, missing, loaded, known) if len(missing) else None
    hidden = known.hidden_size or (looked.group.hidden_size if looked.group else None) or 0
    dtype = str(known.provenance.get("compute_dtype") or "float32")
    weight = row_bytes(
        layers=len(layers), hidden_size=hidden, dtype=dtype, sites=request.sites, pooling=request.poolings, keep_tokens=request.keep_tokens
    )
    plan = ExtractPlan(
        model=known.name,
        url=request.store.url,
        prompts=len(prompts),
        found=len(prompts) - len(missing),
        tokens=0 if tokenized is None else tokenized.num_tokens,
        layers=layers,
        variables=tuple(name for _, name, _ in request.wanted(layers)),
        dtype=dtype,
        nbytes=0 if tokenized is None else weight.total(len(tokenized), tokenized.num_tokens),
        free_bytes=request.store.storage.free_bytes(),
    )
    return plan, Work(missing=missing, tokenized=tokenized)


def _tokenize(
    request: Request, prompts: Prompts, missing: Ints, loaded: LoadedModel | None, known: LoadedModel | ModelIdentity
) -> TokenizedPrompts:
    tokenizer = loaded.tokenizer if loaded is not None else _tokenizer(request)
    if prompts.text is None:
        prompts = extraction.parse_prompts(request.given, tokenizer=tokenizer)
    return extraction.tokenize(
        prompts.take(missing),
        tokenizer,
        context_length=known.context_length,
        max_length=request.max_length,
        truncation=request.truncation,
        vocab_size=known.vocab_size,
    )


def _missing(request: Request, view: View | None, prompts: Prompts, layers: tuple[int, ...]) -> Ints:
    """Places among the different prompts of those that lack anything asked for."""
    if view is None:
        return np.arange(len(prompts))
    rows = view.find(prompts.sha256)  # also where all are run again: a collision must be noticed before anything is run
    if request.refresh:
        return np.arange(len(prompts))
    there = rows >= 0
    for level, name, held in request.wanted(layers):
        there[there] &= view.covers(level, name, rows[there], held).all(axis=0)
    return np.flatnonzero(~there)
