"""The logit lens against the models themselves: own logits at the last layer, norm and head by hand at others; nothing of the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import InvalidArgumentError, InvalidTypeError, LayerOutOfRangeError, ModelNotFoundError, UnknownArchitectureError

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import GROUPED, PROMPTS, SharedModels, random_model, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402

from lmprobe_zarr.extraction.models import load_lens  # noqa: E402

VALUES, IDS, LOG_PROBS, TEXTS = (f"logits_top_k_{name}" for name in ("values", "indices", "log_probs", "texts"))
# Where each architecture has its final norm, to apply it by hand.
NORMS = {
    "llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm",
    "gemma2": "model.norm", "qwen3": "model.norm", "phi": "model.final_layernorm", "mixtral": "model.norm", "falcon": "transformer.ln_f",
    "olmo2": "model.norm", "deepseek_v3": "model.norm",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"gemma2": {"final_logit_softcapping": 2.0}}
# Models that scale their logits, which norm and head by hand would miss.
SCALED = {
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**GROUPED, "logits_scaling": 7.0, "embedding_multiplier": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**GROUPED, "logit_scale": 0.25}),
}


def saved(kind: str, folder: Path) -> Path:
    if kind not in SCALED:
        return save_tiny(kind, folder / kind, head="AutoModelForCausalLM", **OPTIONS.get(kind, {}))
    name, config, options = SCALED[kind]
    random_model(name, config, **options).save_pretrained(folder / kind)
    tiny_tokenizer().save_pretrained(folder / kind)
    return folder / kind


def stored(model: Any, folder: Path, **options: Any) -> lz.Store:
    store = lz.open_store(folder / "acts")
    lz.extract(model, PROMPTS, store=store, pooling=["mean"], keep_tokens=True, device="cpu", progress=False, **options)
    return store


def own_passes(folder: Path) -> tuple[Any, list[Any]]:
    """The model as transformers loads it, and for every prompt what it gives by itself."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [torch.tensor([tiny_tokenizer()(prompt)["input_ids"]]) for prompt in PROMPTS]
    with torch.inference_mode():
        return whole, [whole(input_ids=each, output_hidden_states=True) for each in ids]


def assert_is_top_of(lens: xr.Dataset, logits: Any, *, rtol: float = 1e-5) -> None:
    """The lens of some tokens holds the largest of these logits, (token, vocab)."""
    k = lens.sizes["top_k"]
    logits = logits.float()
    right = logits.topk(k, dim=-1)
    near = rtol * float(logits.abs().max())
    np.testing.assert_allclose(lens[VALUES].values, right.values.numpy(), atol=near, rtol=0)
    # Which of two equal logits comes first is nobody's promise, so each token id has to have its value.
    of_ids = logits.gather(-1, torch.from_numpy(lens[IDS].values).long())
    np.testing.assert_allclose(of_ids.numpy(), right.values.numpy(), atol=near, rtol=0)
    log_probs = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(lens[IDS].values).long())
    np.testing.assert_allclose(lens[LOG_PROBS].values, log_probs.numpy(), atol=10 * near + 1e-5, rtol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [*NORMS, *SCALED])
def test_last_layer_gives_the_models_own_logits_and_others_norm_and_head(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    toks = stored(folder, tmp_path).tokens()
    lens = lz.logit_lens(toks.resid, folder, top_k=4, device="cpu")
    assert lens[VALUES].dims == ("layer", "token", "top_k")
    assert lens[VALUES].shape == (*toks.resid.shape[:2], 4)
    whole, passes = own_passes(folder)
    compared = 0
    for prompt, own in zip(PROMPTS, passes, strict=True):
        of_prompt = lens.sel(prompt=lz.prompt_hash(prompt))
        assert_is_top_of(of_prompt.sel(layer=3), own.logits[0])
        compared += own.logits.shape[1]
        for layer in (0, 2):
            with torch.inference_mode():
                if kind in NORMS:
                    by_hand = whole.get_output_embeddings()(whole.get_submodule(NORMS[kind])(own.hidden_states[layer + 1][0]))
                    cap = OPTIONS.get(kind, {}).get("final_logit_softcapping")
                    by_hand = by_hand if cap is None else cap * torch.tanh(by_hand / cap)
                else:
                    by_hand = whole.get_output_embeddings()(whole.model.norm(own.hidden_states[layer + 1][0]))
                    by_hand = by_hand / 7.0 if kind == "granite" else by_hand * 0.25
            assert_is_top_of(of_prompt.sel(layer=layer), by_hand)
    assert compared == toks.sizes["token"]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "granite"])
def test_blocks_of_a_named_model_are_not_loaded(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    lens = load_lens(folder, device="cpu")
    assert (lens.num_layers, len(lens.loaded.located.blocks)) == (4, 2)
    whole = load_lens(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    assert (whole.num_layers, len(whole.loaded.located.blocks)) == (4, 4)
    rows = np.random.default_rng(0).standard_normal((40, 32), dtype=np.float32)
    for found, right in zip(lens.top(rows, 5), whole.top(rows, 5), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6)


def test_no_report_of_the_blocks_that_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_lens(saved("qwen3", tmp_path), device="cpu")
    assert "UNEXPECTED" not in caplog.text


def test_a_model_whose_configuration_cannot_be_cut_is_loaded_whole(tmp_path: Path) -> None:
    # The last blocks take keys and values of earlier ones, of which two would be too few.
    options = {
        **GROUPED, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 2.0,
    }  # fmt: skip
    folder = tmp_path / "gemma4"
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this version of transformers has no Gemma 4")
    random_model("Gemma4ForCausalLM", "Gemma4TextConfig", **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    lens = load_lens(folder, device="cpu")
    assert (lens.num_layers, len(lens.loaded.located.blocks)) == (4, 4)
    whole, passes = own_passes(folder)
    own, rows = passes[0].logits[0], list[Any]()
    whole.get_submodule("model.layers.3").register_forward_hook(lambda _m, _a, out: rows.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        whole(input_ids=torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]]))
    np.testing.assert_allclose(lens.top(rows[0][0].numpy(), 3)[0], own.topk(3, dim=-1).values.numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lz.Store]:
    folder = tmp_path_factory.mktemp("lens")
    return saved("llama", folder), stored(saved("llama", folder), folder)


def test_pooled_rows_selections_and_single_rows(llama: tuple[Path, lz.Store]) -> None:
    folder, store = llama
    toks, ds = store.tokens(), store.dataset()
    every = lz.logit_lens(toks.resid, folder, device="cpu")
    assert every.sizes["top_k"] == 5
    chosen = lz.logit_lens(toks.resid.sel(layer=[3, 1], position=1), folder, device="cpu")
    xr.testing.assert_allclose(chosen, every.sel(layer=[3, 1], position=1), rtol=1e-5)
    turned = lz.logit_lens(toks.resid.sel(layer=2).transpose("hidden", "token"), folder, device="cpu")
    np.testing.assert_allclose(turned[VALUES].values, every[VALUES].sel(layer=2).values, rtol=1e-5)
    one = lz.logit_lens(toks.resid.sel(layer=2).isel(token=5), folder, device="cpu")
    assert one[VALUES].dims == ("top_k",)
    np.testing.assert_allclose(one[VALUES].values, every[VALUES].sel(layer=2).isel(token=5).values, rtol=1e-5)
    pooled = lz.logit_lens(ds.resid_mean, folder, device="cpu")
    assert pooled[VALUES].dims == ("layer", "prompt", "top_k")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        right = whole.lm_head(whole.model.norm(torch.tensor(ds.resid_mean.sel(layer=1).values)))
    assert_is_top_of(pooled.sel(layer=1), right)


def test_texts_and_token_texts(llama: tuple[Path, lz.Store]) -> None:
    folder, store = llama
    lens = lz.logit_lens(store.tokens().resid, folder, top_k=2, device="cpu").sel(prompt=lz.prompt_hash(PROMPTS[0]))
    tokenizer = tiny_tokenizer()
    for token, text in zip(lens[IDS].values.ravel(), lens[TEXTS].values.ravel(), strict=True):
        assert text == tokenizer.decode([int(token)])
    assert "".join(lens.token_text.values) == PROMPTS[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert TEXTS not in lz.logit_lens(store.dataset().resid_mean, model)
    assert TEXTS in lz.logit_lens(store.dataset().resid_mean, model, tokenizer=tokenizer)


def test_dask_arrays_stay_lazy_and_give_the_same(llama: tuple[Path, lz.Store], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = llama
    resid = store.tokens().resid
    right = lz.logit_lens(resid, folder, top_k=3, device="cpu")
    lens = lz.logit_lens(resid.chunk({"layer": 1, "token": 7, "hidden": 5}), folder, top_k=3, device="cpu")
    assert all(lens[name].chunks for name in (VALUES, IDS, LOG_PROBS, TEXTS))
    assert lens[VALUES].dtype == lens[LOG_PROBS].dtype == np.float32
    assert lens[IDS].dtype == np.int32
    xr.testing.assert_allclose(lens.compute(scheduler="threads"), right, rtol=1e-5)
    # Two models on the same rows are two things, whatever Dask calls them.
    other = tiny_model("llama", "AutoModelForCausalLM", tie_word_embeddings=True)
    both = xr.concat([lens[IDS], lz.logit_lens(resid.chunk(), other, top_k=3)[IDS]], "model_number").compute()
    assert (both[0].values != both[1].values).any()


def test_rows_are_read_a_block_at_a_time(llama: tuple[Path, lz.Store], monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction import lens as module
    from lmprobe_zarr.extraction.models import lens as inner

    folder, store = llama
    resid = store.tokens().resid
    right = lz.logit_lens(resid, folder, device="cpu")
    sizes: list[int] = []
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 32 * 11)
    monkeypatch.setattr(inner, "LOGITS_BYTES", 4 * 300 * 4)
    plain = inner.Lens.logits

    def counted(self: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        return plain(self, rows)

    monkeypatch.setattr(inner.Lens, "logits", counted)
    xr.testing.assert_allclose(lz.logit_lens(resid, folder, device="cpu"), right, rtol=1e-5)
    assert max(sizes[1:]) == 4  # the first is the comparison
    assert sum(sizes[1:]) == resid.sizes["layer"] * resid.sizes["token"]


def test_rows_that_are_not_stored_have_no_tokens(llama: tuple[Path, lz.Store], tmp_path: Path) -> None:
    folder, _ = llama
    store = lz.open_store(tmp_path / "acts")
    lz.extract(folder, PROMPTS[:2], store=store, layers=[1, 2], pooling=["mean"], device="cpu", progress=False)
    lz.extract(folder, PROMPTS[2:3], store=store, layers=[2], pooling=["mean"], device="cpu", progress=False)
    mean = store.dataset(prompts=PROMPTS[:3]).resid_mean
    lens = lz.logit_lens(mean, folder, device="cpu")
    absent = lens.sel(layer=1).isel(prompt=2)
    assert np.isnan(absent[VALUES].values).all()
    assert np.isnan(absent[LOG_PROBS].values).all()
    assert (absent[IDS].values == -1).all()
    assert (absent[TEXTS].values == "").all()
    assert (lens.sel(layer=2)[IDS].values >= 0).all()


@pytest.mark.few(1)
@pytest.mark.parametrize(("dtype", "near"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rounded_rows_are_taken_as_they_are(dtype: str, near: float, llama: tuple[Path, lz.Store], tmp_path: Path) -> None:
    folder, exact = llama
    store = stored(folder, tmp_path, storage_dtype=dtype)
    assert store.tokens().resid.attrs["stored_dtype"] == dtype
    found = lz.logit_lens(store.tokens(prompts=PROMPTS).resid, folder, device="cpu")
    right = lz.logit_lens(exact.tokens(prompts=PROMPTS).resid, folder, device="cpu")
    np.testing.assert_allclose(found[VALUES].values, right[VALUES].values, atol=near * float(abs(right[VALUES]).max()))


def test_a_bfloat16_model(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "gemma2", head="AutoModelForCausalLM", dtype="bfloat16", final_logit_softcapping=2.0)
    toks = stored(folder, tmp_path, dtype="bfloat16").tokens()
    lens = lz.logit_lens(toks.resid.sel(layer=3), folder, device="cpu", dtype="bfloat16")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for prompt in PROMPTS:
        with torch.inference_mode():
            own = whole(input_ids=torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])).logits[0].float()
        found = lens.sel(prompt=lz.prompt_hash(prompt))
        np.testing.assert_allclose(found[VALUES].values, own.topk(5).values.numpy(), atol=2e-2 * float(own.abs().max()))


def test_the_model_is_left_as_it_was(llama: tuple[Path, lz.Store]) -> None:
    folder, store = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    before = dict(model.model.layers[0].__dict__)
    model.model.layers[1].forward = own = model.model.layers[1].forward
    lz.logit_lens(store.dataset().resid_mean, model)
    assert model.training
    assert model.model.layers[0].training
    assert dict(model.model.layers[0].__dict__) == before
    assert model.model.layers[1].forward is own
    assert not any(module._forward_hooks for module in model.modules())


class Skipping(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A head that sees more than the rows after the last block."""

    def __init__(self, head: Any, seen: list[Any]) -> None:
        super().__init__()
        self.head, self.seen = head, seen
        self.weight = head.weight

    def forward(self, rows: Any) -> Any:
        return self.head(rows + self.seen[-1])


def test_a_model_whose_head_sees_more_is_refused(llama: tuple[Path, lz.Store]) -> None:
    folder, store = llama
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: list[Any] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model.lm_head = Skipping(model.lm_head, seen)
    with pytest.raises(UnknownArchitectureError, match=r"do not give its own logits, from which they differ by .* logits='all'"):
        lz.logit_lens(store.dataset().resid_mean, model)


def test_errors_name_the_value_and_the_way_out(llama: tuple[Path, lz.Store], tmp_path: Path, tiny_models: SharedModels) -> None:
    folder, store = llama
    toks, mean = store.tokens(), store.dataset().resid_mean
    with pytest.raises(InvalidTypeError, match=r"activations is a Dataset, .* toks\.resid"):
        lz.logit_lens(toks, folder)  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="is a ndarray"):
        lz.logit_lens(mean.values, folder)
    with pytest.raises(InvalidTypeError, match="dtype int32"):
        lz.logit_lens(mean.astype("int32"), folder)
    with pytest.raises(InvalidArgumentError, match=r"'resid_mean' has dims \('layer', 'prompt', 'neurons_unit'\)"):
        lz.logit_lens(mean.rename(hidden="neurons_unit"), folder)
    with pytest.raises(InvalidArgumentError, match=r"rows of 8 values, and the residual stream of .* has 32"):
        lz.logit_lens(mean.isel(hidden=slice(8)), folder, device="cpu")
    with pytest.raises(LayerOutOfRangeError, match=r"has layer 7, and .* has layers 0 to 3"):
        lz.logit_lens(mean.assign_coords(layer=[0, 1, 2, 7]), folder, device="cpu")
    with pytest.raises(InvalidArgumentError, match="top_k=301 is more than the 300 logits"):
        lz.logit_lens(mean, folder, top_k=301, device="cpu")
    with pytest.raises(InvalidArgumentError, match="top_k=0 keeps nothing"):
        lz.logit_lens(mean, folder, top_k=0)
    with pytest.raises(InvalidTypeError, match="top_k=True"):
        lz.logit_lens(mean, folder, top_k=True)
    with pytest.raises(InvalidTypeError, match="tokenizer is a int"):
        lz.logit_lens(mean, folder, tokenizer=3, device="cpu")
    with pytest.raises(InvalidArgumentError, match="has no head, which a logit lens needs"):
        lz.logit_lens(mean, tiny_model("llama"))
    with pytest.raises(InvalidArgumentError, match="device= is for a model that is loaded by its name"):
        lz.logit_lens(mean, tiny_model("llama", "AutoModelForCausalLM"), device="cpu")
    with pytest.raises(InvalidArgumentError, match="does not predict the next token"):
        lz.logit_lens(mean, tiny_models("bert"), device="cpu")
    with pytest.raises(ModelNotFoundError, match="no folder of this name"):
        lz.logit_lens(mean, "no/such-model")
    headless = save_tiny("llama", tmp_path / "headless")
    with pytest.raises(ModelNotFoundError, match="was saved without its head"):
        lz.logit_lens(mean, headless, device="cpu")
