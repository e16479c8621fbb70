"""How many bits a value of real activations takes, by dtype and codec, beside the floor of their entropy: ``python -m benchmarks.codecs``.

The 400 sentences of the demo through all-MiniLM-L6-v2, every token of every layer, in chunks of 2 MiB of rows of one layer, one thread.
The floor is what a coder takes that knows how often each sign and exponent occurs, and leaves the mantissa as it is: no lossless codec of
single values comes below it unless mantissas are less than random. Speeds are by processor time, medians of
three passes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc

import lmprobe_zarr as lz
from lmprobe_zarr.demo import bundled_model, load_sentences

Array = np.ndarray[Any, Any]
CHUNK_BYTES = 2 * 2**20
#: Name, compressor, level; all with the filter that shuffles bits, in blocks of blosc's own choice.
CODECS = [("lz4 5 (the default)", b"lz4", 5), ("zstd 1", b"zstd", 1), ("zstd 5", b"zstd", 5)]


def activations(sentences: int) -> Array:
    """Float32, shape (layer, token, hidden)."""
    texts = load_sentences()["text"][:sentences]
    with tempfile.TemporaryDirectory() as folder:
        store = lz.open_store(Path(folder), durable=False)
        lz.extract(bundled_model(), texts, store=store, pooling=[], keep_tokens=True, dtype="float32", progress=False)
        values: Array = store.tokens().resid.values
    return values


def forms(values: Array) -> dict[str, tuple[Array, int]]:
    """The dtypes that are compared, each with its number of mantissa bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even
    wide = (rounded.astype(np.uint32) << 16).view(np.float32)
    half: Array = values.astype(np.float16)
    return {"float32": (values, 23), "float16": (half, 10), "bfloat16, 16 bits": (rounded, 7), "bfloat16 in float32": (wide, 7)}


def floor(values: Array, mantissa: int) -> float:
    """Bits per value: the entropy of sign and exponent, and the mantissa as it is."""
    words = values.reshape(-1).view({2: np.uint16, 4: np.uint32}[values.itemsize])
    if values.dtype == np.float32 and mantissa == 7:
        words = (words >> 16).astype(np.uint16)
    counts = np.bincount((words >> mantissa).astype(np.int64))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + mantissa


def measure(values: Array, codec: bytes, level: int) -> tuple[float, float, float]:
    """Bits per value, and GB/s of encoding and of decoding."""
    rows = CHUNK_BYTES // values[0, 0].nbytes
    chunks = [np.ascontiguousarray(layer[i : i + rows]) for layer in values for i in range(0, len(layer), rows)]
    encoding, decoding, frames = [], [], []
    for _ in range(3):
        began = time.process_time()
        frames = [blosc.compress(c.reshape(-1).view(np.uint8), codec, level, blosc.BITSHUFFLE, 0, c.itemsize) for c in chunks]
        encoding.append(time.process_time() - began)
        room = np.empty(CHUNK_BYTES, np.uint8)
        began = time.process_time()
        for chunk, frame in zip(chunks, frames, strict=True):
            blosc.decompress(frame, room[: chunk.nbytes])
        decoding.append(time.process_time() - began)
    for chunk, frame in zip(chunks, frames, strict=True):
        assert blosc.decompress(frame) == chunk.tobytes()
    size = values.nbytes / 1e9
    return 8 * sum(map(len, frames)) / values.size, size / statistics.median(encoding), size / statistics.median(decoding)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the sentences")
    options = parser.parse_args()
    blosc.set_nthreads(1)
    held = forms(activations(40 if options.quick else 400))
    print(f"| bits per value; GB/s encoded, decoded | {' | '.join(held)} |")
    print("|---" * (1 + len(held)) + "|")
    floors = {name: floor(values, mantissa) for name, (values, mantissa) in held.items()}
    print(f"| floor: entropy of sign and exponent, mantissa as it is | {' | '.join(f'{bits:.2f}' for bits in floors.values())} |")
    for label, codec, level in CODECS:
        cells = []
        for name, (values, _) in held.items():
            bits, encoded, decoded = measure(values, codec, level)
            cells.append(f"{bits:.2f} (+{100 * (bits / floors[name] - 1):.0f} %); {encoded:.2f}, {decoded:.2f}")
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
