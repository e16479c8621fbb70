"""Chats as texts: the arguments of a chat template, the rendering, and the digest of a chat.

A chat's digest is that of its rendered text. A template that prints the time renders another text every day, so a chat whose text depends
on the time is known by its messages, its template and the arguments instead.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.tokenizer_calls import decode_ids
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.typing import Ints

__all__ = [
    "NO_CHAT_OPTIONS",
    "ChatOptions",
    "RenderedChat",
    "apply_template",
    "check_renders_chats",
    "frozen_template",
    "parse_chat_options",
    "render_chat",
    "template_of",
    "unused_arguments",
]

# Arguments of apply_chat_template that do not belong to the template, or that would change what it returns.
_NOT_OF_TEMPLATE: Final = (
    "conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
)  # fmt: skip
# What a template calls to know the time; in transformers there is no other way.
_CLOCK: Final = "strftime_now"
# Two moments that differ in every directive.
_MOMENTS: Final = (datetime.datetime(2031, 3, 4, 5, 6, 7), datetime.datetime(2048, 11, 28, 17, 58, 49))
_DIRECTIVES: Final = "aAbBcdDeFgGHIjmMpSTuUVwWxXyY"
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_MEDIA: Final = ("image", "audio", "video", "file", "document")
# How Python's repr and JSON begin a part of text.
_PRINTED_PART: Final = re.compile(r"""['"]type['"]\s*:\s*['"](?:input_|output_)?text['"]""")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How the chats of a call are rendered; made by `parse_chat_options`.

    Parameters
    ----------
    add_generation_prompt : bool, optional
        Whether a chat ends with the beginning of an answer. None: yes, unless its last message is the assistant's or is continued.
    continue_final_message : bool or str
        Whether the last message stays open; a text names the field that does.
    arguments : mapping of str to JSON values
        What else the template gets, such as ``tools`` and ``enable_thinking``, sorted by name.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | str = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.add_generation_prompt is not None or bool(self.continue_final_message) or bool(self.arguments)

    def opens(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the beginning of an answer is added to a chat."""
        if self.add_generation_prompt is not None:
            return self.add_generation_prompt
        return not self.continue_final_message and messages[-1]["role"] != "assistant"


NO_CHAT_OPTIONS: Final = ChatOptions()


def parse_chat_options(
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatOptions:
    """The options of chats, checked.

    Parameters
    ----------
    add_generation_prompt : bool, optional
    continue_final_message : bool or str, optional
    tools : list of dict or of function, optional
        JSON schemas. Functions with type hints and a docstring become schemas, for which transformers is needed.
    chat_template_kwargs : mapping, optional
        Further arguments of the template; may hold those above too.

    Raises
    ------
    InvalidTypeError
        Another type than these, or a value that JSON cannot hold.
    InvalidArgumentError
        An argument that is given twice or does not belong to a template, or both a continued message and a generation prompt.
    """
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise InvalidTypeError(
            f"chat_template_kwargs is a {type(chat_template_kwargs).__name__}: give a mapping, {{'enable_thinking': False}}"
        )
    arguments = dict(chat_template_kwargs or {})
    own = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message, "tools": tools}
    for name, value in own.items():
        if name in arguments and value is not None:
            raise InvalidArgumentError(f"{name} is given twice, as an argument and in chat_template_kwargs: give it once")
        own[name] = arguments.pop(name, value)
    foreign = sorted(name for name in arguments if not isinstance(name, str) or name in _NOT_OF_TEMPLATE)
    if foreign:
        raise InvalidArgumentError(
            f"chat_template_kwargs names {foreign[0]!r}, which is no argument of a template; set tokenizer.chat_template for another one"
        )
    opens, continued = own["add_generation_prompt"], own["continue_final_message"]
    if opens is not None and not isinstance(opens, bool | np.bool_):
        raise InvalidTypeError(f"add_generation_prompt={opens!r} is no truth value: give True, False or None")
    if continued is not None and not isinstance(continued, bool | np.bool_ | str):
        raise InvalidTypeError(f"continue_final_message={continued!r} is no truth value: give True, False or the name of a field")
    if opens and continued:
        raise InvalidArgumentError("add_generation_prompt and continue_final_message exclude each other: give one of them")
    if own["tools"] is not None:
        arguments["tools"] = [_schema(tool) for tool in _listed_tools(own["tools"])]
    return ChatOptions(
        add_generation_prompt=None if opens is None else bool(opens),
        continue_final_message=continued if isinstance(continued, str) else bool(continued),
        arguments={name: _as_json(arguments[name], f"chat_template_kwargs[{name!r}]") for name in sorted(arguments)},
    )


def _listed_tools(tools: Any) -> list[Any]:
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidTypeError(f"tools is a {type(tools).__name__}: give a list of JSON schemas or functions")
    return list(tools)


def _schema(tool: Any) -> Any:
    """The JSON schema of a tool."""
    if not callable(tool):
        return tool
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:
        name = getattr(tool, "__name__", type(tool).__name__)
        reason = str(error).strip().split("\n")[0][:200]
        raise InvalidArgumentError(f"the tool {name!r} has no JSON schema ({reason}): give the schema itself") from error


def _as_json(value: Any, what: str) -> Any:
    """The value with lists, dicts and Python's own numbers; what JSON cannot hold is an error."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidTypeError(f"{what} has a key that is no text: give what JSON can hold")
        return {str(key): _as_json(item, what) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, what) for item in value]
    if isinstance(value, np.generic):
        return _as_json(value.item(), what)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InvalidTypeError(f"{what} holds a {type(value).__name__}: give texts, numbers, truth values, lists and mappings")


# ---------------------------------------------------------------------------------------------------------------- rendering


class RenderedChat(NamedTuple):
    """One chat as a text.

    Parameters
    ----------
    text : str
    sha256 : str
    token_ids : ndarray of int64, optional
        Where the tokenizer alone can make them, not from the text.
    timed : bool
        Whether the text depends on the time. The digest then does not depend on the text.
    messages : list of dict
        As the template has got them: contents that are lists of parts may be joined.
    """

    text: str
    sha256: str
    token_ids: Ints | None
    timed: bool
    messages: list[dict[str, Any]]


def check_renders_chats(tokenizer: Any) -> None:
    """Raise unless a tokenizer can render chats.

    Raises
    ------
    InvalidArgumentError
        There is no tokenizer, or it has neither a template nor a way of its own.
    """
    if tokenizer is None:
        raise InvalidArgumentError("chat messages are hashed as their rendered text: pass tokenizer= whose chat template renders them")
    if not getattr(tokenizer, "chat_template", None) and not _renders_by_itself(tokenizer):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InvalidArgumentError(f"the tokenizer {name!r} has no chat template: set tokenizer.chat_template, or give texts")


def _renders_by_itself(tokenizer: Any) -> bool:
    """Whether a tokenizer without a template renders chats in code of its own, as that of mistral-common does."""
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        return False
    owner = next((kind for kind in type(tokenizer).__mro__ if "apply_chat_template" in vars(kind)), None)
    return owner is not None and owner.__module__ != "transformers.tokenization_utils_base"


def template_of(tokenizer: Any, options: ChatOptions) -> str | None:
    """The template that a tokenizer uses; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template or isinstance(template, str):
        return template or None
    try:
        chosen = tokenizer.get_chat_template(tools=options.arguments.get("tools"))
    except Exception:  # noqa: BLE001 - the rendering will raise the same, with the number of the chat
        return None
    return chosen if isinstance(chosen, str) else None


def unused_arguments(tokenizer: Any, options: ChatOptions) -> list[str]:
    """Names of arguments that a tokenizer's template never mentions, so that they change nothing."""
    template = template_of(tokenizer, options)
    return [] if template is None else [name for name in options.arguments if name not in template]


def render_chat(messages: Any, number: int, tokenizer: Any, options: ChatOptions = NO_CHAT_OPTIONS) -> RenderedChat:
    """One chat as a text.

    Parameters
    ----------
    messages : list of mapping
    number : int
        Its place in the caller's list, for messages.
    tokenizer : transformers tokenizer
    options : ChatOptions

    Raises
    ------
    InvalidTypeError
        Messages without a role and content.
    InvalidArgumentError
        A part that is no text, or a chat that the template refuses.
    """
    given = _checked(messages, number)
    template = template_of(tokenizer, options)
    if template is None and not getattr(tokenizer, "chat_template", None):
        return _render_ids(given, number, tokenizer, options)
    chosen, text = _render_parts(given, number, lambda some: apply_template(some, tokenizer, options))
    timed = template is not None and _CLOCK in template and _depends_on_time(chosen, tokenizer, options, template)
    return RenderedChat(text, _sha256_of(given, template, options) if timed else prompt_sha256(text), None, timed, chosen)


def apply_template(messages: list[dict[str, Any]], tokenizer: Any, options: ChatOptions, **more: Any) -> Any:
    """What the tokenizer makes of the messages. Only arguments that are needed are passed: some tokenizers refuse others."""
    arguments = {**options.arguments, "tokenize": False, **more}
    if options.opens(messages):
        arguments["add_generation_prompt"] = True
    if options.continue_final_message:
        arguments["continue_final_message"] = options.continue_final_message
    return tokenizer.apply_chat_template(messages, **arguments)


def _render_parts(messages: list[dict[str, Any]], number: int, apply: Callable[[list[dict[str, Any]]], Any]) -> tuple[list[Any], str]:
    """The messages as the template gets them, and their text.

    A template either knows contents that are lists of parts, or gets the parts of each content joined to one text.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages, _text_of(lambda: apply(messages), number)
    joined = [_with_joined_parts(message) for message in messages]
    texts = [part["text"] for message in messages for part in _parts_of(message) if part.get("type") in _TEXT_PARTS]
    whole = all(part.get("type") in _TEXT_PARTS for message in messages for part in _parts_of(message))
    try:
        plain = _text_of(lambda: apply(joined), number) if whole else ""
    except InvalidArgumentError:  # this template knows nothing but parts
        plain = ""
    try:
        native = _text_of(lambda: apply(messages), number)
    except InvalidArgumentError:
        if not plain:
            raise
        return joined, plain
    printed = len(_PRINTED_PART.findall(native)) > len(_PRINTED_PART.findall(plain))
    if not printed and all(text.strip() in native for text in texts):
        return messages, native
    if not plain:
        raise InvalidArgumentError(
            f"prompts[{number}] has contents that are lists of parts, which the chat template does not know: give contents that are texts"
        )
    return joined, plain


def _text_of(apply: Callable[[], Any], number: int) -> str:
    try:
        text = apply()
    except Exception as error:
        # A template is code by the model's author and can raise anything.
        reason = str(error).strip().split("\n")[0][:200]
        raise InvalidArgumentError(f"prompts[{number}] does not go through the tokenizer's chat template: {reason}") from error
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"prompts[{number}] is empty once the chat template is applied: give messages with content")
    return text


def _render_ids(messages: list[dict[str, Any]], number: int, tokenizer: Any, options: ChatOptions) -> RenderedChat:
    """A chat that the tokenizer turns into token ids in code of its own. Its text, the decoded ids, would not give these ids again."""
    found: Any = None

    def apply() -> str:
        nonlocal found
        found = apply_template(messages, tokenizer, options, tokenize=True)
        if isinstance(found, str):
            return found
        ids = found["input_ids"] if isinstance(found, Mapping) else found
        found = np.array(ids, np.int64).reshape(-1)
        return decode_ids(tokenizer, found)

    text = _text_of(apply, number)
    ids = None if isinstance(found, str) else found
    # Control tokens written out in a message look the same in the text, but are other tokens.
    control = [token for token in getattr(tokenizer, "all_special_tokens", ()) if isinstance(token, str) and token]
    written = any(token in content for content in _contents_of(messages) for token in control)
    return RenderedChat(text, _sha256_of(messages, None, options) if written else prompt_sha256(text), ids, timed=False, messages=messages)


# ------------------------------------------------------------------------------------------------------------------ messages


def _checked(messages: Any, number: int) -> list[dict[str, Any]]:
    """The messages of a chat as dicts, contents that are lists of parts included."""
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not ("content" in message or "tool_calls" in message):
            raise InvalidTypeError(f"prompts[{number}] is no chat: each message is a dict with 'role' and 'content'")
        content = message.get("content")
        plain = dict(message)
        if content is None and not message.get("tool_calls"):
            raise InvalidTypeError(f"prompts[{number}] has a message whose content is None: give a text")
        if isinstance(content, list | tuple | np.ndarray):
            plain["content"] = [_checked_part(part, number) for part in content]
        elif content is not None and not isinstance(content, str) and message["role"] in ("user", "system", "assistant", "developer"):
            raise InvalidTypeError(f"prompts[{number}] has a content that is a {type(content).__name__}: give a text, or a list of parts")
        checked.append(plain)
    return checked


def _checked_part(part: Any, number: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InvalidTypeError(f"prompts[{number}] has a part that is a {type(part).__name__}: a part is {{'type': 'text', 'text': …}}")
    part = {key: value for key, value in part.items() if value is not None}  # columns of Arrow have every key in every part
    kind = str(part.get("type", "text" if "text" in part else None))
    if any(word in kind for word in _MEDIA) or any(word in str(key) for key in part for word in _MEDIA):
        raise InvalidArgumentError(f"prompts[{number}] has a part of type {kind!r}: only the text of a chat is run, so leave it out")
    if kind in _TEXT_PARTS and not isinstance(part.get("text"), str):
        raise InvalidTypeError(f"prompts[{number}] has a part of type {kind!r} without a text: a part is {{'type': 'text', 'text': …}}")
    return {**part, "type": kind}


def _parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _with_joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts of text joined, nothing between them."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": "".join(part.get("text", "") for part in _parts_of(message))}


def _contents_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [str(_with_joined_parts(message).get("content") or "") for message in messages]


# --------------------------------------------------------------------------------------------------------- digests and the time


def _depends_on_time(messages: list[Any], tokenizer: Any, options: ChatOptions, template: str) -> bool:
    """Whether a chat has another text at another time: it is rendered at two moments by a clock that is put into its template."""
    try:
        texts = [apply_template(messages, tokenizer, options, chat_template=frozen_template(template, moment)) for moment in _MOMENTS]
    except Exception:  # noqa: BLE001 - a template that calls the clock in a way of its own
        return True
    return bool(texts[0] != texts[1])


def frozen_template(template: str, moment: datetime.datetime) -> str:
    """The template with a clock that always shows one moment."""
    # Without its leading zero, as glibc writes a directive with a dash; other platforms raise for it.
    values = {f"%-{letter}": moment.strftime(f"%{letter}").lstrip("0") for letter in "dmHIMSjy"}
    values |= {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    shown = "".join(f"|replace({directive!r}, {value!r})" for directive, value in values.items())
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{ format{shown} }}}}{{%- endmacro -%}}{template}"


def _sha256_of(messages: list[dict[str, Any]], template: str | None, options: ChatOptions) -> str:
    r"""The sha256 of ``b"\0chat\0"`` and compact JSON of the messages, the template's sha256 and the arguments; see docs/format.md."""
    content = {
        "messages": _as_json(messages, "a message"),
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "add_generation_prompt": options.opens(messages),
        "continue_final_message": options.continue_final_message,
        "arguments": dict(options.arguments),
    }
    return hashlib.sha256(b"\0chat\0" + json.dumps(content, separators=(",", ":")).encode()).hexdigest()
