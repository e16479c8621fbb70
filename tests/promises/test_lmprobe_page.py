"""What lmprobe's page on caching shows, typed with this package in its place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmprobe_zarr as lz

pytestmark = pytest.mark.model
pytest.importorskip("torch")

from tiny_models import save_tiny  # noqa: E402 — needs torch

PROMPTS = ["Who wants to go for a walk?", "My tail is wagging.", "I missed the train.", "It rains."]


@pytest.fixture
def lmprobe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``import lmprobe`` is this package."""
    monkeypatch.setitem(sys.modules, "lmprobe", lz)
    monkeypatch.setitem(sys.modules, "lmprobe.cache", sys.modules["lmprobe_zarr.cache"])
    yield
    lz.enable_cache_logging("warning")


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    model = str(save_tiny("llama", tmp_path / "Llama-3.1-8B-Instruct"))
    probe = lz.Probe(model=model, layers="all").fit(PROMPTS[:2], PROMPTS[2:])
    return {"probe": probe, "model": model, "test_prompts": [*PROMPTS, "A new one."]}


SNIPPETS = {
    "inspecting the cache": "from lmprobe import cache_info\ninfo = cache_info()\nprint(info)\nassert info.models",
    "reducing disk usage": "from lmprobe import set_cache_dtype\nset_cache_dtype('float16')\nset_cache_dtype(None)",
    "lru eviction": "from lmprobe import set_cache_limit\nset_cache_limit(50)",
    "s3 backend": "from lmprobe import set_cache_backend\nset_cache_backend('s3://my-bucket/prefix')\nset_cache_backend(None)",
    "warmup": "probe.warmup(test_prompts, batch_size=16)\n# Subsequent calls hit the cache\npredictions = probe.predict(test_prompts)",
    "logging": "from lmprobe import enable_cache_logging\nenable_cache_logging()\nprobe.predict(test_prompts)",
    "evicting": "from lmprobe import evict, set_cache_limit\nset_cache_limit(1e-9)\nevict()\nset_cache_limit(None)",
    "introspection": (
        "from lmprobe import discover_cached\n"
        "info = discover_cached(model, 'Who wants to go for a walk?')\n"
        "if info is not None:\n"
        "    print(info.raw_layers)\n    print(info.pooled)\n    print(info.has_perplexity)\n    print(info.has_logits)\n"
        "assert info.pooled == {'last_token': [0, 1, 2, 3]}\n"
        "assert discover_cached('meta-llama/Llama-3.1-8B-Instruct', 'Who wants to go for a walk?') is None"
    ),
    "clearing": "from lmprobe.cache import clear_cache, cache_info\nassert clear_cache() > 0\nassert not cache_info().models",
}


@pytest.mark.few(2)
@pytest.mark.parametrize("snippet", list(SNIPPETS))
def test_every_snippet_of_the_page_runs(snippet: str, names: dict[str, Any], lmprobe: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(SNIPPETS[snippet], snippet, "exec"), names)  # noqa: S102 — what a reader of the page types
