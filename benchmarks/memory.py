"""Peak memory of what handles much, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import lmprobe_zarr as lz
from benchmarks.computed import save_model
from benchmarks.data import (
    BATCH,
    GROUP,
    HIDDEN,
    LAYERS,
    activations,
    digests,
    lengths_of,
    token_batches,
)
from benchmarks.timing import Figure, Peer
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo


def _in_a_process_of_its_own(call: Any, *given: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return int(pool.submit(_peak_of, call, *given).result())


def _peak_of(call: Any, *given: Any) -> int:
    """Bytes of memory that the second of two calls takes beyond what the process holds before it."""
    from benchmarks.curves import forget_peak, peak

    call(*given, warm=True)
    before = forget_peak()
    call(*given, warm=False)
    return peak() - before


def _sweep_once(url: str, *, warm: bool) -> None:
    data = lz.open_store(url, "r").dataset().resid_mean
    n = 64 if warm else data.sizes["prompt"]
    lz.sweep(data.isel(prompt=slice(0, n)), labels=np.arange(n) % 2, probes="ridge", cv=2, n_workers=1)


def _compact_once(url: str, *, warm: bool) -> None:
    if not warm:
        lz.open_store(url, durable=False).compact(progress=False)


def _import_once(place: str, url: str, *, warm: bool) -> None:
    if not warm:
        lz.import_safetensors(place, lz.open_store(url, durable=False), progress=False)


def _extract_once(model: str, url: str, n: int, *, warm: bool) -> None:
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{i}" for i in rng.integers(0, 31_997, 64)) for _ in range(1 if warm else n)]
    # The model's own memory is that of the first call, which loads it.
    store = lz.open_store(url, durable=False)
    lz.extract(model, prompts, store=store, pooling=("mean",), keep_tokens=True, device="cpu", progress=False)


def memory(folder: Path, peer: Peer, *, quick: bool, runs: int) -> list[Figure]:  # noqa: ARG001 — nothing is timed
    """Peak memory of what handles much, each in a process of its own."""
    n, layers, hidden = (2000 if quick else 20_000), 8, 1024
    values = activations((layers, n, hidden))
    store = lz.open_store(folder / "pooled", durable=False)
    info = GroupInfo(model="memory", num_layers=layers, hidden_size=hidden)
    sha = digests(n)
    for i in range(0, n, n // 20):
        rows = values[:, i : i + n // 20]
        store.write(info, TokenBatch(sha256=sha[i : i + n // 20], layers=tuple(range(layers)), prompts={"resid_mean": rows}))
    layer, fold = n * hidden * 4, n * hidden * 2
    swept = _in_a_process_of_its_own(_sweep_once, store.url)
    out = [
        Figure(
            work="peak memory", what=f"sweep of {layers} × {n:,} × {hidden}, ridge, 2 folds: of two layers and a training fold in float32",
            value=swept / (2 * layer + fold), reach=1, stretch=0.5, at_least=False, ours=f"{swept / 2**20:.0f} MiB",
            limit=f"{(2 * layer + fold) / 2**20:.0f} MiB",
        )
    ]  # fmt: skip
    lengths = lengths_of(40 if quick else 400)
    acts = activations((LAYERS, int(lengths.sum()), HIDDEN))
    np.save(folder / "tokens.npy", acts)
    given = {"values": str(folder / "tokens.npy"), "layers": list(range(LAYERS)), "lengths": lengths.tolist()}
    peer("save_tokens", place=str(folder / "peer"), batch=BATCH, **given)
    tokens_store = lz.open_store(folder / "tokens", durable=False)
    for batch in token_batches(acts, lengths, 4):
        tokens_store.write(GROUP, batch)
    size = acts.nbytes / 1e9
    del acts, values
    model, prompts = save_model(folder / "model"), 51 if quick else 512
    for what, took in (
        (f"compact {size:.1f} GB in {-(-len(lengths) // 4)} parts", _in_a_process_of_its_own(_compact_once, tokens_store.url)),
        (f"import {size:.1f} GB of lmprobe's", _in_a_process_of_its_own(_import_once, str(folder / "peer"), str(folder / "imported"))),
        (f"extract {prompts} prompts, over the model", _in_a_process_of_its_own(_extract_once, model, str(folder / "extracted"), prompts)),
    ):
        out.append(
            Figure(
                work="peak memory", what=what, value=took / 2**30, reach=1, stretch=0.5, at_least=False, unit="GiB",
                ours=f"{took / 2**20:.0f} MiB",
            )
        )  # fmt: skip
    return out
