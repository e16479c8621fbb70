"""A sweep whose fits are solved in bulk, against the same sweep by scikit-learn: ``python -m benchmarks.bulk``, or with ``--device cuda``.

Both read the same store in turn. The rows are of two kinds: those of ``benchmarks.data``, whose units are independent of one another, which
is as easy for L-BFGS as rows can be; and rows whose variance falls along their leading directions as in residual streams, where the
k-th has k to the power of −1.4 of the variance of the first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.data import Array, activations
from benchmarks.timing import alternate

LAYERS, PROMPTS, HIDDEN, FOLDS = 16, 2_000, 1_024, 5
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


def independent(y: Array, layers: int) -> Array:
    """Independent units with a few of large variance, and a direction that tells the labels apart."""
    direction = np.random.default_rng(0).standard_normal(HIDDEN)
    return activations((layers, PROMPTS, HIDDEN), 1).astype("float32") + ((y - 0.5)[:, None] * 0.05 * direction).astype("float32")


def uneven(y: Array, layers: int) -> Array:
    """Units that share a few leading directions, one of which tells the labels apart."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0]
    variance = (1 + np.arange(HIDDEN)) ** -0.7
    found = np.empty((layers, PROMPTS, HIDDEN), "float32")
    for layer in range(layers):
        rows = rng.standard_normal((PROMPTS, HIDDEN)) * variance
        rows[:, 20] += 0.1 * (y - 0.5)
        found[layer] = rows @ turn.T * np.exp(0.5 * rng.standard_normal(HIDDEN)) + rng.standard_normal(HIDDEN)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    y = np.arange(PROMPTS) % 2
    print(f"{given.layers} layers × {PROMPTS:,} prompts × {HIDDEN}, {FOLDS} folds, strengths {STRENGTHS}, on {given.device}")
    print("rows          probe                 scikit-learn, s   batched, s   batched / scikit-learn   largest difference of an accuracy")
    for kind, make in (("independent", independent), ("uneven", uneven)):
        with tempfile.TemporaryDirectory() as folder:
            store = lz.open_store(Path(folder) / "acts")
            prompts, values = [f"prompt {i}" for i in range(PROMPTS)], make(y, given.layers)
            lz.write_activations(store, model="m", prompts=prompts, pooled={"resid_mean": dict(enumerate(values))})
            array = store.dataset("m").resid_mean
            for probe in ("logistic_regression", "ridge", "mass_mean"):
                scores: dict[str, Any] = {}
                options = {"strengths": STRENGTHS} if probe != "mass_mean" else {}

                def sweep(
                    name: str, scores: dict[str, Any] = scores, probe: str = probe, options: dict[str, Any] = options, **more: Any
                ) -> None:
                    scores[name] = lz.sweep(array, y, probe, FOLDS, **options, **more)  # noqa: B023

                took = alternate(
                    {
                        "one by one": lambda sweep=sweep: sweep("one by one"),  # type: ignore[misc]
                        "batched": lambda sweep=sweep: sweep("batched", solver="batched", device=given.device),  # type: ignore[misc]
                    },
                    given.runs,
                )
                apart = float(np.abs(scores["batched"].accuracy - scores["one by one"].accuracy).max())
                ratio = took["batched"] / took["one by one"]
                print(f"{kind:<14}{probe:<22}{took['one by one']:<18.2f}{took['batched']:<13.2f}{ratio:<25.2f}{apart:.4f}", flush=True)


if __name__ == "__main__":
    main()
