"""A sweep against a plain loop over scikit-learn's pipelines on the same folds, reading included on both sides.

Run as ``python -m benchmarks.sweeps``. The loop has one BLAS thread, which is faster for it than two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import lmprobe_zarr as lz

LAYERS, PROMPTS, HIDDEN, FOLDS = 16, 2_000, 1_024, 5
PROBES: dict[str, Callable[[], Any]] = {"ridge": RidgeClassifier, "logistic_regression": lambda: LogisticRegression(max_iter=1000)}


def loop(file: Path, y: Any, make: Callable[[], Any]) -> Any:
    """Accuracy and AUROC by layer and fold."""
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(y, y))
    stored, found = np.load(file, mmap_mode="r"), []
    with threadpool_limits(1):
        for layer in range(LAYERS):
            x = np.array(stored[layer])
            for train, test in folds:
                scores = make_pipeline(StandardScaler(), make()).fit(x[train], y[train]).decision_function(x[test])
                found.append((np.mean((scores > 0) == y[test]), roc_auc_score(y[test], scores)))
    return np.array(found).reshape(LAYERS, FOLDS, 2)


def main() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, PROMPTS)
    x = rng.standard_normal((LAYERS, PROMPTS, HIDDEN)).astype("float32")
    x[:, :, :8] += 0.4 * y[None, :, None]
    with tempfile.TemporaryDirectory() as folder:
        store = lz.open_store(Path(folder) / "acts")
        prompts = [f"prompt {i}" for i in range(PROMPTS)]
        lz.write_activations(store, model="m", prompts=prompts, pooled={"resid_mean": dict(enumerate(x))}, coords={"label": y.tolist()})
        np.save(Path(folder) / "x.npy", x)
        array = store.dataset("m").resid_mean
        print("probe                loop, s   sweep, 1 thread   sweep, all cores   largest difference of a score")
        for name, make in PROBES.items():
            started = time.perf_counter()
            expected = loop(Path(folder) / "x.npy", y, make)
            plain = time.perf_counter() - started
            ratios = []
            for workers in (1, None):
                started = time.perf_counter()
                scores = lz.sweep(array, "label", name, FOLDS, n_workers=workers)
                ratios.append((time.perf_counter() - started) / plain)
            found = np.stack([scores.accuracy.values[:, 0], scores.auroc.values[:, 0]], axis=-1)
            print(f"{name:<21}{plain:<10.2f}{ratios[0]:<18.2f}{ratios[1]:<19.2f}{np.abs(found - expected).max():.1e}")


if __name__ == "__main__":
    main()
