"""Weights that are streamed a block at a time: the values of the plain pass, what is read and held, and runs that are stopped."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import (
    InvalidArgumentError,
    ModelNotFoundError,
    NoSpaceError,
    UnknownArchitectureError,
)

pytestmark = pytest.mark.model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

from tiny_models import GROUPED, PROMPTS, SIZES, TINY, SharedModels, random_model, save_tiny, tiny_model, tiny_tokenizer  # noqa: E402
from warmed import Warmed  # noqa: E402

from lmprobe_zarr.extraction import fill  # noqa: E402
from lmprobe_zarr.extraction import models as extraction  # noqa: E402
from lmprobe_zarr.extraction.models import scratch as scratch_files  # noqa: E402
from lmprobe_zarr.extraction.models.check import check_model  # noqa: E402
from lmprobe_zarr.extraction.models.continuing import forms_by_block  # noqa: E402
from lmprobe_zarr.extraction.models.passes import Job  # noqa: E402

STRESS = bool(os.environ.get("LMPROBE_ZARR_STRESS"))
EVERY_SITE: dict[str, Any] = {
    "sites": ["resid", "attn", "mlp", "embed"],
    "pooling": ["mean", "last_token"],
    "keep_tokens": True,
    "batch_tokens": 64,
}
# Plain, parallel, normed after, with windows, ALiBi, biases, experts that are converted, dense and sparse blocks, encoders.
KINDS = ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "gemma3", "phi3", "falcon_alibi", "olmo2", "mixtral", "deepseek_v3", "bert"]
MANY = [f"{prompt} {number}" for number in range(5) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def saved(tiny_models: SharedModels) -> Callable[..., Path]:
    return partial(tiny_models, head="AutoModelForCausalLM")


@pytest.fixture(scope="session")
def llama(saved: Callable[..., Path]) -> Path:
    return saved("llama")


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lmprobe_zarr.cache"):
        yield caplog


def run(model: Any, store: Path | str, prompts: Any = PROMPTS, **options: Any) -> lz.ExtractStats:
    given = {"pooling": ["mean"], "device": "cpu", "progress": False, "weights": "streamed", **options}
    return lz.extract(model, prompts, store=store, **given)


def left_beside(store: Path) -> list[Path]:
    """What streamed runs have left beside a store."""
    return sorted((store.parent / scratch_files.FOLDER).glob("*/*"))


def assert_same(found: Path, right: Path, near: float = 1e-5) -> None:
    """Two stores show the same variables of the same prompts with the same values."""
    one, other = lz.open_store(found), lz.open_store(right)
    assert one.models() == other.models()
    datasets: list[tuple[xr.Dataset, xr.Dataset]] = [(one.dataset(), other.dataset())]
    if other.dataset().n_tokens.notnull().any():
        datasets.append((one.tokens(), other.tokens()))
    for mine, plain in datasets:
        assert mine.sizes == plain.sizes
        assert {str(name): value.dims for name, value in mine.variables.items()} == {str(n): v.dims for n, v in plain.variables.items()}
        for name, values in plain.variables.items():
            if values.dtype.kind == "f":
                most = float(np.abs(values.values[np.isfinite(values.values)]).max(initial=0))
                np.testing.assert_allclose(mine[name].values, values.values, rtol=0, atol=near * most, err_msg=str(name))
            else:
                assert mine[name].values.tolist() == values.values.tolist(), name


# -- values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", list(TINY) if STRESS else KINDS)
def test_streamed_values_are_those_of_the_plain_pass(kind: str, tiny_models: SharedModels, tmp_path: Path) -> None:
    model = tiny_models(kind, head="AutoModel" if TINY[kind].encoder else "AutoModelForCausalLM")
    outputs: dict[str, Any] = {} if TINY[kind].encoder else {"perplexity": True, "logits": "last_token"}
    plain, streamed = tmp_path / "plain", tmp_path / "streamed"
    one = run(model, plain, weights="loaded", **EVERY_SITE, **outputs)
    other = run(model, streamed, **EVERY_SITE, **outputs)
    assert (one.group, one.nbytes, one.parts) == (other.group, other.nbytes, other.parts)
    assert_same(streamed, plain)
    assert not left_beside(streamed)


def test_every_site_router_and_part_of_the_tokens(saved: Callable[..., Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sites": {"resid_mid": "resid_mid", "heads": "heads", "norm": "/model.norm", "gate": "input_layernorm", "resid": "resid"},
        "over": {"tail": {"position": slice(-2, None)}},
        "pooling": ["mean", "max"],
        "layers": [1, 3],
        "router": True,
        "logits": "all",
        "logits_top_k": 3,
    }
    for name, weights in (("plain", "loaded"), ("streamed", "streamed")):
        run(saved("mixtral"), tmp_path / name, weights=weights, **options)
    assert_same(tmp_path / "streamed", tmp_path / "plain")
    data = lz.open_store(tmp_path / "streamed").tokens()
    assert data.router.sizes["layer"] == 2
    assert "logits_top_k_values" in data


def test_a_bfloat16_model_and_another_dtype_than_that_of_the_files(saved: Callable[..., Path], tmp_path: Path) -> None:
    for dtype in ("auto", "float32"):
        for name, weights in (("plain", "loaded"), ("streamed", "streamed")):
            run(saved("qwen3", dtype="bfloat16"), tmp_path / f"{name} {dtype}", weights=weights, dtype=dtype, keep_tokens=True)
        assert_same(tmp_path / f"streamed {dtype}", tmp_path / f"plain {dtype}", near=0)


def test_weights_in_several_files(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "gpt2", head="AutoModelForCausalLM")
    run(model, tmp_path / "plain", weights="loaded", **EVERY_SITE)
    tiny_model("gpt2", "AutoModelForCausalLM").save_pretrained(model, max_shard_size="60KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    assert len(list(model.glob("*.safetensors"))) > 3
    loaded = extraction.load_model(model, device="cpu", stream=True)
    assert loaded.provenance["weights"] == extraction.load_model(model, device="cpu").provenance["weights"]
    run(model, tmp_path / "streamed", name="gpt2", **EVERY_SITE)
    found, right = lz.open_store(tmp_path / "streamed").tokens(), lz.open_store(tmp_path / "plain").tokens()
    np.testing.assert_array_equal(found.resid.values, right.resid.values)


def test_what_was_loaded_is_found_by_a_streamed_run_and_the_other_way_round(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "a", weights="loaded")
    run(llama, tmp_path / "b")
    assert run(llama, tmp_path / "a").found == len(PROMPTS)
    assert run(llama, tmp_path / "b", weights="loaded").found == len(PROMPTS)
    assert not run(llama, tmp_path / "b").model_loaded


def test_it_goes_on_from_a_stored_layer(llama: Path, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    run(llama, tmp_path / "plain", weights="loaded", **EVERY_SITE)
    run(llama, tmp_path / "streamed", layers=[1], keep_tokens=True, pooling=[], weights="loaded")
    asked: dict[str, Any] = {"layers": [2, 3], "sites": ["resid", "attn"], "keep_tokens": True}
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "streamed", **asked).continued_from == 1
    run(llama, tmp_path / "streamed", **asked)
    found, right = lz.open_store(tmp_path / "streamed").tokens(), lz.open_store(tmp_path / "plain").tokens()
    for site in ("resid", "attn"):
        np.testing.assert_allclose(found[site].sel(layer=[2, 3]).values, right[site].sel(layer=[2, 3]).values, rtol=0, atol=1e-5)


def test_rounded_rows_are_not_gone_on_from(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "plain", weights="loaded", **EVERY_SITE)
    run(llama, tmp_path / "streamed", layers=[1], keep_tokens=True, pooling=[], keep_bits=9, weights="loaded")
    run(llama, tmp_path / "streamed", layers=[3], keep_tokens=True)
    found, right = lz.open_store(tmp_path / "streamed").tokens(), lz.open_store(tmp_path / "plain").tokens()
    np.testing.assert_allclose(found.resid.sel(layer=3).values, right.resid.sel(layer=3).values, rtol=0, atol=1e-5)


def test_windows_of_a_small_scratch_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llama, tmp_path / "plain", MANY, weights="loaded", **EVERY_SITE, part_seconds=0)
    monkeypatch.setattr(fill, "STREAMED_SHARE", 1 << 60)
    begun: list[int] = []
    create = scratch_files.Scratch.create

    def counting(*given: Any) -> Any:
        begun.append(len(given[2].digests))
        return create(*given)

    monkeypatch.setattr(scratch_files.Scratch, "create", counting)
    run(llama, tmp_path / "streamed", MANY, **EVERY_SITE, part_seconds=0)
    assert len(begun) > 2
    assert sum(begun) == len(MANY)
    assert_same(tmp_path / "streamed", tmp_path / "plain")


def test_batches_that_do_not_fit_are_halved(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(llama, tmp_path / "plain", weights="loaded", keep_tokens=True)
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def small(self: Any, x: Any) -> Any:
        if x.shape[:-1].numel() > 120:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x)

    loaded = extraction.load_model(llama, device="cpu", stream=True)
    mlps: list[Any] = [block.mlp for block in loaded.located.blocks]
    for mlp in mlps:
        monkeypatch.setattr(mlp, "forward", partial(small, mlp))
    tokens = {}
    place = extraction.ScratchPlace(folder=str(tmp_path), nbytes=1 << 30, key={}, committed=lambda: None)
    from lmprobe_zarr.batch import parse_prompts

    tokenized = extraction.tokenize(parse_prompts(PROMPTS, tokenizer=loaded.tokenizer), loaded.tokenizer)
    for batch in extraction.run(loaded, tokenized, poolings=(), keep_tokens=True, batch_tokens=400, scratch=place):
        counts = np.asarray(batch.n_tokens)
        ends = np.cumsum(counts)
        for number, digest in enumerate(batch.sha256):
            tokens[digest] = batch.tokens["resid"][:, ends[number] - counts[number] : ends[number]]
    right = lz.open_store(tmp_path / "plain")
    for text in PROMPTS:
        values = right.tokens(prompts=[text]).resid.values
        mine = next(rows for digest, rows in tokens.items() if digest.startswith(lz.prompt_hash(text)))
        np.testing.assert_allclose(mine, values, rtol=0, atol=1e-5 * np.abs(values).max())


# -- what is read ----------------------------------------------------------------------------------------------------------


def test_weights_are_read_once_for_all_batches(llama: Path, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    texts = [f"{PROMPTS[number % 2]} {number}" for number in range(1000 if STRESS else 120)]
    run(llama, tmp_path / "acts", texts, batch_prompts=len(texts) // 30, perplexity=True)
    said = re.search(r"(\d+) bytes of weights were read, of (\d+)", heard.text)
    assert said is not None
    read, held = map(int, said.groups())
    assert read == held
    assert held == sum(p.numel() * 4 for p in tiny_model("llama", "AutoModelForCausalLM").parameters())


def test_two_blocks_are_in_memory(llama: Path) -> None:
    loaded = extraction.load_model(llama, device="cpu", stream=True)
    assert loaded.streamed is not None
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in loaded.located.blocks]
    assert loaded.streamed.room_nbytes == 2 * blocks[0]
    assert len(blocks) == 4


# -- runs that are stopped -------------------------------------------------------------------------------------------------


class _StopError(BaseException):
    """Stands for whatever ends a process."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, batches: int, model: Path, store: Path, **options: Any) -> str:
    """A run that ends after so many batches, of all blocks together, as after Ctrl-C; returns what it says."""
    collect, calls = Job.collect, 0

    def counting(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt
        return collect(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", counting)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(model, store, **options)
    return "\n".join(getattr(caught.value, "__notes__", ()))


def counted(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """How many batches a call runs, of all blocks together."""
    collect, calls = Job.collect, 0

    def counting(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return collect(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", counting)
        call()
    return calls


def test_a_stopped_run_goes_on_with_its_block(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch_prompts": 1, "perplexity": True, "keep_tokens": True}
    run(llama, tmp_path / "plain", weights="loaded", **options)
    store, n = tmp_path / "streamed", len(PROMPTS)
    said = stopped_after(monkeypatch, 2 * n + 3, llama, store, **options)
    assert re.search(r"^2 of 5 passes are done and kept in .*streamed.*: the same call goes on after them$", said, re.MULTILINE)
    assert f"interrupted: 0 of {n} prompts are stored; the same call goes on from there" in said
    assert not lz.open_store(store).models()
    assert [path.name for path in left_beside(store) if path.name.startswith("pass-")] == ["pass-0000.json", "pass-0001.json"]
    stopped_after(monkeypatch, n, llama, store, **options)
    assert counted(monkeypatch, lambda: run(llama, store, **options)) == 2 * n  # the last block, norm and head
    assert_same(store, tmp_path / "plain")
    assert not left_beside(store)


@pytest.mark.few(1)
@pytest.mark.parametrize("file", ["rows-0001", "kept-0000", "pass-0000.json", "window.json"])
def test_what_is_damaged_is_not_gone_on_from(file: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, n = tmp_path / "streamed", len(PROMPTS)
    run(llama, tmp_path / "plain", weights="loaded", batch_prompts=1)
    stopped_after(monkeypatch, 2 * n + 3, llama, store, batch_prompts=1)
    path = next(path for path in left_beside(store) if path.name == file)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :])
    calls = counted(monkeypatch, lambda: run(llama, store, batch_prompts=1))
    assert calls == 4 * n
    assert_same(store, tmp_path / "plain")


@pytest.mark.few(1)
@pytest.mark.parametrize("change", ["prompts", "layers", "dtype", "weights"])
def test_another_run_does_not_go_on_from_it(change: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, n, model = tmp_path / "streamed", len(PROMPTS), tmp_path / "llama"
    shutil.copytree(llama, model)
    stopped_after(monkeypatch, 2 * n + 3, model, store, batch_prompts=1)
    if change == "weights":
        tiny_model("llama", "AutoModelForCausalLM", rms_norm_eps=1e-3).save_pretrained(model)
    changed: dict[str, dict[str, Any]] = {"prompts": {"prompts": PROMPTS[1:]}, "layers": {"layers": [0, 3]}, "dtype": {"dtype": "float64"}}
    options = changed.get(change, {})
    run(model, tmp_path / "plain", weights="loaded", batch_prompts=1, **options)
    run(model, store, batch_prompts=1, **options)
    assert_same(store, tmp_path / "plain")


def test_more_prompts_than_before_go_on_from_it_and_run_the_rest(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, n = tmp_path / "streamed", len(PROMPTS)
    run(llama, tmp_path / "plain", [*PROMPTS, "and another"], weights="loaded", batch_prompts=1)
    stopped_after(monkeypatch, 2 * n + 3, llama, store, batch_prompts=1)
    assert counted(monkeypatch, lambda: run(llama, store, [*PROMPTS, "and another"], batch_prompts=1)) == 2 * n + 4
    assert_same(store, tmp_path / "plain")


def test_a_run_that_is_stopped_while_it_hands_over_goes_on_without_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "streamed"
    run(llama, tmp_path / "plain", weights="loaded", batch_prompts=1)
    real, calls = scratch_files.Scratch.kept, 0

    def stopping(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 9:  # in the third batch of four passes
            raise _StopError
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(scratch_files.Scratch, "kept", stopping)
        with pytest.raises(_StopError):
            run(llama, store, batch_prompts=1, part_seconds=0)
    held = lz.open_store(store).dataset().sizes["prompt"]
    assert 0 < held < len(PROMPTS)
    assert counted(monkeypatch, lambda: run(llama, store, batch_prompts=1, part_seconds=0)) == 0
    found, right = lz.open_store(store).dataset(prompts=PROMPTS), lz.open_store(tmp_path / "plain").dataset(prompts=PROMPTS)
    np.testing.assert_array_equal(found.resid_mean.values, right.resid_mean.values)
    assert not left_beside(store)


def test_a_folder_that_another_process_uses_is_left_alone(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    store, n = tmp_path / "streamed", len(PROMPTS)
    stopped_after(monkeypatch, 2 * n + 3, llama, store, batch_prompts=1)
    (lock,) = (path for path in left_beside(store) if path.name == scratch_files.LOCK)
    with lock.open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert counted(monkeypatch, lambda: run(llama, store, batch_prompts=1)) == 4 * n
        assert lock.exists()


def test_what_nobody_goes_on_with_is_removed_after_a_week(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, n = tmp_path / "streamed", len(PROMPTS)
    stopped_after(monkeypatch, 2 * n + 3, llama, store, batch_prompts=1, sites=["mlp"])
    run(llama, store)
    assert left_beside(store), "it may still be gone on with"
    for path in (*left_beside(store), *(path.parent for path in left_beside(store))):
        os.utime(path, (0, 0))
    run(llama, store, layers=[0], keep_tokens=True)
    assert not left_beside(store)


def compact_and_delete(store: lz.Store) -> None:
    store.compact(progress=False)
    store.gc(max_age=0)
    store.delete("llama", PROMPTS[:2])


def evict_half(store: lz.Store) -> None:
    size = sum(path.stat().st_size for path in Path(store.url).rglob("*") if path.is_file())
    lz.evict(store.url, max_gb=size / 2 / 1e9, min_age=0)


def evict_all(store: lz.Store) -> None:
    lz.evict(store.url, max_gb=0, min_age=0)


def damage_and_repair(store: lz.Store) -> None:
    chunk = next(path for path in sorted(Path(store.url).glob("**/tokens/resid/**/*")) if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(b"nothing of this is a chunk")
    assert store.repair(progress=False).lost


@pytest.mark.few(1)
@pytest.mark.parametrize("change", [compact_and_delete, evict_half, evict_all, damage_and_repair])
def test_a_store_that_is_changed_between_two_blocks(
    change: Callable[[lz.Store], None], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "plain", weights="loaded", keep_tokens=True, pooling=[])
    store = tmp_path / "streamed"
    for text in PROMPTS:
        run(llama, store, [text], layers=[1], keep_tokens=True, pooling=[], weights="loaded")
    collect, calls = Job.collect, 0

    def meddling(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == len(PROMPTS) + 2:  # after block 2, which goes on from what is stored of block 1
            change(lz.open_store(store))
        return collect(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", meddling)
        run(llama, store, layers=[2, 3], keep_tokens=True, pooling=[], batch_prompts=1)
    assert calls == 2 * len(PROMPTS)
    found, right = lz.open_store(store).tokens(prompts=PROMPTS), lz.open_store(tmp_path / "plain").tokens(prompts=PROMPTS)
    np.testing.assert_allclose(found.resid.sel(layer=[2, 3]).values, right.resid.sel(layer=[2, 3]).values, rtol=0, atol=1e-4)


KILLED = """
import os, random, signal, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np, torch, transformers
torch.set_num_threads(1)
from pathlib import Path
import lmprobe_zarr as lz
from lmprobe_zarr.extraction import models
models.load_model  # imports what it needs before the first fork
model, url, plain, rounds, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
rng = random.Random(seed)
prompts = [f"{'the dog walks ' * (i % 7 + 1)}{i}" for i in range(60)]
asked = {"device": "cpu", "keep_tokens": True, "batch_tokens": 64, "part_seconds": 0.05, "progress": False}
lz.extract(model, prompts, store=plain, weights="loaded", **asked)
right = lz.open_store(plain).tokens(prompts=prompts).resid.values
kills = most = 0
for number in range(rounds):
    child = os.fork()
    if not child:
        try:
            lz.extract(model, prompts, store=url, weights="streamed", **asked)
        finally:
            os._exit(0)
    time.sleep(rng.uniform(0.3, 2.0))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    passes = len(list(Path(url).parent.glob(".lmprobe-zarr-streamed/*-*/pass-*.json")))
    store = lz.open_store(url)
    held = store.dataset().sizes["prompt"] if store.models() else 0
    assert held or passes >= most, "a block that was through was lost"
    most = 0 if held else passes
    if held:
        found = store.tokens(prompts=store.dataset().text.values.tolist())
        assert np.isfinite(found.resid.values).all(), "a prompt is not whole"
        if held == len(prompts):
            assert (store.tokens(prompts=prompts).resid.values == right).all()
            import shutil
            shutil.rmtree(url)
lz.extract(model, prompts, store=url, weights="streamed", **asked)
assert (lz.open_store(url).tokens(prompts=prompts).resid.values == right).all()
print("kills", kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children, so that each round need not import torch again")
def test_kill_9_at_random_moments(saved: Callable[..., Path], tmp_path: Path, warmed: Warmed) -> None:
    rounds = 200 if STRESS else 3
    model = saved("llama", num_hidden_layers=8)
    done = warmed.run(KILLED, str(model), str(tmp_path / "acts"), str(tmp_path / "plain"), str(rounds), "1", timeout=120 + 8 * rounds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= rounds // 3


# -- memory ----------------------------------------------------------------------------------------------------------------


def save_wide(folder: Path, layers: int, width: int, inner: int) -> Path:
    """A random Llama whose blocks are large enough to show in a process's memory; written block by block."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=True, dtype="float32",
        pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}

    def put(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: torch.randn(shape, generator=generator) * 0.05 if len(shape) > 1 else torch.ones(shape) for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    put("outside.safetensors", {"model.embed_tokens.weight": (300, width), "model.norm.weight": (width,)})
    for layer in range(layers):
        path = f"model.layers.{layer}."
        attention = {f"{path}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        mlp = {f"{path}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        norms = {f"{path}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        put(f"block{layer}.safetensors", {**attention, **mlp, f"{path}mlp.down_proj.weight": (width, inner), **norms})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


LIMITED = """
import ctypes, json, os, resource, sys
os.environ["OMP_NUM_THREADS"] = "1"
import torch, transformers
torch.set_num_threads(1)
import lmprobe_zarr as lz
from lmprobe_zarr.extraction import models
models.load_model, models.run
model, url, small, room, weights = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
texts = [f"the dog walks in the park {i} " * (i % 5 + 1) for i in range(40)]
lz.extract(small, texts, store=url + " small", device="cpu", progress=False)  # what every run needs is there
with open("/proc/self/status") as status:
    held = int(next(line.split()[1] for line in status if line.startswith("VmSize"))) << 10
ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: otherwise each new thread reserves 64 MiB of addresses that it hardly uses
resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
plan = lz.plan_extract(model, texts, store=url, device="cpu")
stats = lz.extract(model, texts, store=url, device="cpu", weights=weights, progress=False, pooling=["mean"], perplexity=True)
print(json.dumps({"plan": str(plan), "weights": plan.weights, "extracted": stats.extracted}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads it from /proc")
def test_a_model_larger_than_the_permitted_memory(llama: Path, tmp_path: Path, warmed: Warmed) -> None:
    layers = 60 if STRESS else 20
    model = save_wide(tmp_path / "wide", layers, 512, 2048)  # 16.8 MB a block
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    room = 260 << 20
    assert nbytes > room
    acts = tmp_path / "acts"
    refused = warmed.run(LIMITED, str(model), str(acts), str(llama), str(room), "loaded")
    assert refused.returncode, "the limit is no limit"
    done = warmed.run(LIMITED, str(model), str(acts), str(llama), str(room), "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["weights"] == "streamed"
    assert "weights   streamed, one block at a time (they take" in said["plan"]
    assert said["extracted"] == 40
    texts = [f"the dog walks in the park {i} " * (i % 5 + 1) for i in range(40)]
    run(model, tmp_path / "plain", texts, weights="loaded", perplexity=True)
    assert_same(acts, tmp_path / "plain")


FREE = """
import json, resource, sys
from lmprobe_zarr.extraction.models.free_memory import free_on
limit, field, room = getattr(resource, sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open("/proc/self/status") as status:
    held = int(next(line.split()[1] for line in status if line.startswith(field))) << 10
resource.setrlimit(limit, (held + room, held + room))
print(json.dumps(free_on("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process takes from /proc")
@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_free_memory_is_what_the_limits_of_the_process_leave(limit: str, field: str, warmed: Warmed) -> None:
    room = 300 << 20
    done = warmed.run(FREE, limit, field, str(room))
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout) - room) < 16 << 20


# -- what is refused, and said ---------------------------------------------------------------------------------------------


def test_the_plan_says_what_was_asked_for(llama: Path, tmp_path: Path) -> None:
    plan = lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts", weights="streamed")
    assert (plan.weights, plan.weights_why) == ("streamed", "as asked")
    assert "weights   streamed, one block at a time (as asked)" in str(plan)
    assert "weights='streamed'" in repr(plan)
    plain = lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts")
    assert (plain.weights, plain.weights_why) == ("loaded", "")
    assert "streamed" not in str(plain)
    run(llama, tmp_path / "acts")
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts", pooling="mean", weights="streamed").weights == "loaded", (
        "nothing is missing"
    )


@pytest.mark.parametrize("settings", [{"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_quantised_weights_are_not_streamed_unless_asked(
    settings: dict[str, Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmprobe_zarr.extraction.models.free_on", lambda _device: 1000)
    assert lz.plan_extract(llama, PROMPTS, store=tmp_path / "acts").weights == "streamed"
    quantised = tmp_path / "quantised"
    shutil.copytree(llama, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert lz.plan_extract(quantised, PROMPTS, store=tmp_path / "acts").weights == "loaded"
    assert lz.plan_extract(quantised, PROMPTS, store=tmp_path / "acts", weights="streamed").weights == "streamed"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights": "lazy"}, "use one of 'auto', 'loaded', 'streamed'"),
        ({"device_map": "auto"}, "with device_map="),
        ({"generate": lz.Generate(max_new_tokens=2)}, "every token of an answer would read all weights again"),
        ({"prompts": [("a", "b")]}, "for pairs of texts"),
    ],
)
def test_requests_that_cannot_be_streamed(options: dict[str, Any], why: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=why):
        run(llama, tmp_path / "acts", **options)
    with pytest.raises(InvalidArgumentError, match="a model object"):
        run(tiny_model("llama"), tmp_path / "acts", name="x", tokenizer=tiny_tokenizer())


def refused(model: Path, store: Path) -> str:
    """Why a model is not streamed; nothing is left of it."""
    with pytest.raises(UnknownArchitectureError, match="cannot be streamed") as error:
        run(model, store, keep_tokens=True)
    assert "weights='loaded'" in str(error.value)
    assert not left_beside(store)
    assert not (store / "zarr.json").exists() or not lz.open_store(store).models()
    return str(error.value)


def saved_random(folder: Path, name: str, config: str, **options: Any) -> Path:
    random_model(name, config, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_blocks_that_take_keys_and_values_of_earlier_ones_are_refused(tmp_path: Path) -> None:
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("this version of transformers has no Gemma 4")
    options = {
        **GROUPED, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    assert "block by block" in refused(
        saved_random(tmp_path / "gemma4", "Gemma4ForCausalLM", "Gemma4TextConfig", **options), tmp_path / "acts"
    )


def test_a_block_that_runs_several_times_is_refused(tmp_path: Path) -> None:
    options = {**SIZES, "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 1}
    model = saved_random(tmp_path / "albert", "AlbertModel", "AlbertConfig", **options)
    with pytest.raises(UnknownArchitectureError):
        run(model, tmp_path / "acts")


def test_a_pass_that_changes_its_weights_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = extraction.load_model(llama, device="cpu", stream=True)
    mlp: Any = loaded.located.blocks[1].mlp
    forward = mlp.forward

    def changing(x: Any) -> Any:
        weight = mlp.up_proj.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)  # by less than what is rounding
        return forward(x)

    monkeypatch.setattr(mlp, "forward", changing)
    with pytest.raises(UnknownArchitectureError, match="a pass changes its weights"):
        forms_by_block(loaded, check_model(loaded), head=False)


def test_a_model_that_is_refused_because_its_blocks_share_their_memory_says_so(tmp_path: Path) -> None:
    options = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 8, "context_length": 64, "rescale_every": 2}
    assert "share their memory" in refused(saved_random(tmp_path / "rwkv", "RwkvModel", "RwkvConfig", **options), tmp_path / "acts")


def test_weights_that_blocks_share_with_one_another(tmp_path: Path) -> None:
    """Zamba 2 has attention whose weights are those of several blocks: these stay in memory."""
    options = {
        **GROUPED, "num_hidden_layers": 6, "hybrid_layer_ids": [1, 3, 5], "layer_types": ["mamba", "hybrid"] * 3, "num_mem_blocks": 1,
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "use_shared_attention_adapter": False, "adapter_rank": 4,
    }  # fmt: skip
    model = saved_random(tmp_path / "zamba2", "Zamba2ForCausalLM", "Zamba2Config", **options)
    run(model, tmp_path / "plain", weights="loaded", keep_tokens=True)
    run(model, tmp_path / "streamed", keep_tokens=True)
    assert_same(tmp_path / "streamed", tmp_path / "plain")


def test_quantised_weights_and_other_formats_are_refused(llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "llama"
    shutil.copytree(llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(InvalidArgumentError, match="quantised"):
        run(model, tmp_path / "acts")
    (model / "config.json").write_text(json.dumps(config))
    torch.save(tiny_model("llama").state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no safetensors files"):
        run(model, tmp_path / "acts")


def test_files_that_are_missing_or_cut_are_named(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "llama", head="AutoModelForCausalLM")
    tiny_model("llama", "AutoModelForCausalLM").save_pretrained(model, max_shard_size="60KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    lost = sorted(model.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.write_bytes(content[:-10])
    with pytest.raises(ModelNotFoundError, match=lost.name):
        run(model, tmp_path / "acts")
    lost.unlink()
    with pytest.raises(ModelNotFoundError, match=rf"{lost.name}.* is missing"):
        run(model, tmp_path / "acts")
    with pytest.raises(ModelNotFoundError):
        run(model, tmp_path / "acts", weights="loaded")


def test_files_that_change_in_the_middle_of_a_run_are_noticed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "llama"
    shutil.copytree(llama, model)
    collect, calls = Job.collect, 0

    def changing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == len(PROMPTS) + 1:
            tiny_model("llama", "AutoModelForCausalLM").save_pretrained(model)
        return collect(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "collect", changing)
        with pytest.raises(ModelNotFoundError, match="was changed while its model was running"):
            run(model, tmp_path / "acts", batch_prompts=1)
    assert not lz.open_store(tmp_path / "acts").models()


def test_tensors_that_no_block_owns_are_refused_as_ever(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "llama"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.layers.1.extra.weight": torch.zeros(3)}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="no place for"):
        run(model, tmp_path / "acts")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"layers\.2\.mlp\.up_proj"):
        run(model, tmp_path / "acts")


def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "llama"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=r"layers\.2\.mlp\.up_proj\.weight' of layer 2"):
        run(model, tmp_path / "acts")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on file size stands for a full disk, and its error is Linux's")
def test_a_full_scratch_disk(llama: Path, tmp_path: Path, warmed: Warmed, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import resource, sys, lmprobe_zarr as lz\n"
        "model, store, *prompts = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
        "try:\n"
        "    lz.extract(model, prompts, store=store, weights='streamed', pooling='mean', device='cpu', progress=False)\n"
        "except lz.errors.NoSpaceError as error:\n"
        "    print('full:', error); raise SystemExit(7)\n"
    )
    done = warmed.run(code, str(llama), str(tmp_path / "acts"), *PROMPTS)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "free some space there" in done.stdout
    assert scratch_files.FOLDER in done.stdout
    assert not lz.open_store(tmp_path / "acts").models()
    assert issubclass(NoSpaceError, OSError)
    assert run(llama, tmp_path / "acts").extracted == len(PROMPTS)
    assert not left_beside(tmp_path / "acts")


def test_the_command_and_the_workers_of_a_client(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    from clusters import local_client

    from lmprobe_zarr.cli import main

    run(llama, tmp_path / "plain", MANY, weights="loaded", keep_tokens=True)
    with local_client(workers=2, set_as_default=False) as client:
        stats = run(llama, tmp_path / "shared", MANY, keep_tokens=True, client=client)
    assert stats.extracted == len(MANY)
    found, right = lz.open_store(tmp_path / "shared").tokens(prompts=MANY), lz.open_store(tmp_path / "plain").tokens(prompts=MANY)
    np.testing.assert_allclose(found.resid.values, right.resid.values, rtol=0, atol=1e-5 * np.abs(right.resid.values).max())
    texts = tmp_path / "prompts.txt"
    texts.write_text("the dog\nthe fox\n")
    asked = ["extract", str(llama), str(texts), "--store", str(tmp_path / "command"), "--weights", "streamed", "--device", "cpu"]
    assert main([*asked, "--dry-run"]) == 0
    assert "streamed, one block at a time (as asked)" in capsys.readouterr().out
    assert main(asked) == 0
    assert lz.open_store(tmp_path / "command").dataset().sizes["prompt"] == 2
