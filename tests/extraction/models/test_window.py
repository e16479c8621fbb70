"""How many tokens a model takes: what is known of it, compared with what transformers' own model does with prompts of that length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded_models import by_prompt, loaded_from
from tiny_models import save_tiny, tiny_model

import lmprobe_zarr as lz
from lmprobe_zarr.errors import PromptTooLongError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import identify, length_limit, parse_prompts, tokenize
from lmprobe_zarr.extraction.models.window import UNKNOWN_WINDOW, Window, refine_window, window_of
from lmprobe_zarr.store import open_store

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

LONG = 48
ORIGINAL = "original_max_position_embeddings"
WINDOW = "max_position_embeddings"
IDS: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
WIDE: dict[str, Any] = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES: dict[str, Any] = {**WIDE, WINDOW: LONG}
GPT: dict[str, Any] = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONG}
PAIRED: dict[str, Any] = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    WINDOW: LONG,
}
T5: dict[str, Any] = {**IDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What is built, and the limit; None where there is none.
FIXED: dict[str, tuple[str, dict[str, Any], int]] = {
    "gpt2": ("GPT2", GPT, LONG),
    "gpt_bigcode": ("GPTBigCode", GPT, LONG),
    "gpt_neo": (
        "GPTNeo",
        {
            **IDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            WINDOW: LONG,
        },
        LONG,
    ),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 8}, LONG),
    "codegen": ("CodeGen", {**GPT, "n_ctx": LONG, "rotary_dim": 8}, LONG),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, LONG),
    "biogpt": ("BioGpt", SIZES, LONG),
    "mpt": ("Mpt", {"vocab_size": 300, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": LONG}, LONG),
    "bert": ("Bert", SIZES, LONG),
    "electra": ("Electra", {**SIZES, "embedding_size": 32}, LONG),
    "deberta_v2": ("DebertaV2", SIZES, LONG),
    "distilbert": ("DistilBert", {**IDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, WINDOW: LONG}, LONG),
    "roberta": ("Roberta", SIZES, LONG - 2),
    "roberta, padding 4": ("Roberta", {**SIZES, "pad_token_id": 4}, LONG - 5),
    "xlm-roberta": ("XLMRoberta", SIZES, LONG - 2),
    "esm": ("Esm", SIZES, LONG - 2),
    "mpnet": ("MPNet", {**SIZES, "pad_token_id": 4}, LONG - 2),
    "bart": ("Bart", PAIRED, LONG),
}
FREE: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "llama": ("Llama", SIZES, LONG),
    "linear": ("Llama", {**SIZES, **rope("linear", factor=2.0)}, 2 * LONG),
    "dynamic": ("Llama", {**SIZES, **rope("dynamic", factor=2.0)}, 2 * LONG),
    "yarn on top": (
        "Qwen2",
        {**SIZES, "num_key_value_heads": 2, **rope("yarn", factor=4.0, original_max_position_embeddings=LONG)},
        4 * LONG,
    ),
    "yarn named": ("Llama", {**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=12)}, LONG),
    "yarn as of Qwen 3": ("Llama", {**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}, 128),
    "llama3": ("Llama", {**SIZES, **rope("llama3", factor=32.0, original_max_position_embeddings=12, **LLAMA3)}, LONG),
    "llama3 on top": ("Llama", {**SIZES, **rope("llama3", factor=2.0, original_max_position_embeddings=LONG, **LLAMA3)}, 2 * LONG),
    "longrope": (
        "Phi3",
        {
            **SIZES,
            ORIGINAL: 16,
            **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
        },
        LONG,
    ),
    "sliding": ("Mistral", {**SIZES, "num_key_value_heads": 2, "sliding_window": 8}, LONG),
    "by kind of layer": (
        "Gemma3Text",
        {
            **SIZES,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, ORIGINAL: LONG},
            },
        },
        4 * LONG,
    ),
    "gpt_neox": ("GPTNeoX", SIZES, LONG),
    "falcon": ("Falcon", SIZES, LONG),
    "falcon alibi": ("Falcon", {**SIZES, "alibi": True, "multi_query": False}, None),
    "bloom": ("Bloom", {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": LONG}, None),
    "deberta_v2 relative": (
        "DebertaV2",
        {**SIZES, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        None,
    ),
    "esm rotary": ("Esm", {**SIZES, "position_embedding_type": "rotary"}, LONG),
    "t5": ("T5", {**T5, "n_positions": LONG}, None),
    "mt5": ("MT5", T5, None),
    "xlnet": ("XLNet", {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, None),
    "mamba": ("Mamba", {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, None),
    "rwkv": ("Rwkv", {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "context_length": LONG}, None),
}


def config_of(kind: str, options: dict[str, Any]) -> Any:
    return getattr(transformers, f"{kind}Config")(**options)


def built(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config_of(kind, options)).eval()


def takes(model: Any, length: int) -> bool:
    """Whether transformers' own model runs a prompt of so many tokens."""
    ids = torch.full((1, length), 7)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :2]} if model.config.is_encoder_decoder else {"input_ids": ids}
    try:
        with torch.no_grad():
            model(**given)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.few(11)
@pytest.mark.parametrize("name", FIXED)
def test_a_table_of_positions_is_a_limit_that_max_length_cannot_lift(name: str) -> None:
    kind, options, limit = FIXED[name]
    window = window_of(config_of(kind, options).to_dict())
    assert window == Window(limit, fixed=True)
    model = built(kind, options)
    assert takes(model, limit)
    assert not takes(model, limit + 1)
    assert length_limit(window, None) == length_limit(window, 10 * limit) == limit
    assert length_limit(window, 5) == 5


@pytest.mark.few(11)
@pytest.mark.parametrize("name", FREE)
def test_a_window_without_a_table_is_known_and_max_length_wins(name: str) -> None:
    kind, options, limit = FREE[name]
    window = window_of(config_of(kind, options).to_dict())
    assert (window.tokens, window.fixed, window.known) == (limit, False if limit else None, True)
    assert takes(built(kind, options), 5 * LONG)
    assert length_limit(window, None) == limit
    assert length_limit(window, 5 * LONG) == 5 * LONG
    assert length_limit(window, 5) == 5


@pytest.mark.parametrize(
    ("config", "window"),
    [
        # As the model cards of Qwen 2.5 and Qwen 3 write it, in the form of older files.
        (
            {WINDOW: 32768, "rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}},
            131072,
        ),
        (
            {WINDOW: 40960, "rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}},
            131072,
        ),
        (
            {WINDOW: 163840, "rope_scaling": {"type": "yarn", "factor": 40, ORIGINAL: 4096}},
            163840,
        ),
        # Llama 3.1 and 3.2: their factor is not that of the window.
        (
            {
                WINDOW: 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, ORIGINAL: 8192},
            },
            131072,
        ),
        # Gemma 3, in both forms: the window beside a linear scaling is the whole.
        ({"model_type": "gemma3_text", WINDOW: 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 131072),
        (
            {
                "model_type": "gemma3_text",
                WINDOW: 131072,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                },
            },
            131072,
        ),
        # Phi-3 with 128k, whose original window is beside the scaling.
        (
            {
                WINDOW: 131072,
                ORIGINAL: 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            },
            131072,
        ),
        ({WINDOW: 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        ({WINDOW: 32768, "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, 32768),
        ({WINDOW: 32768, "sliding_window": 4096, "rope_theta": 10000.0, "rope_scaling": None}, 32768),
        ({WINDOW: 4096, "rope_scaling": {"type": "one of its own", "factor": 2.0}}, 4096),
    ],
)
def test_scalings_of_published_configurations(config: dict[str, Any], window: int) -> None:
    found = window_of({"model_type": "llama", **config})
    assert (found.tokens, found.fixed, found.known) == (window, False, True)


def test_a_configuration_that_names_nothing_leaves_the_window_to_the_tokenizer_and_to_max_length() -> None:
    class Short:
        model_max_length = 77

    class Endless:
        model_max_length = int(1e30)

    assert window_of({"model_type": "mine"}) == UNKNOWN_WINDOW
    assert length_limit(UNKNOWN_WINDOW, None, Short()) == 77
    assert length_limit(UNKNOWN_WINDOW, 200, Short()) == 200
    assert length_limit(UNKNOWN_WINDOW, None, Endless()) is None
    # T5's tokenizers name 512, and T5 takes more.
    assert length_limit(window_of({"model_type": "t5", "n_positions": 512}), None, Short()) is None


def test_whether_a_model_of_an_unknown_type_has_a_table_is_seen_in_the_model() -> None:
    window = window_of({"model_type": "mine", WINDOW: 40})
    assert window == Window(40, fixed=None)
    assert refine_window(window, [300, 40]) == refine_window(window, [42]) == Window(40, fixed=True)
    assert refine_window(window, []) == refine_window(window, [300, 2]) == Window(40, fixed=False)
    assert refine_window(Window(40, fixed=False), [40]) == Window(40, fixed=False)


# ---------------------------------------------------------------- through an extraction

YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)


def resid_alone(model: Any, ids: Any, layer: int) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[layer + 1][0].numpy()


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "options", "max_length"),
    [
        ("qwen2", {WINDOW: 32, **YARN}, None),
        ("llama", {WINDOW: 32}, 200),
        ("llama", {WINDOW: 32, **rope("linear", factor=2.0)}, 200),
        ("llama", {WINDOW: 32, **rope("dynamic", factor=2.0)}, 200),
        ("phi3", {ORIGINAL: 16, **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)}, 200),
        ("mistral", {WINDOW: 32}, 200),
        ("falcon_alibi", {WINDOW: 32}, None),
    ],
)
def test_long_prompts_give_what_transformers_gives(kind: str, options: dict[str, Any], max_length: int | None, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "m", **options)
    store = open_store(tmp_path / "store")
    prompts = [[7 + n % 200 for n in range(length)] for length in (120, 90, 20)]
    stats = lz.extract(folder, prompts, store=store, keep_tokens=True, max_length=max_length, device="cpu", progress=False)
    assert stats.extracted == 3
    tokens = store.tokens("m")
    for prompt in prompts:
        fresh = transformers.AutoModel.from_pretrained(folder).eval()
        right = resid_alone(fresh, np.array(prompt), 1)
        found = tokens.resid.sel(layer=1, prompt=lz.prompt_hash(prompt)).values
        np.testing.assert_allclose(found, right, atol=1e-5)
    assert lz.extract(folder, prompts, store=store, max_length=max_length, keep_tokens=True, progress=False).found == 3


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 128), ("opt", 128), ("bert", 128), ("roberta", 128)])
def test_a_prompt_beyond_a_table_is_refused_with_any_max_length(kind: str, limit: int, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "m")
    store = open_store(tmp_path / "store")
    for max_length in (None, 500):
        with pytest.raises(PromptTooLongError, match=f"has {limit + 1} tokens, but the limit is {limit}: shorten it, or pass truncation"):
            lz.extract(folder, [[9] * (limit + 1)], store=store, max_length=max_length, device="cpu", progress=False)
    assert lz.extract(folder, [[9] * limit], store=store, max_length=500, device="cpu", progress=False).extracted == 1


def test_a_prompt_beyond_the_window_of_rotary_positions_names_max_length(tmp_path: Path) -> None:
    loaded = loaded_from(tiny_model("llama", max_position_embeddings=32))
    with pytest.raises(PromptTooLongError, match="33 tokens, but the limit is 32: shorten it, pass max_length= for a larger one, or pass"):
        tokenize(parse_prompts([[9] * 33]), loaded.tokenizer, context_length=loaded.window)


def test_tokens_beyond_a_table_are_an_error_before_the_model_runs() -> None:
    loaded = loaded_from(tiny_model("gpt2"))
    tokenized = tokenize(parse_prompts([[9], [9] * 129]), loaded.tokenizer)
    with pytest.raises(PromptTooLongError, match=r"prompts\[1\] .* has 129 tokens, but the limit is 128"):
        extraction.run(loaded, tokenized)


@pytest.mark.few(2)
@pytest.mark.parametrize("max_length", [None, 20, 60, 999])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon_alibi", "roberta"])
def test_identify_knows_the_limit_of_truncation_that_the_loaded_model_has(kind: str, max_length: int | None, tmp_path: Path) -> None:
    folder = save_tiny(kind, tmp_path / "m")
    known = identify(folder, max_length=max_length, truncation=True)
    loaded = extraction.load_model(folder, device="cpu", max_length=max_length, truncation=True)
    assert known.provenance["truncation"] == loaded.provenance["truncation"]
    assert known.window == loaded.window
    right = {"llama": max_length or 128, "falcon_alibi": max_length}.get(kind, min(max_length or 128, 128))
    assert loaded.provenance["truncation"] == right


def test_identify_leaves_the_limit_open_where_only_the_model_tells(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "one_of_my_own"}))
    assert "truncation" not in identify(folder, max_length=999, truncation=True).provenance
    assert identify(folder, max_length=20, truncation=True).provenance["truncation"] == 20
    assert identify(folder, truncation=True).provenance["truncation"] == 128


# ---------------------------------------------------------------- scalings that follow the longest prompt

BY_LAYER = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        ORIGINAL: 16,
    },
}


def scaled_models() -> dict[str, tuple[str, dict[str, Any]]]:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, settings in BY_LAYER.items():
        found[name] = ("llama", {WINDOW: 16, "rope_parameters": settings})
        by_layer = {"sliding_attention": plain, "full_attention": settings}
        found[f"{name} by kind of layer"] = ("gemma3", {WINDOW: 16, "rope_parameters": by_layer})
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize("name", scaled_models())
def test_scalings_that_follow_the_longest_prompt_give_every_prompt_what_it_has_alone(name: str) -> None:
    kind, options = scaled_models()[name]
    loaded = loaded_from(tiny_model(kind, **options))
    # In this order, a rotary embedding that kept the longest prompt so far would give the later ones other positions.
    for lengths in ((40, 24, 9, 40, 30), (24, 20), (9,)):
        tokenized = tokenize(parse_prompts([[5 + n + row for n in range(length)] for row, length in enumerate(lengths)]), loaded.tokenizer)
        found = by_prompt(list(extraction.run(loaded, tokenized, batch_tokens=10**6, keep_tokens=True)))
        ends = np.cumsum(tokenized.lengths)
        for row, digest in enumerate(tokenized.sha256):
            ids = tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]]
            right = resid_alone(tiny_model(kind, **options), ids, 2)
            np.testing.assert_allclose(found[digest]["resid"][2], right, atol=1e-5)
