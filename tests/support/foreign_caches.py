"""Caches as others write them, made byte by byte, so that what is read is never compared with what wrote it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]

CODES = {"int64": "I64", "int32": "I32", "float32": "F32", "float16": "F16", "float64": "F64", "uint16": "BF16", "uint8": "U8"}
MODEL = "acme/toy-2l"


def sha16(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file; arrays of uint16 are the bits of bfloat16."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = b""
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return raw_file(header, body)


def raw_file(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def read_safetensors(data: bytes) -> dict[str, Array]:
    """Tensors of a file, bfloat16 as its bits; a second, simple reader."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = {code: name for name, code in CODES.items()}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            found[name] = np.frombuffer(data[8 + length + a : 8 + length + b], names[entry["dtype"]]).reshape(entry["shape"])
    return found


def to_bits(values: Array) -> npt.NDArray[np.uint16]:
    """float32 cut down to the bits of bfloat16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def of_bits(bits: Array) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def prompt_tensors(
    seed: int,
    *,
    n: int = 4,
    pad: tuple[int, int] = (2, 0),
    layers: tuple[int, ...] = (0, 1),
    hidden: int = 3,
    dtype: str = "float32",
    pooled: tuple[str, ...] = (),
) -> dict[str, Array]:
    """What lmprobe's main file of one prompt holds, padding included; the padding is 99."""
    rng = np.random.default_rng(seed)
    seq = pad[0] + n + pad[1]
    mask = np.array([[0] * pad[0] + [1] * n + [0] * pad[1]], np.int64)
    tensors: dict[str, Array] = {"attention_mask": mask}
    for layer in layers:
        values = rng.standard_normal((1, seq, hidden)).astype("float32" if dtype == "bfloat16" else dtype)
        values[mask == 0] = 99
        tensors[f"layer_{layer}"] = to_bits(values) if dtype == "bfloat16" else values
    for pooling in pooled:
        for layer in layers:
            tensors[f"pooled_{pooling}_layer_{layer}"] = rng.standard_normal((1, hidden)).astype("float32")
    return tensors


def add_model(root: Path, model: str = MODEL) -> Path:
    folder = root / sha16(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_model_name.txt").write_text(model)
    return folder


def add_prompt(
    folder: Path,
    text: str,
    tensors: Mapping[str, Array] | bytes | None,
    *,
    perplexity: Mapping[str, Array] | bytes | None = None,
    logits: Mapping[str, Array] | bytes | None = None,
    listed: bool = True,
) -> Path:
    """The files of one prompt, and its line in the manifest."""
    name = sha16(text)
    for suffix, content in (("", tensors), (".perplexity", perplexity), (".logits", logits)):
        if content is not None:
            data = content if isinstance(content, bytes) else safetensors_bytes(content)
            (folder / f"{name}{suffix}.safetensors").write_bytes(data)
    if listed:
        line = json.dumps({"hash": name, "prompt": text, "num_tokens": 4, "cached_at": "2026-01-01"}, ensure_ascii=False) + "\n"
        with (folder / "_manifest.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
    return folder / f"{name}.safetensors"


def state_of(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file below a folder, and the time of every folder."""
    return {
        str(path.relative_to(root)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    } | {".": (b"", root.stat().st_mtime_ns)}


def add_folder(root: Path, name: str, tensors: dict[str, Any], model: str = MODEL) -> Path:
    torch = pytest.importorskip("torch")  # here, since it takes seconds: other files of this module need none
    folder = root / sha16(model) / name
    for key, value in tensors.items():
        path = folder / f"{key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
    return folder


def prompt_folder(seed: int, *, n: int = 4, pad: int = 2, batch: int = 1, hidden: int = 3) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, pad + n, dtype=torch.int64)
    mask[:, :pad] = 0
    layers = {f"layer_{i}": torch.randn(batch, pad + n, hidden, generator=generator) for i in (0, 1)}
    return {"attention_mask": mask, **layers}
