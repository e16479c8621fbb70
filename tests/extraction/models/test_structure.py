"""Blocks and sites found by structure: what `locate` finds, and that the values are what is added to the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from loaded_models import by_prompt, checked_from, loaded_from  # noqa: E402 — after the skips
from tiny_models import GROUPED, IDS, SIZES, TINY, random_model, tiny_model, tiny_tokenizer  # noqa: E402

import lmprobe_zarr as lz  # noqa: E402
from lmprobe_zarr.batch import Outputs, parse_prompts  # noqa: E402
from lmprobe_zarr.errors import InvalidArgumentError, UnknownArchitectureError  # noqa: E402
from lmprobe_zarr.extraction import models as extraction  # noqa: E402
from lmprobe_zarr.extraction.models import architectures  # noqa: E402
from lmprobe_zarr.extraction.models.architectures import locate  # noqa: E402
from lmprobe_zarr.store import Store, describe_view  # noqa: E402

# transformers 4 warns of a setting that its own Cohere 2 reads.
pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:The `sliding_window_pattern` attribute:FutureWarning")]

IDS_PROMPTS = [[7, 9, 11, 30, 41], [12, 5], [9, 8, 7, 6, 5, 4, 33]]


@pytest.mark.few(9)
@pytest.mark.parametrize("kind", sorted(TINY))
def test_the_values_of_a_pass_show_the_same_modules_as_the_names_of_known_families(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind)
    named = locate(model)
    monkeypatch.setattr(architectures, "BY_TYPE", {})
    seen = locate(model)
    assert seen.body is named.body
    assert seen.blocks == named.blocks
    assert seen.attn == named.attn
    assert seen.mlp == named.mlp
    assert {layer: router.gate for layer, router in seen.routers.items()} == {layer: router.gate for layer, router in named.routers.items()}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("GraniteModel", "GraniteConfig", {**GROUPED, "residual_multiplier": 0.3}),
        ("Glm4Model", "Glm4Config", {**GROUPED, "head_dim": 8}),
        ("Olmo3Model", "Olmo3Config", {**GROUPED, "sliding_window": 4}),
        ("Cohere2Model", "Cohere2Config", {**GROUPED, "sliding_window": 4}),
        ("BloomModel", "BloomConfig", {"vocab_size": 300, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
        ("GPTJModel", "GPTJConfig", {"vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 128}),
        ("StableLmModel", "StableLmConfig", GROUPED),
        ("GptOssModel", "GptOssConfig", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_attn_and_mlp_are_what_is_added_to_the_residual_stream(name: str, config: str, options: dict[str, Any]) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    loaded = loaded_from(random_model(name, config, **options), prompts_kind="ids")
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    sites = ("resid", "attn", "mlp", "embed")
    for values in by_prompt(list(extraction.run(loaded, tokenized, sites=sites, poolings=(), keep_tokens=True))).values():
        stream = np.concatenate([values["embed"][None], values["resid"][:-1]]).astype(np.float64)
        np.testing.assert_allclose(values["resid"], stream + values["attn"] + values["mlp"], rtol=0, atol=1e-5 * np.abs(stream).max())


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("multiplier", [1.0, 0.95, 0.93, 0.22, 1.5])
def test_a_constant_before_the_sum_is_known_in_any_precision(multiplier: float, dtype: str) -> None:
    options = {**GROUPED, "residual_multiplier": multiplier}
    located = locate(random_model("GraniteModel", "GraniteConfig", **options).to(getattr(torch, dtype)))
    assert located.attn is not None
    assert located.mlp is not None
    assert [site.scale for site in (*located.attn.values(), *located.mlp.values())] == [multiplier] * 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_factor_that_16_bits_do_not_show_exactly_is_not_guessed(dtype: str) -> None:
    options = {**GROUPED, "residual_multiplier": 0.93}
    model = random_model("GraniteModel", "GraniteConfig", **options).to(getattr(torch, dtype))
    model.config.residual_multiplier = 7.0  # what the blocks multiply by is theirs alone now
    located = locate(model)
    assert located.attn is None
    assert located.mlp is None
    assert len(located.blocks) == 4


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", sorted(TINY))
def test_bfloat16_shows_the_same_modules_as_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "BY_TYPE", {})
    assert locate(tiny_model(kind).to(torch.bfloat16)).paths == locate(tiny_model(kind)).paths


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("DistilBertModel", "DistilBertConfig", {"vocab_size": 300, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
        ("ElectraModel", "ElectraConfig", {**SIZES, "embedding_size": 16}),
        ("OpenAIGPTModel", "OpenAIGPTConfig", {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    ],
)
def test_in_post_norm_blocks_attn_and_mlp_are_added_before_the_norm(name: str, config: str, options: dict[str, Any]) -> None:
    located = locate(random_model(name, config, **options))
    assert located.attn is not None
    assert located.mlp is not None
    for site in (*located.attn.values(), *located.mlp.values()):
        assert not isinstance(site.module, torch.nn.LayerNorm | torch.nn.Dropout)


def hybrid() -> Any:
    sizes = {**GROUPED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2}
    rest = {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return random_model("Qwen3NextModel", "Qwen3NextConfig", **sizes, **rest, **experts)


def test_a_hybrid_has_one_attn_site_over_all_layers_and_a_coordinate_names_the_mixer_of_each(tmp_path: Any) -> None:
    if not hasattr(transformers, "Qwen3NextModel"):
        pytest.skip("no Qwen 3 Next")
    model = hybrid()
    store: Store = lz.open_store(tmp_path / "acts", durable=False)
    loaded = loaded_from(model)
    plan = lz.plan_extract(model, IDS_PROMPTS, store=store, name="m", tokenizer=loaded.tokenizer, sites=("resid", "attn"))
    assert "attn=linear_attn | self_attn" in str(plan)
    lz.extract(
        model, IDS_PROMPTS, store=store, name="m", tokenizer=loaded.tokenizer, sites=("resid", "attn"), keep_tokens=True, progress=False
    )
    data = store.tokens("m")
    assert data.mixer.values.tolist() == ["linear_attn", "self_attn"] * 2
    assert data.isel(layer=data.mixer == "linear_attn").layer.values.tolist() == [0, 2]
    assert store.dataset("m").mixer.dims == ("layer",)
    (group,) = store.groups().values()
    assert describe_view(store.view(group)).facts()["modules"].endswith("attn=linear_attn | self_attn, mlp=mlp, router=mlp.gate")
    heard: list[Any] = []
    handle = model.layers[2].linear_attn.register_forward_hook(lambda _m, _a, output: heard.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS_PROMPTS[0]]), use_cache=False)
    handle.remove()
    rows = data.attn.sel(layer=2).values
    assert any(np.allclose(rows[start : start + 5], heard[0][0].numpy(), atol=1e-5) for start in range(len(rows) - 4))


# --------------------------------------------------------------------------------------- blocks that are called more than once


def merged(order: list[int]) -> Any:
    """A Llama whose blocks are repeated in memory, as merges of a model with itself are."""
    model = random_model("LlamaModel", "LlamaConfig", **GROUPED)
    blocks = list(model.layers)
    model.layers = torch.nn.ModuleList([blocks[i] for i in order])
    model.config.num_hidden_layers = len(order)
    return model


def states_of(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


@pytest.mark.few(1)
@pytest.mark.parametrize("order", [[0, 1, 2, 1, 2, 3], [0, 0, 1, 1], [3, 2, 3, 2, 3]])
@pytest.mark.parametrize("layers", ["all", 1, -2])
def test_a_repeated_block_is_one_layer_for_each_of_its_places(order: list[int], layers: Any) -> None:
    model = merged(order)
    loaded = checked_from(model)
    assert loaded.num_layers == len(order)
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    for sites in (("resid",), ("resid", "attn")):
        batches = list(extraction.run(loaded, tokenized, layers=layers, sites=sites, poolings=(), keep_tokens=True))
        for batch in batches:
            ends = np.cumsum(np.asarray(batch.n_tokens))
            for row, digest in enumerate(batch.sha256):
                ids = IDS_PROMPTS[int(tokenized.first[list(tokenized.sha256).index(digest)])]
                truth = states_of(model, ids)
                for place, layer in enumerate(batch.layers):
                    if layer < len(order) - 1:  # transformers norms the last
                        found = batch.tokens["resid"][place, ends[row] - len(ids) : ends[row]]
                        np.testing.assert_allclose(found, truth[layer + 1][0].numpy(), atol=1e-4)


def test_albert_has_a_layer_for_each_call_of_its_shared_block() -> None:
    model = random_model("AlbertModel", "AlbertConfig", **{**SIZES, "embedding_size": 16, "num_hidden_layers": 5})
    loaded = loaded_from(model, encoder=True)
    assert loaded.num_layers == 5
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    found = by_prompt(list(extraction.run(loaded, tokenized, poolings=(), keep_tokens=True)))
    for digest, values in found.items():
        ids = IDS_PROMPTS[int(tokenized.first[list(tokenized.sha256).index(digest)])]
        np.testing.assert_allclose(values["resid"], torch.stack(states_of(model, ids)[1:])[:, 0].numpy(), atol=1e-5)


def test_a_layer_of_a_looped_model_is_the_same_with_the_head_and_without() -> None:
    if not hasattr(transformers, "HrmTextForCausalLM"):
        pytest.skip("no HRM-Text")
    model = random_model("HrmTextForCausalLM", "HrmTextConfig", **GROUPED)
    loaded = loaded_from(model, modules={"layers": "model.L_module.layers"})
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    plain = by_prompt(list(extraction.run(loaded, tokenized, layers=[0, 2, 5])))
    with_head = by_prompt(list(extraction.run(loaded, tokenized, layers=[0, 2, 5], outputs=Outputs(perplexity=True))))
    for digest, values in plain.items():
        np.testing.assert_allclose(values["resid_last_token"], with_head[digest]["resid_last_token"], atol=1e-6)


# -------------------------------------------------------------------------------------------- encoders, decoders, many media


T5 = {"vocab_size": 300, "d_model": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
BART = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
SEQ2SEQ = [
    ("T5Model", "T5Config", T5),
    ("BartModel", "BartConfig", BART),
]


@pytest.mark.parametrize(("name", "config", "options"), SEQ2SEQ)
def test_of_an_encoder_decoder_the_encoder_is_found(name: str, config: str, options: dict[str, Any]) -> None:
    model = random_model(name, config, **options)
    loaded = loaded_from(model, encoder=True)
    assert loaded.num_layers == 3
    assert loaded.located.paths["layers"].startswith("encoder.")
    tokenized = extraction.tokenize(parse_prompts(IDS_PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    for digest, values in by_prompt(list(extraction.run(loaded, tokenized, poolings=(), keep_tokens=True))).items():
        ids = IDS_PROMPTS[int(tokenized.first[list(tokenized.sha256).index(digest)])]
        with torch.no_grad():
            truth = model.get_encoder()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(values["resid"][:-1], torch.stack(truth[1:-1])[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize(("name", "config", "options"), SEQ2SEQ)
def test_a_decoder_is_not_run_without_its_encoder(name: str, config: str, options: dict[str, Any]) -> None:
    model = random_model(name, config, **options)
    path = "decoder.block" if name == "T5Model" else "decoder.layers"
    for given, layers in ((model, path), (model.get_decoder(), path.partition(".")[2])):
        with pytest.raises(UnknownArchitectureError, match="without the encoder's output its values mean nothing"):
            loaded_from(given, modules={"layers": layers})


def test_both_halves_of_an_encoder_decoder_of_two_models_are_told_apart() -> None:
    small = {**SIZES, "num_hidden_layers": 2}
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**IDS, **small), transformers.BertConfig(**IDS, **{**small, "num_hidden_layers": 3})
    )
    model = transformers.EncoderDecoderModel(config=config).eval()
    assert locate(model).paths["layers"] == "encoder.encoder.layer"
    with pytest.raises(UnknownArchitectureError, match="the decoder of EncoderDecoderModel"):
        locate(model, {"layers": "decoder.bert.encoder.layer"})


def test_a_list_that_is_not_the_blocks_is_refused_with_the_reason() -> None:
    class Parallel(torch.nn.Module):  # type: ignore[misc,name-defined]
        """Two lists side by side, of which neither holds whole blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(300, 8)
            self.attentions = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.ffns = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, input_ids: Any) -> Any:
            hidden = self.embed(input_ids)
            for attention, ffn in zip(self.attentions, self.ffns, strict=True):
                hidden = hidden + attention(hidden)
                hidden = hidden + ffn(hidden)
            return hidden

    with pytest.raises(UnknownArchitectureError, match="is not what came out of the one before it"):
        locate(Parallel())


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "config", "options"), SEQ2SEQ)
def test_a_saved_encoder_decoder_is_extracted_by_its_folder(name: str, config: str, options: dict[str, Any], tmp_path: Any) -> None:
    random_model(name, config, **options).save_pretrained(tmp_path / "model")
    tiny_tokenizer(encoder=True).save_pretrained(tmp_path / "model")
    store = lz.open_store(tmp_path / "acts", durable=False)
    plan = lz.plan_extract(tmp_path / "model", ["Who?"], store=store)
    assert plan.layers == (0, 1, 2)
    stats = lz.extract(tmp_path / "model", ["Who?"], store=store, layers=-1, progress=False)
    assert (stats.extracted, store.dataset("model").layer.values.tolist()) == (1, [2])
    assert lz.extract(tmp_path / "model", ["Who?"], store=store, layers=-1, progress=False).found == 1
    with pytest.raises(InvalidArgumentError, match="an encoder-decoder"):
        lz.extract(tmp_path / "model", ["Who?"], store=store, perplexity=True, progress=False)
