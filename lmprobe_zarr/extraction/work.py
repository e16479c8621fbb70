"""TODO: lmprobe_zarr/extraction/work.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmprobe_zarr.batch import Precision, resolve_layers, row_bytes
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.lookup import Lookup, tokenizer_of
from lmprobe_zarr.extraction.models import ModelIdentity, Prompts, TokenizedPrompts
from lmprobe_zarr.extraction.plan import ExtractPlan
from lmprobe_zarr.extraction.request import Request, Wanted
from lmprobe_zarr.store.parts import View
from lmprobe_zarr.typing import Array, Ints

if TYPE_CHECKING:
    from lmprobe_zarr.extraction.models import LoadedModel

__all__ = ["Work", "plan_work"]


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
    tokenizer = loaded.tokenizer if loaded is not None else tokenizer_of(request)
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
