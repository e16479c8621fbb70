"""Masks that select tokens: by position, by a span of characters, by the turns of a chat. Never activations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lmprobe_zarr.batch import given_prompts, parse_chat_options, parse_prompts, prompt_hash
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, MissingPromptsError
from lmprobe_zarr.tokens.index import INDEXED_COLUMNS, TokenIndex
from lmprobe_zarr.tokens.prompts import prompts_of
from lmprobe_zarr.typing import Array, Mask

__all__ = ["mask_tokens"]
Span = tuple[int, int]


def mask_tokens(
    tokens: xr.Dataset | xr.DataArray,
    *,
    position: int | slice | Iterable[int] | None = None,
    span: str | Mapping[Any, Any] | None = None,
    role: str | Iterable[str] | None = None,
    chats: Iterable[Any] | Mapping[Any, Any] | None = None,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> xr.DataArray:
    """True for the tokens that all given criteria select, over ``token``; for ``where=`` and for ``isel(token=…)``.

    Parameters
    ----------
    tokens : Dataset or DataArray
        From ``store.tokens()``; only its coordinates are read.
    position : int, slice or iterable of int, optional
        Positions in the prompt. Negative ones count from the prompt's last token in the data, which is -1; in a slice too.
    span : str or mapping, optional
        Characters of the text. A text selects every place where it occurs. A mapping has (start, end), or a list of such pairs, for each
        prompt text or hash; prompts that it lacks have no span. A token is selected if it shares a character with a span.
    role : str or iterable of str, optional
        Whose messages, such as "assistant", or "reasoning". Selects the contents of the messages, not what the template adds around them:
        the tokens that have the role in the store, or, with `chats`, the contents of its messages in the text.
    chats : list of chats, or {text or hash: chat}, optional
        The messages of each prompt, ``{"role": …, "content": …}``, for stores without roles. A list is matched through `tokenizer`;
        without it, it must have the order of the prompts.
    tokenizer : transformers tokenizer, optional
        The tokenizer whose template rendered the chats.
    chat_template_kwargs : mapping, optional
        The options that they were extracted with, ``tools``, ``add_generation_prompt`` and ``continue_final_message`` included.

    Returns
    -------
    DataArray of bool, dims (token)
        With the index over prompt and position.

    Raises
    ------
    InvalidArgumentError
        No criterion is given, a coordinate that it needs is missing (``text``, ``char_start``, ``char_end``), a role is given that is
        neither stored nor in chats, no token or message has the role, or the contents of messages do not occur in the prompt's text in
        their order.
    MissingPromptsError
        A span or a chat belongs to a prompt that the data lack.
    InvalidTypeError
        Positions that are no whole numbers, or spans that are no pairs of them.

    Warns
    -----
    UserWarning
        The text of `span` occurs in none of the prompts.

    Notes
    -----
    Stored roles were told by the chat template. With `chats`, contents are searched for in order in the rendered text, without surrounding
    white space, which templates may strip: a content that is also in a header before it is found there.
    """
    if position is None and span is None and role is None:
        raise InvalidArgumentError("nothing says which tokens to select: give position=, span= or role=")
    if not isinstance(tokens, xr.Dataset | xr.DataArray):
        raise InvalidTypeError(f"tokens are a Dataset or DataArray from store.tokens(), not {type(tokens).__name__}")
    bare = _coordinates(tokens)
    numbers, prompts = prompts_of(bare, "token")
    mask = np.ones(len(numbers), bool)
    if position is not None:
        mask &= _at(np.asarray(bare.coords["position"].values), numbers, position)
    if span is not None:
        texts = _texts(bare, numbers) if isinstance(span, str) else _known_texts(bare, numbers)
        spans = _occurrences(texts, span) if isinstance(span, str) else _given_spans(span, prompts, texts)
        mask &= _inside(bare, numbers, spans)
        if isinstance(span, str) and not any(spans):
            one = len(texts) == 1
            where = "not in the text of the only prompt" if one else f"in none of the texts of {len(texts)} prompts"
            warnings.warn(f"span={span!r:.60} is {where}: the mask selects no token", UserWarning, stacklevel=2)
    if role is not None:
        roles = {role} if isinstance(role, str) else set(role)
    if role is not None and chats is None:
        mask &= _stored_roles(bare, roles)
    elif role is not None:
        mask &= _inside(bare, numbers, _turns(chats, roles, prompts, _texts(bare, numbers), tokenizer, chat_template_kwargs))
    return bare.copy(data=mask).rename("mask")


def _coordinates(tokens: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """The token axis with its index and the coordinates of the text; no activations."""
    if "token" not in tokens.dims:
        raise InvalidArgumentError(f"this has dims {tuple(tokens.sizes)}, expected token: open it with store.tokens()")
    columns = tokens.coords.to_dataset() if isinstance(tokens, xr.DataArray) else tokens.drop_vars(list(tokens.data_vars))
    index = columns.xindexes.get("prompt")
    indexed = index.coord_names if isinstance(index, TokenIndex) else ("prompt", "position", *INDEXED_COLUMNS)
    kept = [name for name, c in columns.coords.items() if c.dims == ("token",) and name in (*indexed, *_OF_TEXT)]
    columns = columns.drop_vars([name for name in columns.coords if name not in kept])
    return xr.DataArray(np.zeros(tokens.sizes["token"], bool), dims="token").assign_coords(columns.coords)


_OF_TEXT = ("text", "char_start", "char_end")


def _stored_roles(bare: xr.DataArray, roles: set[str]) -> Mask:
    """The tokens of some roles, by what is stored."""
    stored = np.asarray(bare.coords["role"].values) if "role" in bare.coords else None
    if stored is None or stored.dtype.kind not in "OUT":
        raise InvalidArgumentError(
            "roles are not stored with these tokens: extract the chats again, or give chats=, the messages of each prompt, or a mapping "
            "from prompt to its messages"
        )
    there = set(map(str, stored.tolist()))
    if not roles <= there:
        known = ", ".join(sorted(there - {""})) or "none"
        raise InvalidArgumentError(f"no token has the role {', '.join(map(repr, sorted(map(str, roles - there))))}: there are {known}")
    return np.isin(stored.astype(str), list(roles))


def _at(places: Array, numbers: Array, position: Any) -> Mask:
    last = np.full(int(numbers.max()) + 1, -1)
    np.maximum.at(last, numbers, places)
    from_end = places - last[numbers] - 1
    if isinstance(position, slice):
        if position.step not in (None, 1):
            raise InvalidArgumentError(f"position={position!r} has a step: give a list of positions")
        mask = np.ones(len(places), bool)
        for bound, is_start in ((position.start, True), (position.stop, False)):
            if bound is not None:
                _whole_number(bound)
                counted = places if bound >= 0 else from_end
                mask &= counted >= bound if is_start else counted < bound
        return mask
    wanted = list(position) if isinstance(position, Iterable) else [position]
    for number in wanted:
        _whole_number(number)
    return np.isin(places, [number for number in wanted if number >= 0]) | np.isin(from_end, [number for number in wanted if number < 0])


def _whole_number(value: Any) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InvalidTypeError(f"position {value!r} is no whole number: give numbers, a list of them or a slice")


def _texts(bare: xr.DataArray, numbers: Array) -> list[str]:
    texts = _known_texts(bare, numbers)
    if not any(texts):
        raise InvalidArgumentError("the texts are not stored, so nothing can be found in them: give span= as {hash: [(start, end)]}")
    return texts


def _known_texts(bare: xr.DataArray, numbers: Array) -> list[str]:
    first = np.unique(numbers, return_index=True)[1]
    if "text" not in bare.coords:
        return [""] * len(first)
    return [str(text) for text in bare.coords["text"].variable.isel(token=first).values.tolist()]


def _inside(bare: xr.DataArray, numbers: Array, spans: Sequence[Sequence[Span]]) -> Mask:
    if "char_start" not in bare.coords or "char_end" not in bare.coords:
        raise InvalidArgumentError(
            "the place of tokens in their text (char_start, char_end) is not stored, as some tokenizers do not give it: use position="
        )
    starts, ends = np.asarray(bare.coords["char_start"].values), np.asarray(bare.coords["char_end"].values)
    mask = np.zeros(len(numbers), bool)
    order = np.argsort(numbers, kind="stable")
    bounds = np.cumsum([0, *np.bincount(numbers, minlength=len(spans))])
    for number, wanted in enumerate(spans):
        rows = order[bounds[number] : bounds[number + 1]]
        for start, end in wanted:
            # Tokens that the tokenizer added have -1 and share no character.
            mask[rows] |= (starts[rows] < end) & (ends[rows] > start) & (starts[rows] >= 0)
    return mask


def _occurrences(texts: Sequence[str], wanted: str) -> list[list[Span]]:
    if not wanted:
        raise InvalidArgumentError("span is an empty text, which is everywhere: give some characters")

    def places(text: str) -> Iterator[Span]:
        start = text.find(wanted)
        while start >= 0:
            yield start, start + len(wanted)
            start = text.find(wanted, start + 1)

    return [list(places(text)) for text in texts]


def _number_of(key: Any, by_hash: Mapping[str, int], by_text: Mapping[str, int], what: str) -> int:
    number = by_text.get(key) if isinstance(key, str) and key in by_text else by_hash.get(key) if isinstance(key, str) else None
    if number is None:
        number = by_hash.get(prompt_hash(key))
    if number is None:
        raise MissingPromptsError(f"{what} names a prompt that is not among these {len(by_hash)}: select the same prompts for both")
    return number


def _given_spans(given: Any, prompts: Array, texts: Sequence[str]) -> list[list[Span]]:
    if not isinstance(given, Mapping):
        raise InvalidTypeError(f"span is a text or a mapping from prompt to (start, end), not {type(given).__name__}")
    by_hash, by_text = {str(p): n for n, p in enumerate(prompts)}, {t: n for n, t in enumerate(texts) if t}
    spans: list[list[Span]] = [[] for _ in prompts]
    for key, value in given.items():
        pairs = [value] if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], Sequence) else list(value)
        for pair in pairs:
            try:
                start, end = (int(bound) for bound in pair)
            except (TypeError, ValueError) as error:
                raise InvalidTypeError(f"span holds {pair!r}, expected (start, end) in characters") from error
            if not 0 <= start < end:
                raise InvalidArgumentError(f"span holds ({start}, {end}), which has no characters: give 0 <= start < end")
            spans[_number_of(key, by_hash, by_text, "span")].append((start, end))
    return spans


def _turns(
    chats: Any, roles: set[str], prompts: Array, texts: Sequence[str], tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None
) -> list[list[Span]]:
    """The places of the messages of some roles in every prompt's text."""
    by_hash, by_text = {str(p): n for n, p in enumerate(prompts)}, {t: n for n, t in enumerate(texts) if t}
    found: dict[int, Any] = {}
    if isinstance(chats, Mapping):
        found = {_number_of(key, by_hash, by_text, "chats"): chat for key, chat in chats.items()}
    else:
        listed = given_prompts(chats, "chats")
        if tokenizer is not None:
            options = parse_chat_options(chat_template_kwargs=chat_template_kwargs)
            rendered = parse_prompts(listed, tokenizer=tokenizer, chat=options)
            # Chats of prompts that are not selected are ignored.
            for place, number in enumerate(rendered.row):
                at = by_hash.get(rendered.sha256[number][:16])
                if at is not None:
                    found[at] = listed[place]
        elif len(listed) != len(prompts):
            raise InvalidArgumentError(
                f"there are {len(listed)} chats for {len(prompts)} prompts: give one each in their order, or tokenizer= to match them by"
            )
        else:
            found = dict(enumerate(listed))
    without = [str(prompts[number]) for number in range(len(prompts)) if number not in found]
    if without:
        raise MissingPromptsError(f"chats lacks {len(without)} of {len(prompts)} prompts, first {without[0]}: give the messages of each")
    spans: list[list[Span]] = []
    seen: set[str] = set()
    for number, text in enumerate(texts):
        spans.append(_contents(found[number], roles, text, str(prompts[number])))
        seen |= {str(message["role"]) for message in found[number]}
    if not roles <= seen:
        raise InvalidArgumentError(
            f"no message has the role {', '.join(map(repr, sorted(roles - seen)))}: there are {', '.join(sorted(seen))}"
        )
    return spans


def _contents(chat: Any, roles: set[str], text: str, prompt: str) -> list[Span]:
    spans = []
    place = 0
    for message in chat:
        if not isinstance(message, Mapping) or "role" not in message or (contents := _texts_of(message, text[place:])) is None:
            raise InvalidTypeError(f"the chat of prompt {prompt} holds something else than {{'role': …, 'content': text}}")
        for content in contents:
            start = text.find(content, place)
            if start < 0:
                raise InvalidArgumentError(
                    f"a message of {message['role']!r} is not in the text of prompt {prompt} where it should be: "
                    "give chats in the prompts' order, a mapping from prompt to chat, or tokenizer="
                )
            place = start + len(content)
            if content and str(message["role"]) in roles:
                spans.append((start, place))
    return spans


def _texts_of(message: Mapping[Any, Any], rendered: str) -> list[str] | None:
    """The content of a message without surrounding white space, in parts if `rendered` has them apart; None if it is no text."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        return None
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        return None
    joined = "".join(texts).strip()
    return [joined] if joined in rendered else [text.strip() for text in texts]
