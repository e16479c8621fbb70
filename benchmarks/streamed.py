"""A model of three times the memory that a process may take, streamed: ``python -m benchmarks.streamed``, memory, time and bytes read.

The plain pass runs in a process without a limit, the streamed one in a process whose address space may grow by a third of the model. Both
say how much anonymous memory they took beyond what they held before, and seconds of the processor; what is stored is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

import lmprobe_zarr as lz

BLOCKS: Final = 24
VOCABULARY: Final = 2048
MEBIBYTE: Final = 1 << 20
GOALS: Final = {"memory beyond two blocks, GiB": 0.7, "time, ratio": 1.25, "weights read, ratio": 1.0}


def save_model(folder: Path, width: int, inner: int, blocks: int = BLOCKS) -> int:
    """A random float32 Llama in a file for each block; the bytes of one block."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}

    def put(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {
            key: torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape) for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    put("outside.safetensors", {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)})
    nbytes = 0
    for block in range(blocks):
        path = f"model.layers.{block}."
        shapes: dict[str, tuple[int, ...]] = {f"{path}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{path}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{path}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{path}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        nbytes = put(f"block{block}.safetensors", shapes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return nbytes


def _held(what: str) -> int:
    """Bytes of this process, by the name of a line of its status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def extract(model: str, store: str, weights: str, tokens: int, room: int) -> dict[str, Any]:
    """One extraction in this process, whose address space may grow by `room` bytes, if that is not 0."""
    import torch

    torch.set_num_threads(1)
    # What every extraction imports and reserves is not the model's.
    lz.extract(f"{model}-small", ["w1 w2", "w3"], store=f"{store}-small", device="cpu", weights="streamed", progress=False)
    read: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: read.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lmprobe_zarr.cache").addHandler(handler)
    logging.getLogger("lmprobe_zarr.cache").setLevel(logging.INFO)
    rng = np.random.default_rng(0)
    texts = []
    while tokens > 0:
        length = int(rng.integers(20, 120))
        texts.append(" ".join(f"w{i}" for i in rng.integers(1, VOCABULARY, length)))
        tokens -= length
    before, peak, done = _held("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _held("RssAnon"))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    if room:
        limit = _held("VmSize") + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    began, cpu = time.perf_counter(), time.process_time()
    chosen: Any = weights
    plan = lz.plan_extract(model, texts, store=store, device="cpu", weights=chosen)
    lz.extract(model, texts, store=store, device="cpu", weights=chosen, pooling=["mean"], progress=False)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watching.join()
    said = re.search(r"(\d+) bytes of weights were read, of (\d+)", "\n".join(read))
    return {
        "weights": plan.weights, "why": plan.weights_why, "peak": peak - before, "cpu": cpu, "seconds": seconds,
        "read": int(said[1]) / int(said[2]) if said else None, "prompts": len(texts),
    }  # fmt: skip


def _in_a_process(*given: object) -> dict[str, Any]:
    # A limit of the address space counts what the allocator reserves for each thread, used or not.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "benchmarks.streamed", "--one", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, *, width: int, inner: int, tokens: int) -> dict[str, Any]:
    """Every figure of one model."""
    save_model(folder / "model-small", 64, 64, blocks=3)
    block = save_model(folder / "model", width, inner)
    nbytes = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    plain = _in_a_process(folder / "model", folder / "plain", "loaded", tokens, 0)
    streamed = _in_a_process(folder / "model", folder / "streamed", "auto", tokens, nbytes // 3)
    one, other = (lz.open_store(folder / name).dataset().resid_mean.values for name in ("streamed", "plain"))
    return {
        "model, GiB": nbytes / 2**30,
        "block, MiB": block / MEBIBYTE,
        "permitted, MiB": nbytes // 3 / MEBIBYTE,
        "chosen": f"{streamed['weights']}: {streamed['why']}",
        "peak plain, MiB": plain["peak"] / MEBIBYTE,
        "peak streamed, MiB": streamed["peak"] / MEBIBYTE,
        "memory beyond two blocks, GiB": (streamed["peak"] - 2 * block) / 2**30,
        "cpu plain, s": plain["cpu"],
        "cpu streamed, s": streamed["cpu"],
        "time, ratio": streamed["cpu"] / plain["cpu"],
        "wall, ratio": streamed["seconds"] / plain["seconds"],
        "weights read, ratio": streamed["read"],
        "largest difference": float(np.abs(one - other).max() / np.abs(other).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, metavar=("MODEL", "STORE", "WEIGHTS", "TOKENS", "ROOM"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.one:
        model, store, weights, tokens, room = options.one
        print(json.dumps(extract(model, store, weights, int(tokens), int(room))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), width=options.width, inner=3 * options.width, tokens=options.tokens)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        goal = f"   (at most {GOALS[name]})" if name in GOALS else ""
        print(f"{name:<32}{value if isinstance(value, str) else f'{value:.3g}'}{goal}")


if __name__ == "__main__":
    main()
