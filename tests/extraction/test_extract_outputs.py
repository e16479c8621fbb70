"""What a model says of its input, in the store: perplexities, logits, routers; and poolings made from stored tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.errors import CacheWarning, InvalidArgumentError, UnknownArchitectureError
from lmprobe_zarr.store.store import Store

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")

from tiny_models import PROMPTS, SharedModels, save_tiny, tiny_tokenizer  # noqa: E402 — needs torch


@pytest.fixture(scope="session")
def saved(tiny_models: SharedModels) -> Callable[[str], Path]:
    return partial(tiny_models, head="AutoModelForCausalLM")


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts")


def run(model: Path, acts: Store, prompts: list[str] = PROMPTS, **options: Any) -> lz.ExtractStats:
    return lz.extract(model, prompts, store=acts, device="cpu", progress=False, **options)


def truth(model: Path, prompt: str) -> tuple[Any, Any]:
    """Logits and token ids of one prompt by itself, straight from transformers."""
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"]])
    with torch.inference_mode():
        return whole(ids).logits[0].double(), ids[0]


def test_perplexity_and_log_probabilities_are_stored_with_the_activations(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    stats = run(model, acts, perplexity=True)
    assert stats.extracted == len(PROMPTS)
    ds, toks = acts.dataset(prompts=PROMPTS), acts.tokens(prompts=PROMPTS)
    assert set(ds.data_vars) == {"resid_last_token", "perplexity"}
    assert set(toks.data_vars) == {"token_perplexity", "token_log_prob"}
    assert ds.statistic.values.tolist() == ["mean", "min", "max"]
    for prompt in PROMPTS:
        logits, ids = truth(model, prompt)
        log_probs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0].numpy()
        found = toks.token_log_prob.sel(prompt=lz.prompt_hash(prompt)).values
        assert np.isnan(found[0])
        np.testing.assert_allclose(found[1:], log_probs, atol=1e-5)
        np.testing.assert_allclose(toks.token_perplexity.sel(prompt=lz.prompt_hash(prompt)).values[1:], np.exp(-log_probs), rtol=1e-4)
        expected = np.exp([-log_probs.mean(), -log_probs.max(), -log_probs.min()]) if len(log_probs) else np.ones(3)
        np.testing.assert_allclose(ds.perplexity.sel(prompt=lz.prompt_hash(prompt)).values, expected, rtol=1e-4)


def test_fifty_is_not_served_by_five_and_five_is_served_by_fifty(saved: Callable[[str], Path], acts: Store, runs: list[int]) -> None:
    model = saved("llama")
    run(model, acts, logits="last_token", logits_top_k=5)
    run(model, acts, logits="last_token", logits_top_k=50)
    assert runs == [6, 6], "5 do not serve 50"
    assert run(model, acts, logits="last_token", logits_top_k=5).extracted == 0
    assert run(model, acts, logits="last_token", logits_top_k=50).extracted == 0
    assert runs == [6, 6]
    ds = acts.dataset(prompts=PROMPTS)
    assert ds.sizes["top_k"] == 50
    for prompt in PROMPTS:
        logits, _ = truth(model, prompt)
        values, indices = torch.topk(logits[-1], 50)
        row = ds.sel(prompt=lz.prompt_hash(prompt))
        np.testing.assert_allclose(row.logits_last_token_top_k_values.values, values.numpy(), atol=1e-4)
        assert (row.logits_last_token_top_k_indices.values == indices.numpy()).mean() > 0.95, "but for ties"
    run(model, acts, [*PROMPTS, "one more"], logits="last_token", logits_top_k=5)
    assert runs == [6, 6, 1]
    more = acts.dataset(prompts=["one more"])
    assert np.isnan(more.logits_last_token_top_k_values.values[0, 5:]).all(), "what is not there is not zero"
    assert (more.logits_last_token_top_k_indices.values[0, 5:] == -1).all()
    info = lz.discover_cached("llama", "one more", store=acts)
    assert info is not None
    assert (info.has_logits, info.logits_top_k) == (True, 5)


def test_whole_logits_of_every_token(saved: Callable[[str], Path], acts: Store, runs: list[int]) -> None:
    model = saved("gpt2")
    run(model, acts, logits="all")
    toks = acts.tokens(prompts=PROMPTS)
    assert toks.logits.dims == ("token", "vocab")
    for prompt in PROMPTS:
        logits, _ = truth(model, prompt)
        np.testing.assert_allclose(toks.logits.sel(prompt=lz.prompt_hash(prompt)).values, logits.numpy(), atol=1e-4)
    assert run(model, acts, logits="all").extracted == 0
    assert runs == [6]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_routers_are_stored_by_layer_and_expert(kind: str, saved: Callable[[str], Path], acts: Store, runs: list[int]) -> None:
    model = saved(kind)
    stats = run(model, acts, router=True)
    assert stats.extracted == 6, "a router of its own part counts no prompt twice"
    toks = acts.tokens(prompts=PROMPTS)
    assert toks.router.dims == ("layer", "token", "expert")
    held = [int(layer) for layer in toks.layer if np.isfinite(toks.router.sel(layer=layer).values).all()]
    info = lz.discover_cached(model.name, PROMPTS[0], store=acts)
    assert info is not None
    assert info.router_layers == held
    assert held
    again = run(model, acts, router=True)
    assert (again.extracted, runs) == (0, [6])
    assert acts.dataset(prompts=PROMPTS).resid_last_token.sizes["layer"] == 4


def test_a_model_without_routers_says_so_before_it_runs(saved: Callable[[str], Path], acts: Store) -> None:
    with pytest.raises((UnknownArchitectureError, InvalidArgumentError), match="router"):
        run(saved("llama"), acts, router=True)
    assert not acts.models()


def test_activations_and_outputs_lie_in_one_group_whoever_came_first(saved: Callable[[str], Path], acts: Store) -> None:
    model = saved("llama")
    run(model, acts)
    run(model, acts, perplexity=True)
    assert len(acts.groups()) == 1
    assert run(model, acts).extracted == 0


def test_outputs_alone_need_no_pooling(saved: Callable[[str], Path], acts: Store) -> None:
    run(saved("llama"), acts, pooling=[], perplexity=True)
    assert set(acts.dataset().data_vars) == {"perplexity"}


def test_a_pooling_that_was_not_stored_is_made_from_tokens_without_the_model(
    saved: Callable[[str], Path], acts: Store, runs: list[int], tmp_path: Path
) -> None:
    model = saved("llama")
    run(model, acts, pooling=[], keep_tokens=True, sites=["resid", "embed"])
    plan = lz.plan_extract(model, [*PROMPTS, "new"], store=acts, pooling=["mean", "max"], sites=["resid", "embed"])
    assert (plan.found, plan.derived, plan.missing) == (6, 6, 1)
    assert "pooled from stored tokens" in str(plan)
    stats = run(model, acts, pooling=["mean", "max", "last_token"], sites=["resid", "embed"])
    assert (stats.extracted, stats.derived, stats.model_loaded) == (0, 6, False)
    assert runs == [6]
    direct = lz.open_store(tmp_path / "direct")
    run(model, direct, pooling=["mean", "max", "last_token"], sites=["resid", "embed"])
    for name in ("resid_mean", "resid_max", "resid_last_token", "embed_mean", "embed_max"):
        np.testing.assert_allclose(
            acts.dataset(prompts=PROMPTS)[name].values, direct.dataset(prompts=PROMPTS)[name].values, atol=1e-6, err_msg=name
        )
    assert run(model, acts, pooling=["mean"], sites=["resid", "embed"]).derived == 0, "and then it is stored"


def test_means_of_bfloat16_tokens_are_bfloat16_as_the_model_would_give_them(tmp_path: Path, acts: Store) -> None:
    model = save_tiny("llama", tmp_path / "half", dtype="bfloat16")
    run(model, acts, pooling=[], keep_tokens=True)
    run(model, acts, pooling=["mean"])
    direct = lz.open_store(tmp_path / "direct")
    run(model, direct, pooling=["mean"])
    mine, theirs = (store.dataset(prompts=PROMPTS).resid_mean for store in (acts, direct))
    np.testing.assert_allclose(mine.values, theirs.values, rtol=2**-7)
    assert mine.attrs["stored_dtype"] == theirs.attrs["stored_dtype"] == "bfloat16"


@pytest.mark.few(1)
@pytest.mark.parametrize(("dtype", "keep_bits"), [("float16", None), ("bfloat16", None), ("float32", 5), ("float16", 6)])
def test_storage_precision_by_argument_and_by_setting(
    dtype: str, keep_bits: int | None, saved: Callable[[str], Path], acts: Store, tmp_path: Path
) -> None:
    model = saved("llama")
    exact = lz.open_store(tmp_path / "exact")
    run(model, exact, keep_tokens=True)
    run(model, acts, keep_tokens=True, storage_dtype=dtype, keep_bits=keep_bits)
    lz.set_cache_dtype(dtype, keep_bits=keep_bits)
    lz.extract(model, PROMPTS, keep_tokens=True, device="cpu", progress=False)
    run(model, lz.open_store(tmp_path / "named"), keep_tokens=True)
    reference = exact.tokens(prompts=PROMPTS).resid.values
    bits = keep_bits or {"float16": 10, "bfloat16": 7}[dtype]
    for store in (acts, lz.open_store()):
        values = store.tokens(prompts=PROMPTS).resid
        assert values.attrs["stored_dtype"] == dtype
        assert np.abs(values.values - reference).max() > 0
        assert (np.abs(values.values - reference) <= np.abs(reference) * 2.0 ** -(bits + 1) + 1e-6).all()
    np.testing.assert_array_equal(lz.open_store(tmp_path / "named").tokens(prompts=PROMPTS).resid.values, reference)


def test_padding_is_never_stored(saved: Callable[[str], Path], acts: Store) -> None:
    run(saved("llama"), acts, keep_tokens=True, batch_prompts=6)
    kept = acts.tokens().sizes["token"]
    lengths = [len(tiny_tokenizer()(prompt)["input_ids"]) for prompt in PROMPTS]
    assert kept == sum(lengths) < len(lengths) * max(lengths)


def test_the_first_token_is_the_prompts_own(saved: Callable[[str], Path], acts: Store) -> None:
    run(saved("llama"), acts, keep_tokens=True, pooling=["first_token"], batch_prompts=6)
    first = acts.tokens(prompts=PROMPTS).resid.sel(position=0).values
    np.testing.assert_allclose(acts.dataset(prompts=PROMPTS).resid_first_token.values, first, atol=1e-6)


def test_parts_stay_below_a_fiftieth_of_the_limit(saved: Callable[[str], Path]) -> None:
    model = saved("llama")
    one = 4 * 32 * 4
    lz.set_cache_limit(50 * 3 * one / 1024**3)
    lz.extract(model, [f"prompt number {i}" for i in range(20)], device="cpu", progress=False)
    store = lz.open_store()
    (info,) = store.groups().values()
    assert max(len(part.info.digests) for part in store.view(info).parts) == 3
    with pytest.warns(CacheWarning, match="limit"):
        lz.extract(model, [f"prompt number {i}" for i in range(200)], device="cpu", progress=False)
