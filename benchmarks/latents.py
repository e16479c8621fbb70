"""What encoding costs beside the bare matrix product, and finding where a latent is strongest beside reading everything.

``python -m benchmarks.latents``. The rows and the autoencoder are random numbers; of each row some 1.4 % of the latents are active.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.timing import alternate

HIDDEN, LATENTS, K, LENGTH = 256, 4096, 64, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((LENGTH, HIDDEN), np.float32) for _ in range(given.prompts)]
    weights = (rng.standard_normal((HIDDEN, LATENTS)) / np.sqrt(HIDDEN)).astype(np.float32)
    sae = lz.SparseAutoencoder(encoder=weights, encoder_bias=np.full(LATENTS, -2.2, np.float32), layer=0)
    tokens = given.prompts * LENGTH
    with tempfile.TemporaryDirectory() as folder:
        store = lz.open_store(folder)
        lz.write_activations(store, model="m", prompts=[f"p{i}" for i in range(given.prompts)], activations={"resid": {0: rows}})
        together, numbers = np.concatenate(rows), itertools.count()

        def product(dtype: str) -> None:
            wide = weights.astype(dtype)
            for start in range(0, tokens, 2048):
                together[start : start + 2048].astype(dtype) @ wide

        def encode(dtype: Any) -> None:
            name = f"latents_{next(numbers)}"
            lz.encode(store.tokens().resid, sae, name=name, k=K, compute_dtype=dtype, progress=False)

        took = alternate(
            {
                "product in float64": lambda: product("float64"), "encode in float64": lambda: encode("float64"),
                "product in float32": lambda: product("float32"), "encode in float32": lambda: encode("float32"),
            },
            given.runs,
        )  # fmt: skip
        print(f"{tokens} tokens of {HIDDEN}, {LATENTS} latents, {K} kept")
        for name, seconds in took.items():
            beside = seconds / took[f"product{name[-11:]}"]
            print(f"{name:<24}{seconds:<8.2f}s   {tokens / seconds:<10.0f}tokens/s   {beside:.2f} × the product", flush=True)

        def read_all(feature: int) -> Any:
            held = store.tokens()[["latents_0_values", "latents_0_indices"]].load()
            strength = np.where(held.latents_0_indices.values == feature, held.latents_0_values.values, 0).max(axis=1)
            return np.sort(strength.reshape(given.prompts, LENGTH).max(axis=1))[::-1][:10]

        def search(feature: int) -> Any:
            return lz.top_tokens(store.tokens(), feature, 10, name="latents_0").values

        assert (search(7)[:10] == read_all(7)[: len(search(7))]).all()
        features = itertools.count()
        found = alternate(
            {
                "reading everything": lambda: [read_all(next(features) % LATENTS) for _ in range(3)],
                "top_tokens": lambda: [search(next(features) % LATENTS) for _ in range(3)],
            },
            given.runs,
        )  # fmt: skip
        ds = store.dataset()
        lists = ds.latents_0_max_values.nbytes + ds.latents_0_max_indices.nbytes
        print(f"lists of {ds.sizes['latents_0_max_k']} latents: {lists / (tokens * K * 8):.2f} of the bytes of the tokens' latents")
        for name, seconds in found.items():
            print(f"{name:<24}{1e3 * seconds / 3:<8.1f}ms a latent   {found['reading everything'] / seconds:.1f} × as fast", flush=True)


if __name__ == "__main__":
    main()
