"""Which tokens are in the parts that are pooled by themselves. Runs no model and reads no store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lmprobe_zarr.batch import Column, TokenPart, TokensOfPrompts, offsets_of
from lmprobe_zarr.errors import InvalidArgumentError
from lmprobe_zarr.extraction.models import TokenizedPrompts
from lmprobe_zarr.extraction.request import Request
from lmprobe_zarr.log import warn
from lmprobe_zarr.typing import Ints, Mask

__all__ = ["with_parts"]


def with_parts(
    tokenized: TokenizedPrompts, request: Request, columns: Mapping[str, Column], rows: Ints, *, every: bool
) -> TokenizedPrompts:
    """Prompts with the masks of the parts that a request pools over.

    Parameters
    ----------
    tokenized : TokenizedPrompts
    request : Request
    columns : mapping of str to Column
        One value per distinct prompt.
    rows : ndarray of int
        Which of the distinct prompts these are.
    every : bool
        Whether these are all prompts of the call, so that a part that none of them has is an error.

    Raises
    ------
    InvalidArgumentError
        What a criterion needs is not known of these tokens, or no prompt of the call has a part.
    """
    parts = [part for part in request.parts if part is not None]
    if not parts:
        return tokenized
    known = TokensOfPrompts(
        text=tokenized.text, lengths=tokenized.lengths, char_start=tokenized.char_start, char_end=tokenized.char_end,
        role=tokenized.columns.get("role"), role_names=tokenized.role_names, generated=tokenized.columns.get("generated"),
        first=tokenized.first, spans={part.name: _listed(columns[part.span_column][rows]) for part in parts if part.span_column},
    )  # fmt: skip
    masks = {part.name: part.mask(known) for part in parts}
    if request.order is None:  # otherwise this is a worker's share, which may lack what others have
        for part in parts:
            _note_empty(part, masks[part.name], known, every=every)
    return replace(tokenized, parts=masks)


def _listed(column: Column) -> list[str | None]:
    there = np.ones(len(column), bool) if column.missing is None else ~column.missing
    return [str(value) if known else None for value, known in zip(column.values.tolist(), there.tolist(), strict=True)]


def _note_empty(part: TokenPart, mask: Mask, tokens: TokensOfPrompts, *, every: bool) -> None:
    """Warn of prompts that have no token in a part, and raise if that is so of all prompts of the call."""
    held = np.add.reduceat(mask.astype(np.int64), offsets_of(tokens.lengths)[:-1])
    empty = np.flatnonzero(held == 0)
    if not len(empty):
        return
    if len(empty) == len(held) and every:
        codes = np.unique(tokens.role[tokens.role >= 0]).tolist() if part.role and tokens.role is not None else []
        told = f": the roles there are {', '.join(tokens.role_names[code] for code in codes)}" if codes else ""
        remedy = ": give generate=lz.Generate(…), so that the model answers, or chats that end with an answer" * (part.name == "generated")
        raise InvalidArgumentError(f"no token of the {len(held)} prompts is in over={part.name!r}, {part.described}{told}{remedy}")
    first = int(empty[0]) if tokens.first is None else int(tokens.first[empty[0]])
    warn(
        f"{len(empty)} of {len(held)} prompts, first prompts[{first}], have no token in over={part.name!r}: what is pooled over it is NaN",
        UserWarning,
    )
