"""Chats and texts as a model gets them: options of templates, dates, special tokens, padding, and tokenizers that refuse arguments.

Right values are those of transformers, one prompt at a time.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from command_line import call

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import PROMPTS, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips

pytestmark = pytest.mark.model

TEMPLATE = (
    "{{ bos_token }}{{ tools|tojson if tools }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if enable_thinking is defined %}<think>{% endif %}"
)
TIMED = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n")
CHATS = [[{"role": "user", "content": text}] for text in ("Who?", "the fox", "Go for a walk")]
LABELS = [0, 1, 0]


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
    return lz.extract(model, prompts, store=store, name="m", tokenizer=tokenizer, device="cpu", progress=False, **options)


def alone(model: Any, ids: list[int], layer: int) -> Any:
    """The output of a block for one prompt alone, by a plain hook, shape (token, hidden)."""
    taken: list[Any] = []
    hook = model.layers[layer].register_forward_hook(lambda _m, _a, out: taken.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    return taken[0].reshape(len(ids), -1).numpy()


def check_tokens(model: Any, store: Store, label: str, ids: list[int], *, layers: tuple[int, ...] = (0, 3), **which: Any) -> None:
    """The stored tokens of a prompt are these ids, and their values are those of transformers."""
    one = store.tokens("m", **which).sel(prompt=label)
    assert one.token_id.values.tolist() == ids
    for layer in layers:
        np.testing.assert_allclose(one.resid.sel(layer=layer).values, alone(model, ids, layer), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- options of templates


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_template_and_make_another_prompt(options: dict[str, Any], model: Any, acts: Store, tmp_path: Path) -> None:
    tokenizer = chatty()
    run(model, CHATS, acts, tokenizer)
    assert run(model, CHATS, acts, tokenizer, keep_tokens=True, **options).extracted == 3
    plan = lz.plan_extract(model, CHATS, store=acts, name="m", tokenizer=tokenizer, keep_tokens=True, **options)
    assert (plan.found, plan.missing) == (3, 0)
    given = {**options, **options.get("chat_template_kwargs", {})}
    given.pop("chat_template_kwargs", None)
    for chat in CHATS:
        opens = {} if set(given) & {"add_generation_prompt", "continue_final_message"} else {"add_generation_prompt": True}
        text = tokenizer.apply_chat_template(chat, tokenize=False, **given, **opens)
        check_tokens(model, acts, lz.prompt_hash(text), tokenizer(text, add_special_tokens=False)["input_ids"])
        assert lz.prompt_hash(chat, tokenizer=tokenizer, chat_template_kwargs=given) == lz.prompt_hash(text)
    probe = lz.Probe(model, name="m", tokenizer=tokenizer, layers=1, store=acts, cache_only=True, **options)
    assert probe.warmup(CHATS).found == 3
    probe.fit(CHATS, LABELS).save(tmp_path / "probe")
    expected = probe.predict(CHATS)
    loaded = lz.Probe.load(tmp_path / "probe", store=acts).set_params(model=model, tokenizer=tokenizer)
    assert (loaded.predict(CHATS) == expected).all()


def test_the_command_line_passes_options_of_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = chatty()
    tokenizer.save_pretrained(folder)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    arguments = ["extract", str(folder), str(tmp_path / "chats.jsonl"), "--store", str(tmp_path / "acts"), "--text-column", "messages"]
    options = ["--chat-template-kwargs", '{"enable_thinking": true}', "--generation-prompt", "no"]
    assert call(capsys, *arguments, *options, "--device", "cpu", "--json")[0] == 0
    expected = [tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=True) for chat in CHATS]
    assert lz.open_store(tmp_path / "acts").dataset().text.values.tolist() == expected
    for bad in ("{", "[1]"):
        code, _, err = call(capsys, *arguments, "--chat-template-kwargs", bad)
        assert code != 0
        assert "no JSON" in err


def test_options_that_would_change_nothing_are_noticed(model: Any, acts: Store) -> None:
    for prompts in (PROMPTS, [[2, 40, 50]]):
        with pytest.raises(InvalidArgumentError, match="options of a chat template"):
            run(model, prompts, acts, chatty(), add_generation_prompt=False)
    with pytest.raises(InvalidArgumentError, match="add_special_tokens=False is for texts"):
        run(model, CHATS, acts, chatty(), add_special_tokens=False)
    with pytest.warns(UserWarning, match="never uses 'enable_thinkng'"):
        run(model, CHATS, acts, chatty(), chat_template_kwargs={"enable_thinkng": True})
    with pytest.raises(InvalidTypeError, match="wraps those of tokenizers"):
        run(model, PROMPTS, acts, tiny_tokenizer().backend_tokenizer)


# -------------------------------------------------------------------------------------------------------------------- dates


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the date that templates print."""
    from transformers.utils import chat_template_utils

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls(2026, 11, day, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


def test_chats_with_a_date_are_found_on_another_day(model: Any, acts: Store, on_day: Callable[[int], None]) -> None:
    tokenizer = chatty(TIMED)
    on_day(3)
    run(model, CHATS, acts, tokenizer, layers=[0], keep_tokens=True, coords={"label": LABELS})
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    on_day(14)
    new = [*CHATS, [{"role": "user", "content": "new"}]]
    stats = run(model, new, acts, tokenizer, layers=[0], keep_tokens=True)
    assert (stats.found, stats.extracted) == (3, 1)
    data = acts.dataset("m")
    assert data.text.values[:3].tolist() == texts
    assert "14 Nov 2026" in str(data.text.values[3])
    # A further layer belongs to the text that is stored, with its date.
    assert run(model, CHATS, acts, tokenizer, layers=[3], keep_tokens=True).extracted == 3
    for chat, text in zip(CHATS, texts, strict=True):
        check_tokens(
            model, acts, lz.prompt_hash(chat, tokenizer=tokenizer), tokenizer(text, add_special_tokens=False)["input_ids"], layers=(0, 3)
        )
    assert len(acts.dataset("m").text) == 4
    assert run(model, CHATS, acts, tokenizer, layers=[0, 3], keep_tokens=True).found == 3


def test_a_probe_finds_yesterdays_chats(model: Any, acts: Store, on_day: Callable[[int], None]) -> None:
    on_day(3)
    probe = lz.Probe(model, name="m", tokenizer=chatty(TIMED), layers=1, store=acts).fit(CHATS, LABELS)
    expected = probe.predict(CHATS)
    on_day(4)
    probe.set_params(cache_only=True)
    assert (probe.predict(CHATS) == expected).all()
    assert probe.warmup(CHATS).found == 3


def test_a_date_that_is_given_makes_prompts_by_their_text(model: Any, acts: Store, on_day: Callable[[int], None]) -> None:
    tokenizer = chatty(TIMED.replace("strftime_now('%d %b %Y')", "date_string if date_string is defined else strftime_now('%d %b %Y')"))
    given = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    on_day(3)
    run(model, CHATS, acts, tokenizer, **given)
    on_day(4)
    assert run(model, CHATS, acts, tokenizer, **given).found == 3
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024") for chat in CHATS]
    assert acts.dataset("m", prompts=texts).text.values.tolist() == texts


def test_a_chat_with_a_date_but_without_its_text_is_never_mixed(model: Any, acts: Store, on_day: Callable[[int], None]) -> None:
    tokenizer = chatty(TIMED)
    on_day(3)
    run(model, CHATS, acts, tokenizer, layers=[0], store_text=False)
    on_day(4)
    assert run(model, CHATS, acts, tokenizer, layers=[0], store_text=False).found == 3
    with pytest.raises(InvalidArgumentError, match="stored without its text"):
        run(model, CHATS, acts, tokenizer, layers=[1], store_text=False)
    assert acts.dataset("m").sizes["layer"] == 1


def test_roles_of_chats_with_a_date_and_parts_are_found_in_their_text(model: Any, acts: Store) -> None:
    tokenizer = chatty(TIMED)
    chats = [[{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "goes?"}]}], *CHATS]
    run(model, chats, acts, tokenizer, keep_tokens=True, add_generation_prompt=False)
    tokens = acts.tokens("m")
    mask = lz.mask_tokens(tokens, role="user", chats=chats, tokenizer=tokenizer, chat_template_kwargs={"add_generation_prompt": False})
    chosen = tokens.isel(token=mask.values)
    said = {label: tokenizer.decode(chosen.sel(prompt=label).token_id.values.tolist()).strip() for label in acts.dataset("m").prompt.values}
    assert sorted(text.split("|>")[-1] for text in said.values()) == ["Go for a walk", "Who goes?", "Who?", "the fox"]


# ----------------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["begin", "end"])
def test_a_chat_rendered_by_hand_is_noticed_and_has_a_way(kind: str, model: Any, acts: Store) -> None:
    tokenizer = tiny_tokenizer(encoder=kind == "end")
    tokenizer.chat_template = TEMPLATE if kind == "begin" else TEMPLATE.replace("{{ bos_token }}", "") + "{{ eos_token }}"
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    with pytest.warns(UserWarning, match=rf"3 of 3 texts, first prompts\[0\], {kind} with .*add_special_tokens=False"):
        run(model, texts, acts, tokenizer)
    group = acts.groups()
    run(model, texts, acts, tokenizer, keep_tokens=True, add_special_tokens=False)
    added = next(name for name in acts.groups() if name not in group)
    for text in texts:
        check_tokens(model, acts, lz.prompt_hash(text), tokenizer(text, add_special_tokens=False)["input_ids"], group=added)
    assert run(model, texts, acts, tokenizer, keep_tokens=True, add_special_tokens=False).found == 3
    probe = lz.Probe(model, name="m", tokenizer=tokenizer, layers=1, store=acts, cache_only=True, add_special_tokens=False)
    assert probe.warmup(texts).found == 3


def test_ordinary_texts_are_no_cause_for_a_warning(model: Any, acts: Store) -> None:
    run(model, [*PROMPTS, "<s", "s> <s>"], acts, tiny_tokenizer())
    assert set(acts.groups().popitem()[1].provenance) >= {"special_tokens"}
    assert acts.groups().popitem()[1].provenance["special_tokens"] is True


# ------------------------------------------------------------------------------------------------------ lists and padding


def test_tables_and_padded_batches_are_refused_and_columns_are_understood(model: Any, acts: Store) -> None:
    tokenizer = tiny_tokenizer()
    table = pd.DataFrame({"text": PROMPTS[:3], "label": LABELS})
    for given in (table, table.to_dict("list"), tokenizer(PROMPTS), set(PROMPTS), tokenizer(PROMPTS, padding=True)["input_ids"]):
        for entry in (
            lambda given=given: run(model, given, acts, tokenizer),
            lambda given=given: lz.plan_extract(model, given, store=acts, name="m", tokenizer=tokenizer),
            lambda given=given: lz.Probe(model, name="m", tokenizer=tokenizer, layers=1, store=acts).warmup(given),
            lambda given=given: lz.Probe(model, name="m", tokenizer=tokenizer, layers=1, store=acts).fit(
                given, [*LABELS, *LABELS][: len(given)]
            ),
        ):
            with pytest.raises((InvalidArgumentError, InvalidTypeError)):
                entry()
    assert not acts.groups()
    run(model, table["text"], acts, tokenizer, coords={"label": table["label"]})
    data = acts.dataset("m")
    assert data.text.values.tolist() == PROMPTS[:3]
    assert data.label.values.tolist() == LABELS
    probe = lz.Probe(model, name="m", tokenizer=tokenizer, layers=1, store=acts, cache_only=True).fit(table["text"], table["label"])
    for given in (table, {"text": PROMPTS}, set(PROMPTS)):
        for method in (probe.predict, probe.predict_proba, lambda prompts: probe.score(prompts, LABELS)):
            with pytest.raises(InvalidTypeError, match="list of prompts"):
                method(given)
    assert probe.predict(np.array(PROMPTS[:3])).tolist() == probe.predict(PROMPTS[:3]).tolist()


def test_token_ids_that_may_be_padded_are_warned_of(model: Any, acts: Store) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"  # noqa: S105 - a token of a tokenizer
    with pytest.warns(UserWarning, match=r"prompts\[1\] ends with the token id 3"):
        run(model, np.array([[2, 40, 50], [2, 41, 3]]), acts, tokenizer)
    run(model, [[2, 40, 3], [2, 41, 3]], acts, tokenizer)


# ------------------------------------------------------------------------------------------------------- strict tokenizers


class Strict:
    """As MistralCommonBackend: it refuses arguments that it does not know, and renders chats in code of its own."""

    special_tokens_map: ClassVar[dict[str, str]] = {}
    init_kwargs: ClassVar[dict[str, str]] = {}
    all_special_tokens = ("<s>", "</s>")
    model_max_length = int(1e30)
    pad_token_id = 1

    def __init__(self) -> None:
        self.inner = chatty()

    def __call__(
        self,
        text: Any,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        **strange: Any,
    ) -> dict[str, Any]:
        if strange:
            raise ValueError(f"Kwargs {sorted(strange)} are not supported by this tokenizer.")
        ids = self.inner(text, add_special_tokens=add_special_tokens, truncation=truncation, max_length=max_length)["input_ids"]
        return {"input_ids": ids}

    def decode(self, token_ids: Any) -> str:
        return str(self.inner.decode(token_ids))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.inner.get_vocab())

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 1

    def apply_chat_template(
        self, conversation: Any, tools: Any = None, add_generation_prompt: bool = False, tokenize: bool = True, **strange: Any
    ) -> Any:
        if strange:
            raise ValueError(f"Kwargs {sorted(strange)} are not supported.")
        text = self.inner.apply_chat_template(conversation, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        # A control token that a message writes out is ordinary text.
        return {"input_ids": self.inner(text, split_special_tokens=True, add_special_tokens=True)["input_ids"]} if tokenize else text


class OnlyTexts(Strict):
    """Without a way to render chats, and with no named arguments at all."""

    apply_chat_template = None  # type: ignore[assignment]

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return super().__call__(text, **options)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [Strict, OnlyTexts])
def test_a_tokenizer_that_refuses_arguments_gets_only_what_is_needed(kind: type[Strict], model: Any, acts: Store) -> None:
    tokenizer = kind()
    run(model, PROMPTS, acts, tokenizer, keep_tokens=True)
    for text in PROMPTS:
        check_tokens(model, acts, lz.prompt_hash(text), tokenizer.inner(text)["input_ids"])
    assert run(model, PROMPTS, acts, tokenizer, keep_tokens=True).found == len(PROMPTS)
    run(model, PROMPTS, acts, tokenizer, keep_tokens=True, truncation=True, max_length=4)
    cut = next(name for name, info in acts.groups().items() if info.provenance["truncation"] == 4)
    for text in PROMPTS:
        check_tokens(model, acts, lz.prompt_hash(text), tokenizer.inner(text, truncation=True, max_length=4)["input_ids"], group=cut)
    run(model, [[2, 40, 50]], acts, tokenizer)


def test_chats_of_a_tokenizer_without_a_template_have_the_ids_that_it_makes(model: Any, acts: Store) -> None:
    tokenizer = Strict()
    chats = [*CHATS, [{"role": "user", "content": "a </s> b"}]]
    run(model, chats, acts, tokenizer, keep_tokens=True)
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        check_tokens(model, acts, lz.prompt_hash(chat, tokenizer=tokenizer), ids)
    assert run(model, chats, acts, tokenizer, keep_tokens=True).found == 4
    texts = acts.dataset("m").text.values.tolist()
    written = lz.prompt_hash(chats[3], tokenizer=tokenizer)
    assert written not in {lz.prompt_hash(text) for text in texts}  # the same text could have other tokens
    assert lz.prompt_hash(texts[0]) == lz.prompt_hash(chats[0], tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        run(model, CHATS, acts, OnlyTexts())
