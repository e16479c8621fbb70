"""Opens one store and prints what that took, as JSON: a script, so that several checkouts can be measured, each in a fresh process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmprobe_zarr.storage.base import Buffer
from lmprobe_zarr.storage.local import LocalStorage
from lmprobe_zarr.store.store import Store

GIB = 2**30


class Counting(LocalStorage):
    """A folder that counts what is read."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.reads = self.nbytes = 0

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self.reads, self.nbytes = self.reads + 1, self.nbytes + len(data)
        return data

    def read_view(self, key: str) -> Buffer:
        data = super().read_view(key)
        self.reads, self.nbytes = self.reads + 1, self.nbytes + len(data)
        return data

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        found = super().read_ranges(key, ranges)
        self.reads, self.nbytes = self.reads + 1, self.nbytes + sum(map(len, found))
        return found


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this machine does not tell a process's peak of memory")


def measure(folder: str) -> dict[str, Any]:
    """What opening costs, in this process."""
    before = peak()
    storage = Counting(folder)
    began, busy = time.perf_counter(), time.process_time()
    store = Store(storage, mode="r")
    view = store.view(store.find_group("scale"))
    found = len(view)
    opened, busy = time.perf_counter() - began, time.process_time() - busy
    memory = (peak() - before) / GIB
    digests = view.digests[np.random.default_rng(1).integers(0, found, 10_000)]
    wanted = [row.tobytes().hex() for row in digests]
    began = time.perf_counter()
    view.find(wanted[:1])  # builds the table
    first = time.perf_counter() - began
    began = time.perf_counter()
    assert (view.find(wanted) >= 0).all()
    looked = time.perf_counter() - began
    return {
        "prompts": found,
        "requests_to_open": storage.reads,
        "document_bytes": storage.nbytes,
        "open_s": opened,
        "open_cpu_s": busy,
        "open_gib": memory,
        "first_lookup_s": first,
        "lookup_10000_ms": 1e3 * looked,
    }


if __name__ == "__main__":
    json.dump(measure(sys.argv[1]), sys.stdout)
