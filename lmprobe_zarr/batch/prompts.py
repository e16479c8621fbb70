"""The prompts of a call: texts, chats, token ids or pairs. Never a model; a tokenizer only renders chats and decodes ids."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from lmprobe_zarr.batch.chats import NO_CHAT_OPTIONS, ChatOptions, RenderedChat, check_renders_chats, parse_chat_options, render_chat
from lmprobe_zarr.batch.columns import check_texts
from lmprobe_zarr.batch.given import WAYS, PromptKind, common_kind, given_prompts, is_pair
from lmprobe_zarr.batch.hashes import HASH_DIGITS, prompt_sha256
from lmprobe_zarr.batch.tokenizer_calls import decode_ids, special_id
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["Prompts", "parse_prompts", "prompt_hash", "prompts_kind"]

# Tokens that a tokenizer may also pad with, although they belong into prompts.
_SHARED_WITH_PADDING: Final = ("bos_token", "eos_token", "cls_token", "sep_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The distinct prompts of one call, in the order of their first appearance.

    Parameters
    ----------
    kind : {"text", "chat", "ids", "pair"}
        What the caller gave; all prompts of a call are of the same kind.
    sha256 : tuple of str
        Whole digest of every prompt, without repeats.
    text : tuple of str, or None
        The texts; for chats, the rendered texts; for pairs, those of the decoder. None for token ids that no tokenizer has decoded yet.
    encoder_text : tuple of str, or None
        For pairs, the texts that the encoder reads.
    token_ids : tuple of ndarray of int64, or None
        The ids, for ``kind="ids"`` and for chats of a tokenizer that has no template.
    row : ndarray of int64, shape (given,)
        For each prompt that the caller gave, its index among the distinct ones.
    first : ndarray of int64, shape (prompt,)
        For each distinct prompt, its first index among those that the caller gave.
    timed : ndarray of bool, shape (prompt,), or None
        Which chats have a text that depends on the time; their digests do not depend on it. None where none has.
    messages : tuple of lists of dict, or None
        For chats, the messages as the template has got them, by which `chat_roles` finds out whose tokens are whose.
    chat : ChatOptions
        How chats were rendered.
    """

    kind: PromptKind
    sha256: tuple[str, ...]
    text: tuple[str, ...] | None
    encoder_text: tuple[str, ...] | None = None
    token_ids: tuple[Ints, ...] | None = None
    row: Ints
    first: Ints
    timed: Mask | None = None
    messages: tuple[list[dict[str, Any]], ...] | None = None
    chat: ChatOptions = NO_CHAT_OPTIONS

    def __len__(self) -> int:
        return len(self.sha256)

    def take(self, rows: Sequence[int] | Ints) -> Prompts:
        """Some of the distinct prompts, in the order of `rows`; ``first`` still refers to the prompts that the caller gave."""
        chosen = np.asarray(rows, np.int64)
        return Prompts(
            kind=self.kind,
            sha256=tuple(self.sha256[i] for i in chosen),
            text=None if self.text is None else tuple(self.text[i] for i in chosen),
            encoder_text=None if self.encoder_text is None else tuple(self.encoder_text[i] for i in chosen),
            token_ids=None if self.token_ids is None else tuple(self.token_ids[i] for i in chosen),
            row=np.arange(len(chosen), dtype=np.int64),
            first=self.first[chosen],
            timed=None if self.timed is None else self.timed[chosen],
            messages=None if self.messages is None else tuple(self.messages[i] for i in chosen),
            chat=self.chat,
        )

    def with_texts(self, texts: Mapping[int, str]) -> Prompts:
        """The same prompts with other texts, by index; for chats whose text depends on the time."""
        assert self.text is not None  # noqa: S101 - chats have texts
        return replace(self, text=tuple(texts.get(i, text) for i, text in enumerate(self.text)))


def prompts_kind(prompts: object) -> PromptKind:
    """The kind of the prompts of a call; needs no tokenizer.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As :func:`parse_prompts`; and a generator, which this would exhaust.
    """
    if isinstance(prompts, Iterator) and not isinstance(prompts, io.IOBase):
        raise InvalidTypeError(f"prompts is a {type(prompts).__name__}, which can be read once only: make a list of it, list(prompts)")
    return common_kind(given_prompts(prompts))


def _parse_ids(prompt: Any, number: int) -> Ints:
    detached = prompt.detach().cpu().numpy() if hasattr(prompt, "detach") else prompt
    if isinstance(detached, np.ma.MaskedArray) and detached.ndim == 1:
        detached = detached.compressed()
    try:
        ids = np.asarray(detached)
    except ValueError as error:
        raise InvalidTypeError(f"prompts[{number}] is a nested list: {WAYS}") from error
    if ids.size == 0:
        raise InvalidArgumentError(f"prompts[{number}] is empty: leave it out, or give at least one token id")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidTypeError(f"prompts[{number}] is a {type(prompt).__name__} of shape {ids.shape} and dtype {ids.dtype}: {WAYS}")
    if ids.min() < 0:
        raise InvalidArgumentError(f"prompts[{number}] holds the token id {int(ids.min())}: token ids are at least 0; leave padding out")
    # A read-only copy, since the caller may change its own array later.
    parsed = ids.astype(np.int64)
    parsed.flags.writeable = False
    return parsed


def _decode(ids: tuple[Ints, ...], tokenizer: Any) -> tuple[str, ...]:
    return tuple(decode_ids(tokenizer, i) for i in ids)


def _check_padding(ids: Sequence[Ints], tokenizer: Any) -> None:
    """Raise if prompts begin or end with padding, which would be run as if it were tokens.

    A tokenizer may pad with a token that has another use too. One such token at the end of a prompt is no padding; several are.
    """
    pad = special_id(tokenizer, "pad_token")
    if pad is None:
        return
    after = np.array([_run_of(pad, row[::-1]) for row in ids])
    before = np.array([_run_of(pad, row) for row in ids])
    if pad in [special_id(tokenizer, name) for name in _SHARED_WITH_PADDING]:
        padded = (after > 1) | (before > 1)
    else:
        # Decoders with an encoder begin with their padding token: one token before every prompt is meant.
        padded = (after > 0) | ((before > 0) if (before != 1).any() else np.zeros(len(before), bool))
    if padded.any():
        number = int(padded.argmax())
        raise InvalidArgumentError(
            f"prompts[{number}] {'ends' if after[number] else 'begins'} with {int(max(after[number], before[number]))} times the token id "
            f"{pad}, which this tokenizer pads with: give the ids of each prompt without padding, ids[mask == 1] with its attention mask"
        )


def _run_of(token_id: int, ids: Ints) -> int:
    """How many times a token stands at the beginning of some ids."""
    other = np.flatnonzero(ids != token_id)
    return int(other[0]) if len(other) else len(ids)


def parse_prompts(
    prompts: object, *, tokenizer: Any = None, add_generation_prompt: bool | None = None, chat: ChatOptions = NO_CHAT_OPTIONS
) -> Prompts:
    """The distinct prompts of a call, with the order in which the caller gave them.

    Parameters
    ----------
    prompts : iterable of str, of lists of chat messages, of flat arrays of token ids, or of pairs of str
        A chat message is a dict with ``role`` and ``content``, a text or a list of parts; token ids may be lists, 1-d integer arrays or
        torch tensors; the texts of a pair are for an encoder and its decoder. See `given_prompts` for what is no list of prompts.
    tokenizer : transformers tokenizer, optional
        Needed for chats, which its template renders. Token ids are decoded with it if it is given; texts never need it.
    add_generation_prompt : bool, optional
        Whether the template ends a chat with the beginning of an answer. None: as `chat` has it.
    chat : ChatOptions
        How chats are rendered.

    Raises
    ------
    InvalidArgumentError
        No prompt, an empty prompt, a negative token id, padding, a chat without a tokenizer or a template, or a chat that the template
        refuses.
    InvalidTypeError
        A bare text instead of a list, something that is no prompt, or several kinds in one call.
    """
    given = given_prompts(prompts)
    kind = common_kind(given)
    ids: list[Ints] | None = None
    texts: list[str] | None = None
    read: list[str] | None = None
    timed: Mask | None = None
    messages: list[list[dict[str, Any]]] | None = None
    if kind == "ids":
        ids = [_parse_ids(prompt, number) for number, prompt in enumerate(given)]
        digests = [prompt_sha256(i) for i in ids]
        if tokenizer is not None:
            _check_padding(ids, tokenizer)
    elif kind == "chat":
        check_renders_chats(tokenizer)
        chat = chat if add_generation_prompt is None else replace(chat, add_generation_prompt=add_generation_prompt)
        chats = [render_chat(messages, number, tokenizer, chat) for number, messages in enumerate(given)]
        texts, digests = [rendered.text for rendered in chats], [rendered.sha256 for rendered in chats]
        check_texts(texts)
        ids, timed = _ids_of(chats), np.array([rendered.timed for rendered in chats])
        messages = [rendered.messages for rendered in chats]
    elif kind == "pair":
        read, texts = ([str.__str__(pair[side]) for pair in given] for side in (0, 1))
        check_texts(read)
        check_texts(texts)
        digests = [prompt_sha256(pair) for pair in zip(read, texts, strict=True)]
    else:
        # Subclasses of str are the text that they are equal to; an enumeration's own str() is its name.
        texts = [str.__str__(text) for text in given]
        check_texts(texts)
        digests = [prompt_sha256(text) for text in texts]
    place: dict[str, int] = {}
    row = np.array([place.setdefault(digest, len(place)) for digest in digests], np.int64)
    first = np.unique(row, return_index=True)[1].astype(np.int64)
    chosen = None if ids is None else tuple(ids[i] for i in first)
    if texts is not None:
        text: tuple[str, ...] | None = tuple(texts[i] for i in first)
    else:
        text = None if tokenizer is None or chosen is None else _decode(chosen, tokenizer)
    return Prompts(
        kind=kind, sha256=tuple(place), text=text, token_ids=chosen, row=row, first=first,
        encoder_text=None if read is None else tuple(read[i] for i in first),
        timed=timed[first] if timed is not None and timed.any() else None,
        messages=None if messages is None else tuple(messages[i] for i in first), chat=chat,
    )  # fmt: skip


def _ids_of(chats: Sequence[RenderedChat]) -> list[Ints] | None:
    ids = [rendered.token_ids for rendered in chats if rendered.token_ids is not None]
    return ids if len(ids) == len(chats) else None


def prompt_hash(
    prompt: str | Sequence[int] | Array | Sequence[Mapping[str, Any]] | tuple[str, str],
    *,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The label of a prompt: the first 16 hex digits of its sha256.

    For a text this is lmprobe's own prompt hash (lmprobe 0.5 to 0.10).

    Parameters
    ----------
    prompt : str, sequence of int, list of messages, or pair of str
        A text, token ids, a chat, or the texts of an encoder and of its decoder.
    tokenizer : transformers tokenizer, optional
        Needed for a chat.
    chat_template_kwargs : mapping, optional
        The options that the chat was extracted with, ``tools``, ``add_generation_prompt`` and ``continue_final_message`` included.

    Returns
    -------
    str
        What ``sel(prompt=…)`` takes.

    Raises
    ------
    InvalidTypeError
        Neither a text nor a flat sequence of integers nor a chat nor a pair of texts.
    InvalidArgumentError
        A chat without a tokenizer that renders it.
    """
    if tokenizer is not None and not isinstance(prompt, str) and not is_pair(prompt):
        options = parse_chat_options(chat_template_kwargs=chat_template_kwargs)
        return parse_prompts([prompt], tokenizer=tokenizer, chat=options).sha256[0][:HASH_DIGITS]
    return prompt_sha256(prompt)[:HASH_DIGITS]
