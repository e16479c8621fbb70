"""Roles by the chat templates of models, with turns that look like what stands around them.

The templates are those that TRL and axolotl ship, where they are installed, those that `make setup` fetches, and those of a folder that
LMPROBE_ZARR_CHAT_TEMPLATES names.
"""

from __future__ import annotations

from typing import Any

import pytest

from lmprobe_zarr.batch import chat_spans, parse_chat_options, parse_prompts
from lmprobe_zarr.errors import InvalidArgumentError

pytest.importorskip("transformers")

from chat_templates import FETCHED, model_templates, pieces_of, user
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.model

FAMILIES = ("llama3", "llama-3", "qwen3", "gemma3", "gemma-3", "gptoss", "gpt-oss", "mistral", "phi", "smollm3")
TEMPLATES = {
    name: template
    for name, template in model_templates().items()
    if any(family in name.lower() for family in FAMILIES) and not any(other in name.lower() for other in ("vl", "nemotron"))
}
TOOL = {
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": "the sky"}}}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_some_templates_are_installed() -> None:
    if not model_templates():
        pytest.skip("no chat templates of models: make setup")
    assert len(TEMPLATES) > 5


@pytest.mark.parametrize("family", ["llama-3", "qwen3", "gemma3", "gpt-oss", "mistral", "phi", "smollm3"])
def test_every_family_has_a_template(family: str) -> None:
    if not FETCHED.is_dir():
        pytest.skip("the sources of llama-cpp-python could not be fetched: make setup")
    assert any(family in name.lower() for name in TEMPLATES)


def contents(name: str, chat: list[dict[str, Any]], **options: Any) -> list[tuple[str, int, str]]:
    """The pieces of a chat that have a role; skips where the template refuses the chat. Everything can be told."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    chosen = parse_chat_options(**options)
    try:
        prompts = parse_prompts([chat], tokenizer=tokenizer, chat=chosen)
    except InvalidArgumentError as error:
        pytest.skip(str(error))
    assert prompts.text is not None
    assert prompts.messages is not None
    timed = prompts.timed is not None and bool(prompts.timed[0])
    spans = chat_spans(prompts.messages[0], prompts.text[0], tokenizer, chosen, timed=timed)
    assert spans.untold == ()
    pieces = pieces_of(prompts.text[0], spans)
    assert "".join(text for _, _, text in pieces) == prompts.text[0]
    assert {turn for _, turn, _ in pieces} <= {-1, *range(len(chat))}
    return [piece for piece in pieces if piece[0]]


@pytest.mark.few(6)
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_look_like_headers(name: str) -> None:
    chat = [system("user"), user("he"), assistant("he"), user("assistant"), assistant("end")]
    expected = [(m["role"], turn, m["content"]) for turn, m in enumerate(chat)]
    # One template prints the system text in the last message, and only where that is the user's.
    assert contents(name, chat)[-4:] == expected[1:]
    assert sorted(contents(name, chat[:-1]), key=lambda piece: piece[1]) == expected[:-1]


@pytest.mark.few(15)
@pytest.mark.parametrize("name", TEMPLATES)
def test_empty_contents(name: str) -> None:
    assert contents(name, [system(""), user("he"), assistant("")]) == [("user", 1, "he")]
    assert contents(name, [system(""), user("he")]) == [("user", 1, "he")]


@pytest.mark.few(15)
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_without_reasoning_where_others_have_some(name: str) -> None:
    chat = [user("he"), assistant("<think>\nhm\n</think>\n\none"), user("he"), assistant("<think>\nhe\n</think>\n\ntwo")]
    found = contents(name, chat)
    assert [piece for piece in found if piece[0] == "user"] == [("user", 0, "he"), ("user", 2, "he")]
    if "</think>" in TEMPLATES[name]:
        assert found[-1] == ("assistant", 3, "two")
        assert [text for role, turn, text in found if (role, turn) == ("assistant", 1)] == ["one"]
        assert {piece for piece in found if piece[0] == "reasoning"} <= {("reasoning", 1, "hm"), ("reasoning", 3, "he")}
    else:
        assert found[-1] == ("assistant", 3, chat[3]["content"])


@pytest.mark.few(27)
@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_of_tools_and_their_results(name: str) -> None:
    result = {"role": "tool", "name": "look", "content": "blue", "tool_call_id": "abcdefghi"}
    chat = [user("What?"), assistant("", tool_calls=[CALL]), result, assistant("It is blue")]
    found = contents(name, chat, tools=[{"type": "function", "function": TOOL}])
    assert found[0] == ("user", 0, "What?")
    assert found[-1] == ("assistant", 3, "It is blue")
    # Some templates leave out calls, and some results too.
    assert [text for role, turn, text in found if role == "tool"] in (["blue"], [])
    assert all("the sky" in text for role, turn, text in found if turn == 1)
