"""Going on from stored rows: the blocks that run, the values that come of it, and when the whole pass runs instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import GROUPED, PROMPTS, SharedModels, random_model, tiny_model, tiny_tokenizer  # noqa: E402

from lmprobe_zarr.extraction.models import load_model  # noqa: E402
from lmprobe_zarr.extraction.models.check import check_model  # noqa: E402
from lmprobe_zarr.extraction.models.continuing import forms_for, is_rounded  # noqa: E402

KINDS = ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "gemma3", "qwen3", "phi", "mixtral", "falcon", "falcon_alibi", "mistral"]


@pytest.fixture(scope="session")
def saved(tiny_models: SharedModels) -> Callable[..., Path]:
    return partial(tiny_models, head="AutoModelForCausalLM")


class Counted:
    """A loaded model that counts how often each block is computed on prompts of a batch of extraction."""

    def __init__(self, kind: str) -> None:
        self.module = tiny_model(kind, "AutoModelForCausalLM")
        self.rows: dict[int, int] = {}
        blocks = next(part for name, part in self.module.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 4)
        for layer, block in enumerate(blocks):
            # What the block computes, whatever stands in for its forward: its first projection.
            part = next(each for each in block.modules() if isinstance(each, torch.nn.Linear))
            self._count(part, layer)

    def _count(self, part: Any, layer: int) -> None:
        def hook(_module: Any, args: Any) -> None:
            self.rows[layer] = self.rows.get(layer, 0) + args[0].shape[:-1].numel()

        part.register_forward_pre_hook(hook)


def run(model: Any, store: lz.Store, **options: Any) -> lz.ExtractStats:
    given = {"pooling": [], "keep_tokens": True, "device": "cpu", "progress": False, **options}
    return lz.extract(model, PROMPTS, store=store, **given)


def assert_same(found: xr.DataArray, right: xr.DataArray, near: float = 1e-5) -> None:
    found = found.transpose(*right.dims)
    assert found.shape == right.shape
    np.testing.assert_allclose(found.values, right.values, rtol=0, atol=near * float(np.nanmax(np.abs(right.values))))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_deeper_layers_equal_those_of_the_plain_pass(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    model = saved(kind)
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "continued")
    run(model, plain, perplexity=True, logits="all")
    run(model, store, layers=[1])
    plan = lz.plan_extract(model, PROMPTS, store=store, layers=[2, 3], pooling=[], keep_tokens=True, perplexity=True, logits="all")
    assert (plan.continued_from, plan.work_share) == (1, 0.5)
    loaded = load_model(model, head=True, device="cpu")
    assert forms_for(loaded, check_model(loaded), 1, head=True) is not None  # so it is this that is compared below
    run(model, store, layers=[2, 3], perplexity=True, logits="all", pooling=["mean"])
    found, right = store.tokens(prompts=PROMPTS), plain.tokens(prompts=PROMPTS)
    assert_same(found.resid.sel(layer=[2, 3]), right.resid.sel(layer=[2, 3]))
    assert_same(found.logits, right.logits)
    perplexity = store.dataset(prompts=PROMPTS).perplexity, plain.dataset(prompts=PROMPTS).perplexity
    np.testing.assert_allclose(perplexity[0].values, perplexity[1].values, rtol=1e-4)


@pytest.fixture
def counted() -> Counted:
    return Counted("llama")


def test_only_the_blocks_after_the_stored_layer_run(counted: Counted, tmp_path: Path) -> None:
    store, named = lz.open_store(tmp_path / "acts"), {"name": "tiny", "tokenizer": tiny_tokenizer()}
    options: dict[str, Any] = {**named, "provenance": {"counted": "yes"}}
    given: dict[str, Any] = {"pooling": [], "keep_tokens": True, "progress": False}
    lz.extract(counted.module, PROMPTS, store=store, layers=[0, 2], **given, **options)
    plan = lz.plan_extract(counted.module, PROMPTS, store=store, layers=[3], pooling="mean", **options)
    assert plan.continued_from == 2
    assert "continued from layer 2: 25 % of the work" in str(plan)
    counted.rows.clear()
    lz.extract(counted.module, PROMPTS, store=store, layers=[3], pooling="mean", progress=False, **options)
    tokens = plan.tokens
    # Beside the short batches by which the model is examined, only the last block sees the prompts.
    assert counted.rows[3] >= tokens
    assert counted.rows[0] < tokens
    assert counted.rows[0] <= counted.rows[3] - tokens
    lz.extract(counted.module, PROMPTS, store=store, layers=[3], **given, **options)
    counted.rows.clear()
    lz.extract(counted.module, PROMPTS, store=store, sites=[], perplexity=True, pooling=[], progress=False, **options)
    assert max(counted.rows.values()) < tokens  # final norm and head alone


def test_final_norm_and_head_on_the_last_layer_give_perplexity_and_logits(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = saved("gemma2")
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "continued")
    outputs: dict[str, Any] = {"sites": [], "keep_tokens": False, "perplexity": True, "logits": "last_token"}
    run(model, plain, **outputs)
    run(model, store, layers=[0, 3])
    plan = lz.plan_extract(model, PROMPTS, store=store, pooling=[], **outputs)
    assert (plan.continued_from, plan.work_share) == (3, 0.0)
    run(model, store, **outputs)
    found, right = store.dataset(prompts=PROMPTS), plain.dataset(prompts=PROMPTS)
    np.testing.assert_allclose(found.perplexity.values, right.perplexity.values, rtol=1e-4)
    assert_same(found.logits_last_token, right.logits_last_token)


def test_a_bfloat16_model_goes_on_from_what_is_stored_exactly(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = saved("llama", dtype="bfloat16")
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "continued")
    run(model, plain)
    run(model, store, layers=[1])
    assert lz.plan_extract(model, PROMPTS, store=store, layers=[3], pooling="mean").continued_from == 1
    run(model, store, layers=[3])
    found, right = store.tokens(prompts=PROMPTS).resid.sel(layer=3), plain.tokens(prompts=PROMPTS).resid.sel(layer=3)
    assert_same(found, right, near=1e-2)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "options",
    [{"storage_dtype": "float16"}, {"storage_dtype": "bfloat16"}, {"keep_bits": 9}],
    ids=["float16", "bfloat16", "keep_bits"],
)
def test_rounded_values_are_never_gone_on_from(options: dict[str, Any], saved: Callable[..., Path], tmp_path: Path) -> None:
    model = saved("llama")
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "rounded")
    run(model, plain)
    run(model, store, layers=[1], **options)
    plan = lz.plan_extract(model, PROMPTS, store=store, layers=[3], pooling=[], keep_tokens=True)
    # What bits were kept is not written down, so it is seen in the values when they are read.
    assert plan.continued_from == (1 if "keep_bits" in options else None)
    run(model, store, layers=[3], storage_dtype="float32")
    found, right = store.tokens(prompts=PROMPTS).resid.sel(layer=3), plain.tokens(prompts=PROMPTS).resid.sel(layer=3)
    np.testing.assert_array_equal(found.values, right.values)


def test_rounded_prompts_in_a_batch_with_others_are_not_gone_on_from_either(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Two calls, of which one kept fewer bits: the batch of the next one holds prompts of both."""
    model = saved("llama")
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "mixed")
    run(model, plain)
    given: dict[str, Any] = {"store": store, "layers": [1], "pooling": [], "keep_tokens": True, "progress": False}
    lz.extract(model, PROMPTS[::2], keep_bits=4, **given)
    lz.extract(model, PROMPTS[1::2], **given)
    run(model, store, layers=[3])
    found, right = store.tokens(prompts=PROMPTS).resid.sel(layer=3), plain.tokens(prompts=PROMPTS).resid.sel(layer=3)
    assert_same(found, right)


def test_rounding_is_seen_in_the_values() -> None:
    from lmprobe_zarr.batch import round_bits

    values = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)
    assert not is_rounded(values, "float32")
    assert is_rounded(round_bits(values, 22), "float32")
    assert not is_rounded(round_bits(values, 7), "bfloat16")
    assert is_rounded(round_bits(values, 6), "bfloat16")
    assert is_rounded(values.astype(np.float16), "float32")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("stored", "asked", "why"),
    [
        ({"layers": [2]}, {"layers": [1, 3]}, "a layer before it is asked for"),
        ({"layers": [2]}, {"layers": [2], "sites": ["attn"]}, "and so is another site of its own block"),
        ({"layers": [2], "sites": ["attn"]}, {"layers": [3]}, "another site is stored"),
        ({"layers": [2], "pooling": ["mean"], "keep_tokens": False}, {"layers": [3]}, "no tokens are stored"),
        ({"layers": [2]}, {"layers": [3], "sites": ["resid", "embed"]}, "the embeddings come before the blocks"),
        ({"layers": [2]}, {"layers": [3], "refresh": True}, "all is to be computed anew"),
    ],
)
def test_the_whole_pass_runs_where(
    stored: dict[str, Any], asked: dict[str, Any], why: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    model, store = saved("llama"), lz.open_store(tmp_path / "acts")
    run(model, store, **stored)
    plan = lz.plan_extract(model, PROMPTS, store=store, **{"pooling": [], "keep_tokens": True, **asked})
    assert (plan.continued_from, plan.work_share) == (None, 1.0), why
    assert "continued" not in str(plan)


def test_prompts_that_lack_the_layer_run_whole(saved: Callable[..., Path], tmp_path: Path) -> None:
    model, store = saved("llama"), lz.open_store(tmp_path / "acts")
    lz.extract(model, PROMPTS[:3], store=store, layers=[2], pooling=[], keep_tokens=True, progress=False)
    assert lz.plan_extract(model, PROMPTS[:3], store=store, layers=[3], pooling="mean").continued_from == 2
    assert lz.plan_extract(model, PROMPTS, store=store, layers=[3], pooling="mean").continued_from is None


def test_a_model_that_cannot_be_continued_runs_whole(tmp_path: Path) -> None:
    # The last two blocks take keys and values of earlier ones.
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this version of transformers has no Gemma 4")
    options = {
        **GROUPED, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    folder = tmp_path / "gemma4"
    random_model("Gemma4ForCausalLM", "Gemma4TextConfig", **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    plain, store = lz.open_store(tmp_path / "plain"), lz.open_store(tmp_path / "continued")
    run(folder, plain)
    run(folder, store, layers=[1])
    loaded = load_model(folder, device="cpu")
    assert forms_for(loaded, check_model(loaded), 1, head=False) is None
    run(folder, store, layers=[3])
    found, right = store.tokens(prompts=PROMPTS).resid.sel(layer=3), plain.tokens(prompts=PROMPTS).resid.sel(layer=3)
    np.testing.assert_array_equal(found.values, right.values)
