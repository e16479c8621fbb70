"""``extract(engine="vllm")`` in an environment that has vLLM, compared with plain passes of transformers: ``make test-engines``.

Each process starts engines, which takes most of the time; so one process runs several extractions, and tests look at what they stored.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lmprobe_zarr as lz
from lmprobe_zarr.errors import MissingDependencyError

pytest.importorskip("torch")

from tiny_models import PROMPTS, save_tiny

PYTHON = os.environ.get("LMPROBE_ZARR_ENGINES", "")
SCRIPT = Path(__file__).with_name("extract_activations.py")
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.model, pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-engines")]

# PROMPTS have 3 to 93 tokens, so that a pass of 32 tokens has rows of several of them, and the longest comes in several passes.
SITES = ["resid", "resid_mid", "attn", "mlp", "embed", "heads", "neurons"]
# Blocks that hand on two tensors; the same with norms of queries and keys; norms after attention and MLP; one tensor and positions.
KINDS = ["llama", "qwen3", "gemma2", "gpt2"]
SIZES: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SETTINGS = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 128}
VLLM: dict[str, Any] = {"engine": "vllm", "engine_options": SETTINGS}
ASKED: dict[str, Any] = {
    "prompts": PROMPTS, "sites": SITES, "pooling": ["last_token", "first_token", "mean", "max", "min"], "keep_tokens": True,
    "over": {"all": "all", "tail": {"position": [-3, None]}},
}  # fmt: skip
# The largest difference of two values, relative to the largest value. Seen: 4e-6 (Gemma 2), 8e-7 (the others); in bfloat16 1e-2.
NEAR, NEAR_16 = 2e-5, 3e-2


def save(kind: str, folder: Path) -> Path:
    """A tiny model with heads that vLLM has kernels for on a CPU."""
    return save_tiny(kind, folder / kind, head="AutoModelForCausalLM", **({"n_embd": 64, "n_head": 2} if kind == "gpt2" else SIZES))


def run(calls: list[dict[str, Any]], *, check: bool = True, processes: bool = False) -> list[dict[str, Any]]:
    """What extractions in vLLM's environment returned; with its engine in the same process, or with processes of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    environment |= {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
    command = [str(Path(PYTHON).absolute()), str(SCRIPT)]
    done = subprocess.run(
        command, input=json.dumps(calls), env=environment, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT
    )  # fmt: skip
    if not check:
        return []
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(store: lz.Store, model: str) -> list[xr.Dataset]:
    """The group of transformers and that of vLLM, compared per prompt and per token."""
    plain = next(name for name, info in store.groups().items() if "engine" not in info.provenance)
    return [
        lz.compare_groups(read(model, group=plain), read(model, provenance={"engine": "vllm"})) for read in (store.dataset, store.tokens)
    ]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store for each kind of model, which has a group of vLLM and one of transformers, run prompt by prompt."""
    folder = tmp_path_factory.mktemp("engine")
    calls = [
        {**ASKED, "model": str(save(kind, folder)), "store": str(folder / f"{kind}-store"), **options}
        for kind in KINDS
        for options in (VLLM, {"batch_prompts": 1})
    ]
    done = run(calls)
    assert [each.get("extracted") for each in done] == [len(PROMPTS)] * len(calls), done
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_transformers(kind: str, extracted: Path) -> None:
    store = lz.open_store(extracted / f"{kind}-store")
    by_prompt = {f"{site}_{pooling}{part}" for site in SITES for pooling in ASKED["pooling"] for part in ("", "_tail")}
    tokens = int(store.dataset(kind, provenance={"engine": "vllm"}).n_tokens.sum())
    for found, names, rows in zip(compared(store, kind), (by_prompt, {*SITES}), (len(PROMPTS), tokens), strict=True):
        assert set(map(str, found.data_vars)) == names
        for name in names:
            held = found[name]
            assert (held.sel(difference="relative") <= NEAR).all(), (name, held.values)
            assert (held.sel(difference="one_sided") == 0).all()
            assert (held.sel(difference="rows") == rows).all()


def test_how_it_was_run_is_recorded(extracted: Path) -> None:
    store = lz.open_store(extracted / "llama-store")
    group = store.groups()[store.dataset("llama", provenance={"engine": "vllm"}).attrs["group"]]
    assert group.provenance["engine"] == "vllm"
    recorded = store.view(group).parts[0].info.recorded
    assert recorded["vllm"].startswith("0.")
    assert recorded["tensor_parallel_size"] == 1
    assert recorded["max_num_batched_tokens"] == SETTINGS["max_num_batched_tokens"]
    assert recorded["attention"]
    assert recorded["found_layers"] == "model.layers"


def test_what_is_stored_is_found_where_there_is_no_engine(extracted: Path) -> None:
    asked: dict[str, Any] = {"store": extracted / "llama-store", "sites": SITES, "progress": False, "engine": "vllm"}
    stats = lz.extract(extracted / "llama", PROMPTS, **asked)
    assert (stats.found, stats.extracted, stats.model_loaded) == (len(PROMPTS), 0, False)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(MissingDependencyError, match="pip install vllm"):
            lz.extract(extracted / "llama", ["something else"], **asked)


def test_rows_of_cached_tokens_are_missed_and_nothing_is_stored(extracted: Path, tmp_path: Path) -> None:
    long = "A model is run over thousands of prompts, and its activations are kept. "
    call = {
        "model": str(extracted / "llama"),
        "prompts": [long * 2 + end for end in ("one", "two", "three")],
        "store": str(tmp_path / "acts"),
    }
    settings = {**SETTINGS, "max_num_seqs": 1, "block_size": 32}  # a prompt of whole blocks is found in the cache
    done = run([{**call, "engine": "vllm", "engine_options": settings, "forced": {"enable_prefix_caching": True}}])[0]
    assert done["error"] == "EngineError"
    assert "so nothing of them is stored" in done["message"]
    assert "rows of positions" in done["message"]
    store = lz.open_store(tmp_path / "acts")
    assert not any(store.holds_parts(name) for name in store.groups())


def test_compiled_code_is_seen_and_nothing_is_stored(extracted: Path, tmp_path: Path) -> None:
    call = {"model": str(extracted / "llama"), "prompts": PROMPTS, "store": str(tmp_path / "acts"), **VLLM}
    done = run([{**call, "forced": {"enforce_eager": False}}])[0]
    assert done["error"] in ("EngineError", "UnknownArchitectureError")
    store = lz.open_store(tmp_path / "acts")
    assert not any(store.holds_parts(name) for name in store.groups())


def test_after_a_kill_the_rest_is_run(extracted: Path, tmp_path: Path) -> None:
    call = {
        **ASKED,
        "model": str(extracted / "llama"),
        "prompts": PROMPTS,
        "store": str(tmp_path / "acts"),
        **VLLM,
        "part_seconds": 0,
        "batch_prompts": 2,
    }
    run([{**call, "stop_after": 1}], check=False)
    done = run([call])[0]
    assert 0 < done["found"] < len(PROMPTS)
    assert done["extracted"] == len(PROMPTS) - done["found"]
    whole, again = (
        lz.open_store(each).tokens("llama", provenance={"engine": "vllm"}) for each in (extracted / "llama-store", tmp_path / "acts")
    )
    found = lz.compare_groups(whole, again)
    assert (found.resid.sel(difference="relative") <= NEAR).all()
    assert (found.resid.sel(difference="rows") == whole.sizes["token"]).all()


def test_with_processes_of_its_own_in_bfloat16_and_by_path(extracted: Path, tmp_path: Path) -> None:
    paths = {"resid": "resid", "z": "self_attn.o_proj:input", "last": "/model.norm", "heads": "heads"}
    call = {
        "model": str(extracted / "qwen3"),
        "prompts": PROMPTS,
        "store": str(tmp_path / "acts"),
        "sites": paths,
        "keep_tokens": True,
        "dtype": "bfloat16",
    }
    done = run([{**call, **VLLM}, {**call, "sites": ["resid"]}], processes=True)
    assert [each.get("extracted") for each in done] == [len(PROMPTS)] * 2, done
    store = lz.open_store(tmp_path / "acts")
    toks = store.tokens("qwen3", provenance={"engine": "vllm"})
    assert toks.resid.attrs["stored_dtype"] == "bfloat16"
    assert toks.z.attrs["site_path"] == "self_attn.o_proj:input"
    assert np.array_equal(toks.z.values, toks.heads.values)
    assert toks["last"].dims == ("token", "hidden")
    for found in compared(store, "qwen3"):
        assert set(map(str, found.data_vars)) <= {"resid", "resid_last_token"}
        for held in found.data_vars.values():
            assert (held.sel(difference="relative") <= NEAR_16).all()
