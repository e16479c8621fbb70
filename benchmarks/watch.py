"""What watching costs while a model generates: ``python -m benchmarks.watch``, or with ``--device cuda``.

The same greedy generation with and without probes that watch it, in turn. The model is a llama with random weights, as fast as a
trained one of its size.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformers import AutoModelForCausalLM, LlamaConfig

import lmprobe_zarr as lz
from benchmarks.timing import alternate

LAYERS, HIDDEN, VOCABULARY, PROMPTS, LENGTH, STEPS = 8, 512, 4_000, 4, 32, 16


def probes(probe: str, layers: int, heads: int = 0) -> xr.Dataset:
    """Probes with coefficients that nothing was fitted for, as `fit_tokens` gives them."""
    rng = np.random.default_rng(0)
    shape, dims = ((layers, heads, HIDDEN), ("layer", "head", "hidden")) if heads else ((layers, HIDDEN), ("layer", "hidden"))
    variables: dict[str, Any] = {"coef": (dims, rng.standard_normal(shape) / HIDDEN), "intercept": ("layer", np.zeros(layers))}
    if probe == "attention":
        variables["query_coef"] = (dims, rng.standard_normal(shape) / HIDDEN)
    attrs = {"probe": f"{probe}:{heads}" if heads else probe, "labels": "label", "classes": [False, True], "variable": "resid"}
    return xr.Dataset(variables, {"layer": np.linspace(0, LAYERS - 1, layers, dtype=int)}, attrs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, vocab_size=VOCABULARY,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().to(given.device)
    ids = torch.randint(1, VOCABULARY, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).to(given.device)

    def generate(context: AbstractContextManager[Any]) -> None:
        with context:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=given.steps, do_sample=False)
        if given.device != "cpu":
            torch.cuda.synchronize()

    sides: dict[str, Any] = {
        "alone": nullcontext,
        "1 layer, linear, score:max": lambda: lz.watch(model, probes("lda", 1), "score:max", threshold=0.0),
        f"{LAYERS} layers, linear, score:max": lambda: lz.watch(model, probes("lda", LAYERS), "score:max", threshold=0.0),
        f"{LAYERS} layers, attention of 4 heads": lambda: lz.watch(model, probes("attention", LAYERS, 4), threshold=0.0),
    }
    took = alternate({name: lambda make=make: generate(make()) for name, make in sides.items()}, given.runs)  # type: ignore[misc]
    print(f"{LAYERS} layers of {HIDDEN}, {PROMPTS} prompts of {LENGTH} tokens, {given.steps} steps, on {given.device}")
    print("watched                                 seconds   ms a step more   watched / alone")
    for name, seconds in took.items():
        more = 1e3 * (seconds - took["alone"]) / given.steps
        print(f"{name:<40}{seconds:<10.2f}{more:<17.2f}{seconds / took['alone']:.3f}", flush=True)


if __name__ == "__main__":
    main()
