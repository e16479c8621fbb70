"""What a read costs besides its chunks: one row, one prompt, one layer through xarray, in one part and in fifty: ``make bench``.

Each case beside the same selection of an array in memory (the cost of xarray), and beside the chunks alone, read one after the other
into an array that is made anew. With ``--before`` another checkout of the package does the same in a process of its own, some calls each in
turn, so that the ratio holds where the speed of the machine drifts. Local disk, warm page cache; each selection is made anew, since xarray
keeps what it has read.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import activations, digests
from benchmarks.timing import ROOT, ms
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo

LAYERS, PER_PROMPT = 4, 66
#: Short calls that one side makes before it is the turn of the other: the first of them finds the processor's caches cold.
IN_A_ROW = 15
PROFILED = 40
GROUP = GroupInfo(model="bench", num_layers=LAYERS, hidden_size=2048)


def write(folder: Path, *, parts: int, quick: bool) -> None:
    """A store of pooled prompts and one of tokens, each in so many parts."""
    pooled, prompts = (500, 60) if quick else (5000, 400)
    for level, n, each in (("prompts", pooled, 1), ("tokens", prompts, PER_PROMPT)):
        values, sha = activations((LAYERS, n * each, GROUP.hidden_size)), digests(n)
        store = lz.open_store(folder / f"{level}-{parts}", durable=False)
        for some in np.array_split(np.arange(n), parts):
            held = values[:, some[0] * each : (some[-1] + 1) * each]
            of_part: dict[str, Any] = {"prompts": {"resid_mean": held}}
            if level == "tokens":
                of_part = {"n_tokens": np.full(len(some), each), "tokens": {"resid": held}}
            store.write(GROUP, TokenBatch(sha256=[sha[i] for i in some], layers=tuple(range(LAYERS)), **of_part))


def cases(folder: Path, parts: int) -> dict[str, Callable[[], Any]]:
    """The selections by name; those that end in "memory" are of arrays in memory."""
    data = lz.open_store(folder / f"prompts-{parts}").dataset(dtype="stored")
    tokens = lz.open_store(folder / f"tokens-{parts}").tokens(dtype="stored")
    label, of_token = str(data.prompt.values[17]), str(tokens.prompt.values[17 * PER_PROMPT])
    n = tokens.sizes["token"]
    some = np.sort(np.random.default_rng(3).choice(n, 256, replace=False))
    labels = list(dict.fromkeys(tokens.prompt.values[n // 4 : n // 2].tolist()))
    made: dict[str, Callable[[], Any]] = {
        "row": lambda: data.resid_mean.isel(layer=3, prompt=17).values,
        "row by prompt": lambda: data.resid_mean.sel(layer=3, prompt=label).values,
        "row of the variable": lambda: data.resid_mean.variable[3, 17].values,
        "token": lambda: tokens.resid.isel(layer=3, token=1234).values,
        "tokens of a prompt": lambda: tokens.resid.sel(layer=3, prompt=of_token).values,
        "of all layers": lambda: tokens.resid.sel(prompt=of_token).values,
        "256 tokens": lambda: tokens.resid.isel(layer=1, token=some).values,
        "a quarter of the prompts": lambda: tokens.resid.sel(layer=1, prompt=labels).values,
        "pooled layer": lambda: data.resid_mean.isel(layer=2).values,
        "tokens layer": lambda: tokens.resid.isel(layer=2).values,
    }
    held = data.copy()
    held["resid_mean"] = data.resid_mean.variable.copy(data=data.resid_mean.isel(layer=slice(None)).values)
    made["row, memory"] = lambda: held.resid_mean.isel(layer=3, prompt=17).values
    made["row by prompt, memory"] = lambda: held.resid_mean.sel(layer=3, prompt=label).values
    return made | {
        "pooled layer, chunks": lambda: chunks_alone(folder / f"prompts-{parts}", "prompts", "resid_mean", 2),
        "tokens layer, chunks": lambda: chunks_alone(folder / f"tokens-{parts}", "tokens", "resid", 2),
        "row, chunk": lambda: chunks_alone(folder / f"prompts-{parts}", "prompts", "resid_mean", 3, rows=slice(17, 18)),
    }


_stored: dict[Path, list[Any]] = {}


def chunks_alone(place: Path, level: Any, name: str, layer: int, rows: slice | None = None) -> None:
    """All chunks of one layer, or some rows of the first, with the package's reader of chunks on one thread, and nothing above it."""
    if place not in _stored:
        store = lz.open_store(place)
        view = store.view(store.find_group(None))
        _stored[place] = [part.array(level, name) for part in view.parts]
    if rows is not None:
        _stored[place][0].read_rows(layer, 0, rows)
        return
    size = sum(array.info.n_blocks * array.info.rows_per_chunk for array in _stored[place])
    out, at = np.empty((size, GROUP.hidden_size), np.float16), 0
    for array in _stored[place]:
        for block in range(array.info.n_blocks):
            array.read_chunk(layer, block, out[at : at + array.info.rows_per_chunk])
            at += array.info.rows_per_chunk


def serve(folder: Path, parts: int) -> None:
    """Time the cases that are named on the standard input, one line each, and print their seconds."""
    made = cases(folder, parts)
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        kind, _, name = line.rstrip("\n").partition(" ")
        if kind == "profile":
            print(json.dumps(profile(made[name])), flush=True)
            continue
        call, seconds, processor = made[name], [], []
        while not seconds or (len(seconds) < IN_A_ROW and sum(seconds) < 0.02):
            began, used = time.perf_counter(), time.process_time()
            call()
            processor.append(time.process_time() - used)
            seconds.append(time.perf_counter() - began)
        print(json.dumps((statistics.median(seconds), statistics.median(processor))), flush=True)


def profile(call: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Microseconds and calls of Python functions on the caller's thread for one call of a case, by the package that they belong to."""
    profiler = cProfile.Profile()
    profiler.runcall(lambda: [call() for _ in range(PROFILED)])
    found: dict[str, tuple[float, float]] = {}
    for (file, _, _), (_, count, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        whose = next((name for name in ("lmprobe_zarr", "xarray", "pandas") if f"/{name}/" in file), "numpy, the system and others")
        seconds, calls = found.get(whose, (0.0, 0.0))
        found[whose] = seconds + 1e6 * own / PROFILED, calls + count / PROFILED
    return found


class Side:
    """A checkout of the package in a process of its own."""

    def __init__(self, checkout: Path, folder: Path, parts: int) -> None:
        # This file, with the package of that checkout.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(checkout), str(ROOT)))}
        command = [sys.executable, str(Path(__file__)), "--serve", str(folder), "--parts", str(parts)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.names: list[str] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _answer(self, request: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        return self._line()

    def __call__(self, name: str) -> tuple[float, float]:
        """Seconds of a case, and seconds of the processor, of all threads together."""
        wall, processor = json.loads(self._answer(f"time {name}"))
        return wall, processor

    def profile(self, name: str) -> dict[str, tuple[float, float]]:
        """See `profile`."""
        found: dict[str, tuple[float, float]] = json.loads(self._answer(f"profile {name}"))
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def print_profiles(folder: Path, parts: int, checkouts: dict[str, Path]) -> None:
    """Where the time of three cases goes; cProfile makes functions of Python look dearer than they are."""
    for label, checkout in checkouts.items():
        side = Side(checkout, folder, parts)
        for name in ("row", "tokens of a prompt", "pooled layer"):
            shares = ", ".join(f"{whose} {us:,.0f} µs in {calls:.0f} calls" for whose, (us, calls) in sorted(side.profile(name).items()))
            print(f"{parts:>3} parts, {label:<6} {name:<20} {shares}")
        side.close()


def measure(folder: Path, parts: int, checkouts: dict[str, Path], *, runs: int) -> list[dict[str, Any]]:
    """Seconds of each case by checkout, median and least, and of the processor, which those of others on the machine change less."""
    sides = {name: Side(checkout, folder, parts) for name, checkout in checkouts.items()}
    rows = []
    for name in sides["now"].names:
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(runs + 1):
            for side, call in sides.items():
                times[side].append(call(name))
        row: dict[str, Any] = {"parts": parts, "case": name}
        for side, seconds in times.items():
            wall, processor = zip(*seconds[1:], strict=True)
            row |= {side: statistics.median(wall), f"{side}_least": min(wall), f"{side}_processor": statistics.median(processor)}
        rows.append(row)
    for side in sides.values():
        side.close()
    return rows


def main() -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts, a fifth of the runs")
    parser.add_argument("--before", type=Path, help="another checkout of this repository to compare with")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by cProfile, instead of the times")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.parts)
        return 0
    checkouts = ({"before": options.before.resolve()} if options.before else {}) | {"now": ROOT}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for parts in (1, 50):
            write(Path(folder), parts=parts, quick=options.quick)
            os.sync()
            if options.profile:
                print_profiles(Path(folder), parts, checkouts)
            else:
                rows += measure(Path(folder), parts, checkouts, runs=5 if options.quick else 25)
    if options.profile:
        return 0
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        return 0
    kinds = ("", "_least", "_processor")
    print(f"{'parts':>5}  {'read':<26}" + "".join(f"{side:>12}{'least':>10}{'processor':>10}" for side in checkouts), end="")
    print("  before / now of each" if options.before else "")
    for row in rows:
        times = "".join(f"{ms(row[side]):>12}{ms(row[f'{side}_least']):>10}{ms(row[f'{side}_processor']):>10}" for side in checkouts)
        ratios = "".join(f"{row[f'before{kind}'] / row[f'now{kind}']:>8.2f}" for kind in kinds) if options.before else ""
        print(f"{row['parts']:>5}  {row['case']:<26}{times}{ratios}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
