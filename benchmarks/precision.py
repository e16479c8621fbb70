"""What storing with less precision costs and saves, on real activations: ``python -m benchmarks.precision``.

The 400 sentences of the demo through all-MiniLM-L6-v2, every token of every layer, stored with each setting: bits per value with the
default codec, relative error, and the accuracy of a probe on the mean of the tokens.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np

import lmprobe_zarr as lz
from lmprobe_zarr.demo import bundled_model, load_sentences

SETTINGS = [
    ("float32", None),
    ("float32", 16),
    ("float32", 10),
    ("bfloat16", None),
    ("bfloat16", 5),
    ("bfloat16", 3),
    ("float16", None),
    ("float16", 8),
    ("float16", 7),
    ("float16", 5),
    ("float16", 4),
    ("float16", 3),
]


def main() -> None:
    sentences = load_sentences()
    with tempfile.TemporaryDirectory() as folder:
        exact = None
        print("| storage_dtype | keep_bits | bits per value | largest relative error | median relative error | probe accuracy |")
        print("|---|---|---|---|---|---|")
        for number, (dtype, keep_bits) in enumerate(SETTINGS):
            store = lz.open_store(Path(folder) / str(number), durable=False)
            lz.extract(
                bundled_model(), sentences["text"], store=store, pooling=["mean"], keep_tokens=True, dtype="float32",
                storage_dtype=dtype, keep_bits=keep_bits, coords={"label": sentences["label"], "pair": sentences["pair"]}, progress=False,
            )  # fmt: skip
            tokens = store.tokens(prompts=sentences["text"])
            values = tokens.resid.values.astype(np.float64)
            exact = values if exact is None else exact
            with np.errstate(divide="ignore", invalid="ignore"):
                error = np.abs(values - exact) / np.abs(exact)
            size = sum(path.stat().st_size for path in Path(store.url).glob("*/*/tokens/resid/c.*"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = lz.sweep(store.dataset(prompts=sentences["text"]).resid_mean, labels="label", groups="pair", cv=5)
            normal = np.abs(exact) > 1e-4
            print(
                f"| {dtype} | {keep_bits or 'all'} | {8 * size / values.size:.1f} | {error[normal].max():.1e} "
                f"| {np.median(error[normal]):.1e} | {float(scores.accuracy.mean()):.3f} |"
            )


if __name__ == "__main__":
    main()
