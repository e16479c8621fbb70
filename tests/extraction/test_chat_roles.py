"""The roles and turns that extraction stores with the tokens of chats."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.batch import parse_chat_options, parse_prompts, role_code
from lmprobe_zarr.errors import MissingPromptsError
from lmprobe_zarr.extraction.models.tokenizing import tokenize
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import PROMPTS, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips

pytestmark = pytest.mark.model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.content != 'no' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Go, end"}, {"role": "assistant", "content": " end "}, {"role": "user", "content": "Go, end"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "assistant"}, {"role": "assistant", "content": ""}],
    [{"role": "my critic", "content": "Who wants?"}, {"role": "user", "content": "the quick brown fox"}],
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def chatty(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def run(model: Any, prompts: Any, store: Store, tokenizer: Any, **options: Any) -> lz.ExtractStats:
    given = {"keep_tokens": True, "layers": [1], "device": "cpu", "progress": False, **options}
    return lz.extract(model, prompts, store=store, name="m", tokenizer=tokenizer, **given)


def texts_of(tokens: Any, **which: Any) -> str:
    one = tokens.sel(which)
    return "".join(
        str(text)[start:end] for text, start, end in zip(one.text.values, one.char_start.values, one.char_end.values, strict=True)
    )


def test_tokens_of_chats_have_their_role_and_turn(model: Any, acts: Store) -> None:
    tokenizer = chatty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, CHATS, acts, tokenizer)
    toks = acts.tokens("m")
    first, second, third = (lz.prompt_hash(chat, tokenizer=tokenizer) for chat in CHATS)
    assert texts_of(toks, prompt=first, role="assistant") == "end"
    assert texts_of(toks, prompt=first, role="user", turn=2) == "Go, end"
    assert texts_of(toks, prompt=first, turn=1) == "<|assistant|>\nend<|end|>\n"
    assert texts_of(toks, prompt=second, role="user") == "assistant"
    assert texts_of(toks, prompt=third, role="my critic") == "Who wants?"
    with pytest.raises(MissingPromptsError, match="no token here has role='assistant': there are 'user'"):
        toks.sel(prompt=second, role="assistant")
    assert toks.turn.sel(prompt=first).values[[0, -1]].tolist() == [-1, -1], "the beginning of a text, and a generation prompt"
    last = toks.resid.sel(prompt=[first, third]).lz.at(-1, of="user")
    assert last.turn.values.tolist() == [2, 1]
    np.testing.assert_array_equal(last.values, toks.resid.sel(prompt=[first, third], role="user").lz.pool("last_token").values)
    # Merged with chats of another call, whose names of roles are others.
    run(model, [[{"role": "judge", "content": "Who?"}]], acts, tokenizer)
    acts.compact(progress=False)
    merged = lz.open_store(acts.storage.url).tokens("m")
    assert texts_of(merged, role="judge") == "Who?"
    assert texts_of(merged, role="my critic") == "Who wants?"


def test_marks_of_a_template_are_followed(model: Any, acts: Store) -> None:
    chat = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "go"), ("user", "b"), ("assistant", "no")]]
    run(model, [chat], acts, chatty(MARKED))
    toks = acts.tokens("m")
    assert texts_of(toks, role="assistant") == "go<|end|>", "what the template marks, the end of the turn included; and nothing else"
    assert set(toks.sel(role="assistant").turn.values.tolist()) == {1}
    assert texts_of(toks, turn=3) == "<|assistant|>no<|end|>"


def test_what_cannot_be_told_is_said_once_and_unknown(model: Any, acts: Store) -> None:
    loud = TEMPLATE.replace("m.content | trim", "m.content | upper")
    with pytest.warns(UserWarning, match="does not tell where 6 messages of 3 of 3 chats are in their text, first in prompts") as said:
        run(model, CHATS, acts, chatty(loud))
    assert len([one for one in said if "chat template" in str(one.message)]) == 1
    assert set(acts.tokens("m").role.values.tolist()) == {""}


def test_chats_that_keep_no_tokens_pay_nothing(model: Any, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chatty()
    plain = tokenizer.apply_chat_template
    calls: list[Any] = []

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(args)
        return plain(*args, **given)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    run(model, CHATS, acts, tokenizer, keep_tokens=False, pooling="mean")
    assert len(calls) == len(CHATS)
    calls.clear()
    run(model, CHATS, acts, tokenizer)
    assert len(calls) < 12 * len(CHATS)


def test_prompts_that_are_no_chats_have_no_roles(model: Any, acts: Store) -> None:
    run(model, PROMPTS, acts, chatty())
    assert not {"role", "turn"} & set(acts.tokens("m").coords)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_that_were_cut_off_take_their_roles_with_them(side: str) -> None:
    for tokenizer in (chatty(), Slow(chatty())):
        prompts = parse_prompts(CHATS, tokenizer=tokenizer, chat=parse_chat_options())
        whole = tokenize(prompts, tokenizer, roles=True)
        tokenizer.truncation_side = side
        cut = tokenize(prompts, tokenizer, roles=True, max_length=20, truncation=True)
        for number in range(len(CHATS)):
            long, short = whole.take([number]), cut.take([number])
            kept = slice(None, 20) if side == "right" else slice(-20, None)
            assert short.columns["role"].tolist() == long.columns["role"][kept].tolist()
        tokenizer.truncation_side = "right"


class Slow:
    """A tokenizer that does not tell the characters of its tokens."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_fast":
            object.__setattr__(self, name, value)
        else:
            setattr(self._fast, name, value)

    def __call__(self, texts: Any, **options: Any) -> Any:
        return {"input_ids": self._fast(texts, **options)["input_ids"]}


def test_tokenizers_without_characters_give_the_same_roles() -> None:
    fast = chatty()
    prompts = parse_prompts(CHATS, tokenizer=fast, chat=parse_chat_options())
    known, found = tokenize(prompts, fast, roles=True), tokenize(prompts, Slow(fast), roles=True)
    assert found.char_start is None
    assert found.role_names == known.role_names
    assert found.columns["role"].tolist() == known.columns["role"].tolist()
    assert role_code("my critic", known.role_names) == 6
    assert not tokenize(prompts, fast).columns, "only where they are asked for"


def test_digests_of_chats_are_those_of_their_texts_as_before() -> None:
    tokenizer = chatty()
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] != "assistant")
        assert lz.prompt_hash(chat, tokenizer=tokenizer) == lz.prompt_hash(text)
