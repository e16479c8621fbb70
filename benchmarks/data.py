"""What the benchmarks store: random values with a few outlier dimensions, as residual streams have them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmprobe_zarr.batch.hashes import prompt_sha256
from lmprobe_zarr.batch.token_batch import TokenBatch
from lmprobe_zarr.store.format.group import GroupInfo
from lmprobe_zarr.store.store import Store

Array = np.ndarray[Any, Any]
LAYERS, HIDDEN = 16, 2048
GROUP = GroupInfo(model="bench", num_layers=LAYERS, hidden_size=HIDDEN)
#: lmprobe runs prompts in batches of so many unless told otherwise, and stores each with its batch's padding.
BATCH = 8


def activations(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random values with a few outlier dimensions; float16."""
    rng = np.random.default_rng(seed)
    out = np.empty(shape, np.float16)
    outliers = rng.integers(0, shape[-1], 3)
    for layer in range(shape[0]):  # a layer at a time: float32 of all of them would be gigabytes
        values = rng.standard_normal(shape[1:], dtype=np.float32)
        values[..., outliers] *= 40
        out[layer] = values
    return out


def digests(count: int) -> list[str]:
    """Those of the prompts that lmprobe's side stores too."""
    return [prompt_sha256(f"prompt {i}") for i in range(count)]


def pooled_batch(values: Array) -> TokenBatch:
    """One value per prompt, of all layers."""
    return TokenBatch(sha256=digests(values.shape[1]), layers=tuple(range(len(values))), prompts={"resid_mean": values})


def lengths_of(prompts: int) -> Array:
    """Tokens of each prompt: 5 to 127, 66 in the middle."""
    return np.random.default_rng(1).integers(5, 128, prompts)


def token_batches(values: Array, lengths: Array, prompts_each: int = 50) -> Iterator[TokenBatch]:
    """Tokens of all layers, some prompts at a time, as extraction hands them over."""
    sha, ends = digests(len(lengths)), np.concatenate([[0], np.cumsum(lengths)])
    for i in range(0, len(lengths), prompts_each):
        counts = lengths[i : i + prompts_each]
        rows = values[:, ends[i] : ends[i + len(counts)]]
        yield TokenBatch(sha256=sha[i : i + len(counts)], layers=tuple(range(len(values))), n_tokens=counts, tokens={"resid": rows})


def write_tokens(store: Store, values: Array, lengths: Array, *, compressed: bool = True) -> str:
    """All of it as one part; its name."""
    part = store.new_part(GROUP, compressed=compressed)
    for batch in token_batches(values, lengths):
        part.append(batch)
    return part.commit().name


def clear(place: Path) -> None:
    """Remove what one side has written, so that it is not flushed to the medium while the next one is timed."""
    shutil.rmtree(place)
    os.sync()
