"""The role and the turn of every token of chats, as columns of tokens. Needs a tokenizer, never a model or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmprobe_zarr.batch import (
    NO_ROLE,
    ChatOptions,
    Prompts,
    apply_template,
    chat_spans,
    ids_spans,
    kept_tokens,
    marked_tokens,
    role_names,
    roles_of_tokens,
    template_of,
    with_marks,
)
from lmprobe_zarr.log import warn
from lmprobe_zarr.typing import Ints

__all__ = ["have_same_roles", "role_columns"]


def role_columns(
    prompts: Prompts, ids: Sequence[Ints], places: Sequence[Ints] | None, tokenizer: Any
) -> tuple[dict[str, Ints], tuple[str, ...]]:
    """The columns ``role`` and ``turn`` of the tokens of some chats, end to end, and the names of roles by their code.

    Parameters
    ----------
    prompts : Prompts
        Chats; other prompts have no roles, and no columns.
    ids : sequence of ndarray of int64
        The tokens of each.
    places : sequence of ndarray of int64, shape (token, 2), or None
        The characters of each token; None where the tokenizer does not tell them.
    tokenizer : transformers tokenizer

    Warns
    -----
    UserWarning
        The template does not tell where some contents are. Their tokens have no role.
    """
    if prompts.messages is None or prompts.text is None:
        return {}, ()
    names = role_names(prompts.messages)
    roles, turns, untold = [], [], []
    for number, messages in enumerate(prompts.messages):
        timed = prompts.timed is not None and bool(prompts.timed[number])
        if places is not None:
            spans = chat_spans(messages, prompts.text[number], tokenizer, prompts.chat, timed=timed)
            starts, ends = places[number].T
        else:
            made = _made_ids(prompts, number, tokenizer)
            spans = ids_spans(messages, made, prompts.chat, template_of(tokenizer, prompts.chat), _ids_of(tokenizer))
            kept = kept_tokens(made, ids[number])
            starts = np.full(len(ids[number]), NO_ROLE) if kept is None else np.arange(len(made))[kept]
            ends = starts + 1
        role, turn = roles_of_tokens(spans, starts, ends, names)
        missed = set(spans.untold)
        mask = marked_tokens(messages, ids[number], tokenizer, prompts.chat)
        if mask is not None:
            role, turn = with_marks(role, turn, mask, messages, names)
            missed = {i for i in missed if messages[i]["role"] != "assistant"}
        roles.append(role)
        turns.append(turn)
        untold.append(len(missed))
    _warn_of_untold(prompts, untold)
    return {"role": np.concatenate(roles), "turn": np.concatenate(turns)}, names


def have_same_roles(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], text: str, tokenizer: Any, chat: ChatOptions) -> bool:
    """Whether the same characters have the same roles in two chats that the template renders to one text."""
    return chat_spans(one, text, tokenizer, chat).contents == chat_spans(other, text, tokenizer, chat).contents


def _made_ids(prompts: Prompts, number: int, tokenizer: Any) -> Ints:
    """All tokens of a chat, of which a limit may have cut some off."""
    if prompts.token_ids is not None:
        return prompts.token_ids[number]
    assert prompts.text is not None  # noqa: S101 - chats have texts
    return np.asarray(tokenizer(prompts.text[number], add_special_tokens=False)["input_ids"], np.int64)


def _ids_of(tokenizer: Any) -> Any:
    """What makes token ids of messages as `Prompts` has them: by the template, or in code of the tokenizer's own."""

    def ids_of(messages: list[dict[str, Any]], options: ChatOptions) -> Any:
        if getattr(tokenizer, "chat_template", None):
            text = apply_template(messages, tokenizer, options)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        made = apply_template(messages, tokenizer, options, tokenize=True)
        made = made["input_ids"] if isinstance(made, Mapping) else made
        return tokenizer(made, add_special_tokens=False)["input_ids"] if isinstance(made, str) else made

    return ids_of


def _warn_of_untold(prompts: Prompts, untold: Sequence[int]) -> None:
    lacking = [number for number, count in enumerate(untold) if count]
    if lacking:
        warn(
            f"the chat template does not tell where {sum(untold)} messages of {len(lacking)} of {len(prompts)} chats are in their text, "
            f"first in prompts[{int(prompts.first[lacking[0]])}]: the tokens of these messages have no role (-1); "
            "mask_tokens(role=…, chats=…) finds contents by their text",
            UserWarning,
        )
