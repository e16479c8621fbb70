"""The other side of the benchmarks: lmprobe itself, asked by lines of JSON. Runs in its own environment; imports nothing of ours.

Each job returns seconds of what lmprobe does alone, without what the job prepares.
"""

import json
import shutil
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import lmprobe
from lmprobe import cache


def prompts_of(count):
    return [f"prompt {i}" for i in range(count)]


def use(place):
    """Take a folder or s3:// URL as the cache."""
    cache.set_cache_backend(place)
    cache.clear_header_cache()
    cache.clear_mask_cache()


def save_pooled(place, values, layers, model="bench"):
    """One entry per prompt of `values` (layer, prompt, hidden)."""
    use(place)
    array = np.load(values, mmap_mode="r")
    rows = [torch.from_numpy(np.ascontiguousarray(array[:, i]).reshape(1, -1)) for i in range(array.shape[1])]
    began = time.perf_counter()
    for prompt, row in zip(prompts_of(len(rows)), rows):
        cache.save_prompt_pooled_activations(model, prompt, layers, row, "mean")
    return time.perf_counter() - began


def save_tokens(place, values, layers, lengths, batch, model="bench"):
    """One entry per prompt of `values` (layer, token, hidden), padded on the left to the longest of its batch, as lmprobe stores them."""
    use(place)
    array = np.load(values, mmap_mode="r")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    took = 0.0
    for i, prompt in enumerate(prompts_of(len(lengths))):
        width = max(lengths[i // batch * batch : i // batch * batch + batch])
        rows = np.zeros((width, len(array), array.shape[2]), array.dtype)
        rows[width - lengths[i] :] = array[:, ends[i] : ends[i + 1]].transpose(1, 0, 2)
        acts, mask = torch.from_numpy(rows.reshape(1, width, -1)), torch.ones(1, width, dtype=torch.int64)
        mask[:, : width - lengths[i]] = 0
        began = time.perf_counter()
        cache.save_prompt_activations(model, prompt, layers, acts, mask)
        took += time.perf_counter() - began
    return took


def read_pooled(place, count, layers, model="bench"):
    use(place)
    prompts = prompts_of(count)
    began = time.perf_counter()
    cache.load_pooled_batch(model, prompts, layers, "mean")
    return time.perf_counter() - began


def read_tokens(place, count, layer, model="bench"):
    use(place)
    prompts = prompts_of(count)
    began = time.perf_counter()
    rows, masks = cache.load_layer_across_prompts(model, prompts, layer)
    # What it returns is only mapped: the values are in memory when they are in one array, without the padding.
    torch.cat([one[0, mask[0].bool()] for one, mask in zip(rows, masks)])
    return time.perf_counter() - began


def read_prompt(place, number, layers, model="bench"):
    use(place)
    began = time.perf_counter()
    cache.load_prompt_activations(model, f"prompt {number}", layers)
    return time.perf_counter() - began


def sweep(place, model, classifier, positive, negative, test, labels):
    """Fit every layer and score it, everything cached before."""
    use(place)
    began = time.perf_counter()
    result = lmprobe.Probe.sweep_layers(model, positive, negative, classifier=classifier, device="cpu", random_state=0)
    scores = result.score(test, labels)
    took = time.perf_counter() - began
    return {"seconds": took, "scores": {str(k): float(v) for k, v in scores.items()}}


PROBES = {}


def extract(place, model, prompts):
    """Warm up as its README says, the model loaded before."""
    use(place)
    if model not in PROBES:
        PROBES[model] = lmprobe.Probe(model=model, layers="all", device="cpu")
        PROBES[model].warmup(["the first call loads the model"])
        shutil.rmtree(place, ignore_errors=True)
    began = time.perf_counter()
    PROBES[model].warmup(prompts)
    took = time.perf_counter() - began
    size = sum(f.stat().st_size for f in Path(place).rglob("*") if f.is_file())
    shutil.rmtree(place, ignore_errors=True)
    return {"seconds": took, "bytes": size}


def info(place):
    use(place)
    began = time.perf_counter()
    cache.cache_info()
    return time.perf_counter() - began


JOBS = {f.__name__: f for f in (save_pooled, save_tokens, read_pooled, read_tokens, read_prompt, sweep, extract, info)}

if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": JOBS[asked.pop("job")](**asked)}
        except Exception as error:  # noqa: BLE001 — sent to the caller, which raises
            answer = {"error": f"{error!r} {traceback.format_exc(limit=-2)}"}
        print("=> " + json.dumps(answer), flush=True)
