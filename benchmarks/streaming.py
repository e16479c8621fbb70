"""How fast batches for training come, beside one sequential read of the same layer, and how well they are mixed: ``make bench``.

All sides alternate within one run, so that a ratio holds where the machine's speed drifts. The page cache is warm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import lmprobe_zarr as lz
from benchmarks.reading import GROUP, activations, medians
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch

PER_PROMPT = 66
BATCH = 4096


def fill(folder: Path, prompts: int) -> xr.Dataset:
    """Two layers of tokens, float16, 2048 wide, in the default codec and chunks."""
    store = lz.open_store(folder, durable=False)
    digests = [prompt_sha256(str(i)) for i in range(prompts)]
    values = activations((2, prompts * PER_PROMPT, 2048))
    store.write(GROUP, TokenBatch(sha256=digests, layers=(0, 1), n_tokens=np.full(prompts, PER_PROMPT), tokens={"resid": values}))
    return store.tokens()


def sides_of(tokens: xr.Dataset) -> dict[str, Callable[[], Any]]:
    """What is timed: one epoch over one layer each, and the sequential read that it is compared with."""

    def drain(**options: Any) -> Callable[[], int]:
        return lambda: sum(len(batch) for batch in tokens.lz.batches(layer=1, batch_tokens=BATCH, **options))

    sides: dict[str, Callable[[], Any]] = {
        "sequential read": lambda: tokens.resid.isel(layer=1).values,
        "batches": drain(),
        "batches, buffer of 8,192": drain(buffer_tokens=8192),
        "batches, without the first token": drain(skip_positions=0),
        "batches, in order": drain(shuffle=False),
        "batches, float32": drain(dtype="float32"),
        "mean, deviation and norms": lambda: tokens.lz.statistics(layer=1),
    }
    try:
        import torch  # noqa: F401 — only whether it is there
    except ImportError:
        return sides
    return {**sides, "torch": drain(framework="torch"), "torch, float32": drain(framework="torch", dtype="float32")}


def mixing(prompts: int, chunk: int, batch: int, buffer: int) -> dict[str, Any]:
    """Mean number of distinct prompts in a batch, beside that of a full shuffle: a matter of the plan alone, nothing is read."""
    from lmprobe_zarr.streaming.order import Blocks, Order, plan_reading

    n = prompts * PER_PROMPT
    of = np.arange(n) // PER_PROMPT
    blocks = Blocks(np.append(np.arange(0, n, chunk), n))
    stream = plan_reading(blocks, Order(batch, buffer, drop_last=True), 0)
    rows = np.concatenate([stream.window(i) for i in range(len(stream.cuts) - 1)])
    full = np.random.default_rng(0).permutation(n)
    ours, best = (np.mean([len(np.unique(of[some[i : i + batch]])) for i in range(0, n - batch + 1, batch)]) for some in (rows, full))
    return {"batch": batch, "buffer": buffer, "prompts": float(ours), "full_shuffle": float(best), "share": float(ours / best)}


def main() -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the prompts, three runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prompts = 300 if options.quick else 1500
    with tempfile.TemporaryDirectory() as folder:
        tokens = fill(Path(folder) / "acts", prompts)
        nbytes = tokens.resid.isel(layer=1).nbytes
        seconds = medians(sides_of(tokens), 3 if options.quick else 5)
    rows = [
        {"side": side, "ms": 1e3 * value, "gb_per_s": nbytes / value / 1e9, "of_sequential": seconds["sequential read"] / value}
        for side, value in seconds.items()
    ]
    mixed = [
        mixing(20_000, chunk, batch, buffer)
        for chunk, batch, buffer in ((1024, 256, 2**13), (1024, 256, 2**16), (1024, 4096, 2**16), (1024, 4096, 2**18))
    ]
    if options.json:
        json.dump({"layer_mb": nbytes / 1e6, "speed": rows, "mixing": mixed}, sys.stdout, indent=2)
        return 0
    print(f"one layer of {nbytes / 1e6:.0f} MB, stored values           time      GB/s   of sequential")
    for r in rows:
        print(f"{r['side']:<40} {r['ms']:>8.0f} ms {r['gb_per_s']:>7.2f} {r['of_sequential']:>12.2f}")
    print("\nbatch    buffer   distinct prompts per batch   of a full shuffle   share")
    for m in mixed:
        print(f"{m['batch']:>5} {m['buffer']:>9} {m['prompts']:>18.0f} {m['full_shuffle']:>22.0f} {m['share']:>14.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
