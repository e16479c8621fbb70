"""Answers: what `extract(generate=…)` writes and stores, beside transformers itself, one prompt at a time.

Right answers are those of plain ``generate`` and, for greedy ones, of a loop that is written out here; right activations are those that
hooks see while ``generate`` runs.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import local_client
from command_line import call

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, PromptTooLongError
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import CHAT_TEMPLATE, PROMPTS, VOCABULARY, random_model, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402 — after the skips

pytestmark = pytest.mark.model

KINDS = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "phi", "falcon", "falcon_alibi", "mixtral",
    "deepseek_v3",
]  # fmt: skip
EOS = 3
SAMPLED = lz.Generate(max_new_tokens=8, temperature=1.5, seed=11)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama", "AutoModelForCausalLM")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def saved(folder: Path, **own: Any) -> Path:
    """A model in a folder, with a generation configuration that sets these."""
    save_tiny("llama", folder, head="AutoModelForCausalLM")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "pad_token_id": 1, **own}))
    return folder


def run(model: Any, prompts: Any, store: Store, generate: Any, **options: Any) -> lz.ExtractStats:
    given = {} if isinstance(model, Path) else {"name": "m", "tokenizer": tiny_tokenizer()}
    return lz.extract(model, prompts, store=store, generate=generate, device="cpu", progress=False, **{**given, **options})


def ids_of(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def alone(model: Any, ids: list[int], **options: Any) -> list[int]:
    """What plain ``generate`` adds to one prompt."""
    options = {"do_sample": False, "pad_token_id": 1, **options}
    with torch.inference_mode():
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **options)
    return [int(token) for token in found[0, len(ids) :]]


def by_hand(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, each from a pass over all tokens before it."""
    found: list[int] = []
    with torch.inference_mode():
        while len(found) < count and found[-1:] != [EOS]:
            logits = model(input_ids=torch.tensor([ids + found]), use_cache=False).logits
            found.append(int(logits[0, -1].argmax()))
    return found


def answers(store: Store, prompts: list[Any] | None = None, **where: Any) -> dict[tuple[str, int], list[int]]:
    """The token ids of every stored answer, by the hash of its prompt and its number."""
    data = store.dataset(**where)
    columns = (data.prompt_of.values, data.generation_sample.values, data.completion_ids.values)
    return {(str(of), int(n)): [int(i) for i in ids.split()] for of, n, ids in zip(*columns, strict=True) if isinstance(of, str)}


def recorded(store: Store) -> list[dict[str, Any]]:
    (info,) = store.groups().values()
    return [dict(part.info.recorded) for part in store.view(info).parts]


@contextmanager
def no_loading() -> Iterator[None]:
    """Any attempt to load a model's weights fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmprobe_zarr.extraction.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        yield


@contextmanager
def no_generating() -> Iterator[None]:
    """Any attempt to generate an answer fails the test. Replaced methods of the model itself would make another group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmprobe_zarr.extraction.models.generating.generate_answers", lambda *_, **__: pytest.fail("something was generated"))
        yield


# -------------------------------------------------------------------------------------------------------------- right answers


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_each_prompt_alone(kind: str, acts: Store) -> None:
    model = tiny_model(kind, "AutoModelForCausalLM")
    stats = run(model, PROMPTS, acts, lz.Generate(max_new_tokens=8, temperature=0), batch_tokens=400)
    found = answers(acts)
    for text in PROMPTS:
        expected = by_hand(model, ids_of(text), 8)
        assert found[lz.prompt_hash(text), 0] == expected == alone(model, ids_of(text), max_new_tokens=8)
    assert stats.generated == len(PROMPTS) == len(found)
    assert stats.generated_tokens == sum(map(len, found.values()))
    assert {part["generation"]["batches"] for part in recorded(acts)} == {"padded"}


def test_settings_that_look_at_earlier_tokens_do_not_see_padding(llama: Any, acts: Store) -> None:
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    run(llama, [*PROMPTS, "Why?"], acts, lz.Generate(max_new_tokens=8, settings=settings))
    for text in (*PROMPTS, "Why?"):
        assert answers(acts)[lz.prompt_hash(text), 0] == alone(llama, ids_of(text), max_new_tokens=8, **settings)
    assert recorded(acts)[0]["generation"]["batches"] == "equal"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("MambaForCausalLM", "MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
        (
            "XGLMForCausalLM", "XGLMConfig",
            {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128},
        ),
        (
            "CTRLLMHeadModel", "CTRLConfig",
            {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 128},
        ),
    ],
)  # fmt: skip
def test_models_that_mind_padding_are_given_none(name: str, config: str, options: dict[str, Any], acts: Store) -> None:
    model = random_model(name, config, **options)
    run(model, PROMPTS, acts, lz.Generate(max_new_tokens=6))
    for text in PROMPTS:
        assert answers(acts)[lz.prompt_hash(text), 0] == alone(model, ids_of(text), max_new_tokens=6)


def during_generation(model: Any, ids: list[int], count: int) -> Any:
    """What hooks on the blocks see while ``generate`` writes an answer, shape (layer, token, hidden); the last token is never run."""
    seen: list[list[Any]] = [[] for _ in model.model.layers]
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, at=at: seen[at].append(out[0] if isinstance(out, tuple) else out))
        for at, block in enumerate(model.model.layers)
    ]
    alone(model, ids, max_new_tokens=count)
    for hook in hooks:
        hook.remove()
    return np.stack([torch.cat([each.reshape(-1, each.shape[-1]) for each in outputs]).numpy() for outputs in seen])


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "mixtral"])
def test_activations_are_those_during_generation(kind: str, acts: Store) -> None:
    model = tiny_model(kind, "AutoModelForCausalLM")
    run(model, PROMPTS, acts, lz.Generate(max_new_tokens=12), keep_tokens=True, pooling=["last_token", "mean"])
    tokens, data = acts.tokens("m"), acts.dataset("m")
    for row, text in enumerate(PROMPTS):
        expected = during_generation(model, ids_of(text), 12)
        one = tokens.sel(prompt=str(data.prompt.values[row]))
        assert one.token_id.values.tolist() == ids_of(text) + alone(model, ids_of(text), max_new_tokens=12)
        assert one.generated.values.tolist() == [0] * len(ids_of(text)) + [1] * (one.sizes["token"] - len(ids_of(text)))
        assert np.abs(one.resid.values[:, :-1] - expected).max() < 1e-4
        np.testing.assert_allclose(data.resid_last_token.values[:, row], one.resid.values[:, -1], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ once


def test_the_same_call_finds_its_answers_without_the_model(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", do_sample=True)
    for generate in (lz.Generate(max_new_tokens=5, temperature=0), lz.Generate(max_new_tokens=5, n=2), SAMPLED):
        first = run(folder, PROMPTS, acts, generate)
        with no_loading():
            again = run(folder, PROMPTS, acts, generate)
        assert (first.found, first.generated) == (0, len(PROMPTS) * generate.n)
        assert (again.found, again.generated, again.model_loaded) == (len(PROMPTS) * generate.n, 0, False)
    # More answers of each, and more prompts: only those that are new are generated.
    more = run(folder, [*PROMPTS, "Why?"], acts, lz.Generate(max_new_tokens=5, n=3))
    assert (more.found, more.generated) == (2 * len(PROMPTS), len(PROMPTS) + 3)


def test_another_layer_and_a_refresh_take_the_stored_answer(llama: Any, acts: Store) -> None:
    generate = lz.Generate(max_new_tokens=6, temperature=1.5, n=2)  # with a drawn seed, so that nobody could write it again
    run(llama, PROMPTS, acts, generate, layers=0)
    before = acts.dataset("m").load()
    with no_generating():
        stats = run(llama, PROMPTS, acts, generate, layers=[1, 3], keep_tokens=True)
        assert (stats.extracted, stats.generated) == (2 * len(PROMPTS), 0)
        assert run(llama, PROMPTS, acts, generate, layers=0, refresh=True).generated == 0
    data, tokens = acts.dataset("m"), acts.tokens("m")
    for name in ("completion", "completion_ids", "prompt_of", "generation_seed", "generation_sample", "generation", "text", "prompt"):
        assert data[name].values.tolist() == before[name].values.tolist(), name
    np.testing.assert_allclose(data.resid_last_token.sel(layer=0).values, before.resid_last_token.sel(layer=0).values, atol=1e-6)
    for label, ids in zip(data.prompt.values, data.completion_ids.values, strict=True):
        one = tokens.sel(prompt=str(label))
        assert one.token_id.values[one.generated.values == 1].tolist() == [int(i) for i in ids.split()]


def test_answers_stay_through_compaction_and_plain_prompts_beside_them(llama: Any, acts: Store) -> None:
    lz.extract(llama, PROMPTS, store=acts, name="m", tokenizer=tiny_tokenizer(), device="cpu", progress=False, keep_tokens=True)
    run(llama, PROMPTS, acts, SAMPLED, keep_tokens=True, coords={"label": list(range(len(PROMPTS)))})
    run(llama, PROMPTS[:2], acts, SAMPLED, coords={"group": ["a", "b"]})
    before = answers(acts)
    acts.compact()
    assert answers(acts) == before
    data = acts.dataset("m")
    assert len(acts.groups()) == 1
    assert data.sizes["prompt"] == 2 * len(PROMPTS)
    plain, answered = data.isel(prompt=slice(len(PROMPTS))), data.isel(prompt=slice(len(PROMPTS), None))
    assert plain.prompt.values.tolist() == [lz.prompt_hash(text) for text in PROMPTS] == answered.prompt_of.values.tolist()
    assert answered.label.values.tolist() == list(range(len(PROMPTS)))
    # A plain prompt is found by its text, and its answers by its hash.
    assert acts.dataset("m", prompts=[PROMPTS[1]]).completion.isnull().all()
    mine = data.where((data.prompt_of == lz.prompt_hash(PROMPTS[1])).compute(), drop=True)
    assert mine.group.values.tolist() == ["b"]
    tokens = acts.tokens("m")
    assert set(tokens.sel(prompt=lz.prompt_hash(PROMPTS[1])).generated.values.tolist()) == {False}
    with no_generating():
        assert run(llama, PROMPTS, acts, SAMPLED, keep_tokens=True).found == len(PROMPTS)


def test_an_answer_whose_tokens_are_gone_is_not_made_up(llama: Any, acts: Store) -> None:
    run(llama, PROMPTS[:1], acts, SAMPLED, layers=0)
    (label,) = acts.dataset("m").prompt.values.tolist()
    acts.dataset("m").completion_ids  # noqa: B018 — it is there
    (info,) = acts.groups().values()
    view = acts.view(info)
    from lmprobe_zarr.batch import parse_column

    acts.write_columns(view, {"completion_ids": (np.array([0]), parse_column("completion_ids", ["no numbers"]))})
    with pytest.raises(InvalidArgumentError, match=f"completion_ids of the stored prompt {label} is no list of token ids"):
        run(llama, PROMPTS[:1], acts, SAMPLED, layers=1)
    acts.delete("m", prompts=[label])
    assert run(llama, PROMPTS[:1], acts, SAMPLED, layers=1).generated == 1


def test_a_tokenizer_that_cuts_otherwise_is_noticed(llama: Any, acts: Store) -> None:
    run(llama, [[2, 40, 50, 60]], acts, SAMPLED, layers=0)
    (info,) = acts.groups().values()
    from lmprobe_zarr.batch import parse_column

    ids = str(acts.dataset("m").completion_ids.item())
    acts.write_columns(acts.view(info), {"completion_ids": (np.array([0]), parse_column("completion_ids", [f"{ids} 7"]))})
    with pytest.raises(InvalidArgumentError, match="has 4 tokens, and had 3 when its answer was generated"):
        run(llama, [[2, 40, 50, 60]], acts, SAMPLED, layers=1)


# -------------------------------------------------------------------------------------------------------------- sampling


def test_samples_do_not_depend_on_batches_on_their_order_or_on_an_interruption(llama: Any, tmp_path: Path) -> None:
    generate = lz.Generate(max_new_tokens=8, temperature=1.5, seed=5, n=3)
    stores = [lz.open_store(tmp_path / str(number), durable=False) for number in range(4)]
    run(llama, PROMPTS, stores[0], generate)
    run(llama, PROMPTS, stores[1], generate, batch_prompts=1)
    run(llama, PROMPTS[::-1], stores[2], lz.Generate(max_new_tokens=8, temperature=1.5, seed=5, n=1), batch_tokens=60)
    run(llama, PROMPTS[::-1], stores[2], generate, batch_tokens=60)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, batches=2)
        with pytest.raises(KeyboardInterrupt):
            run(llama, PROMPTS, stores[3], generate, batch_prompts=4, part_seconds=1.0)
    kept = answers(stores[3])
    assert 0 < len(kept) < 3 * len(PROMPTS)
    stats = run(llama, PROMPTS, stores[3], generate)
    assert (stats.found, stats.generated) == (len(kept), 3 * len(PROMPTS) - len(kept))
    assert answers(stores[0]) == answers(stores[1]) == answers(stores[2]) == answers(stores[3])
    assert len({tuple(ids) for ids in answers(stores[0]).values()}) > 2 * len(PROMPTS)


def interrupt_after(patch: pytest.MonkeyPatch, *, batches: int) -> None:
    """The user interrupts while the batch after these is generated."""
    from lmprobe_zarr.extraction.models import generating

    original, left = generating._run_batch, list(range(batches))

    def run_batch(*args: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*args)

    patch.setattr(generating, "_run_batch", run_batch)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 1.3, "settings": {"min_p": 0.05}},
    ],
    ids="-".join,
)
def test_samples_have_the_distribution_of_transformers(settings: dict[str, Any], llama: Any, acts: Store) -> None:
    n = 3000
    run(llama, ["Who?"], acts, lz.Generate(max_new_tokens=1, seed=3, n=n, **settings), layers=0)
    plain = {**settings, **settings.get("settings", {})}
    plain.pop("settings", None)
    with torch.inference_mode():
        scores = llama.generate(
            torch.tensor([ids_of("Who?")]), do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
            pad_token_id=1, attention_mask=torch.ones(1, len(ids_of("Who?")), dtype=torch.int64), **plain,
        ).scores[0][0]  # fmt: skip
    probabilities = torch.softmax(scores.double(), -1).numpy()
    counts = Counter(ids[0] for ids in answers(acts).values())
    observed = np.array([counts[token] for token in range(VOCABULARY)], float)
    assert observed[probabilities == 0].sum() == 0
    # Tokens that are expected fewer than ten times count as one.
    many = probabilities * n >= 10
    groups = np.append(probabilities[many], probabilities[~many].sum()) * n
    seen = np.append(observed[many], observed[~many].sum())
    seen, groups = seen[groups > 0], groups[groups > 0]
    chi_square, degrees = float(((seen - groups) ** 2 / groups).sum()), len(groups) - 1
    assert degrees >= 3
    # The 99.99th percentile, by Wilson and Hilferty.
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_seed_that_nobody_gave_is_drawn_and_recorded_and_writes_the_same_again(llama: Any, acts: Store, tmp_path: Path) -> None:
    run(llama, PROMPTS, acts, lz.Generate(max_new_tokens=8, temperature=1.5))
    seeds = set(acts.dataset("m").generation_seed.values.tolist())
    assert len(seeds) == 1
    assert recorded(acts)[0]["generation"]["seed"] == "drawn"
    other, again = (lz.open_store(tmp_path / name, durable=False) for name in ("other", "again"))
    run(llama, PROMPTS, other, lz.Generate(max_new_tokens=8, temperature=1.5))
    assert set(other.dataset("m").generation_seed.values.tolist()) != seeds
    assert answers(other) != answers(acts)
    run(llama, PROMPTS, again, lz.Generate(max_new_tokens=8, temperature=1.5, seed=int(seeds.pop())))
    assert answers(again) == answers(acts)
    assert recorded(again)[0]["generation"]["seed"] == "given"


def test_two_samples_with_one_text_are_two_prompts(llama: Any, acts: Store) -> None:
    run(llama, ["Who?"], acts, lz.Generate(max_new_tokens=1, temperature=1.0, top_k=2, seed=0, n=8))
    data = acts.dataset("m")
    assert len(set(data.completion_ids.values)) == 2
    assert len(set(data.prompt.values)) == 8
    assert data.generation_sample.values.tolist() == list(range(8))


# -------------------------------------------------------------------------------------------------------------- answers at the edges


def ending_at_once(folder: Path) -> Any:
    """A model whose first token is always the one that ends the answer."""
    model = tiny_model("gpt2", "AutoModelForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        final = model.transformer.ln_f
        final.weight.zero_()
        final.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 1.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_an_empty_answer(acts: Store, tmp_path: Path) -> None:
    folder = ending_at_once(tmp_path / "ends")
    stats = run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=5), keep_tokens=True)
    data, tokens = acts.dataset(), acts.tokens()
    assert stats.generated_tokens == len(PROMPTS)
    assert set(data.completion.values) == {""}
    assert set(data.completion_ids.values) == {str(EOS)}
    assert set(data.finish_reason.values) == {"stop"}
    assert data.text.values.tolist() == [f"{text}</s>" for text in PROMPTS]
    assert [tokens.token_id.values[tokens.generated.values == 1].tolist()] == [[EOS] * len(PROMPTS)]
    with no_loading():
        assert run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=5), keep_tokens=True).found == len(PROMPTS)
    assert run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=5), logits="last_token").generated == 0


def test_answers_that_end_and_answers_that_are_cut(llama: Any, acts: Store) -> None:
    """The token that ends an answer is chosen among those that greedy answers have, so that some end with it and some do not."""
    greedy = {text: alone(llama, ids_of(text), max_new_tokens=8) for text in PROMPTS}
    end = greedy[PROMPTS[0]][3]
    expected = {text: ids[: ids.index(end) + 1] if end in ids else ids for text, ids in greedy.items()}
    reasons = {text: "stop" if end in ids else "length" for text, ids in greedy.items()}
    assert set(reasons.values()) == {"stop", "length"}
    run(llama, PROMPTS, acts, lz.Generate(max_new_tokens=8, settings={"eos_token_id": end}))
    data = acts.dataset("m")
    for row, text in enumerate(PROMPTS):
        assert answers(acts)[lz.prompt_hash(text), 0] == expected[text]
        assert data.finish_reason.values[row] == reasons[text]
        assert data.prompt_length.values[row] == len(ids_of(text)) + len(expected[text])
        assert data.text.values[row].startswith(text)


def test_no_token_ends_answers_where_the_caller_switches_it_off(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    model = tiny_model("llama", "AutoModelForCausalLM")
    end = by_hand(model, ids_of(PROMPTS[0]), 8)[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": 1}))
    run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=8))
    assert "stop" in acts.dataset().finish_reason.values
    run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=8, settings={"eos_token_id": None}))
    data = acts.dataset()
    off = ["eos_token_id" not in json.loads(text) for text in data.generation.values]
    assert sum(off) == len(PROMPTS)
    assert (data.finish_reason[off] == "length").all()
    for text, ids in zip(data.text[off].values, data.completion_ids[off].values, strict=True):
        prompt = next(each for each in PROMPTS if text.startswith(each))
        assert [int(i) for i in ids.split()] == by_hand(model, ids_of(prompt), 8)


def test_an_answer_that_ends_in_its_very_last_token_has_ended(llama: Any, acts: Store) -> None:
    ids = alone(llama, ids_of("Who?"), max_new_tokens=4)
    assert ids.index(ids[3]) == 3
    run(llama, ["Who?"], acts, lz.Generate(max_new_tokens=4, settings={"eos_token_id": ids[3]}))
    assert acts.dataset("m").finish_reason.item() == "stop"


def test_texts_that_end_an_answer(llama: Any, acts: Store) -> None:
    tokenizer = tiny_tokenizer()
    # A word of one of the greedy answers; many of their tokens are no whole characters.
    texts = [tokenizer.decode(alone(llama, ids_of(text), max_new_tokens=8)) for text in PROMPTS]
    stop = next(text[at : at + 2] for text in texts for at in range(1, len(text) - 3) if text[at : at + 2].isalpha())
    run(llama, PROMPTS, acts, lz.Generate(max_new_tokens=8, settings={"stop_strings": stop}))
    data = acts.dataset("m")
    for row, text in enumerate(PROMPTS):
        expected = alone(llama, ids_of(text), max_new_tokens=8, stop_strings=stop, tokenizer=tokenizer)
        assert answers(acts)[lz.prompt_hash(text), 0] == expected
        assert data.finish_reason.values[row] == ("stop" if stop in tokenizer.decode(expected) else "length")
    assert set(data.finish_reason.values) == {"stop", "length"}


# ------------------------------------------------------------------------------------------------------ the model's own configuration


def test_the_models_own_configuration_is_the_default_and_deviations_are_recorded(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=4)
    run(folder, PROMPTS, acts, lz.Generate(seed=1))
    run(folder, PROMPTS, acts, lz.Generate(seed=1, temperature=0.8, max_new_tokens=4))
    first, second = (part["generation"] for part in recorded(acts))
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_new_tokens": 4, "eos_token_id": [EOS]}
    assert (first["settings"], first["deviations"]) == (own, [])
    assert (second["settings"], second["deviations"]) == ({**own, "temperature": 0.8}, ["temperature"])
    column = [json.loads(text) for text in acts.dataset().generation.values]
    assert column == [{**own, "seed": 1}] * len(PROMPTS) + [{**own, "temperature": 0.8, "seed": 1}] * len(PROMPTS)
    assert all(part["transformers"] == importlib.metadata.version("transformers") for part in recorded(acts))
    with no_loading():  # what comes to the same is the same
        assert run(folder, PROMPTS, acts, lz.Generate(seed=1, top_p=0.9, temperature=0.6)).found == len(PROMPTS)
    # An edited configuration asks for other answers.
    saved(folder, do_sample=True, temperature=0.5, top_p=0.9, max_new_tokens=4)
    assert lz.plan_extract(folder, PROMPTS, store=acts, generate=lz.Generate(seed=1)).found == 0


def test_a_loaded_models_own_configuration_counts_too(acts: Store) -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    model.generation_config.repetition_penalty = 2.5
    run(model, PROMPTS, acts, lz.Generate(max_new_tokens=6))
    for text in PROMPTS:
        assert answers(acts)[lz.prompt_hash(text), 0] == alone(model, ids_of(text), max_new_tokens=6)
    run(model, PROMPTS, acts, lz.Generate(max_new_tokens=6, settings={"repetition_penalty": None}))
    assert recorded(acts)[1]["generation"]["deviations"] == ["max_new_tokens", "repetition_penalty"]
    found = answers(acts)
    model.generation_config.repetition_penalty = 1.0
    for text in PROMPTS:
        assert found[lz.prompt_hash(text), 0] == alone(model, ids_of(text), max_new_tokens=6)


def test_without_a_file_the_models_configuration_says_what_ends_an_answer(acts: Store, tmp_path: Path) -> None:
    folder = ending_at_once(tmp_path / "ends")
    (folder / "generation_config.json").unlink()
    run(folder, ["Who?"], acts, lz.Generate(max_new_tokens=5))
    assert json.loads(acts.dataset().generation.item())["eos_token_id"] == [EOS]
    assert acts.dataset().completion_ids.item() == str(EOS)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_beams": 4}, r"num_beams=4.*switch it off, settings=\{'num_beams': 1\}"),
        ({"forced_eos_token_id": 3}, r"forced_eos_token_id=3.*settings=\{'forced_eos_token_id': None\}"),
    ],
)
def test_searches_that_are_not_done_here_are_named(own: dict[str, Any], message: str, acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", **own)
    with pytest.raises(InvalidArgumentError, match=message):
        run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=4))
    name = next(iter(own))
    run(folder, PROMPTS, acts, lz.Generate(max_new_tokens=4, settings={name: {"num_beams": 1}.get(name)}))
    model = tiny_model("llama", "AutoModelForCausalLM")
    assert answers(acts)[lz.prompt_hash("Who?"), 0] == alone(model, ids_of("Who?"), max_new_tokens=4)


# -------------------------------------------------------------------------------------------------------------- kinds of prompts


def test_chats_are_answered_and_keep_the_date_of_their_answer(llama: Any, acts: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2025, 1, day, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE
    chats = [[{"role": "user", "content": text}] for text in ("Who?", "the fox")]
    set_day(3)
    run(llama, chats, acts, SAMPLED, tokenizer=tokenizer, layers=0)
    first = acts.dataset("m").text.values.tolist()
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    assert all(text.startswith(prompt) and "03 Jan" in text for text, prompt in zip(first, rendered, strict=True))
    set_day(28)
    stats = run(llama, chats, acts, SAMPLED, tokenizer=tokenizer, layers=1, keep_tokens=True)
    assert (stats.extracted, stats.generated) == (2, 0)
    assert acts.dataset("m").text.values.tolist() == first
    for label, prompt in zip(acts.dataset("m").prompt.values, rendered, strict=True):
        one = acts.tokens("m").sel(prompt=str(label))
        assert one.token_id.values[one.generated.values == 0].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert set(one.role.values) == {"", "user", "assistant"}
        assert (one.role.values == "assistant").tolist() == (one.generated.values == 1).tolist()


def test_token_ids_are_answered_as_they_are(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    ids = [[2, 40, 50], [2, 60]]
    run(folder, ids, acts, lz.Generate(max_new_tokens=4), keep_tokens=True)
    model = tiny_model("llama", "AutoModelForCausalLM")
    for each in ids:
        assert answers(acts)[lz.prompt_hash(each), 0] == alone(model, each, max_new_tokens=4)
    with no_loading():
        assert run(folder, ids, acts, lz.Generate(max_new_tokens=4)).found == 2
    assert run(folder, ids, acts, lz.Generate(max_new_tokens=4), sites=["attn"]).generated == 0


def test_without_texts_answers_stay(llama: Any, acts: Store) -> None:
    run(llama, PROMPTS, acts, SAMPLED, store_text=False, layers=0)
    data = acts.dataset("m")
    assert "text" not in data
    assert len(set(data.completion.values)) == len(PROMPTS)
    with no_generating():
        run(llama, PROMPTS, acts, SAMPLED, store_text=False, layers=1)


def test_prompts_and_labels_may_repeat(llama: Any, acts: Store) -> None:
    generate = lz.Generate(max_new_tokens=3, temperature=1.0, seed=0, n=2)
    stats = run(llama, ["Who?", "the", "Who?"], acts, generate, coords={"label": [1, 2, 1]})
    assert stats.prompts == 4
    assert acts.dataset("m").label.values.tolist() == [1, 1, 2, 2]
    with pytest.raises(InvalidArgumentError, match="gives the same prompt two values"):
        run(llama, ["Who?", "the", "Who?"], acts, generate, coords={"label": [1, 2, 3]})


def test_values_of_the_head_are_of_prompt_and_answer(llama: Any, acts: Store) -> None:
    run(llama, PROMPTS, acts, lz.Generate(max_new_tokens=5), perplexity=True, logits="last_token")
    data, tokens = acts.dataset("m"), acts.tokens("m")
    for row, text in enumerate(PROMPTS):
        ids = ids_of(text) + alone(llama, ids_of(text), max_new_tokens=5)
        with torch.inference_mode():
            logits = llama(input_ids=torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(data.logits_last_token.values[row], logits[-1].numpy(), atol=1e-4)
        expected = torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
        one = tokens.sel(prompt=str(data.prompt.values[row]))
        np.testing.assert_allclose(one.token_log_prob.values[1:], expected, atol=1e-4)
        assert one.generated.values.sum() == 5


# ------------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_says_that_it_is_a_bound(acts: Store, tmp_path: Path) -> None:
    folder = ending_at_once(tmp_path / "ends")
    generate = lz.Generate(max_new_tokens=7)
    plan = lz.plan_extract(folder, PROMPTS, store=acts, generate=generate)
    prompts = sum(len(ids_of(text)) for text in PROMPTS)
    assert (plan.to_generate, plan.max_new_tokens, plan.tokens) == (len(PROMPTS), 7, prompts + 7 * len(PROMPTS))
    assert f"at most {plan.tokens} to run" in str(plan)
    assert "6 to generate, of at most 7 tokens each" in str(plan)
    stats = run(folder, PROMPTS, acts, generate)
    assert (stats.tokens, stats.generated_tokens) == (prompts + len(PROMPTS), len(PROMPTS))
    assert "6 answers of 6 tokens generated" in str(stats)
    later = lz.plan_extract(folder, PROMPTS, store=acts, generate=generate, sites=["mlp"])
    assert (later.to_generate, later.tokens) == (0, stats.tokens)
    assert "at most" not in str(later).replace("of at most 7", "")


def test_workers_write_the_same_answers(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    generate = lz.Generate(max_new_tokens=6, temperature=1.5, n=2)
    with local_client(workers=1, threads=2) as client:
        stats = run(folder, PROMPTS, acts, generate, client=client, coords={"label": list(range(len(PROMPTS)))})
    assert (stats.prompts, stats.generated, stats.extracted) == (12, 12, 12)
    data = acts.dataset()
    assert stats.tokens == data.prompt_length.sum()
    assert data.prompt_of.values.tolist() == [lz.prompt_hash(text) for text in PROMPTS for _ in range(2)]
    assert data.label.values.tolist() == [number for number in range(len(PROMPTS)) for _ in range(2)]
    (seed,) = set(data.generation_seed.values.tolist())
    other = lz.open_store(tmp_path / "other", durable=False)
    run(folder, PROMPTS, other, lz.Generate(max_new_tokens=6, temperature=1.5, n=2, seed=int(seed)))
    assert answers(other) == answers(acts)


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is no number"),
        ({"max_new_tokens": True}, "max_new_tokens=True is no number"),
        ({"temperature": -1}, "temperature=-1 is no number"),
        ({"temperature": float("nan")}, "temperature=nan is no number"),
        ({"top_p": 0}, "top_p=0 is no number"),
        ({"top_p": 1.5}, "top_p=1.5 is no number"),
        ({"top_k": -1}, "top_k=-1 is no number"),
        ({"seed": -1}, "seed=-1 is no number"),
        ({"seed": 2**63}, "seed=9223372036854775808 is no number"),
        ({"n": 0}, "n=0 is no number"),
        ({"n": None}, "n=None is no number"),
        ({"temperature": 0, "n": 2}, "n=2 answers per prompt"),
        ({"temperature": 0, "top_p": 0.5}, "top_p=0.5 is for sampling"),
        ({"temperature": 0, "do_sample": True}, "temperature=0 takes the likeliest tokens, and do_sample=True"),
        ({"do_sample": False, "temperature": 0.5}, "temperature=0.5 is for sampling"),
        ({"settings": {"num_beams": 4}}, "num_beams=4"),
        ({"settings": {"num_return_sequences": 4}}, "or give n="),
        ({"settings": {"temperature": 4}}, r"Generate\(temperature=…\)"),
        ({"settings": {"repetition_penalti": 4}}, "'repetition_penalti', which is not known here: use .*repetition_penalty"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        lz.Generate(**options)


def test_values_of_another_type() -> None:
    for options in ({"settings": [1]}, {"do_sample": "False"}, {"settings": {"sequence_bias": {(1, 2): 0.5}}}):
        with pytest.raises(InvalidTypeError):
            lz.Generate(**options)
    numbers: dict[str, Any] = {"max_new_tokens": np.int64(4), "temperature": 1, "top_p": np.float32(0.5), "seed": np.uint8(3)}
    assert lz.Generate(**numbers) == lz.Generate(max_new_tokens=4, temperature=1.0, top_p=0.5, seed=3)


def test_calls_that_cannot_be_answered(llama: Any, acts: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"nobody says how long an answer may be.*Generate\(max_new_tokens=…\)"):
        run(llama, PROMPTS, acts, lz.Generate())
    with pytest.raises(InvalidArgumentError, match="n=2 answers per prompt"):
        run(llama, PROMPTS, acts, lz.Generate(max_new_tokens=4, n=2))
    with pytest.raises(InvalidTypeError, match=r"generate is a dict: give lz.Generate"):
        run(llama, PROMPTS, acts, {"max_new_tokens": 4})
    for size in ({"batch_tokens": "all"}, {"batch_prompts": 0}):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(size))}=.* is no number of"):
            run(llama, PROMPTS, acts, SAMPLED, **size)
    with pytest.raises(InvalidArgumentError, match="pairs of texts"):
        run(llama, [("a", "b")], acts, SAMPLED)
    with pytest.raises(InvalidArgumentError, match="coords names 'completion'"):
        run(llama, ["a"], acts, SAMPLED, coords={"completion": ["x"]})
    with pytest.raises(InvalidArgumentError, match="does not predict the next token"):
        encoder = tiny_model("bert", "AutoModelForMaskedLM")
        run(encoder, ["a"], acts, SAMPLED, tokenizer=tiny_tokenizer(encoder=True))
    with pytest.raises(InvalidArgumentError, match="has no head"):
        run(tiny_model("llama"), ["a"], acts, SAMPLED)
    t5 = random_model(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, num_layers=2, d_ff=48, num_heads=4, d_kv=8
    )
    with pytest.raises(InvalidArgumentError, match=r"encoder-decoder|does not predict the next token"):
        run(t5, ["a"], acts, SAMPLED)
    assert not acts.groups()


def test_a_prompt_that_leaves_no_room_for_its_answer(acts: Store) -> None:
    model = tiny_model("gpt2", "AutoModelForCausalLM")  # whose positions are a table of 128
    ids = [list(range(10, 110))]
    with pytest.raises(
        PromptTooLongError, match=r"prompts\[0\].*has 100 tokens, and an answer of 29 more would go beyond the limit of 128"
    ):
        run(model, ids, acts, lz.Generate(max_new_tokens=29))
    run(model, ids, acts, lz.Generate(max_new_tokens=28))
    assert acts.dataset("m").prompt_length.item() == 128


def test_a_column_of_another_kind_is_in_the_way_before_anything_is_generated(llama: Any, acts: Store) -> None:
    tokenizer = tiny_tokenizer()
    lz.extract(llama, ["a"], store=acts, name="m", tokenizer=tokenizer, coords={"generation_seed": ["x"]}, device="cpu", progress=False)
    with no_generating(), pytest.raises(InvalidArgumentError, match="column 'generation_seed' holds texts, and these are integers"):
        run(llama, ["a"], acts, SAMPLED)


# -------------------------------------------------------------------------------------------------------------- the command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, store = saved(tmp_path / "m"), tmp_path / "acts"
    (tmp_path / "prompts.txt").write_text("\n".join(("Who?", "the fox")))
    arguments = ["extract", str(folder), str(tmp_path / "prompts.txt"), "--store", str(store), "--device", "cpu", "--json"]
    options = ["--generate", "--max-new-tokens", "4", "--temperature", "1.5", "--seed", "3", "-n", "2", "--top-k", "20", "--top-p", "0.9"]
    options += ["--generation-settings", '{"min_new_tokens": 2}']
    code, out, _ = call(capsys, *arguments, *options, "--dry-run")
    assert (code, json.loads(out)["to_generate"]) == (0, 4)
    code, out, _ = call(capsys, *arguments, *options)
    assert (code, json.loads(out)["generated"]) == (0, 4)
    assert json.loads(call(capsys, *arguments, *options)[1])["found"] == 4
    generate = lz.Generate(max_new_tokens=4, temperature=1.5, seed=3, n=2, top_k=20, top_p=0.9, settings={"min_new_tokens": 2})
    with no_loading():
        assert run(folder, ["Who?", "the fox"], lz.open_store(store), generate).found == 4
    for bad, message in (
        (["--temperature", "1"], "--temperature is for answers: add --generate"),
        (["-n", "2"], "--samples is for answers"),
        (["--generate", "--temperature", "-1"], "--temperature -1.0 is no number"),
    ):
        code, _, err = call(capsys, *arguments, *bad)
        assert code != 0
        assert message in err
