"""Datasets that lmprobe itself writes: its cache filled with known values, and what its `push_dataset` would upload, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "acme/toy-4l"
LAYERS = (0, 1, 3)
HIDDEN, TOP_K, EXPERTS = 6, 3, 4


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was put into the cache, prompt by prompt."""

    prompts: list[str]
    labels: list[Any]
    extra: list[dict[str, Any]]
    tokens: list[np.ndarray[Any, Any]]
    pooled: list[np.ndarray[Any, Any]]
    perplexity: list[np.ndarray[Any, Any]]
    token_ids: list[np.ndarray[Any, Any]]
    token_perplexity: list[np.ndarray[Any, Any]]
    top_values: list[np.ndarray[Any, Any]]
    top_indices: list[np.ndarray[Any, Any]]
    router: list[np.ndarray[Any, Any]]


def make_truth(n: int = 7, seed: int = 0) -> Truth:
    """Values of some prompts; one has a single token."""
    rng = np.random.default_rng(seed)
    lengths = [1, *(rng.integers(2, 9, n - 1)).tolist()]

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype("float32")

    return Truth(
        prompts=[f"prompt number {i} — 你好" for i in range(n)],
        labels=[i % 2 for i in range(n)],
        extra=[{"topic": f"t{i % 3}", "weight": i / 4, "seen": i % 2 == 0} for i in range(n)],
        tokens=[draw(len(LAYERS), count, HIDDEN) for count in lengths],
        pooled=[draw(len(LAYERS), HIDDEN) for _ in lengths],
        perplexity=[np.abs(draw(3)) for _ in lengths],
        token_ids=[rng.integers(0, 100, count) for count in lengths],
        token_perplexity=[np.abs(draw(count - 1)) for count in lengths],
        top_values=[draw(TOP_K) for _ in lengths],
        top_indices=[rng.integers(0, 100, TOP_K) for _ in lengths],
        router=[draw(len(LAYERS), EXPERTS) for _ in lengths],
    )


def write_dataset(
    folder: Path, truth: Truth, *, pooling: str = "", shard_bytes: int = 200, kinds: bool = True, shuffle: bool = True
) -> Path:
    """The files of a dataset, as lmprobe writes them before it uploads them; its cache is a folder beside them.

    Parameters
    ----------
    pooling : str
        Share vectors of this pooling; empty for whole sequences.
    shard_bytes : int
        Where lmprobe begins another file.
    kinds : bool
        Share logits and router logits too.
    """
    import torch
    from lmprobe import cache, sharing

    cache.set_cache_backend(f"{folder}-cache")
    layers = list(LAYERS)
    for i, prompt in enumerate(truth.prompts):
        # Two positions of padding on the left, which lmprobe leaves out.
        n = truth.tokens[i].shape[1]
        padded = np.concatenate([np.full((len(layers), 2, HIDDEN), 9e9, "float32"), truth.tokens[i]], axis=1)
        side_by_side = torch.from_numpy(padded.transpose(1, 0, 2).reshape(1, n + 2, -1).copy())
        mask = torch.tensor([[0, 0, *[1] * n]])
        if pooling:
            cache.save_prompt_pooled_activations(MODEL, prompt, layers, torch.from_numpy(truth.pooled[i].reshape(1, -1).copy()), pooling)
        else:
            cache.save_prompt_activations(MODEL, prompt, layers, side_by_side, mask)
        if kinds:
            ids, values = torch.from_numpy(truth.token_ids[i].astype("int64")), torch.from_numpy(truth.token_perplexity[i])
            cache.save_prompt_perplexity(MODEL, prompt, torch.from_numpy(truth.perplexity[i]), None if pooling else values, ids)
            top = torch.from_numpy(truth.top_values[i]).reshape(1, 1, -1), torch.from_numpy(truth.top_indices[i]).reshape(1, 1, -1)
            cache.save_prompt_topk_logits(MODEL, prompt, *top, torch.ones(1, 1, dtype=torch.long))
            cache.save_prompt_router_logits(
                MODEL, prompt, {layer: torch.from_numpy(truth.router[i][j : j + 1].copy()) for j, layer in enumerate(layers)}
            )
    # Its texts of tokens are decoded by the model's tokenizer, which this model has none of.
    sharing._tokenizer_cache["instance"] = type("Tokenizer", (), {"decode": staticmethod(str)})()
    kept, infos = sharing._discover_prompts(MODEL, truth.prompts)
    found = sharing._filter_tensor_types(sharing._compute_tensor_intersection(infos), None)
    folder.mkdir(parents=True)
    _, descriptors, rows = sharing._consolidate_and_shard(
        MODEL, truth.prompts, kept, found, truth.labels, shard_bytes, "acme/toy-activations", metadata=truth.extra, tmpdir=folder,
    )  # fmt: skip
    sharing._write_parquet_index(folder, rows, sharing._build_lmprobe_info(MODEL, len(rows), descriptors))
    cache.set_cache_backend(None)
    return folder
