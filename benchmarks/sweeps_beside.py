"""Sweeps of this checkout beside those of another: ``python -m benchmarks.sweeps_beside ANOTHER_CHECKOUT``.

Each checkout has a process of its own, and the two are asked in turn, so that a ratio holds where the speed of the machine drifts: the
median of the ratios of neighbours, with the middle half of them. Both use the same packages. Only the public names are used, so the other
checkout may be older.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, PROMPTS, HIDDEN, PER_PROMPT = 8, 600, 512, 12


def cases(folder: Path) -> dict[str, Callable[[], Any]]:
    """Sweeps over a store of random activations, by name."""
    import lmprobe_zarr as lz

    rng = np.random.default_rng(0)
    y = np.arange(PROMPTS) % 2
    x = rng.standard_normal((LAYERS, PROMPTS, HIDDEN)).astype("float32")
    x[:, :, :8] += 0.4 * y[None, :, None]
    tokens = np.repeat(x[:2], PER_PROMPT, axis=1) + rng.standard_normal((2, PROMPTS * PER_PROMPT, HIDDEN)).astype("float32")
    store = lz.open_store(folder / "acts", durable=False)
    texts = [f"prompt {i} of the {'even' if i % 2 else 'odd'} ones" for i in range(PROMPTS)]
    columns = {"label": y.tolist(), "domain": [f"d{i // 2 % 3}" for i in range(PROMPTS)]}
    lz.write_activations(store, model="m", prompts=texts, pooled={"resid_mean": dict(enumerate(x))}, coords=columns)
    each = {layer: np.split(values, PROMPTS) for layer, values in enumerate(tokens)}
    lz.write_activations(store, model="t", prompts=texts, activations={"resid": each}, coords=columns)
    array = store.dataset("m").resid_mean.load()
    halves = {"first": array.isel(prompt=slice(PROMPTS // 2)), "second": array.isel(prompt=slice(PROMPTS // 2, None))}
    by_token = store.tokens("t")
    return {
        "ridge": lambda: lz.sweep(array, "label", "ridge", 5),
        "ridge, 5 strengths": lambda: lz.sweep(array, "label", "ridge", 5, strengths=[0.01, 0.1, 1, 10, 100]),
        "logistic regression": lambda: lz.sweep(array, "label", "logistic_regression", 5),
        "mass mean": lambda: lz.sweep(array, "label", "mass_mean", 5),
        "mass mean, groups": lambda: lz.sweep(array, "label", "mass_mean", 3, groups="domain"),
        "ridge, three controls": lambda: lz.sweep(array, "label", "ridge", 5, controls=["shuffled_labels", "majority", "bag_of_words"]),
        "ridge on tokens": lambda: lz.sweep_tokens(by_token.resid, "label", "ridge", cv=3),
        "ridge, transfer between halves": lambda: lz.sweep_transfer(halves, "label", "ridge", 5),
    }


def answer(folder: str) -> None:
    """Run the cases that are asked for by name, a line each; answers with their seconds, or why there are none."""
    known = cases(Path(folder))
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        try:
            known[line.strip()]()
            print(json.dumps(time.perf_counter() - began), flush=True)
        except Exception as error:  # noqa: BLE001 — an older checkout may not know a case
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for number, checkout in enumerate((here, given.other.resolve())):
            place = Path(folder) / str(number)
            place.mkdir()
            side = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--answer", str(place)], cwd=checkout, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(checkout)},
            )  # fmt: skip
            sides.append(side)

        def ask(side: Any, name: str) -> Any:
            side.stdin.write(name + "\n")
            side.stdin.flush()
            return json.loads(side.stdout.readline())

        for side in sides:
            assert side.stdout is not None
            assert side.stdout.readline().strip() == "ready"
        print(f"{'sweep':34} {'here, s':>8} {'there, s':>9}  here / there")
        for name in CASES:
            took = []
            for run in range(given.runs + 1):
                turn = sides if run % 2 else sides[::-1]
                answers = {id(side): ask(side, name) for side in turn}
                took.append([answers[id(side)] for side in sides])
            took = took[1:]  # the first one imports and compiles
            if any(isinstance(one, str) for pair in took for one in pair):
                print(f"{name:34} {next(one for pair in took for one in pair if isinstance(one, str))}")
                continue
            ratios = sorted(mine / theirs for mine, theirs in took)
            medians = [statistics.median(pair[i] for pair in took) for i in (0, 1)]
            quarter = len(ratios) // 4
            middle = f"({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"
            print(f"{name:34} {medians[0]:8.3f} {medians[1]:9.3f}  {statistics.median(ratios):.2f} {middle}", flush=True)
        for side in sides:
            assert side.stdin is not None
            side.stdin.close()
            side.wait()


CASES = (
    "ridge", "ridge, 5 strengths", "logistic regression", "mass mean", "mass mean, groups", "ridge, three controls", "ridge on tokens",
    "ridge, transfer between halves",
)  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(sys.argv[2])
    else:
        main()
