"""How fast one layer reads, by chunk size and codec, as stored and as float32, beside ``np.fromfile`` and plain zarr: ``make bench``.

All sides alternate within one run, so that a ratio holds where the machine's speed drifts. The page cache is warm.
"""

from __future__ import annotations

import argparse
import json
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
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.parts import writer

GROUP = GroupInfo(model="bench", num_layers=4, hidden_size=2048)


def activations(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Random values with a few outlier dimensions, as residual streams have them; float16."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape, dtype=np.float32)
    values[..., rng.integers(0, shape[-1], 3)] *= 40
    return values.astype(np.float16)


def medians(sides: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of each side, the sides in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs + 1):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(level: str, folder: Path, *, quick: bool, runs: int) -> list[dict[str, Any]]:
    """One row per codec and chunk size."""
    prompts, per_prompt = (5000, 1) if level == "prompts" else (400, 66)
    prompts //= 10 if quick else 1
    digests = [prompt_sha256(str(i)) for i in range(prompts)]
    values = activations((4, prompts * per_prompt, 2048))
    values[1].tofile(folder / "raw")
    rows = []
    for compressed in (True, False):
        for mebibytes in (1, 2, 4, 8):
            writer.CHUNK_BYTES = mebibytes * 2**20  # type: ignore[misc]
            store = lz.open_store(folder / f"{level}-{compressed}-{mebibytes}", durable=False)
            held = {"prompts": {"resid_mean": values}} if level == "prompts" else {"tokens": {"resid": values}}
            counts = None if level == "prompts" else np.full(prompts, per_prompt)
            batch = TokenBatch(sha256=digests, layers=(0, 1, 2, 3), n_tokens=counts, **held)  # type: ignore[arg-type]
            part = store.write(GROUP, batch, compressed=compressed)
            name = "resid_mean" if level == "prompts" else "resid"
            open_level = store.dataset if level == "prompts" else store.tokens
            data, wide = open_level(dtype="stored")[name], open_level()[name]
            plain = zarr.open_array(f"{store.url}/{GROUP.name}/{part}/{level}/{name}", mode="r")
            assert (data.isel(layer=1).values == values[1]).all()
            assert (wide.isel(layer=1).values == values[1]).all()
            sides = {
                # Sliced anew every time: xarray keeps in a slice what it has read.
                "ours": lambda d=data: d.isel(layer=1).values,
                "float32": lambda d=wide: d.isel(layer=1).values,
                "fromfile": lambda: np.fromfile(folder / "raw", np.float16),
                "zarr": lambda z=plain: z[1],
            }
            seconds = medians(sides, runs)
            size = sum(f.stat().st_size for f in Path(store.url).rglob("c.1.*"))
            rows.append(
                {
                    "level": level,
                    "codec": "default" if compressed else "raw",
                    "chunk_mib": mebibytes,
                    "layer_mb": values[1].nbytes / 1e6,
                    **{f"{side}_ms": 1e3 * value for side, value in seconds.items()},
                    "times_fromfile": seconds["ours"] / seconds["fromfile"],
                    "times_zarr": seconds["ours"] / seconds["zarr"],
                    "times_stored": seconds["float32"] / seconds["ours"],
                    "stored_share": size / values[1].nbytes,
                }
            )
    return rows


def main() -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts, three runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for level in ("prompts", "tokens")
            for row in measure(level, Path(folder), quick=options.quick, runs=3 if options.quick else 9)
        ]
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        return 0
    print("one layer       codec    chunk      ours  as float32  np.fromfile  plain zarr   ours/fromfile  ours/zarr  float32/ours  stored")
    for r in rows:
        sides = "  ".join(f"{r[f'{side}_ms']:>7.1f} ms" for side in ("ours", "float32", "fromfile", "zarr"))
        what = f"{r['level']:<8}{r['layer_mb']:>5.0f} MB  {r['codec']:<8}{r['chunk_mib']} MiB"
        ratios = f"{r['times_fromfile']:>13.2f} {r['times_zarr']:>11.2f} {r['times_stored']:>13.2f}"
        print(f"{what} {sides} {ratios} {100 * r['stored_share']:>6.1f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
