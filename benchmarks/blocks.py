"""What format 2 changes: the same activations in parts of format 1, of format 2, and of format 2 with shards: ``make bench``.

One process reads them in turn, so that the ratios hold where the speed of the machine drifts. A part of format 1 is read as every release
before format 2 read it: whole chunks, each checked as one. Local disk, warm page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import lmprobe_zarr as lz
from benchmarks.data import activations, digests
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts import writer

KINDS = {"format 1": (1, False), "format 2": (2, False), "shards": (2, True)}


def write(folder: Path, values: Any, counts: Any, sha: list[str], *, compressed: bool, durable: bool) -> dict[str, float]:
    """A store of each kind; how long writing each took, the fastest of four."""
    layers, _, hidden = values.shape
    group = GroupInfo(model="bench", num_layers=layers, hidden_size=hidden)
    batch = TokenBatch(
        sha256=sha, layers=tuple(range(layers)), n_tokens=counts, tokens={"resid": values}, prompts={"resid_mean": values[:, : len(sha)]}
    )
    best: dict[str, float] = {}
    before = writer.PART_VERSION  # type: ignore[attr-defined]
    for attempt in range(4):
        for kind, (version, shards) in KINDS.items():
            place = folder / f"{kind}-{compressed}-{durable}-{attempt}"
            writer.PART_VERSION = version  # type: ignore[attr-defined]
            store = lz.open_store(place, durable=durable)
            os.sync()  # what was written before would be flushed meanwhile, at the next one's cost
            began = time.perf_counter()
            with store.new_part(group, compressed=compressed, shards=shards) as part:
                part.append(batch)
                part.commit()
            best[kind] = min(best.get(kind, np.inf), time.perf_counter() - began)
    writer.PART_VERSION = before  # type: ignore[attr-defined]
    return best


def cases(place: Path, counts: Any) -> dict[str, Callable[[], Any]]:
    """What is read of a store."""
    store = lz.open_store(place)
    tokens, pooled = store.tokens(dtype="stored").resid, store.dataset(dtype="stored").resid_mean
    bounds = np.concatenate([[0], np.cumsum(counts)])
    rng = np.random.default_rng(1)
    prompts = iter(rng.integers(0, len(counts), 100_000).tolist())
    some, few = (np.sort(rng.choice(tokens.sizes["token"], n, replace=False)) for n in (256, 32))

    def prompt() -> Any:
        i = next(prompts)
        return tokens.variable[:, bounds[i] : bounds[i + 1]].values

    (array,) = place.glob("*/*/tokens/resid")
    plain = zarr.open_array(str(array), mode="r")
    return {
        "one prompt, all layers": prompt,
        "256 tokens at random, one layer": lambda: tokens.variable[3, some].values,
        "32 tokens at random, one layer": lambda: tokens.variable[3, few].values,
        "one layer of tokens": lambda: tokens.variable[2].values,
        "one layer, pooled": lambda: pooled.variable[2].values,
        "one layer of tokens, plain zarr": lambda: plain[2],
    }


def measure(stores: dict[str, dict[str, Callable[[], Any]]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each case and kind, in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    for case in next(iter(stores.values())):
        times: dict[str, list[float]] = {kind: [] for kind in stores}
        for _ in range(repeats):
            for kind, calls in stores.items():
                began = time.perf_counter()
                calls[case]()
                times[kind].append((time.perf_counter() - began) * 1000)
        found[case] = times
    return found


def main() -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 128, 32 if options.quick else 128)
    layers = 4 if options.quick else 16
    values, sha = activations((layers, int(counts.sum()), 2048)), digests(len(counts))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for compressed in (True, False):
            codec = "default" if compressed else "raw"
            for durable in (False, True):
                seconds = write(folder, values, counts, sha, compressed=compressed, durable=durable)
                rows.append(
                    {"codec": codec, "case": f"write{', fsync' if durable else ''}", **{k: [s * 1000] * 2 for k, s in seconds.items()}}
                )
            places = {kind: folder / f"{kind}-{compressed}-False-0" for kind in KINDS}
            for case, times in measure({k: cases(place, counts) for k, place in places.items()}, 5 if options.quick else 25).items():
                rows.append({"codec": codec, "case": case, **{k: [statistics.median(ms), min(ms)] for k, ms in times.items()}})
            sizes = {k: sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) / 1e6 for k, place in places.items()}
            rows.append({"codec": codec, "case": "MB on disk", **{kind: [size] * 2 for kind, size in sizes.items()}})
            files = {k: float(sum(f.is_file() for f in place.rglob("*"))) for k, place in places.items()}
            rows.append({"codec": codec, "case": "files", **{kind: [number] * 2 for kind, number in files.items()}})
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        return 0
    print("ms, median / least of all calls; ratios of format 1 to format 2, and to format 2 with shards")
    for row in rows:
        numbers = "  ".join(f"{row[kind][0]:>9.2f} /{row[kind][1]:>9.2f}" for kind in KINDS)
        ratios = "  ".join(f"{row['format 1'][i] / row[kind][i]:>5.2f}" for kind in ("format 2", "shards") for i in (0, 1))
        print(f"{row['codec']:<8} {row['case']:<34} {numbers}   {ratios}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
