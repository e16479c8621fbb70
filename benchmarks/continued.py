"""Deeper layers from a stored one beside the whole pass: ``python -m benchmarks.continued``, seconds of the processor, largest difference.

A random float32 Llama of 16 blocks; all tokens of layer 7 are stored, and layers 8 to 15 are asked for, in a store that has it and in one
that is empty, in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

import lmprobe_zarr as lz
from benchmarks.streamed import VOCABULARY, save_model

BLOCKS: Final = 16
STORED: Final = 7
GOAL: Final = 0.6


def measure(folder: Path, *, width: int, prompts: int, rounds: int) -> dict[str, float]:
    """Seconds of both ways, medians of some rounds, their ratio, and the largest difference as a share of the largest value."""
    model = folder / "model"
    save_model(model, width, 3 * width, blocks=BLOCKS)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, VOCABULARY, length)) for length in rng.integers(6, 129, prompts)]
    asked: dict[str, Any] = {"pooling": [], "keep_tokens": True, "device": "cpu", "progress": False}
    lz.extract(str(model), texts, store=folder / "stored", layers=[STORED], **asked)
    seconds: dict[str, list[float]] = {"whole": [], "continued": []}
    deeper = list(range(STORED + 1, BLOCKS))
    for _ in range(rounds):
        for way, times in seconds.items():
            store = folder / way
            shutil.rmtree(store, ignore_errors=True)
            if way == "continued":
                shutil.copytree(folder / "stored", store)
            planned = lz.plan_extract(str(model), texts, store=store, layers=deeper, **{k: asked[k] for k in ("pooling", "keep_tokens")})
            if planned.continued_from != (STORED if way == "continued" else None):
                raise SystemExit(f"{way}: continued from {planned.continued_from}")
            begun = time.process_time()
            lz.extract(str(model), texts, store=store, layers=deeper, **asked)
            times.append(time.process_time() - begun)
    whole, continued = (lz.open_store(folder / way).tokens(prompts=texts).resid.sel(layer=deeper).values for way in seconds)
    took = {way: median(times) for way, times in seconds.items()}
    return {
        "whole pass, s": took["whole"],
        "continued, s": took["continued"],
        "ratio": took["continued"] / took["whole"],
        "largest difference": float(np.abs(whole - continued).max() / np.abs(whole).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), width=given.width, prompts=given.prompts, rounds=given.rounds)
    if given.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<24} {value:.3g}")
    print(f"goal {GOAL}: {'reached' if found['ratio'] <= GOAL else 'not reached'}")


if __name__ == "__main__":
    main()
