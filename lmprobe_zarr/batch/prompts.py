"""The prompts of a call, texts, chats or token ids, as one frozen record. Never a model; a tokenizer only renders chats and decodes ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Ints

__all__ = ["PROMPT_KINDS", "PromptKind", "Prompts", "parse_prompts", "prompts_kind", "shorten"]

PromptKind = Literal["text", "chat", "ids"]
PROMPT_KINDS: Final = ("text", "chat", "ids")
SHOWN_CHARACTERS: Final = 40
WAYS: Final = "a prompt is a text, a list of chat messages, or a flat list of token ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The distinct prompts of one call, in the order of their first appearance.

    Parameters
    ----------
    kind : {"text", "chat", "ids"}
        What the caller gave; all prompts of a call are of the same kind.
    sha256 : tuple of str
        Whole digest of every prompt, without repeats.
    text : tuple of str, or None
        The texts; for chats, the rendered texts. None for token ids that no tokenizer has decoded yet.
    token_ids : tuple of ndarray of int64, or None
        The ids, for ``kind="ids"`` only.
    row : ndarray of int64, shape (given,)
        For each prompt that the caller gave, its index among the distinct ones.
    first : ndarray of int64, shape (prompt,)
        For each distinct prompt, its first index among those that the caller gave.
    """

    kind: PromptKind
    sha256: tuple[str, ...]
    text: tuple[str, ...] | None
    token_ids: tuple[Ints, ...] | None = None
    row: Ints
    first: Ints

    def __len__(self) -> int:
        return len(self.sha256)

    def take(self, rows: Sequence[int] | Ints) -> Prompts:
        """Some of the distinct prompts, in the order of `rows`; ``first`` still refers to the prompts that the caller gave."""
        chosen = np.asarray(rows, np.int64)
        return Prompts(
            kind=self.kind,
            sha256=tuple(self.sha256[i] for i in chosen),
            text=None if self.text is None else tuple(self.text[i] for i in chosen),
            token_ids=None if self.token_ids is None else tuple(self.token_ids[i] for i in chosen),
            row=np.arange(len(chosen), dtype=np.int64),
            first=self.first[chosen],
        )


def shorten(text: str) -> str:
    """The first characters of a text, quoted, for a message."""
    return repr(text) if len(text) <= SHOWN_CHARACTERS else repr(text[:SHOWN_CHARACTERS] + "…")


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _kind_of(prompt: object, number: int) -> PromptKind:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidArgumentError(f"prompts[{number}] is empty: leave it out, or give at least one character")
        return "text"
    if isinstance(prompt, Mapping):
        raise InvalidTypeError(f"prompts[{number}] is a single chat message: wrap each conversation in a list, prompts=[[message, …], …]")
    if isinstance(prompt, int | np.integer) and not isinstance(prompt, bool):
        raise InvalidTypeError(
            f"prompts[{number}] is the number {prompt!r}: wrap the token ids of each prompt in a list, prompts=[[1, 2, 3]]"
        )
    if _is_chat(prompt):
        return "chat"
    if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes | bytearray | memoryview):
        return "ids"
    if hasattr(prompt, "detach"):
        return "ids"
    raise InvalidTypeError(f"prompts[{number}] is a {type(prompt).__name__}: {WAYS}")


def _list_prompts(prompts: object) -> list[Any]:
    if isinstance(prompts, str):
        raise InvalidTypeError(f"prompts is the text {shorten(prompts)}, not a list of prompts: wrap it, prompts=[…]")
    if isinstance(prompts, bytes | bytearray | memoryview | Mapping | set | frozenset) or not isinstance(prompts, Iterable):
        raise InvalidTypeError(f"prompts is a {type(prompts).__name__}: give a list of prompts; {WAYS}")
    given = list(prompts)
    if not given:
        raise InvalidArgumentError("prompts is empty: give at least one prompt")
    return given


def _common_kind(given: list[Any]) -> PromptKind:
    kinds = [_kind_of(prompt, number) for number, prompt in enumerate(given)]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            words = {"text": "a text", "chat": "a chat", "ids": "token ids"}
            raise InvalidTypeError(
                f"prompts[0] is {words[kinds[0]]} but prompts[{number}] is {words[kind]}: one call takes one kind of prompt"
            )
    return kinds[0]


def prompts_kind(prompts: object) -> PromptKind:
    """The kind of the prompts of a call; needs no tokenizer.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
        As :func:`parse_prompts`; and a generator, which this would exhaust.
    """
    if isinstance(prompts, Iterator):
        raise InvalidTypeError(f"prompts is a {type(prompts).__name__}, which can be read once only: make a list of it, list(prompts)")
    return _common_kind(_list_prompts(prompts))


def _parse_ids(prompt: Any, number: int) -> Ints:
    detached = prompt.detach().cpu().numpy() if hasattr(prompt, "detach") else prompt
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


def _render(messages: Any, number: int, tokenizer: Any, add_generation_prompt: bool | None) -> str:
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InvalidTypeError(f"prompts[{number}] is no chat: each message is a dict with 'role' and 'content'")
    opens = messages[-1]["role"] != "assistant" if add_generation_prompt is None else add_generation_prompt
    try:
        text = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=opens)
    except Exception as error:
        # A template is code by the model's author and can raise anything.
        reason = str(error).strip().split("\n")[0][:200]
        raise InvalidArgumentError(f"prompts[{number}] does not go through the tokenizer's chat template: {reason}") from error
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"prompts[{number}] is empty once the chat template is applied: give messages with content")
    return text


def _check_template(tokenizer: Any) -> None:
    if tokenizer is None:
        raise InvalidArgumentError("chat messages are hashed as their rendered text: pass tokenizer= whose chat template renders them")
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InvalidArgumentError(f"the tokenizer {name!r} has no chat template: set tokenizer.chat_template, or give texts")


def _decode(ids: tuple[Ints, ...], tokenizer: Any) -> tuple[str, ...]:
    return tuple(tokenizer.decode(i.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids)


def parse_prompts(prompts: object, *, tokenizer: Any = None, add_generation_prompt: bool | None = None) -> Prompts:
    """The distinct prompts of a call, with the order in which the caller gave them.

    Parameters
    ----------
    prompts : iterable of str, of lists of chat messages, or of flat arrays of token ids
        A chat message is a dict with ``role`` and ``content``; token ids may be lists, 1-d integer arrays or torch tensors.
    tokenizer : transformers tokenizer, optional
        Needed for chats, which its template renders. Token ids are decoded with it if it is given; texts never need it.
    add_generation_prompt : bool, optional
        Whether the template ends a chat with the beginning of an answer. None: yes, unless the last message is the assistant's.

    Raises
    ------
    InvalidArgumentError
        No prompt, an empty prompt, a negative token id, a chat without a tokenizer or a template, or a chat that the template refuses.
    InvalidTypeError
        A bare text instead of a list, something that is no prompt, or several kinds in one call.
    """
    given = _list_prompts(prompts)
    kind = _common_kind(given)
    ids: list[Ints] | None = None
    if kind == "ids":
        ids = [_parse_ids(prompt, number) for number, prompt in enumerate(given)]
        digests = [prompt_sha256(i) for i in ids]
    else:
        if kind == "chat":
            _check_template(tokenizer)
            given = [_render(messages, number, tokenizer, add_generation_prompt) for number, messages in enumerate(given)]
        # A numpy string is a str too, but would keep its array alive.
        given = [str(text) for text in given]
        digests = [prompt_sha256(text) for text in given]
    place: dict[str, int] = {}
    row = np.array([place.setdefault(digest, len(place)) for digest in digests], np.int64)
    first = np.unique(row, return_index=True)[1].astype(np.int64)
    chosen = None if ids is None else tuple(ids[i] for i in first)
    if chosen is None:
        text: tuple[str, ...] | None = tuple(given[i] for i in first)
    else:
        text = None if tokenizer is None else _decode(chosen, tokenizer)
    return Prompts(kind=kind, sha256=tuple(place), text=text, token_ids=chosen, row=row, first=first)
