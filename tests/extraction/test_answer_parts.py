"""The tokens of answers: their role, their characters, and what is pooled over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import PROMPTS, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips

from lmprobe_zarr.batch import decode_ids  # noqa: E402
from lmprobe_zarr.extraction.models.tokenizing import TokenizedPrompts, with_answers  # noqa: E402

pytestmark = pytest.mark.model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHATS = [
    [{"role": "user", "content": "Where is the cat?"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
]
SIX = lz.Generate(max_new_tokens=6)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama", "AutoModelForCausalLM")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def run(model: Any, prompts: Any, store: Store, **options: Any) -> lz.ExtractStats:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    return lz.extract(model, prompts, store=store, device="cpu", progress=False, **{"name": "m", "tokenizer": tokenizer} | options)


def test_what_is_pooled_over_an_answer_is_what_its_tokens_hold(llama: Any, acts: Store) -> None:
    run(llama, PROMPTS, acts, generate=SIX, pooling=["mean", "last_token"], over=["all", "generated"], keep_tokens=True)
    ds, toks = acts.dataset(), acts.tokens()
    assert set(ds.data_vars) == {"resid_mean", "resid_last_token", "resid_mean_generated", "resid_last_token_generated"}
    for prompt in ds.prompt.values:
        own = toks.resid.sel(prompt=prompt)
        made = toks.generated.sel(prompt=prompt).values
        assert made.sum() == len(str(ds.completion_ids.sel(prompt=prompt).values).split())
        np.testing.assert_allclose(
            ds.resid_mean_generated.sel(prompt=prompt).values, own.values[:, made].astype(np.float64).mean(1), atol=1e-5
        )
        np.testing.assert_array_equal(ds.resid_last_token_generated.sel(prompt=prompt).values, own.values[:, made][:, -1])
    first = toks.resid.lz.at(0, of="generated")
    for prompt in ds.prompt.values:
        made = np.flatnonzero(toks.generated.sel(prompt=prompt).values)
        np.testing.assert_array_equal(first.sel(prompt=prompt).values, toks.resid.sel(prompt=prompt).values[:, made[0]])
    again = run(llama, PROMPTS, acts, generate=SIX, pooling=["max"], over="generated")
    assert (again.generated, again.extracted) == (0, len(PROMPTS)), "the answers are known"


def test_an_answer_is_a_turn_of_the_assistant(llama: Any, acts: Store) -> None:
    run(llama, CHATS, acts, generate=SIX, pooling=["mean"], over=["user", "assistant"], keep_tokens=True)
    toks, ds = acts.tokens(), acts.dataset()
    for chat in CHATS:
        text = "".join(f"<{m['role']}>{m['content']}" for m in chat) + "<assistant>"
        (prompt,) = ds.prompt.values[[str(each).startswith(text) for each in ds.text.values]]
        own = toks.sel(prompt=prompt)
        made = own.generated.values
        assert set(own.role.values[made]) == {"assistant"}
        assert set(own.turn.values[made]) == {len(chat)}
        before = own.role.values[~made]
        assert set(before[before != ""]) == {m["role"] for m in chat}
        assistant = own.role.values == "assistant"
        right = own.resid.values[:, assistant].astype(np.float64).mean(1)
        np.testing.assert_allclose(ds.resid_mean_assistant.sel(prompt=prompt).values, right, atol=1e-5)


def test_a_text_is_found_in_an_answer_too(llama: Any, acts: Store) -> None:
    run(llama, PROMPTS, acts, generate=lz.Generate(max_new_tokens=12), pooling=[], keep_tokens=True)
    toks, placed = acts.tokens(), 0
    for prompt in np.unique(toks.prompt.values):
        own = toks.sel(prompt=prompt)
        text = str(own.text.values[0])
        starts, ends = own.char_start.values, own.char_end.values
        told = (starts >= 0) & own.generated.values
        placed += int(told.sum())
        for start, end, token in zip(starts[told], ends[told], own.token_id.values[told], strict=True):
            piece = decode_ids(tiny_tokenizer(), np.array([token]))
            shown = text[start:end]
            # Bytes that are no character stand with the next token that is.
            assert "\ufffd" in piece or (shown.endswith(piece) and not shown.removesuffix(piece).strip("\ufffd"))
    assert placed > 0.3 * toks.generated.values.sum(), "of a random model's bytes"


@pytest.mark.parametrize("text", [" hello wörld — 日本 🙂 ok", "a", "", "   ", "x\n\ny <s> z", "é" * 5])
def test_pieces_of_an_answer_are_its_characters(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    prompt = TokenizedPrompts(
        sha256=("a" * 64,), text=("the ",), lengths=np.array([1]), token_ids=np.array([5]), char_start=np.array([0]),
        char_end=np.array([3]), truncated=np.array([False]), first=np.array([0]),
    )  # fmt: skip
    whole = with_answers(prompt, [ids], tokenizer)
    assert whole.text[0] == "the " + decode_ids(tokenizer, ids) if len(ids) else "the "
    assert whole.char_start is not None
    assert whole.char_end is not None
    starts, ends = whole.char_start[1:], whole.char_end[1:]
    pieces = [whole.text[0][a:b] for a, b in zip(starts, ends, strict=True) if a >= 0]
    assert "".join(pieces) == whole.text[0][4:], "they lie end to end, and nothing is left over"
    assert (starts >= 0).sum() >= len(text) / 5
