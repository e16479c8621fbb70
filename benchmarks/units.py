"""What shuffled batches gain and lose where parts of chunks are shuffled instead of whole chunks: ``python -m benchmarks.units``.

Blocks of a chunk can be read alone, so a buffer of the same size could hold rows of more places. The library shuffles whole chunks; here
its plan is cut finer, and the same rows are read by the same code. How well a buffer mixes is a matter of the plan alone. For the seconds
every unit reads whole epochs of one layer in turn, in one process, so that the ratios hold where the speed of the machine drifts. Local
disk, warm page cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import activations, digests
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.streaming.order import Blocks, Order, plan_reading

HIDDEN = 2048
ROW_BYTES = 2 * HIDDEN
CHUNK_ROWS = 2**21 // ROW_BYTES
BATCH = 4096
#: Rows that are shuffled together: a chunk of 2 MiB, its half, quarter and eighth.
UNITS = {"chunk": 1, "half": 2, "quarter": 4, "eighth": 8}
BUFFERS = (16, 64, 256)


def mixing(rows: int, per_prompt: int, unit: int | None, buffer_mb: int) -> dict[str, float]:
    """How the rows of a batch are spread over prompts; a true permutation without a unit."""
    prompt_of = np.arange(rows) // per_prompt
    if unit is None:
        order = np.random.default_rng(0).permutation(rows)
    else:
        blocks = Blocks(np.append(np.arange(0, rows, unit), rows))
        plan = plan_reading(blocks, Order(BATCH, buffer_mb * 2**20 // ROW_BYTES, drop_last=True), 0)
        order = np.concatenate([plan.window(i) for i in range(len(plan.cuts) - 1)])
    counts = [np.bincount(prompt_of[order[i : i + BATCH]]) for i in range(0, rows - BATCH + 1, 4 * BATCH)]
    return {
        "same": float(np.mean([(count**2).sum() / BATCH for count in counts])),  # as a row of the batch sees it, itself included
        "worst": float(max(count.max() for count in counts)),
        "prompts": float(np.mean([np.count_nonzero(count) for count in counts])),
    }


def speed(folder: Path, prompts: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of an epoch for each codec, buffer and unit, and the ratio to that of whole chunks, the median of all turns."""
    group = GroupInfo(model="bench", num_layers=1, hidden_size=HIDDEN)
    counts = np.full(prompts, 66)
    values, sha = activations((1, int(counts.sum()), HIDDEN)), digests(prompts)
    found: list[dict[str, Any]] = []
    for codec in ("default", "raw"):
        store = lz.open_store(folder / codec, durable=False)
        with store.new_part(group, compressed=codec == "default") as part:
            part.append(TokenBatch(sha256=sha, layers=(0,), n_tokens=counts, tokens={"resid": values}))
            part.commit()
        tokens = store.tokens(dtype="stored")
        for buffer_mb in BUFFERS:
            seconds: dict[str, list[float]] = {name: [] for name in UNITS}
            for _, (name, parts) in itertools.product(range(repeats), UNITS.items()):
                batches = tokens.lz.batches(layer=0, batch_tokens=BATCH, buffer_tokens=buffer_mb * 2**20 // ROW_BYTES)
                n = int(batches.blocks.offsets[-1])
                if (np.diff(batches.blocks.offsets)[:-1] != CHUNK_ROWS).any():
                    raise AssertionError("chunks have other rows than this benchmark cuts")
                batches.blocks = Blocks(np.append(np.arange(0, n, CHUNK_ROWS // parts), n))
                began = time.perf_counter()
                if sum(len(batch) for batch in batches) != n:
                    raise AssertionError("rows are missing")
                seconds[name].append(time.perf_counter() - began)
            for name, times in seconds.items():
                ratio = statistics.median(whole / some for whole, some in zip(seconds["chunk"], times, strict=True))
                found.append({"codec": codec, "buffer_mb": buffer_mb, "unit": name, "ms": 1e3 * statistics.median(times), "speed": ratio})
    return found


def main() -> int:
    """Print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, three turns")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = 2**19 if options.quick else 2**21
    mixed: list[dict[str, Any]] = []
    for per_prompt in (66, 1024):
        for buffer_mb, (name, parts) in itertools.product(BUFFERS, UNITS.items()):
            mixed.append(
                {"per_prompt": per_prompt, "buffer_mb": buffer_mb, "unit": name, **mixing(rows, per_prompt, CHUNK_ROWS // parts, buffer_mb)}
            )
        mixed.append({"per_prompt": per_prompt, "buffer_mb": 0, "unit": "permutation", **mixing(rows, per_prompt, None, 0)})
    with tempfile.TemporaryDirectory() as folder:
        speeds = speed(Path(folder), 400 if options.quick else 1500, 3 if options.quick else 9)
    if options.json:
        json.dump({"mixing": mixed, "speed": speeds}, sys.stdout, indent=2)
        return 0
    print(f"batches of {BATCH} of {rows} rows: rows of a batch that are from the same prompt")
    print("tokens of a prompt, MiB, unit      mean  worst  prompts")
    for m in mixed:
        print(f"{m['per_prompt']:>8} {m['buffer_mb']:>9} {m['unit']:>13} {m['same']:>9.1f} {m['worst']:>6.0f} {m['prompts']:>8.0f}")
    print("\none epoch\ncodec, MiB, unit          ms   of the speed of whole chunks")
    for s in speeds:
        print(f"{s['codec']:<8} {s['buffer_mb']:>4} {s['unit']:>9} {s['ms']:>7.0f} {s['speed']:>8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
