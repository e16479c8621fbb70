"""Roles: their names and codes, and the role and the turn of each token of a chat."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote

import numpy as np

from lmprobe_zarr.batch.chat_spans import REASONING, ChatSpans
from lmprobe_zarr.batch.chats import ChatOptions, apply_template, template_of
from lmprobe_zarr.typing import Ints, Mask

__all__ = [
    "NO_ROLE",
    "ROLES",
    "decode_role_names",
    "encode_role_names",
    "kept_tokens",
    "marked_tokens",
    "role_code",
    "role_names",
    "roles_of_tokens",
    "with_marks",
]

#: The roles that have the same code everywhere, their place here. Those of other names follow, in an order of each call and each part.
ROLES: Final = ("system", "developer", "user", "assistant", "tool", REASONING)
NO_ROLE: Final = -1
# How a template marks what the assistant generates.
_MARKS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


# -- names and codes ---------------------------------------------------------------------------------------------------------


def role_names(chats: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    """The names of roles by their code: `ROLES`, and those that only these chats have."""
    found = {str(message["role"]) for messages in chats for message in messages}
    return (*ROLES, *sorted(found.difference(ROLES)))


def role_code(role: str, names: Sequence[str] = ROLES) -> int:
    """The code of a role; `NO_ROLE` where the names lack it."""
    return list(names).index(role) if role in names else NO_ROLE


def encode_role_names(names: Sequence[str]) -> dict[str, Any]:
    """Names of roles as attributes of the array of their codes: ``flag_values`` and ``flag_meanings`` of the CF conventions.

    These separate meanings by blanks, so that what is no letter, digit or one of ``_-.~`` is percent-encoded.
    """
    return {"flag_values": list(range(len(names))), "flag_meanings": " ".join(quote(name, safe="") or "%" for name in names)}


def decode_role_names(attributes: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names by their code, "" for codes without one; None where attributes say nothing of roles.

    Raises
    ------
    ValueError
        They contradict themselves.
    """
    if "flag_values" not in attributes and "flag_meanings" not in attributes:
        return None
    values, meanings = attributes.get("flag_values"), attributes.get("flag_meanings")
    names = meanings.split(" ") if isinstance(meanings, str) and meanings else []
    plain = isinstance(values, list) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    if not isinstance(values, list) or not plain or len(values) != len(names) or len(set(values)) < len(values):
        raise ValueError("flag_values and flag_meanings do not fit together")
    if any(not 0 <= value < 2**16 for value in values):
        raise ValueError("flag_values are no codes of roles")
    found = [""] * (max(values, default=-1) + 1)
    for value, name in zip(values, names, strict=True):
        found[value] = "" if name == "%" else unquote(name)
    return tuple(found)


# -- tokens ------------------------------------------------------------------------------------------------------------------


def roles_of_tokens(spans: ChatSpans, starts: Ints, ends: Ints, names: Sequence[str]) -> tuple[Ints, Ints]:
    """The role and the turn of each token.

    Parameters
    ----------
    spans : ChatSpans
    starts, ends : ndarray of int64, shape (token,)
        The characters of each token; −1 for tokens that the tokenizer added.
    names : sequence of str
        Names of roles by their code.

    Returns
    -------
    roles, turns : ndarray of int64, shape (token,)
        The role of the first content that a token has a character of; `NO_ROLE` and −1 where it has none.
    """
    length = int(max(ends.max(initial=0), *(span.end for span in (*spans.contents, *spans.turns)), 0))
    roles, turns = np.full((2, length + 1), NO_ROLE, np.int64)
    for span in spans.turns:
        turns[span.start : span.end] = span.turn
    for span in spans.contents:
        roles[span.start : span.end] = role_code(str(span.role), names)
        turns[span.start : span.end] = span.turn
    there = starts >= 0
    first, told = np.maximum(starts, 0), np.zeros(len(starts), bool)
    out_roles, out_turns = np.full((2, len(starts)), NO_ROLE, np.int64)
    for values in (roles, turns):
        at = _next_told(values)[first]
        ok = there & (at < ends) & ~told
        out_roles[ok], out_turns[ok] = roles[at[ok]], turns[at[ok]]
        told |= ok
    return out_roles, out_turns


def _next_told(values: Ints) -> Ints:
    """For each place the first one from there on that is told; the last place where none is."""
    places = np.where(values >= 0, np.arange(len(values)), len(values) - 1)
    return np.asarray(np.minimum.accumulate(places[::-1])[::-1], np.int64)


def marked_tokens(messages: Sequence[dict[str, Any]], ids: Ints, tokenizer: Any, options: ChatOptions) -> Mask | None:
    """Which tokens a template marks as generated by the assistant.

    Parameters
    ----------
    messages : list of dict
    ids : ndarray of int64, shape (token,)
        The tokens of the chat; some may have been cut off at either end.
    tokenizer : transformers tokenizer
    options : ChatOptions

    Returns
    -------
    ndarray of bool, shape (token,), or None
        None where the template marks none, or makes other tokens than these.
    """
    template = template_of(tokenizer, options)
    if template is None or not _MARKS.search(template):
        return None
    wanted = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        encoded = apply_template(list(messages), tokenizer, options, **wanted)
        made = np.asarray(encoded["input_ids"], np.int64).reshape(-1)
        mask = np.asarray(encoded["assistant_masks"], bool).reshape(-1)
    except Exception:  # noqa: BLE001 - templates and tokenizers raise anything, and versions of transformers differ in this argument
        return None
    kept = kept_tokens(made, ids)
    return None if kept is None or len(mask) != len(made) else mask[kept]


def kept_tokens(made: Ints, ids: Ints) -> slice | None:
    """Where some tokens are among those that were made, of which the beginning or the end may have been cut off."""
    starts = (0, len(made) - len(ids)) if len(ids) <= len(made) else ()
    return next((slice(i, i + len(ids)) for i in starts if np.array_equal(made[i : i + len(ids)], ids)), None)


def with_marks(roles: Ints, turns: Ints, mask: Mask, messages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Ints, Ints]:
    """Roles and turns that follow a template's marks: a token is the assistant's where it is marked, and nowhere else."""
    assistant, reasoning = role_code("assistant", names), role_code(REASONING, names)
    marked = np.where(mask & (roles != reasoning), assistant, np.where(roles == assistant, NO_ROLE, roles))
    mine = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    begins = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    out = turns.copy()
    if len(begins) == len(mine):
        run = np.searchsorted(begins, np.arange(len(mask)), "right") - 1
        lacking = mask & (turns < 0)
        out[lacking] = np.asarray(mine, np.int64)[run[lacking]]
    return marked, out
