"""Whose characters are whose in chats, by templates that do what those of models do: each behaviour in a template of its own.

`test_roles_of_models.py` has the templates of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmprobe_zarr.batch import (
    NO_ROLE,
    ROLES,
    chat_spans,
    decode_role_names,
    encode_role_names,
    parse_chat_options,
    parse_prompts,
    role_code,
    role_names,
    roles_of_tokens,
)
from lmprobe_zarr.batch.chat_spans import ChatSpans, Span, ids_spans
from lmprobe_zarr.batch.roles import kept_tokens

pytest.importorskip("transformers")

from chat_templates import pieces_of, user
from tiny_models import tiny_tokenizer

pytestmark = pytest.mark.model

TAGGED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The system text goes into the message of the user, contents are stripped, and the assistant is named otherwise.
MOVED = (
    "{{ bos_token }}{% set first = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# Reasoning of all but the last answer is left out, and an empty one is put in.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A part of the conversation is refused, and so is one that begins otherwise.
STRICT = (
    "{% if messages[-1].role != 'user' or messages | length != 3 %}{{ raise_exception('three messages, the last the user') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.content else '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
)
# A header with a date stands in every chat, what the system text asks of the template is taken out of it, and answers are marked.
DIRECTED = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|system|>\n# About\nToday: {{ strftime_now('%d %B %Y') }}\nMode: {{ '/off' if '/off' in first else '/on' }}\n\n# Asked\n"
    "{{ first.replace('/off', '').replace('/on', '').rstrip() or 'You help.' }}<|end|>\n"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content.lstrip('\n') ~ '<|end|>' }}{% endgeneration %}{% else %}{{ m.content ~ '<|end|>' }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ESCAPED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | tojson if m.role == 'tool' else m.content }}<|end|>{% endfor %}"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def shown(chat: Any, template: str, **options: Any) -> tuple[list[tuple[str, int, str]], tuple[int, ...]]:
    """The whole text in pieces, each with its role ("" for none) and turn, and the messages that could not be told."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chosen = parse_chat_options(**options)
    prompts = parse_prompts([chat], tokenizer=tokenizer, chat=chosen)
    assert prompts.text is not None
    assert prompts.messages is not None
    timed = prompts.timed is not None and bool(prompts.timed[0])
    spans = chat_spans(prompts.messages[0], prompts.text[0], tokenizer, chosen, timed=timed)
    return pieces_of(prompts.text[0], spans), spans.untold


def test_contents_that_look_like_headers_are_told_from_them() -> None:
    # "assistant" is what the header says before it, "|" and "end" are in the end of each turn, and all users say the same.
    chat = [said("system", "|"), said("user", "assistant"), said("assistant", "end"), said("user", "assistant"), said("assistant", "\n")]
    pieces, untold = shown(chat, TAGGED)
    assert pieces == [
        ("", -1, "<s>"),
        ("", 0, "<|system|>\n"), ("system", 0, "|"), ("", 0, "<|end|>\n"),
        ("", 1, "<|user|>\n"), ("user", 1, "assistant"), ("", 1, "<|end|>\n"),
        ("", 2, "<|assistant|>\n"), ("assistant", 2, "end"), ("", 2, "<|end|>\n"),
        ("", 3, "<|user|>\n"), ("user", 3, "assistant"), ("", 3, "<|end|>\n"),
        ("", 4, "<|assistant|>\n\n<|end|>\n"),
    ]  # fmt: skip
    assert untold == ()


def test_a_generation_prompt_is_of_no_turn() -> None:
    pieces, _ = shown([user("Hi")], TAGGED)
    assert pieces == [("", -1, "<s>"), ("", 0, "<|user|>\n"), ("user", 0, "Hi"), ("", 0, "<|end|>\n"), ("", -1, "<|assistant|>\n")]
    pieces, _ = shown([user("Hi"), said("assistant", "Well")], TAGGED, continue_final_message=True)
    assert pieces[-2:] == [("", 1, "<|assistant|>\n"), ("assistant", 1, "Well")]


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_has_a_turn_and_no_tokens_of_a_role(answer: str) -> None:
    pieces, untold = shown([said("system", ""), user("Hi"), said("assistant", answer)], TAGGED)
    assert pieces[-1] == ("", 2, f"<|assistant|>\n{answer}<|end|>\n")
    assert [role for role, _, _ in pieces if role] == ["user"]
    assert untold == ()


def test_a_system_text_in_the_message_of_the_user_is_still_the_systems() -> None:
    chat = [said("system", "Be brief."), user(" Be brief. "), said("assistant", "model"), user("user\n")]
    pieces, untold = shown(chat, MOVED)
    assert [piece for piece in pieces if piece[0]] == [
        ("system", 0, "Be brief."), ("user", 1, "Be brief."), ("assistant", 2, "model"), ("user", 3, "user")
    ]  # fmt: skip
    assert pieces[-1] == ("", -1, "<turn>model\n")
    assert untold == ()


def test_reasoning_is_a_role_where_the_template_knows_it() -> None:
    first, second = "<think>\na\n</think>\n\nb", "<think>\nb\n</think>\n\na"
    chat = [user("1"), said("assistant", first), user("2"), said("assistant", second)]
    pieces, untold = shown(chat, THINKING)
    assert pieces[4:5] == [("assistant", 1, "b")], "the reasoning of an earlier answer is not in the text"
    assert pieces[-5:] == [
        ("", 3, "<|assistant|><think>\n"), ("reasoning", 3, "b"), ("", 3, "\n</think>\n"), ("assistant", 3, "a"), ("", 3, "<|end|>")
    ]  # fmt: skip
    assert untold == ()
    field, _ = shown([user("1"), said("assistant", "a", reasoning_content="why")], THINKING)
    assert [piece for piece in field if piece[0]] == [("user", 0, "1"), ("reasoning", 1, "why"), ("assistant", 1, "a")]
    plain, _ = shown(chat, TAGGED)
    assert ("assistant", 1, first) in plain, "a template that knows nothing of reasoning prints a content as it is"


def test_a_template_that_refuses_every_part_tells_contents_all_the_same() -> None:
    pieces, untold = shown([user("a"), said("assistant", "[/]"), user("a")], STRICT)
    assert [piece for piece in pieces if piece[0]] == [("user", 0, "a"), ("assistant", 1, "[/]"), ("user", 2, "a")]
    assert untold == ()
    # Where one turn ends and the next begins is told by nothing.
    assert [piece[1] for piece in pieces if not piece[0]][1:3] == [-1, -1]


def test_calls_of_tools_are_the_assistants_and_their_results_the_tools() -> None:
    chat = [user("What?"), said("assistant", None, tool_calls=[CALL]), said("tool", "sky"), said("assistant", "So", tool_calls=[CALL])]
    pieces, untold = shown(chat, CALLING)
    call = '<call>{"name": "look", "arguments": {"at": "the sky"}}</call>'
    assert [piece for piece in pieces if piece[0]] == [
        ("user", 0, "What?"), ("assistant", 1, call), ("tool", 2, "sky"), ("assistant", 3, f"So{call}")
    ]  # fmt: skip
    assert untold == ()


def test_what_a_template_escapes_is_told_by_what_is_around_it() -> None:
    pieces, untold = shown([user("a"), said("tool", 'say "a"\n'), said("assistant", "a")], ESCAPED)
    assert ("tool", 1, r"say \"a\"\n") in pieces
    assert untold == ()
    pieces, untold = shown([user("a"), said("tool", {"say": "a"}), said("assistant", "a")], ESCAPED)
    assert untold == (1,), "a mapping is printed by rules of its own"
    assert ("assistant", 2, "a") in pieces


def test_a_content_that_is_printed_twice_or_changed_is_not_told() -> None:
    twice = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }} {{ m.content }}<|end|>{% endfor %}"
    pieces, untold = shown([user("a"), said("assistant", "b")], twice)
    assert untold == (0, 1)
    assert not any(role for role, _, _ in pieces)
    loud = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper if m.role == 'user' else m.content }}<|end|>{% endfor %}"
    pieces, untold = shown([user("a"), said("assistant", "b")], loud)
    assert untold == (0,)
    assert ("assistant", 1, "b") in pieces


def test_a_date_moves_nothing() -> None:
    dated = "Now: {{ strftime_now('%d %b %Y') }}." + TAGGED.removeprefix("{{ bos_token }}")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = dated
    options = parse_chat_options()
    prompts = parse_prompts([[user("Hi"), said("assistant", "Ho")]], tokenizer=tokenizer, chat=options)
    assert prompts.text is not None
    assert prompts.messages is not None
    # A text of another day, as of a chat that was stored then; and one whose date is longer.
    for date in ("29 Feb 2024", "Wednesday, 29 February 2024"):
        text = f"Now: {date}." + prompts.text[0].partition(".")[2]
        spans = chat_spans(prompts.messages[0], text, tokenizer, options, timed=True)
        assert [piece for piece in pieces_of(text, spans) if piece[0]] == [("user", 0, "Hi"), ("assistant", 1, "Ho")]
        assert spans.untold == ()


@pytest.mark.parametrize(
    ("system", "mode", "kept"),
    [(None, "on", ""), ("", "on", ""), ("About", "on", "About"), ("Be brief. /off", "off", "Be brief."), ("/off", "off", "")],
)
def test_a_system_text_that_directs_the_template(system: str | None, mode: str, kept: str) -> None:
    chat = [] if system is None else [said("system", system)]
    chat += [user("/off"), said("assistant", "# About"), user("You help."), said("assistant", "Today")]
    turn = len(chat) - 4
    pieces, untold = shown(chat, DIRECTED)
    assert f"Mode: /{mode}\n" in "".join(text for _, _, text in pieces)
    assert [piece for piece in pieces if piece[0] in ("user", "assistant")] == [
        ("user", turn, "/off"), ("assistant", turn + 1, "# About"), ("user", turn + 2, "You help."), ("assistant", turn + 3, "Today")
    ]  # fmt: skip
    # What was taken out of a text leaves it untold; nothing else may have its role.
    told = [text for role, _, text in pieces if role == "system"]
    assert told in ([kept] if kept else [], [])
    assert bool(told) or untold in ((0,), ()), pieces
    assert ("system" in {role for role, _, _ in pieces}) == (kept == system and bool(kept))


def test_contents_in_parts_are_one_content() -> None:
    pieces, _ = shown([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], TAGGED)
    assert ("user", 0, "ab") in pieces


# --------------------------------------------------------------------------------------------------------------- tokens, codes


def test_a_token_has_the_role_of_the_first_content_that_it_shares_a_character_with() -> None:
    spans = ChatSpans((Span(2, 4, 0, "user"), Span(6, 9, 1, "critic")), (Span(0, 5, 0, None), Span(5, 10, 1, None)), ())
    names = role_names([[said("critic", ""), said("user", "")]])
    places = np.array([(-1, -1), (0, 1), (1, 3), (3, 7), (4, 5), (5, 6), (8, 8), (8, 10), (9, 10), (10, 11)])
    roles, turns = roles_of_tokens(spans, places[:, 0], places[:, 1], names)
    shown_roles = ["" if code < 0 else names[code] for code in roles.tolist()]
    assert shown_roles == ["", "", "user", "user", "", "", "", "critic", "", ""]
    assert turns.tolist() == [-1, 0, 0, 0, 0, 1, -1, 1, 1, -1]


def test_names_of_roles_are_flags_of_the_cf_conventions() -> None:
    names = role_names([[said("my critic", ""), said("a%20b", ""), said("user", "")]])
    assert names == (*ROLES, "a%20b", "my critic")
    attributes = encode_role_names(names)
    assert attributes["flag_values"] == list(range(8))
    assert attributes["flag_meanings"].split(" ")[-2:] == ["a%2520b", "my%20critic"]
    assert decode_role_names(attributes) == names
    assert decode_role_names({"flag_values": [3, 1], "flag_meanings": "b a"}) == ("", "a", "", "b")
    assert decode_role_names({}) is None
    assert (role_code("assistant"), role_code("nobody")) == (3, NO_ROLE)


@pytest.mark.parametrize(
    "attributes",
    [
        {"flag_values": [0, 1], "flag_meanings": "a"},
        {"flag_values": [0, 0], "flag_meanings": "a b"},
        {"flag_values": "01", "flag_meanings": "a b"},
        {"flag_values": [True], "flag_meanings": "a"},
        {"flag_values": [2**40], "flag_meanings": "a"},
        {"flag_values": [-2], "flag_meanings": "a"},
        {"flag_meanings": "a"},
    ],
)
def test_flags_that_contradict_themselves_are_refused(attributes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="flag_values"):
        decode_role_names(attributes)


def test_without_characters_tokens_of_two_renderings_are_compared() -> None:
    # A tokenizer that gives a word one id, and merges the mark before a message with its first word.
    words: dict[str, int] = {}

    def ids_of(messages: Any, options: Any = None) -> list[int]:
        text = "".join(f" <{m['role']}>{m['content']} <end>" for m in messages)
        return [words.setdefault(word, len(words)) for word in text.replace(">", "> ").split()]

    chat = [said("user", "end end"), said("assistant", "user"), said("user", "end end")]
    ids = np.array(ids_of(chat))
    spans = ids_spans(chat, ids, parse_chat_options(), None, ids_of)
    assert spans.contents == (Span(1, 3, 0, "user"), Span(5, 6, 1, "assistant"), Span(8, 10, 2, "user"))
    assert spans.untold == ()
    changed = ids_spans(chat, ids[:-1], parse_chat_options(), None, ids_of)
    assert changed.untold == (0, 1, 2), "other tokens than those of the template"
    assert kept_tokens(ids, ids[3:]) == slice(3, 11)
    assert kept_tokens(ids, ids[:4]) == slice(0, 4)
    assert kept_tokens(ids, ids[3:6]) is None
