"""What is asked for, what is stored, and so what is missing. Knows models and stores; runs and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmprobe_zarr import config, extraction
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.extraction import ModelIdentity, Prompts, TokenizedPrompts
from lmprobe_zarr.layers import LayerSpec, resolve_layers
from lmprobe_zarr.plan import ExtractPlan
from lmprobe_zarr.pooling import parse_poolings
from lmprobe_zarr.precision import Precision
from lmprobe_zarr.schema import GroupInfo, Level, Provenance
from lmprobe_zarr.sites import LAYERED_SITES, Outputs, is_top_k, parse_sites, row_bytes
from lmprobe_zarr.store import Store, ambiguous
from lmprobe_zarr.view import View

if TYPE_CHECKING:
    from lmprobe_zarr.extraction import LoadedModel

__all__ = [
    "Lookup",
    "Request",
    "Wanted",
    "Work",
    "check_request",
    "group_of",
    "load",
    "look_up",
    "look_up_loaded",
    "plan_work",
    "settle_dtype",
]

Array = npt.NDArray[Any]
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
    outputs: Outputs
    keep_passed: bool
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
    group: str | None = None

    @property
    def by_name(self) -> bool:
        """Whether the model is named, so that it need not be loaded to be known."""
        return isinstance(self.model, (str, os.PathLike))

    @property
    def own_provenance(self) -> dict[str, Any]:
        """The fields of the caller's own, such as ``steering``: they become part of the group."""
        return {name: value for name, value in self.provenance.items() if name not in extraction.PROVENANCE_FIELDS}

    @property
    def layered(self) -> bool:
        """Whether anything is asked for that each layer has its own of."""
        return self.outputs.router or bool(set(self.sites) & set(LAYERED_SITES))

    def kept_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """The layers that are stored of what is run: where they cost nothing more, those that are passed on the way too."""
        passed = layers and self.keep_passed and not self.keep_tokens and not self.outputs.router
        return tuple(range(max(layers) + 1)) if passed else layers

    def wanted(self, layers: tuple[int, ...], routers: tuple[int, ...] | None = None) -> list[Wanted]:
        """Every variable asked for.

        Parameters
        ----------
        layers : tuple of int
            Layers asked for.
        routers : tuple of int, optional
            Layers that have a router, where that is known; otherwise all are taken to have one.
        """
        found = []
        for site in self.sites:
            held = layers if site in LAYERED_SITES else ()
            found += [Wanted(level="prompts", name=f"{site}_{pooling}", layers=held, pooled_from=site) for pooling in self.poolings]
            found += [Wanted(level="tokens", name=site, layers=held)] if self.keep_tokens else []
        for place, name, layered in self.outputs.variables():
            level: Level = "tokens" if place == "tokens" else "prompts"
            held = tuple(layer for layer in layers if routers is None or layer in routers) if layered else ()
            top_k = self.outputs.top_k if is_top_k(name) else None
            found.append(Wanted(level=level, name=name, layers=held, at_least=top_k))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One variable that is asked for.

    Parameters
    ----------
    level, name : str
    layers : tuple of int
        Empty for variables without layers.
    pooled_from : str, optional
        The site whose stored tokens it can be computed from, as well.
    at_least : int, optional
        How many values a row must hold, for the largest few of many.
    """

    level: Level
    name: str
    layers: tuple[int, ...]
    pooled_from: str | None = None
    at_least: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What is asked for, and the stored group that may hold it already."""

    identity: ModelIdentity | None
    prompts: Prompts
    group: GroupInfo | None
    view: View | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be done.

    Parameters
    ----------
    missing : ndarray of int
        Places among the different prompts of those that the model has to be run on.
    tokenized : TokenizedPrompts, optional
        Their tokens; None where none is missing.
    derived : mapping of tuple of str to ndarray of int
        What can be pooled from stored tokens: places of the prompts that lack exactly these variables, by the variables' names.
    """

    missing: Ints
    tokenized: TokenizedPrompts | None
    derived: Mapping[tuple[str, ...], Ints]


def check_request(
    *,
    model: Any,
    prompts: Iterable[Any],
    sites: str | Sequence[str],
    pooling: str | Sequence[str],
    provenance: Provenance | None,
    outputs: Outputs,
    keep_passed: bool = False,
    **rest: Any,
) -> Request:
    if isinstance(prompts, str):
        raise InvalidTypeError("prompts is one text: give a list of prompts")
    given = list(prompts)
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    names = parse_sites(sites, outputs)
    poolings = parse_poolings(pooling if isinstance(pooling, str) else tuple(pooling or ()))
    if not poolings and not rest["keep_tokens"]:
        if not outputs:
            raise InvalidArgumentError("nothing would be stored: give a pooling, or keep_tokens=True")
        names = ()
    kind = extraction.prompts_kind(given)
    return Request(
        model=model, given=given, kind=kind, sites=names, poolings=poolings, provenance=dict(provenance or {}), outputs=outputs,
        keep_passed=keep_passed, **rest,
    )  # fmt: skip


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
    # A damaged part is as good as missing here: what only it holds is run again.
    view = None if group is None else request.store.view(group, whole=False)
    return Lookup(identity=identity, prompts=prompts, group=group, view=view)


def _find_group(request: Request, identity: ModelIdentity) -> GroupInfo | None:
    known = {**identity.provenance, **request.provenance}
    # A group with fields of somebody's own, such as a steering vector, is meant only by who names them.
    fixed = {*extraction.PROVENANCE_FIELDS, *request.own_provenance}
    matching = request.store.matching(identity.name, known, request.group, whole=False)
    found = [info for info in matching if fixed.issuperset(info.provenance)]
    if len(found) > 1:
        found = [info for info in found if request.store.holds_parts(info.name)]
    if len(found) > 1 and request.dtype is None:
        # Any dtype serves: that of lmprobe where there are several.
        found = [info for info in found if info.provenance.get("compute_dtype") == "float32"] or found
    if len(found) > 1:
        raise ambiguous(found, request.store.where)
    return found[0] if found else None


def _identify(request: Request) -> ModelIdentity:
    identity = extraction.identify(
        request.model, name=request.name, tokenizer=request.tokenizer, revision=request.revision,
        dtype="auto" if request.dtype is None else request.dtype, prompts_kind=request.kind, max_length=request.max_length,
        truncation=request.truncation, memory=config.weights_memory(), modules=request.modules, provenance=request.own_provenance,
    )  # fmt: skip
    if request.dtype is None:  # whatever was computed in serves
        return replace(identity, provenance={k: v for k, v in identity.provenance.items() if k != "compute_dtype"})
    return identity


def settle_dtype(request: Request, looked: Lookup) -> Request:
    """The request with the dtype to compute in, where any served: that of the stored group, else float32, as in lmprobe."""
    if request.dtype is not None:
        return request
    stored = None if looked.group is None else looked.group.provenance.get("compute_dtype")
    return replace(request, dtype=str(stored or "float32"))


def look_up_loaded(request: Request, loaded: LoadedModel, before: Lookup | None = None) -> Lookup:
    """The stored group of a loaded model, all of whose provenance is known."""
    group = group_of(loaded)
    if request.group is not None and request.group != group.name:
        raise InvalidArgumentError(
            f"group={request.group!r} was asked for, but this model as it is loaded makes {group.name!r}: leave group out, or read only"
        )
    prompts = before.prompts if before is not None and request.kind != "ids" else None
    prompts = prompts or extraction.parse_prompts(request.given, tokenizer=loaded.tokenizer)
    stored = request.store.groups(whole=False).get(group.name)
    view = None if stored is None else request.store.view(stored, whole=False)
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
        head=request.outputs.needs_head,
    )  # fmt: skip


def plan_work(
    request: Request, looked: Lookup, loaded: LoadedModel | None, before: Work | None = None, *, precision: Precision
) -> tuple[ExtractPlan, Work]:
    """The plan, and the work that it means; stored with a precision."""
    prompts, known = looked.prompts, loaded or looked.identity
    assert known is not None  # noqa: S101 — a model is named or loaded
    depth = known.num_layers or (looked.group.num_layers if looked.group else None)
    if depth is None:
        raise InvalidArgumentError(
            f"how many layers {known.name!r} has is not known without its configuration: check the name, or go online"
        )
    layers = resolve_layers(request.layers, depth) if request.layered else ()
    wanted = request.wanted(layers, None if loaded is None else loaded.router_layers)
    missing, derived = _missing(request, wanted, looked.view, prompts)
    if before is not None and np.array_equal(before.missing, missing):
        tokenized = before.tokenized
    else:
        tokenized = _tokenize(request, prompts, missing, loaded, known) if len(missing) else None
    dtype = str(known.provenance.get("compute_dtype") or (looked.group and looked.group.provenance.get("compute_dtype")) or "float32")
    weight = row_bytes(
        layers=len(request.kept_layers(layers)),
        hidden_size=known.hidden_size or (looked.group.hidden_size if looked.group else None) or 0,
        dtype=precision.dtype or dtype,
        sites=request.sites,
        pooling=request.poolings,
        keep_tokens=request.keep_tokens,
        outputs=request.outputs,
        vocab_size=known.vocab_size,
        experts=known.num_experts,
    )
    tokens = 0 if tokenized is None else tokenized.num_tokens
    held = np.setdiff1d(np.arange(len(prompts)), missing)
    kept = 0 if looked.view is None else int(looked.view.token_counts()[looked.view.find([prompts.sha256[i] for i in held])].sum())
    plan = ExtractPlan(
        model=known.name,
        url=request.store.url,
        prompts=len(prompts),
        found=len(prompts) - len(missing),
        derived=sum(map(len, derived.values())),
        tokens=tokens,
        layers=layers,
        variables=tuple(one.name for one in wanted),
        dtype=precision.dtype or dtype,
        nbytes=weight.total(len(missing), tokens),
        needed_bytes=weight.total(len(prompts), tokens + kept),
        free_bytes=request.store.storage.free_bytes(),
    )
    return plan, Work(missing=missing, tokenized=tokenized, derived=derived)


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


def _missing(request: Request, wanted: Sequence[Wanted], view: View | None, prompts: Prompts) -> tuple[Ints, dict[tuple[str, ...], Ints]]:
    """Places among the different prompts of those that lack anything asked for; and of those that stored tokens make up for."""
    if view is None:
        return np.arange(len(prompts)), {}
    rows = view.find(prompts.sha256)  # also where all are run again: a collision must be noticed before anything is run
    if request.refresh:
        return np.arange(len(prompts)), {}
    known = np.flatnonzero(rows >= 0)
    lacking = np.zeros(len(known), bool)  # what only the model can make up for
    to_pool: dict[str, Array] = {}
    tokens_are_whole = view.holds_whole_prompts
    for one in wanted:
        there: Array = np.asarray(view.covers(one.level, one.name, rows[known], one.layers).all(axis=0))
        if one.at_least is not None and there.any():
            there[there] = view.row_lengths(one.level, one.name, rows[known][there]) >= one.at_least
        if one.pooled_from is not None and tokens_are_whole:
            from_tokens = view.covers("tokens", one.pooled_from, rows[known], one.layers).all(axis=0)
            to_pool[one.name] = from_tokens & ~there
            there = there | from_tokens
        lacking |= ~there
    missing = np.setdiff1d(np.arange(len(prompts)), known[~lacking])
    derived: dict[tuple[str, ...], list[int]] = {}
    for i in np.flatnonzero(~lacking):
        names = tuple(name for name, chosen in to_pool.items() if chosen[i])
        if names:
            derived.setdefault(names, []).append(int(known[i]))
    return missing, {names: np.array(places) for names, places in derived.items()}
