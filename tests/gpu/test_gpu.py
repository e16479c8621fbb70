"""Models on a GPU, compared with plain transformers on the same GPU, one prompt at a time: ``make test-gpu``.

They are skipped where there is none. ``LMPROBE_ZARR_TEST_DEVICE=cpu`` runs what needs nothing of CUDA on the processor instead, to try the
tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmprobe_zarr as lz
from lmprobe_zarr.store.store import Store

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from loaded_models import Array  # noqa: E402
from tiny_models import PROMPTS, tiny_model, tiny_tokenizer  # noqa: E402

DEVICE = os.environ.get("LMPROBE_ZARR_TEST_DEVICE", "cuda")
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.model, pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="no GPU")]
needs_cuda = pytest.mark.skipif(not GPUS, reason="no GPU")

# Largest difference of a token's vector from that of the prompt alone, relative to its length: rounding of other shapes of products.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral", "falcon_alibi")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Products of float32 without TF32, which are promised to be equal to a plain pass only where both round alike."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def acts(tmp_path: Path) -> Store:
    return lz.open_store(tmp_path / "acts", durable=False)


def saved(folder: Path, family: str) -> Path:
    tiny_model(family, "AutoModelForCausalLM").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def alone(folder: Path, dtype: str, prompts: list[str] = PROMPTS) -> list[Array]:
    """What every block returns for each prompt by itself, (block, token, hidden), by hooks of this test."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    outputs: list[Any] = []
    for block in blocks:
        block.register_forward_hook(lambda _module, _given, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    found = []
    for text in prompts:
        outputs.clear()
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt").to(DEVICE), use_cache=False)
        found.append(torch.stack([out[0].float() for out in outputs]).cpu().numpy())
    return found


def run(model: Any, store: Store, prompts: list[str] = PROMPTS, **options: Any) -> lz.ExtractStats:
    options = {"device": DEVICE, "pooling": (), "keep_tokens": True, "progress": False, **options}
    return lz.extract(model, prompts, store=store, **options)


def largest_difference(store: Store, expected: list[Array], prompts: list[str] = PROMPTS) -> float:
    toks = store.tokens(prompts=prompts)
    found = toks.resid.values.astype(np.float64)
    ends = np.cumsum([0, *(each.shape[1] for each in expected)])
    assert found.shape[1] == ends[-1]
    off = [
        np.linalg.norm(found[:, a:b] - each, axis=-1) / np.linalg.norm(each, axis=-1)
        for a, b, each in zip(ends[:-1], ends[1:], expected, strict=True)
    ]
    return max(float(each.max()) for each in off)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_what_the_model_gives_for_one_prompt(family: str, dtype: str, acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / family, family)
    run(folder, acts, dtype=dtype, batch_tokens=64)
    assert largest_difference(acts, alone(folder, dtype)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pooled_values_and_outputs_are_those_of_the_device(dtype: str, acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    run(folder, acts, dtype=dtype, pooling=["mean", "last_token"], perplexity=True, logits="last_token")
    data, expected = acts.dataset(prompts=PROMPTS), alone(folder, dtype)
    for i, each in enumerate(expected):
        for name, right in (("resid_mean", each.mean(axis=1)), ("resid_last_token", each[:, -1])):
            off = np.linalg.norm(data[name].values[:, i] - right, axis=-1) / np.linalg.norm(right, axis=-1)
            assert off.max() <= TOLERANCE[dtype]
    assert np.isfinite(data.perplexity.values[[len(p) > 5 for p in PROMPTS]]).all()


@needs_cuda
def test_values_are_copied_to_pinned_memory_while_the_next_batch_runs(acts: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprobe_zarr.extraction.models import capture, copying

    pinned: list[bool] = []
    waiting: list[bool] = []
    real = copying.copy_to_host

    def seen(*given: Any) -> Any:
        copied = real(*given)
        pinned.extend(tensor.is_pinned() for tensor in (*copied.tokens.values(), *copied.prompts.values()))
        waiting.append(copied.arrived is not None)
        return copied

    monkeypatch.setattr(capture, "copy_to_host", seen)
    run(saved(tmp_path / "llama", "llama"), acts, batch_prompts=1)
    assert set(pinned) == {True}
    assert set(waiting) == {True}


@needs_cuda
def test_batches_are_halved_where_the_device_runs_out_of_memory(acts: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=16_384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=300,
        max_position_embeddings=1024,
    )  # fmt: skip
    folder = tmp_path / "wide"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    prompts = [f"{i} " + "the dogs jump over lazy foxes " * 24 for i in range(64)]
    right = lz.open_store(tmp_path / "right", durable=False)
    run(folder, right, prompts, batch_tokens=512)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    # A batch of all prompts takes some 20,000 tokens × 16,384 × 4 bytes × 3 for the MLP alone; there is room for a quarter of that.
    room = 1 << 30
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + room) / total))
    before = torch.cuda.memory_stats()["num_ooms"]
    try:
        run(folder, acts, prompts, batch_tokens=1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_stats()["num_ooms"] > before
    found, expected = (store.tokens(prompts=prompts).resid.values for store in (acts, right))
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() <= TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_give_the_same_to_the_last_bit(dtype: str, acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    loaded = lz.open_store(tmp_path / "loaded", durable=False)
    run(folder, loaded, dtype=dtype, batch_tokens=64)
    run(folder, acts, dtype=dtype, batch_tokens=64, weights="streamed")
    np.testing.assert_array_equal(acts.tokens(prompts=PROMPTS).resid.values, loaded.tokens(prompts=PROMPTS).resid.values)


@needs_cuda
def test_a_model_larger_than_the_device_is_streamed(acts: Store, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8, vocab_size=300,
        max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path / "deep"
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")  # 1.6 GB of float32
    tiny_tokenizer().save_pretrained(folder)
    expected = alone(folder, "float32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (512 << 20)) / total)
    try:
        with pytest.raises((lz.errors.DeviceMemoryError, torch.OutOfMemoryError)):
            run(folder, acts, weights="loaded")
        torch.cuda.empty_cache()
        run(folder, acts, weights="streamed")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert largest_difference(acts, expected) <= TOLERANCE["float32"]


@needs_cuda
def test_a_prompt_that_does_not_fit_alone_is_named(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    total = torch.cuda.get_device_properties(0).total_memory
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().to(DEVICE)
    torch.cuda.set_per_process_memory_fraction(max(1e-6, torch.cuda.memory_reserved() / total))
    hog = torch.empty(max(0, torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - (1 << 18)), dtype=torch.uint8, device=DEVICE)
    try:
        with pytest.raises(lz.errors.DeviceMemoryError, match=r"prompts\[\d\].*does not fit into the memory"):
            run(model, acts, ["the dogs jump over lazy foxes " * 20], tokenizer=tiny_tokenizer(), name="tiny")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del hog
    assert not acts.groups()


@pytest.mark.skipif(GPUS < 2, reason="one GPU or none")
def test_a_model_on_several_devices_gives_the_same(acts: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "llama", "llama")
    layers = {f"model.layers.{i}": i % 2 for i in range(4)}
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1, **layers}
    run(folder, acts, device=None, device_map=places)
    assert largest_difference(acts, alone(folder, "float32")) <= TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_batches_of_stored_tokens_go_to_the_device(dtype: str, acts: Store, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    run(saved(tmp_path / "llama", "llama"), acts, dtype=dtype)
    toks = acts.tokens()
    batches = toks.resid.sel(layer=2).lz.batches(batch_tokens=16, shuffle=False, dtype=getattr(torch, dtype), framework="torch")
    loader = DataLoader(batches, batch_size=None, pin_memory=DEVICE == "cuda")
    found = torch.cat([batch.to(DEVICE, non_blocking=True) for batch in loader])
    assert found.device.type == DEVICE
    np.testing.assert_array_equal(found.float().cpu().numpy(), toks.resid.sel(layer=2).values.astype(np.float32))
