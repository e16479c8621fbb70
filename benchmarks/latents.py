"""What encoding costs beside the bare matrix product, and finding where a latent is strongest beside reading everything.

``python -m benchmarks.latents``. The rows and the autoencoder are random numbers. Of each row some 1.4 % of the latents are active, and the
rows of a prompt resemble one another, so that they share latents as those of a text do.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.timing import alternate

LATENTS, K, LENGTH, COMMON = 4096, 64, 128, 0.8


def written(folder: str, prompts: int, hidden: int) -> tuple[lz.Store, lz.SparseAutoencoder, Any]:
    """A store of rows, an autoencoder of their width, and the rows themselves."""
    rng = np.random.default_rng(0)
    rows = [
        np.sqrt(COMMON) * rng.standard_normal(hidden, np.float32) + np.sqrt(1 - COMMON) * rng.standard_normal((LENGTH, hidden), np.float32)
        for _ in range(prompts)
    ]
    rows = [row.astype(np.float32) for row in rows]
    weights = (rng.standard_normal((hidden, LATENTS)) / np.sqrt(hidden)).astype(np.float32)
    store = lz.open_store(folder)
    lz.write_activations(store, model="m", prompts=[f"p{i}" for i in range(prompts)], activations={"resid": {0: rows}})
    bias = np.full(LATENTS, -2.2, np.float32)
    return store, lz.SparseAutoencoder(encoder=weights, encoder_bias=bias, layer=0), np.concatenate(rows)


def encoding(prompts: int, hidden: int, runs: int) -> None:
    """Tokens per second, beside the product of rows and weights in the same blocks and dtype."""
    with tempfile.TemporaryDirectory() as folder:
        store, sae, rows = written(folder, prompts, hidden)
        numbers = itertools.count()

        def product(dtype: str) -> None:
            wide = sae.encoder.astype(dtype)
            for start in range(0, len(rows), 2048):
                rows[start : start + 2048].astype(dtype) @ wide

        def encode(dtype: Any) -> None:
            lz.encode(store.tokens().resid, sae, name=f"latents_{next(numbers)}", k=K, compute_dtype=dtype, progress=False)

        took = alternate(
            {
                "product in float64": lambda: product("float64"), "encode in float64": lambda: encode("float64"),
                "product in float32": lambda: product("float32"), "encode in float32": lambda: encode("float32"),
            },
            runs,
        )  # fmt: skip
        print(f"{len(rows)} tokens of {hidden}, {LATENTS} latents, {K} kept")
        for name, seconds in took.items():
            beside = seconds / took[f"product{name[-11:]}"]
            print(f"{name:<24}{seconds:<8.2f}s   {len(rows) / seconds:<10.0f}tokens/s   {beside:.2f} × the product", flush=True)


def searching(prompts: int, hidden: int, runs: int) -> None:
    """Milliseconds to find the ten strongest prompts of a latent; both sides open the tokens anew."""
    with tempfile.TemporaryDirectory() as folder:
        store, sae, _ = written(folder, prompts, hidden)
        lz.encode(store.tokens().resid, sae, k=K, compute_dtype="float32", progress=False)

        def read_all(feature: int) -> Any:
            held = store.tokens()[["latents_values", "latents_indices"]].load()
            strength = np.where(held.latents_indices.values == feature, held.latents_values.values, 0).max(axis=1)
            return np.sort(strength.reshape(prompts, LENGTH).max(axis=1))[::-1][:10]

        def search(feature: int) -> Any:
            return lz.top_tokens(store.tokens(), feature).values

        assert (search(7) == read_all(7)[: len(search(7))]).all()
        features = itertools.count()
        took = alternate(
            {
                "reading everything": lambda: [read_all(next(features) % LATENTS) for _ in range(3)],
                "top_tokens": lambda: [search(next(features) % LATENTS) for _ in range(3)],
                "opening the tokens": lambda: [store.tokens() for _ in range(3)],
            },
            runs,
        )  # fmt: skip
        ds = store.dataset()
        lists = ds.latents_max_values.nbytes + ds.latents_max_indices.nbytes
        active = float((ds.latents_max_indices.values >= 0).sum(axis=1).mean())
        share = lists / (prompts * LENGTH * K * 8)
        print(f"{prompts} prompts of {LENGTH} tokens, {active:.0f} latents in one")
        print(f"lists of {ds.sizes['latents_max_k']}: {share:.2f} of the bytes of the tokens' latents")
        for name, seconds in took.items():
            print(f"{name:<24}{1e3 * seconds / 3:<8.1f}ms a latent   {took['reading everything'] / seconds:.1f} × as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1500, help="that are searched")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    encoding(160, 256, given.runs)
    searching(given.prompts, 32, given.runs)


if __name__ == "__main__":
    main()
