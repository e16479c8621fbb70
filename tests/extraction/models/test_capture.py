"""What is extracted is what the model computes: against the same model run one prompt at a time without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded_models import Array, Scarce, by_prompt, checked_from, loaded_from
from tiny_models import PROMPTS, TINY, save_tiny, tiny_model, tiny_tokenizer

from lmprobe_zarr.batch.pooling import POOLINGS, pool_ragged
from lmprobe_zarr.batch.sites import SITES, row_bytes
from lmprobe_zarr.errors import DeviceMemoryError, InvalidArgumentError, LayerOutOfRangeError, UnknownArchitectureError
from lmprobe_zarr.extraction import models as extraction
from lmprobe_zarr.extraction.models import parse_prompts, tokenize

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch.set_num_threads(1)
pytestmark = pytest.mark.model

# What adds to the residual stream, written down again by hand: path in the block, and which output counts.
ADDERS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox_sequential": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "opt_post_norm": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon_alibi": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon_new": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mixtral": ("self_attn.o_proj", "mlp"),
    "qwen2_moe": ("self_attn.o_proj", "mlp"),
    "qwen3_moe": ("self_attn.o_proj", "mlp"),
    "deepseek_v2": ("self_attn.o_proj", "mlp"),
    "deepseek_v3": ("self_attn.o_proj", "mlp"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "xlm_roberta": ("attention.output.dense", "output.dense"),
}
PRE_NORM = [kind for kind in TINY if kind not in {"bert", "roberta", "xlm_roberta", "opt_post_norm"}]


@contextmanager
def listening(module: Any, keep: Callable[[Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _m, _a, output: keep(output[0] if isinstance(output, tuple) else output))
    try:
        yield
    finally:
        handle.remove()


def blocks_of(kind: str, model: Any) -> Any:
    if kind in {"bert", "roberta", "xlm_roberta"}:
        return model.encoder.layer
    if kind.startswith("opt"):
        return model.decoder.layers
    return model.h if kind == "gpt2" or kind.startswith("falcon") else model.layers


def alone(kind: str, model: Any, ids: Array) -> dict[str, Array]:
    """The truth: one prompt, no padding, transformers' own hidden states and hooks of this test's own."""
    blocks = blocks_of(kind, model)
    attn_path, mlp_path = ADDERS.get(kind, ("self_attn.o_proj", "mlp.down_proj"))
    if kind == "mixtral" and not hasattr(blocks[0], "mlp"):
        mlp_path = "block_sparse_moe"  # its name before transformers 5
    heard: dict[str, list[Any]] = {"attn": [], "mlp": [], "last": []}
    handles = [listening(blocks[-1], heard["last"].append)]
    for block in blocks:
        handles.append(listening(block.get_submodule(attn_path), lambda out: heard["attn"].append(out.clone())))
        handles.append(listening(block.get_submodule(mlp_path), lambda out: heard["mlp"].append(out.clone())))
    for handle in handles:
        handle.__enter__()
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
    for handle in handles:
        handle.__exit__(None, None, None)
    width = states[0].shape[-1]
    return {
        "resid": torch.stack([*states[1:-1], heard["last"][0]])[:, 0].numpy(),
        "embed": states[0][0].numpy(),
        "attn": torch.stack([out.reshape(-1, width) for out in heard["attn"]]).numpy(),
        "mlp": torch.stack([out.reshape(-1, width) for out in heard["mlp"]]).numpy(),
    }


@pytest.fixture(scope="session")
def saved(tiny_models: Callable[[str], Path]) -> Callable[[str], Path]:
    return tiny_models


@pytest.mark.few(6)
@pytest.mark.parametrize("kind", TINY)
def test_every_site_is_what_the_model_computes_for_the_prompt_alone(kind: str, saved: Callable[[str], Path]) -> None:
    for side, budget in (("left", 1), ("right", 120), ("left", 10**6)):
        loaded = extraction.load_model(saved(kind), device="cpu")
        loaded.tokenizer.padding_side = side
        tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer, context_length=loaded.context_length)
        assert tokenized.lengths.max() > 16  # longer than the sliding windows
        options: dict[str, Any] = {"sites": SITES, "poolings": POOLINGS, "keep_tokens": True, "batch_tokens": budget}
        found = by_prompt(list(extraction.run(loaded, tokenized, **options)))
        assert set(found) == set(tokenized.sha256)
        ends = np.cumsum(tokenized.lengths)
        for row, digest in enumerate(tokenized.sha256):
            ids = tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]]
            truth = alone(kind, loaded.module, ids)
            mine = found[digest]
            assert mine["token_id"].tolist() == ids.tolist()
            assert mine["position"].tolist() == list(range(len(ids)))
            for site in SITES:
                assert mine[site].dtype == np.float32
                assert mine[site].shape == truth[site].shape
                np.testing.assert_allclose(mine[site], truth[site], rtol=0, atol=1e-5, err_msg=f"{kind} {site} {side} {budget}")
                for pooling in POOLINGS:
                    by_hand = pool_ragged(mine[site], [len(ids)], pooling)[..., 0, :]
                    np.testing.assert_allclose(mine[f"{site}_{pooling}"], by_hand, rtol=1e-5, atol=1e-6, err_msg=f"{kind} {site} {pooling}")


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", PRE_NORM)
def test_attn_and_mlp_are_what_is_added_to_the_residual_stream(kind: str) -> None:
    loaded = loaded_from(tiny_model(kind))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    for batch in extraction.run(loaded, tokenized, sites=SITES, poolings=(), keep_tokens=True):
        before = np.concatenate([batch.tokens["embed"][None], batch.tokens["resid"][:-1]])
        np.testing.assert_allclose(before + batch.tokens["attn"] + batch.tokens["mlp"], batch.tokens["resid"], rtol=0, atol=1e-5)


def test_pooled_values_are_the_same_without_keeping_tokens() -> None:
    loaded = loaded_from(tiny_model("llama"))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    full = by_prompt(list(extraction.run(loaded, tokenized, poolings=POOLINGS, keep_tokens=True)))
    batches = list(extraction.run(loaded, tokenized, poolings=POOLINGS, keep_tokens=False))
    assert all(batch.n_tokens is None and not batch.tokens and not batch.token_columns for batch in batches)
    for digest, values in by_prompt(batches).items():
        for pooling in POOLINGS:
            assert np.array_equal(values[f"resid_{pooling}"], full[digest][f"resid_{pooling}"])


def test_a_subset_of_layers_stops_after_the_deepest_one() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    calls = [0] * 4
    head = [0]

    def counting(layer: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[layer] += 1

        return count

    def count_head(*_: Any) -> None:
        head[0] += 1

    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    whole = by_prompt(list(extraction.run(loaded, tokenized, layers="all")))
    for layer, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_pre_hook(counting(layer))
    model.lm_head.register_forward_pre_hook(count_head)
    batches = list(extraction.run(loaded, tokenized, layers=[2, 0], batch_tokens=10**6))
    assert batches[0].layers == (0, 2)
    assert calls == [1, 1, 1, 0]
    for digest, values in by_prompt(batches).items():
        assert np.array_equal(values["resid_last_token"], whole[digest]["resid_last_token"][[0, 2]])
    list(extraction.run(loaded, tokenized, sites="embed", batch_tokens=10**6))
    assert calls == [1, 1, 1, 0]
    list(extraction.run(loaded, tokenized, sites=("embed", "attn"), layers=-1, batch_tokens=10**6))
    assert calls == [2, 2, 2, 1]
    assert head == [0]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("opt", "AutoModelForCausalLM"),
        ("qwen3", "AutoModelForSequenceClassification"),
        ("bert", "AutoModelForSequenceClassification"),
        ("roberta", "AutoModelForMaskedLM"),
    ],
)
def test_a_model_with_a_head_gives_what_its_base_gives_and_the_head_never_runs(kind: str, head: str) -> None:
    model = tiny_model(kind, head)
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    ran: list[str] = []
    for name, module in model.named_modules():
        if id(module) not in inside:
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    encoder = TINY[kind].encoder
    one, other = (checked_from(m, encoder=encoder) for m in (model, base))
    ran.clear()  # the check compares the captured pass with that of the whole model
    tokenized = tokenize(parse_prompts(PROMPTS), one.tokenizer)
    mine, truth = (by_prompt(list(extraction.run(m, tokenized))) for m in (one, other))
    assert all(np.array_equal(mine[digest]["resid_last_token"], truth[digest]["resid_last_token"]) for digest in truth)
    assert ran == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_bfloat16_values_come_exactly_as_float32(kind: str, tmp_path: Path) -> None:
    loaded = extraction.load_model(save_tiny(kind, tmp_path / kind, dtype="bfloat16"), device="cpu")
    assert loaded.dtype == loaded.provenance["compute_dtype"] == "bfloat16"
    tokenized = tokenize(parse_prompts(PROMPTS[:1]), loaded.tokenizer)
    (batch,) = extraction.run(loaded, tokenized, layers=1, poolings="max", keep_tokens=True)
    heard: list[Any] = []
    with listening(loaded.located.blocks[1], heard.append), torch.no_grad():
        loaded.module(input_ids=torch.from_numpy(tokenized.token_ids)[None])
    assert heard[0].dtype == torch.bfloat16
    assert batch.stored_dtype == {"resid": "bfloat16", "resid_max": "bfloat16"}
    assert batch.tokens["resid"].dtype == np.float32
    assert np.array_equal(batch.tokens["resid"][0], heard[0][0].float().numpy())
    assert np.array_equal(batch.prompts["resid_max"][0, 0], heard[0][0].float().numpy().max(0))
    assert not (batch.tokens["resid"].view(np.uint32) & 0xFFFF).any()


def test_float16_and_float64_stay_as_they_are() -> None:
    for name in ("float16", "float64"):
        loaded = loaded_from(tiny_model("llama").to(getattr(torch, name)))
        (batch,) = extraction.run(loaded, tokenize(parse_prompts(["Who?"]), loaded.tokenizer), poolings=POOLINGS, keep_tokens=True)
        assert {array.dtype.name for array in (*batch.tokens.values(), *batch.prompts.values())} == {name}
        assert batch.stored_dtype == {}


def test_the_mean_of_float16_is_summed_in_float32() -> None:
    model = tiny_model("llama").half()
    loaded = checked_from(model)
    handle = model.layers[0].register_forward_hook(lambda *_: torch.full((1, 100, 32), 3000.0, dtype=torch.float16))
    tokenized = tokenize(parse_prompts([[5] * 100]), loaded.tokenizer)
    (batch,) = extraction.run(loaded, tokenized, layers=0, poolings="mean")
    handle.remove()
    assert (batch.prompts["resid_mean"] == 3000).all()


@pytest.mark.parametrize(
    "error",
    [lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), lambda: RuntimeError("MPS backend out of memory (MPS …)")],
)
def test_out_of_memory_halves_the_batch_and_the_run_goes_on(error: Callable[[], Exception]) -> None:
    model = tiny_model("llama")
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts([f"prompt number {n} of the fox" for n in range(40)]), loaded.tokenizer)
    truth = by_prompt(list(extraction.run(loaded, tokenized)))
    scarce = Scarce(model, 100, error)
    seen: list[tuple[int, int]] = []
    found = by_prompt(list(extraction.run(loaded, tokenized, batch_tokens=700, progress=lambda p, t: seen.append((p, t)))))
    assert scarce.failed == 3  # 700, 350, 175, 87: the budget stays halved, so nothing fails again
    assert max(rows * longest for rows, longest in scarce.shapes) > 43
    assert set(found) == set(truth)
    for digest in truth:
        np.testing.assert_allclose(found[digest]["resid_last_token"], truth[digest]["resid_last_token"], atol=1e-5)
    assert sum(p for p, _ in seen) == 40
    assert sum(t for _, t in seen) == tokenized.num_tokens


def test_a_single_prompt_that_does_not_fit_is_named() -> None:
    model = tiny_model("llama")
    loaded = checked_from(model)
    Scarce(model, 15, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    tokenized = tokenize(parse_prompts(["Who?", PROMPTS[2]]), loaded.tokenizer)
    with pytest.raises(DeviceMemoryError, match=r"prompts\[1\] 'A model is run over") as caught:
        list(extraction.run(loaded, tokenized))
    assert isinstance(caught.value, MemoryError)


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory() -> None:
    model = tiny_model("llama")
    loaded = checked_from(model)
    Scarce(model, 0, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        list(extraction.run(loaded, tokenize(parse_prompts(["a"]), loaded.tokenizer)))


def test_no_hook_mode_or_setting_is_left_on_a_callers_model() -> None:
    model = tiny_model("llama", "AutoModelForCausalLM")
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()
    loaded = loaded_from(model)
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    going = extraction.run(loaded, tokenized, batch_tokens=1, sites=SITES)
    next(going)
    assert [module.training for module in model.modules()] == modes  # between batches too
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    list(going)
    Scarce(model.model, 0, lambda: ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        list(extraction.run(loaded, tokenized))
    assert [module.training for module in model.modules()] == modes
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert model.config.to_dict() == config


def test_dropout_is_off_while_a_model_in_training_mode_is_extracted() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5)
    tokenizer = tiny_tokenizer()
    tokenized = tokenize(parse_prompts(PROMPTS), tokenizer)
    calm = by_prompt(list(extraction.run(loaded_from(model), tokenized)))
    wild = by_prompt(list(extraction.run(loaded_from(model.train()), tokenized)))
    assert all(np.array_equal(calm[digest]["resid_last_token"], wild[digest]["resid_last_token"]) for digest in calm)


def test_batches_keep_to_the_budget_and_start_with_the_longest() -> None:
    model = tiny_model("gpt2")
    loaded = checked_from(model)
    scarce = Scarce(model, 10**9, RuntimeError)
    rng = np.random.default_rng(0)
    tokenized = tokenize(parse_prompts([rng.integers(4, 300, n) for n in rng.integers(1, 60, 50)]), loaded.tokenizer)
    batches = list(extraction.run(loaded, tokenized, batch_tokens=100))
    assert all(rows * longest <= 100 for rows, longest in scarce.shapes)
    assert [longest for _, longest in scarce.shapes] == sorted((longest for _, longest in scarce.shapes), reverse=True)
    assert scarce.shapes[0][1] == tokenized.lengths.max()
    padded = sum(rows * longest for rows, longest in scarce.shapes)
    assert padded < 1.1 * tokenized.num_tokens
    assert sum(len(batch.sha256) for batch in batches) == 50


def test_a_prompt_longer_than_the_budget_is_run_alone() -> None:
    loaded = loaded_from(tiny_model("llama"))
    batches = list(extraction.run(loaded, tokenize(parse_prompts(PROMPTS), loaded.tokenizer), batch_tokens=1))
    assert [len(batch.sha256) for batch in batches] == [1] * len(PROMPTS)


def test_prompts_past_the_window_of_a_dynamic_rope_share_no_batch_with_others(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    loaded = loaded_from(tiny_model("llama", max_position_embeddings=16, rope_parameters=rope))
    tokenized = tokenize(parse_prompts([[9] * n for n in (30, 4, 40, 12, 30)] + [[8] * 30]), loaded.tokenizer)
    found = by_prompt(list(extraction.run(loaded, tokenized, batch_tokens=10**6, keep_tokens=True)))
    ends = np.cumsum(tokenized.lengths)
    for row, digest in enumerate(tokenized.sha256):
        fresh = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
        ids = tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]]
        np.testing.assert_allclose(found[digest]["resid"], alone("llama", fresh, ids)["resid"], atol=1e-5)


def test_what_a_row_weighs_is_what_comes_out() -> None:
    loaded = loaded_from(tiny_model("llama").to(torch.bfloat16))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    options: dict[str, Any] = {"sites": ("resid", "embed"), "keep_tokens": True}
    batches = list(extraction.run(loaded, tokenized, layers=[0, 3], poolings=("mean", "max"), **options))
    weight = row_bytes(layers=2, hidden_size=32, dtype="bfloat16", pooling=("mean", "max"), **options)
    assert weight.total(len(tokenized), tokenized.num_tokens) == sum(batch.nbytes for batch in batches)
    assert (weight.dtype, weight.source_dtype) == ("float32", "bfloat16")


def test_bad_arguments_are_errors_at_once() -> None:
    loaded = loaded_from(tiny_model("llama"))
    tokenized = tokenize(parse_prompts(["a"]), loaded.tokenizer)
    with pytest.raises(LayerOutOfRangeError, match="4 layers"):
        extraction.run(loaded, tokenized, layers=4)
    with pytest.raises(InvalidArgumentError, match="unknown site 'resid_pre'"):
        extraction.run(loaded, tokenized, sites=("resid_pre",))
    with pytest.raises(InvalidArgumentError, match="unknown pooling 'median'"):
        extraction.run(loaded, tokenized, poolings="median")
    with pytest.raises(InvalidArgumentError, match="nothing would be kept"):
        extraction.run(loaded, tokenized, poolings=())
    with pytest.raises(InvalidArgumentError, match="batch_tokens=0"):
        extraction.run(loaded, tokenized, batch_tokens=0)


def test_blocks_that_are_not_found_are_listed_and_can_be_named_by_hand() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=3, n_head=4)).eval()

    class Doubled(torch.nn.Module):  # type: ignore[misc,name-defined]
        """What goes into a block is not what came out of the one before it."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = torch.nn.Module()
            self.transformer.h = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.embed = torch.nn.Embedding(300, 8)

        def forward(self, input_ids: Any) -> Any:
            hidden = self.embed(input_ids)
            for block in self.transformer.h:
                hidden = 2 * block(hidden)
            return hidden

    with pytest.raises(UnknownArchitectureError) as caught:
        loaded_from(Doubled())
    assert "'transformer.h' (3 modules)" in str(caught.value)
    assert "is not what came out of the one before it" in str(caught.value)
    assert "modules={'layers': 'model.layers'" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    tokenizer = tiny_tokenizer()
    tokenized = tokenize(parse_prompts(PROMPTS), tokenizer)
    named = loaded_from(model, modules={"layers": "transformer.h", "attn": "self_attention", "mlp": "mlp"})
    found = by_prompt(list(extraction.run(named, tokenized, sites=("resid", "attn"), poolings=(), keep_tokens=True)))
    ends = np.cumsum(tokenized.lengths)
    for row, digest in enumerate(tokenized.sha256):
        ids = torch.from_numpy(tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]])[None]
        heard: list[Any] = []
        with listening(model.transformer.h[2], heard.append), torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(found[digest]["resid"], torch.stack([*states[1:-1], heard[0]])[:, 0].numpy(), atol=1e-5)
    only_layers = loaded_from(model, modules={"layers": "transformer.h"})
    assert only_layers.located.mlp is not None  # these blocks are found anyway, and their sites with them
    part = loaded_from(model, modules={"layers": "transformer.h", "attn": "input_layernorm"})
    with pytest.raises(UnknownArchitectureError, match="site 'mlp'"):
        extraction.run(part, tokenized, sites="mlp")
    with pytest.raises(UnknownArchitectureError, match=r"transformer\.blocks"):
        loaded_from(model, modules={"layers": "transformer.blocks"})
    with pytest.raises(UnknownArchitectureError, match="a block holds"):
        loaded_from(model, modules={"layers": "transformer.h", "attn": "attention"})
    with pytest.raises(InvalidArgumentError, match="heads"):
        loaded_from(model, modules={"layers": "transformer.h", "heads": "x"})


def test_any_torch_module_can_be_extracted_when_its_layers_are_named() -> None:
    class Plain(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(300, 8)
            self.blocks = torch.nn.ModuleList(torch.nn.GRU(8, 8, batch_first=True) for _ in range(2))

        def forward(self, input_ids: Any) -> Any:
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden, _ = block(hidden)
            return hidden

    model = Plain()
    loaded = loaded_from(model, modules={"layers": "blocks"})
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    found = by_prompt(list(extraction.run(loaded, tokenized, poolings="last_token")))
    ends = np.cumsum(tokenized.lengths)
    for row, digest in enumerate(tokenized.sha256):
        with torch.no_grad():
            truth = model(torch.from_numpy(tokenized.token_ids[ends[row] - tokenized.lengths[row] : ends[row]])[None])
        np.testing.assert_allclose(found[digest]["resid_last_token"][1], truth[0, -1].numpy(), atol=1e-6)


def test_a_model_spread_over_devices_is_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    loaded = loaded_from(tiny_model("llama"))
    tokenized = tokenize(parse_prompts(PROMPTS), loaded.tokenizer)
    truth = by_prompt(list(extraction.run(loaded, tokenized, sites=("resid", "embed"))))
    found = by_prompt(list(extraction.run(dataclasses.replace(loaded, spread=True), tokenized, sites=("resid", "embed"))))
    assert all(np.array_equal(found[d][name], truth[d][name]) for d in truth for name in truth[d])
