"""What work costs against how much there is: ``python -m benchmarks.curves``, time and peak memory by prompts, parts, layers and width.

Every point is a store of its own in a process of its own, so that one point's memory is not the next one's. The exponent is that of the
last two sizes: time grows as size to that power.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import activations
from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo

#: What is not varied.
USUAL = {"prompts": 2048, "parts": 8, "layers": 8, "hidden": 512}
SIZES = {
    "prompts": (1024, 4096, 16384, 65536),
    "parts": (1, 8, 64, 512, 2048),
    "layers": (4, 8, 16, 32, 64),
    "hidden": (256, 512, 1024, 2048, 4096),
}
WORK = ("write", "open", "read one layer", "sweep one layer")


def peak() -> int:
    """The most memory that this process has had since the last `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """Start counting the peak anew; what is held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def costs(prompts: int, parts: int, layers: int, hidden: int) -> dict[str, tuple[float, float]]:
    """Seconds, and MiB of memory beyond what was held before, of each kind of work on one store."""
    group = GroupInfo(model="curve", num_layers=layers, hidden_size=hidden)
    each = prompts // parts
    values = activations((layers, each, hidden))
    found = {}

    def measure(name: str, call: Callable[[], Any], times: int = 3) -> Any:
        """The fastest of some calls, and the most memory of any."""
        seconds, before = [], forget_peak()
        for _ in range(times):
            began = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - began)
        found[name] = (min(seconds), max(0, peak() - before) / 2**20)
        return result

    with tempfile.TemporaryDirectory() as folder:
        store = lz.open_store(folder, durable=False)

        def write() -> None:
            for part in range(parts):
                sha = [prompt_sha256(f"{part} {i}") for i in range(each)]
                store.write(group, TokenBatch(sha256=sha, layers=tuple(range(layers)), prompts={"resid_mean": values}))

        measure("write", write, times=1)
        os.sync()  # or it is flushed while reading is timed
        lz.open_store(folder, "r").dataset()  # the first call imports xarray's own parts
        data = measure("open", lambda: lz.open_store(folder, "r").dataset())
        data.resid_mean.isel(layer=0, prompt=slice(0, 1)).values  # noqa: B018 — starts the threads
        measure("read one layer", lambda: data.resid_mean.isel(layer=1).values)
        labels = np.arange(prompts) % 2
        lz.sweep(data.resid_mean.isel(layer=[0], prompt=slice(0, 64)), labels=labels[:64], probes="ridge", cv=2, n_workers=1)
        measure("sweep one layer", lambda: lz.sweep(data.resid_mean.isel(layer=[1]), labels=labels, probes="ridge", cv=2, n_workers=1), 1)
    return found


def run(sizes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """One row per axis, size and kind of work."""
    rows = []
    for axis, values in sizes.items():
        for value in values:
            given = {**USUAL, axis: value}
            given["prompts"] = max(given["prompts"], given["parts"])
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(costs, **given).result()
            rows += [
                {"axis": axis, "size": value, "work": work, "seconds": seconds, "mebibytes": memory}
                for work, (seconds, memory) in found.items()
            ]
            print(f"{axis} {value}: " + ", ".join(f"{w} {s:.3g} s {m:.0f} MiB" for w, (s, m) in found.items()), file=sys.stderr)
    return rows


def exponent(rows: list[dict[str, Any]], axis: str, work: str, what: str) -> float:
    """How fast something grows over the last two sizes: 1 is linear."""
    (a, b) = [row for row in rows if row["axis"] == axis and row["work"] == work][-2:]
    return math.log(max(b[what], 1e-9) / max(a[what], 1e-9)) / math.log(b["size"] / a["size"])


def table(rows: list[dict[str, Any]]) -> str:
    """Exponents in Markdown."""
    lines = ["| | " + " | ".join(WORK) + " |", "|---|" + "---|" * len(WORK)]
    for axis in SIZES:
        if not any(row["axis"] == axis for row in rows):
            continue
        cells = [f"{exponent(rows, axis, work, 'seconds'):.1f}" for work in WORK]
        lines.append(f"| {axis} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time above, memory below, one column per axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes_of = list(dict.fromkeys(row["axis"] for row in rows))
    figure, grid = plt.subplots(2, len(axes_of), figsize=(3.1 * len(axes_of), 5.6), sharey="row", squeeze=False, constrained_layout=True)
    styles = dict(zip(WORK, (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":")), strict=True))
    for column, axis in enumerate(axes_of):
        for row, (what, unit) in enumerate((("seconds", "time (s)"), ("mebibytes", "memory beyond before (MiB)"))):
            axes = grid[row][column]
            for work in WORK:
                points = [(r["size"], r[what]) for r in rows if r["axis"] == axis and r["work"] == work and r[what] > 0]
                color, marker, line = styles[work]
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=work, markersize=5)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            sizes = sorted({r["size"] for r in rows if r["axis"] == axis})
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=35, ha="right", fontsize=8)
            axes.minorticks_off()
            if row:
                axes.set_xlabel(axis)
            if not column:
                axes.set_ylabel(unit)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.align_xlabels()
    figure.savefig(path, dpi=130)


def main() -> int:
    """Print the table; keep picture, JSON and page where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    options = parser.parse_args()
    rows = run({axis: sizes[:2] for axis, sizes in SIZES.items()} if options.quick else SIZES)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.picture:
        draw(rows, options.picture)
    if options.page:
        begin, end = "<!-- curves -->\n", "<!-- end of curves -->"
        head, rest = options.page.read_text().split(begin)
        options.page.write_text(f"{head}{begin}\n{table(rows)}\n\n{end}{rest.split(end)[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
