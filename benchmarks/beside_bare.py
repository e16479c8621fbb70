"""Extraction beside the bare forward pass, batch by batch: ``python -m benchmarks.beside_bare``.

The speed of a shared machine changes by a quarter within seconds, so that two runs of ten seconds each, in turn, compare the machine with
itself. Here the bare batches are run between those of the extraction, while the thread that writes waits: both sides see the same machine,
and whatever the writer takes from the model counts for the extraction. `--sizes` instead runs the bare pass with batches of different
sizes, also in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import lmprobe_zarr as lz

SIZES = (256, 384, 512, 640, 768, 1024, 1536, 2048)
STEPS = 64


class Bare:
    """A model's plain forward pass over length-sorted batches with a mask, some of them at a time."""

    def __init__(self, model: Any, batches: Sequence[Sequence[Sequence[int]]]) -> None:
        import torch

        self._run, self._grad, self._batches = model, torch.inference_mode, []
        for rows in batches:
            width = max(map(len, rows))
            tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            self._batches.append((tokens, mask))
        self.reset()

    def reset(self) -> None:
        """Start again with the first batch."""
        self.done, self.seconds = 0, 0.0

    def run_until(self, share: float) -> None:
        """Run the batches up to this share of all."""
        began = time.perf_counter()
        with self._grad():
            while self.done < round(share * len(self._batches)):
                tokens, mask = self._batches[self.done]
                self._run(input_ids=tokens, attention_mask=mask, use_cache=False)
                self.done += 1
        self.seconds += time.perf_counter() - began


def beside(model: Any, tokenizer: Any, prompts: list[str], ids: list[list[int]], folder: Path, runs: int) -> list[dict[str, float]]:
    """Seconds of the bare pass in batches of eight, and of the extraction of every token of every layer, for each run."""
    from lmprobe_zarr.extraction.models import passes
    from lmprobe_zarr.store import Ingest

    order = np.argsort([len(one) for one in ids])
    bare = Bare(model.model, [[ids[j] for j in order[i : i + 8]] for i in range(0, len(ids), 8)])
    forward, take = passes.run_forward_pass, Ingest._take
    may_write, writing = threading.Event(), threading.Lock()
    calls = total = 0
    waited = 0.0

    def counting(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*given, **named)

    def between(*given: Any, **named: Any) -> Any:
        nonlocal calls, waited
        calls += 1
        began = time.perf_counter()
        may_write.clear()
        with writing:
            waited += time.perf_counter() - began
            bare.run_until(min(1.0, calls / total))
        may_write.set()
        return forward(*given, **named)

    def taking(self: Any, batch: Any) -> None:
        while True:
            may_write.wait()
            with writing:
                if may_write.is_set():
                    take(self, batch)
                    return

    def extract(number: int) -> float:
        store = lz.open_store(folder / f"e{number}", durable=False)
        began = time.perf_counter()
        lz.extract(
            model, prompts, tokenizer=tokenizer, name="bench", store=store, pooling=(), keep_tokens=True, device="cpu", progress=False
        )
        took = time.perf_counter() - began
        shutil.rmtree(store.url)
        return took

    extract(0)  # the first examines the model
    with mock.patch.object(passes, "run_forward_pass", counting):
        extract(1)
    total, found = calls, []
    for run in range(runs):
        calls, waited = 0, 0.0
        bare.reset()
        may_write.set()
        with mock.patch.object(passes, "run_forward_pass", between), mock.patch.object(Ingest, "_take", taking):
            took = extract(2 + run)
        bare.run_until(1.0)
        found.append({"bare": bare.seconds, "extract": took - bare.seconds - waited})
    return found


def by_size(model: Any, ids: list[list[int]], runs: int) -> dict[str, float]:
    """Seconds of the bare pass by the padded tokens of a batch, the longest prompts first, a few batches of each size in turn."""
    longest_first = sorted(ids, key=len, reverse=True)
    sides = {}
    for size in SIZES:
        batches, start = [], 0
        while start < len(longest_first):
            count = max(1, size // len(longest_first[start]))
            batches.append(longest_first[start : start + count])
            start += count
        sides[f"{size}"] = Bare(model.model, batches)
    sides["8 prompts"] = Bare(model.model, [longest_first[i : i + 8] for i in range(0, len(ids), 8)])
    names, took = list(sides), {name: [] for name in sides}
    for run in range(runs + 1):
        for side in sides.values():
            side.reset()
        for step in range(STEPS):
            turn = step % len(names)
            for name in (*names[turn:], *names[:turn]):
                sides[name].run_until((step + 1) / STEPS)
        if run:
            for name, side in sides.items():
                took[name].append(side.seconds)
    return {name: statistics.median(values) for name, values in took.items()}


def bench_model(folder: Path, n: int) -> tuple[Any, Any, list[str], list[list[int]]]:
    """The model and the prompts of ``python -m benchmarks extract``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.computed import extract_prompts, save_model

    prompts = extract_prompts(n)
    path = save_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    return model, tokenizer, prompts, [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--sizes", action="store_true", help="the bare pass by the size of a batch")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        model, tokenizer, prompts, ids = bench_model(folder, given.prompts)
        if given.sizes:
            took: Any = by_size(model, ids, given.runs)
        else:
            took = beside(model, tokenizer, prompts, ids, folder, given.runs)
            ratios = [one["bare"] / one["extract"] for one in took]
            error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
            print(f"bare forward / extract: median {statistics.median(ratios):.3f}, mean {statistics.mean(ratios):.3f} ± {error:.3f}")
        json.dump(took, sys.stdout, indent=1)
        print()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
