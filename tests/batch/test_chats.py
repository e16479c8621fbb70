"""Chats as texts: arguments of templates, parts, templates that print the time, and tokenizers with code of their own.

Right values are what transformers' own apply_chat_template gives.
"""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

import lmprobe_zarr as lz
from lmprobe_zarr.batch import ChatOptions, parse_chat_options, parse_prompts, prompt_sha256, unused_arguments
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError

pytestmark = pytest.mark.model

CHATS = [
    [{"role": "user", "content": "Who?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}],
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "the fox"}],
]
BODY = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
# As Llama 3.2, SmolLM3, gpt-oss and Granite ask for the date.
TIMED = {
    "unless it is given": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}\n" + BODY,
    "where there is a clock": "{% if strftime_now is defined %}{% set today = strftime_now('%d %B %Y') %}{% else %}{% set today = '' %}"
    "{% endif %}Today Date: {{ today }}\n" + BODY,
    "in a macro": "{% macro head() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}\n" + BODY,
    "by name": "{{ strftime_now(format='%A, %-d %B, %H:%M') }}\n" + BODY,
    "in a condition": "{% if strftime_now('%H')|int < 12 %}Good morning{% else %}Good evening{% endif %}\n" + BODY,
}


def chatty(template: str = CHAT_TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the date that templates print."""
    from transformers.utils import chat_template_utils

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls(2026, 11, day, 4 * day % 24, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


@pytest.mark.parametrize("template", TIMED.values(), ids=TIMED)
def test_a_chat_has_the_same_key_on_every_day(template: str, on_day: Any) -> None:
    tokenizer = chatty(template)
    on_day(1)
    first = parse_prompts(CHATS, tokenizer=tokenizer)
    assert first.text == tuple(
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=c[-1]["role"] == "user") for c in CHATS
    )
    on_day(5)
    second = parse_prompts(CHATS, tokenizer=tokenizer)
    assert second.sha256 == first.sha256
    assert len(set(first.sha256)) == 3
    assert second.text != first.text
    assert second.text is not None
    assert not set(second.sha256) & {prompt_sha256(text) for text in second.text}
    assert second.timed is not None
    assert second.timed.all()
    assert lz.prompt_hash(CHATS[1], tokenizer=tokenizer) == first.sha256[1][:16]


def test_the_key_of_a_timed_chat_knows_messages_template_and_arguments() -> None:
    template, other = TIMED["where there is a clock"] + "{{ thinking }}", TIMED["where there is a clock"] + "{{ thinking }}."
    options: list[dict[str, Any]] = [
        {},
        {"thinking": "a"},
        {"thinking": "b"},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ]
    keys = {lz.prompt_hash(CHATS[0], tokenizer=chatty(text), chat_template_kwargs=o) for text in (template, other) for o in options}
    assert len(keys) == 10
    # By its form in docs/format.md.
    digest = hashlib.sha256(template.encode()).hexdigest()
    content = (
        '{"messages":[{"role":"user","content":"Who?"}],"template":"' + digest + '","add_generation_prompt":true,'
        '"continue_final_message":false,"arguments":{"thinking":"a"}}'
    )
    expected = hashlib.sha256(b"\0chat\0" + content.encode()).hexdigest()[:16]
    assert lz.prompt_hash(CHATS[0], tokenizer=chatty(template), chat_template_kwargs={"thinking": "a"}) == expected


def test_a_chat_whose_text_does_not_depend_on_the_time_has_the_key_of_its_text(on_day: Any) -> None:
    on_day(3)
    given = parse_chat_options(chat_template_kwargs={"date_string": "26 Jul 2024"})
    only_without_system = (
        "{% if messages[0]['role'] != 'system' %}Today: {{ strftime_now('%d') }}\n{% endif %}{% set year = strftime_now('%Y') %}" + BODY
    )
    for tokenizer, chats, options in (
        (chatty(), CHATS, ChatOptions()),
        (chatty(TIMED["unless it is given"]), CHATS, given),
        (chatty(only_without_system), CHATS[1:2], ChatOptions()),
        (chatty(BODY + "{# strftime_now would tell the date #}"), CHATS, ChatOptions()),
    ):
        prompts = parse_prompts(chats, tokenizer=tokenizer, chat=options)
        assert prompts.timed is None
        assert prompts.text is not None
        assert prompts.sha256 == tuple(prompt_sha256(text) for text in prompts.text)
    assert parse_prompts(CHATS, tokenizer=chatty(only_without_system)).timed.tolist() == [True, False, True]  # type: ignore[union-attr]


def test_looking_for_the_time_leaves_the_clock_of_other_threads_alone() -> None:
    import transformers.utils.chat_template_utils

    utils: Any = transformers.utils.chat_template_utils
    before = utils.datetime
    text = parse_prompts(CHATS[:1], tokenizer=chatty(TIMED["in a macro"])).text
    assert utils.datetime is before
    assert text is not None
    assert str(datetime.datetime.now().year) in text[0]


OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": False},
    {"add_generation_prompt": True},
    {"continue_final_message": True},
    {"continue_final_message": "content"},
    {"enable_thinking": True},
    {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"b": 1, "a": 2}}}]},
    {"documents": [{"title": "a", "text": "b"}]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_arguments_reach_the_template_as_transformers_passes_them(options: dict[str, Any]) -> None:
    template = BODY + "{{ tools|tojson if tools }}{{ documents|tojson if documents }}{% if enable_thinking is defined %}<think>{% endif %}"
    tokenizer = chatty(template)
    for chat in CHATS:
        opens = (
            {}
            if set(options) & {"add_generation_prompt", "continue_final_message"}
            else {"add_generation_prompt": chat[-1]["role"] == "user"}
        )
        expected = tokenizer.apply_chat_template(chat, tokenize=False, **options, **opens)
        assert parse_prompts([chat], tokenizer=tokenizer, chat=parse_chat_options(chat_template_kwargs=options)).text == (expected,)
    named = {"add_generation_prompt", "continue_final_message", "tools"}
    split = parse_chat_options(
        **{name: options[name] for name in named & set(options)}, chat_template_kwargs={n: v for n, v in options.items() if n not in named}
    )
    assert split == parse_chat_options(chat_template_kwargs=options)


def look(city: str) -> str:
    """
    Look up the weather.

    Args:
        city: Where.
    """
    return city


def test_a_function_is_a_tool_by_its_schema() -> None:
    from transformers.utils.chat_template_utils import get_json_schema

    tokenizer = chatty(BODY + "{{ tools|tojson if tools }}")
    options = parse_chat_options(tools=[look])
    assert options.arguments["tools"] == [get_json_schema(look)]
    expected = tokenizer.apply_chat_template(CHATS[0], tokenize=False, tools=[look], add_generation_prompt=True)
    assert parse_prompts(CHATS[:1], tokenizer=tokenizer, chat=options).text == (expected,)


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"chat_template_kwargs": [("a", 1)]}, InvalidTypeError, "give a mapping"),
    ({"chat_template_kwargs": {"tokenize": True}}, InvalidArgumentError, "'tokenize'"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, InvalidArgumentError, "tokenizer.chat_template"),
    ({"chat_template_kwargs": {"a": object()}}, InvalidTypeError, "holds a object"),
    ({"chat_template_kwargs": {"a": {1: 2}}}, InvalidTypeError, "no text"),
    ({"chat_template_kwargs": {"tools": []}, "tools": []}, InvalidArgumentError, "given twice"),
    ({"tools": "look"}, InvalidTypeError, "a list of JSON schemas"),
    ({"tools": {"type": "function"}}, InvalidTypeError, "a list of JSON schemas"),
    ({"tools": [lambda x: x]}, InvalidArgumentError, "has no JSON schema"),
    ({"add_generation_prompt": "yes"}, InvalidTypeError, "no truth value"),
    ({"add_generation_prompt": True, "continue_final_message": True}, InvalidArgumentError, "exclude each other"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS)
def test_bad_options_are_refused_with_what_to_do(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        parse_chat_options(**options)
    assert words in str(caught.value)


def test_an_argument_that_no_template_uses_is_known() -> None:
    options = parse_chat_options(tools=[], chat_template_kwargs={"enable_thinkng": True})
    assert unused_arguments(chatty(BODY + "{{ tools }}"), options) == ["enable_thinkng"]
    assert unused_arguments(chatty(), options) == ["enable_thinkng", "tools"]


# --------------------------------------------------------------------------------------------------------------------- parts

NATIVE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
FOR_TEXTS = {
    "printed": BODY,
    "trimmed": BODY.replace("m['content']", "m['content']|trim"),
    "as JSON": BODY.replace("m['content']", "m['content']|tojson"),
    "added": BODY.replace("m['content']", "m['content'] + ''"),
    "left out": BODY.replace("m['content']", "m['content'] if m['content'] is string"),
}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Who is "}, {"type": "text", "text": "that?"}]}]
JOINED = [{"role": "user", "content": "Who is that?"}]


@pytest.mark.parametrize("template", FOR_TEXTS.values(), ids=FOR_TEXTS)
def test_parts_are_joined_for_a_template_that_knows_texts_only(template: str) -> None:
    tokenizer = chatty(template)
    prompts = parse_prompts([PARTS, JOINED], tokenizer=tokenizer)
    assert prompts.text == (tokenizer.apply_chat_template(JOINED, tokenize=False, add_generation_prompt=True),)
    assert parse_prompts([[{"role": "user", "content": ("Who is ", "that?")}]], tokenizer=tokenizer).sha256 == prompts.sha256


def test_a_template_that_knows_parts_gets_them() -> None:
    tokenizer = chatty(NATIVE)
    expected = tokenizer.apply_chat_template(PARTS, tokenize=False)
    assert expected == "<|user|>Who is  that? "
    assert parse_prompts([PARTS], tokenizer=tokenizer).text == (expected,)
    only_parts = chatty(
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p is mapping else raise_exception('no') }}{% endfor %}"
        "{% endfor %}"
    )
    assert parse_prompts([PARTS], tokenizer=only_parts).text == ("Who is that?",)


def test_chats_as_a_file_of_parquet_gives_them_are_chats() -> None:
    parts = np.array([{"type": "text", "text": "Who is ", "image": None}, {"type": "text", "text": "that?", "image": None}], object)
    column = pd.Series([np.array([{"role": "user", "content": parts}], object), np.array(JOINED, object)])
    prompts = parse_prompts(column, tokenizer=chatty())
    assert prompts.kind == "chat"
    assert prompts.text == ("<s>user: Who is that?</s><s>assistant: ",)


def test_of_several_templates_the_one_for_tools_is_used_with_tools() -> None:
    templates = {"default": BODY, "tool_use": TIMED["in a macro"] + "{{ tools|tojson }}"}
    tokenizer = chatty(templates)  # type: ignore[arg-type]
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert parse_prompts(CHATS, tokenizer=tokenizer).timed is None
    with_tools = parse_prompts(CHATS, tokenizer=tokenizer, chat=parse_chat_options(tools=tools))
    assert with_tools.timed is not None
    assert with_tools.timed.all()
    expected = tokenizer.apply_chat_template(CHATS[0], tokenize=False, tools=tools, add_generation_prompt=True)
    assert with_tools.text is not None
    assert with_tools.text[0] == expected


def test_a_text_that_looks_like_a_part_stays_as_it_is() -> None:
    text = "{'type': 'text', 'text': 'a'}"
    chat = [[{"role": "user", "content": [{"type": "text", "text": text}]}]]
    assert parse_prompts(chat, tokenizer=chatty()).text == (f"<s>user: {text}</s><s>assistant: ",)


BAD_CHATS: list[tuple[Any, type[Exception], str]] = [
    ([{"type": "image", "url": "a.png"}], InvalidArgumentError, "only the text of a chat is run"),
    ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "a"}}], InvalidArgumentError, "'image_url'"),
    ([{"type": "input_audio", "input_audio": {}}], InvalidArgumentError, "'input_audio'"),
    ([{"image": "a.png"}], InvalidArgumentError, "only the text"),
    ([{"type": "text"}], InvalidTypeError, "without a text"),
    ([3], InvalidTypeError, "a part that is a int"),
    (None, InvalidTypeError, "None"),
    (3, InvalidTypeError, "a content that is a int"),
    ({"text": "a"}, InvalidTypeError, "a content that is a dict"),
]


@pytest.mark.parametrize(("content", "error", "words"), BAD_CHATS)
@pytest.mark.parametrize("template", [BODY, NATIVE])
def test_what_is_no_text_is_refused(content: Any, error: type[Exception], words: str, template: str) -> None:
    with pytest.raises(error, match=r"prompts\[1\]") as caught:
        parse_prompts([JOINED, [{"role": "user", "content": content}]], tokenizer=chatty(template))
    assert words in str(caught.value)


def test_calls_of_tools_need_no_content() -> None:
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    template = "{% for m in messages %}{{ m['role'] }}{{ m['tool_calls']|tojson if m['tool_calls'] else m['content'] }}{% endfor %}"
    for message in ({"role": "assistant", "tool_calls": call}, {"role": "assistant", "content": None, "tool_calls": call}):
        chat = [*JOINED, message, {"role": "tool", "content": "rain"}]
        assert parse_prompts([chat], tokenizer=chatty(template)).text == (chatty(template).apply_chat_template(chat, tokenize=False),)


def test_half_a_surrogate_pair_in_a_chat_is_refused_with_its_number() -> None:
    chats = [*CHATS, [{"role": "user", "content": "half \ud83d"}]]
    with pytest.raises(InvalidArgumentError, match=rf"prompts\[{len(CHATS)}\] .*lone surrogate"):
        parse_prompts(chats, tokenizer=chatty())
