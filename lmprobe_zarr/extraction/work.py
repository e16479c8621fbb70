"""What is to be done for a request, decided from what the store has. Runs no model and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmprobe_zarr.batch import Column, Precision, parse_prompts, row_bytes
from lmprobe_zarr.extraction import models
from lmprobe_zarr.extraction.columns import columns_by_prompt, fit_columns
from lmprobe_zarr.extraction.continued import share_of_work, start_layer
from lmprobe_zarr.extraction.lookup import Lookup
from lmprobe_zarr.extraction.models import TokenizedPrompts
from lmprobe_zarr.extraction.over import with_parts
from lmprobe_zarr.extraction.plan import ExtractPlan
from lmprobe_zarr.extraction.weights import LOADED, ChosenWeights

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
        Tokens of the missing prompts, without their answers; None if none is missing.
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


def decide(lookup: Lookup, precision: Precision, before: Work | None = None, weights: ChosenWeights = LOADED) -> Work:
    """The work that a lookup leaves to do, and its size when it is stored with a precision.

    Parameters
    ----------
    lookup : Lookup
    precision : Precision
    before : Work, optional
        The work decided before the model was loaded; its tokens are used again if the same prompts are missing.
    weights : ChosenWeights
        How the weights come into memory.
    """
    answers = lookup.answers
    columns = columns_by_prompt(
        fit_columns(lookup.request.columns, lookup.view), lookup.prompts if answers is None else answers.plain
    )  # fmt: skip
    if answers is not None:
        columns = {name: values[answers.of] for name, values in columns.items()}
    # What a decoder reads first is known only of the loaded model.
    if before is not None and lookup.request.kind != "pair" and np.array_equal(before.lookup.missing, lookup.missing):
        tokenized = before.tokenized
    else:
        tokenized = _tokenize(lookup, columns) if len(lookup.missing) else None
    tokens = 0 if tokenized is None else tokenized.num_tokens
    to_generate = 0
    if answers is not None and tokenized is not None:
        answers.check_lengths(lookup.missing, tokenized, lookup.model.window, lookup.request.choice.max_length, lookup.tokenizer)
        to_generate = len(answers.unknown(lookup.missing))
        tokens += to_generate * answers.settings.max_new_tokens + sum(len(answer.token_ids) for answer in answers.known.values())
    nbytes, needed_bytes = _sizes(lookup, precision, tokens)
    start = start_layer(lookup)
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
        to_generate=to_generate,
        max_new_tokens=0 if answers is None else answers.settings.max_new_tokens,
        continued_from=start,
        work_share=1.0 if start is None else share_of_work(lookup, start),
        weights="streamed" if weights.streamed else "loaded",
        weights_why=weights.why,
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
        site_layers={each.site: len(each.layers) for each in lookup.wanted if each.layers and each.layers != lookup.layers},
        parts=len(request.parts),
    )
    stored_tokens = 0 if lookup.view is None else int(lookup.view.token_counts()[lookup.found_rows].sum())
    return size.total(len(lookup.missing), tokens), size.total(len(lookup.prompts), tokens + stored_tokens)


def _tokenize(lookup: Lookup, columns: Mapping[str, Column]) -> TokenizedPrompts:
    """Tokens of the missing prompts, and which of them are in the parts that are pooled."""
    request, prompts = lookup.request, lookup.prompts
    if prompts.text is None:
        plain = parse_prompts(request.given, tokenizer=lookup.tokenizer, chat=request.chat)
        prompts = plain if lookup.answers is None else replace(plain.take(lookup.answers.of), sha256=prompts.sha256)
    missing = prompts.take(lookup.missing)
    if lookup.answers is not None and lookup.answers.plain.timed is not None:
        # Answers are not known by their text, but what they answer may have been rendered on another day.
        missing = replace(missing, timed=lookup.answers.plain.timed[lookup.answers.of[lookup.missing]])
    tokenized = models.tokenize(
        missing,
        lookup.tokenizer,
        context_length=lookup.model.window,
        max_length=request.choice.max_length,
        truncation=request.choice.truncation,
        vocab_size=lookup.model.vocab_size,
        add_special_tokens=request.choice.add_special_tokens,
        decoder_start=None if lookup.loaded is None else lookup.loaded.decoder_start,
        roles=request.keep_tokens or request.outputs.token_level or any(part is not None and part.needs_roles for part in request.parts),
    )
    if lookup.answers is not None:
        return tokenized  # the parts are those of prompts with answers
    return with_parts(tokenized, request, columns, lookup.missing, every=not len(lookup.found))
