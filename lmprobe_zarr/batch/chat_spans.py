"""Which characters of a rendered chat belong to which message and role, told by the template and never by a search of the text.

A template is a program, and it may strip a content, leave it out, move it into another message, or refuse a part of a conversation. So it
is asked: it renders the same chat again with contents that occur nowhere else, and what surrounds these must surround the real contents.
What this does not tell stays unknown.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from lmprobe_zarr.batch.chats import ChatOptions, apply_template, frozen_template, template_of
from lmprobe_zarr.typing import Ints

__all__ = ["REASONING", "ChatSpans", "Span", "chat_spans", "ids_spans"]

REASONING: Final = "reasoning"
# Fields of a message that templates print as the reasoning of the model.
_REASONING_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
# A content with its reasoning, and the white space on both sides of each, which a template may strip.
_THINKING: Final = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


class Span(NamedTuple):
    """Characters (or tokens) of one message: of its content, or with `role` None of its turn, headers included."""

    start: int
    end: int
    turn: int
    role: str | None


class ChatSpans(NamedTuple):
    """Where the messages of one chat are in its text.

    Parameters
    ----------
    contents : tuple of Span
        The contents of messages, their reasoning and their calls of tools.
    turns : tuple of Span
        The whole turns, as far as they can be told.
    untold : tuple of int
        Messages with a content of which the template does not tell where it is.
    """

    contents: tuple[Span, ...]
    turns: tuple[Span, ...]
    untold: tuple[int, ...]


# -- characters --------------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A text that a message contributes: part of one of its fields."""

    turn: int
    role: str
    text: str


class _Field(NamedTuple):
    """A field of a message as pieces, given by their numbers, and what stands between them."""

    turn: int
    path: tuple[str | int, ...]
    segments: tuple[str | int, ...]


@dataclass(frozen=True)
class _Chat:
    """A chat whose contents can be replaced, and its template."""

    messages: Sequence[dict[str, Any]]
    pieces: tuple[_Piece, ...]
    fields: tuple[_Field, ...]
    apply: Callable[[list[dict[str, Any]], ChatOptions], Any]
    options: ChatOptions
    salt: str

    def sentinel(self, number: int, kind: str = "Q") -> str:
        """A text of letters and digits that is nowhere else, for one piece."""
        return f"{kind}{self.salt}x{number}x{self.salt[::-1]}{kind.lower()}"

    def replaced(self, chosen: Mapping[int, str], stop: int | None = None) -> list[dict[str, Any]]:
        """The messages up to `stop` with other texts for some pieces."""
        out = [dict(message) for message in self.messages[:stop]]
        for turn, path, segments in self.fields:
            if turn >= len(out) or not any(segment in chosen for segment in segments if isinstance(segment, int)):
                continue
            texts = [segment if isinstance(segment, str) else chosen.get(segment, self.pieces[segment].text) for segment in segments]
            if len(path) == 1:
                out[turn][str(path[0])] = "".join(texts)
            else:
                parts = list(out[turn]["content"])
                parts[int(path[1])] = {**parts[int(path[1])], "text": "".join(texts)}
                out[turn]["content"] = parts
        return out

    def render(self, messages: list[dict[str, Any]], options: ChatOptions | None = None) -> Any:
        """What the template makes of messages; None where it refuses them."""
        try:
            return self.apply(messages, self.options if options is None else options) if messages else None
        except Exception:  # noqa: BLE001 - a template is code by the model's author and can raise anything
            return None

    @property
    def closed(self) -> ChatOptions:
        """The options for a part of the chat, after which nothing is to follow."""
        return replace(self.options, add_generation_prompt=False, continue_final_message=False)


def _chat(
    messages: Sequence[dict[str, Any]],
    options: ChatOptions,
    template: str | None,
    apply: Callable[[list[dict[str, Any]], ChatOptions], Any],
    text: str,
) -> _Chat:
    pieces: list[_Piece] = []
    fields: list[_Field] = []

    def add(turn: int, path: tuple[str | int, ...], segments: Sequence[str | tuple[str, str]]) -> None:
        numbered: list[str | int] = []
        for segment in segments:
            if isinstance(segment, str):
                numbered.append(segment)
            elif not segment[1].strip():
                # White space alone is no content, and many templates ask whether there is one.
                numbered.append(segment[1])
            else:
                numbered.append(len(pieces))
                pieces.append(_Piece(turn, *segment))
        if any(isinstance(segment, int) for segment in numbered):
            fields.append(_Field(turn, path, tuple(numbered)))

    for turn, message in enumerate(messages):
        role, content = str(message["role"]), message.get("content")
        for name in _REASONING_FIELDS:
            if isinstance(message.get(name), str):
                add(turn, (name,), [(REASONING, message[name])])
        if isinstance(content, str):
            split = _THINKING.fullmatch(content) if role == "assistant" and template is not None and "</think>" in template else None
            if split is None or content.count("</think>") > 1:
                add(turn, ("content",), [(role, content)])
            else:
                before, thought, after, answer = split.groups()
                add(turn, ("content",), [before, (REASONING, thought), after, (role, answer)])
        elif isinstance(content, list):
            for number, part in enumerate(content):
                if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                    add(turn, ("content", number), [(role, part["text"])])
        elif content is not None:
            # Results of tools may be mappings: where a template prints them, it prints a text at the same place.
            pieces.append(_Piece(turn, role, ""))
            fields.append(_Field(turn, ("content",), (len(pieces) - 1,)))
    salt = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return _Chat(messages, tuple(pieces), tuple(fields), apply, options, salt)


def chat_spans(messages: Sequence[dict[str, Any]], text: str, tokenizer: Any, options: ChatOptions, *, timed: bool = False) -> ChatSpans:
    """Where the messages of a chat are in the text that a tokenizer's template has made of it.

    Parameters
    ----------
    messages : list of dict
        As the template has got them, see `RenderedChat`.
    text : str
        The rendered text.
    tokenizer : transformers tokenizer
    options : ChatOptions
        How the chat was rendered.
    timed : bool
        Whether the text depends on the time, so that a rendering of now may differ from it.
    """
    template = template_of(tokenizer, options)
    fixed = {"chat_template": frozen_template(template, datetime.datetime.now())} if timed and template is not None else {}

    def apply(some: list[dict[str, Any]], chosen: ChatOptions) -> Any:
        return apply_template(some, tokenizer, chosen, **fixed)

    chat = _chat(messages, options, template, apply, text)
    whole = chat.render(list(messages)) if timed else text
    if not isinstance(whole, str):
        return ChatSpans((), (), tuple(range(len(messages))))
    found, absent = _contents(chat, whole)
    calls = {turn: _calls(chat, whole, turn) for turn, message in enumerate(messages) if message.get("tool_calls")}
    contents = [Span(*found[number], piece.turn, piece.role) for number, piece in enumerate(chat.pieces) if number in found]
    contents += _apart([Span(*span, turn, str(messages[turn]["role"])) for turn, span in calls.items() if span is not None], contents)
    contents.sort()
    untold = {piece.turn for number, piece in enumerate(chat.pieces) if number not in found and number not in absent}
    untold |= {turn for turn, span in calls.items() if span is None}
    turns = _turns(chat, whole, contents, {number: span for number, span in found.items() if span[1] > span[0]}, tokenizer)
    spans = ChatSpans(tuple(span for span in contents if span.end > span.start), tuple(turns), tuple(sorted(untold)))
    return spans if whole == text else _moved(spans, whole, text)


def _contents(chat: _Chat, whole: str) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """The characters of each piece that can be told, and the pieces that the text has not got."""
    numbers = range(len(chat.pieces))
    rendered = chat.render(chat.replaced({number: chat.sentinel(number) for number in numbers})) if len(numbers) > 1 else None
    if isinstance(rendered, str):
        counts = {number: rendered.count(chat.sentinel(number)) for number in numbers}
        if max(counts.values(), default=0) <= 1:
            there = sorted((number for number, count in counts.items() if count), key=lambda number: rendered.index(chat.sentinel(number)))
            found = _matched(chat, whole, rendered, there)
            if found is not None:
                return found, set(numbers).difference(there)
    # The template looks at a content, or changes one: each is replaced alone, and everything else must stay what it is.
    found, absent = {}, set()
    for number in numbers:
        sentinel = chat.sentinel(number)
        alone = chat.render(chat.replaced({number: sentinel}))
        if alone == whole:
            absent.add(number)
        elif (span := _in_place_of(alone, whole, sentinel)) is not None:
            found[number] = span
    return _disjoint(found), absent


def _matched(chat: _Chat, whole: str, rendered: str, there: Sequence[int]) -> dict[int, tuple[int, int]] | None:
    """The places of all pieces where the text is what was rendered with sentinels, each replaced by its text; None where it is not."""
    literals: list[str] = []
    rest = rendered
    for number in there:
        literal, _, rest = rest.partition(chat.sentinel(number))
        literals.append(literal)
    literals.append(rest)
    if not whole.startswith(literals[0]):
        return None
    # A template may strip white space, and then there may be two ways at a place: the last one that is left open is tried again.
    open_: list[tuple[int, int, tuple[Any, ...]]] = [(0, len(literals[0]), ())]
    while open_:
        i, place, taken = open_.pop()
        if i == len(there):
            if place == len(whole):
                spans: dict[int, tuple[int, int]] = {}
                while taken:
                    number, span, taken = taken
                    spans[number] = span
                return spans
            continue
        text = chat.pieces[there[i]].text
        variants = (text.rstrip("\n"), text.lstrip("\n"), text.strip("\n"), text.rstrip(), text.lstrip(), text.strip(), text)
        for variant in dict.fromkeys(variants):
            end = place + len(variant)
            if whole.startswith(variant, place) and whole.startswith(literals[i + 1], end):
                open_.append((i + 1, end + len(literals[i + 1]), (there[i], (place, end), taken)))
    return None


def _calls(chat: _Chat, whole: str, turn: int) -> tuple[int, int] | None:
    """The printed calls of tools of a message: what stands where its content would stand alone."""
    sentinel = chat.sentinel(turn, "C")
    found = _in_place_of(chat.render(_without_calls(chat.messages, turn, sentinel)), whole, sentinel)
    if found is not None:
        return found
    # Templates may refuse the results of tools without their calls: then the calls are told by other names and arguments.
    spans = []
    for number, call in enumerate(chat.messages[turn]["tool_calls"]):
        for change in ({"name": sentinel}, {"arguments": {sentinel: sentinel[::-1]}}):
            messages = [dict(message) for message in chat.messages]
            messages[turn]["tool_calls"] = calls = list(messages[turn]["tool_calls"])
            if not isinstance(call, Mapping):
                return None
            calls[number] = (
                {**call, "function": {**call["function"], **change}} if isinstance(call.get("function"), Mapping) else {**call, **change}
            )
            spans.append(_in_place_of(chat.render(messages), whole, sentinel, sentinel[::-1] if "arguments" in change else sentinel))
    told = [span for span in spans if span is not None]
    return (min(start for start, _ in told), max(end for _, end in told)) if told else None


def _without_calls(messages: Sequence[dict[str, Any]], turn: int, content: str) -> list[dict[str, Any]]:
    """The messages, one of them with another content and without calls of tools."""
    out = [dict(message) for message in messages]
    out[turn] = {**{key: value for key, value in out[turn].items() if key != "tool_calls"}, "content": content}
    return out


def _in_place_of(rendered: Any, whole: str, first: str, last: str | None = None) -> tuple[int, int] | None:
    """What the whole has where a rendering has a text of its own, or two with what is between; None where they differ elsewhere."""
    last = last or first
    if not isinstance(rendered, str) or rendered.count(first) != 1 or rendered.count(last) != 1:
        return None
    before, after = rendered.partition(first)[0], rendered.partition(last)[2]
    fits = len(before) + len(after) <= len(whole) and whole.startswith(before) and whole.endswith(after)
    return (len(before), len(whole) - len(after)) if fits else None


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _disjoint(found: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Those spans that share no character with another: what shares one was told wrong."""
    ordered = sorted(found.items(), key=lambda item: item[1])
    wrong = {number for (one, (_, end)), (other, (start, _)) in itertools.pairwise(ordered) if start < end for number in (one, other)}
    return {number: span for number, span in found.items() if number not in wrong}


def _apart(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Spans without the characters that others have; a content may stand among the calls of its message."""
    out = []
    for span in spans:
        start = span.start
        for other in sorted(others):
            if other.start < span.end and other.end > start:
                out.append(span._replace(start=start, end=max(start, other.start)))
                start = max(start, other.end)
        out.append(span._replace(start=min(start, span.end)))
    return [span for span in out if span.end > span.start]


# -- turns -------------------------------------------------------------------------------------------------------------------


def _turns(chat: _Chat, whole: str, contents: Sequence[Span], found: Mapping[int, tuple[int, int]], tokenizer: Any) -> list[Span]:
    """The characters of each message with its header and its end."""
    count = len(chat.messages)
    first = {span.turn: span.start for span in reversed(contents)}
    last: dict[int, int] = {}
    for span in contents:
        last[span.turn] = max(span.end, last.get(span.turn, 0))
    ends: dict[int, int] = {}
    for turn in range(count):
        end = _turn_end(chat, whole, turn, last.get(turn), found, tokenizer)
        following = [start for other, start in first.items() if other > turn and start >= last.get(turn, 0)]
        if end is not None and last.get(turn, 0) <= end <= min(following, default=len(whole)):
            ends[turn] = end
    starts = {turn: ends[turn - 1] for turn in range(1, count) if turn - 1 in ends and ends[turn - 1] <= first.get(turn, len(whole))}
    begin = _first_start(chat, whole, first.get(0), ends.get(0), tokenizer)
    if begin is not None:
        starts[0] = begin
    # The header of a message is that of others with its role, where the template did not tell where the message before it ends.
    headers = {(str(chat.messages[turn]["role"]), whole[start : first[turn]]) for turn, start in starts.items() if turn in first}
    for turn in set(first).difference(starts):
        role, content = str(chat.messages[turn]["role"]), first[turn]
        known = [len(header) for other, header in headers if other == role and header and whole.endswith(header, 0, content)]
        if known and content - max(known) >= last.get(turn - 1, 0):
            starts[turn] = content - max(known)
            ends.setdefault(turn - 1, starts[turn])
    out = []
    for turn in range(count):
        start, stop = starts.get(turn, first.get(turn)), ends.get(turn, last.get(turn))
        if start is not None and stop is not None and start < stop:
            out.append(Span(start, stop, turn, None))
    return out


def _turn_end(
    chat: _Chat, whole: str, turn: int, content_end: int | None, found: Mapping[int, tuple[int, int]], tokenizer: Any
) -> int | None:
    """Where the rendering up to a message ends in that of the whole chat."""
    if turn == len(chat.messages) - 1 and chat.options.continue_final_message:
        return len(whole)
    number = next((n for n, (_, end) in found.items() if end == content_end and chat.pieces[n].turn == turn), None)
    if content_end is None:
        prefix = chat.render([dict(message) for message in chat.messages[: turn + 1]], chat.closed)
        return len(prefix) if isinstance(prefix, str) and whole.startswith(prefix) else None
    # What stands before may be printed otherwise in a part of the chat, such as earlier reasoning: what follows the content is enough.
    sentinel = chat.sentinel(turn if number is None else number, "E")
    part = chat.messages[: turn + 1]
    prefix = chat.render(
        _without_calls(part, turn, sentinel) if number is None else chat.replaced({number: sentinel}, turn + 1), chat.closed
    )
    if not isinstance(prefix, str) or prefix.count(sentinel) != 1:
        return None
    tail = prefix.partition(sentinel)[2]
    if whole.startswith(tail, content_end):
        return content_end + len(tail)
    # Templates may end what they render with the end of a text, which is not in its middle.
    end_of_text = getattr(tokenizer, "eos_token", None)
    shorter = tail.removesuffix(end_of_text) if isinstance(end_of_text, str) else ""
    return content_end + len(shorter) if shorter and whole.startswith(shorter, content_end) else None


def _first_start(chat: _Chat, whole: str, content: int | None, end: int | None, tokenizer: Any) -> int | None:
    """Where the first message begins, after what belongs to none: the beginning of the text, and a system text of the template's own."""
    messages = [dict(message) for message in chat.messages]
    shorter = chat.render(messages[1:]) if end is not None else None
    if isinstance(shorter, str) and end is not None:
        # What goes away with the message is its turn.
        start = end - (len(whole) - len(shorter))
        if 0 <= start <= (end if content is None else content) and whole[:start] + whole[end:] == shorter:
            return start
    if content is None:
        return None
    first = str(messages[0]["role"])
    if first in ("system", "developer"):
        bos = getattr(tokenizer, "bos_token", None)
        return len(bos) if isinstance(bos, str) and bos and whole.startswith(bos) else 0
    # The header that the message has where it comes again, after an answer.
    one, two = chat.sentinel(0, "A"), chat.sentinel(1, "B")
    answer, again = {"role": "assistant", "content": one}, {"role": first, "content": two}
    short = chat.render([messages[0], answer], chat.closed)
    long = chat.render([messages[0], answer, again], chat.closed)
    if isinstance(short, str) and isinstance(long, str) and one in short and one in long and two in long:
        tail = short.partition(one)[2]
        between = long.partition(one)[2].partition(two)[0]
        header = between.removeprefix(tail)
        if between.startswith(tail) and header and whole[:content].endswith(header):
            return content - len(header)
    return None


def _moved(spans: ChatSpans, whole: str, text: str) -> ChatSpans:
    """Spans of one text in another that differs from it at one place, such as a date."""
    before = _common(whole, text)
    after = _common(whole[::-1], text[::-1])
    shift = len(text) - len(whole)

    def move(span: Span) -> Span | None:
        if span.end <= before:
            return span
        if span.start >= len(whole) - after:
            return span._replace(start=span.start + shift, end=span.end + shift)
        # The date stands in the turn, and not at its edge.
        if span.role is None and span.start <= before and span.end >= len(whole) - after:
            return span._replace(end=span.end + shift)
        return None

    contents = [move(span) for span in spans.contents]
    lost = {span.turn for span, moved in zip(spans.contents, contents, strict=True) if moved is None}
    turns = [move(span) for span in spans.turns]
    return ChatSpans(
        tuple(span for span in contents if span is not None),
        tuple(span for span in turns if span is not None),
        tuple(sorted(lost.union(spans.untold))),
    )


# -- among tokens ---------------------------------------------------------------------------------------------------------


def ids_spans(
    messages: Sequence[dict[str, Any]],
    ids: Ints,
    options: ChatOptions,
    template: str | None,
    ids_of: Callable[[list[dict[str, Any]], ChatOptions], Any],
) -> ChatSpans:
    """Where the contents of a chat are among its tokens, for tokenizers that do not tell the characters of a token.

    Parameters
    ----------
    messages : list of dict
    ids : ndarray of int64
        The tokens of the whole chat.
    options : ChatOptions
    template : str or None
    ids_of : callable
        The tokens of other messages, from the messages and their options.

    Returns
    -------
    ChatSpans
        Of tokens, without turns.
    """
    chat = _chat(messages, options, template, ids_of, repr(ids.tolist()))
    found: dict[int, tuple[int, int]] = {}
    absent: set[int] = set()
    for number in range(len(chat.pieces)):
        both = [chat.render(chat.replaced({number: chat.sentinel(number, kind)})) for kind in ("Q", "Z")]
        if any(made is None for made in both):
            continue
        one, two = (np.asarray(made, np.int64).reshape(-1) for made in both)
        if np.array_equal(one, two):
            if np.array_equal(one, ids):
                absent.add(number)
            continue
        before = _common_ids(one, two)
        after = min(_common_ids(one[::-1], two[::-1]), len(one) - before, len(two) - before, len(ids) - before)
        end = len(ids) - after
        if before <= end and np.array_equal(ids[:before], one[:before]) and np.array_equal(ids[end:], one[len(one) - after :]):
            found[number] = before, end
    found = _disjoint(found)
    contents = [Span(*span, chat.pieces[number].turn, chat.pieces[number].role) for number, span in found.items()]
    untold = {piece.turn for number, piece in enumerate(chat.pieces) if number not in found and number not in absent}
    untold |= {turn for turn, message in enumerate(messages) if message.get("tool_calls")}
    return ChatSpans(tuple(sorted(span for span in contents if span.end > span.start)), (), tuple(sorted(untold)))


def _common_ids(a: Ints, b: Ints) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
