"""Parts of a prompt's tokens that are pooled by themselves: a role, the answer, the last n tokens, a text, what comes after a marker.

Names, texts and numpy only. The criteria have the names that they have in `lmprobe_zarr.mask_tokens`.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from lmprobe_zarr.batch.pooling import ALL, POOLINGS
from lmprobe_zarr.batch.ragged import offsets_of, positions_of
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Array, Ints, Mask

__all__ = ["OverSpec", "TokenPart", "TokensOfPrompts", "one_part", "parse_over"]

_GENERATED: Final = "generated"
_CRITERIA: Final = ("role", "generated", "position", "span", "after")
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")
OverSpec: TypeAlias = str | Sequence[str] | Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOfPrompts:
    """What is known of the tokens of some prompts, end to end.

    Parameters
    ----------
    text : sequence of str, shape (prompt,)
    lengths : ndarray of int, shape (prompt,)
    char_start, char_end : ndarray of int, shape (token,), optional
        −1 for tokens that the tokenizer added.
    role : ndarray of int, shape (token,), optional
        Codes of `role_names`, −1 unknown.
    role_names : sequence of str
    generated : ndarray of int, shape (token,), optional
        1 for tokens that the model has generated.
    first : sequence of int, shape (prompt,), optional
        Place of each prompt in the caller's list, for messages.
    spans : mapping of str to sequence, optional
        By the name of a part, the span of each prompt as it is stored, ``"3:9"``; None for a prompt that has none.
    """

    text: Sequence[str]
    lengths: Ints
    char_start: Ints | None = None
    char_end: Ints | None = None
    role: Array | None = None
    role_names: Sequence[str] = ()
    generated: Array | None = None
    first: Sequence[int] | Ints | None = None
    spans: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPart:
    """One part of a prompt's tokens; those that all of its criteria select.

    Parameters
    ----------
    name : str
        What stands behind the pooling in the name of a variable, ``<site>_<pooling>_<name>``.
    role : tuple of str
        Roles, of which any is right; empty for no criterion.
    generated : bool, optional
        Whether the model has generated the token.
    position : tuple of int or None, length 2, optional
        First and last position, the last excluded; negative ones count from the end of the prompt.
    span : str or tuple of int, optional
        A text, or first and last character, the last excluded; a token is in the part if it shares a character with them, or with a place
        where the text occurs.
    span_column : str
        The column of prompts that holds a span of each; empty for no criterion.
    after : str, optional
        A text; a token is in the part if it begins at or after the end of the last place where the text occurs.
    """

    name: str
    role: tuple[str, ...] = ()
    generated: bool | None = None
    position: tuple[int | None, int | None] | None = None
    span: str | tuple[int, int] | None = None
    span_column: str = ""
    after: str | None = None
    described: str = field(init=False, default="")

    def __post_init__(self) -> None:
        given = {
            "role": list(self.role) or None, "generated": self.generated, "position": self.position,
            "span": {"column": self.span_column} if self.span_column else self.span, "after": self.after,
        }  # fmt: skip
        object.__setattr__(self, "described", json.dumps({key: value for key, value in given.items() if value is not None}))

    @property
    def needs_roles(self) -> bool:
        """Whether the roles of tokens have to be known."""
        return bool(self.role)

    def mask(self, tokens: TokensOfPrompts) -> Mask:
        """Which tokens are in the part, shape (token,).

        Raises
        ------
        InvalidArgumentError
            What a criterion needs is not known of these tokens.
        """
        total = int(tokens.lengths.sum())
        mask = np.ones(total, bool)
        if self.role:
            mask &= self._of_roles(tokens)
        if self.generated is not None:
            made = np.zeros(total, bool) if tokens.generated is None else np.asarray(tokens.generated) == 1
            mask &= made == self.generated
        if self.position is not None:
            places, start, stop = positions_of(tokens.lengths), *self.position
            from_end = places - np.repeat(tokens.lengths, tokens.lengths)
            if start is not None:
                mask &= (places if start >= 0 else from_end) >= start
            if stop is not None:
                mask &= (places if stop >= 0 else from_end) < stop
        if self.span_column or self.span is not None or self.after is not None:
            mask &= self._in_text(tokens)
        return mask

    def _of_roles(self, tokens: TokensOfPrompts) -> Mask:
        if tokens.role is None:
            raise InvalidArgumentError(
                f"over={self.name!r} is the role {' or '.join(map(repr, self.role))}, and roles are of chats: give lists of messages, or "
                "another part, over={'tail': {'position': slice(-8, None)}}"
            )
        codes = [code for code, name in enumerate(tokens.role_names) if name in self.role]
        return np.isin(np.asarray(tokens.role), codes)

    def _in_text(self, tokens: TokensOfPrompts) -> Mask:
        if tokens.char_start is None or tokens.char_end is None:
            raise InvalidArgumentError(
                f"over={self.name!r} is a place in the text, and which characters each token has is not known, as of token ids and "
                "of slow tokenizers: use position=, or give texts and a fast tokenizer"
            )
        mask = np.zeros(int(tokens.lengths.sum()), bool)
        bounds = offsets_of(tokens.lengths)
        for number, (first, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            text, starts, ends = tokens.text[number], tokens.char_start[first:stop], tokens.char_end[first:stop]
            inside = np.ones(stop - first, bool)
            if self.span_column or self.span is not None:
                inside &= False
                for begin, end in self._spans(tokens, number):
                    inside |= (starts >= 0) & (starts < end) & (ends > begin)
            if self.after is not None:
                place = text.rfind(self.after)
                inside &= (starts >= place + len(self.after)) if place >= 0 else False
            mask[first:stop] = inside
        return mask

    def _spans(self, tokens: TokensOfPrompts, number: int) -> list[tuple[int, int]]:
        """The characters of one prompt that the criterion names."""
        text = tokens.text[number]
        if isinstance(self.span, str):
            return [found.span() for found in re.finditer(re.escape(self.span), text)]
        span = parse_span(tokens.spans[self.name][number]) if self.span_column else self.span
        if span is None:
            return []
        if span[1] > len(text):
            place = number if tokens.first is None else int(tokens.first[number])
            raise InvalidArgumentError(
                f"over={self.name!r} has the span {span[0]}:{span[1]} for prompts[{place}], whose text has {len(text)} characters: give "
                "first and last character in it, the last excluded"
            )
        return [span]


def parse_span(written: object) -> tuple[int, int] | None:
    """``"3:9"`` as first and last character; None for no text."""
    if not isinstance(written, str):
        return None
    begin, _, end = written.partition(":")
    return int(begin), int(end)


def parse_over(over: OverSpec, prompts: int) -> tuple[tuple[TokenPart | None, ...], dict[str, list[str | None]]]:
    """The parts that poolings are over, without repeats, and the columns of spans; None stands for all tokens.

    Parameters
    ----------
    over : str, sequence of str, or mapping
        ``"all"``, ``"generated"``, or a role such as ``"assistant"``. A mapping gives a part a name of its own: ``{"tail": {"position":
        slice(-8, None)}}``, with the criteria ``role``, ``generated``, ``position`` (a slice), ``span`` (a text; first and last character;
        or a list of these, one pair or None for each prompt) and ``after`` (a text), all of which a token has to meet.
    prompts : int
        How many prompts there are.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        A name that no variable can end with, an unknown criterion, or nothing at all.
    """
    given: dict[str, Any]
    if isinstance(over, str):
        given = {over: over}
    elif isinstance(over, Mapping):
        given = dict(over)
    elif isinstance(over, Iterable):
        given = {name: name for name in over}
    else:
        raise InvalidTypeError(f"over is a {type(over).__name__}: give 'all', a role, several of these, or a mapping of names to criteria")
    if not given:
        raise InvalidArgumentError("over is empty: give 'all', or a part of the tokens")
    lower: dict[str, str] = {}
    for name in map(str, given):
        if lower.setdefault(name.lower(), name) != name:
            raise InvalidArgumentError(
                f"the parts {lower[name.lower()]!r} and {name!r} of over= differ by case alone, and some file systems ignore case"
            )
    columns: dict[str, list[str | None]] = {}
    parts = tuple(None if name == ALL and criteria == ALL else _part(name, criteria, prompts, columns) for name, criteria in given.items())
    return parts, columns


def one_part(over: OverSpec) -> TokenPart | None:
    """The only part that `over` names, None for all tokens.

    Raises
    ------
    InvalidArgumentError
        There are several, or it has a span for each prompt.
    """
    if isinstance(over, Mapping) and any(isinstance(each, Mapping) and isinstance(each.get("span"), list) for each in over.values()):
        raise InvalidArgumentError("over= has a span for each prompt, and the prompts of a probe change: give a text, or (start, end)")
    parts, _ = parse_over(over, 0)
    if len(parts) > 1:
        raise InvalidArgumentError(f"over={over!r} names {len(parts)} parts: give the one that activations are pooled over")
    return parts[0]


def _part(name: object, criteria: object, prompts: int, columns: dict[str, list[str | None]]) -> TokenPart:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"over={name!r:.80} is no name of a part: use the letters a to z, digits and _, a letter first, at most 32"
        )
    if name == ALL or any(f"_{pooling}_" in f"_{name}_" for pooling in POOLINGS):
        raise InvalidArgumentError(f"over={name!r} is, or holds, a name that poolings or all tokens have: choose another name")
    if isinstance(criteria, str):
        criteria = {"generated": True} if criteria == _GENERATED else {"role": criteria}
    if not isinstance(criteria, Mapping) or not criteria:
        raise InvalidTypeError(f"over={{{name!r}: …}} is a {type(criteria).__name__}: give a role, or criteria such as {{'span': 'Paris'}}")
    unknown = sorted(set(criteria) - set(_CRITERIA))
    if unknown:
        raise InvalidArgumentError(f"over={{{name!r}: …}} has the criterion {unknown[0]!r}: use {', '.join(_CRITERIA)}")
    span, listed = _span(name, criteria.get("span"), prompts)
    column = f"{name}_span" if listed is not None else ""
    if listed is not None:
        columns[column] = listed
    return TokenPart(
        name=name, role=_roles(name, criteria.get("role")), generated=_generated(name, criteria.get("generated")),
        position=_position(name, criteria.get("position")), span=span, span_column=column,
        after=_text(name, "after", criteria.get("after")),
    )  # fmt: skip


def _roles(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    roles = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not roles or not all(isinstance(role, str) and role for role in roles):
        raise InvalidTypeError(f"over={{{name!r}: {{'role': {value!r}}}}} is no role: give a text or several")
    return tuple(dict.fromkeys(roles))


def _generated(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool | np.bool_):
        raise InvalidTypeError(f"over={{{name!r}: {{'generated': {value!r}}}}} is no truth value: give True or False")
    return None if value is None else bool(value)


def _position(name: str, value: Any) -> tuple[int | None, int | None] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2:  # as `TokenPart.described` has it
        value = slice(*value)
    whole = isinstance(value, slice) and value.step in (None, 1)
    if not whole or any(b is not None and (isinstance(b, bool) or not isinstance(b, int | np.integer)) for b in (value.start, value.stop)):
        raise InvalidTypeError(f"over={{{name!r}: {{'position': {value!r}}}}} is no run of positions: give a slice, slice(-8, None)")
    return (None if value.start is None else int(value.start), None if value.stop is None else int(value.stop))


def _span(name: str, value: Any, prompts: int) -> tuple[str | tuple[int, int] | None, list[str | None] | None]:
    """A span that is the same for all prompts, or one of each."""
    if value is None or isinstance(value, str):
        return _text(name, "span", value), None
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(bound, int | np.integer) for bound in value):
        return _pair(name, value), None
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise InvalidTypeError(
            f"over={{{name!r}: {{'span': …}}}} is a {type(value).__name__}: give a text, (start, end), or a list of pairs"
        )
    listed = list(value)
    if len(listed) != prompts:
        raise InvalidArgumentError(
            f"over={{{name!r}: {{'span': …}}}} has {len(listed)} spans for {prompts} prompts: give one each, or None"
        )
    pairs = [None if pair is None else _pair(name, pair) for pair in listed]
    return None, [None if pair is None else f"{pair[0]}:{pair[1]}" for pair in pairs]


def _pair(name: str, pair: Any) -> tuple[int, int]:
    try:
        start, end = (operator.index(bound.item() if isinstance(bound, np.generic) else bound) for bound in pair)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"over={{{name!r}: …}} has the span {pair!r}: give (start, end) in whole characters") from error
    if not 0 <= start < end:
        raise InvalidArgumentError(f"over={{{name!r}: …}} has the span ({start}, {end}), which has no characters: give 0 <= start < end")
    return start, end


def _text(name: str, what: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidTypeError(f"over={{{name!r}: {{{what!r}: {value!r}}}}} is no text: give some characters")
    return value
