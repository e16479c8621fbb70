"""Writes ``tests/data/saelens-activations-…`` with the methods of SAELens' own ``CacheActivationsRunner``, and what it was given.

Run by hand, in an environment with sae-lens: ``python tests/support/make_saelens_activations.py tests/data``. The numbers are random; no
model is run.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

CONTEXTS, TOKENS, WIDTH = 2, 5, 4


def main(out: Path) -> None:
    runner: Any = importlib.import_module("sae_lens.cache_activations_runner").CacheActivationsRunner
    datasets: Any = importlib.import_module("datasets")
    hook = "blocks.3.hook_resid_pre"
    one = object.__new__(runner)
    one.cfg = SimpleNamespace(hook_name=hook, n_seq_in_buffer=CONTEXTS, d_in=WIDTH)
    one.context_size = TOKENS
    one.features = datasets.Features({
        hook: datasets.Array2D(shape=(TOKENS, WIDTH), dtype="float32"),
        "token_ids": datasets.Sequence(datasets.Value(dtype="int32"), length=TOKENS),
    })  # fmt: skip
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, CONTEXTS * TOKENS, WIDTH)).astype("float32")
    ids = rng.integers(0, 1000, (3, CONTEXTS * TOKENS))
    folder = out / "saelens-activations-6.54.12"
    (folder / ".tmp_shards").mkdir(parents=True)
    for n in range(3):
        shard = one._create_shard((torch.from_numpy(values[n]), torch.from_numpy(ids[n])))
        shard.save_to_disk(str(folder / ".tmp_shards" / f"shard_{n:05d}"), num_shards=1)
    runner._consolidate_shards(folder / ".tmp_shards", folder, copy_files=False)
    np.savez(out / "saelens-activations-truth.npz", values=values.reshape(-1, TOKENS, WIDTH), ids=ids.reshape(-1, TOKENS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
