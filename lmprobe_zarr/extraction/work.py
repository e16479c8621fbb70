"""What is to be done for a request, decided from what the store has. Runs no model and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmprobe_zarr.batch import Column, Precision, TokenPart, TokensOfPrompts, offsets_of, parse_prompts, row_bytes
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.columns import columns_by_prompt, fit_columns
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.extraction.models import TokenizedPrompts
from lmprobe_zarr.extraction.plan import ExtractPlan
from lmprobe_zarr.log import warn
from lmprobe_zarr.typing import Mask

__all__ = ["Work", "decide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be done.

    Parameters
    ----------
    lookup : Lookup
        Has the prompts to run the model on, and those to pool from stored tokens.
    plan : ExtractPlan
        The same work in numbers.
    tokenized : TokenizedPrompts, optional
        Tokens of the missing prompts; None if none is missing.
    columns : mapping of str to Column
        The caller's columns, one value per distinct prompt.
    """

    lookup: Lookup
    plan: ExtractPlan
    tokenized: TokenizedPrompts | None
    columns: Mapping[str, Column]

    @property
    def changes_store(self) -> bool:
        """Whether activations are to be stored."""
        return bool(len(self.lookup.missing) or self.lookup.derived)


def decide(lookup: Lookup, precision: Precision, before: Work | None = None) -> Work:
    """The work that a lookup leaves to do, and its size when it is stored with a precision.

    Parameters
    ----------
    lookup : Lookup
    precision : Precision
    before : Work, optional
        The work decided before the model was loaded; its tokens are used again if the same prompts are missing.
    """
    columns = columns_by_prompt(fit_columns(lookup.request.columns, lookup.view), lookup.prompts)
    # What a decoder reads first is known only of the loaded model.
    if before is not None and lookup.request.kind != "pair" and np.array_equal(before.lookup.missing, lookup.missing):
        tokenized = before.tokenized
    else:
        tokenized = _tokenize(lookup, columns) if len(lookup.missing) else None
    tokens = 0 if tokenized is None else tokenized.num_tokens
    nbytes, needed_bytes = _sizes(lookup, precision, tokens)
    plan = ExtractPlan(
        model=lookup.model.name,
        url=lookup.request.store.url,
        prompts=len(lookup.prompts),
        found=len(lookup.found),
        derived=sum(map(len, lookup.derived.values())),
        tokens=tokens,
        layers=lookup.layers,
        variables=tuple(variable.name for variable in lookup.wanted),
        dtype=precision.dtype or lookup.compute_dtype,
        nbytes=nbytes,
        needed_bytes=needed_bytes,
        free_bytes=lookup.request.store.storage.free_bytes(),
        modules="" if lookup.loaded is None else lookup.loaded.found,
        group="" if lookup.group is None else lookup.group.name,
        unknown=lookup.unknown,
        elsewhere=lookup.elsewhere,
        in_lmprobe=lookup.in_lmprobe,
    )
    return Work(lookup=lookup, plan=plan, tokenized=tokenized, columns=columns)


def _sizes(lookup: Lookup, precision: Precision, tokens: int) -> tuple[int, int]:
    """Bytes of the missing activations, which have `tokens` tokens, and of all requested ones."""
    request, model, group = lookup.request, lookup.model, lookup.group
    size = row_bytes(
        layers=len(request.kept_layers(lookup.layers)),
        hidden_size=model.hidden_size or (group.hidden_size if group else None) or 0,
        dtype=precision.dtype or lookup.compute_dtype,
        sites=request.sites,
        pooling=request.poolings,
        keep_tokens=request.keep_tokens,
        outputs=request.outputs,
        vocab_size=model.vocab_size,
        experts=model.num_experts,
        widths=lookup.widths,
        site_layers={variable.site: len(variable.layers) for variable in lookup.wanted if variable.layers},
        parts=len(request.parts),
    )
    stored_tokens = 0 if lookup.view is None else int(lookup.view.token_counts()[lookup.found_rows].sum())
    return size.total(len(lookup.missing), tokens), size.total(len(lookup.prompts), tokens + stored_tokens)


def _tokenize(lookup: Lookup, columns: Mapping[str, Column]) -> TokenizedPrompts:
    """Tokens of the missing prompts, and which of them are in the parts that are pooled."""
    request, prompts = lookup.request, lookup.prompts
    if prompts.text is None:
        prompts = parse_prompts(request.given, tokenizer=lookup.tokenizer, chat=request.chat)
    tokenized = models.tokenize(
        prompts.take(lookup.missing),
        lookup.tokenizer,
        context_length=lookup.model.window,
        max_length=request.choice.max_length,
        truncation=request.choice.truncation,
        vocab_size=lookup.model.vocab_size,
        add_special_tokens=request.choice.add_special_tokens,
        decoder_start=None if lookup.loaded is None else lookup.loaded.decoder_start,
        roles=request.keep_tokens or request.outputs.token_level or any(part is not None and part.needs_roles for part in request.parts),
    )
    parts = [part for part in request.parts if part is not None]
    if not parts:
        return tokenized
    spans = {part.name: _listed(columns[part.span_column][lookup.missing]) for part in parts if part.span_column}
    known = TokensOfPrompts(
        text=tokenized.text, lengths=tokenized.lengths, char_start=tokenized.char_start, char_end=tokenized.char_end,
        role=tokenized.columns.get("role"), role_names=tokenized.role_names, generated=tokenized.columns.get("generated"),
        first=tokenized.first, spans=spans,
    )  # fmt: skip
    masks = {part.name: part.mask(known) for part in parts}
    for part in parts:
        _note_empty(part, masks[part.name], known, lookup)
    return replace(tokenized, parts=masks)


def _listed(column: Column) -> list[str | None]:
    there = np.ones(len(column), bool) if column.missing is None else ~column.missing
    return [str(value) if known else None for value, known in zip(column.values.tolist(), there.tolist(), strict=True)]


def _note_empty(part: TokenPart, mask: Mask, tokens: TokensOfPrompts, lookup: Lookup) -> None:
    """Warn of prompts that have no token in a part, and raise if that is so of all prompts of the call."""
    held = np.add.reduceat(mask.astype(np.int64), offsets_of(tokens.lengths)[:-1])
    empty = np.flatnonzero(held == 0)
    if not len(empty) or lookup.request.order is not None:  # a worker's share is counted with the others
        return
    first = lookup.prompts.first[lookup.missing[empty[0]]]
    if len(empty) == len(held) and not len(lookup.found):
        codes = np.unique(tokens.role[tokens.role >= 0]).tolist() if part.role and tokens.role is not None else []
        told = f": the roles there are {', '.join(tokens.role_names[code] for code in codes)}" if codes else ""
        raise InvalidArgumentError(f"no token of the {len(held)} prompts is in over={part.name!r}, {part.described}{told}")
    warn(
        f"{len(empty)} of {len(held)} prompts, first prompts[{first}], have no token in over={part.name!r}: what is pooled over it is NaN",
        UserWarning,
    )
