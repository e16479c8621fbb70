"""A reader of stores by ``docs/format.md`` alone: json, numpy and a decoder of Blosc. It knows neither zarr nor the package.

``python independent_reader.py GROUP OUTPUT.npz`` reads a group into one file, arrays named ``<level>.<name>``. Whatever the page forbids
raises ``Damaged``. It is written to be followed beside the page, not to be fast.
"""

from __future__ import annotations

import json
import struct
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc

Document = dict[str, Any]
HEAD = b'{"zarr_format":3,"node_type":"group","attributes":{"digest":"crc32c:'
OWN = ("prompts.prompt_length", "tokens.token_id", "tokens.position", "tokens.char_start", "tokens.char_end")
NO_LAYERS: list[Any] = [None]
LEVELS = {"prompts": "prompt", "tokens": "token"}


class Damaged(Exception):  # noqa: N818 — what it says of a store
    pass


# ------------------------------------------------------------------------------------------------------------- checksums

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def parse_part(data: bytes) -> Document:
    """A part's document, its digest checked."""
    digits = data[len(HEAD) : len(HEAD) + 8]
    if not data.startswith(HEAD) or b"%08x" % crc32c(HEAD + b"0" * 8 + data[len(HEAD) + 8 :]) != digits:
        raise Damaged("digest")
    document = json.loads(data)["attributes"]
    if (document["format"], document["format_version"]) != ("lmprobe-zarr", 2 if "removed" in document else 1):
        raise Damaged("format")
    return dict(document)


def read_file(part: Path, key: str, entry: list[int]) -> bytes:
    """A file of a part, held against the part's table; of a chunk what comes before its crc32c."""
    try:
        data = (part / key).read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{key} is missing") from None
    chunk = key.rpartition("/")[2].startswith("c.")
    body = data[:-4] if chunk else data
    if len(data) != entry[0] or crc32c(body) != entry[1] or (chunk and struct.unpack("<I", data[-4:])[0] != entry[1]):
        raise Damaged(key)
    return body


# ---------------------------------------------------------------------------------------------------------------- arrays


def decode(body: bytes, codecs: list[Document], dtype: str, shape: list[int]) -> Any:
    """One chunk, its crc32c already off."""
    names = [codec["name"] for codec in codecs]
    if names[0] not in ("bytes", "vlen-utf8") or names[-1] != "crc32c" or names[1:-1] not in ([], ["blosc"]):
        raise Damaged(f"codecs {names}")
    if "blosc" in names:
        body = blosc.decompress(body)
    if dtype != "string":
        return np.frombuffer(body, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    (count,), at, texts = struct.unpack("<I", body[:4]), 4, []
    for _ in range(count):
        (length,) = struct.unpack("<I", body[at : at + 4])
        texts.append(body[at + 4 : at + 4 + length].decode("utf-8"))
        at += 4 + length
    return np.array(texts, object).reshape(shape)


def read_array(part: Path, key: str, files: dict[str, list[int]]) -> tuple[Any, list[str]]:
    """An array of a part, and the names of its dimensions."""
    info = json.loads(read_file(part, f"{key}/zarr.json", files[f"{key}/zarr.json"]))
    shape, chunks = info["shape"], info["chunk_grid"]["configuration"]["chunk_shape"]
    out = np.empty(shape, object if info["data_type"] == "string" else info["data_type"])
    for at in product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))):
        name = f"{key}/c.{'.'.join(map(str, at))}"
        values = decode(read_file(part, name, files[name]), info["codecs"], info["data_type"], chunks)
        place = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, chunks, shape, strict=True))
        # The last chunk is stored at full size.
        out[place] = values[tuple(slice(s.stop - s.start) for s in place)]
    return out, info["dimension_names"]


# ----------------------------------------------------------------------------------------------------------------- group


def read_group(group: Path) -> dict[str, Any]:
    """What a group shows, by the steps of "Reading a group"."""
    found = {}
    for folder in [*group.iterdir(), *(group / "annotations").glob("*")]:
        if folder.name.startswith(".") or folder.name == "annotations" or not (folder / "zarr.json").is_file():
            continue
        document = parse_part((folder / "zarr.json").read_bytes())
        if (document["group"], document["name"]) != (group.name, folder.name):
            raise Damaged("a part that was moved")
        found[folder] = document
    replaced = {name for document in found.values() for name in document["replaces"]}
    order = sorted((folder for folder in found if folder.name not in replaced), key=lambda folder: folder.name)

    hashes = {f: [found[f]["prompt_sha256"][i : i + 64] for i in range(0, len(found[f]["prompt_sha256"]), 64)] for f in order}
    parts = [folder for folder in order if found[folder]["kind"] == "part"]
    prompts = list(dict.fromkeys(digest for folder in parts for digest in hashes[folder]))
    layers = {
        level: sorted({layer for f in parts if f"{level}/layer/zarr.json" in found[f]["files"] for layer in found[f]["layers"]})
        for level in LEVELS
    }
    n_tokens, since = token_rows(order, found, hashes)
    prompts = [digest for digest in prompts if is_shown(digest, order, found, hashes, since)]
    starts = dict(zip(prompts, np.cumsum([0, *(n_tokens.get(d, 0) for d in prompts)]).tolist(), strict=False))
    n_rows = {"prompts": len(prompts), "tokens": sum(n_tokens.get(d, 0) for d in prompts)}

    out: dict[str, Any] = {
        "prompts.prompt_sha256": np.array(prompts),
        **{f"{level}.layer": np.array(layers[level]) for level in LEVELS if layers[level]},
    }
    seen: dict[str, Any] = {}
    described: set[str] = set()
    for rank, folder in enumerate(order):
        document = found[folder]
        for key, hidden in document.get("removed", {}).items():
            level, name = key.split("/")
            hides: Any = out.get(f"{level}.{name}")
            for digest in hashes[folder] if hides is not None else []:
                if digest in starts:
                    first, n = (prompts.index(digest), 1) if level == "prompts" else (starts[digest], n_tokens.get(digest, 0))
                    which = slice(None) if hidden is None else [layers[level].index(layer) for layer in hidden if layer in layers[level]]
                    nothing: Any = {"f": np.nan, "O": "", "b": False}.get(hides.dtype.kind, -1)
                    hides[(slice(first, first + n), *([] if hidden is None else [which]))] = nothing
                    if hidden is None:
                        seen[f"{level}.{name}"][first : first + n] = False
        if "removed" in document:
            continue
        for key in sorted({key.rpartition("/")[0] for key in document["files"] if key.count("/") == 2}):
            level, name = key.split("/")
            if name in ("layer", "n_tokens", "prompt_row", "prompt_sha256"):
                continue
            values, dims = read_array(folder, key, document["files"])
            if "column" in json.loads((folder / key / "zarr.json").read_text())["attributes"]:
                described.add(f"{level}.{name}")
            values = np.moveaxis(values, dims.index(LEVELS[level]), 0)  # (row, layer, …) or (row, …)
            by_layer = "layer" in dims
            row_shape = (len(layers[level]), *values.shape[2:]) if by_layer else values.shape[1:]
            absent: Any = {"f": np.nan, "O": "", "b": False}.get(values.dtype.kind, -1)
            before = out.get(f"{level}.{name}", np.empty((0, *row_shape), values.dtype))
            shape = (n_rows[level], *np.maximum(before.shape[1:], row_shape))  # parts may hold more or fewer of the largest logits
            place = out[f"{level}.{name}"] = np.full(shape, absent, np.promote_types(before.dtype, values.dtype))
            place[tuple(map(slice, before.shape))] = before
            filled = seen.setdefault(f"{level}.{name}", np.zeros(n_rows[level], bool))
            row = 0
            for i, digest in enumerate(hashes[folder]):
                n = 1 if level == "prompts" else document["n_tokens"][i]
                if digest in starts and (level == "prompts" or rank >= since[digest]):
                    first = prompts.index(digest) if level == "prompts" else starts[digest]
                    chosen = place[first : first + n]
                    if by_layer:
                        chosen[:, [layers[level].index(layer) for layer in document["layers"]]] = values[row : row + n]
                    else:
                        chosen[:] = absent
                        chosen[tuple(map(slice, values[row : row + n].shape))] = values[row : row + n]
                    filled[first : first + n] = True
                row += n
    for key, filled in seen.items():
        # A column of the user's that some prompts lack.
        if out[key].ndim == 1 and out[key].dtype.kind in "ibO" and not filled.all() and key not in OWN:
            if out[key].dtype.kind == "O" and key not in described:
                continue
            out[key] = np.where(filled, out[key] if out[key].dtype.kind == "O" else out[key].astype(float), np.nan)
    return out


def holds(document: Document) -> dict[str, list[int] | None]:
    """The variables of a part that are values of a model, with their layers; None for one without."""
    names = {key.rpartition("/")[0] for key in document["files"] if key.count("/") == 2}
    sites = tuple(f"{site}{end}" for site in ("resid", "attn", "mlp", "embed", "router") for end in ("", "_"))
    found: dict[str, list[int] | None] = {}
    for key in names:
        name = key.partition("/")[2]
        if name in sites[::2] or name.startswith((*sites[1::2], "logits", "perplexity", "token_log_prob", "token_perplexity")):
            unlayered = not name.startswith(("resid", "attn", "mlp", "router"))
            found[key] = None if unlayered else document["layers"]
    return found


def is_shown(digest: str, order: list[Path], found: dict[Path, Document], hashes: dict[Path, list[str]], since: dict[str, int]) -> bool:
    """Whether anything of a prompt is left that no tombstone hides."""
    mine = [folder for folder in order if digest in hashes[folder]]
    if not any("removed" in found[folder] for folder in mine):
        return True
    left: set[tuple[str, int | None]] = set()
    for folder in mine:
        for key, layers in found[folder].get("removed", {}).items():
            left -= {(key, layer) for layer in layers or NO_LAYERS}
        for key, layers in {} if "removed" in found[folder] else holds(found[folder]).items():
            if key.startswith("prompts/") or order.index(folder) >= since.get(digest, 0):
                left |= {(key, layer) for layer in layers or NO_LAYERS}
    return bool({(k, layer) for k, layer in left if k.startswith("prompts/") or order.index(mine[-1]) >= since.get(digest, 0)})


def token_rows(order: list[Path], found: dict[Path, Document], hashes: dict[Path, list[str]]) -> tuple[dict[str, int], dict[str, int]]:
    """How many token rows each prompt has, and from which part on they count."""
    n_tokens: dict[str, int] = {}
    since: dict[str, int] = {}
    kept: set[str] = set()  # prompts of which a part that is up to date keeps tokens
    for rank, folder in enumerate(order):
        counts = found[folder]["n_tokens"]
        for digest, n in zip(hashes[folder], counts or [], strict=counts is not None):
            if n_tokens.get(digest) != n:
                n_tokens[digest], since[digest] = n, rank
                kept.discard(digest)
            if "removed" not in found[folder]:
                kept.add(digest)
    return {digest: n for digest, n in n_tokens.items() if digest in kept}, since


if __name__ == "__main__":
    held = read_group(Path(sys.argv[1]))
    np.savez(sys.argv[2], **{name: values.astype(str) if values.dtype == object else values for name, values in held.items()})
    assert not {"zarr", "lmprobe_zarr", "xarray"} & set(sys.modules)
