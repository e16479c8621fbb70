"""How long a group of 100,000 prompts takes to open, in 1,000 parts and compacted: ``python -m benchmarks.remote s3://bucket/prefix``.

Writes below a new prefix there, and removes it again. Credentials and endpoint come from the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts.view import View

GROUP = GroupInfo(model="remote", num_layers=1, hidden_size=4)
PER_PART = 100


def open_view(url: str) -> View:
    """As a new process would, from nothing."""
    store = lz.open_store(url, "r")
    return store.view(store.find_group())


def fastest(call: Any, runs: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(place: str, parts: int, runs: int = 5) -> dict[str, float]:
    """Seconds of opening many parts, of lookups, and of opening what they are merged into, below a new prefix."""
    url = f"{place.rstrip('/')}/{uuid.uuid4().hex}"
    store = lz.open_store(url)

    def write(number: int) -> None:
        values = np.full((1, PER_PART, 4), number, np.float16)
        digests = [prompt_sha256(f"{number} {i}") for i in range(PER_PART)]
        store.write(GROUP, TokenBatch(sha256=digests, layers=(0,), prompts={"resid_mean": values}))

    try:
        write(0)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write, range(1, parts)))
        seconds = {"many": fastest(lambda: open_view(url), runs)}
        view = open_view(url)
        wanted = [f"{i % parts} {i % PER_PART}" for i in range(10_000)]
        seconds["lookups"] = fastest(lambda: view.select(wanted), runs)
        store.compact(progress=False)
        store.gc(max_age=0)
        assert len(open_view(url).parts) == 1
        seconds["one"] = fastest(lambda: open_view(url), runs)
    finally:
        lz.clear_cache(url=store)
        store.storage.remove_tree("")
    return seconds


def main() -> int:
    """Print seconds, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds = measure(options.url, options.parts)
    if options.json:
        json.dump(seconds, sys.stdout, indent=2)
        return 0
    names = {"many": f"open {options.parts} parts", "lookups": "10,000 lookups", "one": "open compacted"}
    print("\n".join(f"{names[what]:<16} {value:8.3f} s" for what, value in seconds.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
